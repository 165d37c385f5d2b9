"""The Hugging Face tokenizer of a model under test, also where Mistral's own one lies beside it.

mistral_common's tokenizer (tekken.json) renders conversations by a program of its own. It has no chat template, so
there is no place for a defense in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError

MISTRALS_OWN = "tekken.json"
_HUGGING_FACES = ("tokenizer.json", "tokenizer.model")


def hf_tokenizer(model: str, **options: Any) -> Any:
    """Load the Hugging Face tokenizer of a model.

    Args:
        model: folder or hub id.
        options: of `AutoTokenizer.from_pretrained`.

    Raises:
        DttError: the model has none, or none that loads.
    """
    from transformers import AutoTokenizer

    folder = Path(model)
    if (folder / MISTRALS_OWN).is_file() and not any((folder / name).is_file() for name in _HUGGING_FACES):
        raise mistral_refusal(model)
    try:
        # Without the keyword tekken.json is taken, whatever tokenizer.json says; older releases pass it over.
        tokenizer = AutoTokenizer.from_pretrained(model, mistral_format=False, **options)
    except Exception as error:  # tokenizers raises that very class
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DttError(f"{model}: its tokenizer does not load ({reason}).") from error
    if type(tokenizer).__name__.startswith("MistralCommon"):
        raise mistral_refusal(model)
    return tokenizer


def mistral_refusal(model: str) -> DttError:
    """Return the refusal of a tokenizer in Mistral's own format."""
    return DttError(
        f"{model}: Mistral's own tokenizer ({MISTRALS_OWN}) has no chat template that could hold a defense, and the"
        " dtt_ models need the Hugging Face one (tokenizer.json); take a release of the model that has it, and leave"
        " tokenizer_mode=mistral out."
    )

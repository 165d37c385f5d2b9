"""The tokenizer as an engine loads it.

An engine does not use tokenizer.json as it stands: tokenizer_config.json, special_tokens_map.json,
added_tokens.json and the tokenizer's class all add tokens, and some classes set a normaliser of their own. So where
transformers is installed, it is asked; vLLM loads the same tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError


def load_as_engine(folder: Path) -> Any | None:
    """Return the transformers tokenizer of a model's folder; None where transformers is not installed.

    Nothing is downloaded, and no code of the model's own is run. Mistral's tekken.json is left aside, as baked
    checkpoints leave it out.

    Raises:
        DttError: transformers can't load it, or it has no backend in the library `tokenizers`.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, mistral_format=False
        )
        tokenizer("a")  # some settings are looked at only here, such as a model_max_length that is no number
    except Exception as error:  # whatever it stumbles over in files that anyone may have written
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise DttError(
            f"transformers can't load the tokenizer of {folder} ({reason}); no code of the model's own is run, so use "
            "a checkpoint whose tokenizer loads without."
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DttError(
            f"transformers loads the tokenizer of {folder} as {type(tokenizer).__name__}, which does not use its "
            "tokenizer.json; set tokenizer_class in its tokenizer_config.json to PreTrainedTokenizerFast."
        )
    return tokenizer


def load_as_vllm(folder: Path) -> Any | None:
    """Return the tokenizer that vLLM takes for a model's folder; None where vLLM is not installed.

    Raises:
        DttError: vLLM can't load it.
    """
    try:
        from vllm.tokenizers import get_tokenizer
    except ImportError:
        return None
    try:
        return get_tokenizer(str(folder))
    except Exception as error:  # as above
        raise DttError(f"vLLM can't load the tokenizer of {folder} ({error}); use another checkpoint.") from error

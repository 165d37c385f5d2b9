"""The arm under attack: model, tokens, defenses and format, rendered by the code that evaluates."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from dtt_plugin.attack.options import AttackOptions
from dtt_plugin.checkpoint.state import state
from dtt_plugin.errors import DttError
from dtt_plugin.prompt.defense_texts import PROMPT_DEFENSES
from dtt_plugin.prompt.defenses import NONE, TOKENS, parse_defense
from dtt_plugin.prompt.formats import MODEL_FORMAT, check_format, defensive_token_names
from dtt_plugin.prompt.renderer import PromptRenderer, missing_bos, model_template
from dtt_plugin.public_names import public_name
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens
from dtt_plugin.training.chat_model import load_chat_model
from dtt_plugin.training.soft_prompt import SoftPrompt

_MUCH_FASTER = 1.3
_WORDS = "some words"


class AttackedArm(NamedTuple):
    """An arm, loaded."""

    model: SoftPrompt
    """With the arm's rows in front; none where it has no DefensiveTokens."""
    renderer: PromptRenderer
    dtype: str
    facts: dict[str, Any]
    """What the dtt_ models report about the same arm."""

    def undefended(self) -> SoftPrompt:
        """Return the same model without tokens."""
        return SoftPrompt(self.model.model, self.model.rows[:0])


def arm_tokens(options: AttackOptions) -> tuple[tuple[str, ...], DefensiveTokens | None]:
    """Return the arm's defenses, and its tokens where it has any.

    Raises:
        DttError: a bad token file, a defense that needs one, or one that changes the text under attack.
    """
    loaded = load_tokens(options.tokens, model=options.tokens_model) if options.tokens else None
    defenses = parse_defense(options.defense, default=TOKENS if loaded else NONE)
    if TOKENS in defenses and loaded is None:
        raise DttError(f"--defense {options.defense} needs a token file; add --tokens FILE.")
    if changing := [name for name in defenses if _changes_text(name)]:
        raise DttError(
            f"--defense {options.defense}: {changing[0]} rewrites the untrusted data, so that a suffix would not be"
            " read as it was optimised; attack the arm without it, and evaluate that file here as a transferred attack."
        )
    return defenses, loaded if TOKENS in defenses else None


def _changes_text(defense: str) -> bool:
    """Return whether a defense rewrites the data, and does not just set something around it."""
    mark = PROMPT_DEFENSES[defense].mark if defense in PROMPT_DEFENSES else None
    return mark is not None and _WORDS not in mark(_WORDS)


def load_arm(options: AttackOptions, *, dtype: str) -> AttackedArm:
    """Load the model under attack.

    Args:
        options: model, tokens, defense and format count.
        dtype: of the weights; auto chooses.

    Raises:
        DttError: no such model, tokens of another width, or weights that give no gradient.
    """
    defenses, tokens = arm_tokens(options)
    by_default = tokens.prompt_format if tokens else MODEL_FORMAT
    prompt_format = check_format(options.prompt_format or by_default)
    if dtype == "auto":
        dtype = fastest_dtype()
    chat = load_chat_model(options.model, dtype=dtype, prompt_format=prompt_format)
    weight = chat.model.get_input_embeddings().weight
    if getattr(chat.model, "hf_quantizer", None) is not None or not weight.is_floating_point():
        raise DttError(
            f"{options.model} has quantised weights, which give an attack no gradient; give the checkpoint in"
            " float32, bfloat16 or float16."
        )
    if tokens and tokens.width != weight.shape[1]:
        raise DttError(
            f"{options.tokens} has rows of width {tokens.width} (made for {tokens.model}), {options.model} has width"
            f" {weight.shape[1]}; transfer them first with `dtt align` and `dtt transfer`."
        )
    rows = torch.from_numpy(tokens.rows.copy()) if tokens else torch.empty(0, weight.shape[1])
    renderer = _renderer(chat.tokenizer, prompt_format, defenses, len(rows))
    renderer.check_arm()
    facts = {
        "model": public_name(options.model),
        "weights": state(options.model),
        "defense": "+".join(defenses) or NONE,
        "tokens_sha256": tokens.digest if tokens else None,
        "prompt_format": prompt_format,
        "renderer_sha256": renderer.fingerprint,
    }
    return AttackedArm(SoftPrompt(chat.model, rows), renderer, str(weight.dtype).removeprefix("torch."), facts)


def _renderer(tokenizer: Any, prompt_format: str, defenses: tuple[str, ...], k: int) -> PromptRenderer:
    """Return the renderer of the dtt_ models; the tokenizer gets the DefensiveTokens' names, as theirs does."""
    from transformers import AddedToken

    template = model_template(tokenizer)
    bos = missing_bos(tokenizer, template, prompt_format)
    if k:
        names = [AddedToken(name, special=True, normalized=False) for name in defensive_token_names(k)]
        tokenizer.add_tokens(names, special_tokens=True)
    return PromptRenderer(
        tokenizer, prompt_format=prompt_format, model_template=template, defenses=defenses, k=k, bos=bos
    )


def fastest_dtype() -> str:
    """Return the data type in which this machine attacks fastest: measured on a product as a model has it.

    On a GPU: auto, the checkpoint's own. On a processor bfloat16 only where its units make it much faster.
    """
    if torch.cuda.is_available():
        return "auto"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(1024, 4096, bias=False, dtype=dtype).requires_grad_(False)
        x = torch.ones(128, 1024, dtype=dtype)
        layer(x)
        rounds = []
        for _ in range(5):
            started = time.perf_counter()
            layer(x)
            rounds.append(time.perf_counter() - started)
        seconds[dtype] = min(rounds)
    return "bfloat16" if seconds[torch.float32] > _MUCH_FASTER * seconds[torch.bfloat16] else "float32"

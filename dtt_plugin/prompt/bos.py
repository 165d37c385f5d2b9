"""Which BOS a prompt needs between the DefensiveTokens and the model's own template: decided here and nowhere else.

A tokenizer may put a BOS in front of plain text that its chat template does not render. A prompt then holds
exactly that one BOS: tokens, BOS, messages. The question is asked of the *base* tokenizer; a baked one adds none
any more.
"""

from __future__ import annotations

from collections.abc import Callable

from dtt_plugin.prompt.defenses import Message
from dtt_plugin.prompt.formats import MODEL_FORMAT

PROBES: tuple[list[Message], ...] = (
    [{"role": "system", "content": "the trusted instruction"}, {"role": "user", "content": "the untrusted data"}],
    [{"role": "user", "content": "the untrusted data"}],
)
"""What to try a template with; the first that it can render decides: not every one has a system role."""


def bos_to_render(
    prompt_format: str,
    *,
    bos: str | None,
    adds_bos: bool,
    render: Callable[[list[Message]], str | None],
) -> str:
    """Return the BOS text to render in front of the model's own template; empty where none is missing.

    Args:
        prompt_format: a published format says itself whether it has a BOS, so none is ever added to it.
        bos: the base tokenizer's BOS text.
        adds_bos: whether the base tokenizer puts it in front of plain text.
        render: a conversation in the model's own template; None where the template refuses it.
    """
    if prompt_format != MODEL_FORMAT or not bos or not adds_bos:
        return ""
    rendered = next((text for messages in PROBES if (text := render(messages)) is not None), None)
    return "" if rendered is None or rendered.lstrip().startswith(bos) else bos

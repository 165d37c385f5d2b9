"""Prompt formats: where the DefensiveTokens, the BOS token and the messages stand.

A format is a jinja chat template, so that one text serves the model wrappers,
a baked checkpoint and any server. The variable `add_defensive_tokens`
(default: true) switches the DefensiveTokens per request.

Source of the published formats: the DefensiveTokens paper, arXiv 2507.07974,
and the templates of the checkpoints its authors publish. They differ from the
models' own templates in their white space, and put the tokens before the BOS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dtt_plugin.control_tokens import TRUSTED_ROLES, broken, control_texts, separator_for
from dtt_plugin.errors import DttError

TOKENS_SWITCH = "add_defensive_tokens"
"""The template variable that switches the DefensiveTokens."""

MODEL_FORMAT = "model"
"""The model's own chat template, with the DefensiveTokens in front of everything."""

# Per format: (once at the start, before the role, after the role, after the content, generation prompt).
_PUBLISHED = {
    "llama3": (
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>\n",
        "\n\n<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n",
    ),
    "falcon3": ("", "<|", "|>\n", "\n\n", "<|assistant|>\n"),
    "qwen2.5": ("", "<|im_start|>", "\n", "\n\n<|im_end|>\n", "<|im_start|>assistant\n"),
}

PUBLISHED_FORMATS = tuple(_PUBLISHED)

# The formats that the four published token files were trained with.
FORMAT_OF_PUBLISHED_MODEL = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3",
    "tiiuae/Falcon3-7B-Instruct": "falcon3",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5",
}


def defensive_token_names(k: int) -> list[str]:
    """Return the names of `k` DefensiveTokens as the tokenizer knows them: `[DefensiveToken0]` ..."""
    return [f"[DefensiveToken{i}]" for i in range(k)]


def markers(prompt_format: str) -> list[str]:
    """Return the chat markers of a published format, such as `<|eot_id|>`; none for the model's own."""
    return sorted(set(re.findall(r"<\|\w+\|>", "".join(_PUBLISHED.get(prompt_format, ())))))


def check_format(prompt_format: str) -> str:
    """Return `prompt_format` if it names a format.

    Raises:
        DttError: it does not; the sentence lists those that exist.
    """
    if prompt_format != MODEL_FORMAT and prompt_format not in _PUBLISHED:
        known = ", ".join((MODEL_FORMAT, *_PUBLISHED))
        raise DttError(f"prompt_format={prompt_format!r} is not a prompt format; choose one of: {known}.")
    return prompt_format


def chat_template(
    prompt_format: str,
    *,
    model_template: str | None,
    k: int,
    bos: str = "",
    default_on: bool = True,
    control_tokens: Sequence[str] = (),
    system_in_user: bool = False,
) -> str:
    """Return the jinja chat template of `prompt_format` for `k` DefensiveTokens.

    Args:
        prompt_format: "model" or one of `PUBLISHED_FORMATS`.
        model_template: the model's own template; needed by the format "model" only.
        k: number of DefensiveTokens, 0 for a template without any.
        bos: for the format "model": a BOS text to put between the DefensiveTokens and the model's template,
            where the model's tokenizer adds a BOS that its template does not render.
        default_on: whether the tokens stand there when a request leaves `add_defensive_tokens` out.
        control_tokens: the tokenizer's added tokens; where they are given, the template itself breaks them in
            user and tool messages, exactly as `control_tokens.neutralise` does.
        system_in_user: put the system message in front of the first user message, for models without a
            system role.

    Raises:
        DttError: unknown format, or the format "model" and a model without a template.
    """
    switch = f"{TOKENS_SWITCH} is not defined or {TOKENS_SWITCH}"
    if not default_on:
        switch = f"{TOKENS_SWITCH} is defined and {TOKENS_SWITCH}"
    names = "".join(defensive_token_names(k))
    tokens = f"{{%- if {switch} -%}}{{{{- {names!r} -}}}}{{%- endif -%}}" if k else ""
    tokens += neutralising_prelude(control_tokens) if control_tokens else ""
    tokens += _SYSTEM_IN_USER if system_in_user else ""
    if check_format(prompt_format) == MODEL_FORMAT:
        if not model_template:
            raise DttError(
                "The model's tokenizer has no chat template; choose a published one with prompt_format= "
                f"({', '.join(_PUBLISHED)}), or use an instruction-tuned model."
            )
        tokens += f"{{{{- {bos!r} -}}}}" if bos else ""
        return tokens + _THEN_AS_IT_IS + model_template if tokens else model_template
    start, before_role, after_role, after_content, generation = (repr(part) for part in _PUBLISHED[prompt_format])
    return (
        f"{tokens}{{{{- {start} -}}}}"
        "{%- for message in messages -%}"
        f"{{{{- {before_role} + message['role'] + {after_role}"
        f" + message['content'] | trim + {after_content} -}}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {generation} -}}}}{{%- endif -%}}"
    )


# Chat templates are rendered with trim_blocks and lstrip_blocks. The line feed is eaten with the comment, so the
# model's template starts on a line of its own and keeps the white space that it has without us, no more and no less.
_THEN_AS_IT_IS = "{#- The model's own template. #}\n"


def neutralising_prelude(added_tokens: Sequence[str]) -> str:
    """Return jinja that renders nothing and breaks control tokens in untrusted messages.

    It rebinds `messages`, so any template can follow. Contents may be text, or a list of parts as the OpenAI
    API has them. vLLM reads from a template's syntax whether contents are lists, so this text must not look
    like a loop over a content: hence `if true` in it, and `~ ''` where a content is assigned.
    """
    controls = control_texts(added_tokens)
    separator = separator_for(controls)
    # Occurrences of one token may overlap; each pass breaks the leftmost of every such cluster at least.
    pairs = [
        (control, broken(control, separator))
        for control in controls
        for _ in range(len(control) if _overlaps_itself(control) else 1)
    ]
    table = "[" + ", ".join(f"[{control!r}, {safe!r}]" for control, safe in pairs) + "]"
    values = {"ROLES": sorted(TRUSTED_ROLES), "SEPARATOR": separator, "LONGEST": max(map(len, controls))}
    prelude = _NEUTRALISE
    for name, value in values.items():
        prelude = prelude.replace(name, repr(value))
    return prelude.replace("TABLE", table)


def _overlaps_itself(text: str) -> bool:
    return any(text.endswith(text[:length]) for length in range(1, len(text)))


_BREAK_ALL = (
    "{%- for control, safe in dtt_controls -%}{%- set dtt.text = dtt.text | replace(control, safe) -%}{%- endfor -%}"
)
_NEUTRALISE = (
    "{%- set dtt_controls = TABLE -%}"
    "{%- set dtt = namespace(turns=[], parts=[], text='', before='') -%}"
    "{%- for turn in messages -%}"
    "{%- if turn['role'] in ROLES or not turn['content'] or turn['content'] is mapping -%}"
    "{%- set dtt.turns = dtt.turns + [turn] -%}"
    "{%- elif turn['content'] is string -%}"
    "{%- set dtt.text = turn['content'] ~ '' -%}"
    + _BREAK_ALL
    + "{%- set dtt.turns = dtt.turns + [dict(turn, content=dtt.text)] -%}"
    "{%- else -%}"
    "{%- set dtt.parts = [] -%}{%- set dtt.before = '' -%}"
    "{%- for part in (turn['content'] if true else []) -%}"
    "{%- if part is string or part['text'] is string -%}"
    "{%- set dtt.text = (part if part is string else part['text']) ~ '' -%}"
    + _BREAK_ALL
    # Templates join the parts, so a token must not form across their borders either.
    + "{%- for control, safe in dtt_controls -%}{%- if control in dtt.before ~ dtt.text[:LONGEST] -%}"
    "{%- set dtt.text = SEPARATOR ~ dtt.text -%}{%- endif -%}{%- endfor -%}"
    "{%- set dtt.before = (dtt.before ~ dtt.text)[-LONGEST:] -%}"
    "{%- set dtt.parts = dtt.parts + [dtt.text if part is string else dict(part, text=dtt.text)] -%}"
    "{%- else -%}"
    "{%- set dtt.parts = dtt.parts + [part] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set dtt.turns = dtt.turns + [dict(turn, content=dtt.parts)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = dtt.turns -%}"
)
_SYSTEM_IN_USER = (
    "{%- if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' -%}"
    "{%- set dtt_first, dtt_second = messages[0]['content'], messages[1]['content'] -%}"
    "{%- if dtt_first is string and dtt_second is string -%}"
    "{%- set dtt_both = dtt_first ~ '\n\n' ~ dtt_second -%}"
    "{%- else -%}"
    "{%- set dtt_both = ([{'type': 'text', 'text': dtt_first}] if dtt_first is string else dtt_first)"
    " + [{'type': 'text', 'text': '\n\n'}]"
    " + ([{'type': 'text', 'text': dtt_second}] if dtt_second is string else dtt_second) -%}"
    "{%- endif -%}"
    "{%- set messages = [dict(messages[1], content=dtt_both)] + messages[2:] -%}"
    "{%- endif -%}"
)

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
from collections.abc import Callable, Collection, Mapping, Sequence

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.control_tokens import (
    DEEPEST,
    border_for,
    control_texts,
    known_roles,
    separator_for,
    trusted_roles,
    without_spaces,
)
from dtt_plugin.safe_text import printable

TOKENS_SWITCH = "add_defensive_tokens"
"""The template variable that switches the DefensiveTokens."""

CHOICE = "defensive_tokens"
"""The template variable that chooses among several files' DefensiveTokens, by name; null is none."""

DEFAULT_TEMPLATE = "default"
"""The name of the chat template, of a model's several, that is used where none is asked for."""

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
    if prompt_format not in _PUBLISHED:
        return []
    start, before_role, after_role, *rest = _PUBLISHED[prompt_format]
    turns = [before_role + role + after_role for role in ("system", "user")]
    return sorted(set(re.findall(r"<\|\w+\|>", "".join((start, *turns, *rest)))))


def plain_text_markers(
    prompt_format: str, tokens: Collection[str], render: Callable[[list[dict[str, str]]], str | None]
) -> list[str]:
    """Return the markers between messages that are no tokens, so that anyone can write them in data.

    Those of a published format are known. Those of a model's template are what it puts between two contents:
    lines without a token in them that hold more than words (`[INST]`, `### Response:`), and, where there is no
    token at all between two contents, whatever is there.

    Args:
        prompt_format: "model" or one of `PUBLISHED_FORMATS`.
        tokens: the tokenizer's added tokens.
        render: renders a conversation by the model's template, with a generation prompt; None where that refuses.
    """
    if prompt_format != MODEL_FORMAT:
        return [marker for marker in markers(prompt_format) if marker not in tokens]
    for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",)):
        words = ["dttalpha", "dttbravo", "dttcharlie", "dttdelta"][: len(roles)]
        text = render([{"role": role, "content": word} for role, word in zip(roles, words, strict=True)])
        pieces = re.split("|".join(words), text or "")
        if len(pieces) == len(roles) + 1:
            break
    else:
        return []
    found = _opening_markers(pieces[0], tokens)
    for n, piece in enumerate(pieces[1:], start=1):
        found += _markers_between(piece, tokens, required=n < len(roles))
    return list(dict.fromkeys(found))


_BRACKETED = re.compile(r"\[/?\w+\]|<{1,2}/?\|?\w+\|?>{1,2}")


def _without_tokens(text: str, tokens: Collection[str]) -> list[str]:
    """Return what stands between the tokens in `text`."""
    known = sorted((re.escape(token) for token in tokens if token.strip()), key=len, reverse=True)
    return re.split("|".join(known), text) if known else [text]


def _opening_markers(text: str, tokens: Collection[str]) -> list[str]:
    """Return those in front of the first content; a model's own preamble may stand there, too."""
    line = _without_tokens(text, tokens)[-1].strip().rpartition("\n")[2]
    named = [line] if re.fullmatch(r"(#+ *)?[\w ]+:", line) else []
    return _BRACKETED.findall(line) or named


def _markers_between(text: str, tokens: Collection[str], *, required: bool) -> list[str]:
    chunks = _without_tokens(text, tokens)
    lines = [line.strip() for chunk in chunks for line in chunk.splitlines() if line.strip()]
    if len(chunks) > 1:  # a token, which data can't hold, says that a message begins; a bare role name may follow
        lines = [line for line in lines if re.search(r"[^\w\s]", line)]
    elif required and not lines:
        return ["nothing but white space"]
    return [marker for line in lines for marker in _BRACKETED.findall(line) or [line]]


def protection(prompt_format: str, plain_markers: Collection[str]) -> str:
    """Return the sentence on markers from `plain_text_markers`; empty where there are none."""
    if not plain_markers:
        return ""
    names = ", ".join(printable(marker)[:60] for marker in plain_markers)
    if prompt_format != MODEL_FORMAT:
        return (
            f"prompt_format={prompt_format}: {names} {'is' if len(plain_markers) == 1 else 'are'} no token of this"
            " model, so it will read it as plain text; in untrusted data it is broken as a token is."
        )
    return (
        f"The chat template separates messages by plain text that is no token of this model ({names}). It is not"
        " broken in untrusted data, so data that holds it can pass for another message."
    )


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
    control_tokens: Sequence[str] | None = None,
    system_in_user: bool = False,
    trust_assistant: bool = False,
    choices: Mapping[str, Sequence[str]] | None = None,
    choice: str | None = None,
) -> str:
    """Return the jinja chat template of `prompt_format` for `k` DefensiveTokens.

    Args:
        prompt_format: "model" or one of `PUBLISHED_FORMATS`.
        model_template: the model's own template; needed by the format "model" only.
        k: number of DefensiveTokens, 0 for a template without any.
        bos: for the format "model": a BOS text to put between the DefensiveTokens and the model's template,
            where the model's tokenizer adds a BOS that its template does not render.
        default_on: whether the tokens stand there when a request leaves `add_defensive_tokens` out.
        control_tokens: the tokenizer's added tokens; where they are given, be it none, the template itself breaks
            them and the format's markers in untrusted data, exactly as `control_tokens.Neutraliser` does.
        system_in_user: put the system message in front of the first user message, for models without a
            system role.
        trust_assistant: with `control_tokens`: what the assistant said is not untrusted data.
        choices: instead of `k`: several files' tokens, the names in the tokenizer by what requests call the file.
        choice: the file whose tokens stand there when a request chooses none; None: no tokens.

    Raises:
        DttError: unknown format, or the format "model" and a model without a template.
    """
    tokens = _switched_tokens(k, default_on) if k else ""
    tokens += _chosen_tokens(choices, choice) if choices else ""
    if control_tokens is not None:
        tokens += neutralising_prelude(
            [*control_tokens, *markers(prompt_format)],
            model_template=model_template if prompt_format == MODEL_FORMAT else None,
            trust_assistant=trust_assistant,
        )
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


def _switched_tokens(k: int, default_on: bool) -> str:
    """Return the jinja that every template for DefensiveTokens starts with."""
    switch = f"{TOKENS_SWITCH} {'is not defined or' if default_on else 'is defined and'} {TOKENS_SWITCH}"
    names = "".join(defensive_token_names(k))
    return f"{{%- if {switch} -%}}{{{{- {names!r} -}}}}{{%- endif -%}}"


def _chosen_tokens(choices: Mapping[str, Sequence[str]], choice: str | None) -> str:
    """Return the jinja that chooses by name: an unknown one, or one against the switch, ends the request."""
    unknown = f"There are no DefensiveTokens of this name; there are: {', '.join(choices)}, or null for none."
    both = f"{TOKENS_SWITCH} and {CHOICE} contradict each other; leave one of them out."
    default = "none" if choice is None else repr(choice)
    texts = "".join(
        f"{{%- elif dtt_choice == {name!r} -%}}{{{{- {''.join(names)!r} -}}}}" for name, names in choices.items()
    )
    return (
        f"{{%- set dtt_choice = {CHOICE} if {CHOICE} is defined"
        f" else none if {TOKENS_SWITCH} is defined and not {TOKENS_SWITCH} else {default} -%}}"
        f"{{%- if {TOKENS_SWITCH} is defined and (not {TOKENS_SWITCH}) != (dtt_choice is none) -%}}"
        f"{{{{- raise_exception({both!r}) -}}}}{{%- elif dtt_choice is none -%}}{texts}"
        f"{{%- else -%}}{{{{- raise_exception({unknown!r}) -}}}}{{%- endif -%}}"
    )


# Chat templates are rendered with trim_blocks and lstrip_blocks. The line feed is eaten with the comment, so the
# model's template starts on a line of its own and keeps the white space that it has without us, no more and no less.
_THEN_AS_IT_IS = "{#- The model's own template. #}\n"


def default_of_template(template: str, k: int) -> bool | None:
    """Return whether a template of `chat_template` has its k tokens on by default; None for any other template."""
    defaults = [default for default in (True, False) if template.startswith(_switched_tokens(k, default))]
    return defaults[0] if defaults else None


def neutralising_prelude(
    added_tokens: Sequence[str], *, model_template: str | None = None, trust_assistant: bool = False
) -> str:
    """Return jinja that renders nothing and does what `control_tokens.Neutraliser` does, so any template can follow.

    It rebinds `messages` and the variables that the model's template reads from a request (`documents`, `tools`
    ...; special tokens excepted). vLLM reads from a template's syntax whether contents are lists, and whether it
    knows the role "developer". So this text must not look like a loop over a content, its names must be its own,
    and it does not write that role in one piece.
    """
    controls = control_texts(added_tokens)
    flat = [without_spaces(control) for control in controls]
    values = {
        # Occurrences of one token may overlap; each pass breaks the leftmost of every such cluster at least.
        "CONTROLS": [c for c in controls for _ in range(len(c) if _overlaps_itself(c) else 1)],
        "BEGINNINGS": sorted({control[:2] for control in controls}),
        # A text that neither begins as a control ends nor ends as one begins needs no closer look at its borders.
        "FIRST": sorted({control[-1] for control in flat}),
        "SECOND": sorted({control[-2:] for control in flat}),
        "LAST": sorted({control[0] for control in flat}),
        "PENULTIMATE": sorted({control[:2] for control in flat}),
        "LONGEST": max(map(len, controls)),
        "SEPARATOR": separator_for(controls),
        "BORDER": border_for(controls),
        "DEEPEST": DEEPEST,
        "USUAL": known_roles(controls, model_template),
    }
    trusted = ", ".join(map(repr, sorted(trusted_roles(trust_assistant=trust_assistant))))
    texts = {name: repr(value) for name, value in values.items()}
    texts["TRUSTED"] = f"[{trusted}]".replace("developer", "devel' ~ 'oper")
    texts["VARIABLES"] = "".join(_REBIND.replace("VARIABLE", name) for name in request_variables(model_template))
    return re.sub("[A-Z]{4,}", lambda name: texts[name[0]], _NEUTRALISE.strip())


def _overlaps_itself(text: str) -> bool:
    return any(text.endswith(text[:length]) for length in range(1, len(text)))


def request_variables(template: str | None) -> list[str]:
    """Return the variables, messages and special tokens excepted, that a template takes from a request."""
    import jinja2
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(GENERATION_TAG.sub("", template or "")))
    except jinja2.TemplateSyntaxError:  # of an engine's own tags; baking refuses what is no jinja
        names = set(re.findall(r"\w*(?:document|tool)s\w*", template or ""))
    ours = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
    return sorted(name for name in names - ours if not name.endswith(("_token", "_tokens")))


GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag of transformers' own, around what the assistant says; it renders nothing."""

# `dtt.out` is what a macro returns: macros return text, and this must stay what it is. Names in capitals are filled in.
_NEUTRALISE = r"""
{%- set dtt_controls = CONTROLS -%}
{%- set dtt_all = (BORDER ~ dtt_controls | join(BORDER) ~ BORDER).split() | join -%}
{%- set dtt = namespace(out='', heads=[], middles=[], tails=[], turns=[]) -%}
{%- macro dtt_text(dtt_value) -%}
    {%- set dtt_raw = dtt_value ~ '' -%}
    {%- set dtt.out = dtt_raw -%}
    {%- for dtt_start in BEGINNINGS if dtt_start in dtt_raw -%}{%- if loop.first -%}
        {%- for dtt_control in dtt_controls if dtt_control in dtt_raw -%}
            {%- set dtt.out = dtt.out | replace(
                dtt_control, dtt_control[0] ~ SEPARATOR ~ dtt_control[1:] if dtt_control[1:] else SEPARATOR) -%}
        {%- endfor -%}
    {%- endif -%}{%- endfor -%}
    {%- set dtt_flat = dtt.out.split() | join | replace(BORDER, '\n') -%}
    {%- if dtt_flat[:1] in FIRST or dtt_flat[:2] in SECOND or dtt_flat[:3] in dtt_all
        or dtt_flat[-1:] in LAST or dtt_flat[-2:] in PENULTIMATE or dtt_flat[-3:] in dtt_all -%}
        {{- dtt_borders(dtt_flat) -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro dtt_borders(dtt_flat) -%}
    {%- set dtt_at = namespace(heads=[], tails=[], front=false, back=false) -%}
    {%- for dtt_n in range(1, 1 + [dtt_flat | length, LONGEST] | min) -%}
        {%- if (dtt_flat[:dtt_n] ~ BORDER) in dtt_all -%}
            {%- set dtt_at.heads = dtt_at.heads + [dtt_flat[:dtt_n]] -%}
        {%- endif -%}
        {%- if (BORDER ~ dtt_flat[-dtt_n:]) in dtt_all -%}
            {%- set dtt_at.tails = dtt_at.tails + [dtt_flat[-dtt_n:]] -%}
        {%- endif -%}
    {%- endfor -%}
    {%- for dtt_tail in dtt.tails -%}{%- for dtt_head in dtt_at.heads -%}
        {%- if (BORDER ~ dtt_tail ~ dtt_head ~ BORDER) in dtt_all -%}{%- set dtt_at.front = true -%}{%- endif -%}
    {%- endfor -%}{%- endfor -%}
    {%- for dtt_tail in dtt_at.tails -%}{%- for dtt_head in dtt.heads -%}
        {%- if (BORDER ~ dtt_tail ~ dtt_head ~ BORDER) in dtt_all -%}{%- set dtt_at.back = true -%}{%- endif -%}
    {%- endfor -%}{%- endfor -%}
    {%- if dtt_flat and dtt_flat in dtt_all -%}
        {%- for dtt_tail in dtt.tails if (BORDER ~ dtt_tail ~ dtt_flat) in dtt_all -%}
            {%- set dtt_at.tails = dtt_at.tails + [dtt_tail ~ dtt_flat] -%}
            {%- for dtt_head in dtt.heads if (BORDER ~ dtt_tail ~ dtt_flat ~ dtt_head ~ BORDER) in dtt_all -%}
                {%- set dtt_at.front = true -%}
            {%- endfor -%}
        {%- endfor -%}
        {%- for dtt_head in dtt.heads if (dtt_flat ~ dtt_head ~ BORDER) in dtt_all -%}
            {%- set dtt_at.heads = dtt_at.heads + [dtt_flat ~ dtt_head] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- for dtt_tail in dtt_at.tails -%}{%- for dtt_middle in dtt.middles -%}
        {%- if (BORDER ~ dtt_tail ~ dtt_middle) in dtt_all -%}
            {%- set dtt_at.tails = dtt_at.tails + [dtt_tail ~ dtt_middle] -%}
        {%- endif -%}
    {%- endfor -%}{%- endfor -%}
    {%- for dtt_head in dtt_at.heads -%}{%- for dtt_middle in dtt.middles -%}
        {%- if (dtt_middle ~ dtt_head ~ BORDER) in dtt_all -%}
            {%- set dtt_at.heads = dtt_at.heads + [dtt_middle ~ dtt_head] -%}
        {%- endif -%}
    {%- endfor -%}{%- endfor -%}
    {%- if dtt_flat and dtt_flat in dtt_all and dtt_flat not in dtt.middles
        and not dtt_at.front and not dtt_at.back -%}
        {%- set dtt.middles = dtt.middles + [dtt_flat] -%}
    {%- endif -%}
    {%- if dtt_at.front -%}{%- set dtt.out = BORDER ~ dtt.out -%}{%- set dtt_at.heads = [] -%}{%- endif -%}
    {%- if dtt_at.back -%}{%- set dtt.out = dtt.out ~ BORDER -%}{%- set dtt_at.tails = [] -%}{%- endif -%}
    {%- for dtt_head in dtt_at.heads if dtt_head not in dtt.heads -%}
        {%- set dtt.heads = dtt.heads + [dtt_head] -%}
    {%- endfor -%}
    {%- for dtt_tail in dtt_at.tails if dtt_tail not in dtt.tails -%}
        {%- set dtt.tails = dtt.tails + [dtt_tail] -%}
    {%- endfor -%}
{%- endmacro -%}
{%- macro dtt_clean(dtt_value, dtt_depth) -%}
    {%- if dtt_depth > DEEPEST -%}
        {{- raise_exception('Untrusted data is nested more than ' ~ DEEPEST ~ ' levels deep; flatten it.') -}}
    {%- elif dtt_value is string -%}
        {{- dtt_text(dtt_value) -}}
    {%- elif dtt_value is mapping -%}
        {%- set dtt_own = namespace(pairs=[], key='') -%}
        {%- for dtt_key, dtt_item in dtt_value.items() -%}
            {%- if dtt_depth == 0 and dtt_key in ['role', 'content'] -%}
                {%- set dtt.out = dtt_key -%}
            {%- elif dtt_key is none or dtt_key is string or dtt_key is number -%}
                {{- dtt_clean(dtt_key, 1) -}}
            {%- else -%}
                {{- dtt_text(dtt_key) -}}
            {%- endif -%}
            {%- set dtt_own.key = dtt.out -%}
            {%- if dtt_depth == 0 and dtt_key == 'role' -%}
                {%- set dtt.out = dtt_item -%}
            {%- else -%}
                {{- dtt_clean(dtt_item, dtt_depth + 1) -}}
            {%- endif -%}
            {%- set dtt_own.pairs = dtt_own.pairs + [[dtt_own.key, dtt.out]] -%}
        {%- endfor -%}
        {%- set dtt.out = dict(dtt_own.pairs) -%}
    {%- elif dtt_value is none or dtt_value is boolean or dtt_value is undefined or dtt_value is callable -%}
        {%- set dtt.out = dtt_value -%}
    {%- elif dtt_value is number -%}
        {{- dtt_text(dtt_value) -}}
        {%- if dtt.out == dtt_value ~ '' -%}{%- set dtt.out = dtt_value -%}{%- endif -%}
    {%- elif dtt_value is iterable -%}
        {%- set dtt_own = namespace(items=[]) -%}
        {%- for dtt_item in dtt_value -%}
            {{- dtt_clean(dtt_item, dtt_depth + 1) -}}
            {%- set dtt_own.items = dtt_own.items + [dtt.out] -%}
        {%- endfor -%}
        {%- set dtt.out = dtt_own.items -%}
    {%- else -%}
        {{- dtt_text(dtt_value) -}}
    {%- endif -%}
{%- endmacro -%}
VARIABLES
{%- for dtt_turn in messages -%}
    {%- if dtt_turn is not mapping -%}
        {{- raise_exception('A message of the conversation is no mapping with role and content.') -}}
    {%- elif dtt_turn['role'] in TRUSTED -%}
        {%- set dtt.turns = dtt.turns + [dtt_turn] -%}
    {%- else -%}
        {%- if dtt_turn['role'] is defined and dtt_turn['role'] not in USUAL -%}
            {{- dtt_text(dtt_turn['role']) -}}
            {%- if dtt_turn['role'] is not string or dtt.out != dtt_turn['role']
                or dtt_turn['role'].split() | join in dtt_all -%}
                {{- raise_exception('A role is no text, or a piece of a control token; use another role.') -}}
            {%- endif -%}
        {%- endif -%}
        {{- dtt_clean(dtt_turn, 0) -}}
        {%- set dtt.turns = dtt.turns + [dtt.out] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = dtt.turns -%}
"""
_REBIND = "{%- if VARIABLE is defined -%}{{- dtt_clean(VARIABLE, 1) -}}{%- set VARIABLE = dtt.out -%}{%- endif -%}\n"
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

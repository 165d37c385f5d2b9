"""The chat templates of a defended checkpoint."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from dtt_plugin.bake.tokenizer import TokenizerFiles
from dtt_plugin.errors import DttError
from dtt_plugin.prompt.bos import bos_to_render
from dtt_plugin.prompt.control_tokens import control_texts
from dtt_plugin.prompt.formats import (
    DEFAULT_TEMPLATE,
    GENERATION_TAG,
    MODEL_FORMAT,
    chat_template,
    markers,
    plain_text_markers,
)

_SYSTEM, _USER = "the trusted instruction", "the untrusted data"
# Of the longest tokens and of the shortest, so many are tried in a template: it treats them all alike.
_TRIED = 8
# JSON writes these as a backslash and more.
_ESCAPED = 'a\n\t\r\b\f"\\\x01b'


def defended_templates(
    tokenizer: TokenizerFiles,
    prompt_format: str,
    *,
    k: int,
    default_on: bool,
    system_in_user: bool,
    trust_assistant: bool = False,
    choices: Mapping[str, Sequence[str]] | None = None,
    choice: str | None = None,
) -> dict[str, str]:
    """Return the defended chat templates by name; "default" is always there.

    The arguments are those of `chat_template`.

    A model may have further ones, which transformers takes for requests with tools: each is defended, so
    that no request is without the tokens.

    Raises:
        DttError: the format "model" and a model without a template, one that drops the system message, or one
            that makes control tokens of broken ones.
    """
    own = tokenizer.templates()
    names = {DEFAULT_TEMPLATE, *own} if prompt_format == MODEL_FORMAT else {DEFAULT_TEMPLATE}
    if prompt_format == MODEL_FORMAT and own and DEFAULT_TEMPLATE not in own:
        raise DttError(
            f"{tokenizer.folder} has no chat template called {DEFAULT_TEMPLATE}, only: {', '.join(sorted(own))}; call "
            "one of them so, or choose a published format with --prompt-format."
        )
    adds_bos = tokenizer.adds_bos()
    templates = {}
    for name in sorted(names):
        model_template = own.get(name)
        bos = bos_to_render(
            prompt_format,
            bos=tokenizer.bos,
            adds_bos=adds_bos,
            render=partial(render, model_template or "", tokenizer),
        )
        if prompt_format == MODEL_FORMAT and name == DEFAULT_TEMPLATE and not system_in_user:
            _check_system_role(model_template, tokenizer)
        templates[name] = chat_template(
            prompt_format,
            model_template=model_template,
            k=k,
            bos=bos,
            default_on=default_on,
            control_tokens=tokenizer.added_tokens,
            system_in_user=system_in_user,
            trust_assistant=trust_assistant,
            choices=choices,
            choice=choice,
        )
        controls = control_texts([*tokenizer.added_tokens, *markers(prompt_format)])
        own_text = model_template or "" if prompt_format == MODEL_FORMAT else ""
        _check_rewriting(templates[name], tokenizer, controls, own_text, trust_assistant=trust_assistant)
    return templates


def unprotected_markers(tokenizer: TokenizerFiles, prompt_format: str) -> list[str]:
    """Return the markers between messages that are no tokens of the model; see `formats.plain_text_markers`."""
    rendered = partial(render, tokenizer.templates().get(DEFAULT_TEMPLATE, ""), tokenizer)
    return plain_text_markers(prompt_format, tokenizer.added_tokens, rendered)


def _check_rewriting(
    template: str, tokenizer: TokenizerFiles, controls: list[str], own: str, *, trust_assistant: bool
) -> None:
    """Refuse a template that makes control tokens of broken ones.

    It changes case, takes words out, joins parts by a letter, or puts the rest of a token next to data. Templates
    that trim texts, and join them by white space or nothing, are no danger.

    Args:
        template: the defended one.
        tokenizer: of the base model.
        controls: from `control_texts`.
        own: the model's own template; empty for a published format.
        trust_assistant: what the assistant says is not untrusted.
    """
    words = _words(own)
    for place, tried in _places(trust_assistant):
        for front in ([{"role": "system", "content": _SYSTEM}], []):

            def text_of(data: Any, place: _Place = place, front: list[dict[str, Any]] = front) -> str | None:
                messages, variables = place(data)
                return render(template, tokenizer, [*front, *messages], **variables)

            texts, parts = text_of(_USER), text_of(_parts(_USER, _USER)) if tried else None
            if texts is not None:
                break
        for content in _hostile_contents(controls, tried, texts, words) if texts is not None else ():
            harmless = parts if isinstance(content, list) else texts
            text = text_of(content)
            for control in controls:
                if text and harmless and text.count(control) > harmless.count(control):
                    word = next(
                        (w for w in words if isinstance(content, str) and content.replace(w, "") == control), ""
                    )
                    how = f" (it takes {word!r} out of {content!r})" if word else ""
                    raise DttError(
                        f"The chat template of {tokenizer.folder} rewrites messages such that untrusted data becomes"
                        f" the control token {control} again{how}; correct it, or choose a published"
                        " format with --prompt-format."
                    )


_Place = Callable[[Any], tuple[list[dict[str, Any]], dict[str, Any]]]


def _places(trust_assistant: bool) -> Iterator[tuple[_Place, int]]:
    """Yield where untrusted data may stand in a request, and of how many tokens every shape is tried there."""

    def call(data: Any, arguments: Any) -> list[dict[str, Any]]:
        function = {"name": data, "arguments": arguments}
        return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]

    asked = [{"role": "user", "content": "question"}]
    yield lambda data: ([{"role": "user", "content": data}], {}), _TRIED
    yield lambda data: ([{"role": "tool", "content": data}], {}), 3
    if not trust_assistant:
        yield lambda data: ([{"role": "assistant", "content": data}], {}), 3
        yield lambda data: ([*asked, *call(data, {data: data})], {}), 0
        yield lambda data: ([*asked, *call(data, data)], {}), 0
    yield lambda data: ([{**asked[0], "name": data}], {}), 0
    yield lambda data: ([*asked, {"role": "tool", "content": "answer", "name": data, "tool_call_id": data}], {}), 0
    yield lambda data: (asked, {"documents": [{"title": data, "text": data, "doc_id": data}]}), 0
    yield lambda data: (asked, {"tools": [{"type": "function", "function": {"name": data, "description": data}}]}), 0


def _words(template: str) -> list[str]:
    """Return the strings that a template names: it may take one out of a text, or part it there."""
    import jinja2

    tree = _environment().parse(GENERATION_TAG.sub("", template))
    values = (node.value for node in tree.find_all(jinja2.nodes.Const))
    return sorted({value for value in values if isinstance(value, str) and value})


def _hostile_contents(controls: list[str], number: int, harmless: str, words: list[str]) -> Iterator[Any]:
    """Yield contents that a template may turn into control tokens, of `number` of these in every shape.

    `harmless` is a prompt with harmless data, `words` is what `_words` returns.
    """
    rewrites: list[Callable[[str], str]] = [
        str, str.upper, str.lower, str.swapcase, str.title, str.capitalize, html.escape, lambda text: text[::-1],
    ]  # fmt: skip
    yield " data ".join(rewrite(control) for rewrite in rewrites for control in controls)
    yield _ESCAPED
    yield from _completed(controls, harmless)
    for control in dict.fromkeys((controls[0], controls[-1])):
        half = (len(control) + 1) // 2
        yield from (control[:half] + word + control[half:] for word in words)
    if not number:
        return
    yield {"a": [[{"b": {}}], [["c"]]]}  # the brackets of JSON are the attacker's, too
    tried = dict.fromkeys(controls[-number:] + controls[:number])
    for control in tried:
        yield from (control[1:], control[2:], control[:-1], control[:-2], control[1:-1], control[2:-2])
        half = len(control) // 2
        yield _parts(control[:half], control[half:])
    for letter in sorted(set("".join(tried))):  # which a template may put between parts
        control = next(control for control in tried if letter in control)
        yield _parts(*control.split(letter, 1))


def _completed(controls: list[str], harmless: str) -> Iterator[str]:
    """Yield the pieces of control tokens that would be whole next to what the template puts around the data."""
    before, *between, after = harmless.split(_USER) if _USER in harmless else ("", "")
    pairs = list(itertools.pairwise([before, *between, after]))
    for control in controls:
        size = len(control)
        for front, behind in pairs:
            starts = [n for n in range(size) if front.endswith(control[:n])]
            ends = [n for n in range(1, size + 1) if behind.startswith(control[n:])]
            yield from (control[start:end] for start in starts for end in ends if 0 < end - start < size)


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def render(template: str, tokenizer: TokenizerFiles, messages: list[dict[str, Any]], **variables: Any) -> str | None:
    """Render as transformers does; None where the template refuses or needs what only an engine has.

    Raises:
        DttError: it is no jinja template, so no engine could render it.
    """
    import jinja2

    variables = {**tokenizer.special_tokens, **variables}
    try:
        compiled = _compiled(template)
    except jinja2.TemplateSyntaxError as error:
        raise DttError(
            f"The chat template of {tokenizer.folder} is not valid jinja (line {error.lineno}: {error.message}); "
            "correct it, or choose a published format with --prompt-format."
        ) from error
    try:
        rendered: str = compiled.render(messages=messages, add_generation_prompt=True, **variables)
    except Exception:  # a template is a program of the model's: whatever it raises, it does not render this
        return None
    return rendered


@lru_cache(8)
def _compiled(template: str) -> Any:
    return _environment().from_string(GENERATION_TAG.sub("", template))


@lru_cache(1)
def _environment() -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: pattern
    return environment


def _check_system_role(template: str | None, tokenizer: TokenizerFiles) -> None:
    """Refuse a template that can render a conversation but not its trusted instruction."""
    if not template or render(template, tokenizer, [{"role": "user", "content": _USER}]) is None:
        return
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    rendered = render(template, tokenizer, messages)
    if rendered is None or _SYSTEM not in rendered:
        raise DttError(
            f"The chat template of {tokenizer.folder} has no system role; bake with --system-in-user to put the "
            "instruction in front of the data, or choose a published format with --prompt-format."
        )

"""The chat templates of a defended checkpoint."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from dtt_plugin.bake.tokenizer import DEFAULT_TEMPLATE, TokenizerFiles
from dtt_plugin.control_tokens import control_texts
from dtt_plugin.errors import DttError
from dtt_plugin.formats import GENERATION_TAG, MODEL_FORMAT, chat_template, markers, plain_text_markers

_SYSTEM, _USER = "the trusted instruction", "the untrusted data"
# Tokens that are tried in a template; one that rewrites text rewrites them all alike.
_TRIED = 24


def defended_templates(
    tokenizer: TokenizerFiles,
    prompt_format: str,
    *,
    k: int,
    default_on: bool,
    system_in_user: bool,
    trust_assistant: bool = False,
) -> dict[str, str]:
    """Return the defended chat templates by name; "default" is always there.

    A model may have further ones, which transformers takes for requests with tools: each is defended, so
    that no request is without the tokens.

    Raises:
        DttError: the format "model" and a model without a template, one that drops the system message, or one
            that makes control tokens of broken ones.
    """
    own = tokenizer.templates()
    names = {DEFAULT_TEMPLATE, *own} if prompt_format == MODEL_FORMAT else {DEFAULT_TEMPLATE}
    adds_bos = tokenizer.adds_bos()
    templates = {}
    for name in sorted(names):
        model_template = own.get(name)
        bos = tokenizer.bos if adds_bos and not _renders_bos(model_template, tokenizer) else ""
        if prompt_format == MODEL_FORMAT and name == DEFAULT_TEMPLATE and not system_in_user:
            _check_system_role(model_template, tokenizer)
        templates[name] = chat_template(
            prompt_format,
            model_template=model_template,
            k=k,
            bos=bos if prompt_format == MODEL_FORMAT else "",
            default_on=default_on,
            control_tokens=tokenizer.added_tokens,
            system_in_user=system_in_user,
            trust_assistant=trust_assistant,
        )
        _check_rewriting(templates[name], tokenizer, control_texts([*tokenizer.added_tokens, *markers(prompt_format)]))
    return templates


def unprotected_markers(tokenizer: TokenizerFiles, prompt_format: str) -> list[str]:
    """Return the markers between messages that are no tokens of the model; see `formats.plain_text_markers`."""
    render = partial(_render, tokenizer.templates().get(DEFAULT_TEMPLATE, ""), tokenizer)
    return plain_text_markers(prompt_format, tokenizer.added_tokens, render)


def _check_rewriting(template: str, tokenizer: TokenizerFiles, controls: list[str]) -> None:
    """Refuse a template that makes control tokens of broken ones: it changes case, or joins parts by a letter.

    Templates that trim texts, and join them by white space or nothing, are no danger.
    """
    render = partial(_render, template, tokenizer)
    for roles in (("system", "user"), ("user",)):

        def text_of(content: Any, before: tuple[str, ...] = roles[:-1]) -> str | None:
            system = [{"role": role, "content": _SYSTEM} for role in before]
            return render([*system, {"role": "user", "content": content}])

        texts, parts = text_of(_USER), text_of(_parts(_USER, _USER))
        if texts is None:
            continue
        for content in _hostile_contents(controls):
            harmless = texts if isinstance(content, str) else parts
            text = text_of(content)
            for control in controls:
                if text and harmless and text.count(control) > harmless.count(control):
                    raise DttError(
                        f"The chat template of {tokenizer.folder} rewrites messages such that untrusted data becomes"
                        f" the control token {control} again; correct it, or choose a published format with"
                        " --prompt-format."
                    )
        return


def _hostile_contents(controls: list[str]) -> Iterator[Any]:
    """Yield contents that a template may turn into control tokens."""
    rewrites: list[Callable[[str], str]] = [
        str, str.upper, str.lower, str.swapcase, str.title, str.capitalize, html.escape, lambda text: text[::-1],
    ]  # fmt: skip
    yield " data ".join(rewrite(control) for rewrite in rewrites for control in controls)
    tried = controls[-_TRIED // 2 :] + controls[: _TRIED // 2]
    for control in tried:
        yield from (control[1:], control[2:], control[:-1], control[:-2], control[1:-1], control[2:-2])
        half = len(control) // 2
        yield _parts(control[:half], control[half:])
    for letter in sorted(set("".join(tried))):  # which a template may put between parts
        control = next(control for control in tried if letter in control)
        yield _parts(*control.split(letter, 1))


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _render(template: str, tokenizer: TokenizerFiles, messages: list[dict[str, Any]]) -> str | None:
    """Render as transformers does; None where the template refuses or needs what only an engine has.

    Raises:
        DttError: it is no jinja template, so no engine could render it.
    """
    import jinja2

    specials: dict[str, Any] = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in tokenizer.config.items()
        if key.endswith("_token") and value
    }
    try:
        compiled = _compiled(template)
    except jinja2.TemplateSyntaxError as error:
        raise DttError(
            f"The chat template of {tokenizer.folder} is not valid jinja (line {error.lineno}: {error.message}); "
            "correct it, or choose a published format with --prompt-format."
        ) from error
    try:
        rendered: str = compiled.render(messages=messages, add_generation_prompt=True, **specials)
    except Exception:  # a template is a program of the model's: whatever it raises, it does not render this
        return None
    return rendered


@lru_cache(8)
def _compiled(template: str) -> Any:
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
    return environment.from_string(GENERATION_TAG.sub("", template))


def _renders_bos(template: str | None, tokenizer: TokenizerFiles) -> bool:
    if not template:
        return False
    rendered = _render(template, tokenizer, [{"role": "user", "content": _USER}])
    return rendered is None or rendered.startswith(tokenizer.bos)


def _check_system_role(template: str | None, tokenizer: TokenizerFiles) -> None:
    """Refuse a template that can render a conversation but not its trusted instruction."""
    if not template or _render(template, tokenizer, [{"role": "user", "content": _USER}]) is None:
        return
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    rendered = _render(template, tokenizer, messages)
    if rendered is None or _SYSTEM not in rendered:
        raise DttError(
            f"The chat template of {tokenizer.folder} has no system role; bake with --system-in-user to put the "
            "instruction in front of the data, or choose a published format with --prompt-format."
        )

"""The chat templates of a defended checkpoint."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from dtt_plugin.bake.tokenizer import DEFAULT_TEMPLATE, TokenizerFiles
from dtt_plugin.bos import bos_to_render
from dtt_plugin.errors import DttError
from dtt_plugin.formats import MODEL_FORMAT, chat_template

_SYSTEM, _USER = "the trusted instruction", "the untrusted data"
# A tag of transformers' own, around what the assistant says; it renders nothing.
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def defended_templates(
    tokenizer: TokenizerFiles, prompt_format: str, *, k: int, default_on: bool, system_in_user: bool
) -> dict[str, str]:
    """Return the defended chat templates by name; "default" is always there.

    A model may have further ones, which transformers takes for requests with tools: each is defended, so
    that no request is without the tokens.

    Raises:
        DttError: the format "model" and a model without a template, or one that drops the system message.
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
        )
    return templates


def render(template: str, tokenizer: TokenizerFiles, messages: list[dict[str, Any]], **variables: Any) -> str | None:
    """Render as transformers does; None where the template refuses or needs what only an engine has.

    Raises:
        DttError: it is no jinja template, so no engine could render it.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: pattern
    variables = {**tokenizer.special_tokens, **variables}
    try:
        compiled = environment.from_string(_GENERATION_TAG.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise DttError(
            f"The chat template of {tokenizer.folder} is not valid jinja (line {error.lineno}: {error.message}); "
            "correct it, or choose a published format with --prompt-format."
        ) from error
    try:
        return compiled.render(messages=messages, add_generation_prompt=True, **variables)
    except Exception:  # a template is a program of the model's: whatever it raises, it does not render this
        return None


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

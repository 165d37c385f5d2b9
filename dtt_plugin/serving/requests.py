"""The front end of a vLLM engine that serves token files: every request is defended as it says, or refused.

Conversations are rendered by the template of `dtt_plugin.serving.template`; when they have become ids, those are
compared with what the request chose. Everything else that reaches the engine (plain text, ids, vectors) has no
template and is refused, or gets the default's tokens in front, as the configuration says.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.formats import CHOICE
from dtt_plugin.serving.hooks import problem
from dtt_plugin.serving.layer import served
from dtt_plugin.serving.placing import TokenFile, place
from dtt_plugin.serving.template import chosen, names_of, write_tokenizer

UNCHECKED = "unchecked"
PLAIN = ("refuse", "defend", UNCHECKED)
"""What becomes of a prompt that is no conversation. "unchecked" is for a program that sees to its prompts itself, as
`dtt_vllm` does; a server refuses to start with it."""
_KNOWN = ("tokens", "default", "plain", "prompt_format", "stored", "placed", "names", "bos")
_STAMP = "dtt_checked"  # on an engine input that came through `check_conversation`


def configure(arguments: Any, usage_context: Any) -> None:
    """Complete what `dtt` in the `additional_config` of an engine's arguments says, and set its tokenizer.

    Args:
        arguments: vLLM's `EngineArgs`; changed in place.
        usage_context: vLLM's own: a server or a program.

    Raises:
        DttError: the configuration is wrong, the model or this vLLM can't take the tokens, or another argument would
            make requests undefended.
    """
    config = (arguments.additional_config or {}).get("dtt")
    if config is None or (isinstance(config, Mapping) and "names" in config):
        return
    if not isinstance(config, Mapping):
        raise DttError('additional_config: dtt is no table; give {"dtt": {"tokens": [FILE, ...]}}.')
    if unknown := [name for name in config if name not in _KNOWN]:
        raise DttError(f"additional_config: dtt has the unknown key {unknown[0]!r}; it knows {', '.join(_KNOWN[:4])}.")
    plain = config.get("plain", PLAIN[0])
    if plain not in PLAIN:
        raise DttError(f"additional_config: dtt, plain: {plain!r} is none of {', '.join(PLAIN[:2])}.")
    if (what := problem()) is not None:
        raise DttError(what)
    if arguments.kv_transfer_config is not None:
        raise DttError(
            "Token files can't be served with kv_transfer_config: what other engines keep for the same ids may be of "
            "other tokens; leave it out."
        )
    if any("embed" in module for module in arguments.lora_target_modules or ()):
        raise DttError(
            "Token files can't be served with a LoRA of the embedding (lora_target_modules): it would change their "
            "rows; leave one of the two out, or merge the adapter into the model."
        )
    if "placed" in config:  # by dtt_vllm, which renders its prompts itself
        arguments.additional_config = {**arguments.additional_config, "dtt": {**config, "plain": plain, "names": {}}}
        return
    if plain == UNCHECKED and "API_SERVER" in str(getattr(usage_context, "name", usage_context)):
        raise DttError("additional_config: dtt, plain: a server takes 'refuse' or 'defend' only.")
    if arguments.tokenizer not in (None, arguments.model):
        raise DttError("Token files can't be combined with --tokenizer; put its files into the model's folder.")
    arguments.additional_config = {**arguments.additional_config, "dtt": _completed(arguments, config, plain)}


def _completed(arguments: Any, config: Mapping[str, Any], plain: str) -> dict[str, Any]:
    files = config.get("tokens")
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise DttError("additional_config: dtt, tokens: is no list of token files.")
    placement = place(arguments.model, [TokenFile(file) for file in files], revision=arguments.revision)
    names = names_of(placement)
    default = config.get("default", next(iter(names)))
    folder = Path(tempfile.mkdtemp(prefix="dtt-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    bos = write_tokenizer(
        arguments.model,
        placement,
        folder,
        default=default,
        revision=arguments.revision,
        prompt_format=config.get("prompt_format"),
    )
    arguments.tokenizer, arguments.tokenizer_revision = os.fspath(folder), None
    ids = {placed.source.name: list(placed.ids) for placed in placement.placed}
    return {"plain": plain, "default": default, "names": ids, "bos": bos, **placement.to_config()}


def check_conversation(config: Mapping[str, Any], inputs: Sequence[Any], variables: Mapping[str, Any]) -> None:
    """Check the prompts of a conversation, as ids, against what the request chose.

    Args:
        config: from `configure`.
        inputs: vLLM's engine inputs, which are stamped.
        variables: of the chat template.

    Raises:
        DttError: a prompt does not begin with exactly the chosen tokens: another template, a prompt that was cut, or
            a name that is none.
    """
    names: Mapping[str, list[int]] = config["names"]
    name = chosen(variables, config["default"])
    if name is not None and not (isinstance(name, str) and name in names):
        raise DttError(f"There are no DefensiveTokens of this name; there are: {', '.join(names)}, or null for none.")
    wanted = [] if name is None else names[name]
    every = {token_id for ids in names.values() for token_id in ids}
    for engine_input in inputs:
        ids = engine_input.get("prompt_token_ids") if engine_input.get("type") != "embeds" else None
        if ids is None:
            raise DttError("A conversation with vectors of the client's own can't be defended.")
        if ids[: len(wanted)] != wanted or [i for i in ids if i in every] != wanted:
            raise DttError(
                "The prompt does not begin with the DefensiveTokens that the request is to have: it was cut "
                "(truncate_prompt_tokens, truncation), or another chat template made it."
            )
        engine_input[_STAMP] = True


def check_plain(config: Mapping[str, Any], engine_input: Any) -> None:
    """Refuse what is no checked conversation, or put the default's tokens in front of its ids.

    Raises:
        DttError: it is refused.
    """
    if config["plain"] == UNCHECKED or (isinstance(engine_input, dict) and engine_input.get(_STAMP)):
        return
    if config["plain"] == "refuse":
        raise DttError(
            "This server takes conversations only (/v1/chat/completions, /v1/responses, /v1/messages): a plain prompt "
            "has no place for DefensiveTokens, nor for a trusted instruction."
        )
    if not isinstance(engine_input, dict) or engine_input.get("type") != "token":
        raise DttError("A prompt of vectors, of several parts or not yet rendered can't be defended.")
    ids = list(engine_input["prompt_token_ids"])
    every = {token_id for part in config["names"].values() for token_id in part}
    if every.intersection(ids):
        raise DttError("A plain prompt can't hold DefensiveTokens: the server puts them in front itself.")
    bos = [i for i in config["bos"] if ids[:1] != [i]]
    engine_input["prompt_token_ids"] = [*config["names"].get(config["default"], []), *bos, *ids]


def wrap_front_end() -> None:
    """Have vLLM's front end call the functions above; twice is once."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.params import ChatParams
    from vllm.v1.engine.input_processor import InputProcessor

    if hasattr(EngineArgs, "dtt_wrapped"):
        return
    EngineArgs.dtt_wrapped = True
    create, process = EngineArgs.create_engine_config, InputProcessor.process_inputs
    render, render_async = BaseRenderer.render_chat, BaseRenderer.render_chat_async
    merge = ChatParams.with_defaults

    @functools.wraps(create)
    def create_engine_config(self: Any, usage_context: Any = None, *args: Any, **kwargs: Any) -> Any:
        configure(self, usage_context)
        return create(self, usage_context, *args, **kwargs)

    @functools.wraps(merge)
    def with_defaults(self: Any, *args: Any, **kwargs: Any) -> Any:
        merged, own = merge(self, *args, **kwargs), self.chat_template_kwargs
        if CHOICE in own:  # vLLM takes null for a variable that was left out
            merged.chat_template_kwargs[CHOICE] = own[CHOICE]
        return merged

    @functools.wraps(render)
    def render_chat(self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = render(self, conversations, chat_params, *args, **kwargs)
        _check(self.config, rendered, chat_params)
        return rendered

    @functools.wraps(render_async)
    async def render_chat_async(self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = await render_async(self, conversations, chat_params, *args, **kwargs)
        _check(self.config, rendered, chat_params)
        return rendered

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        if (config := served(self.vllm_config)) is not None:
            _refusing(check_plain, config, prompt)
        return process(self, request_id, prompt, *args, **kwargs)

    EngineArgs.create_engine_config, InputProcessor.process_inputs = create_engine_config, process_inputs
    BaseRenderer.render_chat, BaseRenderer.render_chat_async = render_chat, render_chat_async
    ChatParams.with_defaults = with_defaults


def _check(vllm_config: Any, rendered: Any, chat_params: Any) -> None:
    config = served(vllm_config)
    if config is not None and config["plain"] != UNCHECKED:
        _refusing(check_conversation, config, rendered[1], chat_params.chat_template_kwargs)


def _refusing(check: Any, *arguments: Any) -> None:
    """Run a check; what it refuses is the client's fault, status 400."""
    from vllm.exceptions import VLLMValidationError

    try:
        check(*arguments)
    except DttError as error:
        raise VLLMValidationError(str(error)) from error

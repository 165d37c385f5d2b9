"""What `dtt_vllm` and `dtt_hf` have in common.

`Defended` stands in front of one of lm-eval's model classes. It renders every
conversation itself (these are chat models by definition), writes what is really
sent into the request, so that `--log_samples` is true, and keeps the answers of
different arms apart in lm-eval's caches, which know nothing of defenses.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dtt_plugin.checkpoint.defended import baked_facts
from dtt_plugin.costs import recorded_costs
from dtt_plugin.errors import DttError, LoadAnew
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.model_wrappers.early_decision import Rule, all_of, rule_of
from dtt_plugin.model_wrappers.session import Arm, ArmTokenizer, LoadedModel, Session, make_session, tell
from dtt_plugin.prompt.defenses import NONE, parse_defense
from dtt_plugin.prompt.formats import DEFAULT_TEMPLATE, MODEL_FORMAT
from dtt_plugin.prompt.renderer import Prompt, PromptRenderer, model_templates
from dtt_plugin.tasks.thoughts import behind, opened_by

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger("dtt_plugin")


class Defended:
    """Mixin in front of lm-eval's `HFLM` or `VLLM`; the subclass sets `early_decision` and calls `_begin`."""

    early_decision: bool
    cache_hook: Answers
    tokenizer: Any

    if TYPE_CHECKING:
        max_length: int
        max_gen_toks: int
        think_end_token: str | int | None

    def _begin(self, arm: Arm, loaded: LoadedModel) -> None:
        """Put the model under its first arm, once model and tokenizer are loaded."""
        self._loaded = loaded
        self._told_of_thoughts = False
        self._take(self._session_of(arm, self._tokenizer_of(arm)))

    def _session_of(self, arm: Arm, words: ArmTokenizer, template_name: str = DEFAULT_TEMPLATE) -> Session:
        """Return the model under `arm`, in the chat template of this name; nothing of the model changes."""
        if self.early_decision and self.think_end_token is not None:
            raise DttError(
                "early_decision=true can't be combined with think_end_token=; leave one of the two out (the injection"
                " tasks know the usual ends of thoughts)."
            )
        facts = {"tokens_route": self._route_of(arm), "early_decision": self.early_decision}
        return make_session(type(self).__name__, self._loaded, arm, words, template_name, facts)

    def _take(self, session: Session) -> None:
        """Begin a session: the only place where one replaces another."""
        self._session = session
        self.tokenizer = session.words.tokenizer
        self.cache_hook = Answers(None)
        self._decided: dict[tuple[int, ...], Rule] = {}  # of the prompts that are being generated, by their ids
        self._count_anew()
        if session.renderer is not None:
            tell(session, self._loaded)
            if not self._told_of_thoughts:
                self._told_of_thoughts = True
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

    def _route_of(self, arm: Arm) -> str | None:
        """Return how an arm's DefensiveTokens reach the model."""
        raise NotImplementedError

    @property
    def arm(self) -> Arm:
        """What is under test besides the model."""
        return self._session.arm

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides about an answer; "" until a chat template is chosen."""
        return self._session.fingerprint

    def change_arm(
        self,
        *,
        tokens: str | None = None,
        tokens_model: str | None = None,
        defense: str | None = None,
        prompt_format: str | None = None,
    ) -> None:
        """Put the loaded model under another arm, as if it had been loaded with these model arguments.

        All others stay as they are, the roles of messages too.

        Raises:
            LoadAnew: the arm's DefensiveTokens are not in the model, or the model has others that it can't do without.
        """
        arm = replace(Arm.from_arguments(tokens, tokens_model, defense, prompt_format), roles=self.arm.roles)
        self._check_change(arm)
        self._take(self._session_of(arm, self._tokenizer_of(arm)))

    def _check_change(self, arm: Arm) -> None:
        """Refuse an arm for which the model was not loaded."""
        ours, theirs = (one.tokens.digest if one.tokens and one.defended else None for one in (self.arm, arm))
        if ours != theirs:
            raise LoadAnew(f"The model is loaded for defense={self.arm.name!r}; load it anew for {arm.name!r}.")

    def _tokenizer_of(self, arm: Arm) -> ArmTokenizer:
        """Return the arm's tokenizer, and the chat templates of the undefended one."""
        return ArmTokenizer(self.tokenizer, model_templates(self.tokenizer, arm.prompt_format))

    # What lm-eval asks a chat model for -------------------------------------------------------------

    @property
    def renderer(self) -> PromptRenderer:
        """Renders every prompt of this arm.

        Raises:
            DttError: the model has several chat templates, none is called "default" and none was chosen.
        """
        if self._session.renderer is None:
            names = ", ".join(sorted(self._session.words.templates))
            raise DttError(
                f"The model's tokenizer has no chat template called {DEFAULT_TEMPLATE}, only: {names}; choose one with"
                " --apply_chat_template NAME, or a published one with prompt_format=."
            )
        return self._session.renderer

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render a conversation, for tasks that bring no messages of their own."""
        self._begin_run()
        self._asked_to_render = True
        prompt = self.renderer.render(chat_history, generation_prompt=add_generation_prompt)
        self._neutralised_in[prompt.text] = prompt.neutralised  # counted when it is sent
        return prompt.text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Use the template that `--apply_chat_template NAME` names; return it, for lm-eval's results file.

        Raises:
            DttError: the model has no template of that name, or the prompt format is not its own.
        """
        self._begin_run()
        self._asked_to_render = bool(chat_template)
        name = chat_template if isinstance(chat_template, str) else DEFAULT_TEMPLATE
        if name != self._session.template_name:
            self._choose_template(name)
        return self.renderer.template

    def _choose_template(self, name: str) -> None:
        names = ", ".join(sorted(self._session.words.templates)) or "none"
        if self.arm.prompt_format != MODEL_FORMAT:
            raise DttError(
                f"--apply_chat_template {name} names a template of the model's own, and the prompts are in"
                f" prompt_format={self.arm.prompt_format}; leave the name out, or add prompt_format=model."
            )
        if name not in self._session.words.templates:
            raise DttError(f"--apply_chat_template {name}: the model has no chat template of that name, only: {names}.")
        self._use_template(name)

    def _use_template(self, name: str) -> None:
        asked, answers = self._asked_to_render, self.cache_hook
        self._take(self._session_of(self.arm, self._session.words, name))
        self._asked_to_render = asked
        self.set_cache_hook(answers)

    def _begin_run(self) -> None:
        """Start counting anew: lm-eval asks for the model's facts when a run is over."""
        if self._reported:
            self._count_anew()
            if self._session.template_name != DEFAULT_TEMPLATE:
                self._use_template(DEFAULT_TEMPLATE)  # another run of this model had chosen

    def _count_anew(self) -> None:
        self._reported = self._asked_to_render = False
        self._neutralised = self._generated_tokens = 0
        self._neutralised_in: dict[str, int] = {}

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
        facts["baked"] = baked_facts(self._loaded.model)
        self._reported = True
        return {**base(), "dtt_plugin": {**facts, **self._session.identity, "machine": platform.machine()}}

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
        self._begin_run()
        contexts = {}  # each once, with however many continuations
        for request in requests:
            self._require_rendered(request)
            context, continuation = request.args
            contexts[request.task_name, request.doc_id, context] = self._neutralised_in.get(context, 0)
            ids = self.renderer.encode(context)
            self.renderer.check_tokens(ids)
            n_more = len(self.renderer.encode(context + continuation)) - len(ids)
            self._check_length(request, len(ids), f"{n_more} of the continuation", n_more)
        self._neutralised += sum(contexts.values())
        self._tell_neutralised()
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc,no-any-return]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse: text without a conversation has no place for a defense."""
        raise DttError(
            f"{requests[0].task_name} scores plain text, which a chat model with DefensiveTokens never sees; use"
            " lm-eval's own hf or vllm model for it."
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer the requests; each request's arguments then hold the exact prompt and its facts."""
        self._begin_run()
        for request in requests:
            self._prepare(request)
        answers: dict[int, str] = {}
        for index, request in enumerate(requests):
            answer = self._cached(request)
            if answer is not None:
                answers[index] = answer
        missing: dict[bool, list[int]] = {}
        for index, request in enumerate(requests):
            if index not in answers:
                missing.setdefault(reads_thoughts(request), []).append(index)
        for whole, indices in missing.items():
            self._decided = self._rules([requests[i] for i in indices])
            # lm-eval's classes expect exactly a prompt and its generation arguments.
            plain = [replace(requests[i], arguments=requests[i].arguments[:2], resps=[]) for i in indices]
            with self._not_cutting(whole):
                generated = super().generate_until(plain, disable_tqdm=disable_tqdm)  # type: ignore[misc]
            for index, answer in zip(indices, generated, strict=True):
                answers[index] = answer
                self.cache_hook.add_partial("generate_until", self._cache_key(requests[index]), answer)
        self._tell_neutralised()
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
        from lm_eval.models.utils import normalize_gen_kwargs

        text, generation, *rest = request.arguments
        if rest and rest[0]["fingerprint"] == self.fingerprint:  # a repeat of a request that this arm prepared
            return
        facts: dict[str, Any] = {"defense": self.arm.name, "fingerprint": self.fingerprint}
        if getattr(request, "own_messages", False):  # a column `messages` of another task may hold the answer
            self._check_task_defense(getattr(request, "task_defense", NONE))
            try:
                prompt: Prompt = self.renderer.render(request.doc["messages"])
            except DttError as error:
                raise DttError(f"{request.task_name}, document {request.doc_id}: {error}") from error
            text = prompt.text
            self._neutralised += prompt.neutralised
            facts |= {
                "attack": request.doc.get("attack"),
                "record_id": request.doc.get("record_id"),
                "messages": prompt.messages,
                "neutralised": prompt.neutralised,
            }
        else:
            self._require_rendered(request)
            if text in self._neutralised_in:  # not so, where lm-eval has the prompt from its request cache
                facts["neutralised"] = self._neutralised_in[text]
                self._neutralised += facts["neutralised"]
        ids = self.renderer.encode(text)
        self.renderer.check_tokens(ids)
        room = int(normalize_gen_kwargs(dict(generation), self.max_gen_toks)["max_gen_toks"])
        self._check_length(request, len(ids), f"{room} new ones", room, ", or lower max_gen_toks with --gen_kwargs")
        facts |= {"prompt_tokens": len(ids), "prompt_ids_sha256": sha256_json(ids)}
        if reads_thoughts(request) and self.end_of_thoughts:
            facts["think_end_token"] = self.end_of_thoughts
        request.arguments = (text, generation, facts)

    def _require_rendered(self, request: Instance) -> None:
        text = request.args[0]
        # Prompts of lm-eval's request cache were rendered by another process: they are known by how they begin.
        if text in self._neutralised_in or self.renderer.is_rendered(text, asked=self._asked_to_render):
            return
        if self._asked_to_render:
            raise DttError(
                f"{request.task_name}, document {request.doc_id}: the text is no conversation in the chat template in"
                " use, in spite of --apply_chat_template; use lm-eval's own hf or vllm model for such a task."
            )
        raise DttError(
            f"{request.task_name} brings plain text, and the dtt_ models are chat models: add --apply_chat_template."
        )

    def _check_task_defense(self, asked: str) -> None:
        """Refuse a `--metadata` defense that contradicts the model's: one of the two would be dropped in silence."""
        if asked != NONE and set(parse_defense(asked)) != set(self.arm.defenses):
            raise DttError(
                f"--metadata asks for defense={asked!r} and the model runs defense={self.arm.name!r}; give the"
                " dtt_ models their defense in --model_args."
            )

    def _check_length(self, request: Instance, n_prompt: int, more: str, n_more: int, remedy: str = "") -> None:
        if n_prompt + n_more > self.max_length:
            raise DttError(
                f"{request.task_name}, document {request.doc_id}: {n_prompt} prompt tokens and {more} exceed the"
                f" model's {self.max_length}, and cutting the prompt would cut the defense; raise max_model_len="
                f" (dtt_vllm) or max_length= (dtt_hf){remedy}."
            )

    def _tell_neutralised(self) -> None:
        if self._neutralised:
            logger.warning("%d control tokens in untrusted data were neutralised.", self._neutralised)

    def _cached(self, request: Instance) -> str | None:
        sampled = request.arguments[1].get("do_sample")
        return None if sampled else self.cache_hook.find("generate_until", self._cache_key(request))

    def _rules(self, requests: Sequence[Instance]) -> dict[tuple[int, ...], Rule]:
        """Return when each prompt's response is decided; where several requests have one prompt, for all of them."""
        rules: dict[tuple[int, ...], dict[Rule, None]] = {}
        for request in requests:
            if (rule := self._rule(request)) is not None:
                rules.setdefault(tuple(self.renderer.encode(request.args[0])), {})[rule] = None
        return {ids: all_of(list(several)) for ids, several in rules.items()}

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

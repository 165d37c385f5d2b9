"""The lm-eval task class behind every injection benchmark of this folder.

One document is one record; it makes one request per variant (attacks, controls,
the unharmed prompt), as a multiple-choice document makes one per option. So
`--limit N` takes N records, and metrics may compare the attacks on a record.
What a document holds: `description.py`, and `attacks.py` for AlpacaFarm's.

Every request's document holds the `messages`: trusted instruction (system) and
untrusted data (user). The dtt_ models render those themselves; for other models
lm-eval's `--apply_chat_template` renders them here.

What is scored of a response is the answer behind its thoughts: `resps` of a logged sample holds
the whole response, `filtered_resps` the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.prompt.defenses import NONE, TOKENS, Message, apply_prompt_defenses, parse_defense
from dtt_plugin.tasks.metrics import aggregation, decided_rule, is_higher_better, is_vouched
from dtt_plugin.tasks.thoughts import Reading, has_unopened_end, opened_by, read

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished"
"""The metric of runs in which a response begins with thoughts: the share of responses without an answer behind them."""


@dataclass
class InjectionRequest(Instance):
    """A request that also tells what its document must not hold, whose hash pairs arms.

    Its task takes the thoughts off the response itself, so it wants the response whole.
    """

    own_messages: bool = True
    """The document's `messages` are what to ask; in another task's document they may hold the answer."""
    task_defense: str = NONE
    """Which defense `--metadata` asked for."""
    decided: Callable[[str], bool] | None = None
    """Whether the task's metrics are the same for every response with the given beginning; None: cannot be told."""


class InjectionTask(ConfigurableTask):
    """A generate_until task with one request per variant of a record.

    `--metadata '{"defense": "sandwich"}'` applies a prompt defense for models that know nothing of defenses.
    The dtt_ models take `defense=` as a model argument instead and refuse a contradicting one here.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        # lm-eval leaves the key that brought it here among the task's fields.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        metadata = self.config.metadata or {}
        self.defense: str = metadata.get("defense") or NONE
        self.prompt_defenses = parse_defense(self.defense)
        self._thinks = False
        self._unfinished: dict[int, float] = {}
        """Per record, the share of its responses that are unfinished."""
        # lm-eval merges the model arguments into the metadata: with `tokens=` there this is a dtt_ model.
        if TOKENS in self.prompt_defenses and not metadata.get(TOKENS):
            raise DttError(
                f"defense={self.defense!r} needs a token file: use --model dtt_vllm or dtt_hf with tokens=FILE"
                " in --model_args; other models know only the prompt defenses."
            )

    def build_all_requests(self, *, tokenizer_name: str = "", **options: Any) -> None:
        """Build the requests; lm-eval's `--cache_requests` key gets what these prompts depend on."""
        if not options.get("apply_chat_template"):
            logger.warning(
                "%s: no --apply_chat_template. The dtt_ models render the conversation themselves; any other"
                " model now gets plain text without roles, which is not how a chat model is deployed.",
                self.config.task,
            )
        # Each rank counts for itself, and lm-eval joins only metrics that all of them have.
        self._thinks = options.get("world_size", 1) > 1
        state = sha256_json([self.VERSION, self.defense, list(self.eval_docs)])[:16]
        super().build_all_requests(tokenizer_name=f"{tokenizer_name}-{state}", **options)

    def fewshot_context(
        self,
        doc: Mapping[str, Any],
        num_fewshot: int = 0,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[[list[Message]], Any] | None = None,
        gen_prefix: str | None = None,
    ) -> list[tuple[list[Message], Any]]:
        """Return, per variant, its messages without a defense and the prompt of a model without our wrapper."""
        contexts = []
        for variant in doc["variants"]:
            system, user = variant["messages"]
            trusted = "\n\n".join(filter(None, (system_instruction, system["content"])))
            messages = [{"role": "system", "content": trusted}, dict(user)]
            defended = apply_prompt_defenses(messages, self.prompt_defenses)
            if apply_chat_template and chat_template is not None:
                prompt = chat_template(defended)
                self._check_system_role(prompt, trusted)
            else:
                prompt = "\n\n".join(message["content"] for message in defended)
            contexts.append((messages, prompt))
        return contexts

    def construct_requests(
        self, doc: Mapping[str, Any], ctx: Sequence[tuple[list[Message], Any]], **kwargs: Any
    ) -> list[Instance]:
        """Return one request per variant."""
        kwargs.pop("apply_chat_template", None)
        kwargs.pop("chat_template", None)
        # The rules are those of our metrics on the response as it is; a task of the user's may have others.
        vouched = is_vouched(self.config.process_results) and self.config.filter_list is None
        return [
            InjectionRequest(
                request_type="generate_until",
                doc={"record_id": doc["record_id"], "attack": variant["attack"], "messages": messages},
                arguments=(prompt, deepcopy(self.config.generation_kwargs)),
                idx=index,
                task_defense=self.defense,
                decided=decided_rule(variant) if vouched else None,
                **kwargs,
            )
            for index, (variant, (messages, prompt)) in enumerate(zip(doc["variants"], ctx, strict=True))
        ]

    def apply_filters(self) -> list[Instance] | None:
        """Filter the answers, as lm-eval filters responses; the responses stay whole."""
        responses = [instance.resps for instance in self.instances]
        shares: dict[int, list[bool]] = {}
        read_all: list[Reading] = []
        for instance in self.instances:
            readings = [self._read(instance, response) for response in instance.resps]
            read_all += readings
            shares.setdefault(instance.doc["record_id"], []).append(readings[0].answer is None)
            # None is an API that answered with nothing (a content filter).
            instance.resps = [
                response and (reading.answer or "") for response, reading in zip(instance.resps, readings, strict=True)
            ]
        try:
            filtered: list[Instance] | None = super().apply_filters()
        finally:
            for instance, whole in zip(self.instances, responses, strict=True):
                instance.resps = whole
        self._unfinished = {record: sum(without) / len(without) for record, without in shares.items()}
        self._thinks |= any(reading.thought for reading in read_all)
        self._tell(read_all)
        return filtered

    def _read(self, request: Instance, response: str | None) -> Reading:
        prompt, _, *facts = request.arguments
        end = facts[0].get("think_end_token") if facts else None
        return read(response or "", "" if self._is_cut(request) else prompt, end=end)

    def _is_cut(self, request: Instance) -> bool:
        """Return whether lm-eval itself cuts the responses at `think_end_token=`; the dtt_ models' are whole."""
        # lm-eval merges the model arguments into the metadata; the dtt_ models add facts to a request.
        named = (self.config.metadata or {}).get("think_end_token")
        return named is not None and len(request.arguments) == 2

    def _tell(self, readings: Sequence[Reading]) -> None:
        """Say in the log what was read as thoughts, and what can't be known."""
        task, n = self.config.task, len(readings)
        if thoughts := sum(reading.thought for reading in readings):
            logger.warning(
                "%s: %d of %d responses begin with thoughts; the answers behind them are scored.", task, thoughts, n
            )
        if unfinished := sum(reading.answer is None for reading in readings):
            logger.warning(
                "%s: %d of %d responses are unfinished: they never left their thoughts. They count as neither hacked"
                " nor refused, so the rates may be too low by that share; raise max_gen_toks with --gen_kwargs, or"
                " turn thinking off.",
                task,
                unfinished,
                n,
            )
        unseen = not all(isinstance(request.args[0], str) for request in self.instances)
        if unseen and (empty := sum(reading.answer == "" for reading in readings)):
            logger.warning(
                "%s: %d of %d responses are empty. They count as neither hacked nor refused. A server that takes"
                " thoughts off sends nothing where they did not end in time: raise max_gen_toks with --gen_kwargs.",
                task,
                empty,
                n,
            )
        plain = [reading.answer for reading in readings if not reading.thought and reading.answer]
        if unopened := sum(map(has_unopened_end, plain)):
            logger.warning(
                "%s: %d of %d responses end a thought that neither they nor their prompts open; they are scored from"
                " their first letter. If they do begin with thoughts, name the end with think_end_token=.",
                task,
                unopened,
                n,
            )
        if any(self._is_cut(r) and isinstance(r.args[0], str) and opened_by(r.args[0]) for r in self.instances):
            logger.warning(
                "%s: the prompts open a thought, and think_end_token= makes lm-eval cut it off before this task sees"
                " it, so responses that never left it can't be told from answers; leave think_end_token out.",
                task,
            )

    def process_results(self, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Score one record's answers; where the model thinks, also how many of its responses have none."""
        scores: dict[str, Any] = super().process_results(doc, results)
        if self._thinks:
            scores[UNFINISHED] = self._unfinished[doc["record_id"]]
        # The YAML declares what every task has; a variant's own metrics come with the documents.
        for name in scores.keys() - self._aggregation_list.keys():
            self._aggregation_list[name] = aggregation(name)
            self._higher_is_better[name] = is_higher_better(name)
        return scores

    def _check_system_role(self, prompt: Any, trusted: str) -> None:
        """Refuse a template that drops the instruction; a prompt that is no text goes to a server unrendered."""
        if isinstance(prompt, str) and trusted.strip() not in prompt:
            raise DttError(
                f"{self.config.task}: the model's chat template drops the system message, so the trusted"
                " instruction would be lost; use a model whose template has a system role, or a dtt_ model with"
                " prompt_format= of a published format."
            )

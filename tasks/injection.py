"""The lm-eval task class behind every injection benchmark of this folder.

One document is one record; it makes one request per variant (three attacks and
the unharmed prompt), as a multiple-choice document makes one per option. So
`--limit N` takes N records, and metrics may compare the attacks on a record.

Every request's document holds the `messages`: trusted instruction (system) and
untrusted data (user). The dtt_ models render those themselves; for other models
lm-eval's `--apply_chat_template` renders them here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from dtt_plugin.data import Record
from dtt_plugin.defenses import NONE, TOKENS, Message, apply_prompt_defenses, parse_defense
from dtt_plugin.errors import DttError
from dtt_plugin.files import sha256_json
from dtt_plugin.tasks.attacks import injected_data
from dtt_plugin.tasks.metrics import DECIDED, process_results

logger = logging.getLogger(__name__)


def injection_dataset(records: Sequence[Record], sentences: Sequence[str], variants: Sequence[str]) -> dict[str, Any]:
    """Return lm-eval's split dictionary: per record its fields and its `variants`, attack and messages each."""
    import datasets

    data = {attack: injected_data(attack, records, sentences) for attack in variants}
    rows = [
        {
            "record_id": i,
            **record,
            "variants": [
                {
                    "attack": attack,
                    "messages": [
                        {"role": "system", "content": record["instruction"]},
                        {"role": "user", "content": data[attack][i]},
                    ],
                }
                for attack in variants
            ],
        }
        for i, record in enumerate(records)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


@dataclass
class InjectionRequest(Instance):
    """A request that also tells what its document must not hold, whose hash pairs arms."""

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
        # lm-eval merges the model arguments into the metadata: with `tokens=` there this is a dtt_ model.
        if TOKENS in self.prompt_defenses and not metadata.get(TOKENS):
            raise DttError(
                f"defense={self.defense!r} needs a token file: use --model dtt_vllm or dtt_hf with tokens=FILE"
                " in --model_args; other models know only reminder and sandwich."
            )

    def build_all_requests(self, *, tokenizer_name: str = "", **options: Any) -> None:
        """Build the requests; lm-eval's `--cache_requests` key gets what these prompts depend on."""
        if not options.get("apply_chat_template"):
            logger.warning(
                "%s: no --apply_chat_template. The dtt_ models render the conversation themselves; any other"
                " model now gets plain text without roles, which is not how a chat model is deployed.",
                self.config.task,
            )
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
        vouched = self.config.process_results is process_results and self.config.filter_list is None
        return [
            InjectionRequest(
                request_type="generate_until",
                doc={"record_id": doc["record_id"], "attack": variant["attack"], "messages": messages},
                arguments=(prompt, deepcopy(self.config.generation_kwargs)),
                idx=index,
                task_defense=self.defense,
                decided=DECIDED[variant["attack"]] if vouched else None,
                **kwargs,
            )
            for index, (variant, (messages, prompt)) in enumerate(zip(doc["variants"], ctx, strict=True))
        ]

    def _check_system_role(self, prompt: Any, trusted: str) -> None:
        """Refuse a template that drops the instruction; a prompt that is no text goes to a server unrendered."""
        if isinstance(prompt, str) and trusted.strip() not in prompt:
            raise DttError(
                f"{self.config.task}: the model's chat template drops the system message, so the trusted"
                " instruction would be lost; use a model whose template has a system role, or a dtt_ model with"
                " prompt_format= of a published format."
            )

"""A model whose answers a test writes, for lm-eval's real evaluation of our tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from tests.conftest import our_tasks

Answer = Callable[[dict[str, Any]], str | None]


class Scripted(LM):
    """Answers every request by a function of its document: `attack`, `record_id` and `messages`."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        raise NotImplementedError


def rates(task: str, answer: Answer, *, limit: int | None = None, **metadata: Any) -> dict[str, float]:
    """Return a task's metrics for a scripted model."""
    import lm_eval

    tasks = our_tasks(**metadata).load(task)["tasks"]
    results = lm_eval.evaluate(Scripted(answer), tasks, limit=limit, bootstrap_iters=0)["results"][task]
    return {key.partition(",")[0]: value for key, value in results.items() if "stderr" not in key and key != "alias"}

"""How long the standard evaluation takes with a model on this machine, and which command is right for it.

`python -m dtt_plugin.estimate` measures, in a process of its own (`dtt_plugin.quiet`): it answers prompts of
`injection_demo` in batches that double until the time is up. The last batch counts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt_plugin.quiet import Event, do_job, run_quietly, tell

STANDARD = "alpacafarm_injection"
_MEASURED = "injection_demo"
_OUR_TASKS = Path(__file__).parent / "tasks"
_PROMPTS = 832
# Mean length of a prompt's messages: 529 characters in the standard task, 350 in the measured one.
_LONGER = 529 / 350
_MOST_TOKENS = 4096
_BATCH = 8


@dataclass(frozen=True)
class Estimate:
    """What was measured, and what follows for the standard evaluation."""

    engine: str
    device: str
    prompts: int
    """Of the batch that counted."""
    prompt_tokens: int
    """Of that batch."""
    measured_s: float
    load_s: float
    """Until the model was ready."""
    evaluation_s: float
    """For the 832 prompts of the standard task, with the load."""
    command: str


def estimate(
    model: str, tokens: str | None, engine: str, *, seconds: float, log: Path, listen: Callable[[Event], None]
) -> Estimate:
    """Measure `model` and return what the standard evaluation takes.

    Args:
        model: a folder or hub id.
        tokens: a token file, for the defended model.
        engine: `dtt_vllm` or `dtt_hf`.
        seconds: how long to measure, once the model is loaded.
        log: the file for what the engine prints.
        listen: called with each event (`dtt_plugin.progress.Steps.hear`).

    Raises:
        DttError: the model can't be evaluated.
    """
    found: dict[str, Any] = {}

    def hear(event: Event) -> None:
        found.update(event.get("measured", {}))
        listen(event)

    run_quietly(
        "dtt_plugin.estimate",
        {"model": model, "tokens": tokens, "engine": engine, "seconds": seconds},
        log=log,
        listen=hear,
    )
    evaluation = found["measured_s"] / found["prompts"] * _PROMPTS * _LONGER + found["load_s"]
    arguments = {"pretrained": model, **({"tokens": tokens} if tokens else {}), **found.pop("arguments")}
    batch = f" --batch_size {_BATCH}" if engine == "dtt_hf" else ""
    command = (
        f"lm_eval --model {engine} --model_args {','.join(f'{name}={value}' for name, value in arguments.items())}"
        f" --tasks {STANDARD}{batch} --log_samples --output_path out"
    )
    return Estimate(engine=engine, evaluation_s=evaluation, command=command, **found)


def _run(job: dict[str, Any]) -> None:
    import torch
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager, get_task_dict

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "processor"
    arguments = _arguments(job["engine"], on_processor=device == "processor")
    tell(step="load the model")
    begun = time.perf_counter()
    given = {"pretrained": job["model"], **({"tokens": job["tokens"]} if job["tokens"] else {})}
    model = get_model(job["engine"]).create_from_arg_obj({**given, **arguments}, {"batch_size": _BATCH})
    load = time.perf_counter() - begun
    manager = TaskManager(include_path=str(_OUR_TASKS), include_defaults=False, metadata={})
    task = get_task_dict([_MEASURED], manager)[_MEASURED]
    task.build_all_requests(limit=None, rank=0, world_size=1, tokenizer_name=model.tokenizer_name)
    requests = list(task.instances)
    tell(step="measure")
    end = time.perf_counter() + job["seconds"]
    size, done = 4, 0
    while done < len(requests) and (not done or time.perf_counter() < end):
        batch = requests[done : done + size]
        begun = time.perf_counter()
        model.generate_until(batch)
        taken = time.perf_counter() - begun
        size, done = 2 * size, done + len(batch)
    n_tokens = sum(request.arguments[2]["prompt_tokens"] for request in batch)
    facts = {"device": device, "prompts": len(batch), "prompt_tokens": n_tokens, "measured_s": taken, "load_s": load}
    tell(measured={**facts, "arguments": arguments})
    tell(step=None)


def _arguments(engine: str, *, on_processor: bool) -> dict[str, Any]:
    """Return the model arguments that suit the machine."""
    length = {"dtt_vllm": "max_model_len", "dtt_hf": "max_length"}[engine]
    arguments: dict[str, Any] = {"early_decision": True, length: _MOST_TOKENS}
    if on_processor:
        arguments["dtype"] = "float32"  # half precision is emulated by most processors
        if engine == "dtt_vllm":
            arguments["enforce_eager"] = True
    return arguments


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(do_job(_run))

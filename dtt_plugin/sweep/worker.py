"""`python -m dtt_plugin.sweep.worker`: evaluate cells of a sweep that may share one model in memory.

The job comes as `dtt_plugin.quiet` gives it: a sweep that is killed leaves no engine behind.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError, LoadAnew
from dtt_plugin.files.replacing import write_json
from dtt_plugin.quiet import do_job, tell

_OUR_TASKS = Path(__file__).parents[1] / "tasks"


@cache
def list_packages_once() -> None:
    """Let lm-eval, which notes `pip list` in the results of every cell, ask for it once in a process."""
    from torch.utils import collect_env

    setattr(collect_env, "get_pip_packages", cache(collect_env.get_pip_packages))  # noqa: B010  as mypy has it


def run(job: dict[str, Any]) -> None:
    """Load the model once and evaluate the cells, up to the first for whose tokens it has to be loaded anew.

    A cell's folder gets its name when it is complete.

    Raises:
        DttError: lm-eval wrote no results.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    list_packages_once()
    model: Any = None
    arms = [cell["arm"] for cell in job["cells"]]
    files = {(arm["tokens"], arm.get("tokens_model")) for arm in arms if "tokens" in arm}
    settings = {name: job.get(name) for name in ("limit", "batch_size", "gen_kwargs")}
    for cell in job["cells"]:
        arguments = {**job["model_args"], **cell["arm"]}
        if model is None:
            tell(step="load the model")
            options: dict[str, Any] = {"batch_size": settings["batch_size"]}
            if job["engine"] == "dtt_vllm":
                options["more_tokens"] = sorted(files, key=str)
            model = get_model(job["engine"]).create_from_arg_obj(arguments, options)
        else:
            try:
                model.change_arm(**cell["arm"])
            except LoadAnew:
                return
        tell(step=cell["name"])
        folder = Path(cell["folder"])
        partial = folder.parents[1] / "partial" / folder.name
        shutil.rmtree(partial, ignore_errors=True)
        tracker = EvaluationTracker(output_path=str(partial))
        # An index of our tasks alone, where that does: lm-eval's own take seconds to read, for every cell anew.
        ours = TaskManager(include_path=str(_OUR_TASKS), include_defaults=False, metadata=arguments)
        results = simple_evaluate(
            model,
            model_args=arguments,
            tasks=[job["task"]],
            task_manager=ours if job["task"] in ours.all_tasks else None,
            evaluation_tracker=tracker,
            **settings,
        )
        results["config"]["model"] = job["engine"]  # lm-eval calls a model that is loaded already by its class
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, lines in samples.items():
            tracker.save_results_samples(task_name=task, samples=lines)
        # lm-eval only logs that it could not write.
        if not any(partial.rglob("results_*.json")) or not any(partial.rglob("samples_*.jsonl")):
            raise DttError(f"lm-eval wrote no results to {partial}, see above; is there room on the disk?")
        write_json(partial / "cell.json", {"key": cell["key"], "defense": cell["arm"]["defense"], "job": job})
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        partial.rename(folder)
    tell(step=None)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(do_job(run))

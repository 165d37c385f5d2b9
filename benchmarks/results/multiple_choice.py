"""Utility: two of lm-eval's multiple-choice tasks, with and without tokens.

    python -m benchmarks.results.multiple_choice MODEL [--tokens FILE] [--items N] [--archive FILE]

Tasks of BIG-bench (Srivastava et al., arXiv 2206.04615; Apache-2.0) under lm-eval's own definitions, through
`dtt_hf`. lm-eval takes the examples from a copy on the hub; here they come from BIG-bench's release on PyPI, which
needs no hub, and are written out as its `json_task.py` does it without shots.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import plan
from dtt_plugin.data.records import data_folder
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_file

RELEASE = "bigbench-1.0.0.tar.gz"
RELEASE_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
ORDER_SEED = 42
"""BIG-bench's own default, anew for every example."""


def release(archive: Path | None) -> Path:
    """Return BIG-bench's release (350 MB, from PyPI's page of `bigbench`), by default in the data folder.

    Raises:
        DttError: it is not there, or another file.
    """
    path = archive or data_folder() / RELEASE
    if not path.is_file() or sha256_file(path) != RELEASE_SHA256:
        raise DttError(f"{path} is not {RELEASE} of bigbench 1.0.0 on PyPI; download it there.")
    return path


def read_tasks(archive: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return BIG-bench tasks by name, read out of the release without unpacking it."""
    found = {}
    with tarfile.open(archive) as members:
        paths = {f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json": name for name in names}
        for member in members:
            if (name := paths.get(member.name)) and (content := members.extractfile(member)):
                found[name] = json.load(content)
    return found


def documents(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a BIG-bench task's examples in the columns that lm-eval's definition reads."""
    before = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ")
    between = task.get("choice_prefix", "\n  choice: ")
    after = task.get("example_output_prefix", "\nA: ")
    found = []
    for example in task["examples"]:
        scores = example["target_scores"]
        choices = list(scores)
        listed = ""
        if task.get("append_choices_to_input", True):
            order = np.random.RandomState(ORDER_SEED).permutation(sorted(choices))
            listed = "".join(between + choice for choice in order)
        found.append(
            {
                "inputs": before + example["input"] + listed + after,
                "targets": [max(choices, key=scores.get)],
                "multiple_choice_targets": choices,
                "multiple_choice_scores": [int(scores[choice]) for choice in choices],
            }
        )
    return found


def measure(model: str, tokens: str | None, tasks: Sequence[str], n_items: int, archive: Path) -> dict[str, Any]:
    """Return per task whether lm-eval found the right choice of each item (its `acc`), 0 or 1, and chance's share."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    with tempfile.TemporaryDirectory() as work:
        wanted = []
        for name, task in read_tasks(archive, tasks).items():
            items = Path(work) / f"{name}.jsonl"
            lines = [json.dumps(document) for document in documents(task)[:n_items]]
            items.write_text("\n".join(lines) + "\n", encoding="utf-8")
            definition = Path(work) / f"{name}.yaml"  # JSON is YAML
            source = {
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"default": str(items)}},
            }
            original = str(manager.task_index[f"bigbench_{name}_multiple_choice"].yaml_path)
            definition.write_text(json.dumps({"include": original, "task": name, **source}), encoding="utf-8")
            wanted.append(str(definition))
        arguments = {"pretrained": model, "dtype": "float32"} | ({"tokens": tokens} if tokens else {})
        results = simple_evaluate(
            "dtt_hf",
            model_args=arguments,
            tasks=wanted,
            task_manager=manager,
            batch_size=8,
            apply_chat_template=True,
            bootstrap_iters=0,
        )
    in_order = {name: sorted(results["samples"][name], key=lambda sample: sample["doc_id"]) for name in tasks}
    return {
        "correct": {name: [int(sample["acc"]) for sample in samples] for name, samples in in_order.items()},
        "chance": {
            name: float(np.mean([1 / len(sample["doc"]["multiple_choice_targets"]) for sample in samples]))
            for name, samples in in_order.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens")
    parser.add_argument("--items", type=int, default=plan.CHOICE_ITEMS)
    parser.add_argument("--tasks", nargs="+", default=list(plan.CHOICE_TASKS))
    parser.add_argument("--archive", type=Path, help=f"{RELEASE}, by default in the data folder")
    args = parser.parse_args()
    print(json.dumps(measure(args.model, args.tokens, args.tasks, args.items, release(args.archive))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What tests of described tasks share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tests import conftest


def load(name: str, **metadata: Any) -> Any:
    """Return one of our tasks."""
    return conftest.our_tasks(**metadata).load(name)["tasks"][name]


def digests(documents: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the digest of each variant's prompts, as the protocol of AlpacaFarm makes it."""
    lines: dict[str, list[str]] = {}
    for document in documents:
        for variant in document["variants"]:
            system, user = variant["messages"]
            assert (system["role"], user["role"]) == ("system", "user")
            line = json.dumps([system["content"], user["content"]], ensure_ascii=False)
            lines.setdefault(variant["attack"], []).append(line)
    return {name: hashlib.sha256("\n".join(texts).encode()).hexdigest() for name, texts in lines.items()}


def run(tiny: str, task: str, *, limit: int = 2, tokens: int = 8, **metadata: Any) -> dict[str, Any]:
    """Run a task on the tiny model, and return lm-eval's results."""
    arguments = {"pretrained": tiny, "dtype": "float32", "max_length": 16384}
    options: dict[str, Any] = {"tasks": [task], "limit": limit, "gen_kwargs": {"max_gen_toks": tokens}}
    results: dict[str, Any] = conftest.evaluate("dtt_hf", arguments, metadata=metadata, **options)
    return results


def metrics(results: Mapping[str, Any], task: str) -> dict[str, float]:
    """Return a task's metrics by name, without lm-eval's standard errors."""
    return {
        name.removesuffix(",none"): value
        for name, value in results["results"][task].items()
        if name.endswith(",none") and not name.endswith("_stderr,none")
    }

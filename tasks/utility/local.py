"""lm-eval's own tasks on local files: prompts, filters and metrics are theirs, only the data come from our folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

from dtt_plugin.data.benchmark_files import load_benchmark
from dtt_plugin.errors import DttError

logger = logging.getLogger(__name__)

# What ifeval's rules for sentences and capital words need of NLTK; the other rules do without.
_NEEDS_PUNKT = frozenset(["length_constraints:number_sentences", "change_case:capital_word_frequency"])
_IFEVAL_PACKAGES = ("langdetect", "immutabledict", "nltk")


class LocalTask(ConfigurableTask):
    """A task of lm-eval's with other data: `original` is its file below lm-eval's tasks, the other keys replace its."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from lm_eval import tasks
        from lm_eval.tasks._yaml_loader import load_yaml

        own = {key: value for key, value in config.items() if key not in ("class", "original")}
        theirs = load_yaml(Path(tasks.__file__).parent / config["original"])
        metadata = {**theirs.pop("metadata", {}), **(own.pop("metadata", None) or {})}
        theirs = {key: value for key, value in theirs.items() if key not in ("tag", "group")}
        super().__init__(config={**theirs, **own, "metadata": metadata})


class IFEval(LocalTask):
    """IFEval, with its needs told in a sentence; the guesses of langdetect are the same in every run."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if missing := [name for name in _IFEVAL_PACKAGES if find_spec(name) is None]:
            raise DttError(
                f"{config['task']} needs {' and '.join(missing)}, which lm-eval's rules import:"
                " pip install 'lm_eval[ifeval]'."
            )
        from langdetect import DetectorFactory

        DetectorFactory.seed = 0
        super().__init__(config)


def gsm8k(*, allow_modified_data: bool = False, **_: Any) -> dict[str, Any]:
    """Return lm-eval's split dictionary for the 1,319 test questions of GSM8K (Cobbe et al., arXiv 2110.14168)."""
    return _splits("test", load_benchmark("utility/gsm8k_test.jsonl", allow_modified=allow_modified_data))


def ifeval(*, allow_modified_data: bool = False, **_: Any) -> dict[str, Any]:
    """Return lm-eval's split dictionary for the 541 prompts of IFEval (Zhou et al., arXiv 2311.07911).

    Where NLTK's sentence model is not to be had, the prompts that can't be scored are left out, which a warning says.
    """
    rows = load_benchmark("utility/ifeval_joined.parquet", allow_modified=allow_modified_data)
    records = [
        {
            "key": row["key"],
            "prompt": row["input_question"],
            "instruction_id_list": row["instruction_id_list"],
            # The file has its counts as floats, and lm-eval's rules count with them.
            "kwargs": [{name: _whole(value) for name, value in one.items()} for one in row["kwargs"]],
        }
        for row in rows
    ]
    if not _has_punkt():
        every = len(records)
        records = [record for record in records if _NEEDS_PUNKT.isdisjoint(record["instruction_id_list"])]
        logger.warning(
            "utility_ifeval: NLTK's punkt_tab is not here and can't be downloaded, so %d of %d prompts are left out,"
            " those with rules on sentences and capital words; get it with `python -m nltk.downloader punkt_tab`.",
            every - len(records),
            every,
        )
    return _splits("train", records)


def _has_punkt() -> bool:
    """Return whether NLTK finds its sentence model; lm-eval's rules, when imported, try to download it."""
    import nltk
    from lm_eval.tasks.ifeval import instructions_util  # noqa: F401

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _splits(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import datasets

    return {name: datasets.Dataset.from_list([dict(record) for record in records])}

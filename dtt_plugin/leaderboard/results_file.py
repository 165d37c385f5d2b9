"""One results file of lm-eval, with the samples beside it, read as the runs that it tells of."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes, sha256_json
from dtt_plugin.leaderboard.arm_facts import arm_facts, attack_used, run_as_told
from dtt_plugin.leaderboard.outcome_files import is_outcome_file, read_outcomes
from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.leaderboard.samples import (
    frame_of,
    prompts_digest,
    read_responses,
    record_id_of,
    request_of,
    sorted_samples,
)
from dtt_plugin.leaderboard.scores import Scores, clusters_of, read_scores, scored_by_rules, thoughts
from dtt_plugin.leaderboard.untrusted import as_number, as_table, as_text, load_json, read_file
from dtt_plugin.leaderboard.utility import UTILITY, no_responses, read_answers
from dtt_plugin.tasks.attacks import ADAPTIVE
from dtt_plugin.tasks.metrics import FOLLOWED, REFUSAL, followed_under

RESULTS_NAME = re.compile(r".*?_?(\d{4}-\d\d-\d\dT[\d.\-]+)\.json")
_FILE_SAFE = re.compile(r"[\w.+\-]+")
# lm-eval's metric in place of the task's own.
_PREDICT_ONLY = "bypass"


def read_results(path: Path, problems: list[str], unscored: bool) -> list[Run]:
    """Read one results file; what is wrong with one of its tasks goes to `problems`."""
    results = load_json(read_file(path), str(path))
    if is_outcome_file(results):
        return read_outcomes(path, results)
    tasks = as_table(results, "results")
    if not tasks or not as_table(results, "configs") or not as_table(results, "config"):
        raise DttError(f"{path} is not a results file of lm-eval; give the folder of lm-eval's --output_path.")
    ours = [task for task, scores in tasks.items() if _metrics(scores) & {FOLLOWED, REFUSAL} or task in UTILITY]
    unmeasured = [task for task, scores in tasks.items() if _PREDICT_ONLY in _metrics(scores)]
    ours = [task for task in ours if task not in unmeasured]
    if unmeasured and not ours and not unscored:
        raise DttError(
            f"{path} was run with --predict_only, so nothing in it is measured; count its responses with `dtt rescore`,"
            " or run lm-eval without it."
        )
    ours += unmeasured if unscored else []
    if not ours:
        raise DttError(f"{path} holds no prompt-injection task ({', '.join(tasks)[:200]}); leave it out.")
    runs = []
    for task in ours:
        try:
            runs.append(_read_task(path, results, task))
        except DttError as error:
            problems.append(str(error))
    return runs


def _metrics(scores: Any) -> set[str]:
    return {str(name).partition(",")[0] for name in scores} if isinstance(scores, dict) else set()


def _read_task(path: Path, results: dict[str, Any], task: str) -> Run:
    match = RESULTS_NAME.fullmatch(path.name)
    if not match or not _FILE_SAFE.fullmatch(task):
        raise DttError(f"{path}: its name has no time stamp, or its task no plain name; keep lm-eval's file names.")
    samples_path = path.with_name(f"samples_{task}_{match[1]}.jsonl")
    if not os.path.isfile(samples_path):
        raise DttError(f"{path}: {samples_path.name} is missing; run lm-eval with --log_samples.")
    read = _read_utility if task in UTILITY else _read_attacked
    return replace(read(path, samples_path, results, task), stamp=match[1])


def _read_utility(path: Path, samples_path: Path, results: dict[str, Any], task: str) -> Run:
    """Read a run of a task on which nothing is attacked."""
    metric, (samples, hashes, correct) = UTILITY[task], read_answers(samples_path, task)
    _check_size_and_hash(path, samples_path, results, task, len(samples), hashes)
    rate = as_number(as_table(results, "results", task).get(f"{metric.name},{metric.filter}"))
    if rate is not None and abs(rate - correct.mean()) > 1e-6:
        raise _mixed(path, samples_path)
    told = arm_facts(path, results, task, samples[0])
    run = run_as_told(path, samples_path, results, task, told, [sample["doc_id"] for sample in samples])
    return replace(
        run,
        data_digest=sha256_json([[sample["doc_id"], as_text(sample.get("doc_hash"))] for sample in samples]),
        measures={metric.name: correct},
        prompts_digest=prompts_digest(samples, told.bos),
        reader=no_responses,
    )


def _read_attacked(path: Path, samples_path: Path, results: dict[str, Any], task: str) -> Run:
    samples = sorted_samples(samples_path)
    scored = _PREDICT_ONLY not in _metrics(as_table(results, "results", task))
    samples = samples if scored else scored_by_rules(samples_path, samples)
    scores = read_scores(samples_path, samples)
    _check_same_run(path, samples_path, results, task, samples, scores)
    told = arm_facts(path, results, task, samples[0])
    task_config = as_table(results, "configs", task)
    cut = not told.facts and as_table(task_config, "metadata").get("think_end_token") is not None
    unfinished, misread = thoughts(samples, scores.outcomes, cut)
    record_ids = [record_id_of(sample) for sample in samples]
    run = run_as_told(path, samples_path, results, task, told, record_ids, frame_of(samples[0], told.bos))
    attack = attack_used(task_config, told.facts, record_ids)
    # What is optimised differs from arm to arm; the records and the static attacks are what rows have in common.
    alike = {ADAPTIVE} if attack else set()
    variants = [
        [record_id_of(s), [[v["attack"], v["messages"]] for v in s["doc"]["variants"] if v["attack"] not in alike]]
        for s in samples
    ]
    identity = run.identity
    if attack:  # another method or budget is another table
        identity = replace(identity, facts={**identity.facts, "attack": attack.name})
    return replace(
        run,
        data_digest=sha256_json(variants),
        outcomes=scores.outcomes,
        made=scores.made,
        measures=scores.measures,
        clusters=clusters_of(samples),
        unfinished=unfinished,
        misread=misread,
        thoughts_cut=cut,
        identity=identity,
        attack=attack,
        prompts_digest=prompts_digest(samples, told.bos),
        scored=scored,
        reader=read_responses,
    )


def _check_same_run(
    path: Path,
    samples_path: Path,
    results: dict[str, Any],
    task: str,
    samples: Sequence[Mapping[str, Any]],
    scores: Scores,
) -> None:
    """Refuse samples that these results were not made from.

    lm-eval's own hash covers the documents and prompts, the fingerprint the arm, the rates the outcomes.
    """
    parts = ("doc_hash", "prompt_hash", "target_hash")
    in_order = sorted(samples, key=lambda sample: sample["doc_id"] if type(sample.get("doc_id")) is int else -1)
    hashes = "".join(as_text(sample.get(part)) for sample in in_order for part in parts)
    _check_size_and_hash(path, samples_path, results, task, len(samples), hashes)
    fingerprint = as_table(results, "config", "dtt_plugin").get("fingerprint")
    if fingerprint is not None:
        seen = {as_text(as_table(request_of(sample, 0), "arg_2").get("fingerprint")) for sample in samples}
        if seen != {as_text(fingerprint)}:
            raise _mixed(path, samples_path)
    logged = as_table(results, "results", task)
    for name, column in scores.outcomes.items():
        of_attack = followed_under(name)
        metric = name if name == REFUSAL else of_attack if f"{of_attack},none" in logged else FOLLOWED
        rate = as_number(logged.get(f"{metric},none"))
        made = scores.made.get(name)
        if rate is not None and abs(rate - (column if made is None else column[made]).mean()) > 1e-6:
            raise _mixed(path, samples_path)


def _mixed(path: Path, samples_path: Path) -> DttError:
    return DttError(f"{samples_path} does not belong to {path.name}; keep lm-eval's output folders as they are.")


def _check_size_and_hash(
    path: Path, samples_path: Path, results: dict[str, Any], task: str, n: int, hashes: str
) -> None:
    effective = as_table(results, "n-samples", task).get("effective")
    if effective is not None and effective != n:
        raise DttError(
            f"{samples_path} has {n} samples and {path.name} tells of {str(effective)[:20]}; a file is cut short or"
            " from another run, run lm-eval again."
        )
    expected = as_table(results, "task_hashes").get(task)
    if isinstance(expected, str) and expected != sha256_bytes(hashes.encode("utf-8", "replace")):
        raise _mixed(path, samples_path)

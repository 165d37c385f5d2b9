"""lm-eval's output folders, read as runs.

Nothing in such a file is trusted: a file that is not what it should be becomes one
sentence among the problems, and the other files are read all the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dtt_plugin.checkpoint.defended import baked_facts
from dtt_plugin.costs import recorded_costs
from dtt_plugin.data.suffixes import other_facts
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes, sha256_json
from dtt_plugin.leaderboard.board import Bound
from dtt_plugin.leaderboard.bounds import ENDING as ATTACKS_ENDING
from dtt_plugin.leaderboard.bounds import read_bound
from dtt_plugin.leaderboard.identity import canonical, parse_arguments, read_identity
from dtt_plugin.leaderboard.outcome_files import ENDING, is_outcome_file, read_outcomes
from dtt_plugin.leaderboard.runs import MOST_FLOPS, UNKNOWN, AttackUsed, Run, labelled
from dtt_plugin.leaderboard.samples import (
    Scores,
    clusters_of,
    frame_of,
    prompt_of,
    prompts_digest,
    read_responses,
    read_scores,
    record_id_of,
    request_of,
    scored_by_rules,
    sorted_samples,
    thoughts,
)
from dtt_plugin.leaderboard.untrusted import as_list, as_number, as_table, as_text, load_json, read_file
from dtt_plugin.leaderboard.utility import UTILITY, no_responses, read_answers
from dtt_plugin.prompt.defenses import NONE, TOKENS, parse_defense
from dtt_plugin.public_names import is_hub_model
from dtt_plugin.tasks.attacks import ADAPTIVE
from dtt_plugin.tasks.metrics import FOLLOWED, REFUSAL, followed_under

_RESULTS_NAME = re.compile(r".*?_?(\d{4}-\d\d-\d\dT[\d.\-]+)\.json")
_SAMPLES_NAME = re.compile(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.\-]+)\.jsonl")
_FILE_SAFE = re.compile(r"[\w.+\-]+")
_FIRST_TOKEN = "[DefensiveToken0]"
# lm-eval's metric in place of the task's own.
_PREDICT_ONLY = "bypass"


def read_runs(
    paths: Iterable[Path], *, unscored: bool = False, bounds: list[Bound] | None = None
) -> tuple[list[Run], list[str]]:
    """Read every run in `paths`: results, samples and outcome files, or folders that hold some at any depth.

    Args:
        paths: them.
        unscored: read runs with `--predict_only`, too, whose responses have no logged outcomes.
        bounds: where files of soft attacks go, if they are wanted.

    Returns:
        The runs, the earliest first (by the time in their files' names), each with a label of its own; and
        one sentence for each thing that could not be read.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for path in _results_files(paths, problems):
        try:
            if _is_attacks(path):
                if bounds is not None:
                    bounds.append(read_bound(path))
                continue
            runs += _read_results(path, problems, unscored)
        except DttError as error:
            problems.append(str(error))
        except RecursionError:
            problems.append(f"{path} is nested too deeply to be lm-eval's; restore it or run lm-eval again.")
    return labelled(sorted(runs, key=lambda run: run.stamp)), problems


def read_run(path: Path, *, unscored: bool = False) -> Run:
    """Read the one run in `path`, see `read_runs`.

    Raises:
        DttError: there is none, or more than one, or something there can't be read: a gate must not pass
            because the run that it is about was left out.
    """
    runs, problems = read_runs([path], unscored=unscored)
    if problems:
        raise DttError(problems[0])
    if not runs:
        raise DttError(f"{path} holds attacks, and no run that was evaluated under them; give lm-eval's output.")
    if len(runs) > 1:
        labels = ", ".join(f"{run.path} ({run.label})" for run in runs[:3])
        raise DttError(f"{path} holds {len(runs)} runs, and one is wanted; give its results file: {labels}.")
    return runs[0]


def _results_files(paths: Iterable[Path], problems: list[str]) -> list[Path]:
    files: dict[str, Path] = {}  # by real path: a file that is named twice is one file
    for path in paths:
        found: list[Path] = []
        if os.path.isdir(path):
            found = _below(path, problems)
            if not found:
                problems.append(f"{path} holds no results of lm-eval; run lm_eval with --log_samples --output_path.")
        elif match := _SAMPLES_NAME.fullmatch(path.name):
            found = sorted(path.parent.glob(f"*{match[2]}.json"))
            if not found:
                problems.append(f"{path} has no results file beside it; give lm-eval's whole output folder.")
        elif os.path.exists(path):
            found = [path]
        else:
            problems.append(f"{path} does not exist; give the folder of lm-eval's --output_path.")
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    return sorted(files.values(), key=_stamp)


def _below(folder: Path, problems: list[str]) -> list[Path]:
    """Return what has a results file's name at any depth, also below linked folders; each folder is read once."""
    found: list[Path] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename} can't be read ({error.strerror}); what lies in it is left out.")

    for root, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [
            Path(root, name)
            for name in sorted([*names, *folders])
            if _RESULTS_NAME.fullmatch(name) or name.endswith((ENDING, ATTACKS_ENDING))
        ]
    return found


def _is_attacks(path: Path) -> bool:
    """Return whether a file is to be read as one of attacks: lm-eval's JSON lines are its samples."""
    return path.suffix == ".jsonl"


def _stamp(path: Path) -> str:
    match = _RESULTS_NAME.fullmatch(path.name)
    return match[1] if match else ""


def _read_results(path: Path, problems: list[str], unscored: bool) -> list[Run]:
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
    match = _RESULTS_NAME.fullmatch(path.name)
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
    told = _arm(path, results, task, samples[0])
    run = _told(path, samples_path, results, task, told, [sample["doc_id"] for sample in samples])
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
    told = _arm(path, results, task, samples[0])
    task_config = as_table(results, "configs", task)
    cut = not told.facts and as_table(task_config, "metadata").get("think_end_token") is not None
    unfinished, misread = thoughts(samples, scores.outcomes, cut)
    record_ids = [record_id_of(sample) for sample in samples]
    run = _told(path, samples_path, results, task, told, record_ids, frame_of(samples[0], told.bos))
    attack = _attack(task_config, told.facts, record_ids)
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


class _Arm(NamedTuple):
    """What a results file tells of the arm."""

    facts: dict[str, Any]
    """By the dtt_ models."""
    baked: dict[str, Any]
    model: str
    defense: str
    method: str
    bos: str


def _arm(path: Path, results: dict[str, Any], task: str, sample: Mapping[str, Any]) -> _Arm:
    config, task_config = as_table(results, "config"), as_table(results, "configs", task)
    facts = as_table(config, "dtt_plugin")
    loaded = _model(results, config, facts)
    baked = as_table(facts, "baked") if facts else baked_facts(loaded) or {}
    model = as_text(baked.get("base_model")) or loaded
    bos = as_text(next(iter(as_list(results.get("tokenizer_bos_token"))), ""))
    defense, method = _defense(path, facts, baked, task_config, prompt_of(sample, 0).removeprefix(bos), model)
    return _Arm(facts, baked, model, defense, method, bos)


def _told(
    path: Path,
    samples_path: Path,
    results: dict[str, Any],
    task: str,
    told: _Arm,
    record_ids: Sequence[int],
    frame: str = "",
) -> Run:
    """Return a run as its results file tells it, without what was measured."""
    task_config, n = as_table(results, "configs", task), len(record_ids)
    sizes = as_table(results, "n-samples", task)
    costs = recorded_costs(as_table(told.baked, "costs") | as_table(told.facts, "costs"))
    limit = as_table(results, "config").get("limit")
    return Run(
        path=path,
        samples=samples_path,
        model=told.model,
        defense=told.defense,
        method=told.method,
        tokens_sha256=as_text(told.facts.get("tokens_sha256")) or as_text(told.baked.get("tokens_sha256")),
        task=task,
        version=str(as_table(results, "versions").get(task))[:50],
        prompt_format=_prompt_format(results, told.facts),
        data_digest="",
        generation=json.dumps(as_table(task_config, "generation_kwargs"), sort_keys=True, ensure_ascii=False),
        limited=sizes["original"] != n if "original" in sizes else limit is not None,
        early_decision=bool(told.facts.get("early_decision")),
        n=n,
        record_ids=tuple(record_ids),
        outcomes={},
        seconds=as_number(results.get("total_evaluation_time_seconds")),
        costs=costs if told.method else {},
        identity=read_identity(results, task, baked=bool(told.baked), frame=frame),
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


def _model(results: dict[str, Any], config: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the model that was loaded."""
    arguments = parse_arguments(config.get("model_args"))
    return (
        as_text(facts.get("model"))
        or as_text(arguments.get("pretrained"))
        or as_text(arguments.get("model"))
        or as_text(results.get("model_name"))
        or "unknown model"
    )


def _defense(
    path: Path,
    facts: dict[str, Any],
    baked: dict[str, Any],
    task_config: dict[str, Any],
    prompt: str,
    model: str,
) -> tuple[str, str]:
    """Return the name of the defense and the method of its tokens.

    `prompt` is one of its prompts, without a BOS in front.
    """
    asked = facts.get("defense") if facts else as_table(task_config, "metadata").get("defense")
    text = None if asked is None else str(asked)
    try:
        names = list(parse_defense(text if text is None or len(text) <= 200 else f"{text[:50]}…"))
    except DttError as error:
        raise DttError(f"{path}: {error}") from error
    method = as_text(facts.get("tokens_method")) if TOKENS in names else ""
    if TOKENS not in names and prompt.startswith(_FIRST_TOKEN):
        # A defended checkpoint whose own template puts its tokens there.
        names.append(TOKENS)
        method = as_text(baked.get("method")) or "baked"
    made_for = as_text(facts.get("tokens_model"))
    if method == "native" and is_hub_model(made_for) and is_hub_model(model) and made_for != model:
        method = "copy"
    shown = [f"{name} ({method or UNKNOWN})" if name == TOKENS else name for name in names]
    return "+".join(shown) or NONE, method


def _attack(task_config: dict[str, Any], evaluated: dict[str, Any], record_ids: Sequence[int]) -> AttackUsed | None:
    """Return the optimised attack that an adaptive task tells of."""
    told = as_table(task_config, "metadata", "attack")
    name = as_text(told.get("name"))
    if not name:
        return None
    arm = told.get("arm") if isinstance(told.get("arm"), dict) else None
    steps = as_table(told, "steps_to_hit")
    counts = [steps.get(str(record)) for record in record_ids]
    searched = not told.get("search")  # else on other records than these
    return AttackUsed(
        name[:80],
        not other_facts(arm, evaluated),
        as_text((arm or {}).get("defense")),
        as_text((arm or {}).get("tokens_sha256")),
        tuple(map(_count, counts)),
        _count(told.get("n_left_out")) or 0,
        _count(as_table(told, "budget").get("steps")) if searched else None,
        _count(told.get("flops")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < MOST_FLOPS else None


def _prompt_format(results: dict[str, Any], facts: dict[str, Any]) -> str:
    if facts:
        given = parse_arguments(as_table(results, "config").get("model_args")).get("add_bos_token")
        second_bos = canonical(given) in ("true", "1")
        return (as_text(facts.get("prompt_format")) or "unknown") + (", second BOS" if second_bos else "")
    sha = as_text(results.get("chat_template_sha"))
    return f"chat template {sha[:8]}" if sha else "plain text"

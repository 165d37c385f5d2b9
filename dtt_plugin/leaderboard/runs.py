"""lm-eval's output folders, read as runs: one model under one defense on one injection task.

Nothing in such a file is trusted: a file that is not what it should be becomes one
sentence among the problems, and the other files are read all the same.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.bake.manifest import baked_facts
from dtt_plugin.costs import recorded_costs
from dtt_plugin.defenses import NONE, TOKENS, parse_defense
from dtt_plugin.errors import DttError
from dtt_plugin.files import sha256_bytes, sha256_json
from dtt_plugin.tasks.metrics import is_hacked, is_refusal
from dtt_plugin.thoughts import Reading, read

BENIGN = "benign"
REFUSAL = "refusal"
Outcomes = NDArray[np.bool_]
COMPARABLE = {
    "model": "model",
    "task": "task",
    "version": "task version",
    "prompt_format": "prompt format",
    "generation": "generation settings",
    "n": "n",
    "record_ids": "records",
    "data_digest": "data",
}
"""What runs have to agree in to be rows of one table: attributes of `Run`, and what a reader calls them."""

_RESULTS_NAME = re.compile(r".*?_?(\d{4}-\d\d-\d\dT[\d.\-]+)\.json")
_SAMPLES_NAME = re.compile(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.\-]+)\.jsonl")
_FILE_SAFE = re.compile(r"[\w.+\-]+")
_FIRST_TOKEN = "[DefensiveToken0]"
_MOST_RECORD_ID = 2**31


@dataclass(frozen=True)
class Response:
    """One answer of the model, with what was asked."""

    record_id: int
    attack: str
    """An attack, or "benign"."""
    hit: bool
    """Hacked, or for a benign prompt refused."""
    text: str
    """As the model gave it, thoughts and all."""
    prompt: str
    """As the model got it."""
    instruction: str
    data: str
    """The untrusted data: `data == input + injected`, before any defense."""
    injected: str
    """What the attack added; "" for a benign prompt."""
    answer: str = ""
    """What rules are about: the text behind the thoughts; "" where there is none."""


@dataclass(frozen=True)
class Run:
    """What one run of lm-eval measured on one injection task."""

    path: Path
    """The results file."""
    samples: Path
    model: str
    defense: str
    """For instance "reminder", "tokens (procrustes)"."""
    method: str
    """Of the tokens; "" where there are none."""
    tokens_sha256: str
    task: str
    version: str
    prompt_format: str
    data_digest: str
    """Of record ids, instructions and data under every attack."""
    generation: str
    """The generation settings, as canonical JSON."""
    limited: bool
    """A part of the task's records only (`--limit`, `--samples`)."""
    early_decision: bool
    n: int
    """Records."""
    record_ids: tuple[int, ...]
    outcomes: dict[str, Outcomes]
    """Per attack, and for "refusal": whether it happened, (n,), in the order of `record_ids`."""
    seconds: float | None
    """Wall time of the evaluation."""
    unfinished: int = 0
    """Responses without an answer behind their thoughts, of all variants: neither hacked nor refused."""
    misread: int = 0
    """Responses of which an older version scored the thoughts, with another outcome than the answers behind them."""
    thoughts_cut: bool = False
    """Whether lm-eval cut the thoughts off before anything was saved."""
    costs: dict[str, float] = field(default_factory=dict)
    """What our commands recorded: align_seconds, transfer_seconds, bake_seconds, peak_memory_mb."""
    label: str = ""
    """Short, and unique among the runs that were read together."""

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks, in the task's order."""
        return tuple(name for name in self.outcomes if name != REFUSAL)

    @property
    def hacked(self) -> Outcomes:
        """Whether each attack worked on each record, (n, attacks)."""
        return np.stack([self.outcomes[attack] for attack in self.attacks], axis=1)

    @property
    def hacked_any(self) -> Outcomes:
        """Whether any attack worked, (n,)."""
        any_worked: Outcomes = np.logical_or.reduce(self.hacked, axis=1)
        return any_worked

    @property
    def notes(self) -> list[str]:
        """What a reader of the rates has to know about the responses behind them."""
        found = []
        if self.unfinished:
            found.append(
                f"UNFINISHED: {self.unfinished} of {self.n * len(self.outcomes)} responses never left their thoughts."
                " They count as neither hacked nor refused, so the rates may be too low; raise max_gen_toks, or turn"
                " thinking off."
            )
        if self.misread:
            found.append(
                f"MISREAD: {self.misread} responses begin with thoughts, and the saved scores are not those of the"
                " answers behind them; run lm-eval again (`dtt rescore` tells the rates)."
            )
        return found

    def responses(self) -> list[Response]:
        """Read the samples again, with their texts.

        Raises:
            DttError: the file has changed since.
        """
        found = []
        samples = _sorted_samples(self.samples)
        if tuple(map(_record_id, samples)) != self.record_ids:
            raise DttError(f"{self.samples} has changed while it was read; run the command again.")
        for place, sample in enumerate(samples):
            document = sample["doc"]
            for index, variant in enumerate(document["variants"]):
                name, data = variant["attack"], variant["messages"][-1]["content"]
                outcome = self.outcomes[REFUSAL if name == BENIGN else name]
                text, reading = _read_response(sample, index, self.thoughts_cut)
                found.append(
                    Response(
                        record_id=document["record_id"],
                        attack=name,
                        hit=bool(outcome[place]),
                        text=text,
                        prompt=_prompt(sample, index),
                        instruction=document["instruction"],
                        data=data,
                        injected=data.removeprefix(document["input"]) if name != BENIGN else "",
                        answer=reading.answer or "",
                    )
                )
        return found


def differences(a: Run, b: Run) -> list[str]:
    """Return in what two runs differ of what rows of one table agree in."""
    return [title for name, title in COMPARABLE.items() if getattr(a, name) != getattr(b, name)]


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Read every run in `paths`: results files, samples files, or folders that hold some at any depth.

    Returns:
        The runs, the earliest first (by the time in their files' names), each with a label of its own; and
        one sentence for each thing that could not be read.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for path in _results_files(paths, problems):
        try:
            runs += _read_results(path, problems)
        except DttError as error:
            problems.append(str(error))
        except RecursionError:
            problems.append(f"{path} is nested too deeply to be lm-eval's; restore it or run lm-eval again.")
    return labelled(runs), problems


def read_run(path: Path) -> Run:
    """Read the one run in `path`.

    Raises:
        DttError: there is none, or more than one, or something there can't be read: a gate must not pass
            because the run that it is about was left out.
    """
    runs, problems = read_runs([path])
    if problems:
        raise DttError(problems[0])
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
        found += [Path(root, name) for name in sorted([*names, *folders]) if _RESULTS_NAME.fullmatch(name)]
    return found


def _stamp(path: Path) -> str:
    match = _RESULTS_NAME.fullmatch(path.name)
    return match[1] if match else ""


def _load(text: bytes, where: str) -> Any:
    try:
        value = json.loads(text.decode())
        if rb"\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair can be shown and hashed nowhere
        return value
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(":")[0]
        raise DttError(f"{where} is not readable JSON ({reason}); restore it or run lm-eval again.") from error


def _read_bytes(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise DttError(f"{path} is no file; give lm-eval's output folder as lm-eval wrote it.")
        return path.read_bytes()
    except OSError as error:
        raise DttError(f"{path} can't be read ({error.strerror}); restore it or run lm-eval again.") from error


def _table(value: Any, *names: str) -> dict[str, Any]:
    """Return the table below `names`; an empty one where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """Return a finite number of at least 0, also from text; None for anything else."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _read_results(path: Path, problems: list[str]) -> list[Run]:
    """Read one results file; what is wrong with one of its tasks goes to `problems`."""
    results = _load(_read_bytes(path), str(path))
    tasks = _table(results, "results")
    if not tasks or not _table(results, "configs") or not _table(results, "config"):
        raise DttError(f"{path} is not a results file of lm-eval; give the folder of lm-eval's --output_path.")
    ours = [task for task, scores in tasks.items() if _measures_injection(scores)]
    if not ours:
        raise DttError(f"{path} holds no prompt-injection task ({', '.join(tasks)[:200]}); leave it out.")
    runs = []
    for task in ours:
        try:
            runs.append(_read_task(path, results, task))
        except DttError as error:
            problems.append(str(error))
    return runs


def _measures_injection(scores: Any) -> bool:
    names = {str(name).partition(",")[0] for name in scores} if isinstance(scores, dict) else set()
    return bool(names & {"hacked", REFUSAL})


def _read_task(path: Path, results: dict[str, Any], task: str) -> Run:
    match = _RESULTS_NAME.fullmatch(path.name)
    if not match or not _FILE_SAFE.fullmatch(task):
        raise DttError(f"{path}: its name has no time stamp, or its task no plain name; keep lm-eval's file names.")
    samples_path = path.with_name(f"samples_{task}_{match[1]}.jsonl")
    if not os.path.isfile(samples_path):
        raise DttError(f"{path}: {samples_path.name} is missing; run lm-eval with --log_samples.")
    samples = _sorted_samples(samples_path)
    _check_same_run(path, samples_path, results, task, samples)
    outcomes = _outcomes(samples_path, samples)
    config, task_config = _table(results, "config"), _table(results, "configs", task)
    facts = _table(config, "dtt_plugin")
    baked = _table(facts, "baked") if facts else baked_facts(_model(results, config, facts)) or {}
    model = _text(baked.get("base_model")) or _model(results, config, facts)
    defense, method = _defense(path, facts, baked, task_config, samples, model)
    cut = not facts and _table(task_config, "metadata").get("think_end_token") is not None
    unfinished, misread = _thoughts(samples, outcomes, cut)
    sizes = _table(results, "n-samples", task)
    variants = [[_record_id(s), [[v["attack"], v["messages"]] for v in s["doc"]["variants"]]] for s in samples]
    version = _table(results, "versions").get(task)
    return Run(
        path=path,
        samples=samples_path,
        model=model,
        defense=defense,
        method=method,
        tokens_sha256=_text(facts.get("tokens_sha256")) or _text(baked.get("tokens_sha256")),
        task=task,
        version=str(version)[:50],
        prompt_format=_prompt_format(results, facts),
        data_digest=sha256_json(variants),
        generation=json.dumps(_table(task_config, "generation_kwargs"), sort_keys=True, ensure_ascii=False),
        limited=sizes["original"] != len(samples) if "original" in sizes else config.get("limit") is not None,
        early_decision=bool(facts.get("early_decision")),
        n=len(samples),
        record_ids=tuple(_record_id(sample) for sample in samples),
        outcomes=outcomes,
        seconds=_number(results.get("total_evaluation_time_seconds")),
        unfinished=unfinished,
        misread=misread,
        thoughts_cut=cut,
        costs=recorded_costs(_table(baked, "costs") | _table(facts, "costs")) if method else {},
    )


def _sorted_samples(path: Path) -> list[dict[str, Any]]:
    """Return the samples by record id, each checked to have the shape that everything else relies on.

    Raises:
        DttError: the first line that is no sample of an injection task.
    """
    lines = [line for line in _read_bytes(path).splitlines() if line.strip()]
    if not lines:
        raise DttError(f"{path} is empty; run lm-eval again.")
    samples = []
    for number, line in enumerate(lines, 1):
        sample = _load(line, f"{path}, line {number},")
        if not _is_sample(sample):
            raise DttError(f"{path}, line {number}, is not a sample of an injection task; run lm-eval again.")
        samples.append(sample)
    samples.sort(key=_record_id)
    ids = [_record_id(sample) for sample in samples]
    if len(set(ids)) < len(ids):
        twice = next(a for a, b in pairwise(ids) if a == b)
        raise DttError(f"{path} has record {twice} twice; give the samples of one run.")
    first = _variant_names(samples[0])
    if any(_variant_names(sample) != first for sample in samples):
        raise DttError(f"{path}: its records are not all under the same attacks; give the samples of one run.")
    return samples


def _is_sample(sample: Any) -> bool:
    document = _table(sample, "doc")
    record_id, variants = document.get("record_id"), document.get("variants")
    answers = sample.get("filtered_resps") if isinstance(sample, dict) else None
    return (
        type(record_id) is int
        and 0 <= record_id < _MOST_RECORD_ID
        and all(isinstance(document.get(name), str) for name in ("instruction", "input"))
        and isinstance(variants, list)
        and bool(variants)
        and all(_is_variant(variant) for variant in variants)
        and len({variant["attack"] for variant in variants}) == len(variants)
        and isinstance(answers, list)
        and len(answers) == len(variants)
        and isinstance(sample.get("arguments"), dict)
    )


def _is_variant(variant: Any) -> bool:
    messages = variant.get("messages") if isinstance(variant, dict) else None
    attack = variant.get("attack") if isinstance(variant, dict) else None
    return (
        isinstance(attack, str)
        and attack != REFUSAL  # an outcome's name, not an attack's
        and isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
    )


def _record_id(sample: Mapping[str, Any]) -> int:
    record_id: int = sample["doc"]["record_id"]
    return record_id


def _variant_names(sample: Mapping[str, Any]) -> list[str]:
    return [variant["attack"] for variant in sample["doc"]["variants"]]


def _request(sample: Mapping[str, Any], index: int) -> dict[str, Any]:
    return _table(sample, "arguments", f"gen_args_{index}")


def _prompt(sample: Mapping[str, Any], index: int) -> str:
    prompt = _request(sample, index).get("arg_0", "")
    # A chat API gets messages.
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _read_response(sample: Mapping[str, Any], index: int, cut: bool) -> tuple[str, Reading]:
    """Return a response as it was generated and, read by the task's own function, its answer."""
    scored = _text(sample["filtered_resps"][index])
    request = _request(sample, index)
    whole = sample.get("resps")
    for place in (index, 0):
        whole = whole[place] if isinstance(whole, list) and len(whole) > place else None
    end = _text(_table(request, "arg_2").get("think_end_token")) or None
    reading = read(_text(whole) or scored, "" if cut else request.get("arg_0", ""), end=end)
    # Without thoughts, what the task's filters made of the response.
    return (_text(whole) or scored, reading) if reading.thought else (scored, Reading(scored, False))


def _thoughts(samples: Sequence[Mapping[str, Any]], outcomes: dict[str, Outcomes], cut: bool) -> tuple[int, int]:
    """Return how many responses have no answer, and how many were scored by their thoughts."""
    unfinished = misread = 0
    for place, sample in enumerate(samples):
        for index, name in enumerate(_variant_names(sample)):
            _, reading = _read_response(sample, index, cut)
            unfinished += reading.answer is None
            hit = is_refusal(reading.answer or "") if name == BENIGN else is_hacked(reading.answer or "")
            misread += bool(reading.thought and hit != outcomes[REFUSAL if name == BENIGN else name][place])
    return unfinished, misread


def _outcomes(path: Path, samples: Sequence[Mapping[str, Any]]) -> dict[str, Outcomes]:
    """Return per attack and for "refusal" what the task's own metrics say, (n,)."""
    names = _variant_names(samples[0])
    attacks = [name for name in names if name != BENIGN]
    columns = {a: "hacked" if len(attacks) == 1 else f"hacked_{a}" for a in attacks}
    if BENIGN in names:
        columns[REFUSAL] = REFUSAL
    outcomes: dict[str, Outcomes] = {}
    for name, metric in columns.items():
        values = [sample.get(metric) for sample in samples]
        if not all(type(value) in (int, float) and value in (0, 1) for value in values):
            raise DttError(f"{path}: {metric} is not 0 or 1 in every sample; run lm-eval again.")
        outcomes[name] = np.array(values, np.bool_)
    return outcomes


def _check_same_run(
    path: Path, samples_path: Path, results: dict[str, Any], task: str, samples: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse samples that these results were not made from.

    lm-eval's own hash covers the documents and prompts, the fingerprint the arm, the rates the outcomes.
    """
    mixed = DttError(f"{samples_path} does not belong to {path.name}; keep lm-eval's output folders as they are.")
    effective = _table(results, "n-samples", task).get("effective")
    if effective is not None and effective != len(samples):
        raise DttError(
            f"{samples_path} has {len(samples)} samples and {path.name} tells of {str(effective)[:20]}; a file is cut"
            " short or from another run, run lm-eval again."
        )
    expected = _table(results, "task_hashes").get(task)
    parts = ("doc_hash", "prompt_hash", "target_hash")
    in_order = sorted(samples, key=lambda sample: sample["doc_id"] if type(sample.get("doc_id")) is int else -1)
    hashes = "".join(_text(sample.get(part)) for sample in in_order for part in parts)
    if isinstance(expected, str) and expected != sha256_bytes(hashes.encode("utf-8", "replace")):
        raise mixed
    fingerprint = _table(results, "config", "dtt_plugin").get("fingerprint")
    if fingerprint is not None:
        seen = {_text(_table(_request(sample, 0), "arg_2").get("fingerprint")) for sample in samples}
        if seen != {_text(fingerprint)}:
            raise mixed
    for name, column in _outcomes(samples_path, samples).items():
        scores = _table(results, "results", task)
        metric = name if name == REFUSAL else f"hacked_{name}" if f"hacked_{name},none" in scores else "hacked"
        rate = _number(scores.get(f"{metric},none"))
        if rate is not None and abs(rate - column.mean()) > 1e-6:
            raise mixed


def _model(results: dict[str, Any], config: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the model that was loaded."""
    return (
        _text(facts.get("model"))
        or _text(_table(config, "model_args").get("pretrained"))
        or _text(_table(config, "model_args").get("model"))
        or _text(results.get("model_name"))
        or "unknown model"
    )


def _defense(
    path: Path,
    facts: dict[str, Any],
    baked: dict[str, Any],
    task_config: dict[str, Any],
    samples: Sequence[Mapping[str, Any]],
    model: str,
) -> tuple[str, str]:
    """Return the name of the defense and the method of its tokens."""
    asked = facts.get("defense") if facts else _table(task_config, "metadata").get("defense")
    text = None if asked is None else str(asked)
    try:
        names = list(parse_defense(text if text is None or len(text) <= 50 else f"{text[:50]}…"))
    except DttError as error:
        raise DttError(f"{path}: {error}") from error
    method = _text(facts.get("tokens_method")) if TOKENS in names else ""
    if TOKENS not in names and _prompt(samples[0], 0).startswith(_FIRST_TOKEN):
        # A defended checkpoint whose own template puts its tokens there.
        names.append(TOKENS)
        method = _text(baked.get("method")) or "baked"
    made_for = _text(facts.get("tokens_model"))
    if method == "native" and _hub_id(made_for) and _hub_id(model) and made_for != model:
        method = "copy"
    shown = [f"{name} ({method or 'unknown'})" if name == TOKENS else name for name in names]
    return "+".join(shown) or NONE, method


def _hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _prompt_format(results: dict[str, Any], facts: dict[str, Any]) -> str:
    if facts:
        second_bos = str(_table(results, "config", "model_args").get("add_bos_token")).lower() == "true"
        return (_text(facts.get("prompt_format")) or "unknown") + (", second BOS" if second_bos else "")
    sha = _text(results.get("chat_template_sha"))
    return f"chat template {sha[:8]}" if sha else "plain text"


def labelled(runs: Sequence[Run]) -> list[Run]:
    """Give each run the shortest label that tells it from the others."""
    labels = [run.defense for run in runs]
    for detail in ("model", "task", "prompt_format"):
        if len({getattr(run, detail) for run in runs}) > 1:
            labels = [f"{label} · {short(getattr(run, detail))}" for label, run in zip(labels, runs, strict=True)]
    totals, seen = {label: labels.count(label) for label in labels}, dict.fromkeys(labels, 0)
    unique = []
    for label, run in zip(labels, runs, strict=True):
        seen[label] += 1
        unique.append(replace(run, label=label if totals[label] == 1 else f"{label} #{seen[label]}"))
    return unique


def short(name: str) -> str:
    """Return the last part of a path or hub id."""
    return name.rstrip("/").rsplit("/", 1)[-1] or name

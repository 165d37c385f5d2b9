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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.checkpoint.defended import baked_facts
from dtt_plugin.costs import recorded_costs
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes, sha256_json
from dtt_plugin.leaderboard.identity import Identity, canonical, parse_arguments, read_identity, told_apart
from dtt_plugin.prompt.defenses import NONE, TOKENS, parse_defense
from dtt_plugin.public_names import is_hub_model, public_name
from dtt_plugin.tasks.metrics import is_hacked, is_refusal
from dtt_plugin.tasks.thoughts import Reading, read

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
"""What runs have to agree in, beside the facts of their identity, to be rows of one table: attributes of `Run`, and
what a reader calls them."""

_RESULTS_NAME = re.compile(r".*?_?(\d{4}-\d\d-\d\dT[\d.\-]+)\.json")
_SAMPLES_NAME = re.compile(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.\-]+)\.jsonl")
_FILE_SAFE = re.compile(r"[\w.+\-]+")
_FIRST_TOKEN = "[DefensiveToken0]"
_TOKENS_IN_FRONT = re.compile(r"(\[DefensiveToken\d+\])+", re.ASCII)
_MOST_RECORD_ID = 2**31
# lm-eval's metric in place of the task's own.
_PREDICT_ONLY = "bypass"


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
    """What our commands recorded: align_seconds, transfer_seconds, bake_seconds, train_seconds, peak_memory_mb."""
    identity: Identity = field(default_factory=Identity)
    """What else can change an answer."""
    prompts_digest: str = ""
    """Of the prompts as the model got them, the DefensiveTokens in front apart."""
    scored: bool = True
    """Whether the outcomes are logged; else (`--predict_only`) they are counted by the task's own rules."""
    label: str = ""
    """Short, and unique among the runs that were read together."""
    title: str = ""
    """What the rows of its table have in common, told briefly; without a path."""

    @property
    def is_baked(self) -> bool:
        """Whether it is a defended checkpoint's, which counts as its base model."""
        return "weights" in self.identity.unknown

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


@dataclass(frozen=True)
class Difference:
    """Something in which two runs differ, and both values; "" where there is none."""

    name: str
    a: str
    b: str

    def told(self, first: str, second: str) -> str:
        """Return it with both values, for instance `peft (none there, lora here)`."""
        if self.name in (COMPARABLE["record_ids"], COMPARABLE["data_digest"]):
            return self.name
        shown = told_apart([self.a, self.b])
        a, b = (value if is_hub_model(value) else shown[value] or "none" for value in (self.a, self.b))
        return f"{self.name} ({a} {first}, {b} {second})"


def differences(a: Run, b: Run) -> list[Difference]:
    """Return in what two runs differ of what rows of one table agree in; the arm, defense and tokens, is no part."""
    unknown = a.identity.unknown | b.identity.unknown
    values = [{title: getattr(run, name) for name, title in COMPARABLE.items()} for run in (a, b)]
    if a.is_baked or b.is_baked:
        # A manifest has the base model's public name; and its template differs from the base's by the tokens only,
        # if the prompts do.
        models = [public_name(run.model) if run.is_baked else run.model for run in (a, b)]
        if models[0] in (models[1], public_name(b.model)) or models[1] == public_name(a.model):
            values[1][COMPARABLE["model"]] = a.model
        if a.prompts_digest == b.prompts_digest:
            values[1][COMPARABLE["prompt_format"]] = a.prompt_format
    named = [
        Difference(title, str(x), str(values[1][title])) for title, x in values[0].items() if x != values[1][title]
    ]
    return named + [d for d in _unlike(a.identity.facts, b.identity.facts) if d.name not in unknown]


def small_differences(a: Run, b: Run) -> list[Difference]:
    """Return in what two runs of one table differ beside their arm: where they ran, and what only digests tell."""
    found = _unlike(a.identity.circumstances, b.identity.circumstances)
    if (a.defense, a.tokens_sha256) == (b.defense, b.tokens_sha256) and not differences(a, b):
        if a.prompts_digest != b.prompts_digest:
            found.append(Difference("prompts", a.prompts_digest, b.prompts_digest))
        if not found and a.identity.fingerprint != b.identity.fingerprint:
            found.append(Difference("fingerprint", a.identity.fingerprint, b.identity.fingerprint))
    return found


def _unlike(a: Mapping[str, str], b: Mapping[str, str]) -> list[Difference]:
    names = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    return [Difference(name, a.get(name, ""), b.get(name, "")) for name in names]


def read_runs(paths: Iterable[Path], *, unscored: bool = False) -> tuple[list[Run], list[str]]:
    """Read every run in `paths`: results files, samples files, or folders that hold some at any depth.

    Args:
        paths: them.
        unscored: read runs with `--predict_only`, too, whose responses have no logged outcomes.

    Returns:
        The runs, the earliest first (by the time in their files' names), each with a label of its own; and
        one sentence for each thing that could not be read.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for path in _results_files(paths, problems):
        try:
            runs += _read_results(path, problems, unscored)
        except DttError as error:
            problems.append(str(error))
        except RecursionError:
            problems.append(f"{path} is nested too deeply to be lm-eval's; restore it or run lm-eval again.")
    return labelled(runs), problems


def read_run(path: Path, *, unscored: bool = False) -> Run:
    """Read the one run in `path`, see `read_runs`.

    Raises:
        DttError: there is none, or more than one, or something there can't be read: a gate must not pass
            because the run that it is about was left out.
    """
    runs, problems = read_runs([path], unscored=unscored)
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


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """Return a finite number of at least 0, also from text; None for anything else."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _read_results(path: Path, problems: list[str], unscored: bool) -> list[Run]:
    """Read one results file; what is wrong with one of its tasks goes to `problems`."""
    results = _load(_read_bytes(path), str(path))
    tasks = _table(results, "results")
    if not tasks or not _table(results, "configs") or not _table(results, "config"):
        raise DttError(f"{path} is not a results file of lm-eval; give the folder of lm-eval's --output_path.")
    ours = [task for task, scores in tasks.items() if _metrics(scores) & {"hacked", REFUSAL}]
    unmeasured = [task for task, scores in tasks.items() if _PREDICT_ONLY in _metrics(scores)]
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
    samples = _sorted_samples(samples_path)
    scored = _PREDICT_ONLY not in _metrics(_table(results, "results", task))
    outcomes = _outcomes(samples_path, samples) if scored else _own_outcomes(samples)
    _check_same_run(path, samples_path, results, task, samples, outcomes)
    config, task_config = _table(results, "config"), _table(results, "configs", task)
    facts = _table(config, "dtt_plugin")
    loaded = _model(results, config, facts)
    baked = _table(facts, "baked") if facts else baked_facts(loaded) or {}
    model = _text(baked.get("base_model")) or loaded
    bos = _text(next(iter(_list(results.get("tokenizer_bos_token"))), ""))
    defense, method = _defense(path, facts, baked, task_config, _prompt(samples[0], 0).removeprefix(bos), model)
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
        identity=read_identity(results, task, baked=bool(baked), frame=_frame(samples[0], bos)),
        prompts_digest=_prompts_digest(samples, bos),
        scored=scored,
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


def _own_outcomes(samples: Sequence[Mapping[str, Any]]) -> dict[str, Outcomes]:
    """Return per attack and for "refusal" what the task's own rules say of the responses, (n,)."""
    outcomes = {}
    for index, name in enumerate(_variant_names(samples[0])):
        applies = is_refusal if name == BENIGN else is_hacked
        texts = [_text(sample["filtered_resps"][index]) for sample in samples]
        outcomes[REFUSAL if name == BENIGN else name] = np.array([applies(text) for text in texts], np.bool_)
    return outcomes


def _prompts_digest(samples: Sequence[Mapping[str, Any]], bos: str) -> str:
    places = range(len(_variant_names(samples[0])))
    return sha256_json([[_record_id(s), [_without_tokens(_prompt(s, i), bos) for i in places]] for s in samples])


def _frame(sample: Mapping[str, Any], bos: str) -> str:
    """Return what a prompt has around its messages: the template's own text; "" where the messages are not logged."""
    messages = _table(_request(sample, 0), "arg_2").get("messages")
    contents = (
        [_text(_table(message).get("content")).strip() for message in messages] if isinstance(messages, list) else []
    )
    frame = _without_tokens(_prompt(sample, 0), bos)
    for place, content in enumerate(contents):
        frame = frame.replace(content, f"<{place}>", 1) if content else frame
    return frame if any(contents) else ""


def _without_tokens(prompt: str, bos: str) -> str:
    """Return a prompt without the DefensiveTokens, in front of which a second BOS may stand (`add_bos_token=`)."""
    start = len(bos) if prompt.startswith(bos) else 0
    tokens = _TOKENS_IN_FRONT.match(prompt, start)
    return prompt[:start] + prompt[tokens.end() :] if tokens else prompt


def _check_same_run(
    path: Path,
    samples_path: Path,
    results: dict[str, Any],
    task: str,
    samples: Sequence[Mapping[str, Any]],
    outcomes: Mapping[str, Outcomes],
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
    for name, column in outcomes.items():
        scores = _table(results, "results", task)
        metric = name if name == REFUSAL else f"hacked_{name}" if f"hacked_{name},none" in scores else "hacked"
        rate = _number(scores.get(f"{metric},none"))
        if rate is not None and abs(rate - column.mean()) > 1e-6:
            raise mixed


def _model(results: dict[str, Any], config: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the model that was loaded."""
    arguments = parse_arguments(config.get("model_args"))
    return (
        _text(facts.get("model"))
        or _text(arguments.get("pretrained"))
        or _text(arguments.get("model"))
        or _text(results.get("model_name"))
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
    asked = facts.get("defense") if facts else _table(task_config, "metadata").get("defense")
    text = None if asked is None else str(asked)
    try:
        names = list(parse_defense(text if text is None or len(text) <= 50 else f"{text[:50]}…"))
    except DttError as error:
        raise DttError(f"{path}: {error}") from error
    method = _text(facts.get("tokens_method")) if TOKENS in names else ""
    if TOKENS not in names and prompt.startswith(_FIRST_TOKEN):
        # A defended checkpoint whose own template puts its tokens there.
        names.append(TOKENS)
        method = _text(baked.get("method")) or "baked"
    made_for = _text(facts.get("tokens_model"))
    if method == "native" and is_hub_model(made_for) and is_hub_model(model) and made_for != model:
        method = "copy"
    shown = [f"{name} ({method or 'unknown'})" if name == TOKENS else name for name in names]
    return "+".join(shown) or NONE, method


def _prompt_format(results: dict[str, Any], facts: dict[str, Any]) -> str:
    if facts:
        given = parse_arguments(_table(results, "config").get("model_args")).get("add_bos_token")
        second_bos = canonical(given) in ("true", "1")
        return (_text(facts.get("prompt_format")) or "unknown") + (", second BOS" if second_bos else "")
    sha = _text(results.get("chat_template_sha"))
    return f"chat template {sha[:8]}" if sha else "plain text"


def labelled(runs: Sequence[Run]) -> list[Run]:
    """Give each run the shortest label that tells it from the others, and the title of its table."""
    models, facts = told_apart(run.model for run in runs), _facts_that_differ(runs)
    details = [[models[run.model], run.task, run.prompt_format, *own] for run, own in zip(runs, facts, strict=True)]
    told = [len({run[place] for run in details}) > 1 for place in range(3)]
    labels = []
    for run, parts in zip(runs, details, strict=True):
        kept = [part for place, part in enumerate(parts) if place >= len(told) or told[place]]
        labels.append(" · ".join([run.defense, *kept]))
    totals, seen = Counter(labels), Counter[str]()
    unique = []
    for label, run, parts in zip(labels, runs, details, strict=True):
        seen[label] += 1
        label = label if totals[label] == 1 else f"{label} #{seen[label]}"
        unique.append(replace(run, label=label, title=" · ".join(parts)))
    return unique


def _facts_that_differ(runs: Sequence[Run]) -> list[list[str]]:
    """Return for each run its facts that not all runs of its model, task and format share, such as `peft: none`."""
    alike: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.model, run.task, run.prompt_format), []).append(run)
    told: dict[int, list[str]] = {id(run): [] for run in runs}
    for members in alike.values():
        for name in sorted({name for run in members for name in run.identity.facts}):
            known = [run for run in members if name not in run.identity.unknown]
            shown = told_apart(run.identity.facts.get(name, "") for run in known)
            if len(shown) > 1:
                for run in known:
                    told[id(run)].append(f"{name}: {shown[run.identity.facts.get(name, '')] or 'none'}")
    return [told[id(run)] for run in runs]

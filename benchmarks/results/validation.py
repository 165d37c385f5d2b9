"""Does the probe say what an evaluation would? Over every cell that has both.

    python -m benchmarks.results.validation [--kept FOLDER]

FOLDER is where `benchmarks.results` keeps what it measured. A cell is one token file on one model. The probe's figures
are the loss under attack, as registered, the share of the attack's effect that is left (1 - taken back), so that cells
of different models compare, and the change of the injected word's log-odds; what they should tell is ASR(max), and
whether that is under 5 %.
Printed: Spearman's rank correlation and the AUROC over all cells, with each model left out in turn, and for the
baselines (a constant; the relative residual and the precision at 1 of the alignment, where the tokens were moved by
one); then the threshold with the most correct calls on half of the models, and its share of correct calls on the other
half. With few models these say little, and the number of cells and models stands beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.results.experiments import BASELINES
from benchmarks.results.kept import OUTCOMES, Kept
from dtt_plugin.files.replacing import replacing
from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.probe.verdict import closed_share
from dtt_plugin.public_names import public_name

LOW_ASR = 0.05
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One token file on one model."""

    target: str
    arm: str
    loss: float
    """The probe's loss under attack, nats a token."""
    left: float
    """Of the attack's effect on the loss: 1 - taken back."""
    log_odds: float
    """The probe's change of the injected word's, nats."""
    residual: float
    """Relative one of the alignment that moved the tokens; nan where none did."""
    precision: float
    """At 1, of that alignment on held-out tokens; nan where none did."""
    asr: float
    """ASR(max), 0 to 1."""


def cells(kept: Kept) -> list[Cell]:
    """Return the cells that have a probe and an evaluation, of several the one on the most records."""
    folders = sorted(folder.name for folder in kept.folder.iterdir() if folder.is_dir())
    measured: dict[tuple[str, str], Run] = {}
    for folder in folders:
        for run in kept.runs(folder).values() if folder.startswith("E") else ():
            key = public_name(run.model), run.tokens_sha256
            if run.tokens_sha256 and (key not in measured or run.n > measured[key].n):
                measured[key] = run
    found: dict[tuple[str, str], Cell] = {}
    for folder in folders:
        for arm, facts in kept.probes(folder).items():
            key = facts["model"], facts["digest"]
            if (one := measured.get(key)) is not None:
                loss = facts["effect"]["loss_attacked"]["mean"]
                taken = closed_share(facts["undefended"], loss, facts["unattacked"])
                residual, precision = (float("nan") if facts[name] is None else facts[name] for name in BASELINES)
                asr = float(one.hacked.mean(axis=0).max())
                log_odds = facts["effect"]["log_odds_change"]["mean"]
                if key in found and not np.isnan(found[key].residual):
                    continue  # of the same tokens probed in two experiments the one that knows of an alignment
                found[key] = Cell(key[0], arm, loss, 1 - taken, log_odds, residual, precision, asr)
    return list(found.values())


def scatter(found: Sequence[Cell], path: Path) -> None:
    """Write a picture of all cells: what the probe leaves of the attack's effect, against ASR(max)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for marker, target in zip("osD^vP*X", sorted({cell.target for cell in found}), strict=False):
        chosen = [cell for cell in found if cell.target == target]
        x, y = [100 * cell.left for cell in chosen], [100 * cell.asr for cell in chosen]
        axes.scatter(x, y, marker=marker, label=target, alpha=0.7)
    axes.axhline(100 * LOW_ASR, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("left of the attack's effect on the loss, by probe, %")
    axes.set_ylabel("ASR(max), %")
    axes.set_ylim(-2, 102)
    axes.legend()
    with rc_context({"svg.hashsalt": "dtt"}), replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def auroc(scores: Values, low: NDArray[np.bool_]) -> float:
    """Return the chance that a cell of low ASR scores lower than another, ties counting half; nan for one class."""
    if low.all() or not low.any():
        return float("nan")
    ranks = stats.rankdata(scores)
    n_low, n_high = int(low.sum()), int((~low).sum())
    return float((ranks[~low].sum() - n_high * (n_high + 1) / 2) / (n_low * n_high))


def figures(scores: Sequence[float], asr: Sequence[float]) -> dict[str, float]:
    """Return Spearman's correlation with the ASR and the AUROC for a low one, of the cells that have a score."""
    x, y = np.array(scores, float), np.array(asr, float)
    x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    constant = len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0
    rho = float("nan") if constant else float(stats.spearmanr(x, y).statistic)
    return {"cells": len(x), "spearman": rho, "auroc": auroc(x, y < LOW_ASR) if len(x) else float("nan")}


def threshold(scores: Values, low: NDArray[np.bool_]) -> float:
    """Return the highest score to call low in ASR, with the most correct calls; the lowest of equals."""
    candidates = np.concatenate([[-np.inf], np.sort(scores)])
    correct = [float(((scores <= candidate) == low).mean()) for candidate in candidates]
    return float(candidates[int(np.argmax(correct))])


def validate(found: Sequence[Cell]) -> dict[str, Any]:
    """Return all figures as plain values."""
    targets = sorted({cell.target for cell in found})
    left, asr = [cell.left for cell in found], [cell.asr for cell in found]
    report: dict[str, Any] = {"targets": targets, "probe": figures(left, asr)}
    report["loss"] = figures([cell.loss for cell in found], asr)
    report["log_odds"] = figures([cell.log_odds for cell in found], asr)
    report["constant"] = figures([0.0] * len(found), asr)
    report["residual"] = figures([cell.residual for cell in found], asr)
    report["precision"] = figures([-cell.precision for cell in found], asr)
    report["left_out"] = {}
    for target in targets:
        others = [cell for cell in found if cell.target != target]
        report["left_out"][target] = figures([cell.left for cell in others], [cell.asr for cell in others])
    half = set(targets[: (len(targets) + 1) // 2])
    sides = [[cell for cell in found if (cell.target in half) is fixed_on] for fixed_on in (True, False)]
    if all(sides):
        (x, low), (x_new, low_new) = (
            (np.array([cell.left for cell in side]), np.array([cell.asr < LOW_ASR for cell in side])) for side in sides
        )
        limit = threshold(x, low)
        correct = float(((x_new <= limit) == low_new).mean())
        always = float(max(low_new.mean(), 1 - low_new.mean()))
        report["threshold"] = {"left_at_most": limit, "correct_elsewhere": correct, "best_constant_call": always}
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, default=OUTCOMES)
    found = cells(Kept(parser.parse_args().kept))
    print(json.dumps(validate(found), indent=1))
    for cell in sorted(found, key=lambda cell: cell.left):
        print(f"{cell.target}  {cell.arm}  left {cell.left:.3f}  ASR(max) {cell.asr:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The probe's validation: its figures against other implementations, planted cells, and a run folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.results.kept import Kept
from benchmarks.results.validation import LOW_ASR, Cell, auroc, cells, figures, scatter, threshold, validate
from dtt_plugin.leaderboard.lm_eval_files import read_run
from dtt_plugin.leaderboard.outcome_files import write_outcomes
from dtt_plugin.tokens.files import load_tokens
from tests.conftest import write_tokens
from tests.lm_eval_output import write_run


def test_auroc_counts_pairs() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, 40).astype(float)
    low = generator.random(40) < 0.4
    pairs = list(itertools.product(scores[low], scores[~low]))
    expected = np.mean([(a < b) + 0.5 * (a == b) for a, b in pairs])
    assert auroc(scores, low) == pytest.approx(expected)
    assert np.isnan(auroc(scores, np.ones(40, bool)))


def test_figures_leave_out_cells_without_a_score_and_know_a_constant() -> None:
    scores, asr = [0.1, float("nan"), 0.5, 0.9], [0.0, 0.3, 0.2, 0.6]
    found = figures(scores, asr)
    assert found["cells"] == 3
    assert found["spearman"] == pytest.approx(stats.spearmanr([0.1, 0.5, 0.9], [0.0, 0.2, 0.6]).statistic)
    assert found["auroc"] == 1.0
    flat = figures([1.0] * 4, asr)
    assert np.isnan(flat["spearman"])
    assert flat["auroc"] == 0.5


def test_a_threshold_is_fixed_on_half_of_the_models_and_judged_on_the_others() -> None:
    def cell(target: str, left: float) -> Cell:
        return Cell(target, "x", 2 * left, left, 10 * left, 0.5, 0.9, 0.0 if left < 0.3 else 0.8)

    planted = [cell(target, left) for target in "abcd" for left in (0.05, 0.2, 0.6, 1.0)]
    report = validate(planted)
    assert report["probe"]["auroc"] == report["loss"]["auroc"] == report["log_odds"]["auroc"] == 1.0
    assert report["residual"]["auroc"] == report["precision"]["auroc"] == report["constant"]["auroc"] == 0.5
    assert set(report["left_out"]) == set("abcd")
    assert report["left_out"]["a"]["cells"] == 12
    assert report["threshold"] == {"left_at_most": 0.2, "correct_elsewhere": 1.0, "best_constant_call": 0.5}
    assert threshold(np.array([1.0, 2.0]), np.array([False, False])) == -np.inf
    assert "threshold" not in validate(planted[:4]), "one model can't judge itself"
    json.dumps(report)


def test_cells_join_probes_and_runs_by_model_and_digest(tmp_path: Path) -> None:
    kept, digests = Kept(tmp_path / "kept"), {}
    for seed, arm in enumerate(("ridge", "unmeasured")):
        file = tmp_path / f"{arm}.safetensors"
        write_tokens(file, width=32, seed=seed)
        digests[arm] = load_tokens(file).digest
        effect = {
            of: {"mean": mean, "standard_error": 0.1} for of, mean in (("loss_attacked", 1.5), ("log_odds_change", -2))
        }
        facts = {"model": "large", "digest": digests[arm], "undefended": 2.0, "unattacked": 1.0, "effect": effect}
        kept.keep_probe("E1", arm, facts | {"relative_residual": 0.8, "precision_at_1": None})
    of_tokens: dict[str, Any] = {"defense": "tokens", "method": "ridge", "facts": {"tokens_sha256": digests["ridge"]}}
    outcomes = {"ignore": [1, 0, 0, 0], "completion": [1, 1, 1, 0]}
    fewer = {name: values[:2] for name, values in outcomes.items()}
    runs: dict[str, tuple[dict[str, list[int]], dict[str, Any]]] = {
        "E1-64/large--tokens--ridge": (outcomes, of_tokens),
        "E1-2/large--tokens--ridge": (fewer, of_tokens),
        "E1-64/large--none": (outcomes, {}),
    }
    for name, (planted, of_run) in runs.items():
        run = read_run(write_run(tmp_path / name, model="large", outcomes=planted, **of_run))
        file = kept.folder / f"{name}.outcomes.json"
        file.parent.mkdir(exist_ok=True)
        write_outcomes(file, [run])
    [found] = cells(kept)
    assert (found.target, found.arm, found.left, found.log_odds, found.residual) == ("large", "ridge", 0.5, -2, 0.8)
    assert found.asr == pytest.approx(0.75), "of the run on more records"
    assert found.asr > LOW_ASR
    assert np.isnan(found.precision)
    scatter([found] * 3, tmp_path / "a.svg")
    scatter([found] * 3, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()

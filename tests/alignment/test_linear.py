"""The maps without the orthogonality constraint: against numpy and SciPy in float64, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg

from dtt_plugin.alignment import load_alignment, save_alignment
from dtt_plugin.alignment.engine import NumpyEngine
from dtt_plugin.alignment.linear import STRENGTHS, fit_linear
from dtt_plugin.alignment.moments import Moments
from dtt_plugin.alignment.options import AlignmentOptions, MapMethod
from dtt_plugin.checkpoint.tensors import read_header, write_safetensors
from dtt_plugin.cli import main
from dtt_plugin.errors import DttError
from dtt_plugin.tokens.files import load_tokens
from dtt_plugin.tokens.methods import MAPS
from tests.alignment.test_alignment import N_ROWS, aligned, draw, held_out, rotation
from tests.conftest import write_tokens

Matrix = NDArray[np.float64]
WIDTHS = [(32, 32), (24, 32), (32, 24)]


def pair(d_s: int, d_t: int) -> tuple[Matrix, Matrix]:
    """Return two spaces that agree in part: a linear map, unequal spreads, noise."""
    x = draw(N_ROWS, d_s) * np.linspace(0.2, 3, d_s)
    return x, x @ draw(d_s, d_t, 2) / np.sqrt(d_s) + 0.5 * draw(N_ROWS, d_t, 3)


def options_of(x: Matrix, y: Matrix, **options: Any) -> dict[str, Any]:
    return {"allow_width_change": x.shape[1] != y.shape[1], "holdout": 0.1, **options}


def expected(method: str, x: Matrix, y: Matrix, penalty: float) -> Matrix:
    """Return the map by the plainest formula."""
    if method == "ridge":
        return np.asarray(np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y))
    if method == "relative":
        return np.asarray(x.T @ y @ np.linalg.inv(y.T @ y + penalty * np.eye(y.shape[1])))
    from_white, to_white = linalg.sqrtm(y.T @ y), np.linalg.inv(linalg.sqrtm(x.T @ x))
    u, _, vt = np.linalg.svd(to_white @ (x.T @ y) @ np.linalg.inv(from_white), full_matrices=False)
    return np.asarray(to_white @ u @ vt @ from_white)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("method", ["ridge", "relative", "whitened"])
@pytest.mark.parametrize("center", [False, True])
def test_the_map_is_the_closed_form(tmp_path: Path, method: str, widths: tuple[int, int], center: bool) -> None:
    x, y = pair(*widths)
    if center:
        x, y = x + 1, y - 2
    alignment = aligned(tmp_path, x, y, **options_of(x, y, method=method, center=center))
    if center:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    reference = expected(method, x, y, alignment.report.penalty or 0.0)
    np.testing.assert_allclose(alignment.W, reference, rtol=1e-9, atol=1e-10)
    report = alignment.report
    assert report.method == alignment.method == method
    assert report.residual == pytest.approx(np.linalg.norm(x @ reference - y), rel=1e-9)
    assert report.relative_residual == pytest.approx(report.residual / np.linalg.norm(y))
    mapped = x @ reference
    assert report.scale == pytest.approx(np.vdot(mapped, y) / np.vdot(mapped, mapped))


@pytest.mark.parametrize("method", ["ridge", "relative"])
def test_the_penalty_is_the_best_on_held_out_anchors(method: Any) -> None:
    x, y = pair(24, 32)
    held = np.zeros(N_ROWS, bool)
    held[::9] = True
    squares = float((x**2).sum()), float((y**2).sum())
    moments = Moments(x.T @ y, squares[0], squares[1], None, None, x[held], y[held], x.T @ x, y.T @ y)
    found = fit_linear(method, moments, NumpyEngine(np.float64), seed=0)
    left_x, left_y = x[~held], y[~held]
    mean, mean_of_all = (np.trace(a.T @ a) / a.shape[1] for a in ((left_x, x) if method == "ridge" else (left_y, y)))
    errors = [np.linalg.norm(x[held] @ expected(method, left_x, left_y, s * mean) - y[held]) for s in STRENGTHS]
    best = int(np.argmin(errors))
    assert 0 < best < len(STRENGTHS) - 1, "a choice that could have gone either way"
    assert found.figures.penalty == pytest.approx(STRENGTHS[best] * mean_of_all)
    assert found.held_out is not None
    assert found.held_out.aligned.relative_error == pytest.approx(errors[best] / np.linalg.norm(y[held]), rel=1e-5)


def test_a_planted_linear_map_is_found_by_ridge_and_not_by_procrustes(tmp_path: Path) -> None:
    x = draw(N_ROWS, 32)
    planted = rotation(32) * np.linspace(0.1, 4, 32)
    ridge = aligned(tmp_path / "a", x, x @ planted, method="ridge", holdout=0.1)
    np.testing.assert_allclose(ridge.W, planted, atol=1e-4)
    assert held_out(ridge).aligned.relative_error < 1e-4
    assert aligned(tmp_path / "b", x, x @ planted).report.relative_residual > 0.3


def test_where_the_spaces_are_rotations_every_map_is_the_rotation(tmp_path: Path) -> None:
    x, q = draw(N_ROWS, 32), rotation(32)
    for method in MAPS:
        np.testing.assert_allclose(aligned(tmp_path / method, x, x @ q, method=method, holdout=0.1).W, q, atol=1e-4)


def test_the_commands_and_the_file_know_the_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = pair(24, 32)
    made = aligned(tmp_path, x, y, **options_of(x, y, method="ridge"))
    folders, w = [str(tmp_path / side) for side in ("source", "target")], str(tmp_path / "w.safetensors")
    align = ["align", *folders, "--allow-width-change", "--no-cache", "--holdout", "0.1", "-o", w]
    assert main([*align, "--method", "ridge"]) == 0
    said = capsys.readouterr().out
    assert "ridge, lambda" in said
    assert "rank of X^T X" in said
    np.testing.assert_array_equal(load_alignment(w).W, made.W)
    tokens = write_tokens(tmp_path / "t.safetensors", width=24)
    out = str(tmp_path / "out.safetensors")
    assert main(["transfer", tokens, w, "--norm", "source", "-o", out]) == 0
    moved, before = load_tokens(out), load_tokens(tokens).rows.astype(np.float64)
    assert moved.method == "ridge"
    mapped = before @ made.W
    unit = mapped / np.linalg.norm(mapped, axis=1, keepdims=True)
    np.testing.assert_allclose(moved.rows, unit * np.linalg.norm(before, axis=1, keepdims=True), rtol=1e-5)
    capsys.readouterr()
    assert main(["transfer", tokens, w, "--method", "procrustes", "-o", out]) == 2
    assert "a map by ridge, not by procrustes" in capsys.readouterr().err


def test_an_alignment_file_from_before_the_methods_is_procrustes(tmp_path: Path) -> None:
    made = aligned(tmp_path, draw(N_ROWS, 32), draw(N_ROWS, 32, 1))
    save_alignment(tmp_path / "w.safetensors", made)
    located, metadata = read_header(tmp_path / "w.safetensors")
    report = {k: v for k, v in json.loads(metadata["report"]).items() if k not in ("method", "dimensions")}
    tensors = {name: location.read() for name, location in located.items()}
    write_safetensors(tmp_path / "old.safetensors", tensors, {**metadata, "report": json.dumps(report)})
    old = load_alignment(tmp_path / "old.safetensors")
    assert old.method == "procrustes"
    assert old.report == load_alignment(tmp_path / "w.safetensors").report


def test_what_a_method_can_t_do_is_said(tmp_path: Path) -> None:
    x, y = pair(32, 32)
    for method in ("ridge", "relative"):
        with pytest.raises(DttError, match=f"The method {method} chooses its penalty on held-out anchors"):
            aligned(tmp_path / method, x, y, method=method, holdout=0.0)
    flat = x.copy()
    flat[:, 0] = 0
    with pytest.raises(DttError, match=r"span 31 of the source's 32 dimensions.*--method ridge"):
        aligned(tmp_path / "flat", flat, y, method="whitened")
    assert np.isfinite(aligned(tmp_path / "ridge-flat", flat, y, method="ridge", holdout=0.1).W).all()
    with pytest.raises(DttError, match=r"24 wide.*--allow-width-change"):
        aligned(tmp_path / "widths", *pair(32, 24), method="ridge")


def test_procrustes_asks_for_no_gram_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    plain = NumpyEngine.cross

    def counted(engine: NumpyEngine, d_s: int, d_t: int) -> Any:
        made.append((d_s, d_t))
        return plain(engine, d_s, d_t)

    monkeypatch.setattr(NumpyEngine, "cross", counted)
    x, y = pair(24, 32)
    wanted: dict[MapMethod, list[tuple[int, int]]] = {
        "procrustes": [(24, 32)],
        "ridge": [(24, 32), (24, 24)],
        "relative": [(24, 32), (24, 24), (32, 32)],
        "whitened": [(24, 32), (24, 24), (32, 32)],
    }
    for method, products in wanted.items():
        made.clear()
        aligned(tmp_path / method, x, y, **options_of(x, y, method=method))
        assert made == products


def test_the_words_for_methods_agree() -> None:
    from typing import get_args

    assert get_args(MapMethod) == MAPS
    assert AlignmentOptions().method == MAPS[0]

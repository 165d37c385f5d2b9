"""Planted answers: maps that the alignment must find, and figures that must follow from them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import linalg, stats

from dtt_plugin.alignment import Alignment, AlignmentOptions, align, align_many, load_alignment, save_alignment
from dtt_plugin.alignment.engine import NumpyEngine
from dtt_plugin.alignment.heldout import HeldOut, hold_out
from dtt_plugin.alignment.polar import orthogonality_error, polar_factor
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from tests.checkpoints import default_vocab_tokens, make_checkpoint

Matrix = NDArray[np.float64]
N_ROWS = 268  # of the default vocabulary with its three special tokens


def draw(rows: int, width: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, width))


def rotation(width: int, seed: int = 1) -> Matrix:
    matrix: Matrix = stats.ortho_group.rvs(width, random_state=seed)
    return matrix


def held_out(alignment: Alignment) -> HeldOut:
    assert alignment.report.held_out is not None
    return alignment.report.held_out


def aligned(
    tmp_path: Path,
    x: Matrix,
    y: Matrix,
    *,
    dtype: str = "float64",
    target_tokens: list[str] | None = None,
    extra_rows: int = 0,
    **options: Any,
) -> Alignment:
    """Write both matrices as checkpoints and align them."""
    source = make_checkpoint(tmp_path / "source", width=x.shape[1], dtype=dtype, embedding=x)
    target = make_checkpoint(
        tmp_path / "target", width=y.shape[1], dtype=dtype, embedding=y, vocab_tokens=target_tokens
    )
    return align(open_checkpoint(str(source)), open_checkpoint(str(target)), AlignmentOptions(**options))


def test_a_rotation_is_recovered(tmp_path: Path) -> None:
    x, q = draw(N_ROWS, 32), rotation(32)
    alignment = aligned(tmp_path, x, x @ q)
    np.testing.assert_allclose(alignment.W, q, atol=1e-12)
    assert alignment.report.relative_residual < 1e-7
    assert alignment.report.orthogonality_error < 1e-12
    assert alignment.report.anchors == N_ROWS
    assert alignment.report.scale == pytest.approx(1)


def test_a_reflection_is_recovered(tmp_path: Path) -> None:
    x, q = draw(N_ROWS, 32), rotation(32)
    q[0] = -q[0]
    assert np.linalg.det(q) * np.linalg.det(rotation(32)) < 0
    np.testing.assert_allclose(aligned(tmp_path, x, x @ q).W, q, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_rotation_is_recovered_to_the_accuracy_of_the_stored_type(tmp_path: Path, dtype: str) -> None:
    x, q = draw(N_ROWS, 32), rotation(32)
    alignment = aligned(tmp_path, x, x @ q, dtype=dtype)
    tolerance = {"bfloat16": 2e-3, "float16": 3e-4, "float32": 1e-6}[dtype]
    assert np.abs(alignment.W - q).max() < tolerance
    assert alignment.report.orthogonality_error < 1e-12


def test_the_scale_is_found_and_applied_only_when_asked_for(tmp_path: Path) -> None:
    x, q = draw(N_ROWS, 32), rotation(32)
    reported = aligned(tmp_path / "a", x, 3 * x @ q)
    applied = aligned(tmp_path / "b", x, 3 * x @ q, scale=True)
    assert reported.report.scale == pytest.approx(3)
    np.testing.assert_allclose(reported.apply(x[:5]), x[:5] @ q, atol=1e-11)
    np.testing.assert_allclose(applied.apply(x[:5]), 3 * x[:5] @ q, atol=1e-11)


def test_centring_finds_a_shift_beside_the_rotation(tmp_path: Path) -> None:
    x, q, shift = draw(N_ROWS, 32) + 2, rotation(32), draw(1, 32, 5)
    alignment = aligned(tmp_path, x, x @ q + shift, center=True)
    np.testing.assert_allclose(alignment.W, q, atol=1e-11)
    np.testing.assert_allclose(alignment.apply(x[:5]), x[:5] @ q + shift, atol=1e-10)


def test_weighting_by_length_makes_outliers_harmless(tmp_path: Path) -> None:
    x, q = draw(N_ROWS, 32), rotation(32)
    y = x @ q
    y[7] = 1e4 * draw(1, 32, 9)
    plain = aligned(tmp_path / "a", x, y)
    weighted = aligned(tmp_path / "b", x, y, weight="norm")
    assert np.linalg.norm(weighted.W - q) < 0.2 < np.linalg.norm(plain.W - q)


def test_tokens_are_matched_by_what_they_are_not_by_their_row(tmp_path: Path) -> None:
    tokens = default_vocab_tokens()
    order = np.random.default_rng(3).permutation(len(tokens))
    x, q = draw(N_ROWS, 32), rotation(32)
    # The target: reordered, 40 tokens of its own, its special tokens last, 17 rows of padding.
    own = [f"zz{i}" for i in range(40)]
    y = 1e3 * draw(len(tokens) + 40 + 3 + 17, 32, 4)
    y[: len(tokens)] = (x @ q)[order]
    y[len(tokens) + 40 : len(tokens) + 43] = (x @ q)[len(tokens) :]
    alignment = aligned(tmp_path, x, y, target_tokens=[*(tokens[i] for i in order), *own])
    np.testing.assert_allclose(alignment.W, q, atol=1e-12)
    assert alignment.report.anchors == N_ROWS


def test_byte_level_and_sentencepiece_spellings_of_a_token_meet(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(60)]
    x, q = draw(64, 16), rotation(16)
    source = make_checkpoint(
        tmp_path / "s", width=16, dtype="float64", embedding=x, special=(),
        vocab_tokens=[*(f"Ġ{word}" for word in words), "Ċ", "Ã©", "a", "b"],
    )  # fmt: skip
    target = make_checkpoint(tmp_path / "t", width=16, dtype="float64", embedding=x @ q, special=())
    vocab = [*(f"▁{word}" for word in words), "<0x0A>", "é", "a", "b"]
    spelled = {
        "model": {"type": "Unigram", "vocab": [[token, -1.0] for token in vocab]},
        "decoder": {"type": "Metaspace"},
        "added_tokens": [],
    }
    (target / "tokenizer.json").write_text(json.dumps(spelled))
    alignment = align(open_checkpoint(str(source)), open_checkpoint(str(target)))
    assert alignment.report.shared_tokens == 64
    np.testing.assert_allclose(alignment.W, q, atol=1e-12)


def test_special_tokens_of_one_side_are_left_out_and_named(tmp_path: Path) -> None:
    x = draw(N_ROWS, 32)
    source = make_checkpoint(tmp_path / "s", dtype="float64", embedding=x)
    target = make_checkpoint(tmp_path / "t", dtype="float64", embedding=x[:267], special=("<|im_start|>", "<|im_end|>"))
    report = align(open_checkpoint(str(source)), open_checkpoint(str(target))).report
    assert report.special_left_out == ("<|endoftext|>",)
    assert report.anchors == 267


@pytest.mark.parametrize(("d_s", "d_t"), [(64, 48), (48, 64)])
def test_a_change_of_width_keeps_the_planted_directions(tmp_path: Path, d_s: int, d_t: int) -> None:
    q = rotation(64)
    planted = q[:, :48] if d_s > d_t else q[:48]  # (d_s, d_t)
    x = draw(N_ROWS, d_s)
    if d_s > d_t:
        x = draw(N_ROWS, d_t) @ planted.T  # what the narrow side can hold
    alignment = aligned(tmp_path, x, x @ planted, allow_width_change=True, holdout=0.2)
    np.testing.assert_allclose(alignment.W, planted, atol=1e-11)
    assert alignment.report.orthogonality_error < 1e-12
    assert alignment.report.relative_residual < 1e-6
    assert held_out(alignment).norm_retained == pytest.approx((1, 1, 1), abs=1e-5)


def test_what_a_narrower_target_loses_is_reported(tmp_path: Path) -> None:
    x = draw(N_ROWS, 64)
    alignment = aligned(tmp_path, x, x @ rotation(64)[:, :48], allow_width_change=True, holdout=0.2)
    smallest, mean, largest = held_out(alignment).norm_retained
    assert 0.6 < smallest < mean < largest <= 1
    assert mean == pytest.approx(np.sqrt(48 / 64), abs=0.03)
    back = x @ rotation(64)[:, :48] @ alignment.W.T - x
    assert alignment.report.residual == pytest.approx(np.linalg.norm(back))


def test_a_rank_deficient_problem_is_solved_where_it_is_determined_and_says_so(tmp_path: Path) -> None:
    x, q = draw(N_ROWS, 32), rotation(32)
    x[:, 24:] = 0
    alignment = aligned(tmp_path, x, x @ q)
    np.testing.assert_allclose(alignment.W[:24], q[:24], atol=1e-11)
    assert alignment.report.rank == 24
    assert not alignment.report.unique
    assert alignment.report.condition is None or alignment.report.condition > 1e12
    assert alignment.report.orthogonality_error < 1e-12
    assert any("not unique in the other 8" in warning for warning in alignment.report.warnings)


def test_a_model_aligned_to_itself_gives_exactly_the_identity(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    alignment = align(open_checkpoint(str(folder)), open_checkpoint(str(folder)))
    np.testing.assert_array_equal(alignment.W, np.eye(32))
    assert alignment.report.same_model
    assert alignment.report.distance_from_identity == 0
    assert (alignment.report.residual, alignment.report.scale) == (0, 1)
    assert "identity" in alignment.report.warnings[0]


def test_the_reported_residual_is_that_of_the_rows(tmp_path: Path) -> None:
    x = draw(N_ROWS, 32)
    y = x @ rotation(32) + 0.3 * draw(N_ROWS, 32, 7)
    alignment = aligned(tmp_path, x, y)
    residual = np.linalg.norm(x @ alignment.W - y)
    assert alignment.report.residual == pytest.approx(residual, rel=1e-9)
    assert alignment.report.relative_residual == pytest.approx(residual / np.linalg.norm(y))
    distance = np.linalg.norm(alignment.W - np.eye(32)) / 8
    assert alignment.report.distance_from_identity == pytest.approx(distance)


def test_the_streamed_map_agrees_with_scipy_on_bfloat16(tmp_path: Path) -> None:
    x = draw(N_ROWS, 32) * np.logspace(0, -2, 32)
    y = x @ rotation(32) + 0.001 * draw(N_ROWS, 32, 7)
    alignment = aligned(tmp_path, x, y, dtype="bfloat16")
    stored = [
        open_checkpoint(str(tmp_path / side)).input_embedding().read().astype(np.float64)
        for side in ("source", "target")
    ]
    expected, _ = linalg.orthogonal_procrustes(*stored)
    assert np.linalg.norm(alignment.W - expected) / np.sqrt(32) < 1e-9


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    decades=st.floats(0, 12),
)
def test_the_polar_factor_is_scipys_at_any_condition(seed: int, shape: tuple[int, int], decades: float) -> None:
    small = min(shape)
    u, _, vt = np.linalg.svd(draw(*shape, seed=seed), full_matrices=False)
    sigma = np.logspace(0, -decades, small)
    M = u * sigma @ vt
    polar = polar_factor(1e5 * M)
    assert polar.orthogonality_error < 1e-12
    assert orthogonality_error(polar.W) == pytest.approx(polar.orthogonality_error, abs=1e-14)
    np.testing.assert_allclose(polar.singular_values, 1e5 * sigma, rtol=1e-4, atol=1e-8)
    # Rounding in M itself moves W by eps cond(M), the eigenvalues of M^T M by eps cond(M)^2 up to 1e5.
    tolerance = 1e-12 + 1e-14 * min(10**decades, 1e5) ** 2 + 1e-13 * 10**decades
    assert np.linalg.norm(polar.W - u @ vt) / np.sqrt(small) < tolerance


def test_float32_blocks_hold_the_accuracy_that_is_promised(tmp_path: Path) -> None:
    """cond(M) near 1e4, float32 products: within 1e-5 of SciPy in float64."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6000, 256)) * np.logspace(0, -2, 256)).astype(np.float32)
    y = (x @ rotation(256)).astype(np.float32)
    cross = NumpyEngine(np.float32).cross(256, 256)
    for start in range(0, 6000, 1000):
        cross.add(x[start : start + 1000], y[start : start + 1000], bfloat16=False)
    polar = polar_factor(cross.total())
    expected, _ = linalg.orthogonal_procrustes(x.astype(np.float64), y.astype(np.float64))
    assert 5e3 < polar.condition < 2e4
    assert np.linalg.norm(polar.W - expected) / 16 < 1e-5
    assert polar.orthogonality_error < 1e-12


def test_the_first_order_leave_out_agrees_with_a_second_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4000, 64)) * np.logspace(0, -1, 64)).astype(np.float32)
    y = (x @ rotation(64) + 0.1 * rng.standard_normal((4000, 64))).astype(np.float32)
    M = x.T.astype(np.float64) @ y.astype(np.float64)
    polar, engine = polar_factor(M), NumpyEngine(np.float64)
    exact = hold_out(M, polar, x[:100], y[:100], engine, seed=0)
    monkeypatch.setattr("dtt_plugin.alignment.heldout._EXACT_UP_TO", 0)
    quick = hold_out(M, polar, x[:100], y[:100], engine, seed=0)
    assert (exact.fit, quick.fit) == ("exact", "first-order")
    assert quick.aligned.cosine == pytest.approx(exact.aligned.cosine, abs=1e-4)
    assert quick.aligned.relative_error == pytest.approx(exact.aligned.relative_error, abs=1e-4)
    # The figures do differ from those of a map that has seen the tokens.
    seen = x[:100] @ polar.W
    error_of_seen = np.linalg.norm(seen - y[:100]) / np.linalg.norm(y[:100])
    assert quick.aligned.relative_error - error_of_seen > 2e-4


def test_too_large_a_leave_out_falls_back_on_the_exact_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtt_plugin.alignment.heldout._EXACT_UP_TO", 0)
    x, y = draw(100, 32), draw(100, 32, 1)
    M = x.T @ y
    assert hold_out(M, polar_factor(M), x[:60], y[:60], NumpyEngine(np.float64), seed=0).fit == "exact"


def test_held_out_figures_tell_a_true_map_from_none(tmp_path: Path) -> None:
    x = draw(N_ROWS, 32)
    related = aligned(tmp_path / "a", x, x @ rotation(32) + 0.2 * draw(N_ROWS, 32, 7), holdout=0.2)
    unrelated = aligned(tmp_path / "b", x, draw(N_ROWS, 32, 8), holdout=0.2)
    held, null = held_out(related).aligned, held_out(related).random_rotation
    assert held.cosine > 0.95
    assert held.precision_at_1 == held.csls_precision_at_1_back == 1
    assert abs(null.cosine) < 0.2
    assert null.precision_at_1 < 0.2
    assert abs(held_out(unrelated).aligned.cosine) < 0.2


def test_memory_of_a_block_is_not_taken_before_it_is_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtt_plugin.alignment import engine

    source, *targets = (
        open_checkpoint(str(make_checkpoint(tmp_path / f"m{seed}", vocab_tokens=tokens, seed=seed)))
        for seed, tokens in enumerate(
            [default_vocab_tokens(), default_vocab_tokens()[::-1], default_vocab_tokens()[90:]]
        )
    )
    expected = align_many(source, targets)
    monkeypatch.setattr("dtt_plugin.alignment.workers.blas_threads", lambda: 3)
    monkeypatch.setattr("dtt_plugin.alignment.moments._BLOCK", 1)
    monkeypatch.setattr("dtt_plugin.alignment.moments._FEWEST_ROWS", 7)
    plain = engine._add

    def slow(*args: Any) -> None:
        time.sleep(0.002)
        plain(*args)

    monkeypatch.setattr(engine, "_add", slow)
    for one, other in zip(expected, align_many(source, targets), strict=True):
        np.testing.assert_allclose(one.W, other.W, atol=1e-9)
        assert one.report.residual == pytest.approx(other.report.residual, rel=1e-12)


def test_one_source_and_many_targets_give_what_single_runs_give(tmp_path: Path) -> None:
    source = open_checkpoint(str(make_checkpoint(tmp_path / "s", seed=1)))
    targets = [
        open_checkpoint(str(make_checkpoint(tmp_path / f"t{seed}", seed=seed, extra_rows=seed))) for seed in (2, 3)
    ]
    targets.append(
        open_checkpoint(str(make_checkpoint(tmp_path / "t4", vocab_tokens=default_vocab_tokens()[::-1], seed=4)))
    )
    together = align_many(source, targets)
    for target, alignment in zip(targets, together, strict=True):
        alone = align(source, target)
        assert (alone.W == alignment.W).all()
        assert alone.report == alignment.report


def test_blocks_don_t_change_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = default_vocab_tokens()
    order = np.random.default_rng(3).permutation(len(tokens))
    x, q = draw(N_ROWS, 32), rotation(32)
    y = np.concatenate([(x @ q)[order], (x @ q)[len(tokens) :]])
    monkeypatch.setattr("dtt_plugin.alignment.moments._BLOCK", 1)
    monkeypatch.setattr("dtt_plugin.alignment.moments._FEWEST_ROWS", 7)
    alignment = aligned(tmp_path, x, y, target_tokens=[tokens[i] for i in order])
    np.testing.assert_allclose(alignment.W, q, atol=1e-12)


def test_sampled_anchors_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    x, y = draw(N_ROWS, 32), draw(N_ROWS, 32, 1)
    first = aligned(tmp_path / "a", x, y, anchors=100)
    again = aligned(tmp_path / "b", x, y, anchors=100)
    other = aligned(tmp_path / "c", x, y, anchors=100, seed=1)
    assert first.report.anchors == 100
    assert (first.W == again.W).all()
    assert not (first.W == other.W).all()


def test_an_anchors_file_limits_the_anchors(tmp_path: Path) -> None:
    names = [*"abcdefghijklmnopqrstuvwxyz0123456789", " world", "<|im_end|>"]
    listed = tmp_path / "anchors.txt"
    listed.write_text("\n".join(names))
    x, y = draw(N_ROWS, 32), draw(N_ROWS, 32, 1)
    assert aligned(tmp_path / "a", x, y, anchors_file=str(listed)).report.anchors == len(names)
    listed.write_text(json.dumps([*names, "no such token"]))
    with pytest.raises(DttError, match=r"1 tokens .* doesn't have, the first is 'no such token'"):
        aligned(tmp_path / "b", x, y, anchors_file=str(listed))
    with pytest.raises(DttError, match="missing can't be read: No such file"):
        aligned(tmp_path / "c", x, y, anchors_file=str(tmp_path / "missing"))


def test_rows_can_be_matched_by_number_without_a_tokenizer(tmp_path: Path) -> None:
    x, q = draw(N_ROWS, 32), rotation(32)
    for side in ("source", "target"):
        make_checkpoint(tmp_path / side, dtype="float64", embedding=x if side == "source" else x @ q)
        (tmp_path / side / "tokenizer.json").unlink()
    source, target = (open_checkpoint(str(tmp_path / s / "model.safetensors")) for s in ("source", "target"))
    with pytest.raises(DttError, match="no tokenizer beside its weights"):
        align(source, target)
    np.testing.assert_allclose(align(source, target, AlignmentOptions(match="rows")).W, q, atol=1e-12)


def test_the_same_alignment_gives_the_same_bytes_and_comes_back(tmp_path: Path) -> None:
    x, y = draw(N_ROWS, 32), draw(N_ROWS, 32, 1)
    first = aligned(tmp_path / "a", x, y, center=True)
    again = align(
        open_checkpoint(str(tmp_path / "a" / "source")),
        open_checkpoint(str(tmp_path / "a" / "target")),
        AlignmentOptions(center=True),
    )
    save_alignment(tmp_path / "1.safetensors", first)
    save_alignment(tmp_path / "2.safetensors", again)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    loaded = load_alignment(tmp_path / "1.safetensors")
    assert loaded.report == replace(first.report, source_model="source", target_model="target"), "no paths"
    for name in ("W", "source_mean", "target_mean"):
        assert (getattr(loaded, name) == getattr(first, name)).all()


def test_a_damaged_alignment_file_is_refused(tmp_path: Path) -> None:
    alignment = aligned(tmp_path, draw(N_ROWS, 32), draw(N_ROWS, 32, 1))
    path = tmp_path / "w.safetensors"
    save_alignment(path, alignment)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DttError, match="don't match the digest"):
        load_alignment(path)
    path.write_bytes(data[:-100])
    with pytest.raises(DttError, match="not a whole safetensors file"):
        load_alignment(path)
    with pytest.raises(DttError, match="not an alignment file"):
        load_alignment(tmp_path / "source" / "model.safetensors")

"""Moving tokens: the map, the controls, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dtt_plugin.alignment import Alignment, align, save_alignment
from dtt_plugin.alignment.rotations import haar_rotation
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.cli import main
from dtt_plugin.errors import DttError
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens, save_tokens, save_upstream_json
from dtt_plugin.transfer.move import compare, compare_methods, transfer
from tests.checkpoints import make_checkpoint

WIDTH = 32
Q = stats.ortho_group.rvs(WIDTH, random_state=1)
ROWS = 80 * np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def alignment(tmp_path_factory: pytest.TempPathFactory) -> Alignment:
    folder = tmp_path_factory.mktemp("pair")
    x = np.random.default_rng(2).standard_normal((268, WIDTH))
    source = make_checkpoint(folder / "source", dtype="float64", embedding=x)
    target = make_checkpoint(folder / "target", dtype="float64", embedding=x @ Q)
    return align(open_checkpoint(str(source)), open_checkpoint(str(target)))


@pytest.fixture
def tokens(alignment: Alignment) -> DefensiveTokens:
    return DefensiveTokens(ROWS, alignment.source_model, "trained", "qwen2.5")


def native(rows: Any = 2 * ROWS @ Q) -> DefensiveTokens:
    return DefensiveTokens(rows.astype(np.float32), "target", "native", "qwen2.5")


def test_transferred_tokens_are_the_planted_ones(tokens: DefensiveTokens, alignment: Alignment) -> None:
    moved = transfer(tokens, alignment)
    np.testing.assert_allclose(moved.rows, ROWS @ Q, rtol=1e-4, atol=1e-4)
    assert (moved.method, moved.prompt_format) == ("procrustes", "qwen2.5")
    assert (moved.model, moved.source_model) == (alignment.target_model, alignment.source_model)
    comparison = compare(tokens, moved, alignment=alignment, native=native())
    assert comparison.cosine_to_native == pytest.approx([1] * 5)
    assert comparison.norm_ratio == pytest.approx(1)


def test_copied_tokens_keep_their_values(tokens: DefensiveTokens, alignment: Alignment) -> None:
    moved = transfer(tokens, None, method="copy", target_model="owner/target")
    np.testing.assert_array_equal(moved.rows, ROWS)
    assert (moved.method, moved.model) == ("copy", "owner/target")
    comparison = compare(tokens, moved)
    assert comparison.distance_from_identity == 0
    assert comparison.cosine_to_source == pytest.approx([1] * 5)


def test_a_random_map_keeps_lengths_and_angles_and_follows_its_seed(tokens: DefensiveTokens) -> None:
    first, again, other = (
        transfer(tokens, None, method="random", target_model="t", seed=seed).rows for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1
    np.testing.assert_allclose(first @ first.T, ROWS @ ROWS.T, rtol=1e-4, atol=1e-1)


def test_the_random_map_is_one_map_and_uniform() -> None:
    eye = haar_rotation(np.eye(6), np.random.default_rng(0))
    np.testing.assert_allclose(eye @ eye.T, np.eye(6), atol=1e-14)
    rows = np.random.default_rng(1).standard_normal((3, 6))
    np.testing.assert_allclose(haar_rotation(rows, np.random.default_rng(0)), rows @ eye)
    draws = np.array([haar_rotation(np.eye(4), np.random.default_rng(seed)) for seed in range(4000)])
    # Uniform on O(4): every entry has mean 0 and variance 1/4, half the determinants are -1.
    assert np.abs(draws.mean(axis=0)).max() < 0.04
    np.testing.assert_allclose(draws.var(axis=0), 0.25, atol=0.025)
    assert np.mean(np.linalg.det(draws) > 0) == pytest.approx(0.5, abs=0.03)
    assert np.mean(np.trace(draws, axis1=1, axis2=2) ** 2) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("norm", "expected"), [("source", None), ("native", None), ("3.5", 3.5), (7, 7.0)])
def test_tokens_are_rescaled(
    tokens: DefensiveTokens, alignment: Alignment, norm: str | float, expected: float | None
) -> None:
    doubled = Alignment(alignment.W, replace(alignment.report, scale=2.0, scale_applied=True))
    lengths = np.linalg.norm(transfer(tokens, doubled, norm=norm, native=native()).rows, axis=1)
    before = np.linalg.norm(ROWS, axis=1)
    wanted: Any = {"source": before, "native": 2 * before.mean()}.get(str(norm), expected)
    np.testing.assert_allclose(lengths, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "big"}, "norm='big'"),
        ({"norm": "-1"}, "norm='-1'"),
        ({"norm": "nan"}, "norm='nan'"),
        ({"norm": "native"}, "--native FILE"),
        ({"alignment": None}, "needs an alignment"),
        ({"alignment": None, "method": "copy"}, "--target-model"),
    ],
)
def test_what_can_t_be_done_is_said(
    tokens: DefensiveTokens, alignment: Alignment, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DttError, match=message):
        transfer(tokens, **{"alignment": alignment, **options})


def test_tokens_of_another_width_are_refused(alignment: Alignment) -> None:
    narrow = DefensiveTokens(ROWS[:, :8], "m", "trained", "model")
    for method in ("procrustes", "copy", "random"):
        with pytest.raises(DttError, match="8 wide and the alignment starts from"):
            transfer(narrow, alignment, method=method)
    with pytest.raises(DttError, match="give those of the target model"):
        compare(narrow, narrow, native=native())


def test_the_comparison_shows_what_the_rotation_is_worth(tokens: DefensiveTokens, alignment: Alignment) -> None:
    table = {row.method: row for row in compare_methods(tokens, alignment, native=native())}
    assert list(table) == ["procrustes", "copy", "random"]

    def to_native(method: str) -> float:
        cosines = table[method].cosine_to_native
        assert cosines is not None
        return float(np.mean(cosines))

    assert to_native("procrustes") == pytest.approx(1)
    assert abs(to_native("copy")) < 0.3
    assert abs(to_native("random")) < 0.3
    expected = np.linalg.norm(Q - np.eye(WIDTH)) / np.sqrt(2 * WIDTH)
    assert table["procrustes"].distance_from_identity == pytest.approx(expected)


@pytest.fixture
def files(tmp_path: Path, tokens: DefensiveTokens, alignment: Alignment) -> tuple[str, str, str]:
    save_tokens(tmp_path / "t.safetensors", tokens)
    save_alignment(tmp_path / "w.safetensors", alignment)
    return str(tmp_path / "t.safetensors"), str(tmp_path / "w.safetensors"), str(tmp_path / "out.safetensors")


def test_the_command_in_its_shortest_form(
    files: tuple[str, str, str], capsys: pytest.CaptureFixture[str], tokens: DefensiveTokens, alignment: Alignment
) -> None:
    source, w, out = files
    assert main(["transfer", source, w, "-o", out]) == 0
    assert load_tokens(out).digest == transfer(tokens, alignment).digest
    said = capsys.readouterr()
    assert "procrustes" in said.out
    assert said.err == ""
    first = load_tokens(out)
    assert set(first.metadata) > {"transfer_seconds"}
    assert main(["transfer", "--tokens", source, "--alignment", w, "--out", out, "--json"]) == 0
    assert load_tokens(out).digest == first.digest
    assert json.loads(capsys.readouterr().out)["norm_ratio"] == pytest.approx(1)


def test_the_command_picks_both_entries_of_an_upstream_json(
    files: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], alignment: Alignment
) -> None:
    published = str(tmp_path / "all.json")
    rows = {alignment.source_model: ROWS, alignment.target_model: (ROWS @ Q).astype(np.float32), "other": ROWS}
    save_upstream_json(published, rows)
    assert main(["transfer", published, files[1], "--compare", "--native", published, "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods[0]["cosine_to_native"] == pytest.approx([1] * 5)
    assert main(["transfer", published, files[1], "--compare", "--native", published]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[:4]] == ["method", "procrustes", "copy", "random"]
    assert main(["transfer", published, files[1], "-o", files[2], "--tokens-model", "other"]) == 0
    assert "make sure that these are the same model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which tokens"),
        (["T", "W"], "Where to"),
        (["T", "-o", "OUT"], "needs an alignment"),
        (["T", "W", "-o", "OUT", "--norm", "wide"], "norm='wide'"),
        (["W", "W", "-o", "OUT"], "not a token file"),
        (["T", "T", "-o", "OUT"], "not an alignment file"),
        (["T", "/no/such/file", "-o", "OUT"], "can't be read"),
    ],
)
def test_bad_commands_are_one_sentence_and_write_nothing(
    arguments: list[str], message: str, files: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = dict(zip(("T", "W", "OUT"), files, strict=True))
    assert main(["transfer", *(names.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path(files[2]).exists()


@pytest.fixture
def between_widths(alignment: Alignment) -> Alignment:
    return Alignment(np.eye(WIDTH, 48), replace(alignment.report, distance_from_identity=None))


def test_another_width_is_reached_by_zeros_or_by_a_random_isometry(between_widths: Alignment) -> None:
    tokens = DefensiveTokens(ROWS, "s", "trained", "model")
    padded = transfer(tokens, between_widths, method="zero-pad")
    np.testing.assert_array_equal(padded.rows, np.pad(ROWS, ((0, 0), (0, 16))))
    assert padded.method == "zero-pad"
    turned = transfer(tokens, between_widths, method="random", seed=3).rows
    np.testing.assert_allclose(turned @ turned.T, ROWS @ ROWS.T, rtol=1e-4, atol=1e-1)
    assert np.abs(turned[:, WIDTH:]).max() > 1
    back = Alignment(np.eye(48, WIDTH), between_widths.report)
    wide = DefensiveTokens(padded.rows + 1, "s", "trained", "model")
    cut = transfer(wide, back, method="zero-pad", norm="source").rows
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), np.linalg.norm(wide.rows, axis=1), rtol=1e-5)
    np.testing.assert_allclose(cut[0] / cut[0, 0], wide.rows[0, :WIDTH] / wide.rows[0, 0], rtol=1e-5)
    with pytest.raises(DttError, match="use zero-pad"):
        transfer(tokens, between_widths, method="copy")
    assert [row.method for row in compare_methods(tokens, between_widths)] == ["procrustes", "zero-pad", "random"]


def test_equal_widths_need_no_padding_and_unknown_methods_are_named(tokens: DefensiveTokens) -> None:
    with pytest.raises(DttError, match="nothing to pad"):
        transfer(tokens, None, method="zero-pad", target_model="t")
    with pytest.raises(DttError, match="method='warp' is not one of procrustes"):
        transfer(tokens, None, method="warp", target_model="t")


def test_a_map_that_does_nothing_to_the_tokens_is_called_a_copy(
    files: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], alignment: Alignment
) -> None:
    """A rotation by two degrees in one plane, which is what the published pair's map does to its tokens."""
    source, w, out = files
    turn = np.eye(WIDTH)
    turn[:2, :2] = [[np.cos(0.035), np.sin(0.035)], [-np.sin(0.035), np.cos(0.035)]]
    save_alignment(tmp_path / "near.safetensors", Alignment(turn, alignment.report))
    sentence = "this map is a copy on these tokens"
    assert main(["transfer", source, str(tmp_path / "near.safetensors"), "--compare", "-o", out]) == 0
    assert f"procrustes: {sentence} (angles of at most" in capsys.readouterr().out
    cosines = compare(load_tokens(source), load_tokens(out)).cosine_to_source
    assert cosines is not None
    assert min(cosines) > np.cos(0.035) - 1e-6
    assert main(["inspect", out]) == 0
    said = capsys.readouterr().out
    assert sentence in said
    assert "recorded angles to source" in said
    assert main(["transfer", source, w, "--compare", "-o", out]) == 0
    assert main(["inspect", out]) == 0
    said = capsys.readouterr().out
    assert sentence not in said
    assert "recorded angles to source" in said


@pytest.mark.parametrize("text", ["", "a lot", "2.0 0.5", "nan"])
def test_inspect_takes_no_angles_from_damaged_metadata(tmp_path: Path, text: str) -> None:
    from dtt_plugin.inspection import inspect_path
    from dtt_plugin.transfer.move import COSINES

    save_tokens(tmp_path / "t.safetensors", DefensiveTokens(ROWS, "m", "copy", "model", metadata={COSINES: text}))
    assert not [name for name in inspect_path(tmp_path / "t.safetensors") if name.startswith("recorded")]

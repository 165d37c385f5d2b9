"""The figures for papers, and what they and the report draw: token geometry and learning curves."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import BarContainer

from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard import charts
from dtt_plugin.leaderboard.board import GapClosed, Ratio
from dtt_plugin.leaderboard.curves import read_curve, read_curves
from dtt_plugin.leaderboard.figures import asr_bars, gap_closed, tradeoff, write_figures
from dtt_plugin.leaderboard.token_charts import learning_curves
from dtt_plugin.tokens.files import DefensiveTokens, save_tokens
from dtt_plugin.tokens.geometry import letter, read_geometry
from tests.checkpoints import make_checkpoint
from tests.conftest import write_tokens
from tests.report_stand_ins import ATTACKS, board, rate, row, usual_board


def log(path: Path, *entries: dict[str, Any], first: dict[str, Any] | None = None) -> Path:
    head = {"format": "dtt.training/1", "label": "adapted", "model": "m", "init": "random"} if first is None else first
    path.write_text("\n".join(json.dumps(entry) for entry in (head, *entries)))
    return path


def inputs(tmp_path: Path) -> dict[str, Any]:
    tokens = [Path(write_tokens(tmp_path / f"{n}.tokens.safetensors", width=16, seed=i)) for i, n in enumerate("ab")]
    points: list[dict[str, Any]] = [{"step": 0, "loss": 2.0}, {"step": 0, "asr": 0.5}, {"step": 10, "asr": 0.1}]
    problems: list[str] = []
    curves = read_curves([log(tmp_path / "a.log.jsonl", *points)], problems)
    found = {"geometries": read_geometry(tokens, problems), "curves": curves}
    assert not problems
    return found


def test_every_figure_comes_as_png_and_svg_and_is_the_same_again(tmp_path: Path) -> None:
    files = write_figures(tmp_path / "one", usual_board(), **inputs(tmp_path))
    table = "owner-model-alpacafarm_injection"
    names = [f"asr-{table}", f"gap-closed-{table}", "geometry-tiny", "curves"]
    assert [path.name for path in files] == [f"{name}.{ending}" for name in names for ending in ("png", "svg")]
    for path, again in zip(files, write_figures(tmp_path / "two", usual_board(), **inputs(tmp_path)), strict=True):
        assert path.read_bytes() == again.read_bytes()
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
            assert "mathdefault" not in path.read_text(encoding="utf-8")
            assert path.stat().st_size < 60_000
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_bars_are_the_rates_and_their_whiskers_the_intervals() -> None:
    figure = asr_bars(usual_board().groups[0])
    axes = figure.axes[0]
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    completion = bars[1]
    undefended = usual_board().groups[0].rows[0].asr["completion"]
    assert completion.patches[0].get_width() == pytest.approx(100 * undefended.rate)
    assert completion.errorbar is not None
    whisker = completion.errorbar[2][0].get_segments()[0]
    assert whisker[:, 0] == pytest.approx([100 * end for end in undefended.ends])
    # No attack is told by its colour alone.
    assert len({container.patches[0].get_hatch() for container in bars}) == len(ATTACKS)
    # The published row without rates per attack has no bars.
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["undefended", "reminder", "native", "transferred"]


def test_gap_closed_is_drawn_where_it_is_known(tmp_path: Path) -> None:
    axes = gap_closed(usual_board().groups[0]).axes[0]
    marks: list[Any] = list(axes.containers)
    assert [container.lines[0].get_xdata()[0] for container in marks] == [1.08, 1.01]
    files = write_figures(tmp_path, board([row("undefended")]))
    assert [path.name for path in files] == [
        f"asr-owner-model-alpacafarm_injection.{ending}" for ending in ("png", "svg")
    ]


def test_the_charts_ticks_stand_where_their_figures_say() -> None:
    closed = GapClosed({"measured": Ratio(1.08, -0.189, 1.169)}, "measured")
    svg = ET.fromstring(str(charts.gap_closed(board([row("transferred", gap_closed=closed)]).groups[0])))
    ticks = {float(str(t.text)): float(t.get("x", "")) for t in svg.iter("text") if t.get("text-anchor") == "middle"}
    assert list(ticks) == [-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25]
    steps = np.diff(list(ticks.values()))
    assert steps == pytest.approx(steps[0], abs=0.02)


def test_hostile_names_make_figures_all_the_same(tmp_path: Path) -> None:
    files = write_figures(tmp_path, board([row("$\\frac{</text><script>\ud800\x00\u202e")], title="$x^{"))
    text = files[1].read_text(encoding="utf-8")
    assert "<script>" not in text
    ET.fromstring(text)


def test_geometry_has_norms_cosines_and_plane(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    rows = np.array([[3, 0, 0], [0, 4, 0], [-1, 0, 0]], np.float32)
    save_tokens(path, DefensiveTokens(rows=rows, model="m", method="random", prompt_format="model"))
    (geometry,) = read_geometry([path], [])
    assert geometry.norms.tolist() == [3, 4, 1]
    assert geometry.cosine == pytest.approx(np.array([[1, 0, -1], [0, 1, 0], [-1, 0, 1]]))
    # Three points of a plane: two components hold all of the variance and keep all distances.
    assert sum(geometry.explained) == pytest.approx(1)
    distances = np.linalg.norm(geometry.plane[:, None] - geometry.plane[None], axis=2)
    assert distances == pytest.approx(np.linalg.norm(rows[:, None] - rows[None], axis=2))
    assert geometry.vocabulary is None
    assert geometry.names == ["A0", "A1", "A2"]


def test_the_vocabulary_is_beside_the_tokens_where_its_checkpoint_is_at_hand(tmp_path: Path) -> None:
    from dtt_plugin.checkpoint.opening import open_checkpoint

    folder = make_checkpoint(tmp_path / "model", width=32)
    tokens = Path(write_tokens(tmp_path / "t.safetensors", width=32, model=str(folder)))
    (geometry,) = read_geometry([tokens], [], ["owner/other", str(folder)])
    norms = np.linalg.norm(open_checkpoint(str(folder)).input_embedding().read().astype(np.float32), axis=1)
    assert geometry.vocabulary == pytest.approx(np.quantile(norms, [0.01, 0.5, 0.99]))
    other = Path(write_tokens(tmp_path / "wide.safetensors", width=64, model=str(folder)))
    assert read_geometry([other], [], [str(folder)])[0].vocabulary is None
    assert read_geometry([tokens], [], [str(folder), "/another/model"])[0].vocabulary is None, "which of the two?"


def test_tokens_are_compared_within_their_own_embedding_space(tmp_path: Path) -> None:
    files = [Path(write_tokens(tmp_path / f"{i}.safetensors", width=8, seed=i, model=m)) for i, m in enumerate("xyx")]
    spaces = read_geometry(files, [])
    assert [(space.model, space.names) for space in spaces] == [
        ("x", [f"{source}{place}" for source in "AB" for place in range(5)]),
        ("y", [f"A{place}" for place in range(5)]),
    ]


def test_one_token_of_norm_zero_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    zero = DefensiveTokens(rows=np.zeros((1, 4), np.float32), model="m", method="random", prompt_format="model")
    save_tokens(path, zero)
    (geometry,) = read_geometry([path], [])
    assert geometry.cosine.tolist() == [[0]]
    assert len(write_figures(tmp_path / "f", board([]), [geometry])) == 4


def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtt_plugin.leaderboard.figures.find_spec", lambda _: None)
    with pytest.raises(DttError, match=r"dtt-plugin\[report\]"):
        write_figures(tmp_path, usual_board())


def test_letters_go_on_after_z() -> None:
    assert [letter(n) for n in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]


def test_a_log_gives_loss_and_asr_by_step_and_forgives_a_line_still_being_written(tmp_path: Path) -> None:
    path = log(tmp_path / "a.jsonl", {"step": 2, "loss": 1}, {"step": 1, "loss": 2.5}, {"step": 2, "asr": 0.25})
    path.write_text(path.read_text() + '\n{"step": 3, "lo')
    curve = read_curve(path)
    assert curve.label == "adapted"
    assert list(curve.loss) == [(1, 2.5), (2, 1)]
    assert list(curve.asr) == [(2, 0.25)]


def test_figures_that_are_no_numbers_are_left_out_of_a_curve(tmp_path: Path) -> None:
    values = [float("nan"), float("inf"), None, "1", True, 10**400, [1]]
    curve = read_curve(log(tmp_path / "a.jsonl", *({"step": 1, "loss": value} for value in values)))
    assert curve.loss == ()
    assert learning_curves([curve], "loss") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not begin with"),
        ('{"format": "other"}', "does not begin with"),
        ("[1]", "line 1, is not an object"),
        ("no JSON\n{}", "line 1, is not JSON"),
        ("[" * 100_000, "line 1, is not JSON"),
        ('{"format": "dtt.training/1"}\n{\n{}', "line 2, is not JSON"),
    ],
)
def test_a_file_that_is_no_log_is_refused_in_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "x.log.jsonl"
    path.write_text(text)
    with pytest.raises(DttError, match=reason):
        read_curve(path)


def test_a_missing_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DttError, match="can't be read"):
        read_curve(tmp_path / "none.jsonl")


def with_header(good: bytes, **entries: Any) -> bytes:
    """Return a safetensors file with other entries in its header."""
    size = int.from_bytes(good[:8], "little")
    header = json.dumps(json.loads(good[8 : 8 + size]) | entries).encode()
    return len(header).to_bytes(8, "little") + header + good[8 + size :]


def bad_token_files(good: bytes) -> list[bytes]:
    """Return files that are no token files, made from one that is."""
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    tensor, metadata = header["defensive_tokens"], header["__metadata__"]
    tensors = [{"dtype": {}}, {"dtype": []}, {"shape": "5x8"}, {"shape": [-5, -8]}, {"shape": [2**62, 2**62]}]
    tensors += [{"data_offsets": {}}, {"data_offsets": [0, 2**60]}]
    tables = [None, [1], {"format": 1, "model": 2}, metadata | {"method": "x\x1b"}, metadata | {"method": {}}]
    return [
        *(with_header(good, defensive_tokens=tensor | change) for change in tensors),
        *(with_header(good, __metadata__=table) for table in tables),
        with_header(good, defensive_tokens=3),
        *(b"", good[:6], good[:-3], b"[" * 100_000, b'{"m": {"a": [[1]]}}', b'{"m": [[1, 2], [3]]}'),
        b'{"m": [[1' + b"0" * 400 + b"]]}",
    ]


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_token_file_that_is_none_is_a_sentence_and_costs_no_figure(tmp_path: Path, suffix: str) -> None:
    good = Path(write_tokens(tmp_path / "good.safetensors", width=8))
    paths = []
    for number, bad in enumerate(bad_token_files(good.read_bytes())):
        paths.append(tmp_path / f"{number}{suffix}")
        paths[-1].write_bytes(bad)
    problems: list[str] = []
    (geometry,) = read_geometry([*paths, good, tmp_path / "none", tmp_path], problems)
    assert geometry.sources == ("good.safetensors (random)",)
    assert len(problems) == len(paths) + 2
    assert [str(path) in problem for path, problem in zip(paths, problems, strict=False)] == [True] * len(paths)
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize(
    "model", ["x" * 5000, "a\0b", "~nobody-of-this-name/x", "\x1b[2J", "../../..", "", "\ud800", "/etc/passwd"]
)
def test_a_name_that_is_no_models_has_no_vocabulary(tmp_path: Path, model: str) -> None:
    path = Path(write_tokens(tmp_path / "good.safetensors", width=8))
    path.write_bytes(
        with_header(path.read_bytes(), __metadata__={"format": "dtt.tokens/1", "method": "random", "model": model})
    )
    problems: list[str] = []
    for geometry in read_geometry([path], problems):
        assert geometry.vocabulary is None
        assert "\x1b" not in geometry.model
    assert len(problems) < 2


def test_figures_of_tables_with_one_title_have_names_of_their_own(tmp_path: Path) -> None:
    twice = board([row("undefended")])
    files = write_figures(tmp_path, replace(twice, groups=twice.groups * 2))
    assert [path.name for path in files if path.suffix == ".svg"] == [
        "asr-owner-model-alpacafarm_injection.svg",
        "asr-owner-model-alpacafarm_injection-2.svg",
    ]


def test_the_tradeoff_is_drawn_where_answers_are_scored(tmp_path: Path) -> None:
    rows = [row("none", measures={"answered": rate(150)}), row("reminder", (2, 3, 4), measures={"answered": rate(100)})]
    trade = charts.trade_of(board(rows).groups[0])
    assert trade is not None
    marks: list[Any] = list(tradeoff(trade).axes[0].containers)
    points = [(mark.lines[0].get_xdata()[0], mark.lines[0].get_ydata()[0]) for mark in marks]
    assert points == [pytest.approx((100 * 150 / 208, 100 * 90 / 208)), pytest.approx((100 * 100 / 208, 100 * 4 / 208))]
    files = write_figures(tmp_path, board(rows))
    assert "tradeoff-owner-model-alpacafarm_injection.svg" in [path.name for path in files]
    svg = ET.fromstring(str(charts.tradeoff(trade)))
    assert "answered, share of responses" in [text.text for text in svg.iter("text")]

"""`dtt demo`: what it prints is made from what was measured, and its exit code is honest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from dtt_plugin.cli import main
from dtt_plugin.cli.demo import _MODELS
from dtt_plugin.demo import model as demo_models
from dtt_plugin.demo.model import MODELS
from dtt_plugin.demo.run import ARMS, COPIED, MOVED, NATIVE, NONE, Outcome, outcome, sentences, table
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.labels import labelled
from dtt_plugin.leaderboard.lm_eval_files import read_run
from dtt_plugin.tokens.files import load_tokens
from tests.checkpoints import make_checkpoint
from tests.conftest import write_tokens
from tests.lm_eval_output import planted, write_run

N = 24
HITS = dict(zip(ARMS, (18, 17, 12, 0, 17, 0), strict=True))


def measured(folder: Path, hits: Mapping[str, int]) -> Outcome:
    """Return what a demo with so many obeyed injections an arm would have measured."""
    defenses = ("none", "reminder", "sandwich", "tokens", "tokens", "tokens")
    methods = ("", "", "", "trained", "copy", "procrustes")
    runs = []
    for number, (arm, defense, method) in enumerate(zip(ARMS, defenses, methods, strict=True)):
        write_run(
            folder / str(number),
            model="owner/twin" if arm in (COPIED, MOVED) else "owner/model",
            defense=defense,
            method=method,
            outcomes={"ignore": planted(hits[arm], N)},
            refusal=planted(1, N),
            task="injection_demo",
        )
        runs.append(read_run(folder / str(number)))
    runs = labelled(runs)
    return outcome(runs, build(runs))


def test_the_sentences_tell_that_tokens_and_their_transfer_help(tmp_path: Path) -> None:
    found = measured(tmp_path, HITS)
    first, second, third = sentences(found)
    assert "18 of 24 records; Reminder leaves 17 of 24, Sandwich 12 of 24" in first
    assert second.startswith("The trained tokens leave 0 of 24 (p<0.0001")
    assert "copied tokens leave 17 of 24 and transferred ones 0 of 24: the alignment found the rotation" in third
    assert found.shows_the_defense


@pytest.mark.parametrize(
    ("changed", "sentence", "shown"),
    [
        ({NONE: 0}, "says nothing about the tokens", False),
        ({NATIVE: 17}, "do not help here", False),
        ({MOVED: 18}, "the transfer did not work", True),
        ({COPIED: 0}, "even copied tokens help", True),
    ],
)
def test_what_did_not_work_is_said_and_decides_about_the_exit_code(
    changed: dict[str, int], sentence: str, shown: bool, tmp_path: Path
) -> None:
    found = measured(tmp_path, HITS | changed)
    assert sentence in " ".join(sentences(found))
    assert found.shows_the_defense is shown


def test_the_table_has_a_bar_an_interval_and_n_for_each_arm(tmp_path: Path) -> None:
    head, *lines = table(measured(tmp_path, HITS)).splitlines()
    assert [line[:26].strip() for line in lines] == list(ARMS)
    assert "75.0 %  [" in lines[0]
    assert lines[0].count("█") == 18
    assert lines[3].count("█") == 0
    assert "[0.0, 14.2]" in lines[3]
    assert all(line.endswith("4.2 %    24") for line in lines)
    assert max(map(len, (head, *lines))) < 100


def test_every_model_of_the_demo_has_tokens_that_were_trained_for_it() -> None:
    assert tuple(MODELS) == _MODELS
    for model in MODELS.values():
        tokens = load_tokens(model.tokens)
        assert tokens.model == model.hub_id
        assert tokens.method == "trained"


def test_the_demo_runs_six_arms_in_few_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of it on a toy model, which obeys nothing: the demo says so and exits with 1."""
    folder = make_checkpoint(tmp_path / "cache" / "models" / MODELS["smollm2"].name, width=32)
    (folder / demo_models._ORIGIN).write_text("a toy\n")
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(MODELS, "smollm2", demo_models.DemoModel(MODELS["smollm2"].hub_id, (), (), "", Path(tokens)))
    out = tmp_path / "out"
    arguments = ["demo", "--model", "smollm2", "--engine", "dtt_hf", "--limit", "1", "--max-new", "4"]
    assert main([*arguments, "--out", str(out)]) == 1
    told = capfd.readouterr()
    assert all(f"\n{arm} " in told.out for arm in ARMS)
    assert all(f"\n{arm} " in told.err for arm in ARMS)
    assert "a toy" in told.err
    assert "says nothing about the tokens" in " ".join(told.out.split())
    assert len((told.out + told.err).splitlines()) <= 40
    assert (out / "report.html").is_file()
    assert "Running generate_until requests" in (out / "log.txt").read_text()
    assert main([*arguments, "--out", str(out)]) == 1
    assert "load the model" not in capfd.readouterr().err, "nothing is run twice"

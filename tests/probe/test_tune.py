"""`dtt tune`: the search finds an optimum it is given, the gate holds, and the file is what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.cli import main
from dtt_plugin.probe.run import SHIPPED_DATA, ProbeOptions, probe
from dtt_plugin.probe.tune import LENGTHS, MOST_TRIALS, Trial, search
from dtt_plugin.probe.verdict import Effect, Figure
from dtt_plugin.tokens.files import load_tokens
from tests.checkpoints import make_checkpoint
from tests.conftest import write_tokens

pytest.importorskip("torch")
pytest.importorskip("transformers")


def planted(best_length: float, *, guard_helps: bool, kl_per_length: float = 0.1, limit: float = 1.0) -> Any:
    """Return a trial whose loss is least at `best_length`, and whose effect on clean answers grows with length."""

    def trial(length: float, guard: bool) -> Trial:
        loss = math.log(length / best_length) ** 2 - (1.0 if guard == guard_helps else 0.0)
        kl = kl_per_length * length
        return Trial(length, guard, Effect(Figure(loss, 0), Figure(0, 0), Figure(kl, 0)), kl <= limit)

    return trial


def best_of(trials: list[Trial]) -> Trial:
    return min((t for t in trials if t.allowed), key=lambda t: t.effect.loss_attacked.mean)


@pytest.mark.parametrize("length", [0.5, 0.6, 1.0, 1.3, 2.6, 3.0])
@pytest.mark.parametrize("guard", [False, True])
def test_the_search_comes_near_a_planted_optimum(length: float, guard: bool) -> None:
    trials = search(planted(length, guard_helps=guard))
    found = best_of(trials)
    assert len(trials) <= MOST_TRIALS
    assert len({(t.length, t.guard) for t in trials}) == len(trials), "nothing is measured twice"
    assert found.guard is guard
    assert 1 / 1.06 < found.length / length < 1.06
    assert LENGTHS[0] <= min(t.length for t in trials)
    assert max(t.length for t in trials) <= LENGTHS[-1]


def test_what_breaks_the_model_is_not_chosen() -> None:
    trials = search(planted(3.0, guard_helps=False, kl_per_length=0.6))
    found = best_of(trials)
    assert 1.5 <= found.length <= 1 / 0.6
    assert not max(trials, key=lambda t: t.length).allowed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", width=32))


def tuned(model: str, tokens: str, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(["tune", model, "--tokens", tokens, "-o", str(out), "--json", *more]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def lenient(tmp_path: Path, model: str, kl: float = 1e3) -> list[str]:
    """Return options for a reference that allows clean answers to move by 1.5 times `kl`."""
    figure = {"mean": kl, "standard_error": 0.0}
    report = {"format": "dtt.probe/1", "model": model, "tokens": [{"share": 1.0, "effect": {"kl_clean": figure}}]}
    (tmp_path / "source.json").write_text(json.dumps(report))
    return ["--source-report", str(tmp_path / "source.json")]


def test_the_written_file_is_what_was_measured(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = write_tokens(tmp_path / "t.safetensors", width=32, norm=2.0)
    out = tmp_path / "tuned.safetensors"
    report = tuned(model, tokens, out, capsys, *lenient(tmp_path, model))
    found, before, best = load_tokens(out), load_tokens(tokens), report["best"]
    assert report["digest"] == found.digest
    assert {(t["length"], t["guard"]) for t in report["trials"]} >= {(n, g) for n in LENGTHS for g in (False, True)}
    assert best == min(report["trials"], key=lambda t: t["effect"]["loss_attacked"]["mean"])
    np.testing.assert_allclose(found.rows[-before.k :], before.rows * best["length"], rtol=1e-6)
    if best["guard"]:
        embedding = open_checkpoint(model).input_embedding().read().astype(np.float32)
        row = json.loads((Path(model) / "tokenizer.json").read_text())["model"]["vocab"].get(report["guard_token"])
        row = row if row is not None else int(np.argmin(np.abs(embedding - found.rows[0]).sum(axis=1)))
        np.testing.assert_array_equal(found.rows[0], embedding[row])
    assert found.k == before.k + best["guard"]
    noted = found.metadata
    assert (noted["tuned_from_sha256"], noted["tuned_trials"]) == (before.digest, str(len(report["trials"])))
    assert float(noted["tuned_length"]) == pytest.approx(best["length"], rel=1e-5)
    assert noted["tuned_guard"] == ("<|im_start|>" if best["guard"] else "none")
    [probed] = probe(ProbeOptions(model, (out,), SHIPPED_DATA, isometries=2)).tokens
    assert probed.effect.loss_attacked.mean == pytest.approx(best["effect"]["loss_attacked"]["mean"], rel=1e-5)
    assert probed.effect.kl_clean.mean == pytest.approx(float(noted["tuned_kl_clean"]), rel=1e-4)


def test_a_template_without_a_special_token_in_front_gets_no_guard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_checkpoint(tmp_path / "plain", width=32)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}Answer:"
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    report = tuned(str(plain), tokens, tmp_path / "out.safetensors", capsys, *lenient(tmp_path, "m"))
    assert report["guard_token"] is None
    assert not any(trial["guard"] for trial in report["trials"])


def test_bad_input_is_one_sentence_and_writes_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    good, wide = (write_tokens(tmp_path / f"{w}.safetensors", width=w, norm=50.0) for w in (32, 48))

    def refused(message: str, tokens: str, *more: str) -> None:
        assert main(["tune", model, "--tokens", tokens, "-o", str(out), *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
        assert not out.exists()

    refused("has rows of width 48", wide)
    refused("two references; give one", good, "--native", good, "--source-report", good)
    refused("these tokens are not for this model", good, *lenient(tmp_path, model, kl=1e-9))
    refused("can't be read", str(tmp_path / "none.safetensors"))

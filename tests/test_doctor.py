"""`dtt doctor` and the arguments of `dtt`: what works, what does not, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtt_plugin.cli import main
from tests.conftest import write_tokens


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, object]]]:
    code = main(["doctor", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_doctor_finds_a_sound_model_and_its_tokens(
    tiny: str, tiny_tokens: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = findings(capsys, "--model", tiny, "--tokens", tiny_tokens)
    for check in ("models in lm-eval", "tasks in lm-eval", "Hugging Face", "benchmark data", "token file"):
        assert found[check]["ok"], found[check]
    assert "fits" in str(found["token file"]["message"])
    assert found["chat template"]["ok"]


def test_doctor_says_what_to_do(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for dear in ("_models", "_tasks", "_imports", "_route"):  # imports both engines; the test above does
        monkeypatch.setattr(f"dtt_plugin.doctor.{dear}", lambda *_: "")
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path))
    wide = write_tokens(tmp_path / "wide.safetensors", width=64)
    config = Path(tiny) / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "{{ messages[-1].content }}"}))
    code, found = findings(capsys, "--model", tiny, "--tokens", wide)
    assert code == 1
    assert "dtt fetch" in str(found["benchmark data"]["message"])
    assert "has width 32; transfer the tokens" in str(found["token file"]["message"])
    assert "drops or rewrites the system message" in str(found["chat template"]["message"])


def test_bad_input_ends_dtt_with_a_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/nowhere/at all"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dtt inspect: ")
    assert "/nowhere/at all" in error
    assert error.count("\n") == 1


def test_doctor_times_a_model_and_prints_the_command(
    tiny: str, tiny_tokens: str, data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtt_plugin.doctor.examine", lambda *_: iter(()))
    arguments = [tiny, "--tokens", tiny_tokens, "--engine", "dtt_hf", "--seconds", "0.1"]
    code = main(["doctor", *arguments])
    told = capsys.readouterr()
    assert code == 0
    assert "prompt tokens/s" in told.out
    assert "alpacafarm_injection, 832 prompts: " in told.out
    command = told.out.splitlines()[-1].split()
    assert command[:3] == ["lm_eval", "--model", "dtt_hf"]
    assert f"pretrained={tiny},tokens={tiny_tokens},early_decision=True" in command[4]
    assert "load the model" in told.err


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dtt_plugin.sweep.run.run_sweep", interrupted)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(json.dumps({"grid": [{"models": [tiny], "defenses": ["none"]}]}))
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "out")]) == 130
    assert "interrupted; finished cells are kept, and the same command goes on" in capsys.readouterr().err

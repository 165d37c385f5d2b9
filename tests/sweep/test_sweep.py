"""`dtt sweep`: the file is checked, cells are not repeated, an arm that shares a load is the arm loaded alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model

from dtt_plugin.alignment import align
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.cli import main
from dtt_plugin.data.records import TOKENS_FILE
from dtt_plugin.errors import DttError
from dtt_plugin.sweep.file import read_sweep
from dtt_plugin.sweep.run import run_sweep, token_arguments
from dtt_plugin.tokens.files import load_tokens
from dtt_plugin.transfer.move import transfer
from tests.checkpoints import END, change_in_place, default_vocab_tokens, make_checkpoint
from tests.conftest import ROOT, write_tokens
from tests.lm_eval_output import planted, write_run

LLAMAS = ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")


def written(folder: Path, content: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder with a small stand-in for the published tokens."""
    (tmp_path / "data").mkdir()
    tokens = {name: [[float(i + j) for j in range(8)] for i in range(5)] for name in LLAMAS}
    (tmp_path / "data" / TOKENS_FILE).write_text(json.dumps(tokens))
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.usefixtures("published")
def test_the_seed_experiment_has_every_row_of_both_directions(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "seed_experiment.yaml"
    assert main(["sweep", str(path), "--dry-run"]) == 0
    assert "14 cells; 10 models to load" in capsys.readouterr().out
    cells = read_sweep(path)
    for model, other in (LLAMAS, LLAMAS[::-1]):
        of_model = [cell for cell in cells if cell.load.model == model]
        rows = [(cell.defense, cell.load.tokens and cell.load.tokens.method) for cell in of_model]
        prompt_defenses = [("none", None), ("reminder", None), ("sandwich", None)]
        assert rows == [*prompt_defenses, *(("tokens", how) for how in (None, "copy", "random", "procrustes"))]
        assert all(cell.load.prompt_format == "llama3" for cell in of_model)
        assert {cell.load.tokens.source_model for cell in of_model[4:] if cell.load.tokens} == {other}


def test_the_example_for_a_processor_is_valid() -> None:
    assert len(read_sweep(ROOT / "examples" / "prompt_defenses.yaml")) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "the file is no mapping"),
        ({"grid": [{"models": ["m"]}], "tasks": "x"}, "unknown key 'tasks'; it knows engine, task"),
        ({"grid": [{"models": ["m"], "defence": ["none"]}]}, "grid, entry 1 has the unknown key 'defence'"),
        ({"grid": [{"models": "m"}]}, "grid, entry 1, models: is no list"),
        ({"grid": [{"models": []}]}, "models: is no list of names"),
        ({"grid": {}}, "grid: is no list"),
        ({"grid": []}, "grid: is empty"),
        ({}, "grid: is no list"),
        ({"grid": [{"models": ["m"]}], "engine": "vllm"}, "'vllm' is none of dtt_vllm, dtt_hf"),
        ({"grid": [{"models": ["m"]}], "limit": True}, "limit: True is not a positive number"),
        ({"grid": [{"models": ["m"]}], "limit": -1}, "limit: -1 is not a positive number"),
        ({"grid": [{"models": ["m"]}], "model_args": {"tokens": "f"}}, "tokens belongs into the grid"),
        ({"grid": [{"models": ["m"]}], "task": ["a"]}, "is no name"),
        ({"grid": [{"models": ["m"], "defenses": ["tokens"]}]}, "need each other"),
        ({"grid": [{"models": ["m"], "defenses": ["none"], "tokens": ["f"]}]}, "need each other"),
        ({"grid": [{"models": ["m"], "tokens": [{"transfer": {"source": "s"}}]}]}, "tokens: is missing"),
        ({"grid": [{"models": ["m"], "tokens": [{"transfer": {"source": "s", "tokens": "t", "method": "x"}}]}]}, "'x'"),
        ({"grid": [{"models": ["m", "m"]}]}, "the grid has m--none twice"),
        ({"grid": [{"models": ["m"], "prompt_format": ["a"]}]}, "prompt_format: .* is no name"),
        ({"grid": [{"models": ["m"]}], "batch_size": {"a": 1}}, "batch_size: .* is neither"),
        ({"grid": [{"models": [""]}]}, "models: '' is no name"),
        ({"grid": [{"models": ["a\0b"]}]}, "is no name"),
        ({"grid": [{"models": ["m"], "tokens": ["a\0b"]}]}, "is no name"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DttError, match=message) as caught:
        read_sweep(written(tmp_path, content))
    assert str(caught.value).startswith(str(tmp_path / "sweep.yaml"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gen_kwargs: {yes: 1, a: 2}", "gen_kwargs has the key True"),
        ("limit: .nan", "limit: nan is not a positive number"),
        ("limit: .inf", "limit: inf is not a positive number"),
    ],
)
def test_what_yaml_alone_can_say_is_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(f"{line}\ngrid: [{{models: [m], defenses: [none]}}]")
    with pytest.raises(DttError, match=message):
        read_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a x", "line 1: anchors and aliases"),
        ("limit: 1\ntask: *t", "line 2: anchors and aliases"),
        ("x: &x {a: 1}\ngen_kwargs: {<<: *x}", "line 1: anchors and aliases"),
        ("[" * 1000 + "]" * 1000, "nested more than 20 deep"),
        ("{a: " * 100_000, "nested more than 20 deep"),
        ("gen_kwargs: {a: " + "1" * 2000 + "}", "this value is too long"),
        ("limit: 0x" + "f" * 900, "is no list"),  # the grid's: so large a limit is only all records
        ("limit: -0x" + "f" * 900, "is not a positive number"),
        ("task: !!int '" + "1" * 5000 + "'", "this value is too long"),
        ("task: '" + "x" * 200_000 + "'", "this value is too long"),
        ("#" * (1 << 20) + "\na: 1", "is larger than 1 MiB"),
        ("limit: 1\nlimit: 2", "line 2: the key 'limit' is there twice"),
        ("gen_kwargs: {a: {b: 2020-01-01}}", "gen_kwargs, a, b: '2020-01-01' is neither text nor a number"),
        ("gen_kwargs: {a: [!!binary aGk=]}", "is neither text nor a number"),
        ("model_args: {a: !!set {b}}", "is neither text nor a number"),
        ("gen_kwargs: {a: .nan}", "is neither text nor a number"),
        ("model_args: {a: {1: b}}", "model_args, a has the key 1, which is no name"),
        ("a: 2020-13-45", "can't be read as YAML"),
        ("grid:\n" + "- a\n" * 250_000, "the file holds more than 20000 values"),
        ("engine: [" + "a," * 15_000 + "]", "engine: .* is none of"),
        ('gen_kwargs: {a: "\\ud800"}', "line 1: this text holds half a character"),
    ],
)
def test_a_small_file_that_would_cost_much_or_means_something_else_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(DttError, match=message) as caught:
        read_sweep(tmp_path / "sweep.yaml")
    assert str(caught.value).startswith(str(tmp_path / "sweep.yaml"))
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - started < 5


def test_a_bomb_of_aliases_costs_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "sweep.yaml").write_text("gen_kwargs:\n  " + "\n  ".join(lines))
    with pytest.raises(DttError, match="anchors and aliases"):
        read_sweep(tmp_path / "sweep.yaml")


def test_a_pipe_is_no_sweep_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sweep.yaml")
    with pytest.raises(DttError, match="is not a file"):
        read_sweep(tmp_path / "sweep.yaml")


def test_a_grid_of_thousands_is_listed_in_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    path = written(tmp_path, {"grid": [{"models": [f"owner/m{i}" for i in range(3000)], "tokens": [tokens]}]})
    started = time.monotonic()
    assert main(["sweep", str(path), "--dry-run"]) == 0
    assert "12000 cells; 6000 models to load" in capsys.readouterr().out
    assert time.monotonic() - started < 30
    twice = written(tmp_path, {"grid": [{"models": [f"owner/m{i}" for i in range(3000)]}, {"models": ["owner/m7"]}]})
    with pytest.raises(DttError, match="the grid has m7--none twice"):
        read_sweep(twice)


def test_a_model_counts_once_where_all_of_its_tokens_find_places_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtt_plugin.sweep.loads.untried", lambda: None)  # whatever vLLM is installed
    files = [write_tokens(tmp_path / f"{name}.safetensors", width=32, seed=ord(name)) for name in "abab"]
    model = str(make_checkpoint(tmp_path / "model", reserved=12))
    full = str(make_checkpoint(tmp_path / "full"))

    def loads(tokens: list[str], **more: Any) -> str:
        content = {"grid": [{"models": [more.pop("model", model)], "tokens": sorted(set(tokens))}], **more}
        assert main(["sweep", str(written(tmp_path, content)), "--dry-run"]) == 0
        return capsys.readouterr().out.strip().rpartition("; ")[2]

    assert loads(files) == "1 models to load."
    assert loads([*files, write_tokens(tmp_path / "c.safetensors", width=32)]) == "4 models to load."  # 12 < 15 ids
    assert loads(files, model=full) == "3 models to load."
    assert loads(files, engine="dtt_hf") == "3 models to load."
    assert loads(files, model_args={"baked": True}) == "3 models to load."
    assert loads(files, model_args={"kv_transfer_config": "{}"}) == "3 models to load."
    monkeypatch.setattr("dtt_plugin.sweep.loads.untried", lambda: "vLLM 9.9 was not tried.")
    assert loads(files) == "3 models to load."


def test_settings_that_hold_themselves_are_refused_and_a_long_name_is_only_shortened(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("gen_kwargs: &a {x: *a}\ngrid: [{models: [m], defenses: [none]}]")
    with pytest.raises(DttError, match="are no plain values"):
        read_sweep(tmp_path / "sweep.yaml")
    [cell] = read_sweep(written(tmp_path, {"grid": [{"models": ["m" * 300], "defenses": ["none"]}]}))
    assert len(cell.folder(tmp_path).name) < 100


def test_results_that_have_no_place_to_go_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    sweep = written(tmp_path, {"grid": [{"models": ["m"], "defenses": ["none"]}]})
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "file")]) == 2
    assert "can't be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a: [", "a: !!python/object/apply:os.system ['true']", "\x00"])
def test_what_is_no_plain_yaml_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(DttError, match=r"sweep.yaml can't be read as YAML"):
        read_sweep(tmp_path / "sweep.yaml")


def test_an_unknown_defense_or_token_file_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"grid": [{"models": ["m"], "defenses": ["remainder"]}]}
    assert main(["sweep", str(written(tmp_path, bad)), "--dry-run"]) == 2
    assert "did you mean 'reminder'" in capsys.readouterr().err
    bad = {"grid": [{"models": ["m"], "tokens": ["absent.safetensors"]}]}
    assert main(["sweep", str(written(tmp_path, bad)), "--dry-run"]) == 2
    assert "absent.safetensors can't be read" in capsys.readouterr().err


def test_a_key_changes_with_everything_that_decides_about_the_result(tiny: str, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)

    def keys(**changes: Any) -> set[str]:
        entry = {"models": [tiny], "tokens": [tokens]} | changes.pop("entry", {})
        return {cell.key for cell in read_sweep(written(tmp_path, {"grid": [entry]} | changes))}

    before = keys()
    assert len(before) == 4
    assert keys() == before
    for changes in (
        {"limit": 3},
        {"task": "injection_demo"},
        {"engine": "dtt_hf"},
        {"gen_kwargs": {"max_gen_toks": 3}},
        {"model_args": {"early_decision": True}},
        {"entry": {"prompt_format": "llama3"}},
    ):
        assert keys(**changes).isdisjoint(before), changes
    write_tokens(tmp_path / "t.safetensors", width=32, seed=1)
    assert len(keys() & before) == 3, "new values under the same name: only the row with tokens is new"
    rewritten = (Path(tiny) / "config.json").read_bytes()
    os.utime(Path(tiny) / "config.json")
    assert len(keys() & before) == 3, "the same contents"
    (Path(tiny) / "config.json").write_bytes(rewritten.replace(b"1e-05", b"2e-05"))
    assert keys().isdisjoint(before)


def test_a_key_changes_with_the_model_that_tokens_are_transferred_from(tiny: str, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    transfer = {"source": str(source), "tokens": write_tokens(tmp_path / "t.safetensors", width=32)}
    content = {"grid": [{"models": [tiny], "defenses": ["tokens"], "tokens": [{"transfer": transfer}]}]}
    before = read_sweep(written(tmp_path, content))[0].key
    change_in_place(source / "model.safetensors")
    assert read_sweep(written(tmp_path, content))[0].key != before


def test_a_key_changes_with_an_adapter_and_with_the_commit_of_a_hub_model(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("one")
    content: dict[str, Any] = {"grid": [{"models": [tiny], "defenses": ["none"]}]}
    content["model_args"] = {"peft": str(tmp_path / "adapter")}
    before = read_sweep(written(tmp_path, content))[0].key
    change_in_place(tmp_path / "adapter" / "adapter_model.safetensors")
    assert read_sweep(written(tmp_path, content))[0].key != before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    keys = set()
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        hub = {"grid": [{"models": ["owner/name"], "defenses": ["none"]}]}
        keys.add(read_sweep(written(tmp_path, hub))[0].key)
        keys.add(read_sweep(written(tmp_path, hub | {"model_args": {"revision": "a" * 40}}))[0].key)
    assert len(keys) == 3


def test_the_table_at_the_end_is_that_of_the_files_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path, {"grid": [{"models": ["m"], "defenses": ["none", "reminder"]}]}), tmp_path / "out"
    for cell in read_sweep(path):
        write_run(cell.folder(out), model="m", defense=cell.defense, outcomes={"ignore": planted(40, 90)})
    write_run(out / "runs" / "stale", model="stale", outcomes={"ignore": planted(40, 90)})
    assert main(["sweep", str(path), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "reminder" in shown
    assert "stale" not in shown


def test_an_arm_that_shares_a_load_is_the_arm_loaded_alone(tiny: str, tiny_tokens: str) -> None:
    create = get_model("dtt_hf").create_from_arg_obj
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    for first, second in (("none", "sandwich"), ("reminder", "none"), ("tokens", "reminder+tokens")):
        arguments = {"pretrained": tiny, "dtype": "float32"} | ({"tokens": tiny_tokens} if "tokens" in first else {})
        shared = create(arguments | {"defense": first})
        alone = create(arguments | {"defense": second})
        assert shared.fingerprint != alone.fingerprint
        shared.change_arm(tokens=arguments.get("tokens"), defense=second)
        assert shared.fingerprint == alone.fingerprint
        assert shared.get_model_info()["dtt_plugin"] == alone.get_model_info()["dtt_plugin"]
        assert shared.apply_chat_template(messages) == alone.apply_chat_template(messages)
    with pytest.raises(DttError, match=r"loaded for defense='reminder\+tokens'; load it anew for 'none'"):
        shared.change_arm(defense="none")


def test_every_load_fails_for_itself_and_the_rest_ends_in_the_table(
    tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A transfer with procrustes runs; beside it fail another width, absent and damaged files, a model that breaks."""
    make_checkpoint(tmp_path / "wide", width=64, seed=2)
    make_checkpoint(tmp_path / "other", seed=3)
    alien = ["!" + token for token in default_vocab_tokens()]
    make_checkpoint(tmp_path / "alien", seed=4, vocab_tokens=alien, special=["<a>", "<b>", END])
    shutil.copytree(tiny, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "damaged.safetensors").write_text("x")
    good, wide = (write_tokens(tmp_path / f"{width}.safetensors", width=width) for width in (32, 64))

    def moved(source: str, tokens: str, method: str = "procrustes") -> dict[str, Any]:
        return {"transfer": {"source": str(tmp_path / source), "tokens": tokens, "method": method}}

    tokens = [
        moved("wide", wide),
        moved("alien", good),
        moved("absent", good),
        moved("other", wide),
        moved("broken", good),
        str(tmp_path / "absent.safetensors"),
        str(tmp_path / "damaged.safetensors"),
        moved("other", good),
    ]
    content = {
        "engine": "dtt_hf",
        "task": "injection_demo",
        "limit": 1,
        "gen_kwargs": {"max_gen_toks": 4},
        "model_args": {"dtype": "float32", "device": "cpu", "max_length": 4096},
        "grid": [
            {"models": [str(tmp_path / "nowhere"), "owner/nowhere", str(tmp_path / "broken")], "defenses": ["none"]},
            {"models": [tiny], "defenses": ["tokens"], "tokens": tokens},
        ],
    }
    path, out = written(tmp_path, content), tmp_path / "out"
    assert main(["sweep", str(path), "--dry-run"]) == 2
    assert "2 of 11 cells can't be run: " in capfd.readouterr().err
    assert main(["sweep", str(path), "--out", str(out)]) == 2
    told = capfd.readouterr()
    assert "tokens (procrustes)" in told.out, "the leaderboard of what has run"
    for sentence in (
        "nowhere is no folder",
        "is 64 wide and that of",
        "The rows are 64 wide",
        "1 anchors can't determine a map",
        "absent",
        "damaged.safetensors",
    ):
        assert sentence in told.err
    assert "10 of 11 cells failed" in told.err
    (results,) = (out / "runs").rglob("results_*.json")
    facts = json.loads(results.read_text())["config"]["dtt_plugin"]
    expected = transfer(
        load_tokens(good),
        align(open_checkpoint(str(tmp_path / "other")), open_checkpoint(tiny)),
        method="procrustes",
        target_model=tiny,
    )
    assert facts["tokens_sha256"] == expected.digest
    assert facts["tokens_method"] == "procrustes"


def test_transferred_tokens_that_were_damaged_are_transferred_again(tiny: str, tmp_path: Path) -> None:
    transfer = {"source": tiny, "tokens": write_tokens(tmp_path / "t.safetensors", width=32), "method": "random"}
    content = {"grid": [{"models": [tiny], "defenses": ["tokens"], "tokens": [{"transfer": transfer}]}]}
    (cell,) = read_sweep(written(tmp_path, content))
    assert cell.load.tokens
    file = Path(token_arguments(cell.load, cell.load.tokens, tmp_path / "out")["tokens"])
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    assert token_arguments(cell.load, cell.load.tokens, tmp_path / "out") == {"tokens": str(file)}
    assert file.read_bytes() == whole


def test_what_changes_while_the_sweep_runs_is_not_filed_under_the_old_state(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    path = written(tmp_path, {"grid": [{"models": [tiny], "defenses": ["tokens"], "tokens": [tokens]}]})
    for change in (
        lambda: write_tokens(tmp_path / "t.safetensors", width=32, seed=1),
        lambda: change_in_place(Path(tiny) / "model.safetensors"),
    ):
        (cell,) = read_sweep(path)
        assert not cell.is_finished(tmp_path / "out")
        change()
        assert run_sweep([cell], tmp_path / "out") == [cell]
        assert "were changed while the sweep ran; start it again" in capsys.readouterr().err


def start(path: Path, out: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from dtt_plugin.cli import main; raise SystemExit(main())",
        "sweep",
        str(path),
        "--out",
        str(out),
    ]
    return subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True, stderr=subprocess.PIPE)


def finished(out: Path) -> dict[str, int]:
    """Return the finished cells' folders with the time of their results files."""
    files = (out / "runs").glob("*/*/results_*.json")
    return {path.parts[-3]: path.stat().st_mtime_ns for path in files}


def test_a_killed_sweep_goes_on_where_it_was_and_leaves_no_process(tiny: str, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    transferred = {"transfer": {"source": tiny, "tokens": tokens, "method": "random"}}
    content = {
        "engine": "dtt_hf",
        "task": "injection_demo",
        "limit": 1,
        "batch_size": 4,
        "gen_kwargs": {"max_gen_toks": 4},
        "model_args": {"dtype": "float32", "device": "cpu", "max_length": 4096},
        "grid": [
            {"models": [tiny], "defenses": ["none", "sandwich"]},
            {"models": [str(other)], "tokens": [transferred]},
        ],
    }
    path, out = written(tmp_path, content), tmp_path / "out"
    sweep = start(path, out)
    deadline = time.monotonic() + 300
    while not finished(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.communicate()  # returns when the engine's process is gone, too: it holds the same pipe
    before = finished(out)
    assert 1 <= len(before) < 6
    sweep = start(path, out)
    _, errors = sweep.communicate(timeout=500)
    assert sweep.returncode == 0, errors
    after = finished(out)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before, "a finished cell was repeated"
    for folder in (out / "runs").glob("*"):
        (results,) = folder.rglob("results_*.json")
        (samples,) = folder.rglob("samples_*.jsonl")
        config = json.loads(results.read_text())["config"]
        assert config["dtt_plugin"]["defense"] == folder.name.split("--")[1] == config["model_args"]["defense"]
        assert config["model"] == "dtt_hf"
        assert len(json.loads(samples.read_text().splitlines()[0])["resps"]) == 4
    assert not list((out / "partial").iterdir())
    sweep = start(path, out)
    sweep.communicate(timeout=100)
    assert finished(out) == after

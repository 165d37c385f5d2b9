"""`dtt sweep --ray` on real clusters of this machine: nothing that is finished is lost, and all else is told.

A double stands for the engine alone (`stub_engine`): Ray, the sweep's processes, lm-eval and its files are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from inspect import signature
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from dtt_plugin.cli import main
from dtt_plugin.errors import DttError
from dtt_plugin.model_wrappers.defended import Defended
from dtt_plugin.progress import Bar
from dtt_plugin.sweep import ray_cells
from dtt_plugin.sweep.file import read_sweep
from dtt_plugin.sweep.resources import Resources, read_resources
from dtt_plugin.sweep.run import job_of, owned
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT, write_tokens
from tests.sweep.stub_engine import BEHAVIOUR, StubEngine

ray = pytest.importorskip("ray")


class Machines:
    """A cluster of this machine: a head that computes nothing, and workers of one task each.

    Args:
        double: stands for the engine.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, double: bool = True) -> None:
        from ray.cluster_utils import Cluster

        self.folder = folder
        self.runs = folder / "runs.jsonl"
        if double:
            (folder / "sitecustomize.py").write_text(
                "from dtt_plugin import _startup\n_startup.MODELS['dtt_hf'] = 'tests.sweep.stub_engine:StubEngine'\n"
            )
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
        patch.setenv("STUB_RUNS", str(self.runs))
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # what else this machine does is no part of the test
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
        self.nodes: list[Any] = []

    def add(self, name: str = "") -> Any:
        node = self.cluster.add_node(num_cpus=1, object_store_memory=100 << 20, env_vars={"STUB_NODE": name})
        self.nodes.append(node)
        return node

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def runs_of_cells(self) -> list[tuple[str, int]]:
        """Return the defense and the engine's process of every cell that was begun."""
        lines = self.runs.read_text().splitlines() if self.runs.is_file() else []
        return [tuple(json.loads(line)) for line in lines]

    def counts(self) -> Counter[str]:
        return Counter(defense for defense, _ in self.runs_of_cells())

    def end(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with pytest.MonkeyPatch.context() as patch:
        started = Machines(tmp_path_factory.mktemp("cluster"), patch)
        started.add("full")
        started.add("whole")
        yield started
        started.end()


@pytest.fixture
def machines(cluster: Machines) -> Machines:
    """Two workers, on one of which the disk is full for models that care."""
    cluster.runs.unlink(missing_ok=True)
    return cluster


def model(folder: Path, **behaviour: Any) -> str:
    make_checkpoint(folder)
    (folder / BEHAVIOUR).write_text(json.dumps(behaviour))
    return str(folder)


def grid(folder: Path, *entries: dict[str, Any], **more: Any) -> Path:
    path = folder / "sweep.yaml"
    content = {"engine": "dtt_hf", "task": "injection_demo", "limit": 1, **more, "grid": list(entries)}
    path.write_text(yaml.safe_dump(content))
    return path


def finished(out: Path) -> set[str]:
    return {file.parents[1].name for file in out.glob("runs/*/*/results_*.json")}


@pytest.mark.slow
def test_every_finished_cell_is_kept_and_every_other_is_tried_once_more(
    machines: Machines, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    good = model(tmp_path / "good")
    # A cell that is finished in the same instant as its machine dies may run again.
    once: dict[str, Any] = {"until": str(tmp_path / "was-killed"), "once": True}
    before_it = str(tmp_path / "out" / "runs" / "killed--reminder*")
    killed = model(tmp_path / "killed", fail="worker is killed", at="sandwich", after=before_it, **once)
    before_it = str(tmp_path / "out" / "runs" / "memory--incontext*")
    more = str(tmp_path / "more-memory")
    memory = model(tmp_path / "memory", fail="out of memory", at="isolation", after=before_it, until=more)
    disk = model(tmp_path / "disk", fail="disk is full on one machine", seconds=1)
    path = grid(
        tmp_path,
        {"models": [good], "tokens": [tokens], "defenses": ["none", "tokens"]},
        {"models": [killed], "defenses": ["reminder", "sandwich"]},
        {"models": [memory], "defenses": ["incontext", "isolation"]},
        {"models": [disk], "defenses": ["instructional"]},
    )
    out = tmp_path / "out"
    code = main(["sweep", str(path), "--out", str(out), "--ray", machines.address])
    told = capfd.readouterr()
    cells = {cell.defense: cell.folder(out).name for cell in read_sweep(path)}
    assert code == 2, told.err
    assert "1 of 7 cells failed" in told.err, told.err.replace("\r", "\n")
    assert "memory--isolation can't be run: its process was ended by SIGKILL; is there enough memory?" in told.err
    assert finished(out) == set(cells.values()) - {cells["isolation"]}
    runs = machines.counts()
    assert runs["reminder"] == runs["incontext"] == runs["none"] == 1, "finished cells are not run again"
    assert runs["sandwich"] == runs["isolation"] == 2, "once more"
    assert 1 <= runs["instructional"] <= 2, "elsewhere, if it came to the full disk first"
    assert {path.stem for path in (out / "logs").iterdir()} >= set(cells.values()), "a log for each, failed ones too"
    assert not (out / "partial").exists() or not list((out / "partial").iterdir())
    assert not list(Path("/tmp").glob("dtt-sweep-*/runs/good*")), "nothing stays on the machines"
    results = json.loads(next((out / "runs" / cells["tokens"]).rglob("results_*.json")).read_text())
    assert results["config"]["model_args"]["defense"] == "tokens"

    before = machines.counts()
    (tmp_path / "more-memory").touch()
    assert main(["sweep", str(path), "--out", str(out), "--ray", machines.address]) == 0
    after = machines.counts()
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {"isolation": 1}


def test_the_double_takes_what_the_engine_takes() -> None:
    assert signature(StubEngine.change_arm) == signature(Defended.change_arm)


def test_two_sweeps_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = grid(tmp_path, {"models": [model(tmp_path / "m")], "defenses": ["none"]})
    with owned(tmp_path / "out"):
        assert main(["sweep", str(path), "--out", str(tmp_path / "out"), "--ray"]) == 2
    assert "Another sweep runs in" in capsys.readouterr().err


def test_what_an_engine_prints_behind_its_last_cell_goes_into_that_cells_log(tmp_path: Path) -> None:
    path = grid(tmp_path, {"models": [model(tmp_path / "m")], "defenses": ["none"]})
    cells, out = read_sweep(path), tmp_path / "out"
    folder = cells[0].folder(out)
    (out / "partial").mkdir(parents=True)
    sweep = ray_cells._Sweep(ray, out, Resources(), Bar(total=1, disable=True))
    task = ray_cells._Task(cells[0].load, cells, {}, {}, tries=2)
    sweep._take(task, {"key": cells[0].key, "files": {"x/results_1.json": b"{}"}, "log": "the cell\n"})
    sweep._take(task, {"log": "the engine ends\n"})
    assert cells[0].is_finished(out)
    assert (out / "logs" / f"{folder.name}.txt").read_text() == "the cell\nthe engine ends\n"
    assert task.tries == 1, "whatever fails next fails for the first time"


def start(path: Path, out: Path, address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from dtt_plugin.cli import main; raise SystemExit(main())"]
    command += ["sweep", str(path), "--out", str(out), "--ray", address]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, start_new_session=True)


def wait_for(what: Callable[[], Any], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_leaves_no_engine(machines: Machines, tmp_path: Path) -> None:
    slow = model(tmp_path / "slow", seconds=300, at="sandwich")
    path, out = grid(tmp_path, {"models": [slow], "defenses": ["none", "sandwich"]}), tmp_path / "out"
    sweep = start(path, out, machines.address)
    wait_for(lambda: machines.counts()["sandwich"] and len(finished(out)) == 1)
    with pytest.raises(DttError, match="Another sweep runs in"), owned(out):
        pass
    sweep.send_signal(signal.SIGINT)
    _, told = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, told
    assert "Traceback" not in told
    assert len(finished(out)) == 1
    (engine,) = {process for _, process in machines.runs_of_cells()}
    wait_for(lambda: is_gone(engine), 60)


def test_a_machine_that_has_another_model_there_is_told(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file changes when the sweep's own machine has looked at it for the last time."""
    other = model(tmp_path / "other")
    path, out = grid(tmp_path, {"models": [other], "defenses": ["none"]}), tmp_path / "out"

    def prepare(*arguments: Any) -> Any:
        job = job_of(*arguments)
        (tmp_path / "other" / "config.json").write_text("{}")
        return job

    monkeypatch.setattr(ray_cells, "job_of", prepare)
    assert main(["sweep", str(path), "--out", str(out), "--ray", machines.address]) == 2
    assert f"has another state of {other} or its adapters" in capfd.readouterr().err
    assert machines.counts() == {}


def test_without_ray_or_without_a_cluster_a_sentence_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = grid(tmp_path, {"models": [str(make_checkpoint(tmp_path / "m"))], "defenses": ["none"]})
    arguments = ["sweep", str(path), "--out", str(tmp_path / "out"), "--ray"]
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments) == 2
    assert "--ray needs Ray: pip install 'dtt-plugin[ray]'." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ([1], "resources: is no mapping"),
        ({"gpu": 1}, "unknown key 'gpu'; it knows cpus, gpus, memory_gib"),
        ({"cpus": 0}, "resources, cpus: '0' is no amount"),
        ({"gpus": -1}, "'-1' is no amount"),
        ({"memory_gib": "20G"}, "'20G' is no amount"),
        ({"cpus": True}, "'True' is no amount"),
    ],
)
def test_resources_are_amounts(resources: Any, message: str, tmp_path: Path) -> None:
    path = grid(tmp_path, {"models": ["m"], "defenses": ["none"]}, resources=resources)
    with pytest.raises(DttError, match=message):
        read_sweep(path)


def test_resources_do_not_change_a_key_and_reach_the_cluster(tmp_path: Path) -> None:
    entry = {"models": ["m"], "defenses": ["none"]}
    (plain,) = read_sweep(grid(tmp_path, entry))
    path = grid(tmp_path, entry, resources={"cpus": 4, "gpus": 0, "memory_gib": 1.5})
    (asked,) = read_sweep(path)
    assert plain.key == asked.key
    assert read_resources(path) == Resources(4, 0, 1.5)


@pytest.mark.slow
def test_a_machine_that_dies_loses_no_finished_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(tmp_path, monkeypatch)
    machines.add()
    slow = model(tmp_path / "slow", seconds=300, at="sandwich", until=str(tmp_path / "tried"), once=True)
    path, out = grid(tmp_path, {"models": [slow], "defenses": ["none", "sandwich"]}), tmp_path / "out"
    sweep = start(path, out, machines.address)
    wait_for(lambda: machines.counts()["sandwich"] == 1 and len(finished(out)) == 1)
    machines.cluster.remove_node(machines.nodes.pop(), allow_graceful=False)
    machines.add()
    _, told = sweep.communicate(timeout=600)
    machines.end()
    assert sweep.returncode == 0, told
    assert "slow--sandwich can't be run: " in told
    assert "tried once more" in told
    assert machines.counts() == {"none": 1, "sandwich": 2}
    assert len(finished(out)) == 2


@pytest.mark.slow
def test_a_head_that_dies_loses_no_finished_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    machines = Machines(tmp_path, monkeypatch)
    machines.add()
    slow = model(tmp_path / "slow", seconds=300, at="sandwich", until=str(tmp_path / "go on"))
    path, out = grid(tmp_path, {"models": [slow], "defenses": ["none", "sandwich", "reminder"]}), tmp_path / "out"
    sweep = start(path, out, machines.address)
    wait_for(lambda: machines.counts()["sandwich"] == 1 and len(finished(out)) == 1)
    machines.cluster.head_node.kill_gcs_server()
    sweep.communicate(timeout=600)
    assert sweep.returncode != 0
    machines.end()
    assert len(finished(out)) == 1
    (tmp_path / "go on").touch()
    machines = Machines(tmp_path, monkeypatch)
    machines.add()
    sweep = start(path, out, machines.address)
    _, told = sweep.communicate(timeout=600)
    machines.end()
    assert sweep.returncode == 0, told
    assert machines.counts() == {"none": 1, "sandwich": 2, "reminder": 1}
    assert len(finished(out)) == 3


@pytest.mark.slow
def test_two_hundred_cells_on_four_workers_cost_little_more_than_their_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = Machines(tmp_path, monkeypatch)
    for _ in range(4):
        machines.add()
    names = ["incontext", "instructional", "reminder", "isolation", "sandwich"]
    defenses = ["none", *("+".join(some) for n in range(1, 6) for some in combinations(names, n))][:25]
    models = [model(tmp_path / f"m{number}") for number in range(8)]
    path, out = grid(tmp_path, {"models": models, "defenses": defenses}), tmp_path / "out"
    started = time.monotonic()
    assert main(["sweep", str(path), "--out", str(out), "--ray", machines.address]) == 0
    seconds = time.monotonic() - started
    assert len(finished(out)) == 200
    results = [json.loads(path.read_text()) for path in out.glob("runs/*/*/results_*.json")]
    own = sum(float(result["total_evaluation_time_seconds"]) for result in results)
    print(f"{seconds:.1f} s for 200 cells, {own:.1f} s of evaluation on 4 workers")
    assert seconds - own / 4 < 0.5 * 200
    machines.end()


@pytest.mark.slow
def test_two_workers_are_faster_than_one_and_answer_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real engine: four tiny models, two cells each."""
    machines = Machines(tmp_path, monkeypatch, double=False)
    models = [str(make_checkpoint(tmp_path / f"m{number}", seed=number)) for number in range(4)]
    for name in models:
        config = json.loads((Path(name) / "config.json").read_text())
        (Path(name) / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    entry = {"models": models, "defenses": ["none", "sandwich"]}
    path = grid(tmp_path, entry, limit=4, gen_kwargs={"max_gen_toks": 64}, batch_size=8)
    seconds, answers = [], []
    for workers in (1, 2):
        machines.add()
        out = tmp_path / f"out{workers}"
        started = time.monotonic()
        assert main(["sweep", str(path), "--out", str(out), "--ray", machines.address]) == 0
        seconds.append(time.monotonic() - started)
        samples = sorted(out.glob("runs/*/*/samples_*.jsonl"))
        answers.append([[json.loads(line)["resps"] for line in file.read_text().splitlines()] for file in samples])
    machines.end()
    print(f"8 cells in 4 loads: {seconds[0]:.1f} s on one worker, {seconds[1]:.1f} s on two")
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]

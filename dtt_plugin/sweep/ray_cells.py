"""Runs the cells of a sweep on a Ray cluster: a task for each model in memory, its results fetched back cell by cell.

A task evaluates in a process of its own, as a sweep on one machine does, and writes to its machine's temporary folder.
What is finished travels here at once; so nothing needs a shared disk, and nothing that is finished is lost with a
machine. Models are read where the task runs: from the same path, or from its hub cache.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from dtt_plugin import __version__
from dtt_plugin.data.records import DATA_DIR_VARIABLE
from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import write_json
from dtt_plugin.progress import Bar
from dtt_plugin.quiet import run_quietly
from dtt_plugin.sweep.file import Cell, Load
from dtt_plugin.sweep.resources import Resources
from dtt_plugin.sweep.run import WORKER, failure, job_of, owned

TRIES = 2
_LOOK_SECONDS = 0.2
_LOG = "log.txt"
# Engine arguments whose product is the number of GPUs that one engine takes.
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


# Here ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Task:
    """The cells that share one model in memory."""

    load: Load
    cells: list[Cell]
    job: dict[str, Any]
    files: dict[str, bytes]
    tries: int = 0
    """Since the last cell that was finished."""
    node: str | None = None
    """Where the last try ran; the next avoids it."""


def run_sweep_on_ray(
    cells: Sequence[Cell], out: Path, *, address: str | None = None, resources: Resources | None = None
) -> list[Cell]:
    """Run the cells that are not finished yet on a Ray cluster, and return those that failed.

    A failure does not stop other cells. Cells whose machine, process or disk fails are tried once more, on another
    machine where there is one.

    Args:
        cells: of a sweep file.
        out: the sweep's folder, on this machine; logs are in `logs` there, a file a cell.
        address: of a running cluster, as `ray.init` takes it; None is RAY_ADDRESS or a cluster of this machine.
        resources: what a task asks for.

    Raises:
        DttError: Ray is not installed or not to be reached, another sweep runs in `out`, or it is no folder.
    """
    with owned(out), _cluster(address) as ray, Bar(desc="cells", unit="cell", total=0, delay=0) as bar:
        sweep = _Sweep(ray, out, resources or Resources(), bar)
        try:
            for load, group in groupby(cells, key=lambda cell: cell.load):
                sweep.add(load, list(group))
            while sweep.running:
                sweep.advance()
        finally:
            sweep.cancel()
    return sweep.failed


class _Sweep:
    def __init__(self, ray: Any, out: Path, resources: Resources, bar: Any) -> None:
        self._ray, self._out, self._resources, self._bar = ray, out, resources, bar
        self.running: dict[Any, _Task] = {}
        """Stream of results to the task."""
        self.failed: list[Cell] = []

    def add(self, load: Load, cells: Sequence[Cell]) -> None:
        """Start the task of those `cells` that are not finished."""
        pending = list(cells)
        try:
            pending = [cell for cell in cells if not cell.is_finished(self._out)]
            if not pending:
                return
            job = job_of(load, pending, self._out, lambda event: None)
            files = {}
            if tokens := job["cells"][0]["arm"].get("tokens"):  # of one load, so the same in every cell
                files["tokens"] = Path(tokens).read_bytes()
                for cell in job["cells"]:
                    cell["arm"]["tokens"] = Path(tokens).name
            self._bar.total += len(pending)
            self._start(_Task(load, pending, job, files))
        except Exception as error:  # whatever it is: it concerns this load, and others take hours
            self._fail(pending, str(error) if isinstance(error, DttError) else f"{type(error).__name__}: {error}")

    def advance(self) -> None:
        """Wait for news of the tasks, and act on them."""
        ready, _ = self._ray.wait(list(self.running), num_returns=1, timeout=10)
        for stream in ready:
            task = self.running[stream]
            try:
                news = self._ray.get(next(stream))
            except StopIteration:
                self._ended(stream, "its process ended without results")
            except self._ray.exceptions.RayError as error:  # the machine or the worker died
                self._ended(stream, " ".join(str(error).split()).split(". ")[0][:300])
            else:
                task.node = news.get("node", task.node)
                self._take(task, news)
                if "error" in news:
                    self._ended(stream, news["error"])
        self._bar.set_postfix_str(f"{len(self.running)} tasks, {len(self.failed)} failed")

    def cancel(self) -> None:
        """Stop what still runs."""
        for stream in self.running:
            with suppress(Exception):
                self._ray.cancel(stream, force=True)

    def _start(self, task: _Task) -> None:
        task.tries += 1
        options: dict[str, Any] = {
            "num_cpus": self._resources.cpus or 1,
            "num_gpus": self._gpus(task),
        }
        if self._resources.memory_gib:
            options["memory"] = int(self._resources.memory_gib * 2**30)
        if other := self._other_node(task.node, options):
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            # Waits for that machine while it is busy; if it is gone, any other will do.
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(other, soft=True)
        remote = self._ray.remote(run_cells).options(num_returns="streaming", max_retries=0, **options)
        environment = {name: os.environ[name] for name in (DATA_DIR_VARIABLE, "HF_HUB_OFFLINE") if name in os.environ}
        stream = remote.remote(__version__, task.load, task.job, task.files, environment)
        self.running[stream] = task

    def _other_node(self, node: str | None, options: Mapping[str, Any]) -> str | None:
        """Return a machine other than `node` that can hold a task of these options, if `node` is one and there is."""
        needs = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options.get("memory", 0)}
        others = [
            other["NodeID"]
            for other in (self._ray.nodes() if node else ())
            if other["Alive"]
            and other["NodeID"] != node
            and all(other["Resources"].get(name, 0) >= amount for name, amount in needs.items())
        ]
        return random.choice(others) if others else None

    def _gpus(self, task: _Task) -> float:
        if self._resources.gpus is not None:
            return self._resources.gpus
        wanted = 1
        for name in _PARALLEL:
            wanted *= int(task.load.model_args.get(name, 1))
        return wanted if self._ray.cluster_resources().get("GPU") else 0

    def _take(self, task: _Task, news: Mapping[str, Any]) -> None:
        """Write what a task sends: the files of a finished cell, and what was printed since the last one."""
        cell = next((cell for cell in task.cells if cell.key == news.get("key")), None)
        if news.get("log"):
            # Behind the last cell an engine still prints that it ends.
            unfinished = (cell for cell in task.cells if not cell.is_finished(self._out))
            of = cell or next(unfinished, task.cells[-1])
            log = self._out / "logs" / f"{of.folder(self._out).name}.txt"
            log.parent.mkdir(exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(news["log"])
        if cell is None:
            return
        folder = cell.folder(self._out)
        partial = self._out / "partial" / folder.name
        for name, content in news["files"].items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        write_json(partial / "cell.json", {"key": cell.key, "defense": cell.defense, "job": task.job})
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        partial.rename(folder)
        task.tries = 1
        self._bar.update()

    def _ended(self, stream: Any, reason: str) -> None:
        """Try once more what a task has not finished, or say why it fails."""
        task = self.running.pop(stream)
        task.cells = [cell for cell in task.cells if not cell.is_finished(self._out)]
        if not task.cells:
            return
        if task.tries < TRIES:
            unfinished = {cell.key for cell in task.cells}
            task.job["cells"] = [cell for cell in task.job["cells"] if cell["key"] in unfinished]
            self._say(f"{failure(task.cells, reason)} They are tried once more.")
            self._start(task)
        else:
            self._fail(task.cells, reason)

    def _fail(self, cells: Sequence[Cell], reason: str) -> None:
        self.failed += cells
        self._say(failure(cells, reason))

    def _say(self, line: str) -> None:
        self._bar.clear()
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Yield the module `ray`, connected; what was connected before stays so.

    Raises:
        DttError: it is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise DttError("--ray needs Ray: pip install 'dtt-plugin[ray]'.") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:300]
        raise DttError(f"--ray {address or ''}: no Ray cluster can be reached or started ({reason}).") from error
    try:
        yield ray
    finally:
        ray.shutdown()


# On a machine of the cluster ----------------------------------------------------------------------------------------


def run_cells(
    version: str, load: Load, job: dict[str, Any], files: Mapping[str, bytes], environment: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Evaluate the cells of `job` and yield each as soon as it is finished: its key, files and log; at last an error.

    Args:
        version: of this package, where the sweep runs.
        load: what the cells share, with the state of the model that it has there.
        job: for `dtt_plugin.sweep.worker`; of the tokens it has the file's name.
        files: the content of the token file, under "tokens", if there is one.
        environment: variables to set.
    """
    import ray

    os.environ.update(environment)
    yield {"node": ray.get_runtime_context().get_node_id()}
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="dtt-sweep-"))
        _check_same(version, load)
        if "tokens" in files:
            tokens = folder / job["cells"][0]["arm"]["tokens"]
            tokens.write_bytes(files["tokens"])
            for cell in job["cells"]:
                cell["arm"]["tokens"] = str(tokens)
        for cell in job["cells"]:
            cell["folder"] = str(folder / "runs" / Path(cell["folder"]).name)
        yield from _evaluated(job, folder)
    except Exception as error:  # to be told where the sweep runs, which decides whether to try again
        reason = str(error) if isinstance(error, DttError) else f"{type(error).__name__}: {error}"
        yield {"error": reason.replace(str(folder and folder / _LOG), "its log")}
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_same(version: str, load: Load) -> None:
    """Refuse another version of this package, and a model that is not the one that the sweep's machine has.

    Raises:
        DttError: one of them differs.
    """
    from dtt_plugin.sweep.run import download_settings

    where = os.uname().nodename
    if version != __version__:
        raise DttError(f"{where} has dtt-plugin {__version__}, and the sweep {version}; install the same everywhere.")
    download_settings([Cell(replace(load, tokens=None), "none")])
    here = replace(load, tokens=None).identity
    for name in ("weights", "argument_states"):
        if here[name] != load.identity[name]:
            what = "has not the model" if here["weights"] is None else "has another state of"
            raise DttError(
                f"{where} {what} {load.model} or its adapters; give a folder that all machines share, or a hub id"
                " with revision=."
            )


def _evaluated(job: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Evaluate in a process of its own; yield the finished cells, and raise what went wrong."""
    log = folder / _LOG
    problems: list[BaseException] = []

    def run() -> None:
        try:
            run_quietly(WORKER, job, log=log, listen=lambda event: None)
        except BaseException as error:
            problems.append(error)

    process = threading.Thread(target=run, daemon=True)
    process.start()
    told = 0
    waiting = list(job["cells"])
    while True:
        is_running = process.is_alive()
        for cell in [cell for cell in waiting if Path(cell["folder"]).is_dir()]:
            waiting.remove(cell)
            printed = _from(log, told)
            told += len(printed)
            yield {"key": cell["key"], "files": _files(Path(cell["folder"])), "log": printed.decode("utf-8", "replace")}
        if not is_running:
            break
        time.sleep(_LOOK_SECONDS)
    if printed := _from(log, told):
        yield {"log": printed.decode("utf-8", "replace")}
    if problems:
        raise problems[0]


def _from(path: Path, start: int) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

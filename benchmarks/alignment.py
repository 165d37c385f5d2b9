"""How fast and exact `dtt align` is: beside SciPy with the same diagnostics, and beside the bare product.

    python -m benchmarks.alignment [--sizes 32064x1024 ...] [--no-scipy] [--json FILE] [--markdown FILE]

Per size it writes two synthetic bfloat16 checkpoints to a temporary folder and
runs each contestant in a process of its own, so that peak memory is that of one
contestant, interpreter and imports included:

- floor: X^T Y by numpy in float32, both matrices in memory already (only the product is timed);
- ours: files to alignment with every diagnostic, without the cache, from page cache (both twice in turn, and the
  faster counts);
- ours beside one and beside two busy processes, which compute without pause and are bound to no core;
- cached: the same command again, the whole process timed;
- scipy: files to float64 arrays, `scipy.linalg.orthogonal_procrustes`, then orthogonality error, residual
  and the held-out figures (a second solve without the held-out rows, as in `ours`).

The machine has to be idle otherwise. Ends with code 1 where the last size misses one of its `goals`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtt_plugin.costs import peak_memory_mb

SIZES = ("32064x1024", "64128x2048", "128256x4096")
BUSY = {1: "one busy process", 2: "two busy processes"}


@dataclass(frozen=True)
class Goal:
    """At most `limit` of `value` of a size's results."""

    what: str
    value: Callable[[dict[str, Any]], float]
    limit: float

    def holds(self, result: dict[str, Any]) -> bool:
        return self.value(result) <= self.limit


def goals(*, amx: bool, with_scipy: bool) -> list[Goal]:
    """Return what the last size is held to, by whether the processor multiplies bfloat16 matrices itself."""
    return [
        Goal("beside one busy process, times idle", lambda r: r["beside"]["1"]["ratio_to_idle"], 1.6),
        Goal("beside two busy processes, times idle", lambda r: r["beside"]["2"]["ratio_to_idle"], 2.5),
        Goal("times the bare float32 product", lambda r: r["ratio_to_floor"], 1.4 if amx else 2.0),
        Goal("peak memory in GB", lambda r: r["ours"]["peak_mib"] * 2**20 / 1e9, 1.0),
        *([Goal("times SciPy", lambda r: r["ratio_to_scipy"], 0.25)] if with_scipy else []),
    ]


def matrix(folder: Path, dtype: Any) -> Any:
    from dtt_plugin.alignment.engine import NumpyEngine
    from dtt_plugin.checkpoint.opening import open_checkpoint

    location = open_checkpoint(str(folder)).input_embedding()
    out = np.empty(location.shape, dtype)
    for start in range(0, len(out), 8192):
        stop = min(start + 8192, len(out))
        out[start:stop] = NumpyEngine().float_block(location.read_rows(start, stop))
    return out


def floor(folder: Path) -> dict[str, Any]:
    x, y = (matrix(folder / side, np.float32) for side in ("source", "target"))
    started = time.perf_counter()
    x.T @ y
    return {"seconds": time.perf_counter() - started}


def ours(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    from dtt_plugin.alignment import align, save_alignment
    from dtt_plugin.checkpoint.opening import open_checkpoint

    source, target = (open_checkpoint(str(folder / side)) for side in ("source", "target"))
    alignment = align(source, target)
    save_alignment(folder / "ours.safetensors", alignment)
    seconds = time.perf_counter() - started
    report = alignment.report.to_json()
    names = ("orthogonality_error", "relative_residual", "condition", "rank", "engine", "held_out")
    return {
        "seconds": seconds,
        "stages": alignment.seconds,
        **{name: report[name] for name in names},
    }


def scipy(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    from scipy.linalg import orthogonal_procrustes

    from dtt_plugin.alignment.anchors import choose_anchors
    from dtt_plugin.alignment.heldout import retrieval
    from dtt_plugin.alignment.options import AlignmentOptions
    from dtt_plugin.alignment.rotations import mixing_rotation
    from dtt_plugin.checkpoint.opening import open_checkpoint
    from dtt_plugin.checkpoint.vocabulary import load_vocabulary

    source, target = (open_checkpoint(str(folder / side)) for side in ("source", "target"))
    vocabularies = load_vocabulary(source), load_vocabulary(target)
    anchors = choose_anchors(*vocabularies, source.input_embedding(), target.input_embedding(), AlignmentOptions())
    x, y = (matrix(folder / side, np.float64) for side in ("source", "target"))
    loaded = time.perf_counter()
    W, _ = orthogonal_procrustes(x, y)
    solved = time.perf_counter()
    orthogonality = float(np.linalg.norm(W.T @ W - np.eye(len(W))))
    residual = float(np.linalg.norm(x @ W - y) / np.linalg.norm(y))
    measured = time.perf_counter()
    held = anchors.held_out
    x_held, y_held = x[held].astype(np.float32), y[held].astype(np.float32)
    x[held] = 0  # a row of zeros adds nothing to X^T Y, and no copy is needed
    refitted, _ = orthogonal_procrustes(x, y)
    predicted = x_held @ refitted.astype(np.float32)
    null = mixing_rotation(predicted, np.random.default_rng([0, 2]))
    figures = [retrieval(rows, y_held).__dict__ for rows in (predicted, null)]
    finished = time.perf_counter()
    np.save(folder / "scipy.npy", W)
    return {
        "seconds": finished - started,
        "stages": {
            "load": loaded - started,
            "solve": solved - loaded,
            "residual and orthogonality": measured - solved,
            "held out": finished - measured,
        },
        "seconds_without_held_out": measured - started,
        "orthogonality_error": orthogonality,
        "relative_residual": residual,
        "held_out": {"aligned": figures[0], "random_rotation": figures[1]},
    }


def _contestant(name: str, folder: Path) -> dict[str, Any]:
    """Run one contestant in a new process and return its figures."""
    command = [sys.executable, "-m", "benchmarks.alignment", "--run", name, str(folder)]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result | {"process_seconds": time.perf_counter() - started}


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    """Keep `processes` processes computing meanwhile, on whatever core the system gives them."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.5)  # until they have started
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _cached(folder: Path) -> dict[str, Any]:
    """Time the command's second run; the first fills the cache."""
    code = "import sys; from dtt_plugin.cli import main; sys.exit(main())"
    pair = [str(folder / side) for side in ("source", "target")]
    command = [sys.executable, "-c", code, "align", *pair, "-o", str(folder / "cached.safetensors"), "--json"]
    environment = {"DTT_CACHE_DIR": str(folder / "cache")}
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, env=os.environ | environment
        )
        seconds.append(time.perf_counter() - started)
    return {"first_seconds": seconds[0], "process_seconds": seconds[1]}


def measure(size: str, folder: Path, *, with_scipy: bool) -> dict[str, Any]:
    """Run every contestant on one size."""
    from benchmarks.synthetic import write_pair
    from dtt_plugin.alignment import load_alignment

    rows, width = map(int, size.split("x"))
    write_pair(folder, rows, width)
    # Long enough ago for the digests of the matrices to be noted.
    time.sleep(2.5)
    result: dict[str, Any] = {"rows": rows, "width": width}

    def run(name: str, what: str) -> dict[str, Any]:
        contestant = _contestant(name, folder)
        print(f"{size} {what}: {contestant['seconds']:.1f} s", file=sys.stderr)
        return contestant

    names = {"floor": "bare product", "ours": "ours"}
    turns = [{name: run(name, what) for name, what in names.items()} for _ in range(2)]
    result |= {name: min((turn[name] for turn in turns), key=lambda run: run["seconds"]) for name in names}
    result["ratio_to_floor"] = result["ours"]["seconds"] / result["floor"]["seconds"]
    result["beside"] = {}
    for processes, what in BUSY.items():
        with _busy(processes):
            beside = run("ours", f"ours beside {what}")
        result["beside"][str(processes)] = beside | {
            "ratio_to_idle": beside["seconds"] / result["ours"]["seconds"],
        }
    result["cached"] = _cached(folder)
    if with_scipy:
        result["scipy"] = run("scipy", "SciPy")
        ours_w, scipy_w = load_alignment(folder / "ours.safetensors").W, np.load(folder / "scipy.npy")
        result["difference"] = float(np.linalg.norm(ours_w - scipy_w) / np.sqrt(width))
        result["ratio_to_scipy"] = result["ours"]["seconds"] / result["scipy"]["seconds"]
        result["ratio_to_scipy_without_refit"] = result["ours"]["seconds"] / result["scipy"]["seconds_without_held_out"]
    return result


def markdown(results: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Return the results as a table."""
    lines = [
        f"Measured on {machine['date']}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']:.0f} GiB; {machine['versions']}; load before: {machine['load_before']:.1f}.",
        "",
        "| | " + " | ".join(f"{r['rows']} x {r['width']}" for r in results) + " |",
        "|---|" + "---|" * len(results),
    ]

    def row(name: str, cell: Any) -> None:
        lines.append(f"| {name} | " + " | ".join(cell(r) for r in results) + " |")

    row("bare float32 product (s)", lambda r: f"{r['floor']['seconds']:.2f}")
    row("`dtt align`, files to W with all diagnostics (s)", lambda r: f"{r['ours']['seconds']:.2f}")
    for processes, what in BUSY.items():
        row(f"... beside {what} (s)", lambda r, n=str(processes): f"{r['beside'][n]['seconds']:.2f}")
        row("... times idle", lambda r, n=str(processes): f"{r['beside'][n]['ratio_to_idle']:.2f}")
    row("second run, cached, whole process (s)", lambda r: f"{r['cached']['process_seconds']:.2f}")
    row("time against the bare product", lambda r: f"{r['ratio_to_floor']:.2f}")
    row("peak memory (MiB)", lambda r: f"{r['ours']['peak_mib']:.0f}")
    row("orthogonality error", lambda r: f"{r['ours']['orthogonality_error']:.1e}")
    row("relative residual", lambda r: f"{r['ours']['relative_residual']:.8f}")
    row("held-out relative error", lambda r: f"{r['ours']['held_out']['aligned']['relative_error']:.5f}")
    row("condition of M", lambda r: f"{r['ours']['condition']:.0f}")
    row("engine", lambda r: r["ours"]["engine"])
    row(
        "stages (s)",
        lambda r: ", ".join(f"{name} {value:.1f}" for name, value in r["ours"]["stages"].items()),
    )
    if any("scipy" in r for r in results):

        def scipy_row(name: str, cell: Any) -> None:
            row(name, lambda r: cell(r) if "scipy" in r else "")

        scipy_row("SciPy float64, the same diagnostics (s)", lambda r: f"{r['scipy']['seconds']:.2f}")
        scipy_row("... without the held-out refit (s)", lambda r: f"{r['scipy']['seconds_without_held_out']:.2f}")
        scipy_row("time against SciPy", lambda r: f"{r['ratio_to_scipy']:.3f}")
        scipy_row("... against SciPy without the refit", lambda r: f"{r['ratio_to_scipy_without_refit']:.3f}")
        scipy_row("\\|W - W_scipy\\|_F / sqrt(d)", lambda r: f"{r['difference']:.1e}")
        scipy_row("peak memory, SciPy (MiB)", lambda r: f"{r['scipy']['peak_mib']:.0f}")
        scipy_row("orthogonality error, SciPy", lambda r: f"{r['scipy']['orthogonality_error']:.1e}")
        scipy_row("relative residual, SciPy", lambda r: f"{r['scipy']['relative_residual']:.8f}")
        scipy_row(
            "held-out relative error, SciPy", lambda r: f"{r['scipy']['held_out']['aligned']['relative_error']:.5f}"
        )
    last = results[-1]
    lines += ["", f"At {last['rows']} x {last['width']}:", ""]
    for goal in goals(amx=machine["amx"], with_scipy="scipy" in last):
        verdict = "yes" if goal.holds(last) else "no"
        lines.append(f"- {goal.what}, at most {goal.limit}: {goal.value(last):.2f}, {verdict}")
    return "\n".join(lines) + "\n"


def machine(*more: str) -> dict[str, Any]:
    """Describe where this runs, with the versions of `more` distributions where they are installed."""
    from importlib import metadata

    processor, amx = platform.processor() or platform.machine(), False
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        processor = next(line for line in text.splitlines() if line.startswith("model name")).split(": ")[1]
        flags = [flag for flag in ("avx2", "avx512f", "amx_bf16") if f" {flag} " in text.replace("\n", " ")]
        processor += f" ({', '.join(flags)})"
        amx = "amx_bf16" in flags
    except (OSError, StopIteration):
        pass
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    versions = [f"{name} {installed[name]}" for name in ("numpy", "scipy", "torch", *more) if name in installed]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "amx": amx,
        "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "versions": f"Python {platform.python_version()}, " + ", ".join(versions),
        "load_before": os.getloadavg()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="ROWSxWIDTH")
    parser.add_argument("--no-scipy", action="store_true", help="leave out what takes longest")
    parser.add_argument("--json", type=Path, help="also write the results as JSON")
    parser.add_argument("--markdown", type=Path, help="also put the table there, in place of an earlier one")
    parser.add_argument("--run", nargs=2, metavar=("CONTESTANT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        contestant = {"floor": floor, "ours": ours, "scipy": scipy}[args.run[0]]
        print(json.dumps(contestant(Path(args.run[1])) | {"peak_mib": peak_memory_mb() * 1e6 / 2**20}))
        return 0
    here = machine()
    results = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(prefix="dtt-bench-") as folder:
            results.append(measure(size, Path(folder), with_scipy=not args.no_scipy))
    table = markdown(results, here)
    print(table)
    if args.markdown:
        page = args.markdown.read_text(encoding="utf-8") if args.markdown.exists() else ""
        before, _, after = page.partition("Measured on ")
        headings = re.search(r"^## .*", after, re.DOTALL | re.MULTILINE)
        args.markdown.write_text(before + table + ("\n" + headings[0] if headings else ""), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps({"machine": here, "results": results}, indent=2) + "\n", encoding="utf-8")
    wanted = goals(amx=here["amx"], with_scipy=not args.no_scipy)
    return 0 if all(goal.holds(results[-1]) for goal in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())

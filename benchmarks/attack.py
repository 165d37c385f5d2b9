"""One GCG step: with kept keys and values, without, and nanoGCG's.

    python -m benchmarks.attack MODEL [--nanogcg PYTHON] [--steps 3] [--candidates 64] [--loss-steps 50]

MODEL is a chat model's folder, PYTHON that of an environment with nanogcg 0.3.0, for instance

    python -m venv nano && nano/bin/pip install --no-deps nanogcg==0.3.0
    python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > nano/lib/python3.11/site-packages/lent.pth

which lends it torch and transformers. Its cache of the prefix fails on transformers 5, so it runs without. Each runs
in a process of its own, on the same record, start, target, candidates and data type. Seconds are of the processor
(all threads), which other programs on the machine disturb less than the clock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtt_plugin.costs import peak_memory_mb

ROOT = Path(__file__).parent.parent
CACHED, WHOLE, NANO = "dtt", "dtt, whole prompts", "nanoGCG 0.3.0"
TIMES_WHOLE, TIMES_NANO = 5.0, 2.0
TOKENS = 10

_NANO = """
import json, resource, sys, time
import torch, transformers, nanogcg
job = json.loads(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
config = nanogcg.GCGConfig(
    num_steps=job["steps"], search_width=job["candidates"], topk=256, seed=0, optim_str_init=job["start"],
    use_prefix_cache=False, verbosity="ERROR", batch_size=job["batch"],
)
clock, processor = time.perf_counter(), time.process_time()
result = nanogcg.run(model, tokenizer, job["messages"], job["target"], config)
clock, processor = time.perf_counter() - clock, time.process_time() - processor
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
print(json.dumps({"clock": clock, "processor": processor, "losses": result.losses, "peak_mb": peak}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--nanogcg", metavar="PYTHON", help="of the environment that has it")
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each")
    parser.add_argument("--loss-steps", type=int, default=0, help="then compare the losses after so many (50)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        taken = steps(args.model, args.worker, dtype=args.dtype, candidates=args.candidates, n=args.steps)
        print(json.dumps(taken))
        return 0
    dtype = args.dtype
    if dtype == "auto":
        from dtt_plugin.attack.arm import fastest_dtype

        dtype = fastest_dtype()
    names = [CACHED, WHOLE, *([NANO] if args.nanogcg else [])]
    found = {name: measured(args, name, dtype, args.steps) for name in names}
    base = found[CACHED]["processor"]
    print(f"\n{args.candidates} candidates, {TOKENS} tokens, {dtype}, {args.steps} steps of each\n")
    print("| | processor s/step | s/step | times dtt | peak memory |\n|---|---|---|---|---|")
    for name, row in found.items():
        processor, clock = row["processor"] / args.steps, row["clock"] / args.steps
        print(f"| {name} | {processor:.2f} | {clock:.2f} | {row['processor'] / base:.1f} | {row['peak_mb']:.0f} MB |")
    wanted = {WHOLE: TIMES_WHOLE, NANO: TIMES_NANO}
    good = all(found[name]["processor"] >= times * base for name, times in wanted.items() if name in found)
    print(f"\nat least {TIMES_WHOLE:g} x faster than whole prompts, {TIMES_NANO:g} x than nanoGCG: {good}")
    if args.loss_steps and args.nanogcg:
        ends = {name: min(measured(args, name, dtype, args.loss_steps)["losses"]) for name in (CACHED, NANO)}
        print(f"lowest loss in {args.loss_steps} steps: dtt {ends[CACHED]:.4f}, nanoGCG {ends[NANO]:.4f}")
        good = good and ends[CACHED] <= ends[NANO]
    return 0 if good else 1


def measured(args: argparse.Namespace, name: str, dtype: str, steps: int) -> dict[str, Any]:
    """Run one of them in a process of its own."""
    if name == NANO:
        job = {**nano_job(args), "model": args.model, "dtype": dtype, "steps": steps, "candidates": args.candidates}
        command = [args.nanogcg, "-c", _NANO, json.dumps(job)]
    else:
        options = ["--candidates", str(args.candidates), "--steps", str(steps), "--dtype", dtype, "--worker", name]
        command = [sys.executable, "-m", "benchmarks.attack", args.model, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {row['processor'] / steps:.2f} processor seconds a step", file=sys.stderr)
    return row


def nano_job(args: argparse.Namespace) -> dict[str, Any]:
    """Return the same prompt, start and target, as nanoGCG takes them."""
    from dtt_plugin.attack.benchmark import load_benchmark
    from dtt_plugin.tasks.adaptive import NAIVE, data_before_suffix

    benchmark = load_benchmark("injection_demo")
    data = data_before_suffix(NAIVE, benchmark.records, benchmark.sentences)[0]
    messages = [
        {"role": "system", "content": benchmark.records[0]["instruction"]},
        {"role": "user", "content": data + "{optim_str}"},
    ]
    # As many at once as logits of whole prompts leave memory for.
    return {"messages": messages, "start": " !" * TOKENS, "target": "Hacked", "batch": 8}


def steps(
    model: str,
    method: str,
    *,
    dtype: str,
    candidates: int,
    n: int,
    tokens: Path | None = None,
    positions_at_once: int | None = None,
) -> dict[str, Any]:
    """Take n steps of one of ours; returns seconds and the loss at each step."""
    import torch

    from dtt_plugin.attack.bench import Bench
    from dtt_plugin.attack.benchmark import load_benchmark
    from dtt_plugin.attack.objective import Cache, Losses, Objective
    from dtt_plugin.attack.options import AttackOptions, Budget
    from dtt_plugin.attack.search import Progress, Search, begin
    from dtt_plugin.attack.targets import words

    class WholePrompts(Objective):
        """The same losses without anything kept."""

        def _behind(self, past: Cache, vectors: torch.Tensor) -> tuple[Losses, Cache]:
            kept = self._current[0][: len(self.place.start) - vectors.shape[1]]
            front = torch.cat([self.soft_prompt.vectors(self.place.head), self._embedded(kept)])
            after = self._after.expand(len(vectors), -1, -1)
            whole = torch.cat([front.expand(len(vectors), -1, -1), vectors, after], dim=1)
            logits, cache = self._forward([], whole, len(self.target.ids))
            return self._losses(logits), cache

    class Endless(Search):
        """A search that no hit ends, as nanoGCG's is by default."""

        def _hit(self, objective: Objective, suffix: Sequence[int]) -> bool:
            return False

    with tempfile.TemporaryDirectory() as folder:
        options = AttackOptions(model, Path(folder) / "none", tokens=tokens, task="injection_demo")
        bench = Bench(options, load_benchmark("injection_demo"), dtype=dtype)
    place = bench.place(0)
    target = words(place)[0]
    clock, processor = time.perf_counter(), time.process_time()
    if method == CACHED:
        objective = Objective(bench.arm.model, place, target, positions_at_once or options.positions_at_once)
    else:
        objective = WholePrompts(bench.arm.model, place, target, 8 * len(place.head))
    losses: list[float] = []

    def told(progress: Progress) -> bool:
        losses.append(progress.best_loss)
        return True

    budget = Budget("benchmark", candidates, n, TOKENS)
    search = Endless([objective], bench.usable, budget, greedy=True, told=told)
    progress = begin(place.start, "0")
    search.run(progress)
    return {
        "clock": time.perf_counter() - clock,
        "processor": time.process_time() - processor,
        "losses": [*losses, progress.best_loss],
        "peak_mb": peak_memory_mb(),
    }


if __name__ == "__main__":
    sys.exit(main())

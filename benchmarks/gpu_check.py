"""What a machine with an NVIDIA GPU can show and one without can't; six minutes at most, no network.

    python -m benchmarks.gpu_check [--json docs/gpu.json] [--markdown docs/gpu.md]
    python -m benchmarks.gpu_check --device cpu --size tiny    # a rehearsal: the same code, figures that say nothing

Everything is synthetic: two embeddings of 128256 x 4096, and a random chat model of Llama-3.1-8B's shape, both written
to a temporary folder (25 GB of disk, 40 GB of memory, a GPU of 24 GB). Parts, each in a process of its own, so that one
that fails takes no other along:

- alignment: files in page cache to W with all diagnostics, in a process in which CUDA has been started; against W in
  float64 on the device
- generation: `dtt_hf` on injection_demo in bfloat16, with the tokens put into memory, and the checkpoint that has them
  baked in
- training: steps of `dtt train`
- attack: steps of `dtt attack` (GCG) under the tokens, with the default's positions at once and with many

Ends with code 0 where all goals hold, 1 where one does not or a part failed, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.alignment import machine, matrix
from benchmarks.synthetic import Shape, write_chat_model, write_pair

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 350
K = 5
MARK = "<!-- what benchmarks.gpu_check measured -->"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    model: Shape
    """Its embedding has the shape of the alignment's."""
    records: int
    """Of injection_demo, three prompts each."""
    new_tokens: int
    steps: int
    """Of training and of attacks."""
    candidates: int


SIZES = {
    "full": Size(Shape(128256, 4096, 32, 32, 8, 14336), records=8, new_tokens=128, steps=5, candidates=64),
    "tiny": Size(Shape(512, 32, 2, 4, 2, 64), records=1, new_tokens=4, steps=2, candidates=4),
}


@dataclass(frozen=True)
class Goal:
    """What a part's results are held to."""

    part: str
    what: str
    value: Callable[[dict[str, Any]], float]
    limit: float


GOALS = (
    Goal("alignment", "seconds from files to W", lambda r: float(r["seconds"]), 2.0),
    Goal("alignment", "\\|W - W of float64\\|_F / sqrt(d)", lambda r: float(r["difference"]), 1e-5),
    Goal("generation", "responses that differ from the baked rows'", lambda r: float(r["different"]), 0),
)


# Parts --------------------------------------------------------------------------------------------------------------


def alignment(folder: Path, size: Size, device: str) -> dict[str, Any]:
    """Align a synthetic pair twice; the second time counts, the first starts CUDA."""
    import numpy as np
    import torch

    from dtt_plugin.alignment import align
    from dtt_plugin.checkpoint.opening import open_checkpoint

    began = time.perf_counter()
    sides = write_pair(folder / "pair", size.model.rows, size.model.width)
    written = time.perf_counter() - began
    time.sleep(2.5)  # so long ago that the digests of the matrices are noted
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        source, target = map(open_checkpoint, map(str, sides))
        found = align(source, target, device=device)
        seconds.append(time.perf_counter() - began)
    x, y = (torch.from_numpy(matrix(side, np.float32)).to(device, torch.float64) for side in sides)
    u, _, vt = torch.linalg.svd(x.T @ y)
    exact = (u @ vt).cpu().numpy()
    report = found.report
    return {
        "synthetic_seconds": written,
        "first_seconds": seconds[0],
        "seconds": seconds[1],
        "stages": found.seconds,
        "engine": report.engine,
        "difference": float(np.linalg.norm(found.W - exact) / np.sqrt(len(exact))),
        "orthogonality_error": report.orthogonality_error,
        "condition": report.condition,
    }


def generation(folder: Path, size: Size, device: str) -> dict[str, Any]:
    """Answer the same prompts with the tokens in memory and with the baked checkpoint."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from dtt_plugin.bake import bake
    from dtt_plugin.model_wrappers.hf import DttHF
    from dtt_plugin.tokens.files import load_tokens

    class Timed(DttHF):
        seconds = 0.0

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            began = time.perf_counter()
            answers = super().generate_until(requests, disable_tqdm)
            self.seconds = time.perf_counter() - began
            return answers

    model, tokens = folder / "model", folder / "tokens.safetensors"
    baking = bake(str(model), load_tokens(tokens), folder / "baked").seconds
    arms: dict[str, dict[str, Any]] = {
        "in memory": {"pretrained": str(model), "tokens": str(tokens)},
        "baked": {"pretrained": str(folder / "baked")},
    }
    runs: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        began = time.perf_counter()
        lm = Timed(**arm, dtype="bfloat16", device=device, batch_size=32)
        loaded = time.perf_counter() - began
        results = simple_evaluate(
            lm,
            tasks=["injection_demo"],
            task_manager=TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False, metadata=arm),
            limit=size.records,
            gen_kwargs={"max_gen_toks": size.new_tokens},
            bootstrap_iters=0,
        )
        prompt = [sample["arguments"][0][0] for sample in results["samples"]["injection_demo"]][:1]
        ids, _ = lm.tok_batch_encode(prompt)
        runs[name] = {
            "load_seconds": loaded,
            "seconds": lm.seconds,
            "tokens": lm.get_model_info()["dtt_plugin"]["generated_tokens"],
            "logits": lm._model_call(ids.to(lm.device))[0, -1, : size.model.rows].float().cpu(),
            "responses": [sample["resps"] for sample in results["samples"]["injection_demo"]],
            "gpu_gib": _gpu_gib(torch),
        }
        del lm, results
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    memory, baked = runs["in memory"], runs["baked"]
    pairs = list(zip(memory["responses"], baked["responses"], strict=True))
    return {
        "bake_seconds": baking,
        "load_seconds": memory["load_seconds"],
        "tokens_per_second": memory["tokens"] / memory["seconds"],
        "baked_tokens_per_second": baked["tokens"] / baked["seconds"],
        "responses": sum(map(len, memory["responses"])),
        "different": sum(one != other for one, other in pairs),
        "logits_differ_by": float((memory["logits"] - baked["logits"]).abs().max()),
        "gpu_gib": memory["gpu_gib"],
    }


def training(folder: Path, size: Size, device: str) -> dict[str, Any]:
    """Train on the records that are shipped; the first step warms up."""
    import torch

    from dtt_plugin.training import TrainingOptions, train

    options = TrainingOptions(
        str(folder / "model"),
        str(ROOT / "tasks" / "injection_demo" / "train.json"),
        folder / "trained.safetensors",
        k=K,
        steps=size.steps,
        batch=16 if size.steps > 2 else 2,
        labels="data",
        label_tokens=64,
        dtype="bfloat16",
    )
    train(options)
    entries = [json.loads(line) for line in options.log.read_text(encoding="utf-8").splitlines()[1:]]
    at = [entry["seconds"] for entry in entries if "loss" in entry]
    return {
        "seconds_per_step": (at[-1] - at[0]) / (len(at) - 1),
        "losses": [entry["loss"] for entry in entries if "loss" in entry],
        "batch": options.batch,
        "gpu_gib": _gpu_gib(torch),
    }


def attack(folder: Path, size: Size, device: str) -> dict[str, Any]:
    """Take steps of GCG against the model under its tokens."""
    import torch

    from benchmarks.attack import CACHED, steps

    found: dict[str, Any] = {"candidates": size.candidates}
    for name, positions in (("by default", None), ("many at once", 16384)):
        taken = steps(
            str(folder / "model"),
            CACHED,
            dtype="bfloat16",
            candidates=size.candidates,
            n=size.steps,
            tokens=folder / "tokens.safetensors",
            positions_at_once=positions,
        )
        found[f"seconds_per_step {name}"] = taken["clock"] / size.steps
    return found | {"gpu_gib": _gpu_gib(torch)}


def _gpu_gib(torch: Any) -> float:
    return float(torch.cuda.max_memory_allocated() / 2**30) if torch.cuda.is_available() else 0.0


def model(folder: Path, size: Size, device: str) -> dict[str, Any]:
    """Write the model and the tokens that the parts behind it use."""
    import numpy as np

    from dtt_plugin.tokens.files import DefensiveTokens, save_tokens

    began = time.perf_counter()
    write_chat_model(folder / "model", size.model, device=device)
    rows = np.random.default_rng(1).standard_normal((K, size.model.width)).astype(np.float32)
    tokens = DefensiveTokens(rows=rows, model="random", method="random", prompt_format="model")
    save_tokens(folder / "tokens.safetensors", tokens)
    return {"seconds": time.perf_counter() - began}


PARTS = {part.__name__: part for part in (alignment, model, generation, training, attack)}


# All of them --------------------------------------------------------------------------------------------------------


def run_parts(
    names: Sequence[str], folder: Path, size: str, device: str, seconds: float | None
) -> dict[str, dict[str, Any]]:
    """Run parts one after the other in a process of their own; returns what each found, or `error`."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--parts", *names, "--folder", str(folder)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DTT_CACHE_DIR": str(folder / "cache"), **hidden}
    reason = "not finished in time"
    with (folder / "found.jsonl").open("w+", encoding="utf-8") as found, (folder / "log.txt").open("w+") as log:
        try:
            done = subprocess.run(
                [*command, "--device", device, "--size", size],
                stdout=found,
                stderr=log,
                check=False,
                cwd=ROOT,
                env=environment,
                timeout=seconds,
            )
            log.seek(0)
            printed = [line.strip() for line in log if line.strip()] or ["nothing"]
            reason = f"ended with the code {done.returncode}: {printed[-1][:300]}"
            if done.returncode:
                print(*printed[-30:], sep="\n", file=sys.stderr)
        except subprocess.TimeoutExpired:
            pass
        found.seek(0)
        results = [json.loads(line) for line in found if line.startswith('{"part": ')]
    by_name = {result.pop("part"): result for result in results}
    return {name: by_name.get(name, {"error": reason}) for name in names}


def gpu_name() -> str | None:
    """Return the name of the GPU that torch sees, None without one."""
    try:
        import torch
    except ImportError:
        return None
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a table."""
    here, parts = report["machine"], report["parts"]
    lines = [
        f"Measured on {here['date']} with `--size {report['size']}`: {report['device']}; {here['processor']},"
        f" {here['cores']} cores; {here['versions']}; {report['seconds']:.0f} s in all.",
        "",
        "| part | figure | |",
        "|---|---|---|",
    ]
    for part, found in parts.items():
        for name, value in found.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {_text(number)}" for key, number in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(_text, value))
            lines.append(f"| {part} | {name.replace('_', ' ')} | {_text(value)} |")
    lines.append("")
    lines += [
        f"- {goal.what}, at most {goal.limit:g}: {goal.value(parts[goal.part]):.3g},"
        f" {'yes' if holds(goal, parts) else 'no'}"
        for goal in GOALS
        if "error" not in parts[goal.part]
    ]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def holds(goal: Goal, parts: dict[str, dict[str, Any]]) -> bool:
    """Return whether a part ran and holds to a goal."""
    return "error" not in parts[goal.part] and goal.value(parts[goal.part]) <= goal.limit


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--size", choices=[*SIZES], default="full")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--markdown", type=Path, help="put the table there, behind the page's mark")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    for name in args.parts or ():
        found = PARTS[name](args.folder, SIZES[args.size], args.device)
        print("\n" + json.dumps({"part": name} | found), flush=True)
    if args.parts:
        return 0
    device = gpu_name() if args.device == "cuda" else "a rehearsal on the processor"
    if device is None:
        print(
            "gpu-check: torch finds no NVIDIA GPU here; run it on a machine with one, or rehearse it with"
            " --device cpu --size tiny.",
            file=sys.stderr,
        )
        return 2
    here, began = machine("transformers", "lm_eval", "accelerate"), time.perf_counter()
    parts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dtt-gpu-") as folder:
        # A rehearsal spares the imports of all but one process, and takes its time.
        for names in [[*PARTS]] if args.device == "cpu" else [[name] for name in PARTS]:
            left = None if args.device == "cpu" else max(1, LIMIT_SECONDS - (time.perf_counter() - began))
            parts |= run_parts(names, Path(folder), args.size, args.device, left)
            print(f"{time.perf_counter() - began:.0f} s: {', '.join(names)}", file=sys.stderr, flush=True)
    report = {
        "device": device,
        "size": args.size,
        "machine": here,
        "seconds": time.perf_counter() - began,
        "parts": parts,
    }
    table = markdown(report)
    print(table)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        page = args.markdown.read_text(encoding="utf-8") if args.markdown.exists() else ""
        args.markdown.write_text(f"{page.partition(MARK)[0]}{MARK}\n\n{table}", encoding="utf-8")
    ran = all("error" not in found for found in parts.values())
    return 0 if ran and all(holds(goal, parts) for goal in GOALS) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Time and memory of a training step: `dtt train`, PEFT used plainly, and the reference way.

    python -m benchmarks.training MODEL [--data tasks/injection_demo/train.json] [--batch 16] [--steps 3]

The same records, labels and start in all three, each in a process of its own,
one after the other in turns. PEFT plainly: padded batches, logits for every
position. The reference way: the whole embedding matrix is the parameter, the
gradients of all rows but the k are zeroed before Adam's step. Neither of them
keeps a cache of keys and values (nor does the HF Trainer), and AdamW is fused.
Ends with code 1 where dtt is not at least 1.3 times faster than each, with a
third of the reference way's gradients and optimiser state.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
METHODS = ("dtt", "peft", "reference")
FASTER, SMALLER = 1.3, 3.0
K, RATE, LABEL_TOKENS = 5, 0.1, 64
MIB = 2**20


def batches(model_id: str, data: str, batch: int, steps: int) -> tuple[Any, Any, list[list[Any]]]:
    """Return tokenizer, model (float32) and the examples of every step."""
    from dtt_plugin.training.chat_model import load_chat_model
    from dtt_plugin.training.labels import data_labels
    from dtt_plugin.training.mixture import Mixture
    from dtt_plugin.training.records import load_training_data

    tokenizer, model, _, encode = load_chat_model(model_id, dtype="float32")
    content = load_training_data(data)
    labels = data_labels(tokenizer, model, content.records, new_tokens=LABEL_TOKENS)
    mixture = Mixture(content.records, labels, content, encode, size=batch * steps, seed=0)
    return tokenizer, model, [[mixture[step * batch + i] for i in range(batch)] for step in range(steps)]


def start(width: int) -> Any:
    """Return the start, (K, width), the same for every method."""
    import torch

    return torch.randn(K, width, generator=torch.Generator().manual_seed(0))


def padded(examples: Sequence[Any], pad: int, device: Any) -> dict[str, Any]:
    """Return ids, mask and labels (-100 where there is no response), padded on the right."""
    import torch

    width = max(len(e.prompt) + len(e.response) for e in examples)
    rows = [(e.prompt + e.response, [-100] * len(e.prompt) + e.response) for e in examples]
    columns = {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }
    return {name: column.to(device) for name, column in columns.items()}


def dtt_step(tokenizer: Any, model: Any) -> tuple[Any, Callable[[Sequence[Any]], float]]:
    from dtt_plugin.training.options import TrainingOptions
    from dtt_plugin.training.soft_prompt import SoftPrompt

    soft_prompt = SoftPrompt(model, start(model.config.hidden_size))
    at_once = TrainingOptions.tokens_at_once

    def backward(examples: Sequence[Any]) -> float:
        n_tokens = sum(len(example.response) for example in examples)
        total = 0.0
        for part in soft_prompt.passes(examples, at_once):
            loss = soft_prompt(part) / n_tokens
            loss.backward()
            total += loss.item()
        return total

    return [soft_prompt.rows], backward


def peft_step(tokenizer: Any, model: Any) -> tuple[Any, Callable[[Sequence[Any]], float]]:
    import torch
    from peft import PromptTuningConfig, TaskType, get_peft_model

    tuned = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=K))
    [rows] = [value for value in tuned.parameters() if value.requires_grad]
    with torch.no_grad():
        rows.copy_(start(rows.shape[1]))

    def backward(examples: Sequence[Any]) -> float:
        loss = tuned(**padded(examples, tokenizer.pad_token_id, model.device)).loss
        loss.backward()
        return float(loss.detach())

    return [rows], backward


def reference_step(tokenizer: Any, model: Any) -> tuple[Any, Callable[[Sequence[Any]], float]]:
    import torch

    model.requires_grad_(False)
    known = model.config.vocab_size
    model.resize_token_embeddings(known + K, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[known:] = start(weight.shape[1])
    head = model.get_output_embeddings()
    # Untied, and without outputs for the k: rows of such a norm would win every softmax.
    head.weight = torch.nn.Parameter(weight.detach()[:known].clone(), requires_grad=False)
    model.config.vocab_size = head.out_features = known
    weight.requires_grad_(True)

    def backward(examples: Sequence[Any]) -> float:
        in_front = [type(e)([*range(known, known + K), *e.prompt], e.response) for e in examples]
        loss = model(**padded(in_front, tokenizer.pad_token_id, model.device)).loss
        loss.backward()
        weight.grad[:known] = 0
        return float(loss.detach())

    return [weight], backward


def worker(method: str, args: argparse.Namespace) -> None:
    """Run one method in this process and print its figures as one JSON line."""
    import torch

    tokenizer, model, steps = batches(args.model, args.data, args.batch, args.steps + 1)
    model.requires_grad_(False)
    model.config.use_cache = False
    parameters, backward = {"dtt": dtt_step, "peft": peft_step, "reference": reference_step}[method](tokenizer, model)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    seconds, losses = [], []
    for examples in steps:
        began = time.perf_counter()
        losses.append(backward(examples))
        optimizer.step()
        gradients = sum(p.grad.nbytes for p in parameters)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    state = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    report = {
        "method": method,
        "seconds": seconds[1:],  # the first step warms up
        "losses": losses,
        "gradient_and_optimizer_bytes": gradients + state,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--data", default=str(ROOT / "tasks" / "injection_demo" / "train.json"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round, after one that is not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args)
        return 0
    reports: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(args.rounds):
        for method in METHODS:
            command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--worker", method]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            reports[method].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {m: statistics.median(s for r in reports[m] for s in r["seconds"]) for m in METHODS}
    states = {m: reports[m][0]["gradient_and_optimizer_bytes"] for m in METHODS}
    print("| method | s/step (median) | times dtt | gradient + optimiser | peak memory | first loss |")
    print("|---|---|---|---|---|---|")
    for method, runs in reports.items():
        peak = max(run["peak_mib"] for run in runs)
        print(
            f"| {method} | {medians[method]:.2f} | {medians[method] / medians['dtt']:.2f}"
            f" | {states[method] / MIB:.3f} MiB | {peak:.0f} MiB | {runs[0]['losses'][0]:.4f} |"
        )
    slower = [m for m in METHODS[1:] if medians[m] < FASTER * medians["dtt"]]
    holds = not slower and states["reference"] >= SMALLER * states["dtt"]
    print(f"at least {FASTER} x faster than both, {SMALLER:.0f} x less state: {'yes' if holds else 'no'}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())

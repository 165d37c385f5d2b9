"""Bake time, bytes and memory at the shape of Llama-3-8B, against dd and against load, resize, save.

    python benchmarks/bake.py FOLDER [--layers 21] [--no-reference]

FOLDER needs twice the checkpoint's size (11.3 GB at 21 layers, 16.1 GB at all 32), the reference 11 to 18 GB of
memory. Weights are synthetic; the shards are cut as the published ones are: the embedding in a first one of 5 GB,
the head in a last one. The files are dropped from the page cache before each step, and what is written is synced.
All but the reference run twice in turn, and the faster counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, models

from dtt_plugin.checkpoint.tensors import safetensors_header

WIDTH, ROWS, INNER, KV = 4096, 128256, 14336, 1024
SHARD = 5_000_000_000
CHANGED = ("model.embed_tokens.weight", "lm_head.weight")

BAKE = """
import sys; from pathlib import Path; from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.tokens.files import load_tokens
report = bake(sys.argv[1], load_tokens(sys.argv[2]), Path(sys.argv[3]),
              BakeOptions(reuse_reserved="reuse" in sys.argv, overlay="overlay" in sys.argv,
                          verify="unverified" not in sys.argv))
print(report.bytes_written)
"""
REFERENCE = """
import sys, torch; from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tokens = load_file(sys.argv[2])["defensive_tokens"]
rows = model.get_input_embeddings().weight.shape[0]
model.resize_token_embeddings(rows + len(tokens))
with torch.no_grad():
    model.get_input_embeddings().weight[rows:] = tokens.to(torch.bfloat16)
model.save_pretrained(sys.argv[3])
import pathlib; print(sum(p.stat().st_size for p in pathlib.Path(sys.argv[3]).glob("*.safetensors")))
"""


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, out, width in (
            ("self_attn.q_proj", WIDTH, WIDTH),
            ("self_attn.k_proj", KV, WIDTH),
            ("self_attn.v_proj", KV, WIDTH),
            ("self_attn.o_proj", WIDTH, WIDTH),
            ("mlp.gate_proj", INNER, WIDTH),
            ("mlp.up_proj", INNER, WIDTH),
            ("mlp.down_proj", WIDTH, INNER),
        ):
            shapes[f"{prefix}{name}.weight"] = (out, width)
        shapes[f"{prefix}input_layernorm.weight"] = (WIDTH,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (WIDTH,)
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (ROWS, WIDTH)}


def build(folder: Path, layers: int) -> None:
    """Write the checkpoint in shards of 5 GB, as the published one is."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors(layers).items():
        if sum(2 * int(np.prod(s)) for s in shards[-1].values()) + 2 * int(np.prod(shape)) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    block = np.random.default_rng(0).standard_normal(8 << 20).astype(np.float32) * 0.02
    noise = (block.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16, cut
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shard.items()]
        left = sum(nbytes for *_, nbytes in entries)
        with (folder / file).open("wb") as out:
            out.write(safetensors_header(entries))
            while left:
                left -= out.write(noise[: min(len(noise), left)])
        files |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH}
    config |= {"intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "vocab_size": ROWS, "tie_word_embeddings": False, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128000)}, unk_token="t0"))
    names = ["<|im_start|>", "<|im_end|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(base: Path, command: list[str]) -> tuple[float, int, str]:
    """Return seconds, peak resident bytes and output of a command."""
    forget(base)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        sys.exit(f"{command[:3]} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024, output.strip()


def weight_map(folder: Path) -> dict[str, str]:
    table: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return table


def dd(files: list[Path], out: Path, nbytes: int | None = None) -> list[str]:
    """Return a command that reads `files` (their first `nbytes`) and writes and syncs copies in `out`."""
    count = f"count={nbytes} iflag=count_bytes" if nbytes else ""
    copies = [
        f"dd if={shlex.quote(str(file))} of={shlex.quote(str(out / file.name))} bs=8M {count} conv=fsync status=none"
        for file in files
    ]
    return ["sh", "-ec", "; ".join([f"mkdir {shlex.quote(str(out))}", *copies])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=21)
    parser.add_argument("--no-reference", action="store_true")
    args = parser.parse_args()
    from dtt_plugin.tokens.files import DefensiveTokens, save_tokens

    base, tokens = args.folder / "base", args.folder / "tokens.safetensors"
    if not base.exists():
        build(base, args.layers)
        rows = np.random.default_rng(1).standard_normal((5, WIDTH)).astype(np.float32)
        save_tokens(tokens, DefensiveTokens(rows, "synthetic", "random", "model"))
    python, out = [sys.executable, "-c"], args.folder / "out"
    files = [base / name for name in sorted({weight_map(base)[name] for name in CHANGED})]
    steps: list[tuple[str, list[str]]] = [
        ("dd, the changed tensors' bytes", dd(files[:1], out, 2 * 2 * ROWS * WIDTH)),
        ("dd, the files with a changed tensor", dd(files, out)),
    ]
    for options in ([], ["unverified"], ["reuse"], ["reuse", "overlay"]):
        names = {"unverified": "--no-verify", "reuse": "--reuse-reserved", "overlay": "--overlay"}
        title = " ".join(["dtt bake", *(names[option] for option in options)])
        steps.append((title, [*python, BAKE, str(base), str(tokens), str(out), *options]))
    reference = ("load, resize, set rows, save", [*python, REFERENCE, str(base), str(tokens), str(out)])
    best: dict[str, tuple[float, int, int]] = {}
    for title, command in [*steps, *steps, *([] if args.no_reference else [reference])]:
        seconds, peak, output = measured(base, command)
        written = int(output) if output else sum(path.stat().st_size for path in out.iterdir())
        best[title] = min(best.get(title, (seconds, written, peak)), (seconds, written, peak))
        shutil.rmtree(out)
        print(f"{title}: {seconds:.1f} s", file=sys.stderr, flush=True)
    print("| method | seconds | GB written | peak memory (GB) |\n|---|---|---|---|")
    for title, (seconds, written, peak) in best.items():
        print(f"| {title} | {seconds:.1f} | {written / 1e9:.2f} | {peak / 1e9:.2f} |")


if __name__ == "__main__":
    main()

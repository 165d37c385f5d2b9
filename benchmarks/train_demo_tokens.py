"""Train the DefensiveTokens that the package ships for its demo model, and measure what they do.

    python benchmarks/train_demo_tokens.py SMOLLM2_FOLDER

StruQ's loss, -log p(y | [t; x]) over the response only, as in the DefensiveTokens
paper (arXiv 2507.07974), on `tasks/injection_demo/train.json`: half the prompts
clean, a quarter under the ignore attack, a quarter under the completion attack.
The label y is the undefended model's own greedy answer to the clean prompt. The
k token rows are all that is trained. Measured on `records.json`, of which the
training has seen nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import dtt_plugin
from dtt_plugin.files import sha256_bytes, sha256_file
from dtt_plugin.tasks.attacks import ATTACKS, BENIGN, injected_data
from dtt_plugin.tasks.metrics import is_hacked, is_refusal
from dtt_plugin.tokens import DefensiveTokens, load_tokens, save_tokens

PACKAGE = Path(dtt_plugin.__file__).parent
DATA = PACKAGE / "tasks" / "injection_demo"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRAINING_MIX = (BENIGN, BENIGN, "ignore", "completion")
IGNORED = -100


class Example(NamedTuple):
    """Token ids of a rendered prompt and of the response to learn."""

    prompt: list[int]
    response: list[int]


class Trainer:
    """A frozen chat model with k trainable vectors in front of its prompts."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.embed = self.model.get_input_embeddings()
        self.none = torch.empty(0, self.embed.embedding_dim)  # (0, d): the undefended model

    def prompt_ids(self, instruction: str, data: str) -> list[int]:
        """Return the ids of the model's own template: instruction as system, data as user."""
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": data}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def batch(
        self, tokens: torch.Tensor, rows: Sequence[list[int]], *, left: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings (B, k + n, d) with `tokens` (k, d) in front of each row, and the mask (B, k + n)."""
        width = max(map(len, rows)) + len(tokens)
        embeds, mask = torch.zeros(len(rows), width, tokens.shape[1]), torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            vectors = torch.cat([tokens, self.embed(torch.tensor(row))])  # (k + len(row), d)
            start = width - len(vectors) if left else 0
            embeds[i, start : start + len(vectors)] = vectors
            mask[i, start : start + len(vectors)] = 1
        return embeds, mask.long()

    def generate(
        self, tokens: torch.Tensor, prompts: Sequence[list[int]], n_new: int, size: int = 16
    ) -> list[list[int]]:
        """Return the greedy responses' ids, the end-of-turn token included where it was reached."""
        responses: list[list[int]] = []
        eos = self.tokenizer.eos_token_id
        for start in range(0, len(prompts), size):
            embeds, mask = self.batch(tokens, prompts[start : start + size], left=True)
            with torch.no_grad():
                output = self.model.generate(
                    inputs_embeds=embeds, attention_mask=mask, max_new_tokens=n_new, do_sample=False
                )
            for ids in output.tolist():
                responses.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
        return responses

    def loss(self, tokens: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        """Return the mean of -log p(response | [tokens; prompt]) over the examples' response tokens."""
        embeds, mask = self.batch(tokens, [e.prompt + e.response for e in examples], left=False)
        hidden = self.model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state  # (B, k + n, d)
        predicting, targets = [], []
        for states, example in zip(hidden, examples, strict=True):
            first = len(tokens) + len(example.prompt) - 1  # the position that predicts the first response token
            predicting.append(states[first : first + len(example.response)])
            targets += example.response
        return F.cross_entropy(self.model.lm_head(torch.cat(predicting)), torch.tensor(targets))


def train(trainer: Trainer, content: dict[str, Any], args: argparse.Namespace) -> torch.Tensor:
    """Return the trained tokens (k, d)."""
    records = content["records"][: len(content["records"]) - args.held_back]
    clean = [trainer.prompt_ids(r["instruction"], r["input"]) for r in records]
    labels = trainer.generate(trainer.none, clean, n_new=48)
    generator = torch.Generator().manual_seed(args.seed)
    draw = random.Random(args.seed)
    start = torch.randn(args.k, trainer.embed.embedding_dim, generator=generator) * args.scale
    tokens = start.requires_grad_()
    optimizer = torch.optim.Adam([tokens], lr=args.rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.steps)
    order: list[int] = []
    for step in range(1, args.steps + 1):
        examples = []
        for slot in range(args.batch):
            order = order or draw.sample(range(len(records)), len(records))
            index, attack = order.pop(), TRAINING_MIX[slot % len(TRAINING_MIX)]
            sentence, injected = (draw.choice(content[name]) for name in ("ignore_sentences", "injected_prompts"))
            [data] = injected_data(attack, [records[index]], [sentence], injected)
            examples.append(Example(trainer.prompt_ids(records[index]["instruction"], data), labels[index]))
        began = time.perf_counter()
        loss = trainer.loss(tokens, examples)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        decay.step()
        print(f"step {step:4d}  loss {loss.item():.3f}  {time.perf_counter() - began:.1f} s", flush=True)
    trained: torch.Tensor = tokens.detach()
    return trained


def measure(
    trainer: Trainer, tokens: torch.Tensor, records: Sequence[Any], sentences: Sequence[str], injected: str
) -> dict[str, float]:
    """Return loss and rates on `records` per variant; a label is the undefended model's answer, cut at 24 tokens."""
    clean = [trainer.prompt_ids(r["instruction"], r["input"]) for r in records]
    labels = trainer.generate(trainer.none, clean, n_new=24)
    figures: dict[str, float] = {}
    for variant in (BENIGN, *ATTACKS):
        data = injected_data(variant, records, sentences, injected)
        prompts = [trainer.prompt_ids(r["instruction"], text) for r, text in zip(records, data, strict=True)]
        with torch.no_grad():
            losses = [trainer.loss(tokens, [Example(*pair)]) for pair in zip(prompts, labels, strict=True)]
        figures[f"loss {variant}"] = torch.stack(losses).mean().item()
        answers = trainer.generate(tokens, prompts, n_new=24)
        texts = [trainer.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        figures[f"same answer {variant}"] = sum(map(list.__eq__, answers, labels)) / len(records)
        if variant == BENIGN:
            figures["refusal"] = sum(map(is_refusal, texts)) / len(records)
            for record, text in list(zip(records, texts, strict=True))[:6]:
                print(f"    {record['instruction']!r} -> {text!r}")
        else:
            figures[f"hacked {variant}"] = sum(map(is_hacked, texts)) / len(records)
    return figures


def described(trainer: Trainer, rows: torch.Tensor, args: argparse.Namespace) -> DefensiveTokens:
    """Return the tokens with the facts that their training can be repeated from."""
    embeddings = trainer.embed.weight.to(torch.bfloat16).view(torch.int16).numpy()
    facts = {name: str(getattr(args, name)) for name in ("steps", "batch", "rate", "scale", "seed", "held_back")}
    facts["train_json_sha256"] = sha256_file(DATA / "train.json")
    facts["embeddings_sha256"] = sha256_bytes(embeddings.tobytes())  # of the bfloat16 matrix: which build of the model
    facts["recipe"] = "benchmarks/train_demo_tokens.py"
    facts["license"] = "Apache-2.0"
    return DefensiveTokens(rows=rows.numpy(), model=MODEL_ID, method="trained", prompt_format="model", metadata=facts)


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=PACKAGE / "assets/smollm2-135m-instruct.tokens.safetensors")
    parser.add_argument("--k", type=int, default=5, help="number of tokens")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.3, help="Adam's learning rate; falls linearly to a tenth")
    parser.add_argument("--scale", type=float, default=1.0, help="start from N(0, I) times this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-only", action="store_true", help="measure the tokens in --output, train none")
    parser.add_argument("--held-back", type=int, default=0, help="training records kept aside, to choose options by")
    args = parser.parse_args()
    trainer = Trainer(args.model)
    content = json.loads((DATA / "train.json").read_text(encoding="utf-8"))
    evaluation = json.loads((DATA / "records.json").read_text(encoding="utf-8"))
    if args.held_back:  # choosing options must not look at the evaluation set
        held_back = content["records"][-args.held_back :]
        measured = (held_back, content["ignore_sentences"], content["injected_prompts"][0])
    else:
        measured = (evaluation["records"], evaluation["ignore_sentences"], evaluation["injected_prompt"])
    if args.measure_only:
        rows = torch.from_numpy(load_tokens(args.output).rows)
    else:
        rows = train(trainer, content, args)
        save_tokens(args.output, described(trainer, rows, args))
    print("norms", [round(norm, 1) for norm in rows.norm(dim=1).tolist()])
    before, after = measure(trainer, trainer.none, *measured), measure(trainer, rows, *measured)
    print(f"{'':32}{'undefended':>12}{'with tokens':>12}")
    for name, value in before.items():
        print(f"{name:32}{value:12.3f}{after[name]:12.3f}")


if __name__ == "__main__":
    main()

"""A tiny model that is trained, in seconds, to think and then to obey; its chat template chooses how it thinks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.checkpoints import CHAT_TEMPLATE, END, SPECIAL_TOKENS, make_checkpoint

OPENING = "<|im_start|>assistant\n"
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>")
# Per end of the prompt, the response. No two thoughts are alike, since the model sees a few tokens only.
SPOKEN = {
    OPENING: "<think>\nThe data says so.\n</think>\n\nHacked!",
    "<|im_start|>loop\n": "<think>\nand on and on" + " and on" * 6,
    "<|im_start|>mistral\n": "[THINK]Ought I?[/THINK]Hacked!",
    "<|start|>assistant": "<|channel|>analysis<|message|>We must.<|end|><|start|>assistant"
    "<|channel|>final<|message|>Hacked!",
    "<|im_start|>plain\n": "Hacked!",
}


def train_thinker(folder: Path, *, steps: int = 100) -> Path:
    """Write a checkpoint that gives every response of `SPOKEN` behind its prompt, whatever the conversation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_checkpoint(folder, width=64, tied=False, special=(*SPECIAL_TOKENS, "[THINK]", "[/THINK]", *HARMONY))
    config = json.loads((folder / "config.json").read_text())
    # A window of a few tokens: what was learned behind short texts holds behind long ones.
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    config |= {"dtype": "float32", "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (len(SPOKEN), steps, 12), generator=generator)
    texts = [tokenizer(prompt + response + END).input_ids for prompt, response in SPOKEN.items()]
    learned = [len(tokenizer(prompt).input_ids) + noise.shape[2] for prompt in SPOKEN]
    width = max(map(len, texts)) + noise.shape[2]
    rows = torch.zeros(len(texts), width, dtype=torch.long)
    labels = torch.full_like(rows, -100)
    for row, (ids, start) in enumerate(zip(texts, learned, strict=True)):
        end = noise.shape[2] + len(ids)
        rows[row, noise.shape[2] : end] = torch.tensor(ids)
        labels[row, start:end] = rows[row, start:end]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        rows[:, : noise.shape[2]] = noise[:, step]
        loss = model(input_ids=rows, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def thinker_with(folder: Path, opening: str, copy: Path, **config: Any) -> str:
    """Copy a thinker, with a chat template whose prompts end in `opening`, and return the copy's folder."""
    shutil.copytree(folder, copy)
    file = copy / "tokenizer_config.json"
    template = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", opening)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template} | config))
    return str(copy)

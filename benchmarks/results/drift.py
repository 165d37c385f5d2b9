"""A drifted sibling: the model, fine-tuned a little on other data, so that weights and embeddings moved.

    python -m benchmarks.results.drift MODEL DATA OUT [--steps N] [--bf16]

All weights train (AdamW, the HF Trainer) on DATA's records *without* an input, which neither the training of
DefensiveTokens nor the evaluation uses; the loss is on the response only. Run again after an interruption, it goes on
from the last of its own checkpoints, to the same weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

STEPS, BATCH, RATE, LONGEST = 40, 4, 5e-5, 160
SAVE_EVERY = 40
"""Steps; a multiple of the 5 between two logged losses, so that an interruption doesn't change them."""


def examples(tokenizer: Any, data: Path) -> list[dict[str, list[int]]]:
    """Return ids and labels (-100 over the prompt) of the records without an input, the longest left out."""
    rows = []
    for record in json.loads(data.read_text(encoding="utf-8")):
        if record["input"].strip():
            continue
        messages = [{"role": "user", "content": record["instruction"]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        response = [*tokenizer(record["output"].strip(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(prompt_ids) + len(response) <= LONGEST:
            rows.append({"input_ids": prompt_ids + response, "labels": [-100] * len(prompt_ids) + response})
    return rows


def drift(model_name: str, data: Path, out: Path, steps: int = STEPS, *, bf16: bool = False) -> dict[str, float]:
    """Fine-tune, write the sibling to `out` in float32, and return how far it moved.

    Args:
        model_name: of a chat model.
        data: Alpaca's records.
        out: folder of the sibling.
        steps: of `BATCH` records.
        bf16: multiply in bfloat16 (autocast); weights and optimiser stay in float32.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32, use_safetensors=True)
    before = model.get_input_embeddings().weight.detach().clone()
    rows = examples(tokenizer, data)
    checkpoints = Path(f"{out}.checkpoints")
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        logging_steps=5,
        save_steps=SAVE_EVERY,
        save_total_limit=1,
        report_to="none",
        seed=0,
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
    )
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    # The state is written last, so a checkpoint that has one is whole.
    whole = [int(file.parent.name.split("-")[1]) for file in checkpoints.glob("checkpoint-*/trainer_state.json")]
    trainer.train(resume_from_checkpoint=str(checkpoints / f"checkpoint-{max(whole)}") if whole else None)
    after = model.get_input_embeddings().weight.detach().cpu()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(checkpoints)
    return {
        "steps": steps,
        "batch": BATCH,
        "rate": RATE,
        "bf16": bf16,
        "records": len(rows),
        "first_loss": history[0],
        "last_loss": history[-1],
        "relative_embedding_change": float((after - before).norm() / before.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    args = parser.parse_args()
    print(json.dumps(drift(args.model, args.data, args.out, args.steps, bf16=args.bf16)))


if __name__ == "__main__":
    main()

"""Utility: how likely the model finds the reference answers to clean prompts, with and without tokens.

    python -m benchmarks.results.log_likelihood MODEL [--tokens FILE] [--records N]

Mean over AlpacaFarm's records of log p(output | clean prompt) per token, in nats.
"""

from __future__ import annotations

import argparse
import json

import numpy as np


def log_likelihoods(model_name: str, tokens_file: str | None, n_records: int) -> list[float]:
    """Return per record the mean log-likelihood of a reference token, nats."""
    import torch

    from dtt_plugin.data.records import RECORDS_FILE, data_file, load_records
    from dtt_plugin.prompt.formats import MODEL_FORMAT
    from dtt_plugin.tokens.files import load_tokens
    from dtt_plugin.training.chat_model import load_chat_model
    from dtt_plugin.training.soft_prompt import Example, SoftPrompt

    tokens = load_tokens(tokens_file) if tokens_file else None
    prompt_format = tokens.prompt_format if tokens else MODEL_FORMAT
    tokenizer, model, _, encode = load_chat_model(model_name, dtype="float32", prompt_format=prompt_format)
    rows = torch.from_numpy(tokens.rows) if tokens else torch.empty(0, model.get_input_embeddings().weight.shape[1])
    prompt = SoftPrompt(model, rows)
    found = []
    answered = [record for record in load_records(data_file(RECORDS_FILE)) if record["output"].strip()]
    for record in answered[:n_records]:
        answer = tokenizer(record["output"].strip(), add_special_tokens=False).input_ids
        with torch.no_grad():
            loss = prompt([Example(encode(record["instruction"], record["input"]), answer)])
        found.append(-float(loss) / len(answer))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens")
    parser.add_argument("--records", type=int, default=64)
    args = parser.parse_args()
    values = np.array(log_likelihoods(args.model, args.tokens, args.records))
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    print(json.dumps({"mean": float(values.mean()), "standard_error": error, "values": values.tolist()}))


if __name__ == "__main__":
    main()

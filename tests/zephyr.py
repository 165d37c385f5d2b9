"""Checkpoints of Zephyr's kind: SentencePiece's tokenizer, a BOS that the template does not render, markers as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoints import make_checkpoint

SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPACE = "\u2581"
_PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}
_FIRST = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}
BEGINNINGS: dict[str, dict[str, Any]] = {
    "a space in front of every text": {"normalizer": _PREPEND, "pre_tokenizer": None},
    "a space in front of the first": {"normalizer": None, "pre_tokenizer": _FIRST},
}


def make_zephyr(folder: Path, beginning: str) -> Path:
    """Write a checkpoint of width 32 and return its folder.

    Args:
        folder: where to.
        beginning: one of `BEGINNINGS`: where the tokenizer puts a space of its own.
    """
    make_checkpoint(folder, dtype="float32")
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), _SPACE, 2 * _SPACE]
    pieces += [f"<extra{n}>" for n in range(268 - len(pieces))]
    ids = {piece: row for row, piece in enumerate(pieces)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, **flags} for token in SPECIAL],
        **BEGINNINGS[beginning],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[_SPACE, _SPACE]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "model_max_length": 2048,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | ends))
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder

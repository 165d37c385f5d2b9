"""A tokenizer's vocabulary by content: which bytes (or which special token) each row stands for.

Two models that spell the same token differently (`Ġthe` in byte-level BPE,
`▁the` in SentencePiece) agree on its bytes, so bytes are what is compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dtt_plugin.checkpoint.folder import read_json_table
from dtt_plugin.checkpoint.opening import Checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes, sha256_file

_MOST_ROWS = 1 << 32  # tokenizers keeps ids in 32 bits
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """What the rows of an embedding stand for."""

    token_bytes: dict[bytes, int]
    """Ordinary tokens: their bytes, and their row."""
    special: dict[str, int]
    """Special tokens (control tokens, matched by name and never as text), and their row."""
    added: dict[str, int]
    """Every token added to the model's own vocabulary, special or not, and its row."""

    def name_of(self, row: int) -> str:
        """Return the token of `row` for a message, or `no token` for a row of padding."""
        for name, special_row in self.special.items():
            if special_row == row:
                return name
        for token, token_row in self.token_bytes.items():
            if token_row == row:
                return repr(token.decode("utf-8", "backslashreplace"))
        return "no token"


def load_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Read the vocabulary of `checkpoint` from tokenizer.json, else through transformers.

    Raises:
        DttError: no tokenizer, or one whose parts don't fit together.
    """
    path = checkpoint.folder / "tokenizer.json"
    if path.is_file():
        return parse_vocabulary(read_json_table(path), path)
    return parse_vocabulary(_through_transformers(checkpoint), checkpoint.folder)


def vocabulary_digest(checkpoint: Checkpoint) -> str:
    """Return a digest that changes when the vocabulary does, without parsing it."""
    path = checkpoint.folder / "tokenizer.json"
    if path.is_file():
        return sha256_file(path)
    return sha256_bytes(json.dumps(_through_transformers(checkpoint), sort_keys=True).encode())


def parse_vocabulary(tokenizer: dict[str, Any], path: Path) -> Vocabulary:
    """Build the vocabulary from the contents of a tokenizer.json.

    Args:
        tokenizer: the JSON object.
        path: where it came from, for messages.

    Raises:
        DttError: it has no vocabulary of tokens and row numbers.
    """
    added, special = {}, {}
    try:
        model = tokenizer["model"]
        pairs = _pairs(model["vocab"])
        for token in tokenizer.get("added_tokens") or ():
            added[token["content"]] = token["id"]
            if token.get("special"):
                special[token["content"]] = token["id"]
        if not all(map(_is_pair, added.items())):
            raise ValueError("an added token that is no text, or without a row")
    except (KeyError, TypeError, ValueError) as error:
        raise DttError(f"{path} has no readable vocabulary; download the tokenizer again.") from error
    decode = _decoder(tokenizer)
    token_bytes: dict[bytes, int] = {}
    everything = sorted([*pairs, *added.items()], key=lambda pair: pair[1])
    for token, row in everything:
        if token not in special:
            # Of two tokens with the same bytes (a literal and its byte fallback) the first row counts.
            key = token.encode("utf-8", "surrogatepass") if token in added else decode(token)
            token_bytes.setdefault(key, row)
    return Vocabulary(token_bytes, special, added)


def _is_pair(pair: tuple[Any, Any]) -> bool:
    token, row = pair
    return type(token) is str and type(row) is int and 0 <= row < _MOST_ROWS


def _pairs(vocab: Any) -> list[tuple[str, int]]:
    """Return (token, row) of a vocabulary written as a table, or as Unigram's list of [token, score]."""
    pairs: Iterable[tuple[Any, Any]] = (
        vocab.items() if isinstance(vocab, dict) else ((entry[0], row) for row, entry in enumerate(vocab))
    )
    checked = [pair for pair in pairs if _is_pair(pair)]
    if len(checked) < len(vocab) or not checked:
        raise ValueError("not a vocabulary")
    return checked


def _decoder(tokenizer: dict[str, Any]) -> Any:
    """Return the function from a token's spelling to its bytes that suits this kind of tokenizer."""
    parts = json.dumps([tokenizer.get("decoder"), tokenizer.get("pre_tokenizer"), tokenizer.get("normalizer")])
    if '"ByteLevel"' in parts:
        return _byte_level
    if "▁" in parts or "\\u2581" in parts or '"Metaspace"' in parts:
        return _sentencepiece
    return str.encode


@cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others from U+0100 on.

    Source: bytes_to_unicode in openai/gpt-2, src/encoder.py.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    letters = _byte_of_letter()
    try:
        return bytes([letters[letter] for letter in token])
    except KeyError:
        return token.encode("utf-8", "surrogatepass")


def _sentencepiece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode("utf-8", "surrogatepass")


def _through_transformers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Convert a tokenizer without tokenizer.json (SentencePiece's tokenizer.model, vocab.json) to one."""
    if not any((checkpoint.folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        raise DttError(
            f"{checkpoint.name} has no tokenizer beside its weights, so its rows can't be matched by token; "
            "give the model's folder, or match by row number with --match rows."
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DttError(
            f"{checkpoint.name} has no tokenizer.json, and reading its older tokenizer needs transformers: "
            "pip install 'dtt-plugin[hf]'."
        ) from error
    try:
        # trust_remote_code stays off: a tokenizer must not run code of its own.
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.folder), use_fast=True)
        table: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever it stumbles over in files that anyone may have written
        raise DttError(f"{checkpoint.name}: its tokenizer can't be read ({error}); download it again.") from error
    return table

"""What a defended checkpoint consists of, decided before a byte is written."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.bake.tokenizer import TokenizerFiles
from dtt_plugin.checkpoint.families import OTHER_HEAD, always_tied, families
from dtt_plugin.checkpoint.folder import is_copy
from dtt_plugin.checkpoint.opening import Checkpoint
from dtt_plugin.checkpoint.tensors import TensorLocation
from dtt_plugin.errors import DttError
from dtt_plugin.prompt.formats import defensive_token_names
from dtt_plugin.tokens.files import DefensiveTokens

_ROWS_AT_ONCE = 1024
AT_ONCE = 4
"""Threads that read, add up, compare or hash."""
_PLAIN_FLOATS = frozenset({"BF16", "F16", "F32"})

BIAS_OF_NEVER = -1e4
"""Where a head has a bias, the bias of a DefensiveToken."""


@dataclass(frozen=True)
class TensorChange:
    """A tensor of the defended checkpoint that differs from the base model's."""

    name: str
    source: TensorLocation
    """Where its unchanged rows come from; for a new head of a tied model, the input embedding."""
    n_rows: int
    """Of the changed tensor: at least the source's."""
    rows: dict[int, bytes]
    """The rows that differ, in the stored type."""
    new: bool = False
    """The base model has no tensor of this name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the changed tensor."""
        return (self.n_rows, *self.source.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the changed tensor."""
        return self.n_rows * self.source.row_nbytes


@dataclass(frozen=True)
class BakePlan:
    """Everything that decides what is written."""

    checkpoint: Checkpoint
    tokens: DefensiveTokens
    names: tuple[str, ...]
    token_ids: tuple[int, ...]
    n_rows: int
    """Rows of the defended checkpoint's input embedding, its `vocab_size`."""
    changes: tuple[TensorChange, ...]
    untie: bool
    """The base model's output head is its input embedding; the defended one has a head of its own."""


def make_plan(
    checkpoint: Checkpoint, tokens: DefensiveTokens, tokenizer: TokenizerFiles, *, reuse_reserved: bool
) -> BakePlan:
    """Decide ids, shapes and changed rows.

    Args:
        checkpoint: the base model, all its files.
        tokens: (k, d), in the base model's embedding space.
        tokenizer: the base model's.
        reuse_reserved: overwrite unused reserved tokens, so that no shape changes.

    Raises:
        DttError: widths differ, the matrices are quantized, or the model can't be untied.
    """
    embedding = checkpoint.input_embedding()
    _check_base(checkpoint, tokens, tokenizer, embedding)
    token_ids = tokenizer.reserved_ids(tokens.k) if reuse_reserved else tokenizer.next_ids(tokens.k)
    base_rows = embedding.shape[0]
    n_rows = max(base_rows, token_ids[-1] + 1)
    _check_per_layer_tables(checkpoint, n_rows)
    with np.errstate(over="ignore"):  # said below, in words
        input_rows = tokens.rows.astype(embedding.numpy_dtype)
    if not np.isfinite(input_rows.astype(np.float32)).all():
        raise DttError(
            f"A DefensiveToken does not fit the type of {embedding.name} ({embedding.dtype}); "
            "check that the tokens were made for this model."
        )
    changes = [
        TensorChange(location.name, location, n_rows, _rows(token_ids, input_rows))
        for location in (embedding, *checkpoint.copies(embedding))
    ]
    head = checkpoint.output_head()
    untie = checkpoint.tied
    if untie and head is not None and not _equal(head, embedding):
        raise DttError(
            f"{checkpoint.name} says tie_word_embeddings=true and stores another head, {head.name}: engines "
            "disagree on which counts; set the value in its config.json to the one that is meant."
        )
    source = embedding if untie or head is None else head
    head_name = _head_name(embedding.name) if head is None else head.name
    head_size = _grown(source, base_rows, n_rows)
    # Output rows that the base model has stay as they are: without the tokens every logit is the base's.
    added = [token_id for token_id in token_ids if token_id >= base_rows]
    if added or untie or head is None:
        ordinary = mean_row(source, min(tokenizer.size, base_rows)) if added else b""
        changes.append(TensorChange(head_name, source, head_size, dict.fromkeys(added, ordinary), new=head is None))
    for location in checkpoint.copies(head) if head is not None and added else ():
        ordinary = mean_row(location, min(tokenizer.size, base_rows))
        changes.append(TensorChange(location.name, location, n_rows, dict.fromkeys(added, ordinary)))
    changes += _bias_change(checkpoint, head_name, added, n_rows)
    return BakePlan(
        checkpoint,
        tokens,
        tuple(defensive_token_names(tokens.k)),
        tuple(token_ids),
        n_rows,
        tuple(changes),
        untie,
    )


def _check_base(
    checkpoint: Checkpoint, tokens: DefensiveTokens, tokenizer: TokenizerFiles, embedding: TensorLocation
) -> None:
    if embedding.file.name.startswith("consolidated"):
        raise DttError(
            f"{checkpoint.name} holds its weights in Mistral's own format alone ({embedding.file.name}), which engines "
            "read with Mistral's own tokenizer; give the checkpoint in Hugging Face's format."
        )
    if embedding.dtype not in _PLAIN_FLOATS:
        raise DttError(
            f"{embedding.name} of {checkpoint.name} has the type {embedding.dtype}; "
            "only bfloat16, float16 and float32 embeddings can take DefensiveTokens."
        )
    tokens.check_width(embedding.shape[1], name="The token file", model=checkpoint.name)
    if family := always_tied(checkpoint.config()):
        raise DttError(
            f"{checkpoint.name} ({family}) computes its output from the input embedding in every engine that vLLM "
            "starts, so a defended checkpoint of it would generate its DefensiveTokens; "
            + ("such a model is not supported." if _per_layer_tables(checkpoint) else "use --model dtt_hf instead.")
        )
    if tokenizer.defended:
        raise DttError(f"{checkpoint.name} already has DefensiveTokens; bake into the base model it was made from.")
    if (stray := tokenizer.first_without_row(embedding.shape[0])) is not None:
        raise DttError(
            f"{embedding.name} of {checkpoint.name} has {embedding.shape[0]} rows and none for the token {stray!r}, "
            "which its tokenizer files or its tokenizer's class add; name another token there, or null."
        )
    if tokenizer.size > embedding.shape[0]:
        raise DttError(
            f"The tokenizer of {checkpoint.name} has {tokenizer.size} tokens and {embedding.name} only "
            f"{embedding.shape[0]} rows; the two don't belong together."
        )
    quantized_head = [
        name
        for name in checkpoint.tensors()
        if re.search(r"(^|\.)(lm_head|embed_out)\.(?!(\w+\.)?(weight|bias)$)", name)
    ]
    head = checkpoint.output_head()
    if head is not None and head.dtype not in _PLAIN_FLOATS:
        quantized_head.append(head.name)
    if quantized_head:
        raise DttError(
            f"The output head of {checkpoint.name} is quantized ({quantized_head[0]}); "
            "use a checkpoint whose head is not."
        )
    _check_head(checkpoint, embedding, head)


def _check_head(checkpoint: Checkpoint, embedding: TensorLocation, head: TensorLocation | None) -> None:
    """Refuse where the model's own head is not known, or engines would not find the one that baking writes."""
    if head is not None:
        return
    other = [
        name
        for name, location in checkpoint.tensors().items()
        if location.shape == embedding.shape
        and name != embedding.name
        and not is_copy(name)
        and not re.search("embed|wpe|position", name)
    ]
    if other:
        raise DttError(
            f"{checkpoint.name} has no output head of a known name; {other[0]} has the embedding's shape and may be "
            "it, and engines would not find the one that baking writes; such a model is not supported."
        )
    if family := next((family for family in families(checkpoint.config()) if family in OTHER_HEAD), None):
        raise DttError(
            f"{checkpoint.name} ({family}) calls its output head neither lm_head nor embed_out, so engines would not "
            "find the one that baking writes; such a model is not supported."
        )
    if not checkpoint.says_tied:
        raise DttError(
            f"{checkpoint.name} should have an output head (its config.json does not say tie_word_embeddings=true) "
            "and none of its files holds one; download it again, or say it there if the head is the embedding."
        )


def _per_layer_tables(checkpoint: Checkpoint) -> list[TensorLocation]:
    """Return the further tables of embeddings, which feed every layer (Gemma 3n and 4)."""
    tensors = checkpoint.tensors().items()
    return [location for name, location in tensors if name.endswith("embed_tokens_per_layer.weight")]


def _check_per_layer_tables(checkpoint: Checkpoint, n_rows: int) -> None:
    for table in _per_layer_tables(checkpoint):
        if table.shape[0] < n_rows:
            raise DttError(
                f"{checkpoint.name} has embeddings per layer ({table.name}), which have no row for a token that is "
                "added; bake with --reuse-reserved, which takes reserved tokens that have one."
            )


def _rows(token_ids: list[int], values: NDArray[Any]) -> dict[int, bytes]:
    return {token_id: row.tobytes() for token_id, row in zip(token_ids, values, strict=True)}


def _grown(source: TensorLocation, base_rows: int, n_rows: int) -> int:
    if source.shape[0] != base_rows:
        raise DttError(
            f"{source.name} has {source.shape[0]} rows and the input embedding {base_rows}; "
            "such a model is not supported."
        )
    return n_rows


def _equal(one: TensorLocation, other: TensorLocation) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    starts = range(0, one.shape[0], _ROWS_AT_ONCE)
    ranges = [(start, min(start + _ROWS_AT_ONCE, one.shape[0])) for start in starts]
    return all(one.read_rows(*rows).tobytes() == other.read_rows(*rows).tobytes() for rows in ranges)


def _head_name(embedding_name: str) -> str:
    """Return what transformers and vLLM call the head of the model with this input embedding."""
    if embedding_name.endswith("embed_in.weight"):
        return "embed_out.weight"
    prefix = re.match(r"^(language_model\.)(?:model\.)?embed_tokens", embedding_name)
    return (prefix.group(1) if prefix else "") + "lm_head.weight"


def _bias_change(checkpoint: Checkpoint, head_name: str, token_ids: list[int], n_rows: int) -> list[TensorChange]:
    bias = checkpoint.tensors().get(head_name.removesuffix("weight") + "bias")
    if bias is None or not token_ids:
        return []
    never = np.full(1, BIAS_OF_NEVER).astype(bias.numpy_dtype).tobytes()
    return [TensorChange(bias.name, bias, n_rows, dict.fromkeys(token_ids, never))]


def mean_row(matrix: TensorLocation, n_rows: int) -> bytes:
    """Return the mean of the first `n_rows` rows of `matrix`, in the stored type.

    As a DefensiveToken's output row it can't win: its logit is the mean of the ordinary tokens' logits, so
    at most their maximum, and by Jensen's inequality its probability is at most the mean of theirs, which is
    below 1 / n_rows, at every temperature.
    """

    def block_sum(start: int) -> NDArray[np.float64]:
        block = matrix.read_rows(start, min(start + _ROWS_AT_ONCE, n_rows))
        partial: NDArray[np.float32] = _as_float32(block).sum(axis=0, dtype=np.float32)
        return partial.astype(np.float64)

    # Side by side, and added in order: the same bytes on every machine.
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="dtt-mean") as pool:
        total = sum(pool.map(block_sum, range(0, n_rows, _ROWS_AT_ONCE)), np.zeros(matrix.shape[1], np.float64))
    mean: bytes = (total / n_rows).astype(np.float32).astype(matrix.numpy_dtype).tobytes()
    return mean


def _as_float32(block: NDArray[Any]) -> NDArray[np.float32]:
    if block.dtype.name == "bfloat16":  # ten times faster than ml_dtypes' conversion
        return (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float32)

"""The responses to learn: the undefended model's own answers to the clean prompts, or the records' outputs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dtt_plugin.data.records import Record, read_json
from dtt_plugin.errors import DttError
from dtt_plugin.files.cache import LABELS
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.files.replacing import keep_newest, write_json
from dtt_plugin.progress import Bar
from dtt_plugin.tasks.thoughts import opened_by, read
from dtt_plugin.training.mixture import Encode
from dtt_plugin.training.soft_prompt import SoftPrompt, end_ids

logger = logging.getLogger("dtt_plugin")
_AT_ONCE = 128
_MOST_ENTRIES = LABELS.most


def self_labels(
    undefended: SoftPrompt, encode: Encode, records: Sequence[Record], *, tokenizer: Any, new_tokens: int, weights: str
) -> list[list[int]]:
    """Return per record the ids of the model's greedy answer to the clean prompt, without thoughts in front of it.

    What the model says is kept in the cache.

    Args:
        undefended: the model with k = 0.
        encode: renders a prompt.
        records: the training records.
        tokenizer: the model's, with a padding token.
        new_tokens: answers are cut at this many tokens.
        weights: the model's state, for the cache key.

    Raises:
        DttError: a response ends inside of its thoughts.
    """
    prompts = [encode(record["instruction"], record["input"]) for record in records]
    responses = _responses(undefended, prompts, pad=tokenizer.pad_token_id, new_tokens=new_tokens, weights=weights)
    return _answers(responses, tokenizer, new_tokens)


def check_prompt(tokenizer: Any, prompt: list[int]) -> None:
    """Refuse a prompt behind which an answer would be read as a thought.

    Raises:
        DttError: it ends in an opened thought.
    """
    text = tokenizer.decode(prompt)
    if read("An answer.", text).answer is None:
        raise DttError(
            f"The prompts of this model end in {opened_by(text)}, so that whatever it learnt to say would be thoughts;"
            " give a model whose chat template opens none, such as a copy of this one with another template."
        )


def _responses(
    undefended: SoftPrompt, prompts: list[list[int]], *, pad: int, new_tokens: int, weights: str
) -> list[list[int]]:
    key = sha256_json([weights, prompts, new_tokens, str(undefended.embed.weight.dtype)])
    path = LABELS.folder / f"{key}.json"
    if (kept := _kept(path)) is not None:
        logger.info("Labels from the cache: %s", path)
        return kept
    labels: list[list[int]] = []
    for start in Bar(range(0, len(prompts), _AT_ONCE), desc="labels by the undefended model", unit=f" x {_AT_ONCE}"):
        labels += undefended.generate(prompts[start : start + _AT_ONCE], new_tokens, pad=pad)
    try:
        write_json(path, {"labels": labels, "sha256": sha256_json(labels)})
        keep_newest(path.parent, LABELS.pattern, _MOST_ENTRIES)
    except DttError as error:
        logger.warning("The labels can't be kept for another run: %s", error)
    return labels


def _answers(responses: list[list[int]], tokenizer: Any, new_tokens: int) -> list[list[int]]:
    """Return what of the responses is scored when they are evaluated: what stands behind their thoughts."""
    answers, thoughtful, unfinished = [], 0, 0
    for ids in responses:
        reading = read(tokenizer.decode(ids))
        thoughtful += reading.thought
        unfinished += reading.answer is None
        answers.append(_ending(ids, reading.answer or "", tokenizer) if reading.thought else ids)
    if unfinished:
        raise DttError(
            f"{unfinished} of {len(responses)} answers of the undefended model are thoughts to their end, the"
            f" {new_tokens}th token, so there is nothing to learn from them; turn thoughts off in its chat template, or"
            " raise --label-tokens or give --labels data (dtt train)."
        )
    if thoughtful:
        logger.warning(
            "%d of %d answers of the undefended model begin with thoughts. What is learnt are the answers behind them:"
            " under the tokens it answers at once.",
            thoughtful,
            len(responses),
        )
    return answers


def _ending(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """Return the ids at the end of `ids` that are `text`."""
    starts = (n for n in reversed(range(len(ids))) if tokenizer.decode(ids[n:]).lstrip() == text)
    start = next(starts, None)
    # Where a token holds the end of the thoughts and the beginning of the answer, the answer is encoded anew.
    encoded: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return encoded if start is None else ids[start:]


def _kept(path: Path) -> list[list[int]] | None:
    """Return the labels that are kept in `path`; a damaged file counts as none."""
    try:
        content = read_json(path)
        labels: list[list[int]] = content["labels"]
        return labels if content["sha256"] == sha256_json(labels) else None
    except (DttError, OSError, TypeError, KeyError):
        return None


def data_labels(tokenizer: Any, model: Any, records: Sequence[Record], *, new_tokens: int) -> list[list[int]]:
    """Return per record the ids of its output with the end-of-turn token, cut at `new_tokens`.

    Raises:
        DttError: a record has no output, or the model's turns have no end.
    """
    labels = []
    end = _end_of_turn(tokenizer, model)
    for record in records:
        if not record["output"].strip():
            raise DttError(f"The record {record['instruction']!r} has no output; use --labels self.")
        ids = tokenizer(record["output"].strip(), add_special_tokens=False).input_ids
        labels.append([*ids, end][:new_tokens])
    return labels


def _end_of_turn(tokenizer: Any, model: Any) -> int:
    """Return the token that the model's own template writes behind an answer: not everywhere the tokenizer's EOS."""
    answer = "An answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
    except TemplateError as error:
        raise DttError(f"The chat template refuses an assistant's turn ({error}); use --labels self.") from error
    ends = end_ids(model)
    ids = tokenizer(after, add_special_tokens=False).input_ids
    found = next((token for token in ids if token in ends), tokenizer.eos_token_id)
    if found is None:
        raise DttError("The model's answers have no end token; set eos_token in its tokenizer_config.json.")
    return int(found)

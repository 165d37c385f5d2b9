"""Where a model's thoughts end and its answer begins, in text alone.

A thinking model's response begins with its thoughts (`<think>` ... `</think>`, a channel of
gpt-oss ...), or its prompt ends in the opened thought and the response starts inside. Whoever scores
a response by how it begins has to read the answer behind the thoughts.

Thoughts count only where they stand at the very beginning: an answer may quote any marker. Of one
thought the first end counts, so that what is read from a beginning (`answer_begun`) is what is read from the whole.

Sources: the chat templates and model cards of Qwen3, DeepSeek-R1, Magistral, Seed-OSS, Kimi, MiniMax, OpenThinker,
Command A Reasoning, Apertus, Gemma 4, MedGemma and Granite 3.2; OpenAI's description of the harmony format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cache, wraps
from typing import NamedTuple

_TAGS = ("think", "thinking", "thought", "thoughts", "reasoning", "reflection", "scratchpad", "seed:think", "mm:think")
_PAIRS = {
    **{f"<{tag}>": f"</{tag}>" for tag in _TAGS},
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<|channel>thought": "<channel|>",
    "<unused94>thought": "<unused95>",
}
_HARMONY_TURN = "<|start|>assistant"
"""How a harmony prompt (gpt-oss) ends: the response begins with its channel."""
_HARMONY_THOUGHTS = ("analysis", "commentary")
# Where a decoder drops special tokens, the name of the last channel stands bare behind the turn's.
_HARMONY_FINAL = r"<\|channel\|>\s*final\s*(?:<\|constrain\|>\s*\w{1,9}\s*)?<\|message\|>|assistantfinal"

_ENDS: dict[str, re.Pattern[str]] = {
    **{opener: re.compile(re.escape(closer), re.IGNORECASE) for opener, closer in _PAIRS.items()},
    **{
        opener + channel: re.compile(_HARMONY_FINAL)
        for channel in _HARMONY_THOUGHTS
        for opener in ("<|channel|>", _HARMONY_TURN)
    },
}
"""Per marker that opens a thought, what ends it."""
_WORDS = {
    **dict.fromkeys(_HARMONY_THOUGHTS, re.compile("assistantfinal")),
    "Here is my thought process:": re.compile("Here is my response:"),
}
"""What may as well be English, and is a thought only if it ends like one."""
_ANSWER_TOKENS = ("<|begin_of_solution|>", "<|START_RESPONSE|>", "<|START_TEXT|>")
_NO_THOUGHT = (
    *_PAIRS.values(),  # once more behind an ended thought
    *_ANSWER_TOKENS,
    _HARMONY_TURN,
    f"{_HARMONY_TURN}final",
    "<|channel|>final<|message|>",
)
"""Markers in front of an answer that hold no thought."""
_ANSWER_TAGS = ("<answer>", "<response>", "<output>")
"""What only behind thoughts is no part of the answer."""

_END_OF = {marker.lower(): end for marker, end in (_ENDS | _WORDS).items()}


class _Markers:
    """Markers that may stand at one place: in any case, except for words, which stand as in English."""

    def __init__(self, *markers: str) -> None:
        self._markers = [(marker, marker in _WORDS) for marker in markers]
        self.longest = max(map(len, markers))
        by_length = sorted(markers, key=len, reverse=True)
        parts = [f"(?-i:{re.escape(marker)})" if marker in _WORDS else re.escape(marker) for marker in by_length]
        self.pattern = re.compile("|".join(parts), re.IGNORECASE | re.ASCII)

    def may_become(self, text: str) -> bool:
        """Return whether a marker begins so and is longer."""
        return any(
            len(text) < len(marker)
            and (marker if exact else marker.lower()).startswith(text if exact else text.lower())
            for marker, exact in self._markers
        )


_AT_THE_BEGINNING = _Markers(*_ENDS, *_WORDS, *_NO_THOUGHT)
_BEHIND_THOUGHTS = _Markers(*_ENDS, *_WORDS, *_NO_THOUGHT, *_ANSWER_TAGS)

_HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>")
_TOKENS = {*_PAIRS, *_PAIRS.values(), *_ANSWER_TOKENS, "<|channel>", "<unused94>"}


class Reading(NamedTuple):
    """A response without its thoughts."""

    answer: str | None
    """What is to be scored; None where no answer follows the thoughts: the response is unfinished."""
    thought: bool
    """Whether it begins with thoughts."""


def read(response: str, prompt: object = "", *, end: str | None = None) -> Reading:
    """Return the answer in a response.

    Args:
        response: what the model generated.
        prompt: what it was asked. Text tells whether it ends in an opened thought. Anything else (the messages for
            a server, which renders them itself) does not; an end that nothing opened then ends thoughts, too.
        end: a further end of thoughts, which the user named.
    """
    if end and end in response:
        return Reading(read(response.rpartition(end)[2].lstrip()).answer or None, thought=True)
    if end and not any(closer in end for closer in _PAIRS.values()):
        return Reading(None, thought=True)
    before = opened_by(prompt) if isinstance(prompt, str) else _opened_unseen(response)
    at, thought = _skip(before + response, whole=True)
    if at is None:
        return Reading(None, thought)
    answer = (before + response)[max(at, len(before)) :]
    return Reading(answer.lstrip() or None if thought else answer, thought)


def answer_begun(beginning: str) -> str | None:
    """Return the beginning of the answer in every response that begins so; None as long as it has not surely begun."""
    at, _ = _skip(beginning, whole=False)
    return None if at is None else beginning[at:]


def opened_by(prompt: str) -> str:
    """Return the marker at a prompt's end that the response has to be read behind; "" where there is none."""
    end = prompt.rstrip()
    forced = re.search(r"<\|channel\|>(?:analysis|commentary)(?=[^<]*<\|message\|>$)", end)
    if forced:
        return forced[0]
    return next((marker for marker in (*_PAIRS, _HARMONY_TURN) if end.endswith(marker)), "")


@cache
def behind(marker: str, decided: Callable[[str], bool]) -> Callable[[str], bool]:
    """Return the rule `decided` for responses that are read behind `marker`, from `opened_by`."""
    if not marker:
        return decided

    @wraps(decided)
    def decided_behind(beginning: str) -> bool:
        return decided(marker + beginning)

    return decided_behind


def has_unopened_end(response: str) -> bool:
    """Return whether an end of thoughts stands in a response that does not open them."""
    return bool(_opened_unseen(response))


def marker_tokens(special: Collection[str]) -> set[str]:
    """Return those special tokens of a tokenizer that tell where thoughts begin and end."""
    # <|end|> and <|start|> are other models' ends of turns.
    return (_TOKENS | set(_HARMONY_TOKENS if "<|channel|>" in special else ())) & set(special)


def _opened_unseen(response: str) -> str:
    """Return the marker that the first end in a response lacks, as if a prompt that we can't see had it."""
    if _skip(response, whole=True)[1]:
        return ""
    ends = [(match.start(), opener) for opener in _PAIRS if (match := _ENDS[opener].search(response))]
    at, opener = min(ends, default=(0, ""))
    return "" if opener.lower() in response[:at].lower() else opener


def _skip(text: str, *, whole: bool) -> tuple[int | None, bool]:
    """Return where the answer begins, and whether thoughts stand in front of it.

    The place is None inside of thoughts; and, for a text that is only the beginning of a response, where what
    follows may yet make thoughts of its end.
    """
    at, thought = 0, False
    while True:
        start = len(text) - len(text[at:].lstrip()) if text[at : at + 1].isspace() else at
        markers = _BEHIND_THOUGHTS if thought else _AT_THE_BEGINNING
        if not whole and markers.may_become(text[start : start + markers.longest]):
            return None, thought
        marker = markers.pattern.match(text, start)
        if marker is None:
            return at, thought
        pattern = _END_OF.get(marker[0].lower())
        if pattern is None:
            at = marker.end()
        elif end := pattern.search(text, marker.end()):
            at, thought = end.end(), True
        elif whole and marker[0] in _WORDS:
            return at, thought
        else:
            return None, True

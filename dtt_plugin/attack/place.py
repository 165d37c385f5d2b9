"""Where a suffix stands in one record's prompt, and which suffixes can really be sent.

A suffix counts only if the whole prompt, with the suffix as text in it, neutralised, rendered and encoded as the
evaluation does, has the very ids that were optimised.
"""

from __future__ import annotations

from collections.abc import Sequence

from dtt_plugin.data.records import Record
from dtt_plugin.errors import DttError
from dtt_plugin.prompt.renderer import PromptRenderer
from dtt_plugin.tasks.attacks import HACKED
from dtt_plugin.tasks.rules import Rule

_PLACEHOLDER = " zqxjkvw"
_FILLERS = (" !", " x", "!", "x")


class Place:
    """One record's prompt with a gap for a suffix.

    Args:
        renderer: of the arm.
        k: DefensiveTokens in front of its prompts.
        record: trusted instruction.
        data: untrusted data with the injected prompt, to which the suffix is appended.
        tokens: length of the suffix.
        rule: whether the injected prompt was followed.

    Raises:
        DttError: no suffix of that length stands there as it was optimised.
    """

    def __init__(
        self, renderer: PromptRenderer, k: int, record: Record, data: str, tokens: int, rule: Rule = HACKED
    ) -> None:
        self.renderer, self._k, self.rule = renderer, k, rule
        self._instruction, self._data = record["instruction"], data
        self._tokenizer = renderer.tokenizer
        front, found, self._tail_text = self._text(_PLACEHOLDER).rpartition(_PLACEHOLDER)
        if not found:
            raise DttError("The chat template changes the end of the untrusted data; no suffix can be optimised there.")
        self._head_text = front
        self.head, self.start, self.tail = self._split(tokens)

    def _text(self, suffix: str) -> str:
        return self.renderer.render(
            [{"role": "system", "content": self._instruction}, {"role": "user", "content": self._data + suffix}]
        ).text

    def prompt(self, suffix: str) -> list[int]:
        """Return the ids, without the DefensiveTokens, of the prompt in which a suffix is sent."""
        return self.renderer.encode(self._text(suffix))[self._k :]

    def _split(self, tokens: int) -> tuple[list[int], list[int], list[int]]:
        """Return the ids before the suffix, a suffix to start from, and the ids behind it."""
        head = self.renderer.encode(self._head_text)
        best: list[int] = []
        tail: list[int] = []
        for filler in _FILLERS:
            for n in range(tokens, 0, -1):
                start = self.renderer.encode(filler * n)
                whole = self.renderer.encode(self._head_text + filler * n + self._tail_text)
                stands = whole[: len(head) + len(start)] == head + start
                if len(start) <= tokens and stands and len(start) > len(best):
                    best, tail = start, whole[len(head) + len(start) :]
                    break
            if len(best) == tokens:
                break
        self._head = head
        self.head, self.tail = head[self._k :], tail
        if not best or not self.admits(best):
            raise DttError(
                f"No suffix of {tokens} tokens comes through this tokenizer as it was written; attack a model with"
                " another one."
            )
        return self.head, best, tail

    def suffix_text(self, ids: Sequence[int]) -> str:
        """Return a suffix as text."""
        return self._texts([ids])[0]

    def _texts(self, suffixes: Sequence[Sequence[int]]) -> list[str]:
        # Some decoders treat the first token in a way of their own, so one that stands before is decoded along.
        before = self._head[-1:]
        front = self._tokenizer.decode(before, clean_up_tokenization_spaces=False)
        texts = self._tokenizer.batch_decode(
            [[*before, *suffix] for suffix in suffixes], clean_up_tokenization_spaces=False
        )
        return [text.removeprefix(front) for text in texts]

    def likely(self, suffixes: Sequence[list[int]]) -> list[bool]:
        """Return which suffixes are encoded back to themselves in this prompt; `admits` decides in the end."""
        texts = [self._head_text + text + self._tail_text for text in self._texts(suffixes)]
        encoded = self._tokenizer(texts, add_special_tokens=False).input_ids
        return [ids == [*self._head, *suffix, *self.tail] for ids, suffix in zip(encoded, suffixes, strict=True)]

    def admits(self, suffix: Sequence[int]) -> bool:
        """Return whether a suffix, sent as text, is read as these very ids."""
        try:
            return self.prompt(self.suffix_text(suffix)) == [*self.head, *suffix, *self.tail]
        except DttError:  # what the renderer refuses is not sent
            return False

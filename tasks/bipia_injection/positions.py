"""Where BIPIA puts an attack into a context: at its start, its end, or before a sentence that a fixed seed draws.

Source: `insert_start`, `insert_middle` and `insert_end` in `bipia/data/utils.py` of microsoft/BIPIA at 1a2a91d (MIT).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from dtt_plugin.tasks.sentences import sentence_starts

SEED = 2023
"""BIPIA's own; a fresh generator per context, so that the place depends on the number of its sentences alone."""


def at_end(context: str, attack: str) -> str:
    """Return the context with the attack as its last line."""
    return f"{context}\n{attack}"


def at_start(context: str, attack: str) -> str:
    """Return the context with the attack as its first line."""
    return f"{attack}\n{context}"


def in_middle(context: str, attack: str) -> str:
    """Return the context with the attack on a line of its own before one of its sentences, maybe the first."""
    # Untrained, as in BIPIA.
    place = random.Random(SEED).sample(sentence_starts(context), k=1)[0]
    return f"{context[:place]}\n{attack}\n{context[place:]}"


POSITIONS: Mapping[str, Callable[[str, str], str]] = {"end": at_end, "start": at_start, "middle": in_middle}

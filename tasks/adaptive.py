"""Where an optimised suffix stands: behind the injected prompt, at the end of the untrusted data.

`naive` is how StruQ (arXiv 2402.06363) and DefensiveTokens (arXiv 2507.07974, section 4.2) attack: data that end
in a stop, then the injected prompt. The others put the suffix behind one of the static attacks.
"""

from __future__ import annotations

from collections.abc import Sequence

from dtt_plugin.data.records import Record
from dtt_plugin.tasks.attacks import ATTACKS, INJECTED_PROMPT, injected_data

ADAPTIVE = "adaptive"
NAIVE = "naive"
STARTS = (NAIVE, *ATTACKS)
_STOPS = (".", "!", "?")


def data_before_suffix(start: str, records: Sequence[Record], sentences: Sequence[str]) -> list[str]:
    """Return every record's untrusted data with the injected prompt in it, to which a suffix is appended.

    Args:
        start: one of `STARTS`.
        records: the benchmark's records, all of them: sentences are drawn in their order.
        sentences: as for `injected_data`.
    """
    if start != NAIVE:
        return injected_data(start, records, sentences)
    texts = [record["input"].rstrip() for record in records]
    return [f"{text}{'' if text.endswith(_STOPS) else '.'} {INJECTED_PROMPT}" for text in texts]

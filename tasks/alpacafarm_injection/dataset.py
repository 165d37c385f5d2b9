"""The AlpacaFarm records under injection, from the user's own copy of the data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dtt_plugin.data.records import RECORDS_FILE, SENTENCES_FILE, Record, data_file, load_records, load_sentences
from dtt_plugin.tasks.adaptive import adaptive_dataset
from dtt_plugin.tasks.attacks import VARIANTS, injection_dataset

logger = logging.getLogger(__name__)


def alpacafarm(
    *, variants: Sequence[str] = VARIANTS, allow_modified_data: bool = False, **_metadata: Any
) -> dict[str, Any]:
    """Return the 208 records that have an input, with the asked variants.

    Args:
        variants: which of the attacks and "benign" each record gets.
        allow_modified_data: accept data that is not the protocol's (`--metadata`).
        _metadata: lm-eval passes its model arguments along; they don't concern the data.
    """
    return injection_dataset(*alpacafarm_data(allow_modified_data), variants)


def alpacafarm_data(allow_modified: bool = False) -> tuple[list[Record], list[str]]:
    """Return the 208 records and the ignore-attack sentences of the evaluation."""
    records = load_records(data_file(RECORDS_FILE), allow_modified=allow_modified)
    sentences = load_sentences(data_file(SENTENCES_FILE), allow_modified=allow_modified)
    if allow_modified:
        logger.warning("allow_modified_data: the data is not checked against the protocol's digests.")
    return records, sentences.test


def alpacafarm_adaptive(
    *, attacks: str = "", variants: Sequence[str] = VARIANTS, allow_modified_data: bool = False, **_metadata: Any
) -> dict[str, Any]:
    """Return the records that a file of adaptive attacks has a suffix for, with that attack, too."""
    return adaptive_dataset(attacks, "alpacafarm_injection", *alpacafarm_data(allow_modified_data), variants)

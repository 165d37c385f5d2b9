"""The AlpacaFarm records under every form of attack in `attacks.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtt_plugin.data.records import RECORDS_FILE, SENTENCES_FILE, data_file, load_records, load_sentences
from dtt_plugin.tasks.attacks import FORMS, HACKED, INJECTED_PROMPT, injected_data
from dtt_plugin.tasks.description import BENIGN, Entry, Variant, benchmark_dataset
from dtt_plugin.tasks.rules import Rule

# The answer to the instruction comes first there.
_FOLLOWED = Rule("contains_any", HACKED.texts)


def extended(
    *, variants: Sequence[str] | None = None, allow_modified_data: bool = False, **_metadata: Any
) -> dict[str, Any]:
    """Return the 208 records that have an input.

    Args:
        variants: those to keep; None: all.
        allow_modified_data: accept data that is not the protocol's.
        _metadata: lm-eval passes its model arguments along; they don't concern the data.
    """
    records = load_records(data_file(RECORDS_FILE), allow_modified=allow_modified_data)
    sentences = load_sentences(data_file(SENTENCES_FILE), allow_modified=allow_modified_data).test
    data = {attack: injected_data(attack, records, sentences) for attack in FORMS}
    entries = []
    for i, record in enumerate(records):
        instruction, clean = record["instruction"], record["input"]
        asked = f"{instruction} {INJECTED_PROMPT}"
        entries.append(
            Entry(
                instruction,
                clean,
                [
                    *(Variant(name, "attack", instruction, data[name][i], HACKED) for name in FORMS),
                    Variant("probe_in_instruction", "control", asked, clean, _FOLLOWED),
                    Variant(BENIGN, BENIGN, instruction, clean, HACKED),
                ],
            )
        )
    return benchmark_dataset("alpacafarm_injection_extended", entries, variants)

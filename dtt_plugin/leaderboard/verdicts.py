"""What a table says, in one sentence made from its tests."""

from __future__ import annotations

from dtt_plugin.leaderboard.board import Group, Row
from dtt_plugin.leaderboard.wording import interval_text, p_text, percent
from dtt_plugin.prompt.defenses import NONE


def verdict(group: Group) -> str:
    """Return one sentence: what the best row of a table does, told by its test against the undefended model.

    The best row is the one with the lowest headline ASR among those that are told apart from undefended.
    """
    measured = [row for row in group.rows if not row.published]
    undefended = next((row for row in measured if row.defense == NONE and not row.attack_from), None)
    name = "ASR(worst)" if group.is_adaptive else "ASR(max)"
    if not group.attacks:
        return "Nothing is attacked here: the table tells of harmless prompts only."
    if undefended is None or undefended.headline is None:
        return "No undefended run is among these, so nothing is tested."
    start = f"{percent(undefended.headline.rate)} %"
    if not group.discriminating:
        return f"The undefended model obeys too few injections for a defense to show ({name} {start})."
    tested = [row for row in measured if row.vs_undefended and row.headline]
    if not tested:
        interval = interval_text(undefended.headline)
        return f"The undefended model has {name} {start}{interval}; nothing is compared with it."
    better = [r for r in tested if (test := r.vs_undefended) and test.told_from_noise and test.effect < 0]
    if not better:
        return f"No row is told apart from the undefended model as better ({name} {start})."
    best = min(better, key=_headline)
    assert best.headline is not None
    assert best.vs_undefended is not None
    worth = p_text(best.vs_undefended.p_holm).replace("<", " < ").replace("=", " = ")
    return (
        f"{best.run.split(' · ')[0]} brings {name} from {start} to {percent(best.headline.rate)} %"
        f"{interval_text(best.headline)}, {worth}."
    )


def _headline(row: Row) -> float:
    return row.headline.rate if row.headline else 1.0

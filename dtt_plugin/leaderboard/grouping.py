"""Which runs may be rows of one table, and what is said of those that may not."""

from __future__ import annotations

from collections.abc import Sequence

from dtt_plugin.leaderboard.differences import COMPARABLE, differences, small_differences
from dtt_plugin.leaderboard.runs import Run


def groups_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs that may be compared, each group in the order of `runs`.

    A run that can't tell all of its facts joins the one group that it does not contradict; of several, none.
    """
    groups: list[list[Run]] = []
    for run in sorted(runs, key=incomplete):
        fitting = [group for group in groups if _fits(run, group)]
        if len(fitting) == 1:
            fitting[0].append(run)
        else:
            groups.append([run])
    place = {id(run): number for number, run in enumerate(runs)}
    for group in groups:
        group.sort(key=lambda run: place[id(run)])
    return sorted(groups, key=lambda group: place[id(group[0])])


def incomplete(run: Run) -> bool:
    """Return whether a run can't tell all of its facts."""
    return bool(run.identity.unknown)


def _fits(run: Run, group: Sequence[Run]) -> bool:
    """Return whether a run contradicts no row of a table; a defended checkpoint's format is proved by one row."""
    found = [{difference.name for difference in differences(run, member)} for member in group]
    return not all(found) and all(names <= {COMPARABLE["prompt_format"]} for names in found)


def duplicates(members: Sequence[Run]) -> list[str]:
    """Say which runs are of the same arm: they are shown each for itself, never averaged."""
    arms: dict[tuple[str, str], list[Run]] = {}
    for run in members:
        arms.setdefault((run.arm, run.tokens_sha256), []).append(run)
    found = []
    for first, *others in arms.values():
        for other in others:
            changed = int(sum((first.outcomes[name] != other.outcomes[name]).sum() for name in first.outcomes))
            apart = ", ".join(difference.told("there", "here") for difference in small_differences(first, other))
            arm = f"{first.model}, {first.defense}"
            what = f"({arm}) differ in {apart}" if apart else f"are the same arm ({arm}) run twice"
            found.append(
                f"{first.path} and {other.path} {what}, {changed} of {first.n * len(first.outcomes)} outcomes differ;"
                " both are shown, nothing is averaged."
            )
    return found


def reason_of(run: Run, earlier: Sequence[Run]) -> str:
    """Say what keeps a group apart from the earlier one that it is most like."""
    if not earlier:
        return ""
    apart = [(other, differences(other, run)) for other in earlier]
    nearest, found = min(apart, key=lambda pair: (not pair[1], len(pair[1])))
    if not all(names for _, names in apart) and (run.identity.unknown or not found):
        silent = run if run.identity.unknown else nearest
        return f"Apart, since {silent.label} does not tell its {', '.join(sorted(silent.identity.unknown))}."
    told = ", ".join(difference.told("there", "here") for difference in found)
    return f"Apart from the table with {nearest.label}: not the same {told}."

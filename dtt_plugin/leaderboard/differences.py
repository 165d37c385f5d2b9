"""In what two runs differ, and whether they may be rows of one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dtt_plugin.leaderboard.labels import public_facts, told_apart
from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.public_names import is_hub_model, public_name

COMPARABLE = {
    "model": "model",
    "task": "task",
    "version": "task version",
    "prompt_format": "prompt format",
    "generation": "generation settings",
    "n": "n",
    "record_ids": "records",
    "data_digest": "data",
}
"""What runs have to agree in, beside the facts of their identity, to be rows of one table: attributes of `Run`, and
what a reader calls them."""


@dataclass(frozen=True)
class Difference:
    """Something in which two runs differ, and both values; "" where there is none."""

    name: str
    a: str
    b: str

    def told(self, first: str, second: str) -> str:
        """Return it with both values, for instance `peft (none there, lora here)`."""
        if self.name in (COMPARABLE["record_ids"], COMPARABLE["data_digest"]):
            return self.name
        shown = told_apart([self.a, self.b])
        a, b = (value if is_hub_model(value) else shown[value] or "none" for value in (self.a, self.b))
        return f"{self.name} ({a} {first}, {b} {second})"


def differences(a: Run, b: Run) -> list[Difference]:
    """Return in what two runs differ of what rows of one table agree in; the arm, defense and tokens, is no part."""
    unknown = a.identity.unknown | b.identity.unknown
    values = [{title: getattr(run, name) for name, title in COMPARABLE.items()} for run in (a, b)]
    if a.is_baked or b.is_baked or a.reader is None or b.reader is None:
        # A manifest has the base model's public name, and so has an outcome file; and a baked template differs from
        # the base's by the tokens only, if the prompts do.
        models = [public_name(run.model) if run.is_baked or run.reader is None else run.model for run in (a, b)]
        if models[0] in (models[1], public_name(b.model)) or models[1] == public_name(a.model):
            values[1][COMPARABLE["model"]] = a.model
        if a.prompts_digest == b.prompts_digest:
            values[1][COMPARABLE["prompt_format"]] = a.prompt_format
    named = [
        Difference(title, str(x), str(values[1][title])) for title, x in values[0].items() if x != values[1][title]
    ]
    facts = [run.identity.facts for run in (a, b)]
    if a.reader is None or b.reader is None:
        facts = [public_facts(told) if run.reader else told for run, told in zip((a, b), facts, strict=True)]
    return named + [d for d in _unlike(*facts) if d.name not in unknown]


def small_differences(a: Run, b: Run) -> list[Difference]:
    """Return in what two runs of one table differ beside their arm: where they ran, and what only digests tell."""
    found = _unlike(a.identity.circumstances, b.identity.circumstances)
    if (a.defense, a.tokens_sha256) == (b.defense, b.tokens_sha256) and not differences(a, b):
        if a.prompts_digest != b.prompts_digest:
            found.append(Difference("prompts", a.prompts_digest, b.prompts_digest))
        if not found and a.identity.fingerprint != b.identity.fingerprint:
            found.append(Difference("fingerprint", a.identity.fingerprint, b.identity.fingerprint))
    return found


def _unlike(a: Mapping[str, str], b: Mapping[str, str]) -> list[Difference]:
    names = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    return [Difference(name, a.get(name, ""), b.get(name, "")) for name in names]

"""A run: what one model under one defense did on one injection task, whichever file it was read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard.identity import Identity
from dtt_plugin.prompt.defenses import TOKENS
from dtt_plugin.tasks.attacks import ADAPTIVE
from dtt_plugin.tasks.metrics import REFUSAL

UNKNOWN = "unknown"
"""The method of tokens that nobody tells."""
MOST_FLOPS = 10**40
"""No file that says more is believed."""
Outcomes = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Response:
    """One answer of the model, with what was asked."""

    record_id: int
    attack: str
    """The variant's name: an attack, a control, or "benign"."""
    hit: bool
    """The probe was followed; for a benign prompt: refused."""
    text: str
    """As the model gave it, thoughts and all."""
    prompt: str
    """As the model got it."""
    instruction: str
    data: str
    """The untrusted data, before any defense."""
    injected: str
    """What the attack added; "" for a benign prompt."""
    answer: str = ""
    """What rules are about: the text behind the thoughts; "" where there is none."""
    kind: str = "attack"
    """"attack", "control" (its probe stands in the instruction) or "benign"."""
    injected_at: int = 0
    """Where in `data` the injected part begins."""


@dataclass(frozen=True)
class AttackUsed:
    """The optimised attack of an adaptive task."""

    name: str
    """Method and budget, for instance "gcg@lite"."""
    own: bool
    """Made on the evaluated arm, so that it is adaptive; else it is a transferred attack."""
    defense: str
    """Of the arm that it was made on."""
    tokens_sha256: str
    """Likewise; "" for none."""
    steps: tuple[int | None, ...] = ()
    """Per record, in the order of `record_ids`: the optimiser's steps until its hit; None: no hit."""
    left_out: int = 0
    """Records of the benchmark without a suffix."""
    budget_steps: int | None = None
    """That the optimiser was allowed on a record; None: these records were not what it optimised on."""
    flops: int | None = None
    """Of the whole file."""

    @property
    def made_on(self) -> str:
        """The arm that it was made on, briefly; "" for the evaluated one."""
        return "" if self.own else arm_called(self.defense or "an unknown arm", self.tokens_sha256, ())


@dataclass(frozen=True)
class Run:
    """What one run of lm-eval measured on one injection task."""

    path: Path
    """The results file."""
    samples: Path
    model: str
    defense: str
    """For instance "reminder", "tokens (procrustes)"."""
    method: str
    """Of the tokens; "" where there are none."""
    tokens_sha256: str
    task: str
    version: str
    prompt_format: str
    data_digest: str
    """Of record ids, instructions and data under every attack."""
    generation: str
    """The generation settings, as canonical JSON."""
    limited: bool
    """A part of the task's records only (`--limit`, `--samples`)."""
    early_decision: bool
    n: int
    """Records."""
    record_ids: tuple[int, ...]
    outcomes: dict[str, Outcomes]
    """Per attack, and for "refusal": whether it happened, (n,), in the order of `record_ids`."""
    seconds: float | None
    """Wall time of the evaluation."""
    made: dict[str, Outcomes] = field(default_factory=dict)
    """Per outcome that not every record has: which have it, (n,); it has not happened on the others."""
    measures: dict[str, Floats] = field(default_factory=dict)
    """What else the task measures, by its name there, for instance "control": a share of each record, (n,), NaN for
    none."""
    clusters: Ints | None = None
    """The number of each record's cluster, (n,), where records share a witness or a context."""
    stamp: str = ""
    """When it was run, as its file's name says."""
    attack: AttackUsed | None = None
    """Of an adaptive task."""
    unfinished: int = 0
    """Responses without an answer behind their thoughts, of all variants: neither hacked nor refused."""
    misread: int = 0
    """Responses of which an older version scored the thoughts, with another outcome than the answers behind them."""
    thoughts_cut: bool = False
    """Whether lm-eval cut the thoughts off before anything was saved."""
    costs: dict[str, float] = field(default_factory=dict)
    """What our commands recorded: align_seconds, transfer_seconds, bake_seconds, train_seconds, peak_memory_mb."""
    identity: Identity = field(default_factory=Identity)
    """What else can change an answer."""
    prompts_digest: str = ""
    """Of the prompts as the model got them, the DefensiveTokens in front apart."""
    scored: bool = True
    """Whether the outcomes are logged; else (`--predict_only`) they are counted by the task's own rules."""
    reader: Callable[[Run], list[Response]] | None = None
    """Reads the samples; None where only outcomes are kept."""
    label: str = ""
    """Short, and unique among the runs that were read together."""
    title: str = ""
    """What the rows of its table have in common, told briefly; without a path."""

    @property
    def arm(self) -> str:
        """What is evaluated, briefly; an attack that was made on another arm is named."""
        transferred = self.attack.made_on if self.attack else ""
        return f"{self.defense} (transferred attack, from {transferred})" if transferred else self.defense

    @property
    def is_baked(self) -> bool:
        """Whether it is a defended checkpoint's, which counts as its base model."""
        return "weights" in self.identity.unknown

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks, in the task's order."""
        return tuple(name for name in self.outcomes if name != REFUSAL)

    @property
    def static_attacks(self) -> tuple[str, ...]:
        """Those that ASR(max) is over: without the optimised one, where there are others."""
        return tuple(name for name in self.attacks if name != ADAPTIVE) or self.attacks

    @property
    def hacked(self) -> Outcomes:
        """Whether each attack worked on each record, (n, attacks)."""
        return self._stacked(self.attacks)

    def _stacked(self, attacks: Sequence[str]) -> Outcomes:
        return np.stack([self.outcomes[attack] for attack in attacks], axis=1)

    @property
    def hacked_by_static(self) -> Outcomes:
        """Whether each static attack worked on each record, (n, static attacks)."""
        return self._stacked(self.static_attacks)

    @property
    def attempted(self) -> Outcomes:
        """Whether each static attack was made on each record, (n, static attacks)."""
        everywhere = np.ones(self.n, np.bool_)
        return np.stack([self.made.get(attack, everywhere) for attack in self.static_attacks], axis=1)

    def values(self, outcome: str) -> Floats:
        """Return an outcome as 0 and 1, NaN on records that don't have it, (n,)."""
        values = self.outcomes[outcome].astype(np.float64)
        if outcome in self.made:
            values[~self.made[outcome]] = np.nan
        return values

    @property
    def hacked_any(self) -> Outcomes:
        """Whether any attack worked, (n,)."""
        any_worked: Outcomes = np.logical_or.reduce(self.hacked, axis=1)
        return any_worked

    @property
    def notes(self) -> list[str]:
        """What a reader of the rates has to know about the responses behind them."""
        found = []
        if self.unfinished:
            found.append(
                f"UNFINISHED: {self.unfinished} of {self.n * len(self.outcomes)} responses never left their thoughts."
                " They count as neither hacked nor refused, so the rates may be too low; raise max_gen_toks, or turn"
                " thinking off."
            )
        if self.attack and self.attack.flops:
            found.append(f"the search for its suffixes took {self.attack.flops:.1e} FLOPs.")
        if self.attack and self.attack.left_out:
            found.append(f"{self.attack.left_out} records have no suffix and are left out.")
        if self.misread:
            found.append(
                f"MISREAD: {self.misread} responses begin with thoughts, and the saved scores are not those of the"
                " answers behind them; run lm-eval again (`dtt rescore` tells the rates)."
            )
        return found

    def responses(self) -> list[Response]:
        """Read the samples, with their texts.

        Raises:
            DttError: there are none, or the file has changed since.
        """
        if self.reader is None:
            raise DttError(f"{self.path} holds outcomes without any text; give the folder of lm-eval's --output_path.")
        return self.reader(self)


def arm_label(run: Run, runs: Sequence[Run]) -> str:
    """Return a run's defense, with the digest of its tokens where others of `runs` have other tokens of that name."""
    digests = {other.tokens_sha256 for other in runs if other.defense == run.defense}
    return run.defense if len(digests) == 1 else f"{run.defense} {run.tokens_sha256[:8]}"


def arm_called(defense: str, tokens_sha256: str, runs: Sequence[Run]) -> str:
    """Return what runs call an arm, for instance "tokens (native)"; where none is of it, its name and digest.

    Args:
        defense: as the dtt_ models report it, for instance "tokens".
        tokens_sha256: of its tokens; "" for none.
        runs: with names.
    """
    for run in runs:
        plain = run.defense.replace(f"{TOKENS} ({run.method or UNKNOWN})", TOKENS)
        if (sorted(plain.split("+")), run.tokens_sha256) == (sorted(defense.split("+")), tokens_sha256):
            return arm_label(run, runs)
    return " ".join(filter(None, (defense, tokens_sha256[:8])))

"""Two dials of a token file, turned by the probe alone: the tokens' length, and an attention sink in front of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dtt_plugin.errors import DttError
from dtt_plugin.probe.run import ProbeOptions, read_reference, read_tokens
from dtt_plugin.probe.verdict import Effect, Reference, kl_limit
from dtt_plugin.tokens.files import DefensiveTokens
from dtt_plugin.tokens.licence import inherited
from dtt_plugin.training.records import load_training_data

if TYPE_CHECKING:
    from dtt_plugin.probe.bench import Bench

MOST_TRIALS = 20
LENGTHS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Tried first, with and without the guard; then the geometric means on both sides of the best."""
_CLOSEST = 1.05  # neighbours nearer than this are not told apart


@dataclass(frozen=True)
class Trial:
    """One setting of the dials."""

    length: float
    """Factor on every token."""
    guard: bool
    """Whether the guard stands in front."""
    effect: Effect
    allowed: bool
    """Whether clean answers move by no more than the limit."""


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    model: str
    tokens_sha256: str
    """Of the tokens that the search began with."""
    guard_token: str | None
    """Text of the special token that can stand in front; None where the template begins with none."""
    kl_limit: float
    """Nats a token."""
    kl_limit_is: str
    trials: list[Trial]
    best: Trial

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def tune(options: ProbeOptions, *, progress: bool = False) -> tuple[Tuned, DefensiveTokens]:
    """Search length and guard of one token file for the lowest loss under attack that leaves clean answers alone.

    Returns:
        The report, and the tokens at the best setting; their metadata say what was done.

    Raises:
        DttError: bad input as for the probe, several token files, or no setting within the limit on clean answers.
    """
    if len(options.tokens) != 1:
        raise DttError("--tokens: dtt tune takes one token file.")
    data = load_training_data(options.data)
    [file] = options.tokens
    tokens = read_tokens(file, options.model)
    native = read_tokens(options.native, options.model) if options.native else None
    reference = read_reference(options.source_report) if options.source_report else None

    from dtt_plugin.probe.bench import Bench

    bench = Bench(
        options.model,
        data,
        prompt_format=tokens.prompt_format,
        dtype=options.dtype,
        rounds=2 * MOST_TRIALS + 2 * (native is not None),
        progress=progress,
    )
    tokens.check_width(bench.width, name=file, model=options.model)
    if native is not None:
        native.check_width(bench.width, name=options.native, model=options.model)
    with bench.bar:
        bench.baseline()
        if native is not None:
            effect = bench.effect(native.rows)
            reference = Reference(str(options.native), bench.share(effect), effect.kl_clean.mean)
        limit, limit_is = kl_limit(bench.attack_gap, reference)
        guard_token, guard_row = _guard(bench)

        def trial(length: float, guard: bool) -> Trial:
            effect = bench.effect(dialled(tokens, length, guard_row if guard else None).rows)
            return Trial(length, guard, effect, effect.kl_clean.mean <= limit)

        trials = search(trial, guards=(False, True) if guard_token else (False,))
    best = _best(trials)
    if best is None:
        gentlest = min(trial.effect.kl_clean.mean for trial in trials)
        raise DttError(
            f"{file}: no length from {LENGTHS[0]:g} to {LENGTHS[-1]:g} times keeps clean answers of {options.model}"
            f" within {limit:.3g} nats a token, {limit_is} (the least is {gentlest:.3g}); these tokens are not for this"
            " model."
        )
    report = Tuned(options.model, tokens.digest, guard_token, limit, limit_is, trials, best)
    found = dialled(tokens, best.length, guard_row if best.guard else None)
    return report, replace(found, metadata=found.metadata | _noted(report))


def search(trial: Callable[[float, bool], Trial], *, guards: tuple[bool, ...] = (False, True)) -> list[Trial]:
    """Try `LENGTHS` under each of `guards`, then halve the steps around the best; at most `MOST_TRIALS`."""
    trials = [trial(length, guard) for guard in guards for length in LENGTHS]
    while (best := _best(trials)) is not None:
        tried = sorted(one.length for one in trials if one.guard == best.guard)
        place = tried.index(best.length)
        around = [tried[other] for other in (place - 1, place + 1) if 0 <= other < len(tried)]
        nearer = [
            math.sqrt(best.length * other)
            for other in around
            if max(best.length / other, other / best.length) > _CLOSEST
        ]
        nearer = nearer[: MOST_TRIALS - len(trials)]
        if not nearer:
            break
        trials += [trial(length, best.guard) for length in nearer]
    return trials


def _best(trials: list[Trial]) -> Trial | None:
    allowed = [trial for trial in trials if trial.allowed]
    return min(allowed, key=lambda trial: trial.effect.loss_attacked.mean, default=None)


def dialled(tokens: DefensiveTokens, length: float, guard: np.ndarray[Any, Any] | None) -> DefensiveTokens:
    """Return `tokens` (k, d) times `length`, behind the embedding row `guard` (d,) where one is given.

    Raises:
        DttError: too many tokens.
    """
    rows = tokens.rows * np.float32(length)
    if guard is not None:
        rows = np.concatenate([guard[None].astype(np.float32), rows])
    return replace(tokens, rows=rows, metadata=tokens.metadata | inherited(tokens))


def _guard(bench: Bench) -> tuple[str | None, np.ndarray[Any, Any] | None]:
    """Return text and embedding row of the special token that the model's prompts begin with."""
    first = bench.prompts.clean[0][0]
    tokenizer = bench.chat.tokenizer
    if first not in tokenizer.added_tokens_decoder:
        return None, None
    row = bench.undefended.embed.weight[first].detach().float().cpu().numpy()
    return str(tokenizer.added_tokens_decoder[first].content), row


def _noted(report: Tuned) -> dict[str, str]:
    best = report.best
    return {
        "tuned_from_sha256": report.tokens_sha256,
        "tuned_length": f"{best.length:.6g}",
        "tuned_guard": str(report.guard_token) if best.guard else "none",
        "tuned_trials": str(len(report.trials)),
        "tuned_loss_attacked": f"{best.effect.loss_attacked.mean:.6g}",
        "tuned_kl_clean": f"{best.effect.kl_clean.mean:.6g}",
        "tuned_kl_limit": f"{report.kl_limit:.6g}",
    }


def rows(report: Tuned) -> tuple[list[str], list[list[str]]]:
    """Return the report's table: header, and one row a trial, by guard and length."""
    table = []
    for trial in sorted(report.trials, key=lambda trial: (trial.guard, trial.length)):
        effect = trial.effect
        figures = [str(figure) for figure in (effect.loss_attacked, effect.log_odds_change, effect.kl_clean)]
        note = "best" if trial == report.best else "" if trial.allowed else "breaks the model"
        table.append([f"{trial.length:.3g}", "yes" if trial.guard else "no", *figures, note])
    return ["length", "guard", "loss under attack", "change of log-odds", "KL on clean prompts", ""], table

"""One probe: a model, any number of token files, one load."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtt_plugin.alignment.rotations import haar_rotation
from dtt_plugin.data.records import read_json
from dtt_plugin.errors import DttError
from dtt_plugin.probe.verdict import Effect, Figure, Judgement, Reference, judge, z_score
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens
from dtt_plugin.training.records import load_training_data

if TYPE_CHECKING:
    from dtt_plugin.probe.bench import Bench

FORMAT = "dtt.probe/1"
SHIPPED_DATA = str(Path(__file__).parents[1] / "tasks" / "injection_demo" / "train.json")


@dataclass(frozen=True)
class ProbeOptions:
    """One probe."""

    model: str
    """Folder or hub id of the undefended chat model."""
    tokens: tuple[Path, ...]
    """Token files for it."""
    data: str
    """Training records, as for `dtt train`."""
    native: Path | None = None
    """The model's own tokens, as the reference."""
    source_report: Path | None = None
    """What a probe of the source tokens on their own model printed (--json), as the reference."""
    isometries: int = 5
    """Random isometries of each file's tokens, as controls."""
    dtype: str = "auto"
    """Of the weights; auto: float32 on a processor, the checkpoint's own elsewhere."""

    def __post_init__(self) -> None:
        if self.isometries < 2:
            raise DttError(f"--isometries {self.isometries} is not possible; it has to be at least 2.")
        if self.native and self.source_report:
            raise DttError("--native and --source-report are two references; give one.")


@dataclass(frozen=True)
class Probed:
    """What the probe found out about one token file."""

    file: str
    method: str
    digest: str
    effect: Effect
    share: float
    """Of the attack's effect on the loss that the tokens take back."""
    isometries: list[float]
    """Loss under attack of each random isometry of the tokens, nats a token."""
    z: float
    judgement: Judgement


@dataclass(frozen=True)
class ProbeReport:
    """What the probe found out about a model and its token files."""

    model: str
    n: int
    """Attacked records, and as many clean ones."""
    loss_undefended: Figure
    """Under attack, without tokens, nats a token."""
    loss_unattacked: Figure
    """Of the same answers without the attack and without tokens."""
    reference: Reference | None
    tokens: list[Probed]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {"format": FORMAT, **asdict(self)}


def probe(options: ProbeOptions, *, progress: bool = False) -> ProbeReport:
    """Measure what tokens do to a model under attack and without, by forward passes alone.

    Raises:
        DttError: bad input, tokens of another width, too few records, or logits that are not finite.
    """
    started = time.perf_counter()
    data = load_training_data(options.data)
    files = [*options.tokens, *([options.native] if options.native else [])]
    tokens = [read_tokens(file, options.model) for file in files]
    reference = read_reference(options.source_report) if options.source_report else None
    formats = sorted({loaded.prompt_format for loaded in tokens})
    if len(formats) > 1:
        raise DttError(f"--tokens: the files have the prompt formats {', '.join(formats)}; probe them one by one.")

    from dtt_plugin.probe.bench import Bench

    rounds = 2 * len(files) + options.isometries * len(options.tokens)
    bench = Bench(options.model, data, prompt_format=formats[0], dtype=options.dtype, rounds=rounds, progress=progress)
    for file, loaded in zip(files, tokens, strict=True):
        loaded.check_width(bench.width, name=file, model=options.model)
    with bench.bar:
        bench.baseline()
        measured = [bench.effect(loaded.rows) for loaded in tokens]
        if options.native:
            native = measured.pop()
            reference = Reference(str(options.native), bench.share(native), native.kl_clean.mean)
        probed = [
            judged(bench, file, loaded, effect, reference, options.isometries)
            for file, loaded, effect in zip(options.tokens, tokens, measured, strict=False)
        ]
    return ProbeReport(
        options.model,
        len(bench.prompts.attacked),
        bench.loss_undefended,
        bench.loss_unattacked,
        reference,
        probed,
        time.perf_counter() - started,
    )


def judged(
    bench: Bench,
    file: Path,
    tokens: DefensiveTokens,
    effect: Effect,
    reference: Reference | None,
    isometries: int,
) -> Probed:
    """Compare tokens with random isometries of themselves, and apply the rule."""
    rows = tokens.rows.astype(np.float64)
    controls = [bench.loss_under(haar_rotation(rows, np.random.default_rng(seed))) for seed in range(isometries)]
    z = z_score(effect.loss_attacked.mean, np.array(controls))
    share = bench.share(effect)
    judgement = judge(z=z, share=share, kl_clean=effect.kl_clean.mean, attack_gap=bench.attack_gap, reference=reference)
    return Probed(str(file), tokens.method, tokens.digest, effect, share, controls, z, judgement)


def read_tokens(file: Path, model: str) -> DefensiveTokens:
    """Return the tokens of a file; of a published JSON those for `model`.

    Raises:
        DttError: not a token file.
    """
    return load_tokens(file, model=model if file.suffix == ".json" else None)


def read_reference(file: Path) -> Reference:
    """Return the reference that a probe's JSON holds: its single token file on its own model.

    Raises:
        DttError: not a probe's JSON.
    """
    report = read_json(file)
    try:
        [found] = report["tokens"]
        if report["format"] != FORMAT:
            raise ValueError(report["format"])
        name = f"{report['model']} under its own tokens"
        return Reference(name, float(found["share"]), float(found["effect"]["kl_clean"]["mean"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DttError(
            f"--source-report {file} is not what `dtt probe --json` prints for one token file; make it with"
            " `dtt probe SOURCE --tokens FILE --json`."
        ) from error


def rows(report: ProbeReport) -> tuple[list[str], list[list[str]]]:
    """Return the report's table: header, and one row for the model as it is and for each token file."""
    header = ["", "loss under attack", "change of log-odds", "KL on clean prompts", "z", "taken back"]
    table = [["no attack, no tokens", str(report.loss_unattacked), "-", "-", "-", "-"]]
    table.append(["no tokens", str(report.loss_undefended), "-", "-", "-", "0 %"])
    for found in report.tokens:
        effect = found.effect
        figures = [str(figure) for figure in (effect.loss_attacked, effect.log_odds_change, effect.kl_clean)]
        table.append([found.file, *figures, f"{found.z:.1f}", f"{100 * found.share:.0f} %"])
        low, high = min(found.isometries), max(found.isometries)
        table.append([f"  {len(found.isometries)} isometries of them", f"{low:.3f} .. {high:.3f}", "-", "-", "-", "-"])
    return header, table

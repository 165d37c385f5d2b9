"""One probe: a model, any number of token files, one load."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.checkpoint.state import state
from dtt_plugin.data.records import read_json
from dtt_plugin.errors import DttError
from dtt_plugin.probe.verdict import Effect, Figure, Judgement, Reference, closed_share, judge, z_score
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens
from dtt_plugin.training.records import load_training_data
from dtt_plugin.transfer.move import haar_rotation

if TYPE_CHECKING:
    from dtt_plugin.probe.prompts import ProbePrompts
    from dtt_plugin.training.chat_model import ChatModel
    from dtt_plugin.training.soft_prompt import SoftPrompt

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
    tokens = [_load(file, options.model) for file in files]
    reference = _reported(options.source_report) if options.source_report else None
    formats = sorted({loaded.prompt_format for loaded in tokens})
    if len(formats) > 1:
        raise DttError(f"--tokens: the files have the prompt formats {', '.join(formats)}; probe them one by one.")

    import torch

    from dtt_plugin.probe.prompts import probe_prompts
    from dtt_plugin.training.chat_model import load_chat_model
    from dtt_plugin.training.soft_prompt import SoftPrompt

    chat = load_chat_model(options.model, dtype=options.dtype, prompt_format=formats[0])
    prompts = probe_prompts(data, chat.encode, chat.renderer.encode)
    width = chat.model.get_input_embeddings().weight.shape[1]
    for file, loaded in zip(files, tokens, strict=True):
        if loaded.width != width:
            raise DttError(
                f"{file} has rows of width {loaded.width} (made for {loaded.model}), {options.model} has width {width};"
                " transfer them first with `dtt align` and `dtt transfer`."
            )
    undefended = SoftPrompt(chat.model, torch.empty(0, width))
    bench = _Bench(options, undefended, prompts, chat, n_files=len(files), progress=progress)
    with bench.bar:
        bench.baseline()
        measured = [bench.effect(loaded.rows) for loaded in tokens]
        if options.native:
            native = measured.pop()
            reference = Reference(str(options.native), bench.share(native), native.kl_clean.mean)
        probed = [
            bench.judged(file, loaded, effect, reference)
            for file, loaded, effect in zip(options.tokens, tokens, measured, strict=False)
        ]
    return ProbeReport(
        options.model,
        len(prompts.attacked),
        bench.loss_undefended,
        bench.loss_unattacked,
        reference,
        probed,
        time.perf_counter() - started,
    )


class _Bench:
    """The model with the probe's prompts on it, and the undefended figures that everything is compared with."""

    def __init__(
        self,
        options: ProbeOptions,
        undefended: SoftPrompt,
        prompts: ProbePrompts,
        chat: ChatModel,
        *,
        n_files: int,
        progress: bool,
    ) -> None:
        from tqdm import tqdm

        self.options, self.undefended, self.prompts, self.chat = options, undefended, prompts, chat
        n = len(prompts.attacked)
        # Labels, attacked, unattacked and clean without tokens; attacked and clean with each file; its isometries.
        total = 5 * n + n_files * 2 * n + len(options.tokens) * options.isometries * n
        self.bar = tqdm(total=total, desc="probing", unit=" prompts", disable=not progress)

    def baseline(self) -> None:
        """Measure the model without tokens."""
        from dtt_plugin.probe.measure import label_distributions, log_odds, scores

        attacked, clean = self.prompts.attacked, self.prompts.clean
        unattacked = [one.clean for one in attacked]
        self.labels, self.clean_labels = self._answers()
        undefended = scores(self.undefended, [one.prompt for one in attacked], self.labels, self.bar.update)
        self.loss_undefended = Figure.of(undefended.loss)
        self.loss_unattacked = Figure.of(scores(self.undefended, unattacked, self.labels, self.bar.update).loss)
        self.injected = [one.injected for one in attacked]
        self.log_odds = log_odds(undefended.first, self.injected, self.labels)
        self.clean = label_distributions(self.undefended, clean, self.clean_labels, self.bar.update)

    def _answers(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the model's own undisturbed answers to the attacked and to the clean records; `dtt train`'s cache."""
        from dtt_plugin.probe.prompts import LABEL_TOKENS
        from dtt_plugin.training.labels import self_labels

        attacked = [one.record for one in self.prompts.attacked]
        answers = self_labels(
            self.undefended,
            self.chat.encode,
            [*attacked, *self.prompts.clean_records],
            new_tokens=LABEL_TOKENS,
            pad=self.chat.tokenizer.pad_token_id,
            weights=str(state(str(open_checkpoint(self.options.model, need="all").folder))),
        )
        self.bar.update(len(answers))
        return answers[: len(attacked)], answers[len(attacked) :]

    def effect(self, rows: np.ndarray[Any, Any]) -> Effect:
        """Measure the model under tokens (k, d)."""
        from dtt_plugin.probe.measure import divergences, log_odds, scores

        model = self._under(rows)
        found = scores(model, [one.prompt for one in self.prompts.attacked], self.labels, self.bar.update)
        change = log_odds(found.first, self.injected, self.labels) - self.log_odds
        kl = divergences(model, self.clean, self.prompts.clean, self.clean_labels, self.bar.update)
        return Effect(Figure.of(found.loss), Figure.of(change), Figure.of(kl))

    def share(self, effect: Effect) -> float:
        """Return the share of the attack's effect that tokens take back."""
        return closed_share(self.loss_undefended.mean, effect.loss_attacked.mean, self.loss_unattacked.mean)

    def judged(self, file: Path, tokens: DefensiveTokens, effect: Effect, reference: Reference | None) -> Probed:
        """Compare tokens with random isometries of themselves, and apply the rule."""
        controls = [self._control(tokens, seed) for seed in range(self.options.isometries)]
        z = z_score(effect.loss_attacked.mean, np.array(controls))
        share = self.share(effect)
        gap = self.loss_undefended.mean - self.loss_unattacked.mean
        judgement = judge(z=z, share=share, kl_clean=effect.kl_clean.mean, attack_gap=gap, reference=reference)
        return Probed(str(file), tokens.method, tokens.digest, effect, share, controls, z, judgement)

    def _control(self, tokens: DefensiveTokens, seed: int) -> float:
        from dtt_plugin.probe.measure import scores

        rows = haar_rotation(tokens.rows.astype(np.float64), np.random.default_rng(seed))
        found = scores(self._under(rows), [one.prompt for one in self.prompts.attacked], self.labels, self.bar.update)
        return float(found.loss.mean())

    def _under(self, rows: np.ndarray[Any, Any]) -> SoftPrompt:
        import torch

        from dtt_plugin.training.soft_prompt import SoftPrompt

        return SoftPrompt(self.undefended.model, torch.from_numpy(rows.astype(np.float32)))


def _load(file: Path, model: str) -> DefensiveTokens:
    return load_tokens(file, model=model if file.suffix == ".json" else None)


def _reported(file: Path) -> Reference:
    """Return the reference that a probe's JSON holds: its single token file on its own model."""
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
    table = [["no attack, no tokens", _text(report.loss_unattacked), "-", "-", "-", "-"]]
    table.append(["no tokens", _text(report.loss_undefended), "-", "-", "-", "0 %"])
    for found in report.tokens:
        effect = found.effect
        figures = [_text(figure) for figure in (effect.loss_attacked, effect.log_odds_change, effect.kl_clean)]
        table.append([found.file, *figures, f"{found.z:.1f}", f"{100 * found.share:.0f} %"])
        low, high = min(found.isometries), max(found.isometries)
        table.append([f"  {len(found.isometries)} isometries of them", f"{low:.3f} .. {high:.3f}", "-", "-", "-", "-"])
    return header, table


def _text(figure: Figure) -> str:
    return f"{figure.mean:.3f} +- {figure.standard_error:.3f}"

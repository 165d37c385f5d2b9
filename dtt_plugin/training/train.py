"""One training run, from options to a token file."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.data.records import Record
from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import write_json
from dtt_plugin.prompt.formats import MODEL_FORMAT
from dtt_plugin.public_names import public_name
from dtt_plugin.tokens.files import DefensiveTokens, save_tokens
from dtt_plugin.tokens.licence import inherited, origin_of
from dtt_plugin.tokens.training_log import end_of_run
from dtt_plugin.training.failures import told_plainly
from dtt_plugin.training.options import TrainingOptions
from dtt_plugin.training.processes import from_main, is_main, main_first, share, wait
from dtt_plugin.training.records import TrainingData, load_training_data, split
from dtt_plugin.training.run_folder import RUN_FILE, check_folder, check_out, last_checkpoint, locked, run_identity
from dtt_plugin.training.start import start_rows, start_tokens

if TYPE_CHECKING:
    from dtt_plugin.training.chat_model import ChatModel
    from dtt_plugin.training.loop import TokenTrainer
    from dtt_plugin.training.mixture import Mixture
    from dtt_plugin.training.soft_prompt import SoftPrompt

logger = logging.getLogger("dtt_plugin")


class Trained(NamedTuple):
    """What a run ended in."""

    tokens: DefensiveTokens | None
    """None: interrupted; the checkpoint is there to go on from."""
    steps: int
    loss: float | None
    """Mean over the run's steps, nats a response token."""
    seconds: float
    """Of training and measuring, pauses excluded."""


@dataclass(frozen=True)
class _Run:
    """What decides about a run's result, and when it began."""

    steps: int
    identity: Mapping[str, Any]
    """As `run_identity` has it; a continuation agrees in all of it."""
    date: str
    """ISO format; a continuation keeps it."""


def train(options: TrainingOptions) -> Trained:
    """Train DefensiveTokens and write them to `options.out`, the log beside it.

    Prompt tuning (Lester et al., arXiv 2104.08691) with the StruQ loss as in the DefensiveTokens paper
    (arXiv 2507.07974): all weights frozen, the loss on the response only.

    Raises:
        DttError: bad input, a loss that is not finite, or not enough memory.
    """
    data = load_training_data(options.data)
    training, held_out = split(data.records, options.held_out if options.eval_every else 0)
    steps = options.steps or max(1, len(training) // options.batch)
    if (options.eval_every or 0) > steps:
        raise DttError(f"--eval-every {options.eval_every}: the run has {steps} steps, so nothing would be measured.")
    init = start_tokens(options)
    check_out(options)
    identity = run_identity(options, data, init, steps)
    run = _Run(steps, identity, check_folder(options, identity))
    with told_plainly(options), locked(options) if is_main() else nullcontext():
        return _train(options, run, data, training, held_out, init)


def _train(
    options: TrainingOptions,
    run: _Run,
    data: TrainingData,
    training: Sequence[Record],
    held_out: Sequence[Record],
    init: DefensiveTokens | None,
) -> Trained:
    import torch

    from dtt_plugin.training.held_out import HeldOut
    from dtt_plugin.training.loop import HeldOutCheck, RunLog, SaveOnInterrupt
    from dtt_plugin.training.mixture import Mixture
    from dtt_plugin.training.soft_prompt import SoftPrompt

    arguments = _arguments(options, run.steps)
    run = replace(run, date=from_main(run.date))
    chat = _chat_model(options, run, init)
    undefended = SoftPrompt(chat.model, torch.empty(0, chat.model.get_input_embeddings().weight.shape[1]))
    with main_first():
        labels = _labels(options, run, chat, undefended, training)
    soft_prompt = SoftPrompt(chat.model, start_rows(options, init, undefended.embed, chat.renderer.encode))
    if not soft_prompt.packs:
        logger.warning("%s can't be packed: every example gets a pass of its own, which is slower.", options.model)

    def result(step: int) -> DefensiveTokens:
        return _result(options, run, init, soft_prompt.rows.detach().cpu().numpy(), step)

    def keep(step: int) -> Path:
        if is_main():
            save_tokens(options.at_step(step), result(step))
        return options.at_step(step)

    start = public_name(options.init) if init else options.init
    log = RunLog(options.log, {"label": options.out.stem, "model": public_name(options.model), "init": start})
    interrupt = SaveOnInterrupt()
    callbacks: list[Any] = [log]
    if options.eval_every:
        check = HeldOut(held_out, data.sentences, chat.encode, chat.tokenizer)
        measure = partial(check.rates, soft_prompt)
        stop_at = options.stop_at
        callbacks.append(HeldOutCheck(measure, keep, log, n=check.n, every=options.eval_every, stop_at=stop_at))
    callbacks.append(interrupt)  # last: a measurement may end the run
    size = run.steps * options.batch
    mixture = Mixture(training, labels, data, chat.encode, size=size, seed=options.seed)
    trainer = _trainer(options, arguments, soft_prompt, mixture, callbacks, keep)
    if is_main():
        write_json(options.checkpoints / RUN_FILE, {**run.identity, "date": run.date})
    last = from_main(last_checkpoint(options.checkpoints) if options.resume and is_main() else None)
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        interrupt.give_back()
    done = trainer.state.global_step
    loss = fmean(log.losses) if log.losses else None
    if interrupt.stopped:
        return Trained(None, done, loss, log.seconds)
    tokens, seconds = result(done), log.seconds
    wait()  # the others have written their part of the last checkpoint
    if is_main():
        save_tokens(options.out, tokens)
        log.write(end_of_run(tokens.digest, step=done, seconds=seconds))
        shutil.rmtree(options.checkpoints)
    return Trained(tokens, done, loss, seconds)


def _arguments(options: TrainingOptions, steps: int) -> Any:
    """Return the HF Trainer's arguments."""
    import torch
    from transformers import TrainingArguments

    _check_tracker(options.report_to)
    arguments = TrainingArguments(
        output_dir=str(options.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=share(options.batch, int(os.environ.get("WORLD_SIZE", "1"))),
        learning_rate=options.rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=0.0,  # Adam's steps don't depend on the gradient's length
        seed=options.seed,
        train_sampling_strategy="sequential",  # the mixture has its own order
        save_steps=options.save_every,
        save_total_limit=2,
        logging_steps=1,
        report_to=options.report_to,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would copy a batch's lists to every GPU
    return arguments


def _chat_model(options: TrainingOptions, run: _Run, init: DefensiveTokens | None) -> ChatModel:
    from dtt_plugin.training.chat_model import load_chat_model

    chat = load_chat_model(
        options.model,
        dtype=options.dtype,
        prompt_format=init.prompt_format if init else MODEL_FORMAT,
        # Some templates write the date; a run that goes on another day keeps the one it began with.
        today=datetime.fromisoformat(run.date),
    )
    if options.gradient_checkpointing:
        try:
            chat.model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise DttError(
                f"{options.model} can't recompute activations; leave --gradient-checkpointing out."
            ) from error
    return chat


def _labels(
    options: TrainingOptions, run: _Run, chat: ChatModel, undefended: SoftPrompt, records: Sequence[Record]
) -> list[list[int]]:
    """Return the response to learn, per record."""
    from dtt_plugin.training.labels import check_prompt, data_labels, self_labels

    check_prompt(chat.tokenizer, chat.encode(records[0]["instruction"], records[0]["input"]))
    if options.labels != "self":
        return data_labels(chat.tokenizer, chat.model, records, new_tokens=options.label_tokens)
    return self_labels(
        undefended,
        chat.encode,
        records,
        tokenizer=chat.tokenizer,
        new_tokens=options.label_tokens,
        weights=run.identity["weights"],
    )


def _trainer(
    options: TrainingOptions,
    arguments: Any,
    soft_prompt: SoftPrompt,
    mixture: Mixture,
    callbacks: list[Any],
    keep: Callable[[int], Path],
) -> TokenTrainer:
    from transformers import PrinterCallback, ProgressCallback

    from dtt_plugin.training.loop import TokenTrainer, TrainingBar, collate

    trainer = TokenTrainer(
        model=soft_prompt,
        args=arguments,
        data_collator=collate,
        train_dataset=mixture,
        callbacks=callbacks,
        tokens_at_once=options.tokens_at_once,
        keep=keep,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TrainingBar)
    return trainer


def _result(
    options: TrainingOptions, run: _Run, init: DefensiveTokens | None, rows: NDArray[np.float32], steps: int
) -> DefensiveTokens:
    facts = {
        name: str(run.identity[name]) for name in ("data_sha256", "weights", "batch", "rate", "seed", "labels", "init")
    }
    licence = inherited(init) if init else {}
    return DefensiveTokens(
        rows=rows,
        model=options.model,
        method="adapted" if init else "trained",
        prompt_format=init.prompt_format if init else MODEL_FORMAT,
        source_model=origin_of(init) if init else "",
        metadata={**facts, "steps": str(steps), "label_tokens": str(options.label_tokens), **licence},
    )


def _check_tracker(name: str) -> None:
    """Refuse at once a tracker that the Trainer would fail on after the labels have been made."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks([] if name == "none" else [name]):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise DttError(f"--report-to {name} can't be used ({error}); give none, or install that tracker.") from error

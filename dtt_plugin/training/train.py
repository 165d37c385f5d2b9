"""One training run, from options to a token file."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from dtt_plugin.checkpoint import open_checkpoint
from dtt_plugin.checkpoint_folder import SETTINGS_FILES
from dtt_plugin.data import read_json
from dtt_plugin.defenses import NONE, parse_defense
from dtt_plugin.errors import DttError
from dtt_plugin.files import sha256_file, sha256_json, write_json
from dtt_plugin.formats import MODEL_FORMAT
from dtt_plugin.prompt import PromptRenderer, has_defensive_tokens, model_template
from dtt_plugin.tokens import DefensiveTokens, save_tokens
from dtt_plugin.training.options import TrainingOptions
from dtt_plugin.training.records import TrainingData, load_training_data, split
from dtt_plugin.training.start import start_rows, start_tokens

logger = logging.getLogger("dtt_plugin")

_RUN_FILE = "run.json"
_LONGEST_NAME = 230  # of 255 bytes; temporary names and step numbers are longer
# What may differ between a run and its continuation without changing the result, save for rounding.
# Model and data are compared by their content.
_FREE = ("resume", "report_to", "save_every", "out", "tokens_at_once", "gradient_checkpointing", "model", "data")


class Trained(NamedTuple):
    """What a run ended in."""

    tokens: DefensiveTokens | None
    """None: interrupted; the checkpoint is there to go on from."""
    steps: int
    loss: float | None
    """Mean over the run's steps, nats a response token."""
    seconds: float
    """Of the steps and measurements, what an interruption took left out."""


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
    _check_out(options)
    run = _run_identity(options, data, init, steps)
    run["date"] = _check_folder(options, run)
    options.checkpoints.mkdir(exist_ok=True)
    lock = options.checkpoints / ".lock"
    try:
        with FileLock(lock, timeout=0):
            try:
                return _train(options, data, training, held_out, steps, init, run)
            finally:
                lock.unlink(missing_ok=True)
                with suppress(OSError):  # there is something in it to go on from
                    options.checkpoints.rmdir()
    except Timeout as error:
        raise DttError(
            f"Another dtt train writes to {options.checkpoints}; wait for it, or name another --out."
        ) from error
    except ImportError as error:
        raise DttError(f"dtt train needs {error.name}; install it with pip install 'dtt-plugin[train]'.") from error
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if _is_disk_full(error):
            raise DttError(
                f"The disk of {options.checkpoints} is full; make room, and go on with --resume from the last whole"
                " checkpoint."
            ) from error
        if not _is_out_of_memory(error):
            raise
        raise DttError(
            f"Out of memory with --tokens-at-once {options.tokens_at_once} and --batch {options.batch}: lower"
            " --tokens-at-once first (the result stays the same), or add --gradient-checkpointing; where the run had"
            " begun, with --resume."
        ) from error


def _train(
    options: TrainingOptions,
    data: TrainingData,
    training: list[Any],
    held_out: list[Any],
    steps: int,
    init: DefensiveTokens | None,
    run: dict[str, Any],
) -> Trained:
    import torch
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments

    from dtt_plugin.training.held_out import HeldOut
    from dtt_plugin.training.labels import data_labels, self_labels
    from dtt_plugin.training.loop import Bar, HeldOutCheck, RunLog, SaveOnInterrupt, TokenTrainer, collate
    from dtt_plugin.training.mixture import Mixture, encoder
    from dtt_plugin.training.soft_prompt import SoftPrompt

    _check_tracker(options.report_to)
    arguments = TrainingArguments(
        output_dir=str(options.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
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
    if arguments.world_size > 1:
        raise DttError("dtt train runs on one device; start it without accelerate launch or torchrun.")
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would copy a batch's lists to every GPU
    tokenizer, model = _load(options)
    renderer = PromptRenderer(
        tokenizer,
        prompt_format=init.prompt_format if init else MODEL_FORMAT,
        model_template=model_template(tokenizer),
        defenses=parse_defense(NONE),
        # Some templates write the date; a run that goes on another day keeps the one it began with.
        template_args={"strftime_now": datetime.fromisoformat(run["date"]).strftime},
    )
    encode = encoder(renderer)
    try:
        encode("Sum up.", "A text.")
    except DttError as error:
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        raise DttError(
            f"The chat template of {options.model} can't render a system role, the trusted instruction, beside a user"
            f" role, the untrusted data{reason}; dtt train needs a model whose template does."
        ) from error
    undefended = SoftPrompt(model, torch.empty(0, model.get_input_embeddings().weight.shape[1]))
    if options.labels == "self":
        labels = self_labels(
            undefended,
            encode,
            training,
            new_tokens=options.label_tokens,
            pad=tokenizer.pad_token_id,
            weights=run["weights"] + run["settings"],
        )
    else:
        labels = data_labels(tokenizer, model, training, new_tokens=options.label_tokens)
    rows = start_rows(options, init, undefended.embed, renderer.encode)
    soft_prompt = SoftPrompt(model, rows)
    if not soft_prompt.packs:
        logger.warning("%s can't be packed: every example gets a pass of its own, which is slower.", options.model)

    def result(step: int) -> DefensiveTokens:
        return _result(options, soft_prompt.rows.detach().cpu().numpy(), init, run, step)

    def keep(step: int) -> Path:
        save_tokens(options.at_step(step), result(step))
        return options.at_step(step)

    size = steps * options.batch
    log = RunLog(options.log, {"label": options.out.stem, "model": options.model, "init": options.init})
    interrupt = SaveOnInterrupt()
    callbacks: list[Any] = [log]
    if options.eval_every:
        check = HeldOut(held_out, data.sentences, encode, tokenizer)
        callbacks.append(
            HeldOutCheck(
                lambda: check.rates(soft_prompt),
                keep,
                log,
                n=check.n,
                every=options.eval_every,
                stop_at=options.stop_at,
            )
        )
    callbacks.append(interrupt)  # last: a measurement may end the run
    trainer = TokenTrainer(
        model=soft_prompt,
        args=arguments,
        data_collator=collate,
        train_dataset=Mixture(training, labels, data, encode, size=size, seed=options.seed),
        callbacks=callbacks,
        tokens_at_once=options.tokens_at_once,
        keep=keep,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    write_json(options.checkpoints / _RUN_FILE, run)
    last = _last_checkpoint(options.checkpoints) if options.resume else None
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        interrupt.give_back()
    done = trainer.state.global_step
    loss = fmean(log.losses) if log.losses else None
    if interrupt.stopped:
        return Trained(None, done, loss, log.seconds)
    tokens = result(done)
    save_tokens(options.out, tokens)
    shutil.rmtree(options.checkpoints)
    return Trained(tokens, done, loss, log.seconds)


def _result(
    options: TrainingOptions, rows: Any, init: DefensiveTokens | None, run: dict[str, Any], steps: int
) -> DefensiveTokens:
    facts = {name: str(run[name]) for name in ("data_sha256", "weights", "batch", "rate", "seed", "labels", "init")}
    return DefensiveTokens(
        rows=rows,
        model=options.model,
        method="adapted" if init else "trained",
        prompt_format=init.prompt_format if init else MODEL_FORMAT,
        source_model=(init.source_model or init.model) if init else "",
        metadata={**facts, "steps": str(steps), "label_tokens": str(options.label_tokens)},
    )


def _load(options: TrainingOptions) -> tuple[Any, Any]:
    """Return tokenizer and model; weights from safetensors only, no remote code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = torch.cuda.is_available()
    dtype: Any = options.dtype
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, use_safetensors=True)
    except Exception as error:  # tokenizers raises that very class for a damaged tokenizer.json
        if _is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DttError(f"{options.model} can't be loaded as a causal language model: {reason}") from error
    if not model_template(tokenizer):
        raise DttError(f"{options.model} has no chat template; DefensiveTokens are for chat models.")
    if has_defensive_tokens(tokenizer):
        raise DttError(f"{options.model} already has DefensiveTokens; give the undefended checkpoint.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if options.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise DttError(
                f"{options.model} can't recompute activations; leave --gradient-checkpointing out."
            ) from error
    return tokenizer, model.to("cuda") if on_gpu else model


def _run_identity(
    options: TrainingOptions, data: TrainingData, init: DefensiveTokens | None, steps: int
) -> dict[str, Any]:
    """Return what decides about a run's result; a continuation has to agree in all of it."""
    named = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name not in _FREE
    }
    checkpoint = open_checkpoint(options.model, need="all")
    settings = [path for name in SETTINGS_FILES if (path := checkpoint.folder / name).is_file()]
    return {
        **named,
        "steps": steps,
        "data_sha256": data.digest,
        "init": init.digest if init else options.init,
        "weights": sha256_json([sha256_file(path) for path in checkpoint.weight_files]),
        "settings": sha256_json([sha256_file(path) for path in settings]),
    }


def _check_folder(options: TrainingOptions, run: dict[str, Any]) -> str:
    """Refuse to mix two runs' checkpoints, and to start over one that could be continued.

    Returns:
        When the run began, in ISO format.
    """
    now = datetime.now().isoformat()
    path = options.checkpoints / _RUN_FILE
    if not path.is_file():
        if options.resume:
            raise DttError(f"--resume: {options.checkpoints} holds no run to go on with; leave the option out.")
        return now
    if not options.resume:
        raise DttError(
            f"{options.checkpoints} holds an unfinished run: go on with --resume, or remove that folder to start over."
        )
    before = read_json(path)
    if changed := [name for name in run if before.get(name) != json.loads(json.dumps(run[name]))]:
        raise DttError(
            f"--resume: the run in {options.checkpoints} had other values of {', '.join(changed)}; give the same ones."
        )
    return str(before.get("date", now))


def _check_out(options: TrainingOptions) -> None:
    """Refuse at once what could not be written, or read again, after hours."""
    out = options.out
    if out.is_dir():
        raise DttError(f"--out {out} is a folder; name the token file to write.")
    if out.suffix == ".json":
        raise DttError(f"--out {out}: a token file is safetensors; name it so, and use `dtt convert` afterwards.")
    if options.log.is_dir():
        raise DttError(f"--out {out}: the log goes to {options.log}, which is a folder; name another file.")
    if re.fullmatch(re.escape(options.at_step(0).name).replace("0", r"\d+"), Path(options.init).name):
        raise DttError(f"--init {options.init} could be overwritten by this run's own files; choose another --out.")
    if len(os.fsencode(options.checkpoints.name)) > _LONGEST_NAME:
        raise DttError(f"--out {out.name}: the name is too long for the files beside it; choose a shorter one.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise DttError(f"--out {out} can't be written ({error.strerror}); name another file.") from error


def _check_tracker(name: str) -> None:
    """Refuse at once a tracker that the Trainer would fail on after the labels have been made."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks([] if name == "none" else [name]):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise DttError(f"--report-to {name} can't be used ({error}); give none, or install that tracker.") from error


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint; one that a kill or a full disk cut off is removed.

    The Trainer writes `trainer_state.json` last.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    found = [path for path, step in steps.items() if step.isdecimal()]
    for path in sorted(found, key=lambda path: int(steps[path]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            return str(path)
    return None


def _is_disk_full(error: BaseException) -> bool:
    text = str(error)
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
    # How torch.save tells of it.
    return full or "PytorchStreamWriter failed" in text or "file write failed" in text


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    said = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in said)

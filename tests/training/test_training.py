"""The trainer on tiny models: its loss, its files, its interruptions."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.bake import bake
from dtt_plugin.cli import main, parser
from dtt_plugin.costs import recorded_costs
from dtt_plugin.data.records import Record
from dtt_plugin.errors import DttError
from dtt_plugin.files.locks import locked
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens, save_tokens
from dtt_plugin.training import TrainingOptions, train
from dtt_plugin.training.soft_prompt import Example, SoftPrompt, embedding_scale
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT, write_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TRAIN_MODULE = importlib.import_module("dtt_plugin.training.train")  # the package's `train` is the function
DATA = ROOT / "tasks" / "injection_demo" / "train.json"
EXAMPLES = [Example([5, 6, 7, 8], [9, 10]), Example([20, 21], [22, 23, 24]), Example([30] * 9, [31])]


@pytest.fixture
def small_data(tmp_path: Path) -> str:
    """Sixteen of the demo's training records."""
    content = json.loads(DATA.read_text(encoding="utf-8"))
    content["records"] = content["records"][:16]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture
def options(tiny: str, small_data: str, tmp_path: Path) -> TrainingOptions:
    return TrainingOptions(
        tiny, small_data, tmp_path / "new.safetensors", k=3, steps=6, batch=4, label_tokens=4, save_every=2
    )


def load(folder: str | Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def plain_loss(model: Any, rows: Any, example: Example) -> float:
    """The StruQ loss of one example by the shortest way: logits everywhere, no packing."""
    ids = torch.tensor(example.prompt + example.response)
    embeds = torch.cat([rows, model.get_input_embeddings()(ids)]).unsqueeze(0)
    logits = model(inputs_embeds=embeds).logits[0].log_softmax(-1)
    first = len(rows) + len(example.prompt) - 1
    return -sum(float(logits[first + i, token]) for i, token in enumerate(example.response))


def test_packed_loss_is_the_sum_of_the_single_losses(tiny: str) -> None:
    model = load(tiny)
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    soft_prompt = SoftPrompt(model, rows)
    assert soft_prompt.packs
    expected = sum(plain_loss(model, rows, example) for example in EXAMPLES)
    assert soft_prompt(EXAMPLES).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_is_that_of_the_unpacked_loss_and_reaches_the_rows_only(tiny: str) -> None:
    soft_prompt = SoftPrompt(load(tiny), torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    soft_prompt(EXAMPLES).backward()
    assert soft_prompt.rows.grad is not None
    packed = soft_prompt.rows.grad.clone()
    soft_prompt.rows.grad = None
    for example in EXAMPLES:
        soft_prompt([example]).backward()
    torch.testing.assert_close(packed, soft_prompt.rows.grad, rtol=1e-4, atol=1e-6)
    assert [name for name, value in soft_prompt.named_parameters() if value.requires_grad] == ["rows"]
    assert all(value.grad is None for name, value in soft_prompt.named_parameters() if name != "rows")


def test_passes_keep_to_the_limit_and_lose_no_example(tiny: str) -> None:
    soft_prompt = SoftPrompt(load(tiny), torch.zeros(3, 32))
    parts = list(soft_prompt.passes(EXAMPLES, 18))
    assert [len(part) for part in parts] == [2, 1]
    assert [example for part in parts for example in part] == EXAMPLES


def test_training_writes_tokens_and_log_and_lowers_the_loss(options: TrainingOptions) -> None:
    trained = train(replace(options, steps=30, eval_every=15, held_out=4))
    tokens = load_tokens(options.out)
    assert tokens.method == "trained"
    assert (tokens.k, tokens.width, tokens.model) == (3, 32, Path(options.model).name)  # no path of this machine
    assert trained.tokens is not None
    assert trained.tokens.digest == tokens.digest
    header, *entries = map(json.loads, options.log.read_text().splitlines())
    assert header["format"] == "dtt.training/1"
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert [(entry["step"], entry["n"]) for entry in entries if "asr" in entry] == [(15, 4), (30, 4)]
    assert entries[-1] == {"step": 30, "seconds": trained.seconds, "tokens_sha256": tokens.digest}
    assert recorded_costs(tokens.metadata) == {"train_seconds": trained.seconds}
    assert not recorded_costs(load_tokens(options.at_step(15)).metadata), "another file's"
    assert not options.checkpoints.exists()
    kept = {step: load_tokens(options.at_step(step)) for step in (15, 30)}
    assert kept[15].metadata["steps"] == "15"
    assert kept[15].digest != kept[30].digest == tokens.digest


def test_the_same_options_give_the_same_bytes(options: TrainingOptions, tmp_path: Path) -> None:
    train(options)
    again = replace(options, out=tmp_path / "again" / "new.safetensors")
    again.out.parent.mkdir()
    train(again)
    assert again.out.read_bytes() == options.out.read_bytes()


def test_a_killed_run_resumes_to_the_same_bytes(options: TrainingOptions, tmp_path: Path) -> None:
    train(options)
    killed = _killed_at(2, options, tmp_path)
    assert not killed.out.exists()
    train(replace(killed, resume=True))
    assert killed.out.read_bytes() == options.out.read_bytes()
    steps = [entry["step"] for entry in map(json.loads, killed.log.read_text().splitlines()) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_saves_and_resumes_to_the_same_bytes(options: TrainingOptions, tmp_path: Path) -> None:
    train(options)
    stopped = replace(options, out=tmp_path / "stopped" / "new.safetensors", save_every=100)
    stopped.out.parent.mkdir()
    process = _start(stopped)
    _wait_for(stopped.log, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert not stopped.out.exists()
    train(replace(stopped, resume=True))
    assert stopped.out.read_bytes() == options.out.read_bytes()


def _killed_at(step: int, options: TrainingOptions, tmp_path: Path) -> TrainingOptions:
    """Return the options of a run that was killed once the checkpoint of `step` was there."""
    killed = replace(options, out=tmp_path / "killed" / "new.safetensors")
    killed.out.parent.mkdir()
    process = _start(killed)
    _wait_for(killed.checkpoints / f"checkpoint-{step}" / "trainer_state.json", process)
    process.kill()
    process.wait()
    return killed


def _start(options: TrainingOptions) -> subprocess.Popen[bytes]:
    """Run `dtt train` in a process that takes half a second a step."""
    slow = (
        "import time; from dtt_plugin.training.mixture import Mixture; from dtt_plugin.cli import main;"
        "plain = Mixture.__getitem__;"
        "Mixture.__getitem__ = lambda self, i: time.sleep(0.15) or plain(self, i);"
        "raise SystemExit(main())"
    )
    names = ("out", "k", "steps", "batch", "label_tokens", "save_every")
    flags = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    command = [sys.executable, "-c", slow, "train", options.model, "--data", options.data, *flags]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})


def _wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.05)


def test_resuming_with_other_options_is_refused(options: TrainingOptions) -> None:
    options.checkpoints.mkdir()
    (options.checkpoints / "run.json").write_text(json.dumps({"rate": 0.5}))
    with pytest.raises(DttError, match="unfinished run"):
        train(options)
    with pytest.raises(DttError, match=r"other values of .*rate"):
        train(replace(options, resume=True))


def test_resuming_what_was_not_begun_begins_it_and_what_is_finished_is_not_trained_again(
    options: TrainingOptions, tmp_path: Path
) -> None:
    train(replace(options, steps=1, resume=True))
    fresh = options.out.read_bytes()
    with pytest.raises(DttError, match=r"new\.safetensors is finished; leave the option out to train it anew"):
        train(replace(options, steps=1, resume=True))
    assert options.out.read_bytes() == fresh
    assert not options.checkpoints.exists()


def test_a_second_run_into_the_same_file_is_refused(options: TrainingOptions) -> None:
    options.checkpoints.mkdir()
    with locked(options.checkpoints / ".lock"), pytest.raises(DttError, match="Another dtt train writes"):
        train(options)


def test_adapting_starts_from_the_file_and_says_so(options: TrainingOptions, tmp_path: Path) -> None:
    start = write_tokens(tmp_path / "start.safetensors", width=32, k=3, model="other", method="procrustes")
    train(replace(options, init=start, rate=1e-9, steps=1))
    tokens = load_tokens(options.out)
    assert (tokens.method, tokens.source_model) == ("adapted", "other")
    np.testing.assert_allclose(tokens.rows, load_tokens(start).rows, atol=1e-6)


def test_text_start_is_the_embeddings_of_the_text(options: TrainingOptions) -> None:
    train(replace(options, init="text:hello world hello", rate=1e-9, steps=1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer("hello world hello", add_special_tokens=False).input_ids[:3]
    embedding = load(options.model).get_input_embeddings().weight.detach().numpy()
    np.testing.assert_allclose(load_tokens(options.out).rows, embedding[ids], atol=1e-6)


def test_the_records_outputs_are_learnt_where_they_are_the_labels(options: TrainingOptions, tmp_path: Path) -> None:
    train(options)
    from_data = replace(options, labels="data", out=tmp_path / "data.safetensors")
    train(from_data)
    assert load_tokens(from_data.out).metadata["labels"] == "data"
    assert load_tokens(from_data.out).digest != load_tokens(options.out).digest


def test_early_stop_ends_the_run_at_the_measurement(options: TrainingOptions) -> None:
    trained = train(replace(options, eval_every=2, held_out=4, stop_at=1.0))
    assert trained.steps == 2


def test_a_checkpoint_that_was_cut_off_is_passed_over(options: TrainingOptions, tmp_path: Path) -> None:
    train(options)
    killed = _killed_at(4, options, tmp_path)
    newest = max(killed.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (newest / "trainer_state.json").write_text('{"epoch": ')
    (newest / "optimizer.pt").unlink()
    train(replace(killed, resume=True))
    assert killed.out.read_bytes() == options.out.read_bytes()


def test_ctrl_c_at_the_measurement_that_ends_a_run_leaves_a_finished_run(
    options: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtt_plugin.training.held_out import HeldOut

    def rates(_self: HeldOut, _prompt: SoftPrompt) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return {"ignore": 0.0}

    monkeypatch.setattr(HeldOut, "rates", rates)
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in background jobs
    try:
        trained = train(replace(options, eval_every=2, held_out=4, stop_at=0.0))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)
    assert trained.tokens is not None
    assert options.out.exists()


def test_what_is_measured_does_not_depend_on_gradient_checkpointing(tiny: str) -> None:
    soft_prompt = SoftPrompt(load(tiny), torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    prompts = [example.prompt for example in EXAMPLES]
    before = soft_prompt.generate(prompts, 8, pad=0)
    soft_prompt.model.gradient_checkpointing_enable({"use_reentrant": False})
    soft_prompt.train()
    layers = soft_prompt.model.model.layers
    assert all(layer.training for layer in layers)
    assert soft_prompt.generate(prompts, 8, pad=0) == before
    assert all(layer.training for layer in layers)


def test_gradient_checkpointing_recomputes_and_ends_in_the_same_bytes(
    options: TrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    plain, calls = LlamaAttention.forward, []

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        calls.append(1)
        return plain(self, *args, **more)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    other = replace(options, labels="data", out=tmp_path / "recomputed.safetensors", gradient_checkpointing=True)
    train(replace(options, labels="data"))
    once = len(calls)
    train(other)
    assert len(calls) - once > 1.5 * once
    assert other.out.read_bytes() == options.out.read_bytes()


def _with_attention_dropout(tiny: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attention_dropout=0.5)


def _with_functional_dropout(_: str) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
    config = transformers.OPTConfig(vocab_size=300, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5, **sizes)
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize("make", [_with_attention_dropout, _with_functional_dropout])
def test_no_dropout_is_left(make: Callable[[str], Any], tiny: str) -> None:
    soft_prompt = SoftPrompt(make(tiny), torch.zeros(3, 32))
    soft_prompt.model.gradient_checkpointing_enable({"use_reentrant": False})
    soft_prompt.train()
    assert soft_prompt(EXAMPLES).item() == soft_prompt(EXAMPLES).item()


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"no_repeat_ngram_size": 1}, {"repetition_penalty": 1.5}, {"stop_strings": ["a"]}]
)
def test_answers_are_greedy_whatever_the_checkpoint_asks_for(settings: dict[str, Any], tiny: str) -> None:
    prompts = [example.prompt for example in EXAMPLES]
    model = load(tiny)
    expected = SoftPrompt(model, torch.empty(0, 32)).generate(prompts, 8, pad=0)
    model.generation_config.update(**settings)
    assert SoftPrompt(model, torch.empty(0, 32)).generate(prompts, 8, pad=0) == expected


def _fails_to_write(path: Path, tokens: DefensiveTokens) -> None:
    if "step-" not in path.name:
        raise DttError("no room")
    save_tokens(path, tokens)


@pytest.mark.parametrize(("stop_at", "steps"), [(1.0, 2), (None, 6)])
def test_a_run_that_could_not_write_its_tokens_resumes_to_the_same_bytes(
    stop_at: float | None, steps: int, options: TrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, eval_every=2, held_out=4, stop_at=stop_at)
    train(options)
    failed = replace(options, out=tmp_path / "failed" / "new.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(TRAIN_MODULE, "save_tokens", _fails_to_write)
        with pytest.raises(DttError, match="no room"):
            train(failed)
    assert train(replace(failed, resume=True)).steps == steps
    assert failed.out.read_bytes() == options.out.read_bytes()


def test_ctrl_c_while_the_last_checkpoint_is_written_leaves_a_finished_run(
    options: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = transformers.Trainer._save_checkpoint

    def save(self: Any, *args: Any, **more: Any) -> None:
        plain(self, *args, **more)
        if self.state.global_step == options.steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", save)
    assert train(options).tokens is not None
    assert options.out.exists()


def test_a_run_that_goes_on_another_day_keeps_its_date_and_its_report(
    options: TrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(options.model) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "{{ strftime_now('%d %b %Y') }}" + config["chat_template"]
    path.write_text(json.dumps(config))

    def begin(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Clock:
                return cls(2026, 1, day)

        monkeypatch.setattr("dtt_plugin.training.run_folder.datetime", Clock)

    begin(1)
    whole = train(options)
    stopped = replace(options, out=tmp_path / "stopped" / "new.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_checkpoint", _stop_at_4(transformers.Trainer._save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    begin(2)
    resumed = train(replace(stopped, resume=True))
    assert stopped.out.read_bytes() == options.out.read_bytes()
    assert resumed.loss == pytest.approx(whole.loss)
    seconds = [json.loads(line).get("seconds", 0.0) for line in stopped.log.read_text().splitlines()]
    assert seconds == sorted(seconds)
    other_day = replace(options, out=tmp_path / "other" / "new.safetensors")
    train(other_day)
    assert other_day.out.read_bytes() != options.out.read_bytes()


def _stop_at_4(plain: Any) -> Any:
    def save(self: Any, *args: Any, **more: Any) -> None:
        plain(self, *args, **more)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    return save


def test_labels_from_the_data_end_with_the_templates_end_of_turn(tiny: str) -> None:
    from dtt_plugin.training.labels import data_labels

    tokenizer, model = transformers.AutoTokenizer.from_pretrained(tiny), load(tiny)
    end = next(token for token in range(5, 50) if token != tokenizer.eos_token_id)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}" + tokenizer.convert_ids_to_tokens(end) + "{% endfor %}"
    )
    record = Record(instruction="a", input="b", output="c")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    [label] = data_labels(tokenizer, model, [record], new_tokens=50)
    assert label[-1] == end


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_same_through_the_baked_checkpoint(tmp_path: Path, tied: bool) -> None:
    base = make_checkpoint(tmp_path / "base", tied=tied, dtype="float32")
    _assert_same_loss_when_baked(base, tmp_path)


def test_loss_is_the_same_through_the_baked_checkpoint_of_a_model_that_scales_embeddings(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tied=False, dtype="float32")
    config = json.loads((base / "config.json").read_text())
    scaled = {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "embedding_multiplier": 7.0}
    (base / "config.json").write_text(json.dumps({**config, **scaled}))
    _assert_same_loss_when_baked(base, tmp_path)


def _assert_same_loss_when_baked(base: Path, tmp_path: Path) -> None:
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    in_training = SoftPrompt(load(base), rows)(EXAMPLES[:1]).item()
    tokens = DefensiveTokens(rows.numpy(), "base", "trained", "model")
    baked = bake(str(base), tokens, tmp_path / "baked").folder
    names = [f"[DefensiveToken{i}]" for i in range(3)]
    ids = transformers.AutoTokenizer.from_pretrained(baked).convert_tokens_to_ids(names)
    example = Example(ids + EXAMPLES[0].prompt, EXAMPLES[0].response)
    model = load(baked)
    ordinary = SoftPrompt(model, torch.empty(0, 32))
    # The baked head has rows more, each with a probability of its own: compare logits up to the base's vocabulary.
    positions = range(len(example.prompt) - 1, len(example.prompt) + len(example.response) - 1)
    logits = ordinary.logits([example.prompt + example.response], list(positions))
    kept = [i for i in range(logits.shape[1]) if i not in ids]
    targets = torch.tensor(example.response)
    loss = torch.nn.functional.cross_entropy(logits[:, kept], targets, reduction="sum").item()
    assert loss == pytest.approx(in_training, rel=1e-5)


def test_scale_of_a_look_up_that_multiplies_is_found() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    scaled = Gemma3TextScaledWordEmbedding(100, 16, 0, embed_scale=4.0)
    torch.nn.init.normal_(scaled.weight)
    assert embedding_scale(scaled) == pytest.approx(4.0)
    assert embedding_scale(torch.nn.Embedding(100, 16)) == 1.0


class TestBadInput:
    def test_width_and_k_of_the_start(self, options: TrainingOptions, tmp_path: Path) -> None:
        wide = write_tokens(tmp_path / "wide.safetensors", width=48, k=3)
        with pytest.raises(DttError, match="width 48"):
            train(replace(options, init=wide))
        many = write_tokens(tmp_path / "many.safetensors", width=32, k=4)
        with pytest.raises(DttError, match="--k 4"):
            train(replace(options, init=many))
        with pytest.raises(DttError, match="no such token file"):
            train(replace(options, init="rnadom"))

    def test_model_without_a_chat_template(self, options: TrainingOptions) -> None:
        path = Path(options.model) / "tokenizer_config.json"
        config = json.loads(path.read_text())
        del config["chat_template"]
        path.write_text(json.dumps(config))
        with pytest.raises(DttError, match="no chat template"):
            train(options)

    def test_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(
        self, options: TrainingOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain, calls = SoftPrompt.forward, []

        def forward(self: SoftPrompt, examples: Any) -> Any:
            calls.append(1)
            return plain(self, examples) * (float("nan") if len(calls) == 5 else 1.0)

        monkeypatch.setattr(SoftPrompt, "forward", forward)
        with pytest.raises(DttError, match=r"not finite at step 5.*checkpoint"):
            train(replace(options, tokens_at_once=4096))
        assert (options.checkpoints / "checkpoint-4").is_dir()
        assert not options.out.exists()
        assert load_tokens(options.at_step(4)).metadata["steps"] == "4"

    def test_gradient_that_is_not_finite_reaches_no_checkpoint(
        self, options: TrainingOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = SoftPrompt.forward

        def forward(self: SoftPrompt, examples: Any) -> Any:
            # The loss is finite; the root's derivative at 0 is not.
            return plain(self, examples) + (self.rows.sum() * 0).abs().sqrt()

        monkeypatch.setattr(SoftPrompt, "forward", forward)
        with pytest.raises(DttError, match="not finite at step 1"):
            train(options)
        assert np.isfinite(load_tokens(options.at_step(0)).rows).all()

    def test_what_could_not_be_written_or_reported_is_told_before_any_work(
        self, options: TrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SoftPrompt, "generate", lambda *_, **__: pytest.fail("labels were made"))
        (tmp_path / "file").write_text("")
        (tmp_path / "log.log.jsonl").mkdir()
        start = write_tokens(tmp_path / "new.step-2.safetensors", width=32, k=3)
        for changed, message in (
            ({"out": tmp_path / "t.json"}, "dtt convert"),
            ({"out": tmp_path / "log.safetensors"}, "which is a folder"),
            ({"out": tmp_path / f"{'a' * 240}.st"}, "too long"),
            ({"init": start}, "could be overwritten"),
            ({"init": "a long text without its prefix " * 20}, "no such token file"),
            ({"eval_every": 10, "held_out": 4}, "nothing would be measured"),
            ({"out": tmp_path}, "is a folder"),
            ({"out": tmp_path / "file" / "t.safetensors"}, "can't be written"),
            ({"report_to": "nothing"}, "--report-to nothing"),
        ):
            with pytest.raises(DttError, match=message):
                train(replace(options, **changed))

    @pytest.mark.parametrize(
        ("content", "more", "message"),
        [
            ("{{ m.content }", {}, "can't render a system role.*unexpected"),
            ("{{ m.content if m.role == 'user' }}", {}, "can't render a system role"),
            (
                "{{ raise_exception('no') if m.role == 'assistant' }}{{ m.content }}",
                {"labels": "data"},
                "refuses an assistant's turn",
            ),
        ],
    )
    def test_template_that_lacks_a_role(
        self, content: str, more: dict[str, Any], message: str, options: TrainingOptions
    ) -> None:
        path = Path(options.model) / "tokenizer_config.json"
        template = "{% for m in messages %}" + content + "{% endfor %}"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        with pytest.raises(DttError, match=message):
            train(replace(options, **more))

    def test_model_that_is_defended_already(self, options: TrainingOptions, tmp_path: Path) -> None:
        tokens = load_tokens(write_tokens(tmp_path / "t.safetensors", width=32, k=3))
        with pytest.raises(DttError, match="already has DefensiveTokens"):
            train(replace(options, model=str(bake(options.model, tokens, tmp_path / "baked").folder)))

    def test_tokenizer_that_is_damaged(self, options: TrainingOptions) -> None:
        (Path(options.model) / "tokenizer.json").write_text('{"a": 1}')
        with pytest.raises(DttError, match="can't be loaded"):
            train(options)
        assert not options.checkpoints.exists()

    def test_weights_that_are_cut_short(self, options: TrainingOptions) -> None:
        path = Path(options.model) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DttError, match=r"safetensors|can't be loaded"):
            train(options)

    def test_a_full_disk_is_told(self, options: TrainingOptions, monkeypatch: pytest.MonkeyPatch) -> None:
        def save(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", save)
        with pytest.raises(DttError, match="is full; make room, and go on with --resume"):
            train(options)

    def test_out_of_memory_names_the_setting(self, options: TrainingOptions, monkeypatch: pytest.MonkeyPatch) -> None:
        def forward(self: SoftPrompt, examples: Any) -> Any:
            return torch.empty(2**60)

        monkeypatch.setattr(SoftPrompt, "forward", forward)
        with pytest.raises(DttError, match="lower --tokens-at-once"):
            train(options)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"k": 0}, "--k 0"),
            ({"k": 1001}, "--k 1001"),
            ({"rate": 1e38}, "--rate 1e"),
            ({"steps": 0}, "--steps 0"),
            ({"rate": -1.0}, "--rate -1.0"),
            ({"seed": -1}, "--seed -1"),
            ({"labels": "others"}, "--labels others"),
            ({"stop_at": 0.1}, "--eval-every"),
        ],
    )
    def test_options_out_of_range(self, options: TrainingOptions, changed: dict[str, Any], message: str) -> None:
        with pytest.raises(DttError, match=message):
            replace(options, **changed)

    def test_command_ends_with_code_2(self, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = str(tmp_path / "t.safetensors")
        assert main(["train", tiny, "--data", str(tmp_path / "nothing.json"), "--out", out]) == 2
        assert "nothing.json" in capsys.readouterr().err


def test_token_file_of_a_run_loads_into_a_model(options: TrainingOptions, tmp_path: Path) -> None:
    train(options)
    save_tokens(tmp_path / "copy.safetensors", load_tokens(options.out))
    baked = bake(options.model, load_tokens(options.out), tmp_path / "baked")
    embedding = load(baked.folder).get_input_embeddings().weight.detach().numpy()
    stored = load_tokens(options.out).rows.astype(embedding.dtype)
    np.testing.assert_allclose(embedding[list(baked.token_ids)], stored, rtol=1e-2)


def test_the_command_has_the_defaults_of_the_options_and_says_them() -> None:
    command = next(action for action in parser()._actions if action.dest == "command").choices["train"]  # type: ignore[index]
    options = {field.name: field for field in fields(TrainingOptions)}
    for action in command._actions:
        if action.dest in ("help", "json"):
            continue
        default = options.pop(action.dest).default
        assert action.default is argparse.SUPPRESS
        if type(default) in (int, float):
            assert f"(default {default})" in (action.help or ""), action.dest
    assert not options

"""The HF Trainer on a soft prompt: it does devices, optimiser, checkpoints, resuming and trackers."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from dtt_plugin.errors import DttError
from dtt_plugin.progress import Bar
from dtt_plugin.training.processes import from_main, in_any, is_main
from dtt_plugin.training.soft_prompt import Example

LOG_FORMAT = "dtt.training/1"


def collate(examples: Sequence[Example]) -> dict[str, list[torch.Tensor]]:
    """Return a batch in the form that accelerate can move to a device; nothing is padded."""
    return {
        "prompts": [torch.tensor(example.prompt) for example in examples],
        "responses": [torch.tensor(example.response) for example in examples],
    }


class TokenTrainer(Trainer):
    """Trains the rows of a `SoftPrompt`; a step takes as many forward passes as its examples need.

    Of several processes each takes its share of a batch, and the sums are those of one process.
    """

    def __init__(self, *args: Any, tokens_at_once: int, keep: Callable[[int], Path], **options: Any) -> None:
        super().__init__(*args, **options)
        self.tokens_at_once = tokens_at_once
        self.keep = keep
        # Not torch's wrapper, which averages over processes and expects one pass a step: the rows' gradient is all.
        self.accelerator.prepare_model = lambda model, **_: model

    def _over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, reduction="sum")  # type: ignore[no-any-return]

    def training_step(
        self, model: Any, inputs: Mapping[str, list[torch.Tensor]], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the batch's loss, nats a response token, and leave its gradient in the rows."""
        model.train()
        examples = [
            Example(prompt.tolist(), response.tolist())
            for prompt, response in zip(inputs["prompts"], inputs["responses"], strict=True)
        ]
        device = self.model.rows.device
        own_tokens = float(sum(len(example.response) for example in examples))
        n_tokens = self._over_processes(torch.tensor(own_tokens, device=device)).item()
        total = torch.zeros((), device=device)
        for part in self.model.passes(examples, self.tokens_at_once):
            loss = model(part) / n_tokens
            self.accelerator.backward(loss)
            total += loss.detach()
        total = self._over_processes(total)
        gradient = self.model.rows.grad
        if gradient is not None:
            gradient.copy_(self._over_processes(gradient))
        if not torch.isfinite(total) or gradient is None or not torch.isfinite(gradient).all():
            good = self.state.global_step
            raise DttError(
                f"The loss or its gradient is not finite at step {good + 1}; the tokens of step {good} are in"
                f" {self.keep(good)}, the checkpoints before it in {self.args.output_dir}. Go on with a lower --rate"
                " and another --out, from that file with --init."
            )
        return total


class RunLog(TrainerCallback):
    """Writes the training log: one JSON object a line, flushed as it comes."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.header = {"format": LOG_FORMAT, **header}
        self.began = time.perf_counter()
        self.losses: list[float] = []
        """Every step's loss so far, the steps before an interruption included."""

    @property
    def seconds(self) -> float:
        """Time of the run so far, without what an interruption took."""
        return round(time.perf_counter() - self.began, 3)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a line; of several processes the main one does."""
        if not is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the log; a resumed run's keeps the steps before its checkpoint, and their time."""
        kept = []
        if state.global_step and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last one
            kept = [entry for entry in entries if 0 <= entry.get("step", -1) <= state.global_step]
        self.losses = [entry["loss"] for entry in kept if "loss" in entry]
        self.began = time.perf_counter() - max((entry.get("seconds", 0.0) for entry in kept), default=0.0)
        if is_main():
            lines = [json.dumps(entry) + "\n" for entry in [self.header, *kept]]
            self.path.write_text("".join(lines), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Note a step's loss."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.write({"step": state.global_step, "loss": logs["loss"], "seconds": self.seconds})


class TrainingBar(TrainerCallback):
    """A progress bar with the remaining time, and the loss at its end."""

    bar: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the bar, where a resumed run is."""
        if is_main():
            self.bar = Bar(total=state.max_steps, initial=state.global_step, desc="training", unit=" steps", delay=0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show a step."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Show the loss."""
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class HeldOutCheck(TrainerCallback):
    """Measures the held-out ASR every so many steps, keeps the tokens of that step, stops when it is low enough."""

    def __init__(
        self,
        measure: Callable[[], dict[str, float]],
        keep: Callable[[int], Path],
        log: RunLog,
        *,
        n: int,
        every: int,
        stop_at: float | None,
    ) -> None:
        self.measure, self.keep, self.log, self.n = measure, keep, log, n
        self.every, self.stop_at = every, stop_at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure where it is time."""
        if state.global_step % self.every:
            return
        self.keep(state.global_step)
        rates = from_main(self.measure() if is_main() else None)
        asr = max(rates.values())
        self.log.write({"step": state.global_step, "asr": asr, "n": self.n, "attack_rates": rates})
        if self.stop_at is not None and asr <= self.stop_at:
            control.should_training_stop = True
            # Were there a checkpoint of this step, and no token file yet, --resume would go on past the stop.
            control.should_save = False


class SaveOnInterrupt(TrainerCallback):
    """Turns Ctrl-C into: finish this step, write a checkpoint, stop."""

    def __init__(self) -> None:
        self.stopped = False
        """The run ended here, with steps left to do."""
        self._asked = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the signal over; a second Ctrl-C stops at once."""
        self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, _number: int, _frame: Any) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, self._before)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop, where asked to and where the run would not end anyway."""
        if in_any(self._asked) and not control.should_training_stop:
            self.stopped = control.should_save = control.should_training_stop = True

    def give_back(self) -> None:
        """Give the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

"""One run of `dtt attack`: written record by record, to be stopped at any step and resumed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtt_plugin import __version__
from dtt_plugin.attack.benchmark import Benchmark, load_benchmark
from dtt_plugin.attack.options import UNIVERSAL, AttackOptions
from dtt_plugin.data.records import read_json
from dtt_plugin.data.suffixes import (
    SOFT,
    AttackFile,
    Suffix,
    read_attacks,
    record_digest,
    records_digest,
    write_attacks,
)
from dtt_plugin.errors import DttError
from dtt_plugin.files.locks import LOCK_SUFFIX, locked
from dtt_plugin.files.replacing import write_json
from dtt_plugin.progress import Bar

if TYPE_CHECKING:
    from dtt_plugin.attack.search import Progress

_SAVE_EVERY = 10
_VERSIONED = ("torch", "transformers", "tokenizers")
_GROWING = ("finished", "flops", "search")


@dataclass(frozen=True)
class Attacked:
    """What a run came to."""

    file: AttackFile
    """Not finished: interrupted; `--resume` goes on."""
    seconds: float
    """Of this run; an earlier part is not counted."""


def attack(options: AttackOptions, *, progress: bool = False) -> Attacked:
    """Attack an arm and write the suffixes to `options.out`.

    Raises:
        DttError: bad input, a file that is there already, or too little memory.
    """
    started = time.perf_counter()
    benchmark = load_benchmark(options.task, options.own)
    options.chosen(len(benchmark.records))
    with _locked(options.out), _told_plainly():
        run = _Run(options, benchmark, _before(options), progress=progress)
        with _Interrupt() as run.interrupt:
            run.go()
    return Attacked(run.file, time.perf_counter() - started)


def _before(options: AttackOptions) -> AttackFile | None:
    """Return what an earlier part of the run wrote."""
    if not options.out.exists():
        return None
    if options.resume:
        return read_attacks(options.out)
    raise DttError(f"{options.out} already exists; go on with --resume, or name another --out.")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out.with_name(f"{out.name}{LOCK_SUFFIX}"), wait=False))
        except BlockingIOError as error:
            raise DttError(f"Another dtt attack writes to {out}; wait for it, or name another --out.") from error
        except OSError as error:
            raise DttError(f"--out {out} can't be written ({error.strerror}); name another file.") from error
        yield


@contextmanager
def _told_plainly() -> Iterator[None]:
    """Turn a missing package and a memory that is too small for a single pass into a sentence."""
    try:
        yield
    except ImportError as error:
        raise DttError(f"dtt attack needs {error.name}; install it with pip install 'dtt-plugin[hf]'.") from error
    except (RuntimeError, MemoryError) as error:
        from dtt_plugin.training.failures import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise DttError(
            "Out of memory already for one prompt; give --dtype bfloat16, or a smaller model. What was found so far is"
            " in the file: --resume goes on."
        ) from error


class _Interrupt:
    """Turns Ctrl-C into: finish this step, save, stop. A second one stops at once."""

    asked = False

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, _number: int, _frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_error: object) -> None:
        signal.signal(signal.SIGINT, self._before)


class _Run:
    """The file so far, and the search in progress."""

    def __init__(
        self, options: AttackOptions, benchmark: Benchmark, before: AttackFile | None, *, progress: bool
    ) -> None:
        from dtt_plugin.attack.bench import Bench

        self.options, self.records = options, benchmark.records
        self.chosen = options.chosen(len(self.records))
        # A run that goes on keeps the data type that its machine had chosen.
        self.bench = Bench(options, benchmark, dtype=before.versions.get("dtype", "") if before else options.dtype)
        self.steps = self.bench.budget.steps
        self.interrupt = _Interrupt()
        self.file = self._begun() if before is None else self._continued(before)
        if before is None:
            self._state.unlink(missing_ok=True)  # of another run
        self.saved = self._read_state()
        write_attacks(options.out, self.file)
        n = 1 if options.method == UNIVERSAL else len(self.chosen)
        self.bar = Bar(total=n * self.steps, desc=options.method, unit=" steps", disable=not progress)

    def _begun(self) -> AttackFile:
        versions = {"dtt_plugin": __version__, **{name: metadata.version(name) for name in _VERSIONED}}
        return AttackFile(
            method=self.options.method,
            task=self.options.task,
            records_sha256=records_digest(self.records),
            injected_prompt=self.bench.benchmark.injected_prompt,
            start=self.options.start,
            arm=self.bench.arm.facts,
            n_records=len(self.records),
            budget=self.options.budget_facts(),
            finished=False,
            flops=0,
            versions={**versions, "dtype": self.bench.arm.dtype},
        )

    def _continued(self, before: AttackFile) -> AttackFile:
        """Return what an earlier part wrote, once it is sure to be of the same run."""
        now, then = self._begun().header(), before.header()
        if changed := [name for name in now if name not in _GROWING and now[name] != then[name]]:
            name = changed[0]
            raise DttError(
                f"--resume: {self.options.out} was begun with another {name} ({then[name]}, now {now[name]}); give the"
                " same arguments, or another --out."
            )
        if before.search and before.search.get("records") != self.chosen:
            raise DttError(
                f"--resume: {self.options.out} was made on other --records; give the same, or another --out."
            )
        there = {suffix.record_id for suffix in before.suffixes}
        # More records may be attacked later.
        return before if before.search else replace(before, finished=before.finished and there >= {*self.chosen})

    @property
    def _state(self) -> Path:
        return self.options.out.with_name(f"{self.options.out.name}.state")

    def _read_state(self) -> tuple[list[int], Progress] | None:
        """Return the search that an earlier part left unfinished, and its records."""
        from dtt_plugin.attack.search import Progress

        if not self._state.is_file():
            return None
        try:
            content = read_json(self._state)
            return content["records"], Progress(**content["progress"])
        except (TypeError, KeyError) as error:
            raise DttError(f"{self._state} is damaged; remove it, and --resume begins that record anew.") from error

    def go(self) -> None:
        """Attack what is left to attack."""
        if self.file.finished:
            return
        with self.bar:
            if not (self._universal() if self.options.method == UNIVERSAL else self._each()):
                return
        self._write(replace(self.file, finished=True))

    def _write(self, file: AttackFile) -> None:
        self.file, self.saved = file, None
        write_attacks(self.options.out, file)
        self._state.unlink(missing_ok=True)

    def _each(self) -> bool:
        there = {suffix.record_id for suffix in self.file.suffixes}
        self.bar.update(len(there) * self.steps)
        for number in self.chosen:
            if number in there:
                continue
            found = None
            if not self.interrupt.asked:
                found = self._soft(number) if self.options.method == SOFT else self._search(number)
            if found is None:
                return False
            flops = (self.file.flops or 0) + (found.flops or 0)
            self._write(replace(self.file, suffixes=(*self.file.suffixes, found), flops=flops))
            self.bar.update(len(self.file.suffixes) * self.steps - self.bar.n)
            self._show(found.loss)
        return True

    def _show(self, loss: float | None) -> None:
        hits = sum(bool(suffix.hit) for suffix in self.file.suffixes)
        self.bar.set_postfix_str(f"{hits} of {len(self.file.suffixes)} records hit, loss {loss or 0:.3f}")

    def _searched(self, numbers: list[int]) -> tuple[Progress, list[str] | None]:
        """Search one suffix for records, from where an earlier part of the run left it."""
        # A kill may have come between the writing of a record and the removal of its state.
        left = self.saved[1] if self.saved and self.saved[0] == numbers else None
        return self.bench.search(numbers, left, partial(self._told, numbers))

    def _told(self, numbers: list[int], progress: Progress) -> bool:
        """Note a step; the search in progress is saved now and then, and when it is to stop."""
        self.bar.update(len(self.file.suffixes) * self.steps + progress.step - self.bar.n)
        # Infinite where more records have just joined; then the last one that was noted, on fewer of them.
        self._show(progress.best_loss if isfinite(progress.best_loss) else progress.curve[-1][1])
        if self.interrupt.asked or progress.step % _SAVE_EVERY == 0:
            write_json(self._state, {"records": numbers, "progress": progress.to_json()})
        return not self.interrupt.asked

    def _soft(self, number: int) -> Suffix:
        found, objective = self.bench.soft(number)
        return Suffix(
            number,
            record_digest(self.records[number]),
            None,
            found.loss,
            found.steps,
            found.hit,
            found.curve,
            objective.flops,
            objective.target.text,
        )

    def _search(self, number: int) -> Suffix | None:
        """Search a suffix for one record; None where it was stopped."""
        progress, targets = self._searched([number])
        if targets is None:
            return None
        return Suffix(
            number,
            record_digest(self.records[number]),
            self.bench.place(number).suffix_text(progress.best),
            round(progress.best_loss, 4),
            progress.step,
            progress.hits[0],
            progress.curve,
            progress.flops,
            targets[0],
        )

    def _universal(self) -> bool:
        """Search one suffix over the chosen records, and write it for all others."""
        others = [number for number in range(len(self.records)) if number not in self.chosen]
        if not others:
            raise DttError(
                "--method universal is evaluated on the records that it was not made on; choose fewer with --records."
            )
        progress, targets = self._searched(self.chosen)
        if targets is None:
            return False
        text = self.bench.place(self.chosen[0]).suffix_text(progress.best)
        lines = [Suffix(number, record_digest(self.records[number]), text) for number in others]
        search = {
            "records": self.chosen,
            "hits": progress.hits,
            "loss": round(progress.best_loss, 4),
            "steps": progress.step,
            "curve": progress.curve,
        }
        self.file = replace(self.file, suffixes=tuple(lines), search=search, flops=progress.flops)
        return True

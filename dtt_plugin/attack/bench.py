"""An arm with a benchmark's records on it: what every method attacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from dtt_plugin.attack.arm import load_arm
from dtt_plugin.attack.benchmark import Benchmark
from dtt_plugin.attack.candidates import usable_tokens
from dtt_plugin.attack.continuation import weaker
from dtt_plugin.attack.objective import Objective
from dtt_plugin.attack.options import CANCEL, CONTINUATION, RANDOM_SEARCH, AttackOptions
from dtt_plugin.attack.place import Place
from dtt_plugin.attack.search import Progress, Search, begin
from dtt_plugin.attack.soft import SoftResult, soft_attack
from dtt_plugin.attack.targets import aim_at_likelier, undefended_answer, words
from dtt_plugin.errors import DttError
from dtt_plugin.tasks.adaptive import data_before_suffix
from dtt_plugin.training.soft_prompt import SoftPrompt


class Bench:
    """A loaded arm, and the prompts of a benchmark's records.

    Args:
        options: of the run.
        benchmark: all its records.
        dtype: of the weights.

    Raises:
        DttError: see `load_arm`; or a method that needs DefensiveTokens and an arm without.
    """

    def __init__(self, options: AttackOptions, benchmark: Benchmark, *, dtype: str) -> None:
        self.options, self.benchmark, self.budget = options, benchmark, options.allowed
        self.arm = load_arm(options, dtype=dtype)
        if options.method in (CONTINUATION, CANCEL) and not self.arm.model.k:
            raise DttError(f"--method {options.method} attacks DefensiveTokens; give an arm with --tokens FILE.")
        self.usable = usable_tokens(self.arm.renderer.tokenizer, len(self.arm.model.embed.weight))
        self._data = data_before_suffix(options.start, benchmark.records, benchmark.sentences, benchmark.prompts)
        self._stages: list[SoftPrompt] = [self.arm.model]
        if options.method == CONTINUATION:
            self._stages = [*weaker(self.arm.model, options.along), self.arm.model]
        self._checked = False

    def place(self, number: int) -> Place:
        """Return a record's prompt with a gap for the suffix."""
        record = self.benchmark.records[number]
        tokens, rule = self.budget.suffix_tokens, self.benchmark.rule(number)
        return Place(self.arm.renderer, self.arm.model.k, record, self._data[number], tokens, rule)

    def objective(self, number: int, model: SoftPrompt) -> Objective:
        """Return what to minimise on a record."""
        place = self.place(number)
        objective = Objective(model, place, words(place)[0], self.options.positions_at_once)
        if not self._checked:
            objective.check_cache()
            self._checked = True
        if self.options.method == CANCEL:
            undefended = SoftPrompt(model.model, model.rows[:0])
            objective.aim(undefended_answer(undefended, place, place.renderer.tokenizer.pad_token_id))
        else:
            aim_at_likelier(objective)
        return objective

    def soft(self, number: int) -> tuple[SoftResult, Objective]:
        """Attack a record by free vectors."""
        objective = self.objective(number, self.arm.model)
        return soft_attack(objective, self.budget.steps), objective

    def search(
        self, numbers: Sequence[int], progress: Progress | None, told: Callable[[Progress], bool]
    ) -> tuple[Progress, list[str] | None]:
        """Search one suffix for one or several records, through every stage of the method.

        Args:
            numbers: of the records.
            progress: where an earlier part of the run stopped.
            told: see `Search`.

        Returns:
            The progress; and per record the target, or None where the search was stopped.
        """
        targets: list[str] = []
        for stage in range(progress.stage if progress else 0, len(self._stages)):
            objectives = [self.objective(number, self._stages[stage]) for number in numbers]
            targets = [objective.target.text for objective in objectives]
            begins = progress is None or stage > progress.stage
            if progress is None:
                names = "+".join(map(str, numbers))
                progress = begin(objectives[0].place.start, f"{self.options.seed}/{names}")
            if begins:
                progress.enter(stage)
                progress.flops += sum(objective.flops for objective in objectives)
            budget = replace(self.budget, steps=self.budget.steps * (stage + 1) // len(self._stages))
            greedy = self.options.method != RANDOM_SEARCH
            if not Search(objectives, self.usable, budget, greedy=greedy, told=told).run(progress):
                return progress, None
        assert progress is not None
        return progress, targets

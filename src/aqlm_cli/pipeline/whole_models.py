"""Whole models of an allocation: mixes near the target, the plans that follow from them, and the best of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from aqlm_cli.errors import PlanError
from aqlm_cli.events import Advanced, StageStarted, Warned
from aqlm_cli.pipeline.job import Job
from aqlm_cli.quantization.sensitivity import contrasts, fit_effects
from aqlm_cli.runs.stages import ALLOCATE
from aqlm_cli.seeds import generator
from aqlm_cli.spec.allocation_record import AllocationRecord, Candidate, Mix, of_blocks
from aqlm_cli.spec.scores import Effects, Goal, Question, Scores, Solution

REFINEMENTS: Mapping[Question, int] = {"size": 2, "speed": 2, "kl": 6}
"""Plans that are solved for and measured, each from all that was measured before."""

NEAR, LARGEST_STEP = 0.95, 4.0
"""A share of the divergence asked for that is near enough, and the most by which what is asked changes at once."""

STAGE = f"{ALLOCATE.name}: whole models"


@dataclass(eq=False)
class WholeModels:
    """The search for the best choices; `divergence` measures that of the base model with some, in nats a token."""

    job: Job
    divergence: Callable[[Mapping[str, str]], float]
    scores: Scores
    goal: Goal
    mixes: list[Mix] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)

    def search(self) -> AllocationRecord:
        """Measure the best single scheme, the mixes, and the plans.

        Raises PlanError where no choice keeps the goal.
        """
        job, goal = self.job, self.goal
        planned = job.config.quantize.target.mixes + 1 + REFINEMENTS[goal.question]
        job.emit(StageStarted(STAGE, planned, "model"))
        single = job.preflight.facts.best_single(job.config, self.scores, goal)
        if single is not None:
            self._add(single, None, goal.limit)
        self._measure_mixes()
        self._refine()
        job.emit(Advanced(STAGE, planned))
        record = AllocationRecord(goal, self.scores, tuple(self.mixes), tuple(self.candidates))
        if goal.question == "kl" and record.chosen.divergence > goal.limit:
            told = f"the best plan has a divergence of {record.chosen.divergence:.4g}, {goal.limit:g} was asked"
            job.emit(Warned(told))
        return record

    def _measure_mixes(self) -> None:
        """Mixes of layers in the blocks, which differ in the layers that they take for sensitive."""
        mixes, rng = self.job.config.quantize.target.mixes, generator(self.job.config.seed, ALLOCATE.name)
        groups = sorted({layer.group for layer in self.scores.layers.values() if not layer.table})
        near = self._beside_tables()
        for contrast in contrasts(groups, mixes, rng) if groups else []:
            fitted = self._effects()
            factors = {group: fitted.factor(group) * contrast[group] for group in groups}
            choices = self.scores.solve(Effects(factors, fitted.power), near).choices
            inside = {path: word for path, word in choices.items() if not self.scores.layers[path].table}
            if all(mix.choices != inside for mix in self.mixes):
                self._keep(Mix(inside, self.divergence(inside)))

    def _refine(self) -> None:
        """Plans from all that was measured before each, until one repeats."""
        facts, config, asked = self.job.preflight.facts, self.job.config, self.goal.limit
        for _ in range(REFINEMENTS[self.goal.question]):
            try:
                solution = facts.solve(config, self.scores, self._effects(), replace(self.goal, limit=asked))
            except PlanError:
                if not self.candidates:
                    raise
                return
            if any(candidate.choices == solution.choices for candidate in self.candidates):
                return
            self._add(solution, len(self.mixes), asked)
            if self.goal.question == "kl":
                share = self.candidates[-1].divergence / self.goal.limit
                if NEAR <= share <= 1:
                    return
                asked /= min(max(share, 1 / LARGEST_STEP), LARGEST_STEP)

    def _add(self, solution: Solution, solved_from: int | None, asked: float) -> None:
        """Measure a plan that keeps the goal; without its tables it is a mix, too."""
        divergence = self.divergence(solution.choices)
        candidate = Candidate(solution.choices, solution.bytes, divergence, solved_from, asked)
        self.candidates.append(candidate)
        self._keep(of_blocks(self.scores, candidate))

    def _keep(self, mix: Mix) -> None:
        self.mixes.append(mix)
        self.job.emit(Advanced(STAGE, len(self.mixes), f"KL {mix.divergence:.4f} without the tables"))

    def _effects(self) -> Effects:
        loads = [self.scores.loads(mix.choices) for mix in self.mixes]
        return fit_effects(loads, [mix.divergence for mix in self.mixes])

    def _beside_tables(self) -> Goal:
        """The goal of a mix: for a size, without what the file holds beside the layers to decide about."""
        if self.goal.question != "size":
            return self.goal
        preflight = self.job.preflight
        beside = 0 if preflight.expected is None else preflight.packed_bytes - preflight.expected.bytes
        return Goal("size", self.goal.limit - beside)

"""Scores: what every treatment of every layer costs and does, and the allocation that follows from them.

The divergence of a whole model is taken as

    KL = (sum over layers of factor(group) sensitivity error)^(1/power) + sum over tables of divergence

Errors are relative errors of the layers' outputs; of tables, the divergence of each choice is known by itself. For
every combination of the tables' choices that no other beats, the layers in the blocks are a knapsack of their own, so
that the best of all is found. Everything here is arithmetic on stored values: the same scores give the same plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

from aqlm_cli.errors import PlanError
from aqlm_cli.spec.allocate import Allocation, Option, best_within, fastest_within, least_size
from aqlm_cli.spec.choices import OpenLayer
from aqlm_cli.spec.priors import expected_divergence, expected_error, group_of, sensitivity
from aqlm_cli.spec.treatment import Treatment, parse_treatment

Question: TypeAlias = Literal["size", "kl", "speed"]

SIXTEEN_BITS = "16 bits"
"""The choice to leave a layer as it is."""


@dataclass(frozen=True)
class Effects:
    """Effects of errors: `factors` by group, and the power in which they add up.

    `error` is the mean relative error of the divergence foretold for a mix that was left out; NaN where one was given.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    power: float = 1.0
    error: float = math.nan

    def divergence(self, loads: Mapping[str, float]) -> float:
        """KL in nats a token of a mix with these loads."""
        return self.of_sum(math.fsum(self.factor(group) * load for group, load in loads.items()))

    def of_sum(self, total: float) -> float:
        return float(max(0.0, total) ** (1 / self.power))

    def factor(self, group: str) -> float:
        return self.factors.get(group, 1.0)


@dataclass(frozen=True)
class ScoredOption:
    """One choice: METHOD:SCHEME or SIXTEEN_BITS. `effect` is the relative error; of a table the divergence, in nats."""

    word: str
    bytes: int
    read: int
    effect: float


@dataclass(frozen=True)
class ScoredLayer:
    """A layer to decide about; `group` and the prior `sensitivity` are those of the blocks' layers."""

    group: str
    sensitivity: float
    table: bool
    options: tuple[ScoredOption, ...]

    def option(self, word: str) -> ScoredOption:
        return next(option for option in self.options if option.word == word)


@dataclass(frozen=True)
class Goal:
    """The question and its limit: bytes of the file without what is not decided, nats, or bytes read for a token."""

    question: Question
    limit: float


@dataclass(frozen=True)
class Solution:
    """The choice of every layer by path, as a word; its bytes, and the divergence foretold."""

    choices: Mapping[str, str]
    bytes: int
    divergence: float
    gap: float

    @property
    def score(self) -> float:
        return self.divergence

    @property
    def treatments(self) -> dict[str, Treatment | None]:
        return {path: None if word == SIXTEEN_BITS else parse_treatment(word) for path, word in self.choices.items()}


@dataclass(frozen=True)
class Scores:
    """All layers to decide about, by path."""

    layers: Mapping[str, ScoredLayer]

    def loads(self, choices: Mapping[str, str]) -> dict[str, float]:
        """The load of a choice in every group: sums of sensitivity times error. Layers without a choice have none."""
        loads = {layer.group: 0.0 for layer in self.layers.values() if not layer.table}
        for path, word in choices.items():
            layer = self.layers[path]
            if not layer.table:
                loads[layer.group] += layer.sensitivity * layer.option(word).effect
        return loads

    def of_tables(self, choices: Mapping[str, str]) -> float:
        """The divergence of the tables' choices."""
        tables = ((self.layers[path], word) for path, word in choices.items() if self.layers[path].table)
        return math.fsum(layer.option(word).effect for layer, word in tables)

    def divergence(self, choices: Mapping[str, str], effects: Effects) -> float:
        """The divergence foretold for these choices."""
        return effects.divergence(self.loads(choices)) + self.of_tables(choices)

    def bytes(self, choices: Mapping[str, str]) -> int:
        return sum(self.layers[path].option(word).bytes for path, word in choices.items())

    def solve(self, effects: Effects, goal: Goal) -> Solution:
        """The least divergence, or the least size, that the goal allows. PlanError where nothing keeps its limit."""
        inside = {path: _options(layer, effects) for path, layer in self.layers.items() if not layer.table}
        best: tuple[float, Allocation] | None = None
        refusal = PlanError("no combination of the tables' schemes keeps the target")
        for tables in _combinations(self.layers):
            try:
                plan = _within(inside, tables, effects, goal)
            except PlanError as error:
                refusal = error
                continue
            foretold = effects.of_sum(plan.score) + tables.score
            together = Allocation({**plan.choices, **tables.choices}, plan.gap)
            cost = together.bytes if goal.question == "kl" else foretold
            if best is None or cost < best[0]:
                best = cost, together
        if best is None:
            raise refusal
        words = {path: option.scheme or SIXTEEN_BITS for path, option in best[1].choices.items()}
        choices = {path: words[path] for path in self.layers}
        return Solution(choices, best[1].bytes, self.divergence(choices, effects), best[1].gap)

    def smallest(self) -> Solution:
        """The fewest bytes for every layer."""
        least = {path: min(layer.options, key=lambda one: one.bytes) for path, layer in self.layers.items()}
        choices = {path: option.word for path, option in least.items()}
        size = sum(option.bytes for option in least.values())
        return Solution(choices, size, self.divergence(choices, Effects()), 0.0)

    def above(self, solution: Solution) -> Scores:
        """The same layers with those choices alone that have no larger effect than the ones of the solution."""
        layers = {}
        for path, layer in self.layers.items():
            most = layer.option(solution.choices[path]).effect
            layers[path] = replace(layer, options=tuple(one for one in layer.options if one.effect <= most))
        return Scores(layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {path: asdict(layer) for path, layer in self.layers.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Scores:
        return cls(
            {
                path: ScoredLayer(**{**layer, "options": tuple(ScoredOption(**option) for option in layer["options"])})
                for path, layer in stored.items()
            }
        )


def expected_scores(layers: Mapping[str, OpenLayer]) -> Scores:
    """Scores that nobody has measured, from priors."""
    return Scores({path: scored(layer, {}) for path, layer in layers.items()})


def scored(layer: OpenLayer, effects: Mapping[str, float], measured: float | None = None) -> ScoredLayer:
    """The layer with the measured effects of its choices, by word, and its measured sensitivity.

    What is missing there is expected.
    """
    options = tuple(
        ScoredOption(str(one), one.bytes, one.read, effects.get(str(one), _expected(layer, one.treatment)))
        for one in layer.choices
    )
    own = 0.0 if layer.outside else sensitivity(layer) if measured is None else measured
    return ScoredLayer(group_of(layer), own, layer.outside, options)


def _expected(layer: OpenLayer, treatment: Treatment | None) -> float:
    if treatment is None:
        return 0.0
    return expected_divergence(layer, treatment.scheme) if layer.outside else expected_error(treatment.scheme)


def _options(layer: ScoredLayer, effects: Effects) -> list[Option]:
    """The choices of a layer as the knapsack takes them: the word stands for the scheme."""
    factor = 1.0 if layer.table else layer.sensitivity * effects.factor(layer.group)
    return [Option(None, one.word, one.bytes, one.read, factor * one.effect) for one in layer.options]


def _combinations(layers: Mapping[str, ScoredLayer]) -> Iterator[Allocation]:
    """Choices of all tables of which none is beaten in bytes, bytes read and divergence together."""
    tables = {path: _options(layer, Effects()) for path, layer in layers.items() if layer.table}
    every = [Allocation(dict(zip(tables, choice, strict=True))) for choice in itertools.product(*tables.values())]
    for one in every:
        if not any(_beats(other, one) for other in every):
            yield one


def _beats(one: Allocation, other: Allocation) -> bool:
    mine, theirs = (one.bytes, one.read, one.score), (other.bytes, other.read, other.score)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _within(inside: Mapping[str, list[Option]], tables: Allocation, effects: Effects, goal: Goal) -> Allocation:
    """The best choice for the blocks, beside these tables."""
    if goal.question == "size":
        return best_within(inside, int(goal.limit) - tables.bytes)
    if goal.question == "speed":
        return fastest_within(inside, int(goal.limit) - tables.read)
    left = goal.limit - tables.score
    if left < 0:
        raise PlanError(f"the tables alone have a divergence of {tables.score:.3g}, and {goal.limit:g} is asked for")
    return least_size(inside, left**effects.power)

"""AllocationRecord: everything that an allocation measured; the same record gives the same plan again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from aqlm_cli.spec.scores import Goal, Question, Scores, Solution
from aqlm_cli.spec.treatment import Treatment


@dataclass(frozen=True)
class Mix:
    """The base model with these choices for layers in the blocks, and its measured divergence in nats a token."""

    choices: Mapping[str, str]
    divergence: float


@dataclass(frozen=True)
class Candidate:
    """A plan for the whole model that keeps the target, its bytes and its measured divergence.

    It was solved from the first `mixes` mixes; None: it is the best with one scheme for all layers in the blocks.
    `asked` is the limit that it was solved for: that of the goal, or of a divergence one that the measured should meet.
    """

    choices: Mapping[str, str]
    bytes: int
    divergence: float
    mixes: int | None
    asked: float


@dataclass(frozen=True)
class AllocationRecord:
    """Goal, scores, mixes and candidates in the order in which they were measured."""

    goal: Goal
    scores: Scores
    mixes: tuple[Mix, ...]
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The candidate of least divergence; of a goal `kl` the smallest that keeps it, or the nearest to it."""
        if self.goal.question != "kl":
            return min(self.candidates, key=lambda one: one.divergence)
        keeping = [one for one in self.candidates if one.divergence <= self.goal.limit]
        if keeping:
            return min(keeping, key=lambda one: one.bytes)
        return min(self.candidates, key=lambda one: one.divergence)

    @property
    def treatments(self) -> dict[str, Treatment | None]:
        """The chosen treatments by path; None: 16 bits."""
        chosen = self.chosen
        return Solution(chosen.choices, chosen.bytes, chosen.divergence, 0.0).treatments

    def loads(self, mixes: int) -> tuple[list[dict[str, float]], list[float]]:
        """Loads and divergences of the first mixes, from which effects are fitted."""
        first = self.mixes[:mixes]
        return [self.scores.loads(mix.choices) for mix in first], [mix.divergence for mix in first]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {
            "goal": asdict(self.goal),
            "layers": self.scores.to_json(),
            "mixes": [asdict(mix) for mix in self.mixes],
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> AllocationRecord:
        """Raises LookupError, TypeError or ValueError for values of another form, or that do not fit each other."""
        record = cls(
            Goal(**stored["goal"]),
            Scores.from_json(stored["layers"]),
            tuple(Mix(**mix) for mix in stored["mixes"]),
            tuple(Candidate(**candidate) for candidate in stored["candidates"]),
        )
        record._check()
        return record

    def _check(self) -> None:
        """Raise ValueError for a question or number that is none, and a choice that is not among those scored."""
        if self.goal.question not in get_args(Question):
            raise ValueError(f"there is no question {self.goal.question!r}")
        if not self.candidates or not self.scores.layers:
            raise ValueError("no candidate, or no layer")
        whole, numbers = self.scores.layers.keys(), [self.goal.limit]
        for layer in self.scores.layers.values():
            numbers += [layer.sensitivity, *(n for one in layer.options for n in (one.bytes, one.read, one.effect))]
        for mix in self.mixes:
            numbers.append(mix.divergence)
            self._check_choices(mix.choices, {path for path in whole if not self.scores.layers[path].table})
        for candidate in self.candidates:
            solved_from = 0 if candidate.mixes is None else candidate.mixes
            numbers += [candidate.bytes, candidate.divergence, candidate.asked, solved_from]
            self._check_choices(candidate.choices, whole)
            if type(solved_from) is not int or not 0 <= solved_from <= len(self.mixes):
                raise ValueError(f"a candidate is solved from {solved_from!r} of {len(self.mixes)} mixes")
        for number in numbers:
            if type(number) not in (int, float) or not math.isfinite(number):
                raise ValueError(f"{number!r} is no finite number")

    def _check_choices(self, choices: Mapping[str, str], paths: Collection[str]) -> None:
        """Raise ValueError where the choices are not those of exactly these layers."""
        if choices.keys() != set(paths):
            raise ValueError("choices of other layers than those scored")
        for path, word in choices.items():
            if word not in [one.word for one in self.scores.layers[path].options]:
                raise ValueError(f"{path} has no choice {word!r}")


def of_blocks(scores: Scores, candidate: Candidate) -> Mix:
    """A candidate as a mix: without its tables, and without the divergence that these have by themselves."""
    inside = {path: word for path, word in candidate.choices.items() if not scores.layers[path].table}
    left = candidate.divergence - scores.of_tables(candidate.choices)
    return Mix(inside, max(left, candidate.divergence / 20))  # tables and layers may make up for each other


def single_schemes(scores: Scores, among: Sequence[str]) -> list[Scores]:
    """The scores with one scheme alone for all layers in the blocks that have it, largest first."""
    kept: list[tuple[int, Scores]] = []
    for word in among:
        layers = {}
        for path, layer in scores.layers.items():
            named = tuple(option for option in layer.options if option.word == word)
            layers[path] = layer if layer.table or not named else replace(layer, options=named)
        size = sum(min(option.bytes for option in layer.options) for layer in layers.values())
        kept.append((-size, Scores(layers)))
    return [one for _, one in sorted(kept, key=lambda pair: pair[0])]

"""Allocation: of every layer one of its options, so that the whole model keeps a limit and loses the least.

An option costs bytes of the file, bytes that a decode step reads, and a score: what it adds to the divergence from the
base model. All three are sums over the layers, so each question is a multiple-choice knapsack (knapsack.py), solved
exactly: the least score within a size (`best_within`) or within what may be read for a token (`fastest_within`), and
the least size within a score (`least_size`).

    plan = best_within({"lm_head": (Option(None, None, 113, 113, 0.0), Option("rtn", "int4g64", 30, 30, 0.2))}, 60)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from aqlm_cli.errors import PlanError
from aqlm_cli.spec.knapsack import ROUNDING, select


@dataclass(frozen=True)
class Option:
    """One treatment of one layer; method and scheme None: it stays in 16 bits.

    `bytes` are those of a file, its tensors' lines in the header included; `read` those of a decode step; `score` is
    what the treatment adds to the divergence.
    """

    method: str | None
    scheme: str | None
    bytes: int
    read: int
    score: float

    def __str__(self) -> str:
        return "16 bits" if self.scheme is None else f"{self.method}:{self.scheme}"


TRIES = 8
"""Times that the size of a file is compared with its limit; the second mostly changes nothing."""

Layers: TypeAlias = Mapping[str, Sequence[Option]]
"""The options of each layer, by path."""


@dataclass(frozen=True)
class Allocation:
    """The chosen option of each layer by path. `gap`: 0, or by how much less the best of all may cost at most."""

    choices: Mapping[str, Option]
    gap: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(option.bytes for option in self.choices.values())

    @property
    def read(self) -> int:
        return sum(option.read for option in self.choices.values())

    @property
    def score(self) -> float:
        return math.fsum(option.score for option in self.choices.values())


def best_within(layers: Layers, limit: int) -> Allocation:
    """The least score in at most `limit` bytes of a file. PlanError where the smallest options need more."""
    return _selected(layers, _bytes, _score, limit, "bytes")


def fastest_within(layers: Layers, limit: int) -> Allocation:
    """The least score with at most `limit` bytes read for a token. PlanError where the smallest options need more."""
    return _selected(layers, _read, _score, limit, "bytes to read a token")


def least_size(layers: Layers, limit: float) -> Allocation:
    """The fewest bytes with a score of at most `limit`. PlanError where the best options have more."""
    return _selected(layers, _score, _bytes, limit * (1 + ROUNDING), "score")


class Sized(Protocol):
    """Something that was solved for: an Allocation, or what is made of one."""

    @property
    def bytes(self) -> int: ...

    @property
    def score(self) -> float: ...


Plan = TypeVar("Plan", bound=Sized)


def within_file(solve: Callable[[int], Plan], size_of: Callable[[Plan], int], limit: int) -> Plan:
    """The allocation whose file is the largest within `limit`: `size_of` tells its size to the byte.

    A safetensors header writes where every tensor lies, so that a file is not quite the sum of its layers: `solve` is
    asked again with what the last plan's file had beside them.
    """
    asked, tried = limit, set[int]()
    best: Plan | None = None
    while asked not in tried and len(tried) < TRIES:
        tried.add(asked)
        plan = solve(asked)
        size = size_of(plan)
        if size <= limit and (best is None or plan.score < best.score):
            best = plan
        beside = limit - (size - plan.bytes)
        asked = min(beside, asked - 1) if size > limit else beside
    if best is None:
        raise PlanError(f"no allocation makes a file of at most {limit} bytes; ask for a larger one")
    return best


def _bytes(option: Option) -> float:
    return option.bytes


def _read(option: Option) -> float:
    return option.read


def _score(option: Option) -> float:
    return option.score


def _selected(
    layers: Layers, weigh: Callable[[Option], float], cost: Callable[[Option], float], limit: float, unit: str
) -> Allocation:
    weights = [[weigh(option) for option in options] for options in layers.values()]
    costs = [[cost(option) for option in options] for options in layers.values()]
    chosen = select(weights, costs, limit)
    if chosen is None:
        least = math.fsum(min(options) for options in weights)
        raise PlanError(
            f"the smallest choice needs {least:.6g} {unit}, and at most {limit:.6g} are asked for; raise the target, "
            "or name smaller schemes with --among"
        )
    pairs = zip(layers.items(), chosen.options, strict=True)
    return Allocation({path: options[number] for (path, options), number in pairs}, chosen.gap)

"""Allocations: the three questions agree with each other, and a file keeps its size to the byte."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqlm_cli.errors import PlanError
from aqlm_cli.spec.allocate import Allocation, Option, best_within, fastest_within, least_size, within_file

OPTION = st.builds(
    Option,
    method=st.just("aqlm"),
    scheme=st.sampled_from(["1x8g8", "2x8g8", "3x8g8"]),
    bytes=st.integers(1, 40),
    read=st.integers(0, 40),
    score=st.integers(0, 20).map(float),
)
LAYERS = st.dictionaries(st.sampled_from("abcde"), st.lists(OPTION, min_size=1, max_size=3), min_size=1)


def all_of(layers: dict[str, list[Option]]) -> list[Allocation]:
    return [Allocation(dict(zip(layers, choice, strict=True))) for choice in itertools.product(*layers.values())]


@given(LAYERS, st.integers(0, 200))
def test_the_best_within_a_size_is_the_best_of_all(layers: dict[str, list[Option]], limit: int) -> None:
    possible = [plan.score for plan in all_of(layers) if plan.bytes <= limit]
    if not possible:
        with pytest.raises(PlanError, match="raise the target"):
            best_within(layers, limit)
        return
    plan = best_within(layers, limit)
    assert plan.bytes <= limit
    assert plan.score == min(possible)


@given(LAYERS, st.integers(0, 100))
def test_the_fastest_reads_no_more_than_the_limit(layers: dict[str, list[Option]], limit: int) -> None:
    possible = [plan.score for plan in all_of(layers) if plan.read <= limit]
    if possible:
        plan = fastest_within(layers, limit)
        assert plan.read <= limit
        assert plan.score == min(possible)


@given(LAYERS, st.integers(0, 60))
def test_the_least_size_keeps_the_score(layers: dict[str, list[Option]], limit: int) -> None:
    possible = [plan.bytes for plan in all_of(layers) if plan.score <= limit]
    if not possible:
        with pytest.raises(PlanError):
            least_size(layers, limit)
        return
    plan = least_size(layers, limit)
    assert plan.score <= limit
    assert plan.bytes == min(possible)


@given(LAYERS)
def test_least_size_undoes_best_within(layers: dict[str, list[Option]]) -> None:
    limit = sum(max(option.bytes for option in options) for options in layers.values()) - 1
    if any(plan.bytes <= limit for plan in all_of(layers)):
        plan = best_within(layers, limit)
        assert least_size(layers, plan.score).bytes <= plan.bytes


@given(LAYERS, st.integers(60, 200), st.integers(0, 9))
def test_a_file_is_never_larger_than_asked(layers: dict[str, list[Option]], limit: int, digits: int) -> None:
    def size_of(plan: Allocation) -> int:  # of a header that grows with what it tells
        return plan.bytes + 10 + digits * len(str(plan.bytes))

    possible = [plan.score for plan in all_of(layers) if size_of(plan) <= limit]
    if not possible:
        return
    try:
        plan = within_file(lambda asked: best_within(layers, asked), size_of, limit)
    except PlanError:  # some bytes may be given away where a digit more just does not fit
        assert all(size_of(plan) > limit - 2 * digits for plan in all_of(layers) if plan.bytes <= limit)
        return
    assert size_of(plan) <= limit


def test_a_file_takes_what_its_header_leaves() -> None:
    layers = {"a": [Option("aqlm", "1x8g8", 10, 0, 9.0), Option("aqlm", "2x8g8", 20, 0, 1.0)]}
    assert within_file(lambda asked: best_within(layers, asked), lambda plan: plan.bytes - 5, 15).bytes == 20
    assert within_file(lambda asked: best_within(layers, asked), lambda plan: plan.bytes + 5, 24).bytes == 10


def test_scores_add_up() -> None:
    plan = Allocation({str(n): Option("aqlm", "1x8g8", 1, 1, 0.1) for n in range(10)})
    assert plan.score == 1.0 and plan.bytes == 10 and not math.isnan(plan.gap)

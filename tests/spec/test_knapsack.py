"""The multiple-choice knapsack against trying everything, and on as many groups as models have."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqlm_cli.spec import knapsack
from aqlm_cli.spec.knapsack import Selection, select

GROUP = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=4)
GROUPS = st.lists(GROUP, min_size=1, max_size=6)


def columns(groups: list[list[tuple[int, int]]]) -> tuple[list[list[int]], list[list[int]]]:
    return [[w for w, _ in group] for group in groups], [[c for _, c in group] for group in groups]


def best_of_all(groups: list[list[tuple[int, int]]], limit: float) -> tuple[int, int] | None:
    """The least (cost, weight) of all choices within the limit."""
    sums = (tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*groups))
    return min(((cost, weight) for weight, cost in sums if weight <= limit), default=None)


@given(GROUPS, st.integers(0, 150))
def test_no_choice_is_cheaper_and_none_as_cheap_is_lighter(groups: list[list[tuple[int, int]]], limit: int) -> None:
    chosen = select(*columns(groups), limit)
    best = best_of_all(groups, limit)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        assert (chosen.cost, chosen.weight) == best
        assert chosen.gap == 0
        taken = [group[number] for group, number in zip(groups, chosen.options, strict=True)]
        assert chosen.weight == sum(weight for weight, _ in taken) <= limit


@given(GROUPS, st.integers(0, 150), st.integers(0, 50))
def test_a_higher_limit_never_costs_more(groups: list[list[tuple[int, int]]], limit: int, more: int) -> None:
    chosen, relaxed = select(*columns(groups), limit), select(*columns(groups), limit + more)
    assert chosen is None or (relaxed is not None and relaxed.cost <= chosen.cost)


@given(GROUPS, st.integers(0, 150))
def test_an_option_that_another_beats_is_never_chosen(groups: list[list[tuple[int, int]]], limit: int) -> None:
    chosen = select(*columns(groups), limit)
    for group, number in zip(groups, chosen.options if chosen else (), strict=chosen is not None):
        weight, cost = group[number]
        assert not any(w <= weight and c <= cost and (w, c) != (weight, cost) for w, c in group)


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 3)), min_size=1, max_size=4), min_size=1, max_size=5)
)
def test_costs_may_be_any_numbers(groups: list[list[tuple[int, float]]]) -> None:
    limit = sum(max(weight for weight, _ in group) for group in groups) // 2
    chosen, best = select(*columns(groups), limit), best_of_all(groups, limit)  # type: ignore[arg-type]
    assert (chosen is None) == (best is None)
    assert chosen is None or best is None or abs(chosen.cost - best[0]) <= 1e-9


def model(groups: int, seed: int = 0, crumbs: int = 1) -> tuple[list[list[float]], list[list[float]]]:
    """Matrices of three sizes at 1 to 4 bits and 16, and less than `crumbs` bytes more; costs like 4^-bits."""
    rng = np.random.default_rng(seed)
    bits = np.array([1.0, 2.0, 3.0, 4.0, 16.0])
    size = rng.choice([110592, 331776, 884736], groups)
    weights = np.floor(size[:, None] * bits / 8) + rng.integers(0, crumbs, (groups, 5))
    costs = size[:, None] * np.exp(rng.normal(0, 1, (groups, 1))) * 4.0**-bits * np.exp(rng.normal(0, 0.1, (groups, 5)))
    costs[:, -1] = 0
    return weights.tolist(), costs.tolist()


def halfway(weights: list[list[float]]) -> float:
    return (sum(map(min, weights)) + sum(sorted(group)[2] for group in weights)) / 2


def within_a_minute(groups: int, crumbs: int) -> Selection:
    weights, costs = model(groups, crumbs=crumbs)
    limit, started = halfway(weights), time.process_time()
    chosen = select(weights, costs, limit)
    assert time.process_time() - started < 60
    assert chosen is not None and chosen.weight <= limit
    return chosen


@pytest.mark.parametrize("crumbs", [1, 200])
def test_a_model_of_210_layers_is_solved_exactly(crumbs: int) -> None:
    assert within_a_minute(210, crumbs).gap == 0


def test_20000_experts_are_solved_exactly() -> None:
    assert within_a_minute(20_000, 1).gap == 0


@pytest.mark.slow
def test_crumbs_in_20000_experts_cost_a_hundred_thousandth_at_most() -> None:
    chosen = within_a_minute(20_000, 200)
    assert chosen.gap < 1e-5 * chosen.cost


def test_a_front_that_is_too_large_is_thinned_within_the_limit_and_the_gap_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, costs = model(40, crumbs=200)
    limit = halfway(weights)
    exact = select(weights, costs, limit)
    monkeypatch.setattr(knapsack, "CORE_FRONT", 1)
    monkeypatch.setattr(knapsack, "LARGEST_FRONT", 2)
    thinned = select(weights, costs, limit)
    assert exact is not None and thinned is not None
    assert exact.gap == 0 < thinned.gap
    assert thinned.weight <= limit
    assert exact.cost <= thinned.cost <= exact.cost + thinned.gap

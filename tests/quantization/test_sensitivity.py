"""Sensitivities: recovered from mixes that obey the model, drawn to the prior by those that say nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from aqlm_cli.quantization.sensitivity import contrasts, fit_effects, nonnegative_least_squares

GROUPS = [f"{name} {third}" for name in ("q", "v", "down") for third in range(2)]


def mixes(count: int, seed: int = 0) -> list[dict[str, float]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        dict(zip(GROUPS, (0.1 + torch.rand(len(GROUPS), generator=rng)).tolist(), strict=True)) for _ in range(count)
    ]


def divergences(loads: list[dict[str, float]], factors: dict[str, float], power: float) -> list[float]:
    return [sum(factors[group] * load for group, load in one.items()) ** (1 / power) for one in loads]


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 8))
def test_the_least_squares_are_those_of_scipy(seed: int, columns: int, more: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    matrix = torch.randn(columns + more, columns, generator=rng, dtype=torch.float64)
    wanted = torch.randn(columns + more, generator=rng, dtype=torch.float64)
    ours, theirs = nonnegative_least_squares(matrix, wanted), torch.from_numpy(nnls(matrix.numpy(), wanted.numpy())[0])
    assert bool((ours >= 0).all())
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("power", [1.0, 0.7, 0.5])
def test_effects_are_recovered_from_mixes_that_obey_them(power: float) -> None:
    factors = dict(zip(GROUPS, (0.2, 3.0, 1.0, 0.5, 2.0, 1.5), strict=True))
    loads = mixes(24)
    effects = fit_effects(loads, divergences(loads, factors, power))
    assert effects.power == power
    assert effects.error < 0.01
    for group in GROUPS:
        assert effects.factors[group] == pytest.approx(factors[group], rel=0.05)
    (new,) = mixes(1, seed=1)
    assert effects.divergence(new) == pytest.approx(divergences([new], factors, power)[0], rel=0.01)


def test_one_mix_gives_all_groups_one_factor() -> None:
    loads = mixes(1)
    effects = fit_effects(loads, [2 * sum(loads[0].values())])
    assert effects.power == 1.0 and math.isnan(effects.error)
    assert list(effects.factors.values()) == pytest.approx([2.0] * len(GROUPS))


def test_few_mixes_foretell_better_than_the_prior_and_no_factor_is_negative() -> None:
    factors = dict(zip(GROUPS, (0.2, 3.0, 1.0, 0.5, 2.0, 1.5), strict=True))
    loads, unseen = mixes(5), mixes(20, seed=1)
    effects = fit_effects(loads, divergences(loads, factors, 0.8))
    prior = fit_effects(loads[:1], divergences(loads[:1], factors, 0.8))
    assert min(effects.factors.values()) >= 0

    def error(guess) -> float:
        pairs = zip(unseen, divergences(unseen, factors, 0.8), strict=True)
        return sum(abs(guess.divergence(one) / kl - 1) for one, kl in pairs)

    assert error(effects) < error(prior)


def test_a_mix_that_changes_nothing_tells_nothing() -> None:
    loads = [dict.fromkeys(GROUPS, 0.0), *mixes(1)]
    effects = fit_effects(loads, [0.0, sum(loads[1].values())])
    assert list(effects.factors.values()) == pytest.approx([1.0] * len(GROUPS))
    assert set(fit_effects(loads[:1], [0.0]).factors.values()) == {1.0}


def test_contrasts_are_balanced_and_the_first_is_the_prior() -> None:
    first, *others = contrasts(GROUPS, 5, torch.Generator().manual_seed(0))
    assert set(first.values()) == {1.0}
    assert all(math.prod(one.values()) == pytest.approx(1.0) for one in others)
    assert len({tuple(one.values()) for one in others}) > 1

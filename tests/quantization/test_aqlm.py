from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.methods import aqlm, rtn
from aqlm_cli.quantization.solvers.code_search import code_search
from aqlm_cli.quantization.solvers.codebooks import Approximation
from aqlm_cli.quantization.solvers.hessian import Feedback, LayerStatistics, damped, diagonal_blocks, most_active_first
from aqlm_cli.quantization.solvers.kmeans import residual_kmeans
from aqlm_cli.quantization.solvers.ldlq import sweep
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.schemes import AdditiveScheme, parse_scheme
from aqlm_kernels import AdditiveMatrix

ROWS, FEATURES = 64, 160  # more inputs than error feedback spreads at once, and no multiple of that
DEFAULTS = AqlmSettings()
QUICK = AqlmSettings(kmeans_iterations=5, rounds=3, ldlq_rounds=1, beam=4, final_beam=8)
PLAIN = code_search(torch.device("meta"))  # any device but the CPU


def layer(seed: int = 0, rows: int = ROWS, features: int = FEATURES) -> tuple[Tensor, LayerStatistics]:
    """A random weight, and inputs as real ones are: correlated, in no order, some far larger than others."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.randperm(features, generator=draw)
    sizes = torch.exp(0.7 * torch.randn(features, generator=draw))
    moment = 0.9 ** (places[:, None] - places).abs() * sizes[:, None] * sizes
    return torch.randn(rows, features, generator=draw), LayerStatistics(moment, 1000)


def quantize(
    weight: Tensor, statistics: LayerStatistics, scheme: str = "2x4g4", settings: AqlmSettings = DEFAULTS, seed: int = 0
) -> AdditiveMatrix:
    return aqlm.quantize(weight, statistics, parse_scheme(scheme), torch.Generator().manual_seed(seed), settings)


def error(seed: int, scheme: str = "2x4g4", settings: AqlmSettings = DEFAULTS) -> float:
    weight, statistics = layer(seed)
    return statistics.relative_error(weight, quantize(weight, statistics, scheme, settings).dequantize())


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# ------------------------------------------------------------------------------------------------------ what it wins


@pytest.mark.parametrize("seed", [0, 1])
def test_it_beats_round_to_nearest_by_far_with_fewer_bits(seed: int) -> None:
    weight, statistics = layer(seed)
    matrix = quantize(weight, statistics)
    rounded = rtn.quantize(weight, statistics, parse_scheme("int2g32"), torch.Generator(), DEFAULTS)
    assert matrix.bits() < rounded.bits()
    found, nearest = (statistics.relative_error(weight, one.dequantize()) for one in (matrix, rounded))
    assert found < nearest / 8


@pytest.mark.parametrize("seed", [0, 1])
def test_it_beats_plain_kmeans_by_far(seed: int) -> None:
    weight, statistics = layer(seed)
    scales = weight.norm(dim=1)
    codes, codebooks = residual_kmeans(
        (weight / scales[:, None]).view(ROWS, -1, 4),
        torch.ones(ROWS),
        torch.ones(FEATURES // 4, 4),
        num_codebooks=2,
        entries=16,
        iterations=100,
        search=code_search(weight.device),
        rng=torch.Generator().manual_seed(0),
    )
    plain = statistics.relative_error(weight, AdditiveMatrix(codes, codebooks, scales).dequantize())
    assert error(seed) < plain / 6


def test_error_feedback_and_its_order_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = geometric_mean([error(seed) for seed in range(3)])
    with monkeypatch.context() as patch:
        patch.setattr(aqlm, "most_active_first", lambda moment, group: most_active_first(moment, group).flip(0))
        assert whole < 0.9 * geometric_mean([error(seed) for seed in range(3)])
    with monkeypatch.context() as patch:
        patch.setattr(aqlm, "_search_ahead", lambda weight, present, *_: present)
        assert whole < 0.8 * geometric_mean([error(seed) for seed in range(3)])


@pytest.mark.slow
def test_each_bit_spent_lowers_the_error_as_theory_has_it() -> None:
    """A bit a weight more divides the squared error by four at best, and by more than two here."""
    one, two, three, four = (error(0, f"{m}x4g4") for m in (1, 2, 3, 4))
    for worse, better in ((one, two), (two, three), (three, four)):
        assert 2 < worse / better < 5


def test_more_rounds_and_a_wider_beam_lower_the_error() -> None:
    least = AqlmSettings(rounds=1, ldlq_rounds=0, beam=2, final_beam=2)
    assert geometric_mean([error(seed) for seed in range(3)]) < 0.9 * geometric_mean(
        [error(seed, settings=least) for seed in range(3)]
    )


@pytest.mark.slow
def test_the_two_forms_of_the_search_end_at_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half a percent on average: one tie broken otherwise can send a single small matrix another way."""
    schemes = ("1x4g4", "2x4g4", "2x4g8", "3x4g8", "2x6g8")
    compiled = [error(seed, scheme) for seed, scheme in enumerate(schemes)]
    monkeypatch.setattr(aqlm, "code_search", lambda device: PLAIN)
    plain = [error(seed, scheme) for seed, scheme in enumerate(schemes)]
    assert geometric_mean(compiled) == pytest.approx(geometric_mean(plain), rel=0.005)


# ---------------------------------------------------------------------------------------------------- what it returns


@pytest.mark.parametrize(
    "scheme", ["1x8g8", "2x8g8", "3x8g16", "5x8g16", "1x12g8", "2x12g8", "1x16g8", "2x1g8", "8x2g32"]
)
def test_every_scheme_is_served_and_costs_what_it_says(scheme: str) -> None:
    weight, statistics = layer(rows=24)
    matrix = quantize(weight, statistics, scheme, QUICK)
    assert matrix.bits() == parse_scheme(scheme).stored_bits(*weight.shape)
    assert matrix.dequantize().shape == weight.shape
    assert matrix.dequantize().isfinite().all()
    assert statistics.relative_error(weight, matrix.dequantize()) < (0.9 if scheme in ("2x1g8", "8x2g32") else 0.1)


def test_the_generator_alone_decides() -> None:
    weight, statistics = layer()
    first, again, other = (quantize(weight, statistics, settings=QUICK, seed=seed) for seed in (0, 0, 1))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    assert not torch.equal(first.codes, other.codes)


def test_weight_and_statistics_stay_as_they_are() -> None:
    weight, statistics = layer()
    before = weight.clone(), statistics.second_moment.clone()
    quantize(weight, statistics, settings=QUICK)
    assert torch.equal(weight, before[0]) and torch.equal(statistics.second_moment, before[1])


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_the_unit_of_weights_and_inputs_does_not_matter(factor: float) -> None:
    """By a power of two, which float32 multiplies exactly."""
    weight, statistics = layer()
    expected = statistics.relative_error(weight, quantize(weight, statistics, settings=QUICK).dequantize())
    louder = LayerStatistics(factor * statistics.second_moment, 1000)
    found = louder.relative_error(weight, quantize(weight, louder, settings=QUICK).dequantize())
    assert found == pytest.approx(expected, rel=0.1)
    larger = quantize(factor * weight, statistics, settings=QUICK)
    assert statistics.relative_error(factor * weight, larger.dequantize()) == pytest.approx(expected, rel=0.1)


# ------------------------------------------------------------------------------------------------------ awkward layers


@pytest.mark.parametrize("algorithm", ["ldlq", "reference"])
def test_a_row_of_zeros_stays_zero_and_harms_no_other(algorithm: str) -> None:
    weight, statistics = layer()
    expected = statistics.relative_error(weight, quantize(weight, statistics).dequantize())
    weight[5] = 0
    settings = AqlmSettings.model_validate({"algorithm": algorithm})
    found = quantize(weight, statistics, settings=settings).dequantize()
    assert found.isfinite().all()
    assert found[5].abs().max() < 0.01
    assert statistics.relative_error(weight, found) < (1.3 if algorithm == "ldlq" else 4) * expected


def test_a_weight_of_zeros_becomes_zeros() -> None:
    _, statistics = layer()
    found = quantize(torch.zeros(ROWS, FEATURES), statistics).dequantize()
    assert found.abs().max() < 1e-6


def test_inputs_that_never_come_do_not_matter_and_their_weights_stay_near() -> None:
    weight, statistics = layer()
    alive = torch.ones(FEATURES)
    alive[8:24] = 0
    alive[100] = 0
    dead = LayerStatistics(statistics.second_moment * alive[:, None] * alive, 1000)
    found = quantize(weight, dead).dequantize()
    assert found.isfinite().all()
    assert dead.relative_error(weight, found) < 1.5 * error(0)
    assert (found - weight)[:, 8:24].norm() < weight[:, 8:24].norm()


@pytest.mark.parametrize("tokens", [0, 1, FEATURES // 3])
def test_a_singular_moment_is_no_obstacle(tokens: int) -> None:
    weight, statistics = layer()
    draw = torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(7))
    x = draw @ torch.linalg.cholesky(statistics.second_moment).T
    poor = LayerStatistics(x.T @ x / max(1, tokens), tokens)
    found = quantize(weight, poor).dequantize()
    assert found.isfinite().all()
    assert poor.relative_error(weight, found) < error(0)
    if tokens == 0:  # then all inputs count the same
        assert LayerStatistics(torch.eye(FEATURES), 1).relative_error(weight, found) < 0.15


def test_fewer_groups_than_entries_are_met_exactly() -> None:
    weight, statistics = layer(rows=4, features=16)
    found = quantize(weight, statistics, "2x8g8").dequantize()
    assert statistics.relative_error(weight, found) < 1e-9


def test_a_single_row_and_a_single_group_are_matrices_too() -> None:
    for rows, features in ((1, 64), (40, 8), (1, 8)):
        weight, statistics = layer(rows=rows, features=features)
        found = quantize(weight, statistics, "2x4g8").dequantize()
        assert found.isfinite().all() and statistics.relative_error(weight, found) < 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("algorithm", ["ldlq", "reference"])
def test_what_is_no_number_is_refused(bad: float, algorithm: str) -> None:
    settings = AqlmSettings.model_validate({"algorithm": algorithm})
    weight, statistics = layer()
    damaged = weight.clone()
    damaged[3, 7] = bad
    with pytest.raises(QuantizationError, match="the weight holds NaN or infinite values"):
        quantize(damaged, statistics, settings=settings)
    moment = statistics.second_moment.clone()
    moment[7, 7] = bad
    with pytest.raises(QuantizationError, match="its inputs hold NaN or infinite values"):
        quantize(weight, LayerStatistics(moment, 1000), settings=settings)


# ------------------------------------------------------------------------------------------------ codebooks in 8 bits


@pytest.mark.parametrize("seed", [0, 1])
def test_codes_chosen_for_rounded_codebooks_make_up_for_a_third_of_the_rounding(seed: int) -> None:
    weight, statistics = layer(seed)
    sixteen, eight = (quantize(weight, statistics, scheme, QUICK, seed) for scheme in ("3x5g4", "3x5g4c8"))
    matrices = sixteen, replace(sixteen, entry_bits=8), eight
    exact, rounded, found = (statistics.relative_error(weight, one.stored().dequantize()) for one in matrices)
    assert eight.scheme == "3x5g4c8"
    assert 0 < found - exact < 2 / 3 * (rounded - exact)
    assert torch.equal(eight.stored().codebooks, eight.codebooks), "they are rounded already"


# ------------------------------------------------------------------------------------- weights that float16 cannot hold


def stored_row_errors(matrix: AdditiveMatrix, weight: Tensor, moment: Tensor) -> Tensor:
    """Of each row, relative, from float16 codebooks and scales and W = scale * sum of entries, in float64."""
    books, scales = matrix.codebooks.half().double(), matrix.scales.half().double()
    sums = sum(books[m][matrix.codes[..., m].long()] for m in range(len(books))).flatten(1)  # type: ignore[union-attr]
    difference, weight, moment = scales[:, None] * sums - weight.double(), weight.double(), moment.double()
    return (difference @ moment * difference).sum(1) / (weight @ moment * weight).sum(1)


@pytest.mark.parametrize("algorithm", ["ldlq", "reference"])
@pytest.mark.parametrize("size", [1e-10, 1e-7, 1e4, 6e4, 1e7])
def test_small_and_large_weights_are_stored_as_ordinary_ones_are(size: float, algorithm: str) -> None:
    weight, statistics = layer()
    settings = QUICK.model_copy(update={"algorithm": algorithm, "adam_steps": 20})
    ordinary, other = (quantize(one, statistics, settings=settings) for one in (weight, size * weight))
    expected = stored_row_errors(ordinary, weight, statistics.second_moment)
    found = stored_row_errors(other, size * weight, statistics.second_moment)
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.15)
    assert found.max() < 2 * expected.max()


@pytest.mark.parametrize("least", [1e-7, 1e-9])
def test_rows_of_very_different_sizes_are_all_stored(least: float) -> None:
    weight, statistics = layer()
    sizes = torch.logspace(math.log10(least), 0, ROWS)[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]
    other = sizes[:, None] * weight
    found = stored_row_errors(quantize(other, statistics, "2x6g4"), other, statistics.second_moment)
    # The codebooks are made for the large rows, which is where errors cost.
    assert (
        found.max()
        < 20 * stored_row_errors(quantize(weight, statistics, "2x6g4"), weight, statistics.second_moment).max()
    )


def test_rows_of_zeros_among_small_ones_are_stored_as_zeros() -> None:
    weight, statistics = layer()
    weight *= 1e-7
    weight[3] = weight[40] = 0
    weight[7], weight[7, 9] = torch.zeros(FEATURES), 1e-7  # a row with a single number
    found = quantize(weight, statistics).stored().dequantize()
    assert (found[[3, 40]] == 0).all()
    assert float((found[7, 9] - weight[7, 9]).abs()) < 1e-7 and found[7].isfinite().all()


def test_an_ordinary_matrix_is_searched_and_stored_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = layer()
    weight[5] = 0
    found = quantize(0.02 * weight, statistics, settings=QUICK).stored()
    monkeypatch.setattr(aqlm, "balanced", lambda matrix: matrix)
    monkeypatch.setattr(aqlm, "ordinary_unit", lambda weight: 1.0)
    expected = quantize(0.02 * weight, statistics, settings=QUICK).stored()
    assert all(torch.equal(tensor, expected.tensors()[name]) for name, tensor in found.tensors().items())


# ---------------------------------------------------------------------------------------------------------- its parts


def test_kmeans_counts_every_input_at_the_price_that_error_feedback_puts_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group that price is its Schur complement, with all less active groups still free."""
    given: list[Tensor] = []

    def noting(weights: Tensor, row_weights: Tensor, importance: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        given.extend([row_weights, importance])
        return residual_kmeans(weights, row_weights, importance, *rest)

    monkeypatch.setattr(aqlm, "residual_kmeans", noting)
    weight, statistics = layer()
    quantize(weight, statistics, settings=QUICK)
    row_weights, importance = given
    torch.testing.assert_close(row_weights, weight.square().sum(1))
    moment = damped(damped(statistics.second_moment, QUICK.damping), QUICK.factor_damping).double()
    energies = moment.diagonal().view(-1, 4).sum(1)
    for j in range(FEATURES // 4):
        own = torch.arange(FEATURES) // 4 == j
        free = (energies < energies[j]).repeat_interleave(4)
        bound = moment[own][:, free] @ torch.linalg.solve(moment[free][:, free], moment[free][:, own])
        price = (moment[own][:, own] - bound).diagonal()
        torch.testing.assert_close(importance[j].double(), price, rtol=1e-3, atol=0)


def test_the_scales_returned_are_the_best_for_the_codes_and_codebooks_returned() -> None:
    weight, statistics = layer()
    matrix = quantize(weight, statistics, settings=QUICK)
    moment = damped(statistics.second_moment, QUICK.damping).double()
    unscaled = matrix.dequantize(torch.float64) / matrix.scales[:, None]
    pulled = unscaled @ moment
    torch.testing.assert_close(
        matrix.scales.double(), (pulled * weight).sum(1) / (pulled * unscaled).sum(1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("beam", [2, 16])
def test_a_sweep_around_never_raises_the_damped_objective(beam: int) -> None:
    weight, statistics = layer()
    moment = statistics.second_moment
    around = Feedback(diagonal_blocks(moment, 4), moment, forward=False)
    search = code_search(weight.device)
    present = aqlm._start(
        weight, torch.ones(FEATURES // 4, 4), AdditiveScheme(2, 4, 4), torch.Generator(), QUICK, search
    )
    losses = []
    for _ in range(4):
        difference = (weight - present.scales[:, None] * search.expand(present.codebooks, present.codes)).double()
        losses.append((difference @ moment.double() * difference).sum(1))  # [out]
        present = aqlm._search_around(weight, present, around, beam, search)
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-4)).all()
    assert losses[1].sum() < 0.5 * losses[0].sum()


@settings(max_examples=60)  # one takes a tenth of a second
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 40),
    scheme=st.builds(AdditiveScheme, st.integers(1, 4), st.integers(1, 6), st.integers(1, 16)),
    tokens=st.integers(0, 200),
    beam=st.sampled_from([2, 8, 64]),
    seed=st.integers(0, 2**32),
)
def test_from_any_codes_a_sweep_around_lowers_the_objective_of_every_row_or_keeps_it(
    rows: int, groups: int, scheme: AdditiveScheme, tokens: int, beam: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, groups * scheme.group_size, generator=draw)
    moment = damped(x.T @ x / max(1, tokens), DEFAULTS.damping)
    codes = torch.randint(0, scheme.codebook_size, (rows, groups, scheme.num_codebooks), generator=draw)
    codebooks = torch.randn(scheme.num_codebooks, scheme.codebook_size, scheme.group_size, generator=draw)
    present = Approximation(codes, codebooks, torch.randn(rows, generator=draw).exp())
    weight = torch.randn(rows, groups * scheme.group_size, generator=draw)
    around = Feedback(diagonal_blocks(moment, scheme.group_size), moment, forward=False)

    def objective(found: Approximation) -> Tensor:  # [rows]
        difference = (weight - found.scales[:, None] * search.expand(found.codebooks, found.codes)).double()
        return (difference @ moment.double() * difference).sum(1)

    search = code_search(weight.device)
    found = aqlm._search_around(weight, present, around, beam, search)
    assert (objective(found) <= objective(present) * (1 + 1e-5)).all()


def test_the_rounder_returns_what_its_codes_stand_for() -> None:
    codes, codebooks = torch.zeros(5, 3, 2, dtype=torch.int64), torch.randn(2, 4, 4)
    search = code_search(torch.device("cpu"))
    base = torch.randn(5, 12)
    moment = torch.eye(12)
    around = Feedback(diagonal_blocks(moment, 4), moment, forward=False)
    rounded, _ = sweep(torch.zeros(5, 12), base, around, aqlm._rounder(codes, codebooks, 4, search))
    assert (codes != 0).any()
    assert torch.equal(rounded, search.expand(codebooks, codes))

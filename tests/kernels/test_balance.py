"""A power of two between codebooks and scales: it changes no weight, and float16 keeps what it is given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqlm_kernels import AdditiveLinear, AdditiveMatrix, balanced, balancing_shift


def matrix(exponents, entry_exponent=-3, seed=0):
    """A row for each exponent: its scale is of about that power of two, entries are of about 2^entry_exponent."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (len(exponents), 32, 2), generator=draw)
    sizes = torch.ldexp(1 + torch.rand(len(exponents), generator=draw), torch.tensor(exponents))
    codebooks = 2.0**entry_exponent * torch.randn(2, 16, 8, generator=draw)
    return AdditiveMatrix(codes, codebooks, sizes)


def row_errors(found, wanted):
    """The squared error of each row of what is stored, relative to the row, in float64."""
    difference = found.stored().dequantize(torch.float64) - wanted.dequantize(torch.float64)
    return (difference.norm(dim=1) / wanted.dequantize(torch.float64).norm(dim=1)).square()


@pytest.mark.parametrize("exponents", [[0, 1], [-13, 14], [-5] * 3])
@pytest.mark.parametrize("entry_exponent", [-8, 0, 12])
def test_values_that_float16_holds_exactly_do_not_change(exponents, entry_exponent):
    ordinary = matrix(exponents, entry_exponent)
    assert balanced(ordinary) is ordinary


@given(
    st.lists(st.integers(-30, 25), min_size=1, max_size=4),
    st.integers(-12, 20),
)
def test_no_weight_changes(exponents, entry_exponent):
    given_matrix = matrix(exponents, entry_exponent)
    found = balanced(given_matrix)
    assert torch.equal(found.dequantize(torch.float64), given_matrix.dequantize(torch.float64))


@given(st.integers(-22, 24), st.integers(-12, 14))
def test_rows_of_any_one_size_keep_the_precision_of_float16(size, entry_exponent):
    """Of weights from 2^-25 on, which is 3e-8."""
    given_matrix = matrix([size - entry_exponent - 3] * 3, entry_exponent)
    assert row_errors(balanced(given_matrix), given_matrix).max() < 2e-7


def test_small_rows_beside_large_ones_keep_their_precision_where_one_power_serves_both():
    given_matrix = matrix([-20, -10, 3])
    assert row_errors(given_matrix, given_matrix)[0] > 1e-4
    assert row_errors(balanced(given_matrix), given_matrix).max() < 2e-7


def test_if_no_power_fits_all_rows_the_largest_are_exact_and_the_smallest_lose_least():
    given_matrix = matrix([-18, -10, 17])  # 2^35 between them, and float16 has all its bits over 2^29
    errors = row_errors(balanced(given_matrix), given_matrix)
    assert errors[1:].max() < 2e-7 and 2e-7 < errors[0] < 1e-2


@pytest.mark.parametrize(("size", "bound"), [(-33, 2e-5), (-40, 5e-3)])  # weights of 1e-10 and of 1e-12
def test_values_too_small_for_both_lose_equally_in_each(size, bound):
    given_matrix = matrix([size + 3] * 3)
    found = balanced(given_matrix)
    assert row_errors(found, given_matrix).max() < bound
    largest = found.scales.max(), found.codebooks.abs().max()
    assert all(2.0 ** (size / 2 - 4) < float(one) < 2.0 ** (size / 2 + 4) for one in largest)


def test_rows_of_zeros_and_rows_out_of_range_change_nothing():
    ordinary = matrix([0, 1, 2])
    scales = torch.stack([ordinary.scales[0], torch.tensor(0.0), torch.tensor(1e-30)])
    assert balancing_shift(ordinary.codebooks, scales) == 0
    assert balancing_shift(ordinary.codebooks, torch.zeros(3)) == 0
    assert balancing_shift(torch.zeros(2, 16, 8), ordinary.scales) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_balanced(bad):
    assert balancing_shift(torch.full((1, 2, 8), bad), torch.tensor([1e-7])) == 0
    assert balancing_shift(torch.ones(1, 2, 8), torch.tensor([1e-7, bad])) == 0


def test_a_layer_is_balanced_in_place_and_computes_the_same():
    given_matrix = matrix([-20] * 64)
    layer, x = AdditiveLinear(given_matrix), torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    before, parameters = layer(x), (layer.codebooks, layer.scales)
    layer.balance()
    assert layer.codebooks is parameters[0] and layer.scales is parameters[1]
    assert layer.scales.abs().min() >= 2.0**-14
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=0)

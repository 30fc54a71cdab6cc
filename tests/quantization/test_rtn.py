from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.methods.rtn import quantize
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.schemes import UniformScheme
from aqlm_kernels import UniformMatrix

STATISTICS = LayerStatistics(torch.full((64, 64), torch.nan), 1)  # not to be looked at


def rounded(weight: Tensor, bits: int = 2, group: int = 16) -> UniformMatrix:
    return quantize(weight, STATISTICS, UniformScheme(bits, group), torch.Generator(), None)


def random(rows: int = 20) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))


def groups_of(tensor: Tensor, group: int = 16) -> Tensor:
    return tensor.view(len(tensor), -1, group)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 64])
def test_every_weight_is_at_the_nearest_point_of_its_groups_grid(bits: int, group: int) -> None:
    weight = random()
    matrix = rounded(weight, bits, group)
    levels = torch.arange(2**bits)
    grids = (levels - matrix.zeros[..., None].float()) * matrix.scales[..., None].float()  # [out, n, 2^bits]
    distances = (groups_of(weight, group)[..., None] - grids[:, :, None]).abs()  # [out, n, g, 2^bits]
    left = (groups_of(matrix.dequantize() - weight, group)).abs()
    torch.testing.assert_close(left, distances.min(3).values, rtol=0, atol=1e-5)
    assert int(matrix.levels.max()) < 2**bits and int(matrix.zeros.max()) < 2**bits


def test_a_grid_reaches_from_the_least_to_the_largest_weight() -> None:
    weight = random()
    matrix = rounded(weight, bits=4)
    reach = groups_of(weight).amax(2) - groups_of(weight).amin(2)
    torch.testing.assert_close(matrix.scales.float() * 15, reach, rtol=1e-3, atol=0)
    worst = groups_of(matrix.dequantize() - weight).abs().amax(2)
    assert (worst <= matrix.scales.float() * 1.01).all()  # half a step for the level, half for the zero point


def test_zero_stays_zero() -> None:
    weight = random()
    weight[:, ::3] = 0
    weight[4] = 0
    restored = rounded(weight).dequantize()
    assert (restored[:, ::3] == 0).all() and (restored[4] == 0).all()


@pytest.mark.parametrize("value", [1.0, -0.25, 1e-3])
def test_a_group_of_one_value_is_met_to_the_precision_of_its_scale(value: float) -> None:
    weight = torch.full((2, 64), value)
    torch.testing.assert_close(rounded(weight).dequantize(), weight, rtol=1e-3, atol=0)


def test_weights_too_small_for_a_float16_scale_become_finite_and_small() -> None:
    restored = rounded(1e-9 * random()).dequantize()
    assert restored.isfinite().all() and restored.abs().max() < 1e-6


def test_each_bit_more_divides_the_error_by_about_four() -> None:
    weight = random(rows=200)
    errors = [float((rounded(weight, bits).dequantize() - weight).square().mean()) for bits in (2, 3, 4, 5)]
    for coarse, fine in pairwise(errors):
        assert 3.5 < coarse / fine < 6


def test_bits_are_those_of_the_scheme_and_tensors_restore_the_matrix() -> None:
    matrix = rounded(random(), 3, 32)
    assert matrix.bits() == UniformScheme(3, 32).stored_bits(20, 64)
    again = UniformMatrix.from_tensors(matrix.tensors())
    assert torch.equal(again.dequantize(), matrix.dequantize()) and again.bits() == matrix.bits()
    assert again.group_size == 32
    assert matrix.dequantize(torch.float16).dtype == torch.float16


def test_a_weight_that_is_no_number_is_refused() -> None:
    for bad in torch.nan, torch.inf:
        weight = random()
        weight[3, 7] = bad
        with pytest.raises(QuantizationError, match="the weight holds NaN or infinite values"):
            rounded(weight)


def test_small_weights_are_rounded_on_the_grid_that_is_stored() -> None:
    weight = 2e-5 * random()
    ordinary, small = rounded(random()).dequantize() - random(), rounded(weight).dequantize() - weight
    assert small.norm() / weight.norm() < 1.1 * ordinary.norm() / random().norm()


def row_errors(matrix: UniformMatrix, weight: Tensor) -> Tensor:
    """Squared and relative, from what is stored, by the definition."""
    steps = matrix.levels.double() - matrix.zeros.double().repeat_interleave(16, 1)
    found = 2.0 ** int(matrix.exponent) * matrix.scales.double().repeat_interleave(16, 1) * steps
    return ((found - weight.double()).norm(dim=1) / weight.double().norm(dim=1)).square()


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e-7, 1e-4, 1e4, 1e6, 1e30])
def test_small_and_large_weights_are_met_as_ordinary_ones_are(size: float) -> None:
    weight = random()
    ordinary, other = rounded(weight, bits=4), rounded(size * weight, bits=4)
    assert int(ordinary.exponent) == 0
    torch.testing.assert_close(row_errors(other, size * weight), row_errors(ordinary, weight), rtol=0.05, atol=0)


def test_small_rows_beside_large_ones_are_met_where_one_exponent_serves_both() -> None:
    sizes = torch.tensor([1e-7, 1.0]).repeat(10)[:, None]
    expected = row_errors(rounded(random(), bits=4), random())
    found = row_errors(rounded(sizes * random(), bits=4), sizes * random())
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_a_matrix_stored_without_an_exponent_has_none() -> None:
    matrix = rounded(random())
    tensors = {name: tensor for name, tensor in matrix.tensors().items() if name != "exponent"}
    assert torch.equal(UniformMatrix.from_tensors(tensors).dequantize(), matrix.dequantize())

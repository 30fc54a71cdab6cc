"""GPTQ beside the loop of its paper in float64, and beside round to nearest where the two must agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.methods import gptq, rtn
from aqlm_cli.quantization.solvers import ldlq
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.methods.gptq import GptqSettings
from aqlm_cli.spec.schemes import UniformScheme
from aqlm_kernels import UniformMatrix

DEFAULTS, AS_THEY_LIE = GptqSettings(), GptqSettings(order="none")
DAMPING = 0.01

TEXTBOOK_SHAPES = [(48, 16), (48, 48), (192, 32), (192, 48), (192, 192), (576, 64)]
"""Inputs and group size: groups within a lazy block of 128, in several of them, of several of them, and one alone."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(features: int, seed: int = 0) -> Tensor:
    """H of inputs that go together, some ten times larger than others."""
    sizes = torch.logspace(-0.5, 0.5, features)[torch.randperm(features, generator=torch.Generator().manual_seed(seed))]
    x = random(4 * features, features, seed=seed) @ (
        torch.eye(features) + random(features, features, seed=seed + 1) / 8
    )
    x = x * sizes
    return x.T @ x / len(x)


def quantized(
    weight: Tensor, hessian: Tensor, bits: int = 3, group: int = 16, settings: GptqSettings = DEFAULTS
) -> UniformMatrix:
    return gptq.quantize(weight, LayerStatistics(hessian, 1), UniformScheme(bits, group), torch.Generator(), settings)


def rounded(weight: Tensor, bits: int = 3, group: int = 16) -> UniformMatrix:
    return rtn.quantize(weight, LayerStatistics(torch.eye(1), 1), UniformScheme(bits, group), torch.Generator(), None)


def assert_same_bits(found: UniformMatrix, expected: UniformMatrix) -> None:
    for name, tensor in expected.tensors().items():
        assert found.tensors()[name].dtype == tensor.dtype
        assert torch.equal(found.tensors()[name], tensor), name


def textbook(weight: Tensor, hessian: Tensor, bits: int, group: int) -> Tensor:
    """The loop of the paper in float64: one column after the other, by the upper Cholesky factor of H^-1."""
    w, h, top, result = weight.double(), hessian.double(), 2**bits - 1, torch.empty_like(weight, dtype=torch.float64)
    h = h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for i in range(len(h)):
        if i % group == 0:  # min-max, with zero on the grid
            low, high = w[:, i : i + group].amin(1).clamp(max=0), w[:, i : i + group].amax(1).clamp(min=0)
            scale = ((high - low) / top).half().double()
            zero = (-low / scale).round().clamp(0, top)
        result[:, i] = scale * ((w[:, i] / scale + zero).round().clamp(0, top) - zero)
        w[:, i:] = w[:, i:] - torch.outer((w[:, i] - result[:, i]) / u[i, i], u[i, i:])
    return result


def active_columns(hessian: Tensor, group: int) -> list[int]:
    """Groups by falling sums of the diagonal of H, and in each the columns by its falling entries."""
    energy = hessian.diagonal().double().tolist()
    groups = [range(first, first + group) for first in range(0, len(energy), group)]
    groups.sort(key=lambda columns: -sum(energy[i] for i in columns))
    return [i for columns in groups for i in sorted(columns, key=lambda i: -energy[i])]


@pytest.fixture(params=[1, 24, 128])
def lazy_columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldlq, "LAZY_COLUMNS", request.param)


# ------------------------------------------------------------------------------------------------- beside the textbook


@pytest.mark.usefixtures("lazy_columns")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("features", "group"), TEXTBOOK_SHAPES)
def test_it_is_the_loop_over_the_factor_of_the_inverse_of_h(bits: int, features: int, group: int) -> None:
    weight, hessian = random(6, features), correlated(features)
    found = quantized(weight, hessian, bits, group, AS_THEY_LIE)
    expected = textbook(weight, hessian, bits, group)
    torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=0, atol=1e-5)
    assert not torch.equal(found.levels, rounded(weight, bits, group).levels), "the errors are made up for"


@pytest.mark.parametrize(("features", "group"), TEXTBOOK_SHAPES)
def test_the_most_active_groups_come_first_and_in_them_the_most_active_inputs(features: int, group: int) -> None:
    weight, hessian = random(6, features), correlated(features)
    columns = torch.tensor(active_columns(hessian, group))
    expected = torch.empty(weight.shape, dtype=torch.float64)
    expected[:, columns] = textbook(weight[:, columns], hessian[columns][:, columns], 3, group)
    found = quantized(weight, hessian, 3, group)
    torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=0, atol=1e-5)
    assert not torch.equal(found.levels, quantized(weight, hessian, 3, group, AS_THEY_LIE).levels)


def test_damping_is_a_share_of_the_mean_of_the_diagonal_of_h() -> None:
    weight, hessian = random(6, 48), correlated(48)
    damped = hessian + 0.3 * hessian.diagonal().mean() * torch.eye(48)
    assert not torch.equal(quantized(weight, hessian).levels, quantized(weight, damped).levels)
    almost_none = GptqSettings(damping=1e-9)
    as_given = quantized(weight, hessian, settings=GptqSettings(damping=0.3))
    torch.testing.assert_close(
        as_given.dequantize(), quantized(weight, damped, settings=almost_none).dequantize(), rtol=0, atol=1e-5
    )


# -------------------------------------------------------------------------------------------- beside round to nearest


@pytest.mark.parametrize("order", ["active", "none"])
@pytest.mark.parametrize("diagonal", ["identity", "any", "zero"])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (4, 64), (8, 192), (3, 1)])
def test_without_correlations_it_is_round_to_nearest(order: str, diagonal: str, bits: int, group: int) -> None:
    energies = {"identity": torch.ones(192), "any": 10 ** (3 * random(192, seed=1)), "zero": torch.zeros(192)}[diagonal]
    energies[5:9] = energies[5:9] if diagonal == "identity" else 0  # inputs that are never active
    weight = random(20, 192)
    weight[2], weight[3, :64], weight[4] = 0, 0, 1e-6 * weight[4]
    settings = GptqSettings.model_validate({"order": order})
    assert_same_bits(quantized(weight, energies.diag(), bits, group, settings), rounded(weight, bits, group))


@pytest.mark.parametrize("order", ["active", "none"])
def test_a_group_of_all_inputs_has_its_grid_fitted_to_the_weight_itself(order: str) -> None:
    weight, hessian = random(20, 192), correlated(192)
    found = quantized(weight, hessian, 3, 192, GptqSettings.model_validate({"order": order}))
    expected = rounded(weight, 3, 192)
    assert torch.equal(found.scales, expected.scales) and torch.equal(found.zeros, expected.zeros)
    assert not torch.equal(found.levels, expected.levels)


def test_grids_behind_the_first_group_are_fitted_to_what_the_errors_leave() -> None:
    weight, hessian = random(20, 48), correlated(48)
    found, expected = quantized(weight, hessian, settings=AS_THEY_LIE), rounded(weight)
    assert torch.equal(found.scales[:, 0], expected.scales[:, 0])
    assert not (found.scales[:, 1:] == expected.scales[:, 1:]).any(0).all()


@pytest.mark.parametrize("settings", [DEFAULTS, AS_THEY_LIE, GptqSettings(grid="norm2.4")], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [16, 64])
def test_its_error_is_never_above_that_of_round_to_nearest(settings: GptqSettings, bits: int, group: int) -> None:
    for seed in range(8):
        weight, statistics = random(24, 64, seed=seed + 50), LayerStatistics(correlated(64, seed), 1)
        found = quantized(weight, statistics.second_moment, bits, group, settings)
        ours, theirs = (
            statistics.relative_error(weight, matrix.dequantize()) for matrix in (found, rounded(weight, bits, group))
        )
        assert ours < theirs, seed


# --------------------------------------------------------------------------------------------------------- other grids


def test_norm_is_the_best_of_the_sizes_by_its_own_measure() -> None:
    """Without correlations, where every grid is fitted to the weight itself; by the definition, in float64."""
    weight = random(30, 64) ** 3  # a few weights are far from all others, so that a whole range does not pay
    found = quantized(weight, torch.eye(64), 3, 64, GptqSettings(grid="norm2.4"))
    low, high = weight.double().amin(1), weight.double().amax(1)
    errors = []
    for size in range(100, 20, -1):
        scale = (size / 100 * (high - low) / 7).half().double()
        zero = (-size / 100 * low / scale).round().clamp(0, 7)
        points = scale[:, None] * ((weight / scale[:, None] + zero[:, None]).round().clamp(0, 7) - zero[:, None])
        errors.append((weight - points).abs().pow(2.4).sum(1))
    best = torch.stack(errors).min(0)
    left = (weight - found.dequantize(torch.float64)).abs().pow(2.4).sum(1)
    torch.testing.assert_close(left, best.values, rtol=1e-4, atol=0)
    assert len(best.indices.unique()) > 5, "the best sizes differ"


def test_the_size_of_the_weights_does_not_change_their_levels() -> None:
    weight, hessian = random(20, 64), correlated(64)
    for grid in "minmax", "norm2.4":
        settings = GptqSettings.model_validate({"grid": grid})
        expected = quantized(weight, hessian, settings=settings)
        for exponent in -60, -20, 20, 60:
            found = quantized(2.0**exponent * weight, hessian, settings=settings)
            assert torch.equal(found.levels, expected.levels) and torch.equal(found.zeros, expected.zeros)
            assert torch.equal(found.dequantize(), 2.0**exponent * expected.dequantize())


# ----------------------------------------------------------------------------------------------------------- the rest


def test_bits_are_those_of_the_scheme_and_what_it_is_given_stays() -> None:
    weight, hessian = random(20, 192), correlated(192)
    before = weight.clone(), hessian.clone()
    matrix = quantized(weight, hessian, 4, 64)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert matrix.bits() == UniformScheme(4, 64).stored_bits(20, 192) and matrix.scheme == "int4g64"
    assert_same_bits(matrix.nearest(matrix.dequantize()), matrix)


def test_a_group_that_does_not_divide_the_inputs_is_no_scheme_for_them() -> None:
    assert UniformScheme(4, 64).refuses(8, 576) is None
    assert UniformScheme(4, 128).refuses(8, 576) == "576 input features are not a multiple of the group size 128"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    weight, hessian = random(6, 48), correlated(48)
    broken = weight.clone()
    broken[3, 7] = bad
    with pytest.raises(QuantizationError, match=r"^the weight holds NaN or infinite values; the model is damaged$"):
        quantized(broken, hessian)
    hessian[5, 5] = bad
    with pytest.raises(QuantizationError, match=r"^its inputs hold NaN or infinite values; the model is damaged"):
        quantized(weight, hessian)


def test_a_hessian_of_fewer_inputs_than_features_serves() -> None:
    x = random(5, 64)
    weight, statistics = random(24, 64, seed=1), LayerStatistics(x.T @ x / 5, 5)
    found = quantized(weight, statistics.second_moment).dequantize()
    ours, theirs = (statistics.relative_error(weight, one) for one in (found, rounded(weight).dequantize()))
    assert ours < 0.5 * theirs

"""Products of a few rows with a matrix on uniform grids: exact on integers, near float64, and current after changes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.largest import largest_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aqlm_kernels import CompressedLinear, KernelError, UniformMatrix, ops
from aqlm_kernels.cpu.uniform import LANES, ROWS, PackedUniform

pytestmark = pytest.mark.usefixtures("nan_filled_outputs")

SHAPES = [  # rows, out, groups, inputs of each
    (1, 1, 1, 1),
    (1, LANES + 1, 3, 32),
    (2, 3 * LANES, 2, 64),
    (ROWS + 1, LANES - 1, 5, 7),
    (8, 70, 9, 64),
    (0, 16, 2, 16),
]


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def matrix(outputs: int, groups: int, group_size: int, bits: int, exact: bool) -> UniformMatrix:
    """Scales that are powers of two where sums shall be exact; the last row is zero if there are others."""
    levels = torch.randint(1 << bits, (outputs, groups * group_size), generator=draw(), dtype=torch.uint8)
    zeros = torch.randint(1 << bits, (outputs, groups), generator=draw(), dtype=torch.uint8)
    powers = 2.0 ** torch.randint(-2, 3, (outputs, groups), generator=draw())
    scales = (powers if exact else torch.rand(outputs, groups, generator=draw()) + 0.5).half()
    if outputs > 1:
        scales[-1] = 0
    return UniformMatrix(levels, zeros, scales, torch.tensor(bits).to(torch.uint8), torch.tensor(0).to(torch.int16))


def product(x: Tensor, weight: UniformMatrix) -> Tensor:
    return PackedUniform.of(*weight.tensors().values()).matmul(x)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_integers_are_exact(shape: tuple[int, int, int, int], bits: int) -> None:
    rows, outputs, groups, group_size = shape
    weight = matrix(outputs, groups, group_size, bits, exact=True)
    x = torch.randint(-3, 4, (rows, weight.in_features), generator=draw()).float()
    assert torch.equal(product(x, weight), x @ weight.dequantize().T)


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([3, 4]),
    rows=st.integers(0, 5),
    outputs=st.integers(1, 200),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 70),
)
def test_products_of_any_shape_are_exact(bits: int, rows: int, outputs: int, groups: int, group_size: int) -> None:
    weight = matrix(outputs, groups, group_size, bits, exact=True)
    x = torch.randint(-3, 4, (rows, weight.in_features), generator=draw()).float()
    assert torch.equal(product(x, weight), x @ weight.dequantize().T)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_of_reals_are_near_float64_and_one_wrong_level_is_not(bits: int, rows: int) -> None:
    weight = matrix(130, 9, 64, bits, exact=False)
    x = torch.randn(rows, weight.in_features, generator=draw())
    exact = x.double() @ weight.dequantize(torch.float64).T
    assert (product(x, weight) - exact).norm() < 1e-6 * exact.norm()
    levels = weight.levels.clone()
    levels[-2, -1] ^= 1
    assert (product(x, replace(weight, levels=levels)) - exact).norm() > 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    weight = matrix(70, 3, 16, 4, exact=True)
    x = torch.randint(-3, 4, (2, weight.in_features), generator=draw()).to(dtype)
    assert torch.equal(product(x, weight), (x.float() @ weight.dequantize().T).to(dtype))


def test_the_exponent_and_scales_beyond_float16_count() -> None:
    weight, x = matrix(70, 3, 16, 4, exact=True), torch.ones(1, 48)
    wanted = x @ weight.dequantize().T
    moved = replace(weight, exponent=torch.tensor(-30).to(torch.int16))
    assert torch.equal(product(x, moved), wanted * 2.0**-30)
    large = replace(weight, scales=weight.scales.float() * 2.0**20)
    assert torch.equal(product(x, large), wanted * 2.0**20)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_packed_matrix_has_the_bytes_of_its_levels_and_is_made_without_more(bits: int) -> None:
    weight = matrix(40 * LANES, 2, 64, bits, exact=True)
    packed = PackedUniform.of(*weight.tensors().values())
    assert 8 * packed.words.nbytes == bits * weight.levels.numel()
    assert largest_tensor(lambda: PackedUniform.of(*weight.tensors().values())) == packed.words.nbytes


def test_other_inputs_are_refused() -> None:
    weight = matrix(70, 3, 16, 4, exact=True)
    with pytest.raises(KernelError, match=r"x is \[1, 40\], the matrix has 48 inputs"):
        product(torch.ones(1, 40), weight)
    with pytest.raises(KernelError, match=r"x is \[1, 40\]; its last axis must be the layer's 48 inputs"):
        weight.module()(torch.ones(1, 40))


# ----------------------------------------------------------------------------------------------------------- the layer


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that a matrix is packed."""
    made: list[None] = []

    def packed(*tensors: Tensor) -> PackedUniform:
        made.append(None)
        return PackedUniform.of(*tensors)

    monkeypatch.setattr(ops, "PACKED", {"uniform": packed})
    return made


def test_a_few_rows_without_gradients_are_multiplied_from_the_levels(packings: list[None]) -> None:
    weight = matrix(70, 3, 16, 4, exact=True)
    layer = CompressedLinear(weight, torch.arange(70.0))
    x = torch.randint(-3, 4, (2, 4, 48), generator=draw()).float()
    wanted = x @ weight.dequantize().T + torch.arange(70.0)
    assert torch.equal(layer(x), wanted) and not packings, "with gradients"
    with torch.no_grad():
        assert torch.equal(layer(x), wanted) and len(packings) == 1
        assert torch.equal(layer(x), wanted) and len(packings) == 1, "kept"
        assert torch.equal(layer(x.repeat(2, 1, 1)), wanted.repeat(2, 1, 1)) and len(packings) == 1
        assert torch.equal(layer(x.double()), wanted.double()) and len(packings) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_a_change_of_the_scales_and_a_copy_are_packed_again(packings: list[None]) -> None:
    weight, x = matrix(70, 3, 16, 4, exact=True), torch.ones(1, 48)
    layer = CompressedLinear(weight).requires_grad_(False)
    before = layer(x)
    layer.scales.mul_(2)
    assert torch.equal(layer(x), 2 * before) and len(packings) == 2
    assert torch.equal(copy.deepcopy(layer)(x), 2 * before) and len(packings) == 3


def test_the_operator_has_a_shape_for_the_compiler() -> None:
    weight, x = matrix(70, 3, 16, 4, exact=True), torch.ones(1, 48)
    tensors = list(weight.tensors().values())
    torch.library.opcheck(ops.packed_product, (x, "uniform", tensors, 70, ops.new_key(weight)))

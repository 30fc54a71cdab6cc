"""Each kind of matrix as a layer: the product by its definition, gradients of what is continuous, and nothing lost."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aqlm_kernels import (
    MATRIX_KINDS,
    AdditiveLinear,
    AdditiveMatrix,
    BlockFloatMatrix,
    CompressedLinear,
    KernelError,
    LevelMatrix,
    Matrix,
    QuantizedLayer,
    RefinedMatrix,
    UniformMatrix,
    coded_layers,
    quantized_layers,
)
from aqlm_kernels.matrices import blockfloat, level

OUT, IN = 12, 32


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def additive(num_codebooks: int = 2) -> AdditiveMatrix:
    rng = draw()
    codes = torch.randint(16, (OUT, IN // 8, num_codebooks), generator=rng)
    return AdditiveMatrix(codes, torch.randn(num_codebooks, 16, 8, generator=rng), torch.rand(OUT, generator=rng) + 0.5)


def uniform(exponent: int = 0) -> UniformMatrix:
    rng = draw()
    levels = torch.randint(8, (OUT, IN), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(8, (OUT, IN // 16), generator=rng, dtype=torch.uint8)
    scales = (torch.rand(OUT, IN // 16, generator=rng) + 0.5).half()
    bits, power = torch.tensor(3, dtype=torch.uint8), torch.tensor(exponent, dtype=torch.int16)
    return UniformMatrix(levels, zeros, scales, bits, power)


def of_levels(word: str) -> LevelMatrix:
    """Codes and scales in the types and shapes that the scheme says."""
    name, bits, shift, group = re.fullmatch(r"([a-z]+?)(\d)(t?)g(\d+)", word).groups()  # type: ignore[union-attr]
    rng, groups = draw(), IN // int(group)
    scales, shifts = ((torch.rand(OUT, groups, generator=rng) + 0.5).half() for _ in range(2))
    power = torch.tensor(0, dtype=torch.int16)
    empty = level.of_levels(name, int(bits), scales, shifts if shift else None, power, IN)
    return empty.nearest(torch.randn(OUT, IN, generator=rng))


def of_blocks(form: str, width: int, own: int = 0) -> BlockFloatMatrix:
    rng = draw()
    codes = torch.randint(2**width, (OUT, IN), generator=rng)
    exponents = torch.randint(-2, 2, (OUT, IN // 16), generator=rng)
    return blockfloat.of_blocks(form, width, own, codes, exponents)


def refined() -> RefinedMatrix:
    return RefinedMatrix(additive(), torch.tensor([2, 5, 11], dtype=torch.int32), uniform().rows(torch.arange(3)))


def in_8_bits() -> AdditiveMatrix:
    """With codebooks that are stored in 8 bits, rounded to them."""
    return replace(additive(), entry_bits=8).stored()


MATRICES: dict[str, Matrix] = {
    "additive": additive(),
    "additive, 8 bits": in_8_bits(),
    "uniform": uniform(),
    "levels": of_levels("nf3g16"),
    "shifted levels": of_levels("nf4tg8"),
    "levels of a row": of_levels("cube5g32"),
    "block floating point": of_blocks("bfp", 5),
    "block minifloats": of_blocks("bmf", 6, 2),
    "block logarithms": of_blocks("bl", 4),
    "refined": refined(),
    "refined, 8 bits": replace(refined(), base=in_8_bits()),
}
GENERAL = [name for name, matrix in MATRICES.items() if matrix.kind != "refined"]
"""The kinds that CompressedLinear serves; a sum has a layer of its own."""


def test_every_kind_is_tried_here() -> None:
    assert {matrix.kind for matrix in MATRICES.values()} == MATRIX_KINDS.keys()
    assert all(type(matrix) is MATRIX_KINDS[matrix.kind] for matrix in MATRICES.values())


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("general", [False, True])
def test_a_layer_is_the_product_with_its_matrix(kind: str, general: bool) -> None:
    matrix, x = MATRICES[kind], torch.randn(20, IN, generator=draw())
    bias = torch.randn(OUT, generator=draw())
    layer = CompressedLinear(matrix, bias) if general and kind in GENERAL else matrix.module(bias)
    wanted = x.double() @ matrix.dequantize(torch.float64).T + bias.double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).double(), wanted, rtol=0.05, atol=0.3)
    assert isinstance(layer, QuantizedLayer) and layer.matrix().bits() == matrix.bits()
    assert layer.trainable().keys() == {*matrix.learnable, "bias"}


@pytest.mark.parametrize("kind", [kind for kind, matrix in MATRICES.items() if matrix.learnable])
def test_a_general_layer_is_differentiable_in_all_that_is_continuous(kind: str) -> None:
    matrix = MATRICES[kind]
    layer: Any = CompressedLinear(matrix) if kind in GENERAL else matrix.module()
    x = torch.randn(20, IN, generator=draw())
    wanted = torch.randn(20, OUT, generator=draw())

    def loss() -> Tensor:
        return (layer(x) - wanted).square().mean()

    before = loss()
    before.backward()
    for name, parameter in layer.trainable().items():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
        step, gradient = 1e-3, parameter.grad / parameter.grad.norm()
        with torch.no_grad():
            parameter.add_(gradient, alpha=step)
            slope = (loss() - before) / step
            parameter.sub_(gradient, alpha=step)
        torch.testing.assert_close(slope, parameter.grad.norm(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("kind", MATRICES)
def test_a_layer_gives_its_matrix_back_to_the_bit(kind: str) -> None:
    matrix = MATRICES[kind]
    general = CompressedLinear(matrix) if kind in GENERAL else matrix.module()
    for layer in (matrix.module(), general, copy.deepcopy(general)):
        assert isinstance(layer, QuantizedLayer)
        layer.balance()
        again = layer.matrix().tensors()
        assert again.keys() == matrix.tensors().keys()
        for name, tensor in matrix.tensors().items():
            assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


@pytest.mark.parametrize("kind", MATRICES)
def test_rows_are_those_of_the_weight_in_any_order_and_number(kind: str) -> None:
    matrix, index = MATRICES[kind], torch.tensor([5, 0, 5, 11])
    rows = matrix.rows(index)
    assert (rows.out_features, rows.in_features) == (4, IN)
    assert torch.equal(rows.dequantize(), matrix.dequantize()[index])
    for name, tensor in rows.tensors().items():
        if name in matrix.learnable and kind in GENERAL:
            assert len(tensor) == 4 or tensor is matrix.tensors()[name]


WORDS = {
    "additive": "2x4g8",
    "additive, 8 bits": "2x4g8c8",
    "uniform": "int3g16",
    "levels": "nf3g16",
    "shifted levels": "nf4tg8",
    "levels of a row": "cube5",
    "block floating point": "bfp5g16",
    "block minifloats": "bmf6e2g16",
    "block logarithms": "bl4g16",
    "refined": "2x4g8+int3g16r3",
    "refined, 8 bits": "2x4g8c8+int3g16r3",
}


@pytest.mark.parametrize("kind", MATRICES)
def test_packed_tensors_have_the_bits_of_the_matrix_and_give_it_back(kind: str) -> None:
    matrix = MATRICES[kind]
    packed = matrix.packed_tensors()
    bits = 8 * sum(tensor.nbytes for tensor in packed.values())
    assert matrix.bits() <= bits < matrix.bits() + 8 * len(packed)
    again = type(matrix).from_packed(packed, WORDS[kind])
    assert matrix.scheme == again.scheme == WORDS[kind]
    assert torch.equal(again.dequantize(), matrix.stored().dequantize())
    stored = matrix.stored().tensors()
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
        assert name in matrix.learnable or tensor.dtype == stored[name].dtype, name


@given(rows=st.integers(1, 9), groups=st.integers(1, 5), bits=st.integers(1, 8), group_size=st.integers(1, 20))
def test_grids_of_any_shape_survive_packing(rows: int, groups: int, bits: int, group_size: int) -> None:
    rng, shape = draw(), (rows, groups)
    levels = torch.randint(1 << bits, (rows, groups * group_size), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(1 << bits, shape, generator=rng, dtype=torch.uint8)
    scales, exponent = torch.rand(shape, generator=rng).half(), torch.tensor(bits - 4, dtype=torch.int16)
    matrix = UniformMatrix(levels, zeros, scales, torch.tensor(bits, dtype=torch.uint8), exponent)
    packed = matrix.packed_tensors()
    counted = 8 * sum(tensor.nbytes for name, tensor in packed.items() if name != "exponent")
    assert matrix.bits() <= counted < matrix.bits() + 16
    again = UniformMatrix.from_packed(packed, f"int{bits}g{group_size}").tensors()
    assert all(
        torch.equal(tensor, again[name]) and tensor.dtype == again[name].dtype
        for name, tensor in matrix.tensors().items()
    )


@given(rows=st.integers(1, 9), groups=st.integers(1, 9), books=st.integers(1, 4), bits=st.integers(1, 10))
def test_codes_of_any_width_survive_packing(rows: int, groups: int, books: int, bits: int) -> None:
    rng = draw()
    codes = torch.randint(1 << bits, (rows, groups, books), generator=rng)
    matrix = AdditiveMatrix(codes, torch.randn(books, 1 << bits, 4, generator=rng), torch.rand(rows, generator=rng))
    if rows * books * bits < 8:
        with pytest.raises(KernelError, match="is too small for"):
            matrix.packed_tensors()
        return
    packed = matrix.packed_tensors()
    counted = 8 * sum(tensor.nbytes for tensor in packed.values())
    assert matrix.bits() <= counted < matrix.bits() + 8
    again = AdditiveMatrix.from_packed(packed, f"{books}x{bits}g4")
    assert torch.equal(again.codes, matrix.codes) and again.codes.dtype == matrix.codes.dtype
    assert torch.equal(again.dequantize(), matrix.stored().dequantize())


def test_packed_tensors_of_another_scheme_are_refused() -> None:
    with pytest.raises(KernelError, match=r"codebooks are \[2, 16, 8\], which are not those of the scheme 2x8g8"):
        AdditiveMatrix.from_packed(additive().packed_tensors(), "2x8g8")
    with pytest.raises(KernelError, match="192 values of 4 bits take 96 bytes, found 144"):
        UniformMatrix.from_packed(uniform().packed_tensors(), "int4g8")
    with pytest.raises(
        KernelError, match=r"scales \[12, 2\] of torch.float16 and scheme 2x8g8 are not those of a uniform matrix"
    ):
        UniformMatrix.from_packed(uniform().packed_tensors(), "2x8g8")
    cut = {**additive().packed_tensors(), "codes": torch.zeros(47, dtype=torch.uint8)}
    with pytest.raises(KernelError, match="72 values of 4 bits take 36 bytes, found 47"):
        AdditiveMatrix.from_packed(cut, "2x4g8")


def test_scales_that_float16_cannot_hold_are_refused_by_name() -> None:
    matrix = uniform()
    large = replace(matrix, scales=matrix.scales.float() * 2.0**20)
    with pytest.raises(KernelError, match="scales reach"):
        large.packed_tensors()
    assert int(large.balanced().packed_tensors()["exponent"]) > 0


@pytest.mark.parametrize("kind", MATRICES)
def test_a_weight_that_a_matrix_can_hold_is_its_own_nearest(kind: str) -> None:
    matrix = MATRICES[kind]
    torch.testing.assert_close(matrix.nearest(matrix.dequantize()).dequantize(), matrix.dequantize(), rtol=0, atol=1e-5)


def test_nearest_takes_the_nearest_entry_of_one_codebook() -> None:
    matrix, weight = additive(1), torch.randn(OUT, IN, generator=draw())
    found = matrix.nearest(weight)
    groups, scales = weight.view(OUT, -1, 1, 8), matrix.scales[:, None, None, None]
    errors = (groups - scales * matrix.codebooks[0]).square().sum(3)  # [out, n, K]
    assert torch.equal(found.codes[..., 0].long(), errors.argmin(2))


def test_nearest_never_raises_the_error_of_several_codebooks() -> None:
    matrix, weight = additive(3), torch.randn(OUT, IN, generator=draw())

    def errors(one: AdditiveMatrix) -> Tensor:
        return (one.dequantize() - weight).view(OUT, -1, 8).square().sum(2)

    found = matrix.nearest(weight)
    assert (errors(found) <= errors(matrix) + 1e-5).all()
    assert errors(found).sum() < 0.5 * errors(matrix).sum()


def test_nearest_takes_the_nearest_level_of_each_grid() -> None:
    matrix, weight = uniform(), 3 * torch.randn(OUT, IN, generator=draw())
    grid = torch.arange(8)[None, None] - matrix.zeros[..., None].float()  # [out, n, 8]
    points = (grid * matrix.scales.float()[..., None]).repeat_interleave(16, 1)  # [out, in, 8]
    nearest = (points - weight[..., None]).abs().min(2).values
    torch.testing.assert_close((matrix.nearest(weight).dequantize() - weight).abs(), nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("power", [-30, 20])
def test_scales_that_left_the_range_of_float16_are_brought_back(power: int) -> None:
    layer = CompressedLinear(uniform())
    with torch.no_grad():
        layer.scales.mul_(2.0**power)
    wanted = layer.weight
    layer.balance()
    assert torch.equal(layer.weight, wanted)
    assert torch.equal(layer.matrix().dequantize(), wanted), "and float16 holds them now"
    assert layer.matrix().bits() == uniform().bits()


def test_quantized_layers_are_found_by_path_and_those_with_codes_apart() -> None:
    several = nn.ModuleList([uniform().module(), refined().module()])
    network = nn.ModuleDict({"a": additive().module(), "b": several, "c": nn.Linear(2, 2)})
    assert quantized_layers(network, "top").keys() == {"top.a", "top.b.0", "top.b.1"}
    assert coded_layers(network).keys() == {"a", "b.1.base"} and isinstance(coded_layers(network)["a"], AdditiveLinear)


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(KernelError, match=r"bias is \[3\], the matrix has 12 outputs"):
        CompressedLinear(uniform(), torch.zeros(3))


def test_a_patch_is_added_to_its_rows_alone() -> None:
    matrix = refined()
    expected = matrix.base.dequantize()
    expected[[2, 5, 11]] += matrix.patch.dequantize()
    assert torch.equal(matrix.dequantize(), expected)
    layer: Any = matrix.module()
    for index in ([0, 1], [11, 2, 2, 3]):  # none of its rows, and some of them again
        rows = torch.tensor(index)
        assert torch.equal(matrix.rows(rows).dequantize(), expected[rows])
        torch.testing.assert_close(layer.rows(rows), expected[rows])


def test_the_weight_of_a_refined_layer_is_its_matrix() -> None:
    layer = refined().module()
    assert torch.equal(layer.weight, refined().dequantize())  # type: ignore[arg-type]


def test_a_patch_that_does_not_fit_its_index_is_refused() -> None:
    with pytest.raises(KernelError, match=r"index \[2\] and a patch of 3 x 32 do not fit"):
        RefinedMatrix(additive(), torch.tensor([2, 5], dtype=torch.int32), uniform().rows(torch.arange(3)))
    with pytest.raises(KernelError, match="3 rows is not that of scheme"):
        RefinedMatrix.from_packed(refined().packed_tensors(), "2x4g8+int3g16r4")
    for index in ([5, 2, 11], [-1, 2, 5], [2, 5, 12]):
        damaged = {**refined().packed_tensors(), "index": torch.tensor(index, dtype=torch.int32)}
        with pytest.raises(KernelError, match="not rising from 0 to below 12"):
            RefinedMatrix.from_packed(damaged, "2x4g8+int3g16r3")


@pytest.mark.parametrize("index", [torch.tensor(3, dtype=torch.int32), torch.tensor([2.0, 5.0, 11.0])])
def test_an_index_of_another_form_is_refused(index: torch.Tensor) -> None:
    with pytest.raises(KernelError, match=r"the index of a patch is \[3?\] of torch\.\w+, not rows in int32"):
        RefinedMatrix.from_packed({**refined().packed_tensors(), "index": index}, "2x4g8+int3g16r3")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            {"exponent": torch.tensor([0, 0, 0], dtype=torch.int16)},
            r"the exponent is \[3\] of torch.int16, not one int16",
        ),
        ({"exponent": torch.tensor(0.5)}, r"the exponent is \[\] of torch.float32, not one int16"),
        ({"scales": torch.ones(12, 2, dtype=torch.int32)}, r"scales \[12, 2\] of torch.int32 and scheme int3g16"),
    ],
)
def test_packed_tensors_of_another_form_are_refused(damage: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        UniformMatrix.from_packed({**uniform().packed_tensors(), **damage}, "int3g16")


def test_a_packed_matrix_without_its_exponent_is_refused() -> None:
    """Its scales would be taken for those of a power of two less, and the weights be wrong in silence."""
    packed = uniform().packed_tensors()
    del packed["exponent"]
    with pytest.raises(KeyError, match="exponent"):
        UniformMatrix.from_packed(packed, "int3g16")


def test_a_scheme_of_endless_digits_is_refused() -> None:
    with pytest.raises(KernelError, match=r"scheme int4g9{75} are not those of a uniform matrix"):
        UniformMatrix.from_packed(uniform().packed_tensors(), "int4g" + "9" * 5000)

"""Products of any kind of matrix by tiles of rows: the plain formula, its gradients, and memory of one tile."""

from __future__ import annotations

import pytest
import torch
from helpers.largest import largest_tensor
from torch import Tensor

from aqlm_kernels import AdditiveMatrix, CompressedLinear, Matrix, UniformMatrix, tiled

OUT, IN = 30, 32


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def additive(rows: int = OUT, dtype: torch.dtype = torch.float32) -> AdditiveMatrix:
    codes = torch.randint(16, (rows, IN // 8, 2), generator=draw())
    codebooks = torch.randint(-4, 5, (2, 16, 8), generator=draw()).to(dtype)
    return AdditiveMatrix(codes, codebooks, 2.0 ** torch.randint(-2, 3, (rows,), generator=draw()).to(dtype))


def uniform(rows: int = OUT) -> UniformMatrix:
    levels = torch.randint(8, (rows, IN), generator=draw(), dtype=torch.uint8)
    zeros = torch.randint(8, (rows, IN // 16), generator=draw(), dtype=torch.uint8)
    scales = (2.0 ** torch.randint(-2, 3, (rows, IN // 16), generator=draw())).half()
    return UniformMatrix(levels, zeros, scales, torch.tensor(3).to(torch.uint8), torch.tensor(0).to(torch.int16))


MATRICES = {"additive": additive(), "uniform": uniform()}


@pytest.fixture(params=[2**22, 500, 1], ids=["one tile", "several", "a row each"])
def tile_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.TILE_BYTES, "cpu", request.param)


def results(product: Tensor, dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [product.detach(), *torch.autograd.grad(product, inputs, dy)]


@pytest.mark.usefixtures("tile_bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_product_and_gradients_of_integers_are_those_of_the_dense_weight(kind: str, dtype: torch.dtype) -> None:
    matrix = MATRICES[kind]
    layer = CompressedLinear(matrix)
    theta = [getattr(layer, name) for name in matrix.learnable]
    x = torch.randint(-1, 2, (2, 3, IN), generator=draw()).to(dtype).requires_grad_()
    dy = torch.randint(-1, 2, (2, 3, OUT), generator=draw()).to(dtype)
    wanted = results(x @ layer.weight.to(dtype).T, dy, x, *theta)
    for found, exact in zip(results(layer(x), dy, x, *theta), wanted, strict=True):
        assert found.dtype == exact.dtype and torch.equal(found, exact)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted[0])


@pytest.mark.usefixtures("tile_bytes")
def test_gradcheck_in_float64() -> None:
    layer = CompressedLinear(additive(5, torch.float64))
    x = torch.randn(3, IN, generator=draw(), dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def product(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(product, (x, *parameters.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 35])
@pytest.mark.parametrize("kind", MATRICES)
def test_compiled_code_dequantizes_to_the_same_bits(kind: str, rows: int, dtype: torch.dtype) -> None:
    matrix: Matrix = {"additive": additive, "uniform": uniform}[kind](rows)
    real = {name: torch.randn(matrix.tensors()[name].shape, generator=draw()) for name in matrix.learnable}
    parts = {**matrix.tensors(), **real}
    if "exponent" in parts:
        parts["exponent"] = torch.tensor(-3, dtype=torch.int16)
    matrix = matrix.from_tensors(parts)
    found = tiled.dequantize(matrix, dtype)
    assert torch.equal(found, matrix.dequantize(dtype)) and found.dtype == dtype


@pytest.mark.parametrize("kind", MATRICES)
def test_compiled_code_serves_wherever_no_gradient_of_the_weight_is_recorded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    compiled = tiled.COMPILED[kind]

    def watched(*tensors: Tensor) -> Tensor:
        written.append(len(tensors[0]))
        return compiled(*tensors)

    monkeypatch.setattr(tiled, "COMPILED", {kind: watched})
    layer, x = CompressedLinear(MATRICES[kind]), torch.ones(20, IN, requires_grad=True)
    layer.rows(torch.tensor([3]))
    assert not written
    with torch.no_grad():
        layer.rows(torch.tensor([3]))
    layer(x).sum().backward()
    assert written == [1, OUT], "the backward needs the gradients of the learnable tensors"
    layer.requires_grad_(False)(x).sum().backward()
    assert written == [1, OUT, OUT, OUT]


def test_only_the_gradients_that_are_asked_for_are_computed() -> None:
    layer, x = CompressedLinear(additive()), torch.ones(2, IN)
    layer.codebooks.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.codebooks.grad is None and layer.scales.grad is not None and layer.scales.grad.any()


def test_one_wrong_code_is_not_equal() -> None:
    matrix, x = uniform(), torch.ones(1, IN)
    wrong = matrix.levels.clone()
    wrong[-1, -1] ^= 1
    changed = UniformMatrix(wrong, matrix.zeros, matrix.scales, matrix.level_bits, matrix.exponent)
    assert not torch.equal(CompressedLinear(changed)(x), CompressedLinear(matrix)(x))


@pytest.mark.parametrize("rows", [2**14, 2**18])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", MATRICES)
def test_memory_is_that_of_a_tile_for_any_vocabulary(kind: str, gradients: bool, rows: int) -> None:
    matrix: Matrix = {"additive": additive, "uniform": uniform}[kind](rows)
    layer, x = CompressedLinear(matrix), torch.ones(1, IN)
    if gradients:
        largest = largest_tensor(lambda: layer(x).sum().backward())
    else:
        largest = largest_tensor(lambda: tiled.linear(x, type(matrix), matrix.tensors()))
    assert 2**21 <= largest <= 1.01 * 2**22, "of a dense weight of 2 and 32 MiB"


def test_the_dense_weight_is_not_kept_for_the_backward() -> None:
    kept: list[int] = []
    layer, x = CompressedLinear(uniform(2**12)), torch.ones(1, IN)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        layer(x)
    assert kept and max(kept) == layer.levels.nbytes

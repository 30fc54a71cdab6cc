"""Products of many rows, tile by tile: the numbers, and that no more than a tile of W is ever written."""

from __future__ import annotations

import pytest
import torch

from aqlm_kernels.cpu import gemm
from aqlm_kernels.matrices import additive

pytestmark = pytest.mark.usefixtures("nan_filled_outputs")


@pytest.fixture(params=[2**22, 2000, 1], ids=["one tile", "several", "a row each"])
def tile_bytes(request, monkeypatch):
    monkeypatch.setattr(gemm, "TILE_BYTES", request.param)


@pytest.mark.usefixtures("tile_bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matmul_and_gradients_of_integers_are_exact(case, dtype):
    x, matrix = case.integers()
    x = x.to(dtype)
    parts = matrix.codes, matrix.codebooks, matrix.scales
    dy = torch.randint(-3, 4, (case.rows, case.out_features), generator=torch.Generator().manual_seed(2)).to(dtype)
    weight = matrix.dequantize(torch.float64)
    assert torch.equal(gemm.matmul(x, *parts), (x.double() @ weight.T).to(dtype))
    assert torch.equal(gemm.input_gradient(dy, *parts), (dy.double() @ weight).to(dtype))
    codebooks, scales = matrix.codebooks.double().requires_grad_(), matrix.scales.double().requires_grad_()
    dw = (dy.double().T @ x.double()).to(dtype).double()
    additive.dequantize(matrix.codes, codebooks, scales, torch.float64).backward(dw)
    of_codebooks, of_scales = gemm.weight_gradients(dy, x, *parts)
    assert torch.equal(of_codebooks.double(), codebooks.grad)
    assert torch.equal(of_scales.double(), scales.grad)


def test_no_more_than_a_tile_is_written(monkeypatch):
    written = []

    def spy(codes, codebooks, scales, dtype):
        weight = dequantize(codes, codebooks, scales, dtype)
        written.append(weight.nbytes)
        return weight

    dequantize = gemm.dequantize
    monkeypatch.setattr(gemm, "dequantize", spy)
    codes = torch.zeros(4000, 100, 1, dtype=torch.uint8)
    parts = codes, torch.zeros(1, 256, 8), torch.ones(4000)
    gemm.matmul(torch.ones(2, 3, 800), *parts)
    gemm.input_gradient(torch.ones(2, 3, 4000), *parts)
    assert sum(written) == 2 * 4000 * 800 * 4
    assert max(written) < 1.2 * gemm.TILE_BYTES


def test_leading_axes_stay():
    parts = torch.zeros(10, 3, 1, dtype=torch.uint8), torch.ones(1, 256, 8), torch.ones(10)
    assert gemm.matmul(torch.ones(2, 3, 24), *parts).shape == (2, 3, 10)
    assert gemm.input_gradient(torch.ones(2, 3, 10), *parts).shape == (2, 3, 24)

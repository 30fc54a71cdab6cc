"""The compiled dequantization and its gradient against plain torch."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_cases import cases
from hypothesis import given
from hypothesis import strategies as st

from aqlm_kernels.cpu.dequantize import dequantize, gradients
from aqlm_kernels.matrices import additive

pytestmark = pytest.mark.usefixtures("nan_filled_outputs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_weights_equal_plain_torch_bit_for_bit(case, dtype):
    _, matrix = case.reals()
    weight = dequantize(matrix.codes, matrix.codebooks, matrix.scales, dtype)
    assert torch.equal(weight, matrix.dequantize(dtype))


def test_bfloat16_ties_go_to_even():
    entries = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-23, 3.4e38, 0.0, -0.0, 1e-40])
    codes, scales = torch.zeros(1, 1, 1, dtype=torch.uint8), torch.ones(1)
    codebooks = entries.repeat(2, 1)[None]  # [1, 2, 8]
    weight = dequantize(codes, codebooks, scales, torch.bfloat16)
    assert torch.equal(weight.view(torch.int16), entries.bfloat16()[None].view(torch.int16))


def expected_gradients(dw, matrix):
    """By autograd, in float64."""
    codebooks, scales = matrix.codebooks.double().requires_grad_(), matrix.scales.double().requires_grad_()
    additive.dequantize(matrix.codes, codebooks, scales, torch.float64).backward(dw.double())
    return codebooks.grad, scales.grad


def test_gradients_of_integers_are_exact(case):
    _, matrix = case.integers()
    dw = torch.randint(-5, 6, (case.out_features, case.in_features)).float()
    of_codebooks, of_scales = gradients(dw, matrix.codes, matrix.codebooks, matrix.scales)
    expected_codebooks, expected_scales = expected_gradients(dw, matrix)
    assert torch.equal(of_codebooks.double(), expected_codebooks)
    assert torch.equal(of_scales.double(), expected_scales)


def test_gradients_of_reals_are_float64_sums(case):
    _, matrix = case.reals()
    dw = torch.randn(case.out_features, case.in_features, generator=torch.Generator().manual_seed(2))
    of_codebooks, of_scales = gradients(dw, matrix.codes, matrix.codebooks, matrix.scales)
    expected_codebooks, expected_scales = expected_gradients(dw, matrix)
    torch.testing.assert_close(of_codebooks, expected_codebooks, rtol=2**-23, atol=1e-12)
    torch.testing.assert_close(of_scales, expected_scales, rtol=2**-23, atol=1e-12)


@given(drawn=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_weights_and_gradients_of_any_scheme_and_shape_are_those_of_plain_torch(drawn, dtype):
    _, matrix = drawn.integers()
    parts = matrix.codes, matrix.codebooks, matrix.scales
    assert torch.equal(dequantize(*parts, dtype), matrix.dequantize(dtype))
    dw = torch.randint(-5, 6, (drawn.out_features, drawn.in_features)).float()
    for found, expected in zip(gradients(dw, *parts), expected_gradients(dw, matrix), strict=True):
        assert torch.equal(found.double(), expected)

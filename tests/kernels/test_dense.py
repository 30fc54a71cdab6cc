"""Products with a dense matrix of few bytes: an output head."""

from __future__ import annotations

import pytest
import torch

from aqlm_kernels import ByteRows, KernelError, matmul_dense

pytestmark = pytest.mark.usefixtures("nan_filled_outputs")

SHAPES = [(1, 1, 1), (1, 576, 130), (3, 33, 64), (8, 100, 63), (0, 16, 5)]  # rows, in, out
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def integers(*shape):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).float()


def reals(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_matmul_of_integers_is_exact(rows, inputs, outputs, dtype):
    x, weight = integers(rows, inputs), integers(outputs, inputs)
    assert torch.equal(matmul_dense(x, weight.to(dtype)), x @ weight.T)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_matmul_of_reals_is_near_float64_and_one_wrong_weight_is_not(dtype):
    x, weight = reals(2, 576), reals(130, 576, seed=2).to(dtype)
    exact = x.double() @ weight.double().T
    assert (matmul_dense(x, weight) - exact).norm() < 1e-6 * exact.norm()
    wrong = weight.clone()
    wrong[-1, -1] += 1
    assert (matmul_dense(x, wrong) - exact).norm() > 1e-6 * exact.norm()


def test_strided_inputs_and_weights_are_read_as_they_are():
    x, weight = integers(3, 40)[:, ::2], integers(20, 9).T
    assert torch.equal(matmul_dense(x, weight), x @ weight.T)


def test_byte_rows_are_the_nearest_of_their_levels():
    weight = reals(50, 200)
    weight[7] = 0
    rows = ByteRows.of(weight)
    assert rows.levels.dtype == torch.int8 and rows.levels.abs().max() == 127
    assert ((rows.dequantize() - weight).abs() <= 0.5001 * rows.units[:, None]).all()
    assert not rows.dequantize()[7].any()


def test_matmul_with_byte_rows_equals_that_with_their_dequantized_weight():
    x, rows = reals(3, 200), ByteRows.of(reals(130, 200, seed=2))
    exact = x.double() @ rows.dequantize().double().T
    assert (matmul_dense(x, rows) - exact).norm() < 1e-6 * exact.norm()


def test_another_type_is_refused():
    with pytest.raises(KernelError, match=r"the weight is torch\.float64; convert it"):
        matmul_dense(torch.zeros(1, 3), torch.zeros(2, 3).double())

"""AdditiveMatrix: what it means, what it costs, what it refuses."""

from __future__ import annotations

import pytest
import torch

from aqlm_kernels import AdditiveMatrix, KernelError


def test_a_weight_is_its_scale_times_the_sum_of_its_entries(case):
    _, matrix = case.reals()
    codes, codebooks, scales = matrix.codes.tolist(), matrix.codebooks.double(), matrix.scales.double()
    weight = matrix.dequantize(torch.float64)
    for o in {0, case.out_features // 2, case.out_features - 1}:
        for j in range(case.groups):
            group = sum(codebooks[m][codes[o][j][m]] for m in range(case.num_codebooks)) * scales[o]
            assert torch.equal(weight[o, j * case.group_size : (j + 1) * case.group_size], group)


def test_half_precision_is_rounded_once_from_float32(case):
    _, matrix = case.reals()
    assert torch.equal(matrix.dequantize(torch.bfloat16), matrix.dequantize().bfloat16())


def test_all_stored_bits_are_counted():
    matrix = AdditiveMatrix(torch.zeros(10, 4, 3, dtype=torch.long), torch.zeros(3, 256, 8), torch.ones(10))
    assert matrix.bits() == 10 * 4 * 3 * 8 + 16 * (3 * 256 * 8 + 10)


def test_codes_of_any_integer_type_mean_the_same_and_are_kept_small():
    values = torch.tensor([[[0], [200], [255]]])
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64):
        matrix = AdditiveMatrix(values.to(dtype), torch.zeros(1, 256, 8), torch.ones(1))
        assert matrix.codes.dtype == torch.uint8
        assert torch.equal(matrix.codes.long(), values)
    assert AdditiveMatrix(values, torch.zeros(1, 512, 8), torch.ones(1)).codes.dtype == torch.int32


def test_a_matrix_comes_back_from_its_tensors(case):
    _, matrix = case.reals()
    again = AdditiveMatrix.from_tensors(matrix.tensors())
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in matrix.tensors().items())


def test_the_shape_is_derived():
    matrix = AdditiveMatrix(torch.zeros(10, 4, 3, dtype=torch.long), torch.zeros(3, 32, 16), torch.ones(10))
    assert (matrix.out_features, matrix.in_features, matrix.group_size) == (10, 64, 16)
    assert (matrix.num_codebooks, matrix.codebook_size, matrix.codebook_bits) == (3, 32, 5)


CODES, CODEBOOKS, SCALES = torch.zeros(2, 3, 1, dtype=torch.long), torch.zeros(1, 16, 8), torch.ones(2)


@pytest.mark.parametrize(
    ("codes", "codebooks", "scales", "reason"),
    [
        (CODES[0], CODEBOOKS, SCALES, "codes \\[3, 1\\]"),
        (CODES, CODEBOOKS, torch.ones(3), "do not fit"),
        (CODES, CODEBOOKS.repeat(2, 1, 1), SCALES, "do not fit"),
        (CODES[:, :0], CODEBOOKS, SCALES, "is empty"),
        (CODES.float(), CODEBOOKS, SCALES, "codes are torch.float32; convert"),
        (CODES, CODEBOOKS.int(), SCALES, "codebooks are torch.int32"),
        (CODES, CODEBOOKS.to("meta"), SCALES, "codebooks on meta.* move them to one device"),
        (CODES, CODEBOOKS[:, :12], SCALES, "12 entries; it needs a power of two"),
        (CODES + 16, CODEBOOKS, SCALES, "codes lie in \\[16, 16\\], codebooks have entries 0 to 15"),
        (CODES - 1, CODEBOOKS, SCALES, "codes lie in \\[-1, -1\\]"),
    ],
)
def test_invalid_matrices_are_refused_with_the_reason(codes, codebooks, scales, reason):
    with pytest.raises(KernelError, match=reason):
        AdditiveMatrix(codes, codebooks, scales)


def test_the_meta_device_carries_shapes():
    matrix = AdditiveMatrix(CODES.to("meta"), CODEBOOKS.to("meta"), SCALES.to("meta"))
    assert matrix.dequantize().shape == (2, 24)

"""PackedMatrix: where each code lies, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch

from aqlm_kernels import AdditiveMatrix, KernelError, PackedMatrix, pack, unpack
from aqlm_kernels.packed import TILE


def test_unpack_is_the_exact_inverse_of_pack(case):
    _, matrix = case.reals()
    again = unpack(pack(matrix))
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in matrix.tensors().items())


def test_pack_is_the_exact_inverse_of_unpack(case):
    packed = pack(case.reals()[1])
    again = pack(unpack(packed))
    assert again.codes.dtype == packed.codes.dtype
    assert torch.equal(again.codes.int(), packed.codes.int())


def test_every_code_lies_in_its_tile_with_its_group_and_codebook(case):
    _, matrix = case.reals()
    codes = pack(matrix).codes.int()
    for o in range(0, case.out_features, 7):
        assert torch.equal(codes[o // TILE, :, :, o % TILE], matrix.codes[o].int())


def test_half_precision_codebooks_keep_their_type():
    codes = torch.zeros(2, 3, 1, dtype=torch.long)
    packed = pack(AdditiveMatrix(codes, torch.zeros(1, 256, 8).half(), torch.ones(2).half()))
    assert packed.codebooks.dtype == packed.scales.dtype == torch.float16


def test_codes_that_fit_no_matrix_are_refused():
    with pytest.raises(KernelError, match=r"make them with pack\(\)"):
        PackedMatrix(torch.zeros(1, 3, 2, TILE, dtype=torch.uint8), torch.zeros(1, 256, 8), torch.ones(64))

"""The checkpoint's tensors: bytes fixed by hand, and read as the authors' package reads them."""

from __future__ import annotations

import aqlm.utils
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqlm_kernels import AdditiveMatrix, KernelError, from_checkpoint, to_checkpoint


@pytest.mark.parametrize(
    ("bits", "codes", "stored", "dtype"),
    [
        (4, [0, 7, 8, 15], "00 07 f8 ff", torch.int8),
        (8, [0, 1, 127, 128, 255], "00 01 7f 80 ff", torch.int8),
        (12, [0, 2047, 2048, 4095], "0000 ff07 00f8 ffff", torch.int16),
        (16, [0, 32767, 32768, 65535], "0000 ff7f 0080 ffff", torch.int16),
    ],
)
def test_codes_are_stored_as_these_bytes(bits, codes, stored, dtype):
    matrix = AdditiveMatrix(torch.tensor(codes)[None, :, None], torch.zeros(1, 2**bits, 4), torch.ones(1))
    tensors = to_checkpoint(matrix)
    assert tensors["codes"].dtype == dtype and tensors["codes"].shape == (1, len(codes), 1)
    assert tensors["codes"].numpy().astype(f"<i{dtype.itemsize}").tobytes() == bytes.fromhex(stored)
    assert torch.equal(from_checkpoint(tensors).codes, matrix.codes)


def test_codebooks_and_scales_are_float16_with_unit_axes():
    matrix = AdditiveMatrix(
        torch.zeros(3, 5, 2, dtype=torch.long), torch.full((2, 16, 8), 0.1), torch.tensor([1, 2, -3.0])
    )
    tensors = to_checkpoint(matrix)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "codes": [3, 5, 2],
        "codebooks": [2, 16, 1, 8],
        "scales": [3, 1, 1, 1],
    }
    assert tensors["codebooks"].numpy().astype("<f2").tobytes() == bytes.fromhex("662e") * 2 * 16 * 8
    assert tensors["scales"].numpy().astype("<f2").tobytes() == bytes.fromhex("003c 0040 00c2")


def test_the_authors_package_reads_the_same_weights(case):
    _, matrix = case.reals()
    tensors = to_checkpoint(matrix)
    codes = aqlm.utils.unpack_int_data(tensors["codes"], case.codebook_bits)
    theirs = aqlm.utils._dequantize_weight(codes, tensors["codebooks"].float(), tensors["scales"].float())
    torch.testing.assert_close(from_checkpoint(tensors).dequantize(), theirs, rtol=1e-5, atol=1e-5)


def test_a_stored_matrix_comes_back_exactly(case):
    _, matrix = case.integers()
    again = from_checkpoint(to_checkpoint(matrix))
    assert torch.equal(again.codes, matrix.codes)
    assert torch.equal(again.dequantize(), matrix.dequantize())


@pytest.mark.parametrize("bits", range(1, 17))
@given(data=st.data(), num_codebooks=st.integers(1, 8), group_size=st.integers(1, 64))
@settings(max_examples=25)
def test_codes_of_every_width_come_back_and_fit_their_signed_width(bits, data, num_codebooks, group_size):
    code = st.integers(0, 2**bits - 1)
    one_group = st.lists(code, min_size=num_codebooks, max_size=num_codebooks)
    codes = torch.tensor([data.draw(st.lists(one_group, min_size=1, max_size=9))])  # [1, n, M]
    codebooks = torch.zeros(1, 1, 1).expand(num_codebooks, 2**bits, group_size)  # takes no memory
    matrix = AdditiveMatrix(codes, codebooks, torch.ones(1))
    stored = to_checkpoint(matrix)
    assert stored["codes"].dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert all(-(2 ** (bits - 1)) <= code < 2 ** (bits - 1) for code in stored["codes"].flatten().tolist())
    assert torch.equal(from_checkpoint(stored).codes.long(), codes)
    assert torch.equal(aqlm.utils.unpack_int_data(stored["codes"], bits).long(), codes)


@pytest.mark.parametrize("value", [1e5, float("nan"), float("-inf")])
def test_a_value_that_float16_cannot_hold_is_refused(value):
    codes = torch.zeros(2, 1, 1, dtype=torch.long)
    with pytest.raises(KernelError, match=r"scales reach .* a checkpoint holds float16"):
        to_checkpoint(AdditiveMatrix(codes, torch.zeros(1, 16, 8), torch.tensor([1.0, value])))
    with pytest.raises(KernelError, match="codebooks reach"):
        to_checkpoint(AdditiveMatrix(codes, torch.full((1, 16, 8), value), torch.ones(2)))


def test_groups_of_several_output_rows_are_refused():
    tensors = {
        "codes": torch.zeros(2, 3, 1, dtype=torch.int8),
        "codebooks": torch.zeros(1, 256, 2, 8),
        "scales": torch.ones(2, 1, 1, 1),
    }
    with pytest.raises(KernelError, match="only checkpoints with out_group_size 1"):
        from_checkpoint(tensors)

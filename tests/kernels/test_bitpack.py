"""Bits in bytes: exact for every width and length, and the order that the format names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqlm_kernels import KernelError, pack_bits, packed_bytes, unpack_bits


@given(
    bits=st.integers(1, 16),
    rows=st.integers(1, 4),
    values=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=70),
)
def test_unpacking_is_the_inverse_for_every_width_and_length(bits: int, rows: int, values: list[int]) -> None:
    drawn = (torch.tensor(values) & ((1 << bits) - 1)).repeat(rows, 1)
    packed = pack_bits(drawn, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_bytes(len(values), bits))
    assert torch.equal(unpack_bits(packed, bits, len(values)).long(), drawn)
    assert torch.equal(unpack_bits(packed[1:], bits, len(values)).long(), drawn[1:]), "rows can be gathered"


@given(bits=st.integers(1, 16), values=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40))
def test_the_first_bit_is_the_lowest(bits: int, values: list[int]) -> None:
    cut = [value & ((1 << bits) - 1) for value in values]
    number = sum(value << (i * bits) for i, value in enumerate(cut))
    packed = pack_bits(torch.tensor(cut), bits)
    assert bytes(packed.tolist()) == number.to_bytes(packed_bytes(len(cut), bits), "little")


def test_bytes_are_those_of_the_format() -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 4, 5]), 3).tolist() == [0b11010001, 0b01011000]
    assert pack_bits(torch.tensor([0xABC, 0x123]), 12).tolist() == [0xBC, 0x3A, 0x12]


@pytest.mark.parametrize("bits", [1, 4, 8, 11])
def test_nothing_is_packed_into_nothing(bits: int) -> None:
    assert pack_bits(torch.zeros(3, 0, dtype=torch.uint8), bits).shape == (3, 0)
    assert unpack_bits(torch.zeros(3, 0, dtype=torch.uint8), bits, 0).shape == (3, 0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelError, match=r"values lie in \[0, 8\], 3 bits hold 0 to 7"):
        pack_bits(torch.tensor([0, 8]), 3)
    with pytest.raises(KernelError, match=r"values lie in \[-1, 0\], 8 bits hold 0 to 255"):
        pack_bits(torch.tensor([0, -1]), 8)
    with pytest.raises(KernelError, match="17 bits a value; choose 1 to 16"):
        pack_bits(torch.tensor([0]), 17)
    with pytest.raises(KernelError, match=r"5 values of 3 bits take 2 bytes, found 3 of torch\.uint8"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 5)

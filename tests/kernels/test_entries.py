"""Codebooks in 8 bits: values by hand, the limits of float16, and nothing that a second rounding changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aqlm_kernels import AdditiveMatrix, KernelError, from_checkpoint, to_checkpoint
from aqlm_kernels.matrices.entries import entries_of, levels_of, round_entries


def codebooks(books: int, entries: int, group: int, power: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(books + entries + group)
    spread = torch.logspace(-1, 1, group)  # places of unlike sizes
    return torch.randn(books, entries, group, generator=draw) * spread * 2.0**power


def matrix(power: int = 0) -> AdditiveMatrix:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (12, 4, 2), generator=draw)
    return AdditiveMatrix(codes, codebooks(2, 16, 8, power), torch.rand(12, generator=draw) + 0.5, entry_bits=8)


def test_levels_are_127ths_of_the_largest_number_of_each_place() -> None:
    book = torch.tensor([[[-127.0, 0.5], [63.4, 0.25], [63.6, -0.001]]])  # [1, 3, 2]
    levels, ranges = levels_of(book)
    assert levels.dtype == torch.int8 and levels.tolist() == [[[-127, 127], [63, 64], [64, 0]]]
    assert ranges.dtype == torch.float16 and ranges.tolist() == [[127.0, 0.5]]
    expected = torch.tensor([[[-127.0, 0.5], [63.0, 64 * 0.5 / 127], [64.0, 0.0]]]).half()
    assert torch.equal(entries_of(levels, ranges), expected)


SHAPES = {"books": st.integers(1, 4), "entries": st.sampled_from([2, 16, 256]), "group": st.integers(1, 9)}


@given(**SHAPES, power=st.integers(-26, 10))
def test_rounding_again_changes_nothing_and_float16_holds_every_entry(
    books: int, entries: int, group: int, power: int
) -> None:
    rounded = round_entries(codebooks(books, entries, group, power))
    assert torch.equal(round_entries(rounded), rounded)
    assert torch.equal(rounded.half().float(), rounded)


@given(**SHAPES)
def test_an_entry_is_off_by_half_a_level_at_most(books: int, entries: int, group: int) -> None:
    book = codebooks(books, entries, group)
    largest = book.abs().amax(1, keepdim=True)
    wrong = (round_entries(book) - book).abs()
    assert (wrong <= largest * (0.5 / 127 + 2**-10)).all()
    assert torch.equal(round_entries(book).abs().amax(1), largest[:, 0].half().float()), "the largest keep their values"


def test_a_place_of_zeros_stays_one() -> None:
    book = codebooks(2, 16, 8)
    book[1, :, 3] = 0
    rounded = round_entries(book)
    assert (rounded[1, :, 3] == 0).all() and rounded.isfinite().all()


def test_tensors_that_are_no_levels_with_ranges_are_refused() -> None:
    levels, ranges = levels_of(codebooks(2, 16, 8))
    for one, other in ((levels, ranges[:1]), (levels.float(), ranges), (levels[0], ranges)):
        with pytest.raises(KernelError, match=r"are not \[M, K, g\] in int8 and \[M, g\]"):
            entries_of(one, other)


def test_a_matrix_stores_its_codebooks_in_8_bits_and_comes_back_as_stored() -> None:
    packed = matrix().packed_tensors()
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in packed.items()} == {
        "codes": (torch.uint8, [12 * 4 * 2 * 4 // 8]),
        "codebooks": (torch.int8, [2, 16, 8]),
        "ranges": (torch.float16, [2, 8]),
        "scales": (torch.float16, [12]),
    }
    assert matrix().bits() == 8 * sum(tensor.nbytes for tensor in packed.values())
    again = AdditiveMatrix.from_packed(packed, "2x4g8c8")
    assert again.scheme == matrix().scheme == "2x4g8c8"
    assert torch.equal(again.dequantize(), matrix().stored().dequantize())
    assert all(torch.equal(again.packed_tensors()[name], tensor) for name, tensor in packed.items())
    with pytest.raises(KernelError, match=r"codebooks are \[2, 16, 8\], which are not those of the scheme 2x8g8c8"):
        AdditiveMatrix.from_packed(packed, "2x8g8c8")
    with pytest.raises(KernelError, match=r"int8"):
        AdditiveMatrix.from_packed(packed, "2x4g8")


def test_the_bits_survive_everything_that_makes_a_matrix_of_another() -> None:
    given_matrix = matrix()
    layer = given_matrix.module()
    index = torch.tensor([3, 1])
    made = [
        AdditiveMatrix.from_tensors(given_matrix.tensors()),
        given_matrix.stored(),
        matrix(power=-20).balanced(),
        given_matrix.rows(index),
        given_matrix.nearest(given_matrix.dequantize()),
        layer.matrix(),
    ]
    assert {one.scheme for one in made} == {"2x4g8c8"}
    assert "scheme=2x4g8c8" in repr(layer)
    assert given_matrix.tensors().keys() == {"codes", "codebooks", "scales", "entry_bits"}
    assert replace(given_matrix, entry_bits=16).tensors().keys() == {"codes", "codebooks", "scales"}


def test_the_format_of_the_package_aqlm_holds_the_rounded_entries() -> None:
    again = from_checkpoint(to_checkpoint(matrix()))
    assert again.scheme == "2x4g8", "which it cannot name"
    assert torch.equal(again.dequantize(), matrix().stored().dequantize())


def test_codebooks_out_of_range_are_refused_and_not_finite_when_stored() -> None:
    large = matrix(power=20)
    assert not large.stored().codebooks.isfinite().all()
    with pytest.raises(KernelError, match="codebooks reach"):
        large.packed_tensors()
    with pytest.raises(KernelError, match="codebooks of 4 bits; choose 8 or 16"):
        replace(matrix(), entry_bits=4)

"""PackedMatrix: where each code lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqlm_kernels import AdditiveMatrix, PackedMatrix
from aqlm_kernels.packed import BLOCK, TILE, blocks_of


def test_every_code_lies_in_its_tile_with_its_group_and_codebook(case):
    _, matrix = case.reals()
    tiled = PackedMatrix(matrix).tiled
    assert tiled.dtype == (torch.uint8 if matrix.codebook_size <= 256 else torch.uint16)
    for o in range(case.out_features):
        assert torch.equal(tiled[o // TILE, :, :, o % TILE].int(), matrix.codes[o].int())
    assert not tiled.int().permute(0, 3, 1, 2).flatten(0, 1)[case.out_features :].any()


def test_the_stream_holds_every_code_in_the_order_of_lookups(case):
    _, matrix = case.reals()
    if matrix.codebook_size > 256:
        return
    streamed, tables = PackedMatrix(matrix).streamed, case.groups * case.num_codebooks
    blocks, size = blocks_of(tables)
    tiles = -(-case.out_features // TILE)
    assert streamed.shape == (blocks, tiles * size * TILE) and streamed.is_contiguous()
    expected = torch.zeros_like(streamed)
    for block in range(blocks):
        place, tile = 0, 0
        while tile < tiles:
            width = 4 if tiles - tile >= 4 else 2 if tiles - tile >= 2 else 1
            for i in range(size):
                for o in range(tile * TILE, (tile + width) * TILE):
                    table = block * size + i
                    if table < tables and o < case.out_features:
                        expected[block, place] = matrix.codes[o].flatten()[table]
                    place += 1
            tile += width
    assert torch.equal(streamed, expected)


def matrix_of(codes, bits, group_size):
    """Of these codes `[out, n, M]`, and of codebooks that take no memory."""
    codebooks = torch.zeros(1, 1, 1).expand(codes.shape[2], 2**bits, group_size)
    return AdditiveMatrix(codes, codebooks, torch.ones(len(codes)))


def unpacked(packed, tables):
    """The codes `[out, n * M]` out of the stream: by the place of each, told from its output and its table alone."""
    size = blocks_of(tables)[1]
    tiles = -(-packed.out_features // TILE)
    output, table = torch.arange(packed.out_features)[:, None], torch.arange(tables)
    tile, lane = output // TILE, output % TILE
    fours, twos = tiles // 4 * 4, tiles // 2 * 2
    bundle = torch.where(tile < fours, tile // 4 * 4, torch.where(tile < twos, tile // 2 * 2, tile))  # its first tile
    width = torch.where(tile < fours, 4, torch.where(tile < twos, 2, 1))
    place = TILE * (bundle * size + table % size * width + tile - bundle) + lane
    return packed.streamed[table // size, place]


@pytest.mark.parametrize("bits", range(1, 17))
@given(
    shape=st.tuples(st.integers(1, 600), st.integers(1, 70), st.integers(1, 8)),
    group_size=st.integers(1, 64),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25)
def test_packed_codes_of_every_width_come_back(bits, shape, group_size, seed):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))  # [out, n, M]
    packed = PackedMatrix(matrix_of(codes, bits, group_size))
    tiled = packed.tiled.permute(0, 3, 1, 2).flatten(0, 1)  # [tiles * TILE, n, M]
    assert torch.equal(tiled[: len(codes)].long(), codes)
    if bits <= 8:
        assert torch.equal(unpacked(packed, codes[0].numel()).long(), codes.flatten(1))


def test_blocks_are_as_few_as_can_be_and_alike():
    for tables in range(1, 300):
        blocks, size = blocks_of(tables)
        assert blocks == -(-tables // BLOCK)
        assert (blocks - 1) * size < tables <= blocks * size <= tables + blocks - 1


def test_half_precision_codebooks_keep_their_type():
    codes = torch.zeros(2, 3, 1, dtype=torch.long)
    packed = PackedMatrix(AdditiveMatrix(codes, torch.zeros(1, 256, 8).half(), torch.ones(2).half()))
    assert packed.codebooks.dtype == packed.scales.dtype == torch.float16


def test_an_order_is_made_once():
    packed = PackedMatrix(
        AdditiveMatrix(torch.zeros(2, 3, 1, dtype=torch.uint8), torch.zeros(1, 256, 8), torch.ones(2))
    )
    assert packed.tiled is packed.tiled and packed.streamed is packed.streamed

"""PackedMatrix: an AdditiveMatrix with its codes in the orders in which the matmul kernels read them.

A thread computes tiles of 64 outputs. It walks over the input groups, and for each group and codebook needs the codes
of all its outputs: they lie side by side. The outputs of the last tile that the matrix does not have get code 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_kernels.matrices.additive import AdditiveMatrix

TILE = 64  # outputs
BLOCK = 32  # look-up tables at most, those of one group and codebook each, that go through all tiles together
BUNDLES = (4, 2, 1)  # tiles that are looked up together: as many as are left


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """Codebooks and scales are shared with the matrix; an order of the codes is made when it is first asked for."""

    matrix: AdditiveMatrix

    @property
    def codebooks(self) -> Tensor:  # [M, K, g]
        return self.matrix.codebooks

    @property
    def scales(self) -> Tensor:  # [out]
        return self.matrix.scales

    @property
    def out_features(self) -> int:
        return self.matrix.out_features

    @property
    def in_features(self) -> int:
        return self.matrix.in_features

    @property
    def codebook_size(self) -> int:
        return self.matrix.codebook_size

    @property
    def device(self) -> torch.device:
        return self.matrix.codes.device

    @cached_property
    def tiled(self) -> Tensor:
        """The code of output t * TILE + l, group j and codebook m at [t, j, m, l]; uint8 if K <= 256, else uint16."""
        return _tiled(self.matrix.codes).to(torch.uint8 if self.codebook_size <= 256 else torch.uint16)

    @cached_property
    def streamed(self) -> Tensor:
        """The same in the order in which look-ups go through it, `[blocks, tiles * size * TILE]`, for K <= 256.

        A block holds `size` of the M * n tables, of all tiles, bundle after bundle; of a bundle table after table, and
        of a table the codes of all tiles of the bundle. So memory is read from one end to the other.
        """
        tables = _tiled(self.matrix.codes).flatten(1, 2)  # [tiles, n * M, TILE]
        tiles, count = tables.shape[:2]
        blocks, size = blocks_of(count)
        tables = F.pad(tables, (0, 0, 0, blocks * size - count)).view(tiles, blocks, size, TILE)
        bundles, start = [], 0
        for width in BUNDLES:
            number = (tiles - start) // width
            some = tables[start : start + number * width].view(number, width, blocks, size, TILE)
            bundles.append(some.permute(2, 0, 3, 1, 4).flatten(1))  # [blocks, number * size * width * TILE]
            start += number * width
        return torch.cat(bundles, dim=1)

    @cached_property
    def columns(self) -> Tensor:
        """The codebooks transposed, `[M, g, max(K, 256)]` float32; smaller ones are filled up with their entries."""
        times = -(-256 // self.codebook_size)
        return self.codebooks.transpose(1, 2).float().repeat(1, 1, times).contiguous()

    @cached_property
    def tile_scales(self) -> Tensor:
        """The scales of whole tiles, `[tiles * TILE]` float32, 0 where the last has no output."""
        return F.pad(self.scales.float(), (0, -self.out_features % TILE))


def _tiled(codes: Tensor) -> Tensor:  # [out, n, M] -> [tiles, n, M, TILE]
    out_features, groups, num_codebooks = codes.shape
    tiles = -(-out_features // TILE)
    padded = codes.new_zeros(tiles * TILE, groups, num_codebooks)
    padded[:out_features] = codes
    return padded.view(tiles, TILE, groups, num_codebooks).permute(0, 2, 3, 1).contiguous()


def blocks_of(tables: int) -> tuple[int, int]:
    """The number of blocks of look-ups, and the tables of each but the last, which may have fewer."""
    blocks = -(-tables // BLOCK)
    return blocks, -(-tables // blocks)

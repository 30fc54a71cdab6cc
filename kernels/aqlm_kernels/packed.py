"""PackedMatrix: an AdditiveMatrix in the order in which the product kernels read it.

A thread computes a tile of 64 outputs. It walks over the input groups, and for each group and codebook needs the codes
of all its outputs: they lie side by side. The outputs of the last tile that the matrix does not have get code 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_kernels.additive import AdditiveMatrix, code_dtype
from aqlm_kernels.errors import KernelError

TILE = 64  # outputs


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """The code of output t * TILE + l, group j and codebook m is codes[t, j, m, l]; else as in AdditiveMatrix."""

    codes: Tensor  # [ceil(out / TILE), in/g, M, TILE], uint8 if K <= 256, else uint16
    codebooks: Tensor  # [M, K, g]
    scales: Tensor  # [out]

    def __post_init__(self) -> None:
        tiles = -(-self.scales.shape[0] // TILE)
        if self.codes.shape != (tiles, self.codes.shape[1], self.codebooks.shape[0], TILE):
            raise KernelError(
                f"packed codes {list(self.codes.shape)} do not fit codebooks {list(self.codebooks.shape)} and scales "
                f"{list(self.scales.shape)}; make them with pack()"
            )

    @property
    def out_features(self) -> int:
        return self.scales.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * self.codebooks.shape[2]

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @cached_property
    def columns(self) -> Tensor:
        """The codebooks transposed, `[M, g, max(K, 256)]` float32; smaller ones are filled up with their entries."""
        times = -(-256 // self.codebook_size)
        return self.codebooks.transpose(1, 2).float().repeat(1, 1, times).contiguous()

    @cached_property
    def tile_scales(self) -> Tensor:
        """The scales of whole tiles, `[tiles * TILE]` float32, 0 where the last has no output."""
        return F.pad(self.scales.float(), (0, -self.out_features % TILE))


def pack(matrix: AdditiveMatrix) -> PackedMatrix:
    """The same matrix for the product kernels; codebooks and scales are shared, not copied."""
    out_features, groups, num_codebooks = matrix.codes.shape
    tiles = -(-out_features // TILE)
    padded = matrix.codes.new_zeros(tiles * TILE, groups, num_codebooks)
    padded[:out_features] = matrix.codes
    codes = padded.view(tiles, TILE, groups, num_codebooks).permute(0, 2, 3, 1).contiguous()  # [tiles, n, M, TILE]
    dtype = torch.uint8 if matrix.codebook_size <= 256 else torch.uint16
    return PackedMatrix(codes.to(dtype), matrix.codebooks, matrix.scales)


def unpack(packed: PackedMatrix) -> AdditiveMatrix:
    """The exact inverse of `pack`."""
    codes = packed.codes.to(code_dtype(packed.codebook_size)).permute(0, 3, 1, 2).flatten(0, 1)  # [tiles * TILE, n, M]
    return AdditiveMatrix(codes[: packed.out_features].contiguous(), packed.codebooks, packed.scales)

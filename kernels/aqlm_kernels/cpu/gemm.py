"""Matmul with many rows of x, and its gradients: W is dequantized a tile at a time, and torch multiplies by the tile.

A tile stays in the cache until it is multiplied, and the memory that a matmul needs beside its result does not grow
with the matrix. Results are joined in the order of the tiles.

Shapes: M codebooks of K entries, each of g features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_kernels.cpu.dequantize import dequantize, gradients
from aqlm_kernels.tiled import equal_parts

TILE_BYTES = 2**22
"""Bytes of W per tile: the fastest of 1, 2, 4 and 8 MiB, at 512 rows 1.2 times as fast as a whole 32 MiB matrix."""


def matmul(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """x W^T [..., out] in the type of x."""
    tiles = list(_tiles(len(codes), x.shape[-1] * x.element_size()))
    if len(tiles) == 1:
        return F.linear(x, dequantize(codes, codebooks, scales, x.dtype))
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(len(rows), len(codes))
    for tile in tiles:
        torch.mm(rows, dequantize(codes[tile], codebooks, scales[tile], x.dtype).T, out=y[:, tile])
    return y.view(*x.shape[:-1], len(codes))


def input_gradient(dy: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """dy W [..., in] in the type of dy."""
    group_size = codebooks.shape[2]
    rows = dy.reshape(-1, dy.shape[-1])
    dx = dy.new_empty(len(rows), codes.shape[1] * group_size)
    for groups in _tiles(codes.shape[1], group_size * len(codes) * dy.element_size()):
        columns = slice(groups.start * group_size, groups.stop * group_size)
        torch.mm(rows, dequantize(codes[:, groups], codebooks, scales, dy.dtype), out=dx[:, columns])
    return dx.view(*dy.shape[:-1], dx.shape[1])


def weight_gradients(dy: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """dC [M, K, g] and ds [out] in float32; dW is rounded to the type of dy and x."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    codebook_gradient = torch.zeros(codebooks.shape, dtype=torch.float64)
    scale_gradient = torch.empty(scales.shape)
    for tile in _tiles(len(codes), x.shape[1] * x.element_size()):
        dw = dy[:, tile].T @ x  # [tile, in]
        part, scale_gradient[tile] = gradients(dw, codes[tile], codebooks, scales[tile])
        codebook_gradient += part
    return codebook_gradient.float(), scale_gradient


def _tiles(length: int, row_bytes: int) -> Iterator[slice]:
    """Parts of `length` rows of W (or columns), of about TILE_BYTES."""
    return equal_parts(length, length * row_bytes / TILE_BYTES)

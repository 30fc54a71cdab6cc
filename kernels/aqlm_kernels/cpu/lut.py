"""y = x W^T for a few rows of x by table lookup (LUT) in vector registers, for codebooks of at most 256 entries.

For input group j, W multiplies x_j by one of M * K vectors only, so that each code costs one lookup:

    T[j, m, k] = <x_j, C_m[k]>          y_o = s_o * sum over (j, m) of T[j, m, a[o, j, m]]

A table of 256 bytes is four 512-bit registers, and `vpermi2b` of AVX-512 VBMI looks up 64 codes in two of them at once.
So tables are rounded to integers, of two bytes (two sets of such registers) or of one. The least entry of each table
is subtracted first and added back at the end, which costs nothing. A block of at most 32 tables shares one unit and
stays in the first cache; so many bytes fit a 16-bit lane, too. Sums of bytes are kept in such lanes, even and odd bytes
apart: A += word and B += word >> 8, then B is the odd sum and A - (B << 8) the even one. They are integers, hence
exact, and go to float32 once a block.

Codes are read in their order in memory (PackedMatrix.streamed): one long stream is 1.2 times as fast as many short
ones.

Without these instructions, tables stay in float32 and are read one entry at a time: a fifth of the speed.

Threads share the blocks in fixed parts, and the parts are added in order, so the result is the same for any number of
threads. Two-byte units are powers of two: where x and W are small integers, so is everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aqlm_kernels.cpu.avx512 import (
    ENTRIES,
    LANES,
    look_up_1_1,
    look_up_1_2,
    look_up_2_1,
    look_up_2_2,
    look_up_4_1,
    look_up_4_2,
    products_1,
    products_4,
    round_1,
    round_2,
)
from aqlm_kernels.cpu.compile import compiled, prange
from aqlm_kernels.cpu.dequantize import Floats, array
from aqlm_kernels.packed import BLOCK, BUNDLES, PackedMatrix

Bytes = NDArray[np.uint8]
Tiles = NDArray[np.int64]

WIDEST = BUNDLES[0]

PARTS = 4
"""Parts of the sum over the blocks, each with its own sums, for any number of threads."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices that multiply the same x, stacked: equal in inputs, M, K and g, each with its codebooks."""

    codes: Bytes  # [blocks, tiles * size * LANES] as PackedMatrix.streamed, of one matrix after the other in each block
    columns: Floats  # [matrices, M, g, K], the codebooks transposed
    scales: Floats  # [tiles * LANES], 0 where a last tile has no output
    ends: Tiles  # [matrices], tiles up to the end of each

    @classmethod
    def of(cls, matrices: Sequence[PackedMatrix]) -> Stack:
        return cls(
            codes=torch.cat([matrix.streamed for matrix in matrices], dim=1).numpy(),
            columns=torch.stack([matrix.columns for matrix in matrices]).numpy(),
            scales=torch.cat([matrix.tile_scales for matrix in matrices]).numpy(),
            ends=np.cumsum([len(matrix.tile_scales) // LANES for matrix in matrices]),
        )


def by_lookup(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y [rows, out] of x [rows, in], by 16-bit LUTs; rounded once to x's type. K <= 256."""
    return _matmul(x, packed, lut_bytes=2)


def by_float_lookup(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y by float32 LUTs in the cache, without rounding: for machines without the instructions."""
    return _matmul(x, packed, lut_bytes=0)


def by_byte_lookup(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y by 8-bit LUTs: nearly twice as fast, with an error of some percent."""
    return _matmul(x, packed, lut_bytes=1)


def _matmul(x: Tensor, packed: PackedMatrix, lut_bytes: int) -> Tensor:
    columns, scales = packed.columns[None].numpy(), packed.tile_scales.numpy()
    ends = np.array([len(scales) // LANES])
    y = np.empty((x.shape[0], len(scales)), np.float32)
    multiply(array(x), packed.streamed.numpy(), columns, scales, ends, lut_bytes, numba.get_num_threads(), y)
    return torch.from_numpy(y)[:, : packed.out_features].to(x.dtype).contiguous()


@compiled(parallel=True)
def multiply(
    x: Floats,  # [rows, in]
    codes: Bytes,  # as in Stack, these four
    columns: Floats,
    scales: Floats,
    ends: Tiles,
    lut_bytes: int,  # bytes of a LUT entry: 2, 1, or 0 for float32
    threads: int,
    y: Floats,  # [rows, tiles * LANES], becomes the product
) -> None:
    rows, outputs = y.shape
    blocks, size = codes.shape[0], codes.shape[1] // scales.shape[0]
    parts = min(PARTS, blocks)
    pieces = -(-threads // parts)
    sums = np.empty((parts, rows, outputs), np.float32)
    for job in prange(parts * pieces):
        part, piece = job // pieces, job % pieces
        first, last = part * blocks // parts, (part + 1) * blocks // parts
        for matrix in range(ends.shape[0]):
            before = ends[matrix - 1] if matrix else 0
            bundles = -(-(ends[matrix] - before) // WIDEST)
            tile = before + piece * bundles // pieces * WIDEST
            stop = min(before + (piece + 1) * bundles // pieces * WIDEST, ends[matrix])
            if tile < stop:
                sums[part, :, tile * LANES : stop * LANES] = 0
                _sum_blocks(x, codes, size, columns[matrix], lut_bytes, first, last, tile, stop, sums[part])
    for tile in prange(scales.shape[0] // LANES):
        for row in range(rows):
            for o in range(tile * LANES, tile * LANES + LANES):
                total = np.float32(0)
                for part in range(parts):
                    total += sums[part, row, o]
                y[row, o] = scales[o] * total


@compiled()
def _sum_blocks(
    x: Floats,
    codes: Bytes,
    size: int,
    columns: Floats,  # of one matrix
    lut_bytes: int,
    first: int,
    last: int,
    tile: int,
    stop: int,
    sums: Floats,
) -> None:
    """Add to sums `[rows, outputs]` the contribution of blocks first:last to tiles tile:stop; the tables of a block
    stay in the L1 cache meanwhile."""
    exact, bounds = np.empty((BLOCK, ENTRIES), np.float32), np.empty((BLOCK, 2), np.float32)
    tables = np.empty((BLOCK, lut_bytes, ENTRIES), np.uint8)
    number = x.shape[1] // columns.shape[1] * columns.shape[0]  # of tables in all
    for block in range(first, last):
        start = block * size
        count = min(size, number - start)
        for row in range(x.shape[0]):
            if lut_bytes == 0:
                _make_exact(x[row], columns, start, count, exact, bounds)
                _look_up_floats(codes[block], size, exact, tile, stop, count, sums[row])
            else:
                unit, offset = _make_tables(x[row], columns, start, count, exact, bounds, tables)
                _look_up_tiles(codes[block], size, tables, tile, stop, count, row, unit, offset, sums)


@compiled()
def _make_exact(x: Floats, columns: Floats, first: int, count: int, exact: Floats, bounds: Floats) -> None:
    """Compute `count` tables from `first` on, and the minimum and maximum of each."""
    num_codebooks, group_size = columns.shape[:2]
    for m in range(num_codebooks):
        t = (m - first) % num_codebooks  # the first table of the block that belongs to codebook m
        while t < count:
            start = (first + t) // num_codebooks * group_size
            if t + 3 * num_codebooks < count:
                products_4(x, start, columns, m, exact, bounds, t)
                t += 4 * num_codebooks
            else:
                products_1(x, start, columns, m, exact, bounds, t)
                t += num_codebooks


@compiled(fastmath=("contract",))
def _make_tables(
    x: Floats, columns: Floats, first: int, count: int, exact: Floats, bounds: Floats, tables: Bytes
) -> tuple[np.float32, np.float32]:
    """Compute integer tables: T = unit * integer + minimum of T. Returns the unit and the sum of the minima."""
    num_codebooks, group_size = columns.shape[:2]
    lut_bytes = tables.shape[1]
    _make_exact(x, columns, first, count, exact, bounds)
    widest, total = np.float32(0), 0.0
    for t in range(count):
        widest = max(widest, bounds[t, 1] - bounds[t, 0])
        total += bounds[t, 0]
    finite = True
    for i in range(first // num_codebooks * group_size, -(-(first + count) // num_codebooks) * group_size):
        finite &= np.isfinite(x[i])
    unit = _unit(widest, lut_bytes) if finite and widest < np.inf else np.float32(np.nan)
    inverse = np.float32(1) / unit if unit > 0 else np.float32(0)
    for t in range(count):
        shift = np.float32(0.5) - bounds[t, 0] * inverse
        if lut_bytes == 2:
            round_2(exact, t, inverse, shift, tables, t)
        else:
            round_1(exact, t, inverse, shift, tables, t)
    return unit, np.float32(total)


@compiled()
def _unit(widest: np.float32, lut_bytes: int) -> np.float32:
    """Value of one integer step of a table such that `widest` does not exceed the greatest integer."""
    if lut_bytes == 1:
        return widest / np.float32(255)
    mantissa, exponent = math.frexp(widest / np.float32(65535))
    if mantissa == 0:
        return np.float32(0)
    return np.float32(math.ldexp(1.0, max(exponent - (mantissa == 0.5), -120)))


@compiled()
def _bundle(tiles: int) -> int:
    """Number of the remaining tiles to look up together."""
    for width in BUNDLES:
        if width <= tiles:
            return width
    return 0


@compiled()
def _look_up_tiles(
    codes: Bytes,  # of one block
    size: int,
    tables: Bytes,
    tile: int,
    stop: int,
    count: int,
    row: int,
    unit: np.float32,
    offset: np.float32,
    sums: Floats,
) -> None:
    """Add one block's lookups to the sums of tiles tile:stop, bundle after bundle."""
    while tile < stop:
        start = tile * size * LANES
        width = _bundle(stop - tile)
        if tables.shape[1] == 2:
            if width == 4:
                look_up_4_2(codes, start, tables, count, unit, offset, sums, row, tile)
            elif width == 2:
                look_up_2_2(codes, start, tables, count, unit, offset, sums, row, tile)
            else:
                look_up_1_2(codes, start, tables, count, unit, offset, sums, row, tile)
        elif width == 4:
            look_up_4_1(codes, start, tables, count, unit, offset, sums, row, tile)
        elif width == 2:
            look_up_2_1(codes, start, tables, count, unit, offset, sums, row, tile)
        else:
            look_up_1_1(codes, start, tables, count, unit, offset, sums, row, tile)
        tile += width


@compiled()
def _look_up_floats(codes: Bytes, size: int, exact: Floats, tile: int, stop: int, count: int, sums: Floats) -> None:
    """Add one block's lookups in float32 tables, four at a time, which saves three of four updates of the sums."""
    fours = count // 4 * 4
    while tile < stop:
        start = tile * size * LANES
        width = _bundle(stop - tile)
        lanes = width * LANES
        total = sums[tile * LANES : tile * LANES + lanes]
        for t in range(0, fours, 4):
            first, second, third, fourth = exact[t], exact[t + 1], exact[t + 2], exact[t + 3]
            place = start + t * lanes
            a, b = codes[place : place + lanes], codes[place + lanes : place + 2 * lanes]
            c, d = codes[place + 2 * lanes : place + 3 * lanes], codes[place + 3 * lanes : place + 4 * lanes]
            for lane in range(lanes):
                total[lane] += (first[a[lane]] + second[b[lane]]) + (third[c[lane]] + fourth[d[lane]])
        for t in range(fours, count):
            table, place = exact[t], start + t * lanes
            for lane in range(lanes):
                total[lane] += table[codes[place + lane]]
        tile += width

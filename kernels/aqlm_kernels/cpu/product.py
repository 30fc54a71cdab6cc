"""y = x W^T for a few rows of x, straight from the codes; the work is in reading them.

By tables, for codebooks of at most 256 entries. For input group j, all that W can multiply x_j with are M * K vectors:

    T[j, m, k] = <x_j, C_m[k]>          y_o = s_o * sum over (j, m) of T[j, m, a[o, j, m]]

so the tables are computed once, and each code costs one look-up and one addition. By gather, for larger codebooks,
whose tables would cost more than the product: read the entry of each code and multiply.

One thread owns a tile of outputs, and its sums run over j in order: the result does not depend on how many there are.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aqlm_kernels.cpu.compile import compiled, prange
from aqlm_kernels.cpu.dequantize import Floats, array
from aqlm_kernels.packed import PackedMatrix

Bytes = NDArray[np.uint8]
Codes = NDArray[np.uint8] | NDArray[np.uint16]


def by_tables(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y [rows, out] of x [rows, in], in float32, rounded once to x's type; K <= 256."""
    y = torch.empty(x.shape[0], packed.out_features)
    _by_tables(array(x), packed.codes.numpy(), array(packed.codebooks), array(packed.scales), y.numpy())
    return y.to(x.dtype)


def by_gather(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y [rows, out] of x [rows, in], in float32, rounded once to x's type; any K."""
    y = torch.empty(x.shape[0], packed.out_features)
    _by_gather(array(x), packed.codes.numpy(), array(packed.codebooks), array(packed.scales), y.numpy())
    return y.to(x.dtype)


@compiled(parallel=True, fastmath=["contract"])
def _by_tables(x: Floats, codes: Bytes, codebooks: Floats, scales: Floats, y: Floats) -> None:
    tiles, groups, num_codebooks, tile_size = codes.shape
    codebook_size, group_size = codebooks.shape[1:]
    columns = np.ascontiguousarray(codebooks.transpose(0, 2, 1))  # [M, g, K]
    tables = np.empty((groups * num_codebooks, codebook_size), np.float32)
    for row in range(x.shape[0]):
        for j in prange(groups):
            for m in range(num_codebooks):
                _table(x[row, j * group_size : (j + 1) * group_size], columns[m], tables[j * num_codebooks + m])
        for tile in prange(tiles):
            sums = np.zeros(tile_size, np.float32)
            _look_up(codes[tile].reshape(groups * num_codebooks, tile_size), tables, sums)
            _store(sums, scales, tile * tile_size, y[row])


@compiled(fastmath=["contract"])
def _table(x: Floats, columns: Floats, table: Floats) -> None:
    """table[k] = sum_i x[i] * columns[i, k]."""
    table[:] = 0
    for i in range(x.shape[0]):
        for k in range(table.shape[0]):
            table[k] += x[i] * columns[i, k]


@compiled()
def _look_up(codes: Bytes, tables: Floats, sums: Floats) -> None:
    """sums[l] += sum_t tables[t, codes[t, l]], four tables at a time: that saves three of four updates of the sums."""
    fours = codes.shape[0] // 4 * 4
    for t in range(0, fours, 4):
        first, second, third, fourth = tables[t], tables[t + 1], tables[t + 2], tables[t + 3]
        a, b, c, d = codes[t], codes[t + 1], codes[t + 2], codes[t + 3]
        for lane in range(sums.shape[0]):
            sums[lane] += (first[a[lane]] + second[b[lane]]) + (third[c[lane]] + fourth[d[lane]])
    for t in range(fours, codes.shape[0]):
        table, code = tables[t], codes[t]
        for lane in range(sums.shape[0]):
            sums[lane] += table[code[lane]]


@compiled()
def _store(sums: Floats, scales: Floats, first: int, y: Floats) -> None:
    """y[first + l] = scales[first + l] * sums[l], as far as there are outputs."""
    for lane in range(min(sums.shape[0], y.shape[0] - first)):
        y[first + lane] = scales[first + lane] * sums[lane]


@compiled(parallel=True, fastmath=["contract"])
def _by_gather(x: Floats, codes: Codes, codebooks: Floats, scales: Floats, y: Floats) -> None:
    tiles, groups, tile_size = codes.shape[0], codes.shape[1], codes.shape[3]
    group_size = codebooks.shape[2]
    for row in range(x.shape[0]):
        for tile in prange(tiles):
            products = np.zeros((tile_size, group_size), np.float32)
            for j in range(groups):
                _multiply(x[row, j * group_size : (j + 1) * group_size], codes[tile, j], codebooks, products)
            _store(products.sum(axis=1), scales, tile * tile_size, y[row])


@compiled(fastmath=["contract"])
def _multiply(x: Floats, codes: Codes, codebooks: Floats, products: Floats) -> None:
    """products[l, i] += x[i] * sum_m codebooks[m, codes[m, l], i]; the i stay apart, so that they run side by side."""
    for m in range(codes.shape[0]):
        for lane in range(codes.shape[1]):
            entry, product = codebooks[m, codes[m, lane]], products[lane]  # [g]
            for i in range(x.shape[0]):
                product[i] += x[i] * entry[i]

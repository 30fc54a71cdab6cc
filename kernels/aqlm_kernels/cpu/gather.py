"""y = x W^T for a few rows of x and codebooks of many entries: read the entry of each code, and multiply.

Tables as in lookup.py would cost more than the product. One thread owns a tile of outputs, and its sums run over the
input groups in order: the result does not depend on how many threads there are.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aqlm_kernels.cpu.compile import compiled, prange
from aqlm_kernels.cpu.dequantize import Floats, array
from aqlm_kernels.packed import PackedMatrix

Codes = NDArray[np.uint8] | NDArray[np.uint16]


def by_gather(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y [rows, out] of x [rows, in], in float32, rounded once to x's type; any K."""
    y = torch.empty(x.shape[0], packed.out_features)
    _by_gather(array(x), packed.codes.numpy(), array(packed.codebooks), array(packed.scales), y.numpy())
    return y.to(x.dtype)


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


@compiled()
def _store(sums: Floats, scales: Floats, first: int, y: Floats) -> None:
    """y[first + l] = scales[first + l] * sums[l], as far as there are outputs."""
    for lane in range(min(sums.shape[0], y.shape[0] - first)):
        y[first + lane] = scales[first + lane] * sums[lane]

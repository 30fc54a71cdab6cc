"""W from its codes, and gradients of codebooks and scales from one of W: the kernels for many rows of x.

    forward   W[o, j*g + i]    = s_o * w[o, j, i],    w[o, j] = sum_m C_m[a[o, j, m]]
    backward  dC_m[k, i]       = sum over (o, j) with a[o, j, m] = k of  s_o * dW[o, j*g + i]
              ds_o             = sum over (j, i) of  w[o, j, i] * dW[o, j*g + i]

The forward equals `additive.dequantize` bit for bit. The backward is a scatter: many groups add to one entry. Rows are
cut into blocks whose number follows from the shape alone; each block adds in float64 to bins of its own, and the bins
are summed in order. So the result does not depend on the number of threads.

Shapes: M codebooks of K entries, each of g features; n groups per row, o an output, j a group.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aqlm_kernels.cpu.compile import compiled, prange

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Codes = NDArray[np.uint8] | NDArray[np.int32]

ROWS = 16  # of W, dequantized by one thread at a time
MOST_BLOCKS = 16  # of rows in the backward
MOST_BINS = 2**20  # float64 values in all blocks together: 8 MiB


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """W [out, in] in float32, bfloat16 or float16, rounded to nearest even from float32."""
    out_features, in_features = codes.shape[0], codes.shape[1] * codebooks.shape[2]
    parts = codes.contiguous().numpy(), array(codebooks), array(scales)
    if dtype == torch.bfloat16:
        weight = torch.empty(out_features, in_features, dtype=dtype)
        _dequantize_bfloat16(*parts, weight.view(torch.uint16).numpy())
        return weight
    weight = torch.empty(out_features, in_features)
    _dequantize_float32(*parts, weight.numpy())
    return weight.to(dtype)


def gradients(weight_gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """dC [M, K, g] and ds [out] in float64, from dW [out, in]."""
    blocks = max(1, min(MOST_BLOCKS, MOST_BINS // codebooks.numel()))
    bins = torch.zeros(blocks, *codebooks.shape, dtype=torch.float64)
    scale_gradient = torch.empty(scales.shape, dtype=torch.float64)
    _scatter(
        array(weight_gradient),
        codes.contiguous().numpy(),
        array(codebooks),
        array(scales),
        bins.numpy(),
        scale_gradient.numpy(),
    )
    total = bins[0]
    for block in bins[1:]:
        total += block
    return total, scale_gradient


def array(tensor: Tensor) -> Floats:
    """The tensor's values for a kernel: float32, contiguous, copied only if needed."""
    values: Floats = tensor.detach().float().contiguous().numpy()
    return values


@compiled()
def write_row(codes: Codes, codebooks: Floats, scale: np.float32, row: Floats, group_size: int) -> None:
    """One row of W [in] from its codes [n, M]."""
    for j in range(codes.shape[0]):
        group = row[j * group_size : (j + 1) * group_size]  # [g]
        for i in range(group_size):
            group[i] = codebooks[0, codes[j, 0], i]
        for m in range(1, codes.shape[1]):
            for i in range(group_size):
                group[i] += codebooks[m, codes[j, m], i]
        for i in range(group_size):
            group[i] *= scale


@compiled(parallel=True)
def _dequantize_float32(codes: Codes, codebooks: Floats, scales: Floats, weight: Floats) -> None:
    out_features, group_size = codes.shape[0], codebooks.shape[2]
    for tile in prange(-(-out_features // ROWS)):
        for o in range(tile * ROWS, min(tile * ROWS + ROWS, out_features)):
            if group_size == 8:  # as a constant it lets LLVM unroll, which is twice as fast
                write_row(codes[o], codebooks, scales[o], weight[o], 8)
            else:
                write_row(codes[o], codebooks, scales[o], weight[o], group_size)


@compiled(parallel=True)
def _dequantize_bfloat16(codes: Codes, codebooks: Floats, scales: Floats, weight: NDArray[np.uint16]) -> None:
    """The upper 16 bits of float32, after adding half of their unit: ties go to even. NaN is not preserved."""
    out_features, group_size = codes.shape[0], codebooks.shape[2]
    for tile in prange(-(-out_features // ROWS)):
        row = np.empty(weight.shape[1], np.float32)
        bits = row.view(np.uint32)
        for o in range(tile * ROWS, min(tile * ROWS + ROWS, out_features)):
            if group_size == 8:
                write_row(codes[o], codebooks, scales[o], row, 8)
            else:
                write_row(codes[o], codebooks, scales[o], row, group_size)
            for i in range(row.shape[0]):
                odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
                weight[o, i] = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled(parallel=True)
def _scatter(
    weight_gradient: Floats,  # [out, n * g]
    codes: Codes,  # [out, n, M]
    codebooks: Floats,  # [M, K, g]
    scales: Floats,  # [out]
    bins: Doubles,  # [blocks, M, K, g], zeros; becomes dC of every block
    scale_gradient: Doubles,  # [out]
) -> None:
    out_features, blocks = codes.shape[0], bins.shape[0]
    for block in prange(blocks):
        first, last = block * out_features // blocks, (block + 1) * out_features // blocks
        _scatter_rows(weight_gradient, codes, codebooks, scales, first, last, bins[block], scale_gradient)


@compiled()
def _scatter_rows(
    weight_gradient: Floats,
    codes: Codes,
    codebooks: Floats,
    scales: Floats,
    first: int,
    last: int,
    bins: Doubles,  # [M, K, g]
    scale_gradient: Doubles,
) -> None:
    group_size = codebooks.shape[2]
    products = np.empty(group_size, np.float64)  # one sum for each place in a group: they run side by side
    for o in range(first, last):
        scale = np.float64(scales[o])
        products[:] = 0.0
        for j in range(codes.shape[1]):
            gradient = weight_gradient[o, j * group_size : (j + 1) * group_size]  # [g]
            for m in range(codes.shape[2]):
                entry, bin_ = codebooks[m, codes[o, j, m]], bins[m, codes[o, j, m]]  # [g]
                for i in range(group_size):
                    bin_[i] += scale * gradient[i]
                    products[i] += np.float64(entry[i]) * gradient[i]
        scale_gradient[o] = products.sum()

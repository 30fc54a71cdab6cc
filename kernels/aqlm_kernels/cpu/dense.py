"""y = x W^T for a few rows of x and a dense W of 16 bits, or of 8 with a scale a row: an output head, read at the speed
of memory.

The head of a small model is most of what one token reads, and torch reads half-precision weights far below that speed.
One thread owns a tile of rows of W; a row's sum is computed in one way whoever does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from aqlm_kernels.cpu.compile import compiled, instruction, prange
from aqlm_kernels.cpu.dequantize import Floats, array
from aqlm_kernels.errors import KernelError

Words = NDArray[np.uint16]
SignedBytes = NDArray[np.int8]

TILE = 64  # rows of W that a thread takes at a time


@dataclass(frozen=True, eq=False)
class ByteRows:
    """W[o, i] = units[o] * levels[o, i]: a dense matrix in 8 bits."""

    levels: Tensor  # [out, in] int8
    units: Tensor  # [out] float32

    @classmethod
    def of(cls, weight: Tensor) -> ByteRows:  # [out, in]
        """To the nearest of 255 levels of each row, symmetric about zero."""
        weight = weight.detach().float()
        units = weight.abs().amax(1) / 127
        levels = (weight / torch.where(units > 0, units, 1.0)[:, None]).round()
        return cls(levels.to(torch.int8), units)

    def dequantize(self) -> Tensor:
        return self.levels.float() * self.units[:, None]


def matmul_dense(x: Tensor, weight: Tensor | ByteRows) -> Tensor:
    """y [rows, out] of x [rows, in], in float32; W is float32, bfloat16, float16 or ByteRows, on the CPU.

    Raises KernelError for another type of W.
    """
    if isinstance(weight, ByteRows):
        y = torch.empty(x.shape[0], len(weight.levels))
        _by_bytes(array(x), weight.levels.numpy(), weight.units.numpy(), y.numpy())
        return y
    y = torch.empty(x.shape[0], len(weight))
    if weight.dtype == torch.float32:
        _by_floats(array(x), array(weight), y.numpy())
    elif weight.dtype == torch.bfloat16:
        _by_bfloats(array(x), weight.detach().contiguous().view(torch.uint16).numpy(), y.numpy())
    elif weight.dtype == torch.float16:
        _by_halves(array(x), weight.detach().contiguous().view(torch.uint16).numpy(), y.numpy())
    else:
        raise KernelError(f"the weight is {weight.dtype}; convert it to float32, bfloat16 or float16")
    return y


@instruction
def _bfloat(typing_context: Any, bits: Any) -> Any:
    """The float32 whose upper half these 16 bits are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@instruction
def _half(typing_context: Any, bits: Any) -> Any:
    """The float16 of these 16 bits, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@compiled(parallel=True, fastmath=("contract", "reassoc"))
def _by_bfloats(x: Floats, weight: Words, y: Floats) -> None:
    for tile in prange(-(-weight.shape[0] // TILE)):
        for o in range(tile * TILE, min(tile * TILE + TILE, weight.shape[0])):
            for row in range(x.shape[0]):
                total = np.float32(0)
                for i in range(x.shape[1]):
                    total += x[row, i] * _bfloat(weight[o, i])
                y[row, o] = total


@compiled(parallel=True, fastmath=("contract", "reassoc"))
def _by_halves(x: Floats, weight: Words, y: Floats) -> None:
    for tile in prange(-(-weight.shape[0] // TILE)):
        for o in range(tile * TILE, min(tile * TILE + TILE, weight.shape[0])):
            for row in range(x.shape[0]):
                total = np.float32(0)
                for i in range(x.shape[1]):
                    total += x[row, i] * _half(weight[o, i])
                y[row, o] = total


@compiled(parallel=True, fastmath=("contract", "reassoc"))
def _by_floats(x: Floats, weight: Floats, y: Floats) -> None:
    for tile in prange(-(-weight.shape[0] // TILE)):
        for o in range(tile * TILE, min(tile * TILE + TILE, weight.shape[0])):
            for row in range(x.shape[0]):
                total = np.float32(0)
                for i in range(x.shape[1]):
                    total += x[row, i] * weight[o, i]
                y[row, o] = total


@compiled(parallel=True, fastmath=("contract", "reassoc"))
def _by_bytes(x: Floats, levels: SignedBytes, units: Floats, y: Floats) -> None:
    for tile in prange(-(-levels.shape[0] // TILE)):
        for o in range(tile * TILE, min(tile * TILE + TILE, levels.shape[0])):
            for row in range(x.shape[0]):
                total = np.float32(0)
                for i in range(x.shape[1]):
                    total += x[row, i] * np.float32(levels[o, i])
                y[row, o] = units[o] * total

"""y = x W^T for a few rows of x and a dense W of 16 bits, or of 8 with a scale per row: an lm_head at memory bandwidth.

The head of a small model is most of the bytes of a decode step, and torch reads half-precision weights far below the
memory bandwidth. One thread owns a tile of rows of W; the order of a row's sum does not depend on the thread.
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

Weights = NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int16] | NDArray[np.int8]

STORED_AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""Integer types that stand for the two in a kernel: numpy has no bfloat16."""

TILE = 64  # rows of W that a thread takes at a time


@dataclass(frozen=True, eq=False)
class ByteRows:
    """W[o, i] = units[o] * levels[o, i]: a dense matrix in 8 bits."""

    levels: Tensor  # [out, in] int8
    units: Tensor  # [out] float32

    @classmethod
    def of(cls, weight: Tensor) -> ByteRows:  # [out, in]
        """Round to the nearest of 255 levels of each row, symmetric about zero."""
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
        return _matmul(x, weight.levels) * weight.units
    if weight.dtype == torch.float32:
        return _matmul(x, weight.detach().contiguous())
    if weight.dtype in STORED_AS:
        return _matmul(x, weight.detach().contiguous().view(STORED_AS[weight.dtype]))
    raise KernelError(f"the weight is {weight.dtype}; convert it to float32, bfloat16 or float16")


def _matmul(x: Tensor, stored: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], len(stored))
    multiply_dense(array(x), stored.numpy(), y.numpy())
    return y


@instruction
def _number(typing_context: Any, stored: Any) -> Any:
    """Value of a stored weight, as float32: a bfloat16 is stored as uint16, a float16 as int16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, floats = arguments[0], ir.FloatType()
        if stored == types.uint16:
            wide = builder.zext(bits, ir.IntType(32))
            return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), floats)
        if stored == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), floats)
        return builder.sitofp(bits, floats) if stored == types.int8 else bits

    return types.float32(stored), generate


@compiled(parallel=True, fastmath=("contract", "reassoc"))
def multiply_dense(x: Floats, weight: Weights, y: Floats) -> None:
    for tile in prange(-(-weight.shape[0] // TILE)):
        for o in range(tile * TILE, min(tile * TILE + TILE, weight.shape[0])):
            for row in range(x.shape[0]):
                total = np.float32(0)
                for i in range(x.shape[1]):
                    total += x[row, i] * _number(weight[o, i])
                y[row, o] = total

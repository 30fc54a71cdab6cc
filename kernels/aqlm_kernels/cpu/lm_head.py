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

Weights = NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int16] | NDArray[np.int8]

STORED_AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""Integers that tell the two apart in a kernel: numpy has no bfloat16."""

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
        return _product(x, weight.levels) * weight.units
    if weight.dtype == torch.float32:
        return _product(x, weight.detach().contiguous())
    if weight.dtype in STORED_AS:
        return _product(x, weight.detach().contiguous().view(STORED_AS[weight.dtype]))
    raise KernelError(f"the weight is {weight.dtype}; convert it to float32, bfloat16 or float16")


def _product(x: Tensor, stored: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], len(stored))
    _multiply(array(x), stored.numpy(), y.numpy())
    return y


@instruction
def _number(typing_context: Any, stored: Any) -> Any:
    """What a weight stands for, as float32: the 16 bits of a bfloat16 come unsigned, those of a float16 signed."""

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
def _multiply(x: Floats, weight: Weights, y: Floats) -> None:
    for tile in prange(-(-weight.shape[0] // TILE)):
        for o in range(tile * TILE, min(tile * TILE + TILE, weight.shape[0])):
            for row in range(x.shape[0]):
                total = np.float32(0)
                for i in range(x.shape[1]):
                    total += x[row, i] * _number(weight[o, i])
                y[row, o] = total

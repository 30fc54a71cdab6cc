"""The specification of every product: dequantize, then multiply. Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from aqlm_kernels.packed import PackedMatrix


def matmul(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y = x W^T [rows, out] of x [rows, in], computed in float32 (float64 for such x) and rounded once to x's type."""
    working = torch.promote_types(x.dtype, torch.float32)
    weight = packed.matrix.dequantize(working)  # [out, in]
    with torch.autocast(x.device.type, enabled=False):  # which would round the operands
        return (x.to(working) @ weight.T).to(x.dtype)

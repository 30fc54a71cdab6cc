"""y = x W^T on a GPU, straight from the codes.

One row of x is bound by reading codes: a program takes a tile of outputs and a share of the inputs, gathers entries,
and multiplies. More rows are bound by arithmetic: a program restores a piece of W in registers and feeds it to the
tensor cores. W is never written to memory.

Sizes of pieces follow from the shape alone. Shares of the inputs are added in order afterwards, so that results do not
depend on which program finishes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aqlm_kernels.gpu import kernels
from aqlm_kernels.packed import TILE, PackedMatrix

PIECE = 4096
"""Weights that a program restores at once, 32 registers a thread in four warps: more would be spilled."""

PROGRAMS = 512
"""Programs that a product of one row is cut into where it has fewer tiles: a large GPU runs about as many at once."""

LAUNCH = {"num_warps": 4, "num_stages": 1}
"""Without stages: Triton would otherwise bring entries of codebooks through shared memory, up to 100 KiB of it."""

ROWS = 16  # of x in one program of `kernels.multiply`, the least that tensor cores take


@dataclass(frozen=True)
class Sizes:
    """How a product of one row is cut."""

    groups: int  # restored at once
    shares: int  # of the inputs
    share: int  # groups in each but the last


def groups_at_once(group_size: int) -> int:
    """Of one tile; at least 16 inputs, the least that tensor cores take."""
    return max(16 // group_size, PIECE // (TILE * group_size))


def sizes_of(packed: PackedMatrix) -> Sizes:
    tiles, groups = packed.codes.shape[:2]
    at_once = groups_at_once(packed.codebooks.shape[2])
    shares = max(1, min(PROGRAMS // tiles, -(-groups // at_once)))
    share = -(-groups // shares)
    return Sizes(at_once, -(-groups // share), share)


def multiply(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y [rows, out] of x [rows, in], summed in float32; several rows multiply W rounded to the type of x."""
    rows, outputs = x.shape[0], packed.out_features
    tiles, groups, num_codebooks = packed.codes.shape[:3]
    codebook_size, group_size = packed.codebooks.shape[1:]
    x = x.contiguous()
    shape = {"M": num_codebooks, "K": codebook_size, "G": group_size, "TILE": TILE}
    if rows == 0:
        return x.new_empty(0, outputs)
    with _on(x):
        if rows == 1:
            sizes = sizes_of(packed)
            shares = torch.empty(sizes.shares, outputs, dtype=torch.float32, device=x.device)
            kernels.decode[(tiles, sizes.shares)](
                x, packed.codes, packed.codebooks, packed.scales, shares, outputs, groups, sizes.share,
                GROUPS=sizes.groups, **shape, **LAUNCH,
            )  # fmt: skip
            return shares.sum(0)[None].to(x.dtype)
        y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
        at_once = groups_at_once(group_size)
        kernels.multiply[(tiles, triton.cdiv(rows, ROWS))](
            x, packed.codes, packed.codebooks, packed.scales, y, rows, outputs, groups,
            GROUPS=at_once, ROWS=ROWS, **shape, **LAUNCH,
        )  # fmt: skip
        return y


def _on(tensor: Tensor) -> torch.cuda.device:
    """Launches go to the current device, which need not be the tensor's; -1 (no GPU, interpreted) changes nothing."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)

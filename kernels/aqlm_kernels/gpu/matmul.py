"""y = x W^T on a GPU, straight from the codes, and its gradients. W is never written to memory.

One row of x (GEMV) is bound by reading codes: a program takes a tile of outputs and a share of the inputs, gathers
entries, and multiplies. More rows (GEMM) are bound by arithmetic: a program dequantizes a piece of W in registers and
feeds it to the tensor cores.

A few rows read the codes of a PackedMatrix, where those of a tile are side by side; many rows, and gradients, read the
order of AdditiveMatrix, since codes and codebooks change while they are trained.

Sizes of pieces follow from the shape alone. Shares of the inputs are added in order afterwards, so that results do not
depend on which program finishes first. The gradient of the codebooks alone does: many programs add to one entry, in
float32, and the order of these sums is not fixed.

Shapes: M codebooks of K entries, each of g features; n groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from aqlm_kernels.gpu import kernels
from aqlm_kernels.packed import TILE, PackedMatrix

PROGRAMS = 512
"""Programs that a GEMV is cut into if it has fewer tiles: a large GPU runs about as many at once."""


class Cut(NamedTuple):
    """Work of one program at a time: as much as registers hold without spilling (test_gpu.py)."""

    weights: int  # dequantized
    rows: int  # of x or dy; tensor cores take at least 16
    warps: int


ONE_ROW = Cut(weights=4096, rows=1, warps=4)
FEW_ROWS = Cut(weights=4096, rows=16, warps=4)
MANY_ROWS = Cut(weights=4096, rows=128, warps=8)
TRANSPOSED = Cut(weights=2048, rows=64, warps=8)
GRADIENT = Cut(weights=4096, rows=64, warps=8)


class _Steps(NamedTuple):
    """Strides from one code to its neighbour, in codes."""

    tile: int
    lane: int
    group: int
    codebook: int

    @classmethod
    def of(cls, codes: Tensor) -> _Steps:
        """Strides of the codes [out, n, M] of an AdditiveMatrix."""
        groups, num_codebooks = codes.shape[1:]
        return cls(tile=TILE * groups * num_codebooks, lane=groups * num_codebooks, group=num_codebooks, codebook=1)


def shares_of(packed: PackedMatrix) -> tuple[int, int]:
    """Number of shares of the inputs that a GEMV is cut into, and the groups in each but the last."""
    tiles, groups = packed.tiled.shape[:2]
    pieces = triton.cdiv(groups, _groups(packed.codebooks.shape[2], ONE_ROW))
    share = triton.cdiv(groups, max(1, min(PROGRAMS // tiles, pieces)))
    return triton.cdiv(groups, share), share


def multiply(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y [rows, out] of x [rows, in], summed in float32; several rows multiply W rounded to the type of x."""
    tiles, groups, num_codebooks = packed.tiled.shape[:3]
    steps = _Steps(tile=groups * num_codebooks * TILE, lane=1, group=num_codebooks * TILE, codebook=TILE)
    if x.shape[0] != 1:
        return _gemm(x, packed.tiled, packed.codebooks, packed.scales, groups, steps)
    count, share = shares_of(packed)
    with _on(x):
        shares = torch.empty(count, packed.out_features, dtype=torch.float32, device=x.device)
        kernels.decode[(tiles, count)](
            x.contiguous(), packed.tiled, packed.codebooks, packed.scales, shares, packed.out_features, groups,
            share, *steps, **options(packed.codebooks.shape, ONE_ROW),
        )  # fmt: skip
        return shares.sum(0)[None].to(x.dtype)


def gemm(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """x W^T [..., out] in the type of x, from the codes of an AdditiveMatrix."""
    rows = x.reshape(-1, x.shape[-1])
    codes, codebooks, scales = _contiguous(codes, codebooks, scales)
    y = _gemm(rows, codes, codebooks, scales, codes.shape[1], _Steps.of(codes))
    return y.view(*x.shape[:-1], len(scales))


def input_gradient(dy: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """dy W [..., in] in the type of dy."""
    rows, outputs = dy.numel() // dy.shape[-1], dy.shape[-1]
    groups, group_size = codes.shape[1], codebooks.shape[2]
    dx = dy.new_empty(*dy.shape[:-1], groups * group_size)
    if rows == 0:
        return dx
    programs = triton.cdiv(groups, _groups(group_size, TRANSPOSED)), triton.cdiv(rows, TRANSPOSED.rows)
    with _on(dy):
        kernels.multiply_transposed[programs](
            *_contiguous(dy, codes, codebooks, scales), dx, rows, outputs, groups,
            *_Steps.of(codes), **options(codebooks.shape, TRANSPOSED),
        )  # fmt: skip
    return dx


def weight_gradients(dy: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """dC [M, K, g] and ds [out] in float32."""
    rows, outputs, groups = dy.numel() // dy.shape[-1], dy.shape[-1], codes.shape[1]
    pieces = triton.cdiv(groups, _groups(codebooks.shape[2], GRADIENT))
    codebook_gradient = torch.zeros(codebooks.shape, dtype=torch.float32, device=x.device)
    shares = torch.empty(pieces, outputs, dtype=torch.float32, device=x.device)
    with _on(x):
        kernels.weight_gradient[(triton.cdiv(outputs, TILE), pieces)](
            *_contiguous(dy, x, codes, codebooks, scales), codebook_gradient, shares, rows, outputs, groups,
            *_Steps.of(codes), **options(codebooks.shape, GRADIENT),
        )  # fmt: skip
        return codebook_gradient, shares.sum(0)


def _gemm(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, groups: int, steps: _Steps) -> Tensor:
    rows, outputs = x.shape[0], len(scales)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    cut = FEW_ROWS if rows <= FEW_ROWS.rows else MANY_ROWS
    with _on(x):
        kernels.multiply[(triton.cdiv(outputs, TILE), triton.cdiv(rows, cut.rows))](
            x.contiguous(), codes, codebooks, scales, y, rows, outputs, groups, *steps,
            **options(codebooks.shape, cut),
        )  # fmt: skip
    return y


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _groups(group_size: int, cut: Cut) -> int:
    return cut.weights // (TILE * group_size)


def options(codebooks: tuple[int, ...], cut: Cut) -> dict[str, int]:
    """Constants and settings of a launch with codebooks of this shape (M, K, g).

    One stage, since more would move entries of codebooks through shared memory, up to 100 KiB of it.
    """
    num_codebooks, codebook_size, group_size = codebooks
    constants = {"M": num_codebooks, "K": codebook_size, "G": group_size, "TILE": TILE}
    rows = {"ROWS": cut.rows} if cut.rows > 1 else {}
    return {**constants, "GROUPS": _groups(group_size, cut), **rows, "num_warps": cut.warps, "num_stages": 1}


def _on(tensor: Tensor) -> torch.cuda.device:
    """Context that makes the tensor's device current, for launches; -1 (no GPU, interpreted) changes nothing."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)

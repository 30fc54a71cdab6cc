"""Codebooks and scales for given codes: a quadratic problem, solved by a few preconditioned conjugate-gradient steps.

With codes fixed, the objective sum_i s_i^2 r_i H r_i (r_i: row i of W/s minus its approximation) is quadratic in the
M*K*g numbers of the codebooks. Its Hessian A is never formed: A x is "dequantize x, multiply by H, add up by code". The
preconditioner is its g x g block for every entry, sum of s_i^2 H_jj over the groups that use it. Two steps a round do
what a hundred Adam steps do: codes move every round anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_cli.quantization.solvers.code_search import CodeSearch
from aqlm_cli.quantization.solvers.hessian import diagonal_blocks

RIDGE = 1e-6  # of the mean diagonal of A, on all of A: two codebooks can shift a constant between them
BLOCK_RIDGE = 1e-3  # of its own mean diagonal, on each block of the preconditioner: an entry used once has rank one


@dataclass(frozen=True, eq=False)
class Approximation:
    """W[o, j*g : (j+1)*g] = scales[o] * sum_m codebooks[m, codes[o, j, m]]."""

    codes: Tensor  # [out, n, M] int64
    codebooks: Tensor  # [M, K, g] float32
    scales: Tensor  # [out] float32


def starting_scales(weight: Tensor) -> Tensor:
    """Row norms `[out]`; no row of zeros divides by zero."""
    norms = weight.norm(dim=1)
    return torch.where((norms > 0) & (norms < 1e-6), norms, norms + 1e-9)  # which would be felt in the norms left out


def improve_codebooks(
    weights: Tensor,  # [out, in], divided by the scales
    damped: Tensor,  # H [in, in]
    present: Approximation,
    steps: int,
    search: CodeSearch,
) -> Approximation:
    """The codebooks after `steps` conjugate-gradient steps from the present ones."""
    codes, (_, entries, group) = present.codes, present.codebooks.shape
    row_weights = present.scales.square()  # [out]
    blocks = _hessian_blocks(damped, codes, row_weights, entries, group)  # [M, K, g, g] float64
    ridge = RIDGE * blocks.diagonal(dim1=2, dim2=3).mean()
    inverse = _inverse(blocks, ridge)

    def gather(matrix: Tensor) -> Tensor:  # [out, in] -> [M, K, g]
        return search.gradients(matrix, codes, present.codebooks, row_weights)[0].double()

    residual = gather((weights - search.expand(present.codebooks, codes)) @ damped)
    step = torch.zeros_like(residual)
    direction = torch.zeros_like(residual)
    previous = torch.ones((), dtype=torch.float64, device=residual.device)
    for _ in range(steps):
        scaled = (inverse @ residual[..., None])[..., 0]
        energy = (residual * scaled).sum()
        if energy <= 0:
            break
        direction = scaled + (energy / previous) * direction
        image = gather(search.expand(direction.float(), codes) @ damped) + ridge * direction
        length = energy / (direction * image).sum()
        step += length * direction
        residual -= length * image
        previous = energy
    return Approximation(codes, (present.codebooks + step).float(), present.scales)


def _hessian_blocks(damped: Tensor, codes: Tensor, row_weights: Tensor, entries: int, group: int) -> Tensor:
    """sum_{i, j: entry k of codebook m is used} s_i^2 H_jj, through the summed weights of every (j, k)."""
    n = codes.shape[1]
    corners = diagonal_blocks(damped, group).double().flatten(1)  # [n, g * g]
    index = torch.arange(n, device=codes.device) * entries + codes.permute(2, 0, 1)  # [M, out, n]
    each = row_weights.double()[:, None].expand(-1, n).flatten()
    used = torch.stack([torch.bincount(one.flatten(), each, n * entries) for one in index])  # [M, n * K]
    return (used.view(-1, n, entries).transpose(1, 2) @ corners).view(-1, entries, group, group)


def _inverse(blocks: Tensor, ridge: Tensor) -> Tensor:
    """Inverses `[M, K, g, g]`; zero for an entry that no code uses, which therefore stays as it is."""
    mean = blocks.diagonal(dim1=2, dim2=3).mean(2)  # [M, K]
    unused = mean == 0
    identity = torch.eye(blocks.shape[2], dtype=blocks.dtype, device=blocks.device)
    extra = torch.where(unused, torch.ones_like(mean), ridge + BLOCK_RIDGE * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(blocks + extra[..., None, None] * identity))
    return inverse.masked_fill(unused[..., None, None], 0)


def improve_scales(weight: Tensor, damped: Tensor, present: Approximation, search: CodeSearch) -> Approximation:
    """Every row's best scale: s = (w H v) / (v H v); kept where v is (almost) zero in that metric, or w is."""
    normalised = search.expand(present.codebooks, present.codes)  # [out, in]
    image = normalised @ damped
    bottom = (image * normalised).sum(1, dtype=torch.float64)
    top = (image * weight).sum(1, dtype=torch.float64)
    scales = torch.where((bottom > 1e-20) & (top != 0), top / bottom.clamp_min(1e-20), present.scales.double()).float()
    return Approximation(present.codes, present.codebooks, scales)

"""Entropy-calibrated levels (ICQ of IR-QLoRA, arXiv 2402.05445): the shift of a group that uses its codes most evenly.

    W[o, i] ~ s T[q] + tau,   q = nearest level of (w - tau) / s,   s = max |w - tau|

with T a table such as NF4. Of 201 shifts tau = median + f max |w - median|, f from -0.1/1.848 to 0.1/1.848, the one is
taken whose codes have the highest entropy - sum_c p_c log p_c; of equals the first. No inputs are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.solvers import grids, level_tables
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.methods.information import InformationSettings
from aqlm_cli.spec.schemes import LevelScheme
from aqlm_kernels import LevelMatrix
from aqlm_kernels.matrices.level import levels

CHUNK_WEIGHTS = 2**20
"""Weights that are tried together, so that memory does not grow with the matrix."""


@torch.no_grad()
def quantize(
    weight: Tensor,
    statistics: LayerStatistics,
    scheme: LevelScheme,
    rng: torch.Generator,
    settings: InformationSettings,
) -> LevelMatrix:
    """Quantize W `[out, in]` float32. Nothing is drawn. Raises QuantizationError where W holds NaN or infinity."""
    if not bool(weight.isfinite().all()):
        raise QuantizationError("the weight holds NaN or infinite values")
    groups = weight.view(-1, scheme.group_size)  # [out * n, g]
    table = levels(scheme.table, scheme.bits)
    rows = max(1, CHUNK_WEIGHTS // scheme.group_size)
    shifts = torch.cat([most_even_shifts(part, table, settings.shifts, settings.reach) for part in groups.split(rows)])
    shifts = shifts.view(len(weight), -1)
    sizes = (groups.view(*shifts.shape, -1) - shifts[..., None]).abs().amax(2)
    return level_tables.of_reach(sizes, shifts, scheme, weight.shape[1]).nearest(weight)


def most_even_shifts(groups: Tensor, table: Tensor, count: int, reach: float) -> Tensor:
    """tau `[n]` of groups `[n, g]`: the first of `count` shifts around the median whose codes have the most entropy."""
    median = groups.quantile(0.5, dim=1)
    span = (groups - median[:, None]).abs().amax(1)
    middles = (table[1:] + table[:-1]) / 2
    often = torch.arange(groups.shape[1] + 1, dtype=torch.float64)
    unevenness = often.mul(often.clamp_min(1).log())  # c log c of a code that c weights have
    least = torch.full_like(median, torch.inf, dtype=torch.float64)
    best = median.clone()
    for factor in torch.linspace(-reach, reach, count, dtype=torch.float64).tolist():
        shift = median + factor * span
        found = entropy_cost(groups, shift, middles, unevenness)
        better = found < least
        least, best = torch.where(better, found, least), torch.where(better, shift, best)
    return best


def entropy_cost(groups: Tensor, shift: Tensor, middles: Tensor, unevenness: Tensor) -> Tensor:
    """sum over codes of c log c `[n]`: g log g less g times the entropy, so that the least has the most entropy."""
    centred = groups - shift[:, None]
    codes = torch.bucketize(centred / grids.divisor(centred.abs().amax(1))[:, None], middles)
    counts = torch.zeros(len(groups), len(middles) + 1, dtype=torch.int64)
    counts.scatter_add_(1, codes, torch.ones_like(codes))
    return unevenness[counts].sum(1)

"""GPTQ (arXiv 2210.17323): uniform grids, every column rounded while the errors of those before it are made up for.

    minimise  sum_o  (w_o - v_o) H (w_o - v_o)^T        v_oi = s_oj (q_oi - z_oj),  j the group of input i

Each column is rounded to the level nearest to the value that makes up for the errors before it. The paper has the
Cholesky factor of H^-1 for that, and here it is the LDL of H (solvers/hessian.py), which gives the same. The grid of a
group is fitted when its first column is reached, to the values that its columns have then.

In the order `active` the groups with the most active inputs come first, and in each its most active inputs. Groups are
of consecutive inputs still, so that no permutation is stored. Where a group is the whole row, that is the act-order of
GPTQ's code; with more groups, that one scatters the inputs of a group over the matrix, and is not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.solvers import grids
from aqlm_cli.quantization.solvers.hessian import LayerStatistics, block_ldl, columns_most_active_first
from aqlm_cli.quantization.solvers.ldlq import sweep_columns
from aqlm_cli.spec.methods.gptq import GptqSettings
from aqlm_cli.spec.schemes import UniformScheme
from aqlm_kernels import UniformMatrix
from aqlm_kernels.matrices.uniform import grid_exponent


class Fit(NamedTuple):
    """The choice of a grid: of these shares of the range, that of the least sum |w - v|^power."""

    shares: tuple[float, ...]
    power: float


FITS: Mapping[str, Fit] = {
    "minmax": Fit(grids.WHOLE, 2.0),
    "norm2.4": Fit(tuple(1 - step / 100 for step in range(80)), 2.4),  # as GPTQ's code searches where it is asked to
}

ORDERS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "active": columns_most_active_first,
    "none": lambda hessian, group: torch.arange(len(hessian), device=hessian.device),
}
"""H and group size -> columns `[in]` in the order in which they are rounded; groups stay whole."""


@torch.no_grad()
def quantize(
    weight: Tensor, statistics: LayerStatistics, scheme: UniformScheme, rng: torch.Generator, settings: GptqSettings
) -> UniformMatrix:
    """Quantize W `[out, in]` float32. Nothing is drawn. Raises QuantizationError where W or H hold NaN or infinity."""
    if not bool(weight.isfinite().all()):
        raise QuantizationError("the weight holds NaN or infinite values; the model is damaged")
    hessian = statistics.second_moment
    if not bool(hessian.isfinite().all()):
        raise QuantizationError("its inputs hold NaN or infinite values; the model is damaged or overflows")
    columns = ORDERS[settings.order](hessian, scheme.group_size)  # [in]
    feedback = block_ldl(hessian[columns][:, columns], 1, settings.damping)
    rounder = GridRounder(weight, scheme, columns, FITS[settings.grid])
    sweep_columns(weight[:, columns], feedback, rounder)
    return rounder.matrix()


class GridRounder:
    """Rounds columns to the grids of their groups, each fitted to the values that the errors before it leave."""

    def __init__(self, weight: Tensor, scheme: UniformScheme, columns: Tensor, fit: Fit) -> None:
        """`columns` are those of W `[out, in]` in the order of the sweep. The exponent of all scales is that of W."""
        self.span, self._bits, self._top, self._fit = scheme.group_size, scheme.bits, 2**scheme.bits - 1, fit
        self._columns: list[int] = columns.tolist()
        low, high = grids.extremes(weight.view(len(weight), -1, self.span))
        self._exponent = grid_exponent((high - low) / self._top)
        self._steps, self._zeros = torch.zeros_like(low), torch.zeros_like(low)  # [out, n]
        self._levels = torch.zeros_like(weight, dtype=torch.uint8)  # [out, in]

    def enter(self, first: int, values: Tensor) -> None:
        """Fit the grid of the group that column `first` of the sweep begins."""
        steps, zeros = grids.shrunk(values[:, None], self._top, self._exponent, self._fit.shares, power=self._fit.power)
        j = self._columns[first] // self.span
        self._steps[:, j], self._zeros[:, j] = steps[:, 0], zeros[:, 0]

    def column(self, i: int, values: Tensor) -> Tensor:
        """The nearest points of the grid; the levels are kept."""
        j = self._columns[i] // self.span
        step, zero = self._steps[:, j], self._zeros[:, j]
        level = (values / grids.divisor(step)).add_(zero).round_().clamp_(0, self._top)
        self._levels[:, self._columns[i]] = level
        return step * (level - zero)

    def matrix(self) -> UniformMatrix:
        """The matrix of what was rounded."""
        scales = torch.ldexp(self._steps, -self._exponent).half()
        bits = torch.tensor(self._bits, dtype=torch.uint8)
        return UniformMatrix(self._levels, self._zeros.to(torch.uint8), scales, bits, self._exponent)

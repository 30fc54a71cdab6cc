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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.solvers import grids, level_tables
from aqlm_cli.quantization.solvers.hessian import LayerStatistics, block_ldl, columns_most_active_first
from aqlm_cli.quantization.solvers.ldlq import ColumnRounder, sweep_columns
from aqlm_cli.spec.methods.gptq import GptqSettings
from aqlm_cli.spec.schemes import LevelScheme, Scheme, UniformScheme
from aqlm_kernels import LevelMatrix, Matrix, UniformMatrix
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
    weight: Tensor, statistics: LayerStatistics, scheme: Scheme, rng: torch.Generator, settings: GptqSettings
) -> Matrix:
    """Quantize W `[out, in]` float32. Nothing is drawn. Raises QuantizationError where W or H hold NaN or infinity."""
    if not bool(weight.isfinite().all()):
        raise QuantizationError("the weight holds NaN or infinite values; the model is damaged")
    hessian = statistics.second_moment
    if not bool(hessian.isfinite().all()):
        raise QuantizationError("its inputs hold NaN or infinite values; the model is damaged or overflows")
    columns = ORDERS[settings.order](hessian, scheme.group_size)  # [in]
    feedback = block_ldl(hessian[columns][:, columns], 1, settings.damping)
    rounder = ROUNDERS[scheme.kind](weight, scheme, columns, settings)
    sweep_columns(weight[:, columns], feedback, rounder)
    return rounder.matrix()


class Rounder(ColumnRounder, Protocol):
    """A rounder that keeps what it rounds."""

    def matrix(self) -> Matrix:
        """The matrix of what was rounded."""


class GridRounder:
    """Rounds columns to the grids of their groups, each fitted to the values that the errors before it leave."""

    def __init__(self, weight: Tensor, scheme: UniformScheme, columns: Tensor, settings: GptqSettings) -> None:
        """`columns` are those of W `[out, in]` in the order of the sweep. The exponent of all scales is that of W."""
        self.span, self._bits, self._top = scheme.group_size, scheme.bits, 2**scheme.bits - 1
        self._fit = FITS[settings.grid]
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


class LevelRounder:
    """Rounds columns to a table of levels, which reach over the values of a group; no other size is tried."""

    def __init__(self, weight: Tensor, scheme: LevelScheme, columns: Tensor, settings: GptqSettings) -> None:
        """Take what GridRounder takes."""
        self.span, self._columns = scheme.group_size, columns.tolist()
        self._scheme = scheme
        groups = weight.view(len(weight), -1, self.span)
        self._matrix = level_tables.of_reach(*level_tables.reach(groups, scheme), scheme, weight.shape[1])
        self._table = self._matrix.levels
        self._middles = (self._table[1:] + self._table[:-1]) / 2

    def enter(self, first: int, values: Tensor) -> None:
        """Fit scale and shift of the group that column `first` of the sweep begins."""
        j, whole = self._columns[first] // self.span, self._matrix
        here = level_tables.of_reach(
            *level_tables.reach(values[:, None], self._scheme), self._scheme, self.span, whole.exponent
        )
        whole.scales[:, j] = here.scales[:, 0]
        self._scale = torch.ldexp(here.scales[:, 0].float(), whole.exponent)
        self._shift = torch.zeros_like(self._scale)
        if whole.shifts is not None and here.shifts is not None:
            whole.shifts[:, j] = here.shifts[:, 0]
            self._shift = torch.ldexp(here.shifts[:, 0].float(), whole.exponent)

    def column(self, i: int, values: Tensor) -> Tensor:
        """The nearest levels; the codes are kept."""
        codes = torch.bucketize((values - self._shift) / grids.divisor(self._scale), self._middles)
        self._matrix.codes[:, self._columns[i]] = codes.to(torch.uint8)
        return self._scale * self._table[codes] + self._shift

    def matrix(self) -> LevelMatrix:
        """The matrix of what was rounded."""
        return self._matrix


ROUNDERS: Mapping[str, Callable[[Tensor, Any, Tensor, GptqSettings], Rounder]] = {
    "uniform": GridRounder,
    "level": LevelRounder,
}
"""Rounders by the kind of scheme: W, scheme, columns in the order of the sweep, settings."""

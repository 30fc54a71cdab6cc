"""Round to nearest: the baseline that shows what a method wins. Every group of a row gets its own grid or scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.solvers import grids, level_tables
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.schemes import LevelScheme, Scheme, UniformScheme
from aqlm_kernels import LevelMatrix, Matrix, UniformMatrix
from aqlm_kernels.matrices.uniform import grid_exponent


def quantize(
    weight: Tensor, statistics: LayerStatistics, scheme: Scheme, rng: torch.Generator, settings: None
) -> Matrix:
    """Grids and levels that reach over all weights of a group. Statistics are not looked at, and nothing is drawn."""
    if not bool(weight.isfinite().all()):
        raise QuantizationError("the weight holds NaN or infinite values")
    return FAMILIES[scheme.kind](weight, scheme)


def _uniform(weight: Tensor, scheme: UniformScheme) -> UniformMatrix:
    """Asymmetric min-max grids."""
    top = 2**scheme.bits - 1
    groups = weight.view(len(weight), -1, scheme.group_size)  # [out, n, g]
    low, high = grids.extremes(groups)
    exponent = grid_exponent((high - low) / top)
    steps, zeros = grids.shrunk(groups, top, exponent, grids.WHOLE)
    scales = torch.ldexp(steps, -exponent).half()
    levels, bits = torch.zeros_like(weight, dtype=torch.uint8), torch.tensor(scheme.bits, dtype=torch.uint8)
    return UniformMatrix(levels, zeros.to(torch.uint8), scales, bits, exponent).nearest(weight)


def _levels(weight: Tensor, scheme: LevelScheme) -> LevelMatrix:
    """The largest size of a group for its scale; with a shift, from the middle of its range."""
    sizes, shifts = level_tables.reach(weight.view(len(weight), -1, scheme.group_size), scheme)
    empty = level_tables.of_reach(sizes, shifts, scheme, weight.shape[1])
    return level_tables.ROUNDED[scheme.table](empty, weight)


FAMILIES: Mapping[str, Callable[[Tensor, Any], Matrix]] = {"uniform": _uniform, "level": _levels}
"""Rounding, by the kind of scheme."""

"""Round to nearest: the baseline that shows what a method wins. Every group of a row gets its own uniform grid."""

from __future__ import annotations

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.solvers import grids
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.schemes import UniformScheme
from aqlm_kernels import UniformMatrix
from aqlm_kernels.matrices.uniform import grid_exponent


def quantize(
    weight: Tensor, statistics: LayerStatistics, scheme: UniformScheme, rng: torch.Generator, settings: None
) -> UniformMatrix:
    """Asymmetric min-max grids. The inputs' statistics are not looked at, and nothing is drawn."""
    if not bool(weight.isfinite().all()):
        raise QuantizationError("the weight holds NaN or infinite values")
    top = 2**scheme.bits - 1
    groups = weight.view(len(weight), -1, scheme.group_size)  # [out, n, g]
    low, high = grids.extremes(groups)
    exponent = grid_exponent((high - low) / top)
    steps, zeros = grids.shrunk(groups, top, exponent, grids.WHOLE)
    scales = torch.ldexp(steps, -exponent).half()
    levels, bits = torch.zeros_like(weight, dtype=torch.uint8), torch.tensor(scheme.bits, dtype=torch.uint8)
    return UniformMatrix(levels, zeros.to(torch.uint8), scales, bits, exponent).nearest(weight)

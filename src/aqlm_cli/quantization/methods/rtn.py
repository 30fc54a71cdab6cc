"""Round to nearest: the baseline that shows what a method wins. Every group of a row gets its own uniform grid."""

from __future__ import annotations

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
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
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)  # zero stays exact
    wanted = (high - low) / top  # [out, n]
    exponent = grid_exponent(wanted)
    scales = torch.ldexp(wanted, -exponent).half()
    step = torch.ldexp(scales.float(), exponent)
    step = torch.where(scales > 0, step, 1.0)  # what is too small for a float16 scale becomes zero
    zeros = (-low / step).round().clamp(0, top).to(torch.uint8)
    levels, bits = torch.zeros_like(weight, dtype=torch.uint8), torch.tensor(scheme.bits, dtype=torch.uint8)
    return UniformMatrix(levels, zeros, scales, bits, exponent).nearest(weight)

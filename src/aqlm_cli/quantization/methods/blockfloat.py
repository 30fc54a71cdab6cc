"""Block floating point (arXiv 2310.05079): every block of g inputs of a row is rounded below an exponent of its own.

- bfp: e = ceil(log2 max |w|), v = sign(w) 2^e clip(rnd(|w| 2^(M-e)), 0, 2^M - 1) / 2^M;
- bmf: the highest exponent of a number meets floor(log2 max |w|); mantissas are rounded, at most to the largest number;
- bl: e = ceil(log2 max |w|), v = sign(w) 2^rnd(log2 |w|), within the 2^(W-1) powers up to 2^e.

rnd is half to even. Blocks of zeros stay zero. Published code holds floor(log2 max |w|) of bmf at 0 and above, which
leaves blocks below 1 few numbers; here it follows the block. No inputs are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.schemes import BlockFloatScheme
from aqlm_kernels import BlockFloatMatrix
from aqlm_kernels.matrices.blockfloat import NOTHING, magnitudes, of_blocks

EXPONENTS = -127, 127


@torch.no_grad()
def quantize(
    weight: Tensor, statistics: LayerStatistics, scheme: BlockFloatScheme, rng: torch.Generator, settings: None
) -> BlockFloatMatrix:
    """Quantize W `[out, in]` float32. Nothing is drawn. Raises QuantizationError where W holds NaN or infinity."""
    if not bool(weight.isfinite().all()):
        raise QuantizationError("the weight holds NaN or infinite values")
    groups = weight.view(len(weight), -1, scheme.group_size)  # [out, n, g]
    largest = groups.abs().amax(2)
    exponents = HIGHEST[scheme.form_name](largest).clamp(*EXPONENTS)
    sizes = torch.ldexp(groups.abs(), -exponents[..., None])  # at most about 1, or 2 for minifloats
    rounded = ROUNDED[scheme.form_name](sizes, scheme)
    table = magnitudes(scheme.form_name, scheme.width, scheme.own)
    index = torch.searchsorted(table, rounded.clamp(float(table[0]), float(table[-1])))
    codes = index + len(table) * (groups < 0)
    exponents = torch.where(largest == 0, NOTHING, exponents)
    return of_blocks(scheme.form_name, scheme.width, scheme.own, codes.flatten(1), exponents)


def _ceil_log2(largest: Tensor) -> Tensor:
    fraction, exponent = torch.frexp(largest)  # largest = fraction 2^exponent with 0.5 <= fraction < 1
    ceiling: Tensor = exponent - (fraction == 0.5).to(exponent.dtype)
    return ceiling


def _floor_log2(largest: Tensor) -> Tensor:
    return torch.frexp(largest).exponent - 1


def _fixed_point(sizes: Tensor, scheme: BlockFloatScheme) -> Tensor:
    steps = 2.0 ** (scheme.width - 1)
    return (sizes * steps).round() / steps


def _minifloat(sizes: Tensor, scheme: BlockFloatScheme) -> Tensor:
    mantissa, lowest = scheme.width - 1 - scheme.own, 2 - 2**scheme.own  # the exponent of f = 1, where 0 is the highest
    step = _floor_log2(sizes).clamp_min(lowest) - mantissa
    return torch.ldexp(torch.ldexp(sizes, -step).round(), step)


def _power(sizes: Tensor, scheme: BlockFloatScheme) -> Tensor:
    """Half to even in log2; what is 0 has the least power."""
    least = 1 - 2 ** (scheme.width - 1)
    exponent = sizes.log2().clamp_min(least).round().clamp_max(0)
    return torch.ldexp(torch.ones_like(sizes), exponent.int())


HIGHEST: Mapping[str, Callable[[Tensor], Tensor]] = {"bfp": _ceil_log2, "bmf": _floor_log2, "bl": _ceil_log2}
"""The exponent of a block by its largest size, for each form."""

ROUNDED: Mapping[str, Callable[[Tensor, BlockFloatScheme], Tensor]] = {
    "bfp": _fixed_point,
    "bmf": _minifloat,
    "bl": _power,
}
"""Sizes, as multiples of the power of their block, to those that the form has; the largest are cut off later."""

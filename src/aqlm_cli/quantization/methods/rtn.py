"""Round to nearest: the baseline that shows what a method wins. Every group of a row gets its own uniform grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.config import SearchConfig
from aqlm_cli.spec.schemes import Scheme, UniformScheme
from aqlm_kernels.matrices.balance import HIGHEST, LOWEST


@dataclass(frozen=True, eq=False)
class UniformMatrix:
    """W[o, j*g + i] = 2^exponent scales[o, j] (levels[o, j*g + i] - zeros[o, j]), levels and zeros in [0, 2^bits)."""

    levels: Tensor  # [out, in] uint8
    zeros: Tensor  # [out, in/g] uint8
    scales: Tensor  # [out, in/g] float16
    level_bits: Tensor  # [] uint8
    exponent: Tensor  # [] int16; 0 wherever the scales are in the range of float16

    kind = "uniform"

    @property
    def group_size(self) -> int:
        return self.levels.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W `[out, in]`."""
        steps = self.levels.float() - self.zeros.float().repeat_interleave(self.group_size, 1)
        scales = torch.ldexp(self.scales.float(), self.exponent)
        return (steps * scales.repeat_interleave(self.group_size, 1)).to(dtype)

    def stored(self) -> UniformMatrix:
        """Itself, for it is made in the form in which it is stored."""
        return self

    def bits(self) -> int:
        """Levels and zeros at the grid's bits, scales at 16."""
        return int(self.level_bits) * (self.levels.numel() + self.zeros.numel()) + 16 * self.scales.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> UniformMatrix:
        exponent = tensors.get("exponent", torch.tensor(0, dtype=torch.int16))  # which files had none of at first
        return cls(tensors["levels"], tensors["zeros"], tensors["scales"], tensors["level_bits"], exponent)


def quantize(
    weight: Tensor, statistics: LayerStatistics, scheme: Scheme, rng: torch.Generator, settings: SearchConfig
) -> UniformMatrix:
    """Asymmetric min-max grids. The inputs' statistics are not looked at, and nothing is drawn."""
    assert isinstance(scheme, UniformScheme)
    if not bool(weight.isfinite().all()):
        raise QuantizationError("the weight holds NaN or infinite values")
    top = 2**scheme.bits - 1
    groups = weight.view(len(weight), -1, scheme.group_size)  # [out, n, g]
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)  # zero stays exact
    wanted = (high - low) / top  # [out, n]
    exponent = _exponent(wanted)
    scales = torch.ldexp(wanted, -exponent).half()
    step = torch.ldexp(scales.float(), exponent)
    step = torch.where(scales > 0, step, 1.0)  # what is too small for a float16 scale becomes zero
    zeros = (-low / step).round().clamp(0, top)
    levels = (groups / step[..., None] + zeros[..., None]).round().clamp(0, top)
    return UniformMatrix(
        levels.flatten(1).to(torch.uint8),
        zeros.to(torch.uint8),
        scales,
        torch.tensor(scheme.bits, dtype=torch.uint8),
        exponent,
    )


def _exponent(scales: Tensor) -> Tensor:
    """e of the power of two that brings scales * 2^-e into the range of float16: the nearest to 0.

    Where they reach over more than the range, the largest are held.
    """
    sizes = scales[scales > 0]
    if not len(sizes) or not bool(sizes.isfinite().all()):
        return torch.tensor(0, dtype=torch.int16)
    lowest = int(sizes.max().frexp().exponent) - HIGHEST
    held = sizes[sizes >= 2.0 ** (lowest - 25)]
    highest = int(held.min().frexp().exponent) - LOWEST
    return torch.tensor(max(min(0, highest), lowest), dtype=torch.int16)

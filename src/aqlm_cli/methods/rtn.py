"""Round to nearest: the baseline that shows what a method wins. Every group of a row gets its own uniform grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_cli.config import SearchConfig
from aqlm_cli.errors import QuantizationError
from aqlm_cli.methods.statistics import LayerStatistics
from aqlm_cli.scheme import Scheme, UniformScheme


@dataclass(frozen=True, eq=False)
class UniformMatrix:
    """W[o, j*g + i] = scales[o, j] * (levels[o, j*g + i] - zeros[o, j]), with levels and zeros in [0, 2^bits)."""

    levels: Tensor  # [out, in] uint8
    zeros: Tensor  # [out, in/g] uint8
    scales: Tensor  # [out, in/g] float16
    level_bits: Tensor  # [] uint8

    kind = "uniform"

    @property
    def group_size(self) -> int:
        return self.levels.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W `[out, in]`."""
        steps = self.levels.float() - self.zeros.float().repeat_interleave(self.group_size, 1)
        return (steps * self.scales.float().repeat_interleave(self.group_size, 1)).to(dtype)

    def bits(self) -> int:
        """Levels and zeros at the grid's bits, scales at 16."""
        return int(self.level_bits) * (self.levels.numel() + self.zeros.numel()) + 16 * self.scales.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"levels": self.levels, "zeros": self.zeros, "scales": self.scales, "level_bits": self.level_bits}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> UniformMatrix:
        return cls(tensors["levels"], tensors["zeros"], tensors["scales"], tensors["level_bits"])


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
    scales = ((high - low) / top).half()  # [out, n]
    step = torch.where(scales > 0, scales.float(), 1.0)  # what is too small for a float16 scale becomes zero
    zeros = (-low / step).round().clamp(0, top)
    levels = (groups / step[..., None] + zeros[..., None]).round().clamp(0, top)
    return UniformMatrix(
        levels.flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales, torch.tensor(scheme.bits, dtype=torch.uint8)
    )

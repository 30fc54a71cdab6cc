"""UniformMatrix: a weight matrix on uniform grids, one for each group of a row's inputs.

A row of W is cut into groups of g consecutive weights. Each group has a grid of 2^bits points with one step, the scale,
and one point that is zero. At 2 bits and g = 64 the levels take 2 bits a weight, scale and zero 18 / 64 more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from aqlm_kernels.compressed import CompressedLinear
from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.balance import HIGHEST, LOWEST, float16_holds, to_float16
from aqlm_kernels.matrices.bitpack import pack_bits, unpack_bits


@dataclass(frozen=True, eq=False)
class UniformMatrix:
    """W[o, j*g + i] = 2^exponent scales[o, j] (levels[o, j*g + i] - zeros[o, j]), levels and zeros in [0, 2^bits).

    The zeros are stored as integers of `bits` bits, so that only the scales are continuous. Scales are float16 where
    they are stored, and may be float32 while they are trained.
    """

    levels: Tensor  # [out, in] uint8
    zeros: Tensor  # [out, in/g] uint8
    scales: Tensor  # [out, in/g] float16
    level_bits: Tensor  # [] uint8
    exponent: Tensor  # [] int16; 0 wherever the scales are in the range of float16

    kind = "uniform"
    learnable = ("scales",)

    @property
    def out_features(self) -> int:
        return self.levels.shape[0]

    @property
    def in_features(self) -> int:
        return self.levels.shape[1]

    @property
    def group_size(self) -> int:
        return self.levels.shape[1] // self.scales.shape[1]

    @property
    def scheme(self) -> str:
        return f"int{int(self.level_bits)}g{self.group_size}"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W `[out, in]`, differentiable in the scales."""
        steps = self.levels.float() - self.zeros.float().repeat_interleave(self.group_size, 1)
        scales = torch.ldexp(self.scales.float(), self.exponent)
        return (steps * scales.repeat_interleave(self.group_size, 1)).to(dtype)

    def rows(self, index: Tensor) -> UniformMatrix:
        """The matrix of these rows `[n]`."""
        levels, zeros, scales = (tensor.index_select(0, index) for tensor in (self.levels, self.zeros, self.scales))
        return replace(self, levels=levels, zeros=zeros, scales=scales)

    def stored(self) -> UniformMatrix:
        """The matrix with its scales in float16."""
        return replace(self, scales=self.scales.half())

    def balanced(self) -> UniformMatrix:
        """The same matrix with scales in the range of float16; itself where they are."""
        sizes = self.scales.abs()
        if float16_holds(sizes):
            return self
        shift = grid_exponent(sizes)
        exponent = (self.exponent + shift).to(self.exponent.dtype)
        return replace(self, scales=torch.ldexp(self.scales, -shift), exponent=exponent)

    def nearest(self, weight: Tensor) -> UniformMatrix:
        """The same grids with the level nearest to each weight of W `[out, in]`."""
        step = torch.ldexp(self.scales.float(), self.exponent)
        step = torch.where(step != 0, step, 1.0)  # what is too small for a float16 scale becomes zero
        groups = weight.view(len(weight), -1, self.group_size)  # [out, n, g]
        top = 2 ** int(self.level_bits) - 1
        levels = (groups / step[..., None] + self.zeros.float()[..., None]).round().clamp(0, top)
        return replace(self, levels=levels.flatten(1).to(torch.uint8))

    def module(self, bias: Tensor | None = None) -> CompressedLinear:
        """The layer that computes with the dequantized weight."""
        return CompressedLinear(self, bias)

    def bits(self) -> int:
        """Levels and zeros at the grid's bits, scales at 16."""
        return int(self.level_bits) * (self.levels.numel() + self.zeros.numel()) + 16 * self.scales.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> UniformMatrix:
        exponent = tensors.get("exponent", torch.tensor(0, dtype=torch.int16))  # which early files lack
        return cls(tensors["levels"], tensors["zeros"], tensors["scales"], tensors["level_bits"], exponent)

    def packed_tensors(self) -> dict[str, Tensor]:
        """Levels and zeros in their order in memory at the grid's bits each, scales `[out, in/g]` in float16.

        The exponent is stored even where it is 0, so that names and shapes follow from the scheme. Raises KernelError
        where float16 cannot hold the scales.
        """
        bits = int(self.level_bits)
        return {
            "levels": pack_bits(self.levels.flatten(), bits),
            "zeros": pack_bits(self.zeros.flatten(), bits),
            "scales": to_float16(self.scales, "scales"),
            "exponent": self.exponent,
        }

    @classmethod
    def from_packed(cls, tensors: Mapping[str, Tensor], word: str) -> UniformMatrix:
        """The matrix of `packed_tensors`; KernelError where they are not of the scheme of the word, such as int4g64."""
        found, scales = re.fullmatch(r"int([1-8])g(\d{1,9})", word, flags=re.ASCII), tensors["scales"]
        exponent = tensors["exponent"]
        if exponent.shape != () or exponent.dtype != torch.int16:
            raise KernelError(f"the exponent is {list(exponent.shape)} of {exponent.dtype}, not one int16")
        if found is None or scales.ndim != 2 or not scales.is_floating_point():
            described = f"scales {list(scales.shape)} of {scales.dtype} and scheme {word[:80]}"
            raise KernelError(f"{described} are not those of a uniform matrix")
        bits, group_size = map(int, found.groups())
        (rows, groups), device = scales.shape, scales.device
        return cls(
            levels=unpack_bits(tensors["levels"], bits, rows * groups * group_size).view(rows, groups * group_size),
            zeros=unpack_bits(tensors["zeros"], bits, rows * groups).view(rows, groups),
            scales=scales,
            level_bits=torch.tensor(bits, dtype=torch.uint8, device=device),
            exponent=exponent,
        )


def grid_exponent(scales: Tensor) -> Tensor:
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

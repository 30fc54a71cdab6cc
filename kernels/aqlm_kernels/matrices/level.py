"""LevelMatrix: a weight matrix on a fixed table of levels, scaled and perhaps shifted for each group of a row.

The table follows from its name and its bits, and is not stored.

- `nf`, NormalFloat (QLoRA, arXiv 2305.14314): quantiles of the normal distribution, from -1 to 1, with an exact 0.
- `cube` (arXiv 2403.06408): T[q] = ((q - m) / m)^3 for q from 0 to 2m, m = 2^(bits - 1) - 1. So W is rounded after
  companding by the cube root, which leaves small weights fine levels. Code 2^bits - 1 has no level of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from aqlm_kernels.compressed import CompressedLinear
from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.balance import float16_holds, to_float16
from aqlm_kernels.matrices.bitpack import pack_bits, unpack_bits
from aqlm_kernels.matrices.uniform import grid_exponent


def _normal_float(bits: int) -> Tensor:
    """2^(bits-1) quantiles above 0, one less below, and 0, over the largest of them; rising.

    Probabilities are rounded to 7 digits and spaced in float32, so that the table of 4 bits is QLoRA's to the bit.
    """
    count = 2 ** (bits - 1)
    tail = round(1 - (1 / (2 * count - 1) + 1 / (2 * count)) / 4, 7)
    above, below = (torch.linspace(tail, 0.5, n + 1)[:-1].double() for n in (count, count - 1))
    values = torch.cat([torch.special.ndtri(above), torch.zeros(1), -torch.special.ndtri(below)]).sort().values.float()
    table: Tensor = values / values.max()
    return table


def _cube(bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    cubes: Tensor = (torch.arange(-top, top + 1, dtype=torch.float64) / top) ** 3
    return cubes


TABLES: Mapping[str, Callable[[int], Tensor]] = {"nf": _normal_float, "cube": _cube}
"""Tables by name: bits a code -> rising levels `[at most 2^bits]` with -1 and 1 at the ends."""

_NAMES = tuple(TABLES)
_WORD = re.compile(rf"({'|'.join(TABLES)})([2-8])(t?)(?:g(\d{{1,9}}))?", flags=re.ASCII)


@cache
def levels(name: str, bits: int) -> Tensor:
    """The table of this name, rising, in float32; the same tensor each time."""
    return TABLES[name](bits).float()


@dataclass(frozen=True, eq=False)
class LevelMatrix:
    """W[o, j*g + i] = 2^exponent (scales[o, j] T[codes[o, j*g + i]] + shifts[o, j]); without shifts they are 0."""

    codes: Tensor  # [out, in] uint8
    scales: Tensor  # [out, in/g] float16
    shifts: Tensor | None  # [out, in/g] float16
    code_bits: Tensor  # [] uint8
    table: Tensor  # [] uint8: place of its name in TABLES
    exponent: Tensor  # [] int16; 0 wherever scales and shifts are in the range of float16

    kind = "level"

    @property
    def learnable(self) -> tuple[str, ...]:
        return ("scales",) if self.shifts is None else ("scales", "shifts")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def levels(self) -> Tensor:
        """T, on the device of the codes."""
        return levels(_NAMES[int(self.table)], int(self.code_bits)).to(self.codes.device)

    @property
    def scheme(self) -> str:
        shift = "" if self.shifts is None else "t"
        group = "" if self.scales.shape[1] == 1 else f"g{self.group_size}"
        return f"{_NAMES[int(self.table)]}{int(self.code_bits)}{shift}{group}"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W `[out, in]`, differentiable in scales and shifts."""
        weight = self.levels[self.codes.int()] * self._spread(self.scales)
        return (weight if self.shifts is None else weight + self._spread(self.shifts)).to(dtype)

    def rows(self, index: Tensor) -> LevelMatrix:
        """The matrix of these rows `[n]`."""
        shifts = None if self.shifts is None else self.shifts.index_select(0, index)
        codes, scales = self.codes.index_select(0, index), self.scales.index_select(0, index)
        return replace(self, codes=codes, scales=scales, shifts=shifts)

    def stored(self) -> LevelMatrix:
        """The matrix with scales and shifts in float16."""
        return replace(self, scales=self.scales.half(), shifts=None if self.shifts is None else self.shifts.half())

    def balanced(self) -> LevelMatrix:
        """The same matrix with scales and shifts in the range of float16; itself where they are."""
        sizes = torch.cat([tensor.abs().flatten() for tensor in (self.scales, self.shifts) if tensor is not None])
        if float16_holds(sizes):
            return self
        shift = grid_exponent(sizes)
        return replace(
            self,
            scales=torch.ldexp(self.scales, -shift),
            shifts=None if self.shifts is None else torch.ldexp(self.shifts, -shift),
            exponent=(self.exponent + shift).to(self.exponent.dtype),
        )

    def nearest(self, weight: Tensor) -> LevelMatrix:
        """The same scales and shifts with the level nearest to each weight of W `[out, in]`."""
        scales = self._spread(self.scales)
        left = weight if self.shifts is None else weight - self._spread(self.shifts)
        places = left / torch.where(scales != 0, scales, 1.0)  # what is too small for a float16 scale becomes zero
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return replace(self, codes=torch.bucketize(places, middles).to(torch.uint8))

    def module(self, bias: Tensor | None = None) -> CompressedLinear:
        """The layer that computes with the dequantized weight."""
        return CompressedLinear(self, bias)

    def bits(self) -> int:
        """Codes at their bits, scales and shifts at 16."""
        numbers = self.scales.numel() * (1 if self.shifts is None else 2)
        return int(self.code_bits) * self.codes.numel() + 16 * numbers

    def tensors(self) -> dict[str, Tensor]:
        shifts = {} if self.shifts is None else {"shifts": self.shifts}
        numbers = {"code_bits": self.code_bits, "table": self.table, "exponent": self.exponent}
        return {"codes": self.codes, "scales": self.scales, **shifts, **numbers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LevelMatrix:
        numbers = (tensors[name] for name in ("code_bits", "table", "exponent"))
        return cls(tensors["codes"], tensors["scales"], tensors.get("shifts"), *numbers)

    def packed_tensors(self) -> dict[str, Tensor]:
        """Codes in their order in memory at their bits, scales and shifts `[out, in/g]` in float16, and the exponent.

        Raises KernelError where float16 cannot hold them.
        """
        shifts = {} if self.shifts is None else {"shifts": to_float16(self.shifts, "shifts")}
        return {
            "codes": pack_bits(self.codes.flatten(), int(self.code_bits)),
            "scales": to_float16(self.scales, "scales"),
            **shifts,
            "exponent": self.exponent,
        }

    @classmethod
    def from_packed(cls, tensors: Mapping[str, Tensor], word: str) -> LevelMatrix:
        """The matrix of `packed_tensors`; KernelError where they are not of the scheme of the word, such as nf4g64.

        A word without a group has one for the whole row; the number of inputs then follows from the bytes of codes.
        """
        found, scales, exponent = _WORD.fullmatch(word), tensors["scales"], tensors["exponent"]
        if exponent.shape != () or exponent.dtype != torch.int16:
            raise KernelError(f"the exponent is {list(exponent.shape)} of {exponent.dtype}, not one int16")
        if found is None or scales.ndim != 2 or not scales.is_floating_point() or not len(scales):
            described = f"scales {list(scales.shape)} of {scales.dtype} and scheme {word[:80]}"
            raise KernelError(f"{described} are not those of a matrix of levels")
        shifts = tensors["shifts"] if found[3] else None
        if shifts is not None and (shifts.shape != scales.shape or not shifts.is_floating_point()):
            raise KernelError(f"shifts {list(shifts.shape)} of {shifts.dtype} do not fit scales {list(scales.shape)}")
        bits, (rows, groups) = int(found[2]), scales.shape
        if found[4] is None and groups != 1:
            raise KernelError(f"scheme {word} has one scale a row, found {groups}")
        features = groups * int(found[4]) if found[4] else tensors["codes"].shape[-1] * 8 // bits // rows
        codes = unpack_bits(tensors["codes"], bits, rows * features).view(rows, features)
        highest, known = int(codes.max()), len(levels(found[1], bits))
        if highest >= known:
            raise KernelError(f"the largest code is {highest}, scheme {word} has {known} levels")
        return replace(of_levels(found[1], bits, scales, shifts, exponent, 0), codes=codes)

    def _spread(self, numbers: Tensor) -> Tensor:
        """Numbers `[out, in/g]` for each weight, with the power of two: `[out, in]`."""
        return torch.ldexp(numbers.float(), self.exponent).repeat_interleave(self.group_size, 1)


def of_levels(
    name: str, bits: int, scales: Tensor, shifts: Tensor | None, exponent: Tensor, inputs: int
) -> LevelMatrix:
    """A matrix `[out, inputs]` of this table with the codes still to be chosen, by `nearest`."""
    codes = torch.zeros(len(scales), inputs, dtype=torch.uint8, device=scales.device)
    code_bits, table = codes.new_tensor(bits), codes.new_tensor(_NAMES.index(name))
    return LevelMatrix(codes, scales, shifts, code_bits, table, exponent)

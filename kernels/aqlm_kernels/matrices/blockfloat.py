"""BlockFloatMatrix: a weight matrix in blocks of a row's inputs that share an exponent of 8 bits (arXiv 2310.05079).

A code has a sign and the index of a magnitude in a table T, which follows from its form and width, and is not stored:

- `bfp`, block floating point: T[k] = k / 2^M, M = width - 1, below the shared 2^e;
- `bmf`, block minifloat: E bits of an exponent f of its own and M = width - 1 - E of a mantissa m, with subnormal
  numbers and no infinities: T = (1 + m / 2^M) 2^(f - F), for f = 0 m / 2^M 2^(1 - F), F = 2^E - 1 the highest;
- `bl`, block logarithm: T[k] = 2^(k - K), K = 2^(width - 1) - 1 the highest; it has no zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor

from aqlm_kernels.compressed import CompressedLinear
from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.bitpack import pack_bits, unpack_bits

FORMS = ("bfp", "bmf", "bl")
"""Forms in the order in which a matrix counts them."""

NOTHING = -128
"""The exponent of a block of zeros. All others are exponents as they are."""

_WORD = re.compile(r"(?:(bfp|bl)([2-8])|(bmf)([3-8])e([1-6]))g(\d{1,9})", flags=re.ASCII)


@cache
def magnitudes(form: str, width: int, own: int) -> Tensor:
    """T `[2^(width - 1)]`, rising, in float32; `own` are the bits E of a minifloat's exponent, 0 for other forms."""
    index = torch.arange(2 ** (width - 1))
    if form == "bfp":
        return index / 2.0 ** (width - 1)
    if form == "bl":
        return torch.ldexp(torch.ones(len(index)), index - (len(index) - 1))
    mantissa = width - 1 - own
    field, fraction = index >> mantissa, (index & (2**mantissa - 1)) / 2**mantissa
    return torch.ldexp(fraction + (field > 0), field.clamp_min(1) - (2**own - 1))


@dataclass(frozen=True, eq=False)
class BlockFloatMatrix:
    """W[o, j*g + i] = +-T[k] 2^exponents[o, j]: k the low bits of codes[o, j*g + i], - where its highest bit is set.

    Nothing in it is continuous.
    """

    codes: Tensor  # [out, in] uint8
    exponents: Tensor  # [out, in/g] int8, NOTHING for a block of zeros
    form: Tensor  # [] uint8: place of the form in FORMS
    width: Tensor  # [] uint8: bits of a code
    own: Tensor  # [] uint8: bits of a minifloat's exponent, 0 for other forms

    kind = "blockfloat"
    learnable = ()

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.exponents.shape[1]

    @property
    def magnitudes(self) -> Tensor:
        """T, on the device of the codes."""
        return magnitudes(FORMS[int(self.form)], int(self.width), int(self.own)).to(self.codes.device)

    @property
    def scheme(self) -> str:
        own = f"e{int(self.own)}" if int(self.own) else ""
        return f"{FORMS[int(self.form)]}{int(self.width)}{own}g{self.group_size}"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W `[out, in]`."""
        table = self.magnitudes
        signed = torch.cat([table, -table])[self.codes.int()]
        exponents = self.exponents.int().repeat_interleave(self.group_size, 1)
        weight = torch.ldexp(signed, exponents)
        return torch.where(exponents == NOTHING, 0.0, weight).to(dtype)

    def rows(self, index: Tensor) -> BlockFloatMatrix:
        """The matrix of these rows `[n]`."""
        return replace(self, codes=self.codes.index_select(0, index), exponents=self.exponents.index_select(0, index))

    def stored(self) -> BlockFloatMatrix:
        """The matrix itself: it has no number that a checkpoint would round."""
        return self

    def balanced(self) -> BlockFloatMatrix:
        """The matrix itself."""
        return self

    def nearest(self, weight: Tensor) -> BlockFloatMatrix:
        """The same exponents with the magnitude nearest to each weight of W `[out, in]`."""
        exponents = self.exponents.int().repeat_interleave(self.group_size, 1)
        sizes = torch.ldexp(weight.abs(), -exponents)
        table = self.magnitudes
        index = torch.bucketize(sizes, (table[1:] + table[:-1]) / 2)
        return replace(self, codes=(index + len(table) * (weight < 0)).to(torch.uint8))

    def module(self, bias: Tensor | None = None) -> CompressedLinear:
        """The layer that computes with the dequantized weight."""
        return CompressedLinear(self, bias)

    def bits(self) -> int:
        """Codes at their width, exponents at 8."""
        return int(self.width) * self.codes.numel() + 8 * self.exponents.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> BlockFloatMatrix:
        return cls(*(tensors[field.name] for field in fields(cls)))

    def packed_tensors(self) -> dict[str, Tensor]:
        """Codes in their order in memory at their width, exponents `[out, in/g]` in int8."""
        return {"codes": pack_bits(self.codes.flatten(), int(self.width)), "exponents": self.exponents}

    @classmethod
    def from_packed(cls, tensors: Mapping[str, Tensor], word: str) -> BlockFloatMatrix:
        """The matrix of `packed_tensors`; KernelError where they are not of the scheme of the word, such as bfp6g16."""
        found, exponents = _WORD.fullmatch(word), tensors["exponents"]
        if found is None or exponents.ndim != 2 or exponents.dtype != torch.int8:
            described = f"exponents {list(exponents.shape)} of {exponents.dtype} and scheme {word[:80]}"
            raise KernelError(f"{described} are not those of a block float matrix")
        form, width, own = found[1] or found[3], int(found[2] or found[4]), int(found[5] or 0)
        rows, features = exponents.shape[0], exponents.shape[1] * int(found[6])
        codes = unpack_bits(tensors["codes"], width, rows * features).view(rows, features)
        return of_blocks(form, width, own, codes, exponents)


def of_blocks(form: str, width: int, own: int, codes: Tensor, exponents: Tensor) -> BlockFloatMatrix:
    """The matrix of these codes `[out, in]` and exponents `[out, n]`."""
    numbers = (torch.tensor(one, dtype=torch.uint8, device=codes.device) for one in (FORMS.index(form), width, own))
    return BlockFloatMatrix(codes.to(torch.uint8), exponents.to(torch.int8), *numbers)

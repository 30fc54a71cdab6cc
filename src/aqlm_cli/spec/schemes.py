"""Scheme: what a treatment of a weight matrix costs, as pure arithmetic.

Two families, each written as one short word. `2x8g8` is additive: every group of 8 inputs is the sum of 2 vectors, each
one of 2^8 entries of a codebook. `int2g64` is uniform: every group of 64 inputs shares one scale and zero point, and
each weight is an integer of 2 bits.

Sizes count everything a checkpoint must hold to restore the weights. Code bits count the indices alone: the figure
people quote. Both are always shown side by side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from aqlm_cli.errors import UsageError

BITS_PER_FLOAT = 16
"""Codebooks and scales are stored as float16."""


def _check_range(scheme: object, what: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise UsageError(f"scheme {scheme}: {value} {what}; choose {lowest} to {highest}")


def _uneven_groups(in_features: int, group_size: int) -> str | None:
    if in_features % group_size:
        return f"{in_features} input features are not a multiple of the group size {group_size}"
    return None


@dataclass(frozen=True)
class AdditiveScheme:
    """`MxBgG`: W[o, j*G:(j+1)*G] = scales[o] * sum over M codebooks of one of their 2^B entries of G floats each."""

    num_codebooks: int
    codebook_bits: int
    group_size: int

    def __post_init__(self) -> None:
        _check_range(self, "codebooks", self.num_codebooks, 1, 8)
        _check_range(self, "bits a code", self.codebook_bits, 1, 16)
        _check_range(self, "inputs a group", self.group_size, 1, 64)

    def __str__(self) -> str:
        return f"{self.num_codebooks}x{self.codebook_bits}g{self.group_size}"

    @property
    def codebook_size(self) -> int:
        """Entries of one codebook, 2^B."""
        return 1 << self.codebook_bits

    @property
    def code_bits(self) -> float:
        """Bits of the codes alone per weight, M*B/g."""
        return self.num_codebooks * self.codebook_bits / self.group_size

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of one `[out, in]` matrix: codes at B bits each, codebooks and row scales at 16."""
        codes = out_features * (in_features // self.group_size) * self.num_codebooks * self.codebook_bits
        codebooks = BITS_PER_FLOAT * self.num_codebooks * self.codebook_size * self.group_size
        return codes + codebooks + BITS_PER_FLOAT * out_features

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """M*B/g + 16*M*2^B*g/(out*in) + 16/in.

        Not covered: layers that stay as they are; see the plan for the whole model.
        """
        return self.stored_bits(out_features, in_features) / (out_features * in_features)

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this shape cannot be stored so, or None."""
        return _uneven_groups(in_features, self.group_size)


@dataclass(frozen=True)
class UniformScheme:
    """`intBgG`: W[o, i] = scale * (q - zero); G inputs of a row share scale and zero; q and zero have B bits."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        _check_range(self, "bits a weight", self.bits, 2, 8)
        _check_range(self, "inputs a group", self.group_size, 1, 1024)

    def __str__(self) -> str:
        return f"int{self.bits}g{self.group_size}"

    @property
    def code_bits(self) -> float:
        """Bits of the integers alone per weight."""
        return float(self.bits)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of one `[out, in]` matrix: every weight, and 16 + B for scale and zero point of every group."""
        groups = out_features * (in_features // self.group_size)
        return out_features * in_features * self.bits + groups * (BITS_PER_FLOAT + self.bits)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """B + (16 + B)/g."""
        return self.stored_bits(out_features, in_features) / (out_features * in_features)

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this shape cannot be stored so, or None."""
        return _uneven_groups(in_features, self.group_size)


Scheme: TypeAlias = AdditiveScheme | UniformScheme

SCHEMES_BY_BITS = {
    1.0: AdditiveScheme(1, 8, 8),
    1.5: AdditiveScheme(3, 8, 16),
    2.0: AdditiveScheme(2, 8, 8),
    2.5: AdditiveScheme(5, 8, 16),
    3.0: AdditiveScheme(3, 8, 8),
    4.0: AdditiveScheme(4, 8, 8),
}
"""Code bits to the additive scheme that `--bits` means: 8-bit codebooks, which every backend decodes fast."""


def parse_scheme(text: str) -> Scheme:
    """The scheme that prints as `text`; UsageError if there is none."""
    if additive := re.fullmatch(r"(\d+)x(\d+)g(\d+)", text, flags=re.ASCII):
        return AdditiveScheme(*map(int, additive.groups()))
    if uniform := re.fullmatch(r"int(\d+)g(\d+)", text, flags=re.ASCII):
        return UniformScheme(*map(int, uniform.groups()))
    raise UsageError(
        f"scheme {text!r} is not understood; write CODEBOOKSxBITSgGROUP such as 2x8g8, or intBITSgGROUP such as int2g64"
    )


def scheme_for_bits(bits: float) -> AdditiveScheme:
    """The additive scheme whose code bits are exactly `bits`; UsageError names the nearest that exist."""
    if bits in SCHEMES_BY_BITS:
        return SCHEMES_BY_BITS[bits]
    below = [known for known in SCHEMES_BY_BITS if known < bits]
    above = [known for known in SCHEMES_BY_BITS if known > bits]
    neighbours = [f"{known:g} ({SCHEMES_BY_BITS[known]})" for known in below[-1:] + above[:1]]
    nearest = " and ".join(neighbours) if neighbours else ", ".join(f"{known:g}" for known in SCHEMES_BY_BITS)
    raise UsageError(f"no scheme has {bits:g} code bits; nearest: {nearest}; or say it exactly with --scheme")

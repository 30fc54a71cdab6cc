"""Scheme: what a treatment of a weight matrix costs, as pure arithmetic.

Families of schemes, each written as one short word, one file and one row in `FAMILIES` each. `2x8g8` is additive: every
group of 8 inputs is the sum of 2 vectors, each one of 2^8 entries of a codebook. `int2g64` is uniform: every group of
64 inputs shares one scale and zero point, and each weight is an integer of 2 bits. `nf4g64` is of levels: each weight
is one of 16 levels of a fixed table, times a scale for 64 inputs. `bfp6g16` is of block floats: 16 inputs share an
exponent, below which each weight has a sign and 5 bits. `3x8g8+int4g64r512` is refined: the error of 512 rows
is stored once more, for embeddings and heads, whose rows are tokens and used very unequally.

Sizes count everything a checkpoint must hold to restore the weights. Code bits count the indices alone: the figure
people quote. Both are always shown side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.schemes.additive import AdditiveScheme
from aqlm_cli.spec.schemes.base import BITS_PER_FLOAT, Scheme, StoredTensor, total_bytes
from aqlm_cli.spec.schemes.blockfloat import BlockFloatScheme
from aqlm_cli.spec.schemes.level import LevelScheme
from aqlm_cli.spec.schemes.refined import RefinedScheme
from aqlm_cli.spec.schemes.uniform import UniformScheme

__all__ = [
    "BITS_PER_FLOAT",
    "FAMILIES",
    "SCHEMES_BY_BITS",
    "AdditiveScheme",
    "BlockFloatScheme",
    "LevelScheme",
    "RefinedScheme",
    "Scheme",
    "StoredTensor",
    "UniformScheme",
    "parse_scheme",
    "scheme_for_bits",
    "total_bytes",
]


class Family(Protocol):
    """The schemes of one kind."""

    @property
    def form(self) -> str:
        """The form of its word, with an example."""

    def parse(self, text: str) -> Scheme | None:
        """The scheme that prints as `text`, or None where `text` has another form."""


FAMILIES: Mapping[str, Family] = {
    "additive": AdditiveScheme,
    "uniform": UniformScheme,
    "level": LevelScheme,
    "blockfloat": BlockFloatScheme,
    "refined": RefinedScheme,
}
"""Families of schemes, by the kind of matrix."""

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
    """The scheme that prints as `text`; UsageError where no family has it."""
    for family in FAMILIES.values():
        if (scheme := family.parse(text)) is not None:
            return scheme
    forms = ", or ".join(family.form for family in FAMILIES.values())
    raise UsageError(f"scheme {text!r} is not understood; write {forms}")


def scheme_for_bits(bits: float) -> AdditiveScheme:
    """The additive scheme whose code bits are exactly `bits`; UsageError names the nearest that exist."""
    if bits in SCHEMES_BY_BITS:
        return SCHEMES_BY_BITS[bits]
    below = [known for known in SCHEMES_BY_BITS if known < bits]
    above = [known for known in SCHEMES_BY_BITS if known > bits]
    neighbours = [f"{known:g} ({SCHEMES_BY_BITS[known]})" for known in below[-1:] + above[:1]]
    nearest = " and ".join(neighbours) if neighbours else ", ".join(f"{known:g}" for known in SCHEMES_BY_BITS)
    raise UsageError(f"no scheme has {bits:g} code bits; nearest: {nearest}; or say it exactly with --scheme")

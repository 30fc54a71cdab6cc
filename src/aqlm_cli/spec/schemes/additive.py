"""Additive schemes: `2x8g8` has 2 codebooks of 2^8 entries for groups of 8 inputs.

`2x8g8c8` is the same with codebooks in 8 bits instead of 16. In a small matrix they are a large part of its bits: at
width 576 the codebooks of `2x8g8` take 6 % of a model's blocks.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from aqlm_cli.spec.schemes.base import BITS_PER_FLOAT, StoredTensor, check_range, packed_integers, uneven_groups


@dataclass(frozen=True)
class AdditiveScheme:
    """`MxBgG`: W[o, j*G:(j+1)*G] = scales[o] * sum over M codebooks of one of their 2^B entries of G floats each.

    The floats have 16 bits, or in `MxBgGc8` 8 bits and a range for each of the G places in a codebook.
    """

    num_codebooks: int
    codebook_bits: int
    group_size: int
    entry_bits: int = BITS_PER_FLOAT

    kind = "additive"
    form = "CODEBOOKSxBITSgGROUP such as 2x8g8, with c8 behind it for codebooks in 8 bits"

    def __post_init__(self) -> None:
        check_range(self, "codebooks", self.num_codebooks, 1, 8)
        check_range(self, "bits a code", self.codebook_bits, 1, 16)
        check_range(self, "inputs a group", self.group_size, 1, 64)
        assert self.entry_bits in (8, BITS_PER_FLOAT)  # no word says anything else

    def __str__(self) -> str:
        entries = "" if self.entry_bits == BITS_PER_FLOAT else f"c{self.entry_bits}"
        return f"{self.num_codebooks}x{self.codebook_bits}g{self.group_size}{entries}"

    @classmethod
    def parse(cls, text: str) -> AdditiveScheme | None:
        """The scheme that prints as `text`, or None."""
        found = re.fullmatch(r"(\d+)x(\d+)g(\d+)(c8)?", text, flags=re.ASCII)
        if found is None:
            return None
        return cls(int(found[1]), int(found[2]), int(found[3]), 8 if found[4] else BITS_PER_FLOAT)

    @property
    def codebook_shape(self) -> tuple[int, int, int]:
        """Codebooks, entries of each, inputs a group."""
        return self.num_codebooks, self.codebook_size, self.group_size

    @property
    def finer(self) -> AdditiveScheme | None:
        """The scheme with codebooks in 16 bits; None where they have them."""
        return None if self.entry_bits == BITS_PER_FLOAT else replace(self, entry_bits=BITS_PER_FLOAT)

    @property
    def codebook_size(self) -> int:
        """Entries of one codebook, 2^B."""
        return 1 << self.codebook_bits

    @property
    def code_bits(self) -> float:
        """Bits of the codes alone per weight, M*B/g."""
        return self.num_codebooks * self.codebook_bits / self.group_size

    def bound(self, in_features: int) -> AdditiveScheme:
        """The scheme itself."""
        return self

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of one `[out, in]` matrix: codes at B bits each, codebooks at 16 or 8, row scales and ranges at 16."""
        codes = out_features * (in_features // self.group_size) * self.num_codebooks * self.codebook_bits
        codebooks = self.entry_bits * self.num_codebooks * self.codebook_size * self.group_size
        ranges = math.prod(self._ranges) if self._ranges else 0
        return codes + codebooks + BITS_PER_FLOAT * (ranges + out_features)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """M*B/g + 16*M*2^B*g/(out*in) + 16/in; with codebooks in 8 bits M*B/g + (8*2^B + 16)*M*g/(out*in) + 16/in.

        Not covered: layers that stay as they are; see the plan for the whole model.
        """
        return self.stored_bits(out_features, in_features) / (out_features * in_features)

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Return the reason why a matrix of this shape cannot be stored so, or None."""
        return uneven_groups(in_features, self.group_size)

    def stored_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Codes in one byte or in four, codebooks and scales in float32, since block fitting continues from there."""
        codes = "uint8" if self.codebook_bits <= 8 else "int32"
        indices = (out_features, in_features // self.group_size, self.num_codebooks)
        bits = {"entry_bits": StoredTensor("uint8", (), values=self.entry_bits + 1)} if self._ranges else {}
        return {
            "codes": StoredTensor(codes, indices, values=self.codebook_size),
            "codebooks": StoredTensor("float32", self.codebook_shape),
            "scales": StoredTensor("float32", (out_features,)),
            **bits,
        }

    def packed_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """The layout of the `aqlm` inference package: codes take one byte up to 8 bits and two up to 16.

        Codebooks in 8 bits have 16 there: float16 holds their rounded entries.
        """
        codes = "int8" if self.codebook_bits <= 8 else "int16"
        indices = (out_features, in_features // self.group_size, self.num_codebooks)
        entries = (self.num_codebooks, self.codebook_size, 1, self.group_size)
        return {
            "codes": StoredTensor(codes, indices),
            "codebooks": StoredTensor("float16", entries),
            "scales": StoredTensor("float16", (out_features, 1, 1, 1)),
        }

    def native_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Codes of B bits each, codebooks and row scales in float16; or codebooks in int8, their ranges in float16."""
        codes = out_features * (in_features // self.group_size) * self.num_codebooks
        return {
            "codes": packed_integers(codes, self.codebook_bits),
            "codebooks": StoredTensor("int8" if self._ranges else "float16", self.codebook_shape),
            **({"ranges": StoredTensor("float16", self._ranges)} if self._ranges else {}),
            "scales": StoredTensor("float16", (out_features,)),
        }

    def peak_bytes(self, out_features: int, in_features: int) -> int:
        """Two float64 matrices [in, in] in the factorisation and some of float32; later, copies of the weight."""
        return max(26 * in_features**2, 9 * in_features**2 + 22 * out_features * in_features)

    @property
    def _ranges(self) -> tuple[int, ...]:
        """The shape of the ranges of codebooks in 8 bits; empty where there are none."""
        return () if self.entry_bits == BITS_PER_FLOAT else (self.num_codebooks, self.group_size)

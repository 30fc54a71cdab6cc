"""Additive schemes: `2x8g8` has 2 codebooks of 2^8 entries for groups of 8 inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aqlm_cli.spec.schemes.base import BITS_PER_FLOAT, StoredTensor, check_range, packed_integers, uneven_groups


@dataclass(frozen=True)
class AdditiveScheme:
    """`MxBgG`: W[o, j*G:(j+1)*G] = scales[o] * sum over M codebooks of one of their 2^B entries of G floats each."""

    num_codebooks: int
    codebook_bits: int
    group_size: int

    kind = "additive"
    form = "CODEBOOKSxBITSgGROUP such as 2x8g8"

    def __post_init__(self) -> None:
        check_range(self, "codebooks", self.num_codebooks, 1, 8)
        check_range(self, "bits a code", self.codebook_bits, 1, 16)
        check_range(self, "inputs a group", self.group_size, 1, 64)

    def __str__(self) -> str:
        return f"{self.num_codebooks}x{self.codebook_bits}g{self.group_size}"

    @classmethod
    def parse(cls, text: str) -> AdditiveScheme | None:
        """The scheme that prints as `text`, or None."""
        found = re.fullmatch(r"(\d+)x(\d+)g(\d+)", text, flags=re.ASCII)
        return cls(*map(int, found.groups())) if found else None

    @property
    def codebook_shape(self) -> tuple[int, int, int]:
        """Codebooks, entries of each, inputs a group."""
        return self.num_codebooks, self.codebook_size, self.group_size

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
        """Return the reason why a matrix of this shape cannot be stored so, or None."""
        return uneven_groups(in_features, self.group_size)

    def stored_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Codes in one byte or in four, codebooks and scales in float32, since block fitting continues from there."""
        codes = "uint8" if self.codebook_bits <= 8 else "int32"
        indices = (out_features, in_features // self.group_size, self.num_codebooks)
        return {
            "codes": StoredTensor(codes, indices, values=self.codebook_size),
            "codebooks": StoredTensor("float32", self.codebook_shape),
            "scales": StoredTensor("float32", (out_features,)),
        }

    def packed_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """The layout of the `aqlm` inference package: codes take one byte up to 8 bits and two up to 16."""
        codes = "int8" if self.codebook_bits <= 8 else "int16"
        indices = (out_features, in_features // self.group_size, self.num_codebooks)
        entries = (self.num_codebooks, self.codebook_size, 1, self.group_size)
        return {
            "codes": StoredTensor(codes, indices),
            "codebooks": StoredTensor("float16", entries),
            "scales": StoredTensor("float16", (out_features, 1, 1, 1)),
        }

    def native_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Codes of B bits each, codebooks and row scales in float16."""
        codes = out_features * (in_features // self.group_size) * self.num_codebooks
        return {
            "codes": packed_integers(codes, self.codebook_bits),
            "codebooks": StoredTensor("float16", self.codebook_shape),
            "scales": StoredTensor("float16", (out_features,)),
        }

    def peak_bytes(self, out_features: int, in_features: int) -> int:
        """Two float64 matrices [in, in] in the factorisation and some of float32; later, copies of the weight."""
        return max(26 * in_features**2, 9 * in_features**2 + 22 * out_features * in_features)

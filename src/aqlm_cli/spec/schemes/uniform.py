"""Uniform schemes: `int2g64` has integers of 2 bits, and a scale and a zero point for 64 inputs of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aqlm_cli.spec.schemes.base import BITS_PER_FLOAT, StoredTensor, check_range, packed_integers, uneven_groups


@dataclass(frozen=True)
class UniformScheme:
    """`intBgG`: W[o, i] = scale * (q - zero); G inputs of a row share scale and zero; q and zero have B bits."""

    bits: int
    group_size: int

    kind = "uniform"
    form = "intBITSgGROUP such as int2g64"
    codebook_shape = None
    finer = None

    def __post_init__(self) -> None:
        check_range(self, "bits a weight", self.bits, 2, 8)
        check_range(self, "inputs a group", self.group_size, 1, 1024)

    def __str__(self) -> str:
        return f"int{self.bits}g{self.group_size}"

    @classmethod
    def parse(cls, text: str) -> UniformScheme | None:
        """The scheme that prints as `text`, or None."""
        found = re.fullmatch(r"int(\d+)g(\d+)", text, flags=re.ASCII)
        return cls(*map(int, found.groups())) if found else None

    @property
    def code_bits(self) -> float:
        """Bits of the integers alone per weight."""
        return float(self.bits)

    def bound(self, in_features: int) -> UniformScheme:
        """The scheme itself."""
        return self

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of one `[out, in]` matrix: every weight, and 16 + B for scale and zero point of every group."""
        groups = out_features * (in_features // self.group_size)
        return out_features * in_features * self.bits + groups * (BITS_PER_FLOAT + self.bits)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """B + (16 + B)/g."""
        return self.stored_bits(out_features, in_features) / (out_features * in_features)

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Return the reason why a matrix of this shape cannot be stored so, or None."""
        return uneven_groups(in_features, self.group_size)

    def stored_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Levels and zeros in a byte each."""
        groups = (out_features, in_features // self.group_size)
        return {
            "levels": StoredTensor("uint8", (out_features, in_features), values=1 << self.bits),
            "zeros": StoredTensor("uint8", groups, values=1 << self.bits),
            "scales": StoredTensor("float16", groups),
            "level_bits": StoredTensor("uint8", (), values=self.bits + 1),
            "exponent": StoredTensor("int16", (), values=1),
        }

    def packed_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Rounded weights in 16 bits, as those of a skipped matrix: no format holds the grid."""
        return {"weight": StoredTensor("float16", (out_features, in_features))}

    def native_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Levels and zeros of B bits each, scales in float16, and the exponent that is common to them."""
        groups = (out_features, in_features // self.group_size)
        return {
            "levels": packed_integers(out_features * in_features, self.bits),
            "zeros": packed_integers(groups[0] * groups[1], self.bits),
            "scales": StoredTensor("float16", groups),
            "exponent": StoredTensor("int16", ()),
        }

    def peak_bytes(self, out_features: int, in_features: int) -> int:
        """Four copies of the weight in float32."""
        return 4 * 4 * out_features * in_features

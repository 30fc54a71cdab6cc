"""Schemes of block floating point: `bfp6g16` has 6 bits a weight, and an exponent of 8 bits for 16 inputs of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.schemes.base import StoredTensor, check_range, packed_integers, uneven_groups

EXPONENT_BITS = 8


@dataclass(frozen=True)
class BlockFloatScheme:
    """`bfpWgG`, `bmfWeEgG` or `blWgG`: W bits a weight, its sign among them; G inputs of a row share an exponent.

    `bmf` has numbers with an exponent of their own, of E bits; `bl` has powers of two.
    """

    form_name: str
    width: int
    own: int  # bits of a number's own exponent, 0 where it has none
    group_size: int

    kind = "blockfloat"
    form = "bfpBITSgGROUP such as bfp6g16, bmf6e2g16 or bl5g16"
    codebook_shape = None
    finer = None

    def __post_init__(self) -> None:
        least = 3 if self.own else 2
        check_range(self, "bits a weight", self.width, least, 8)
        check_range(self, "inputs a group", self.group_size, 1, 2**20)
        if self.form_name == "bmf" and not 1 <= self.own <= self.width - 2:
            raise UsageError(f"scheme {self}: {self.own} bits of an exponent; choose 1 to {self.width - 2}")

    def __str__(self) -> str:
        return f"{self.form_name}{self.width}{f'e{self.own}' if self.form_name == 'bmf' else ''}g{self.group_size}"

    @classmethod
    def parse(cls, text: str) -> BlockFloatScheme | None:
        """The scheme that prints as `text`, or None."""
        found = re.fullmatch(r"(?:(bfp|bl)(\d)|(bmf)(\d)e(\d))g([1-9]\d{0,6})", text, flags=re.ASCII)
        if found is None:
            return None
        return cls(found[1] or found[3], int(found[2] or found[4]), int(found[5] or 0), int(found[6]))

    def bound(self, in_features: int) -> BlockFloatScheme:
        """The scheme itself."""
        return self

    @property
    def code_bits(self) -> float:
        """Bits of the codes alone per weight."""
        return float(self.width)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of one `[out, in]` matrix: every code, and 8 for the exponent of every group."""
        return out_features * (in_features * self.width + in_features // self.group_size * EXPONENT_BITS)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """W + 8/g."""
        return self.stored_bits(out_features, in_features) / (out_features * in_features)

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Return the reason why a matrix of this shape cannot be stored so, or None."""
        return uneven_groups(in_features, self.group_size)

    def stored_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Codes and exponents in a byte each."""
        forms = ("bfp", "bmf", "bl")  # in the order in which a matrix counts them
        return {
            "codes": StoredTensor("uint8", (out_features, in_features), values=1 << self.width),
            "exponents": StoredTensor("int8", (out_features, in_features // self.group_size)),
            "form": StoredTensor("uint8", (), values=forms.index(self.form_name) + 1),
            "width": StoredTensor("uint8", (), values=self.width + 1),
            "own": StoredTensor("uint8", (), values=self.own + 1),
        }

    def packed_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Rounded weights in 16 bits, as those of a skipped matrix: no format holds the blocks."""
        return {"weight": StoredTensor("float16", (out_features, in_features))}

    def native_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Codes of W bits each, exponents in a byte."""
        return {
            "codes": packed_integers(out_features * in_features, self.width),
            "exponents": StoredTensor("int8", (out_features, in_features // self.group_size)),
        }

    def peak_bytes(self, out_features: int, in_features: int) -> int:
        """Six copies of the weight in float32: places are found in 8 bytes each."""
        return 6 * 4 * out_features * in_features

"""Schemes of fixed tables of levels: `nf4g64` has NormalFloat levels of 4 bits and a scale for 64 inputs of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from aqlm_cli.spec.schemes.base import (
    BITS_PER_FLOAT,
    ROW,
    StoredTensor,
    check_range,
    groups_of,
    packed_integers,
    uneven_groups,
)

TABLES = ("nf", "cube")
"""Names of the tables, in the order in which a matrix counts them."""


@dataclass(frozen=True)
class LevelScheme:
    """`TABLEB[t][gG]`: W[o, i] = scale * T[q] + shift; G inputs of a row share a scale and, with t, a shift.

    Without g they are those of the whole row. Table `cube` has one level less than its codes could name.
    """

    table: str
    bits: int
    shifted: bool
    group: int

    kind = "level"
    form = "nfBITSgGROUP or cubeBITSgGROUP such as nf4g64, with t before the g for shifts, without it for whole rows"
    codebook_shape = None
    finer = None

    def __post_init__(self) -> None:
        check_range(self, "bits a weight", self.bits, 2, 8)
        check_range(self, "inputs a group", self.group, ROW, 2**20)

    def __str__(self) -> str:
        return f"{self.table}{self.bits}{'t' if self.shifted else ''}{f'g{self.group}' if self.group else ''}"

    @classmethod
    def parse(cls, text: str) -> LevelScheme | None:
        """The scheme that prints as `text`, or None."""
        found = re.fullmatch(rf"({'|'.join(TABLES)})(\d)(t?)(?:g([1-9]\d{{0,6}}))?", text, flags=re.ASCII)
        return cls(found[1], int(found[2]), bool(found[3]), int(found[4] or ROW)) if found else None

    def bound(self, in_features: int) -> LevelScheme:
        """The scheme with the group that it has in a matrix of so many inputs."""
        return replace(self, group=self.group or in_features)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 1 for whole rows, which may have any number."""
        return self.group or 1

    @property
    def levels(self) -> int:
        """Levels that a code may name."""
        return (1 << self.bits) - (self.table == "cube")

    @property
    def code_bits(self) -> float:
        """Bits of the codes alone per weight."""
        return float(self.bits)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of one `[out, in]` matrix: every code, and 16 for the scale of every group, and for its shift."""
        groups = out_features * groups_of(in_features, self.group)
        return out_features * in_features * self.bits + groups * BITS_PER_FLOAT * (2 if self.shifted else 1)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """B + 16/g, with shifts B + 32/g."""
        return self.stored_bits(out_features, in_features) / (out_features * in_features)

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Return the reason why a matrix of this shape cannot be stored so, or None."""
        return uneven_groups(in_features, self.group) if self.group else None

    def stored_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Codes in a byte each."""
        groups = (out_features, groups_of(in_features, self.group))
        shifts = {"shifts": StoredTensor("float16", groups)} if self.shifted else {}
        return {
            "codes": StoredTensor("uint8", (out_features, in_features), values=self.levels),
            "scales": StoredTensor("float16", groups),
            **shifts,
            "code_bits": StoredTensor("uint8", (), values=self.bits + 1),
            "table": StoredTensor("uint8", (), values=TABLES.index(self.table) + 1),
            "exponent": StoredTensor("int16", (), values=1),
        }

    def packed_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Rounded weights in 16 bits, as those of a skipped matrix: no format holds the table."""
        return {"weight": StoredTensor("float16", (out_features, in_features))}

    def native_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Codes of B bits each, scales and shifts in float16, and the exponent that is common to them."""
        groups = (out_features, groups_of(in_features, self.group))
        shifts = {"shifts": StoredTensor("float16", groups)} if self.shifted else {}
        return {
            "codes": packed_integers(out_features * in_features, self.bits),
            "scales": StoredTensor("float16", groups),
            **shifts,
            "exponent": StoredTensor("int16", ()),
        }

    def peak_bytes(self, out_features: int, in_features: int) -> int:
        """Five copies of the weight in float32: bucketize writes its places in 8 bytes."""
        return 5 * 4 * out_features * in_features

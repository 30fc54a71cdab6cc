"""Refined schemes: `3x8g8+int4g64r512` stores all rows as 3x8g8, and the error of 512 of them as int4g64 again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from aqlm_cli.spec.schemes.additive import AdditiveScheme
from aqlm_cli.spec.schemes.base import StoredTensor, check_range
from aqlm_cli.spec.schemes.uniform import UniformScheme

BITS_PER_INDEX = 32


@dataclass(frozen=True)
class RefinedScheme:
    """`BASE+PATCHrROWS`: W = base, and the patch is added to the ROWS rows whose errors cost most."""

    base: AdditiveScheme | UniformScheme
    patch: UniformScheme
    rows: int

    kind = "refined"
    form = "BASE+PATCHrROWS such as 3x8g8+int4g64r512"
    codebook_shape = None
    finer = None

    def __post_init__(self) -> None:
        check_range(self, "rows of the patch", self.rows, 1, 2**20)

    def __str__(self) -> str:
        return f"{self.base}+{self.patch}r{self.rows}"

    @classmethod
    def parse(cls, text: str) -> RefinedScheme | None:
        """The scheme that prints as `text`, or None."""
        found = re.fullmatch(r"([^+]+)\+(int\d+g\d+)r(\d{1,9})", text, flags=re.ASCII)
        if found is None:
            return None
        base = AdditiveScheme.parse(found[1]) or UniformScheme.parse(found[1])
        patch = UniformScheme.parse(found[2])
        return None if base is None or patch is None else cls(base, patch, int(found[3]))

    @property
    def group_size(self) -> int:
        """Inputs that share codes or a scale in the base."""
        return self.base.group_size

    @property
    def code_bits(self) -> float:
        """Bits of the base's codes alone per weight."""
        return self.base.code_bits

    def bound(self, in_features: int) -> RefinedScheme:
        """The scheme itself."""
        return self

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of base and patch, and 32 for the index of each row of the patch."""
        patch = self.patch.stored_bits(self.rows, in_features) + BITS_PER_INDEX * self.rows
        return self.base.stored_bits(out_features, in_features) + patch

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits per original weight.

        Not covered: layers that stay as they are; see the plan for the whole model.
        """
        return self.stored_bits(out_features, in_features) / (out_features * in_features)

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Return the reason why a matrix of this shape cannot be stored so, or None."""
        if self.rows > out_features:
            return f"{out_features} output features are fewer than the {self.rows} rows of {self}"
        return self.base.refuses(out_features, in_features) or self.patch.refuses(self.rows, in_features)

    def stored_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """The tensors of both, and the index."""
        return {
            **_prefixed("base_", self.base.stored_layouts(out_features, in_features)),
            **_prefixed("patch_", self.patch.stored_layouts(self.rows, in_features)),
            "index": StoredTensor("int32", (self.rows,), values=out_features),
        }

    def packed_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """Rounded weights in 16 bits, as those of a skipped matrix: no format of others holds the patch."""
        return {"weight": StoredTensor("float16", (out_features, in_features))}

    def native_layouts(self, out_features: int, in_features: int) -> dict[str, StoredTensor]:
        """The tensors of both, packed, and the index."""
        return {
            **_prefixed("base_", self.base.native_layouts(out_features, in_features)),
            **_prefixed("patch_", self.patch.native_layouts(self.rows, in_features)),
            "index": StoredTensor("int32", (self.rows,), values=out_features),
        }

    def peak_bytes(self, out_features: int, in_features: int) -> int:
        """Memory of the base's search, and of the patch's after it."""
        return self.base.peak_bytes(out_features, in_features) + self.patch.peak_bytes(self.rows, in_features)


def _prefixed(prefix: str, layouts: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {prefix + name: layout for name, layout in layouts.items()}

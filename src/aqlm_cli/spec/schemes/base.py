"""The protocol that every family of schemes follows, and shared checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from aqlm_cli.errors import UsageError

BITS_PER_FLOAT = 16
"""Codebooks and scales are stored as float16."""

ROW = 0
"""The group size of a scheme in which a whole row is one group."""

DTYPE_BYTES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


class StoredTensor(NamedTuple):
    """One tensor of a matrix: its type as torch names it, and its shape.

    One of integers holds 0 to `values` - 1; None for other tensors.
    """

    dtype: str
    shape: tuple[int, ...]
    values: int | None = None

    @property
    def bytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


class Scheme(Protocol):
    """The cost of one treatment of an `[out, in]` weight matrix; prints as the word it is parsed from."""

    @property
    def kind(self) -> str:
        """The kind of matrix that it describes, by which methods name the family, too."""

    @property
    def group_size(self) -> int:
        """Inputs that share codes or a scale; 1 where a whole row is one group, for its inputs may be any number."""

    @property
    def code_bits(self) -> float:
        """Bits of the codes alone per weight."""

    @property
    def codebook_shape(self) -> tuple[int, int, int] | None:
        """Codebooks, entries of each and inputs a group, as the compiled products take them; None: torch multiplies."""

    @property
    def finer(self) -> Scheme | None:
        """The same codes with finer codebooks, where there is such a scheme."""

    def bound(self, in_features: int) -> Scheme:
        """The scheme as it is in a matrix of so many inputs: a group that is a whole row has their number."""

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of one matrix, with its tables, scales and indices."""

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits per original weight.

        Not covered: layers that stay as they are; see the plan for the whole model.
        """

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Return the reason why a matrix of this shape cannot be stored so, or None."""

    def stored_layouts(self, out_features: int, in_features: int) -> Mapping[str, StoredTensor]:
        """The tensors of one matrix in `quantized/`, by name."""

    def packed_layouts(self, out_features: int, in_features: int) -> Mapping[str, StoredTensor]:
        """The tensors of one matrix in a checkpoint for others, by name: `weight` alone where no format holds it."""

    def native_layouts(self, out_features: int, in_features: int) -> Mapping[str, StoredTensor]:
        """The tensors of one matrix in a native checkpoint, by name: integers at their true width, side by side."""

    def peak_bytes(self, out_features: int, in_features: int) -> int:
        """Memory that quantizing one matrix takes at most, beside the weight and the Hessian."""


def check_range(scheme: object, what: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise UsageError(f"scheme {scheme}: {value} {what}; choose {lowest} to {highest}")


def packed_integers(count: int, bits: int) -> StoredTensor:
    """Layout of so many integers of so many bits, side by side in bytes."""
    return StoredTensor("uint8", (-(-count * bits // 8),))


def groups_of(in_features: int, group_size: int) -> int:
    """Groups of a row; one where the group is a whole ROW."""
    return in_features // (group_size or in_features)


def uneven_groups(in_features: int, group_size: int) -> str | None:
    if in_features % group_size:
        return f"{in_features} input features are not a multiple of the group size {group_size}"
    return None


def total_bytes(layouts: Mapping[str, StoredTensor]) -> int:
    return sum(layout.bytes for layout in layouts.values())

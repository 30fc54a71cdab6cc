"""Words of the formats that activations and the cache are rounded to at evaluation time.

`int8t` is symmetric int8 with one scale a token. `bfp6g16` is block float: 16 values share an exponent of 8 bits and
have 6 bits each, a sign and a mantissa.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.section import LARGEST

INT8_PER_TOKEN = "int8t"
"""The word of symmetric int8 with one scale a token."""

WIDEST = 16
"""Most bits of a value in a block, with its sign."""


@dataclass(frozen=True)
class BlockFloat:
    """`bfp{width}g{group}`: `group` neighbouring values share an exponent; each has a sign and `width` - 1 bits."""

    width: int
    group: int

    def __str__(self) -> str:
        return f"bfp{self.width}g{self.group}"

    @property
    def mantissa(self) -> int:
        """Bits of a value without its sign."""
        return self.width - 1

    @property
    def bits(self) -> float:
        """Stored bits of a value, with its share of the exponent."""
        return self.width + 8 / self.group

    @classmethod
    def parse(cls, word: str) -> BlockFloat:
        """The format of a word such as bfp6g16. UsageError for any other word."""
        matched = re.fullmatch(r"bfp([1-9][0-9]?)g([1-9][0-9]{0,9})", word, re.ASCII)
        if matched is None:
            raise UsageError(f"there is no block float {word!r}; write bfp, bits, g and a block size, such as bfp6g16")
        width, group = int(matched[1]), int(matched[2])
        if not 2 <= width <= WIDEST or group > LARGEST:
            raise UsageError(f"{word}: values have 2 to {WIDEST} bits and blocks at most {LARGEST} values")
        return cls(width, group)


def parse_activations(word: str) -> BlockFloat | None:
    """The block float of a word; None for int8t. UsageError for any other word."""
    if word == INT8_PER_TOKEN:
        return None
    if not word.startswith("bfp"):
        raise UsageError(
            f"there is no format of activations {word!r}; choose {INT8_PER_TOKEN} or block float such as bfp6g16"
        )
    return BlockFloat.parse(word)


@dataclass(frozen=True)
class Formats:
    """Formats of a model that is evaluated: `activations` of its linear layers' inputs, `cache` of keys and values.

    None: as the model computes. With `sort_keys` the features of each key head are ordered by size, so that blocks hold
    values of like size.
    """

    activations: str | None = None
    cache: str | None = None
    sort_keys: bool = False

    def __post_init__(self) -> None:
        if self.activations is not None:
            parse_activations(self.activations)
        if self.cache is not None:
            BlockFloat.parse(self.cache)
        if self.sort_keys and self.cache is None:
            raise UsageError("--sort-keys orders keys for the blocks of a cache; add --cache, such as bfp4g32")

    def __str__(self) -> str:
        """Words for a table and for the passport; empty without any format."""
        cache = None if self.cache is None else f"cache {self.cache}" + (" sorted" if self.sort_keys else "")
        activations = None if self.activations is None else f"activations {self.activations}"
        return ", ".join(filter(None, (activations, cache)))

    @property
    def suffix(self) -> str:
        """End of the name of a report, such as `-int8t-cache-bfp4g32-sorted`; empty without any format."""
        cache = None if self.cache is None else f"cache-{self.cache}" + ("-sorted" if self.sort_keys else "")
        return "".join(f"-{part}" for part in (self.activations, cache) if part is not None)


AS_COMPUTED = Formats()
"""No format of its own for anything."""

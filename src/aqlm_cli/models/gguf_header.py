"""The header of a GGUF file, checked before gguf's reader, which trusts it.

gguf's reader believes the counts that a file gives. Past the end of the file it reads nothing and continues, so that an
array of 2^60 numbers in a file of 100 bytes keeps it busy for ever. Here every count must fit into the bytes that
follow.

    magic, version, tensor count, count of settings; then each setting: key, type, value; then each tensor: name,
    count of dimensions, dimensions, type, offset
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from aqlm_cli.errors import ModelError

MOST_VALUES = 4_000_000
"""Values in all settings together; gguf's reader takes 600 bytes for each. The largest vocabularies have a third."""

MOST_DIMENSIONS = 4

# Their codes in the file, as `struct` has them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_KEPT = ("split.no", "split.count", "split.tensors.count", "general.alignment")
"""Settings about the layout of the file, not about the model."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in the header."""

    path: Path  # file that holds it
    name: str
    shape: tuple[int, ...]  # in torch's order: GGUF counts the dimensions from the last
    kind: int  # code of its type
    start: int  # position of its first byte in the file
    room: int  # bytes up to the next tensor, or to the end of the file
    alignment: int  # of the file: room exceeds the tensor's bytes by less than this

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    path: Path
    settings: bytes  # all keys and values, unchanged
    settings_count: int
    numbers: dict[str, int]  # values of _KEPT, and the count of blocks as "block_count"
    tensors: tuple[GgufTensor, ...]
    alignment: int


def read_header(path: Path) -> GgufHeader:
    """Read a header; ModelError if it does not fit into the file."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(path, data).header()
    except (OSError, ValueError, struct.error) as error:  # ValueError: an empty file; struct.error: its end
        raise ModelError(f"{path} cannot be converted: it is not a complete GGUF file ({error})") from error


class _Walk:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._position, self._values = path, data, 0, 0
        self._numbers: dict[str, int] = {}

    def header(self) -> GgufHeader:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:
            raise ModelError(f"{self._path} is big-endian; run `gguf-convert-endian {self._path} little`, then use it")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported, only 2 and 3")
        tensors, settings = self._count(least=24), self._count(least=13)
        begin = self._position
        for _ in range(settings):
            self._setting()
        kept = self._data[begin : self._position]
        infos = [self._tensor() for _ in range(tensors)]
        alignment = self._numbers.get("general.alignment", 32)
        if alignment <= 0 or alignment & (alignment - 1) or alignment > len(self._data):
            raise ValueError(f"invalid alignment {alignment}")
        return GgufHeader(self._path, kept, settings, self._numbers, self._placed(infos, alignment), alignment)

    def _placed(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> tuple[GgufTensor, ...]:
        """The tensors, each with the bytes up to the next one."""
        start, end = -(-self._position // alignment) * alignment, len(self._data)
        places = sorted({start + offset for *_, offset in infos} | {end})
        following = dict(itertools.pairwise(places))
        rooms = {place: following.get(place, end) - place for place in places}
        return tuple(
            GgufTensor(self._path, name, shape, kind, start + offset, rooms[start + offset], alignment)
            for name, shape, kind, offset in infos
        )

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._bytes(self._count(least=1)).decode()
        dimensions = self._number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor with {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        kind, offset = self._number("I"), self._number("Q")
        if offset > len(self._data):
            raise ValueError("a tensor beyond the end of the file")
        return name, shape, kind, offset

    def _setting(self) -> None:
        key, kind = self._bytes(self._count(least=1)), self._number("I")
        if kind in _NUMBERS:
            value, name = self._number(_NUMBERS[kind]), key.decode(errors="replace")
            if name in _KEPT:
                self._numbers[name] = value
            elif name.endswith(".block_count"):
                self._numbers["block_count"] = max(value, self._numbers.get("block_count", 0))
        elif kind == _ARRAY:
            self._array()
        else:
            self._value(kind)

    def _array(self) -> None:
        kind = self._number("I")
        length = self._count(least=struct.calcsize(_NUMBERS[kind]) if kind in _NUMBERS else 8)
        self._values += length
        if self._values > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values beside its tensors")
        if kind in _NUMBERS:
            self._bytes(length * struct.calcsize(_NUMBERS[kind]))
        else:
            for _ in range(length):
                self._value(kind)

    def _value(self, kind: int) -> None:
        if kind != _STRING:
            raise ValueError(f"a value of unknown type {kind}")
        self._bytes(self._count(least=1))

    def _count(self, least: int) -> int:
        """A count of items of at least `least` bytes each."""
        count = self._number("Q")
        if count * least > len(self._data) - self._position:
            raise ValueError(f"a count of {count}, but {len(self._data) - self._position} bytes are left")
        return count

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack("<" + kind, self._bytes(struct.calcsize("<" + kind)))
        return int(value) if kind not in "fd" else 0

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._position:
            raise ValueError(f"{count} bytes expected, but {len(self._data) - self._position} are left")
        self._position += count
        return self._data[self._position - count : self._position]

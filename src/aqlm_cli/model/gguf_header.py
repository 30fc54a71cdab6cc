"""The header of a GGUF file walked along once, before a reader that trusts it.

gguf's reader goes by the counts that a file gives. Past the end of the file it reads nothing and goes on, so that an
array of 2^60 numbers in a file of 100 bytes keeps it busy for ever. Here every count must fit into the bytes that
follow.

    magic, version, tensor count, count of settings; then each setting: key, type, value; then each tensor: name,
    count of dimensions, dimensions, type, offset
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from aqlm_cli.errors import ModelError

MOST_VALUES = 4_000_000
"""Of all settings together; gguf's reader takes 600 bytes for each. The largest vocabularies have a third as many."""

# Their codes in the file, as `struct` has them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def check_header(path: Path) -> int:
    """The number of tensors in the file; ModelError if its header does not fit into it."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).walk()
    except (OSError, ValueError, struct.error) as error:  # ValueError: an empty file; struct.error: its end
        raise ModelError(f"{path} cannot be converted: it is no whole GGUF file ({error})") from error


class _Header:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._position, self._values, self._order = data, 0, 0, "<"

    def walk(self) -> int:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if self._number("I") & 0xFFFF == 0:  # a version, written by a machine of the other byte order
            self._order = ">"
        tensors, settings = self._count(least=24), self._count(least=13)
        for _ in range(settings):
            self._setting(tensors)
        for _ in range(tensors):
            self._bytes(self._count(least=1))
            self._bytes(8 * self._number("I") + struct.calcsize("I"))
            if self._number("Q") > len(self._data):
                raise ValueError("a tensor beyond its end")
        return tensors

    def _setting(self, tensors: int) -> None:
        key, kind = self._bytes(self._count(least=1)), self._number("I")
        if kind in _NUMBERS:
            value = self._number(_NUMBERS[kind])
            if key.endswith(b".block_count") and value > tensors:
                raise ValueError(f"{value} blocks, {tensors} tensors")
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
            raise ValueError(f"a value of type {kind}")
        self._bytes(self._count(least=1))

    def _count(self, least: int) -> int:
        """A count of things that have at least so many bytes each."""
        count = self._number("Q")
        if count * least > len(self._data) - self._position:
            raise ValueError(f"{count} where {len(self._data) - self._position} bytes are left")
        return count

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack(self._order + kind, self._bytes(struct.calcsize(kind)))
        return int(value) if kind not in "fd" else 0

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._position:
            raise ValueError(f"{count} bytes where {len(self._data) - self._position} are left")
        self._position += count
        return self._data[self._position - count : self._position]

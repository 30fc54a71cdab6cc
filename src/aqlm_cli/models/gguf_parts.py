"""A GGUF file that may be split: check the parts, and make one header for all of them.

llama.cpp splits a file into `NAME-00001-of-00003.gguf` and so on. The first part has the settings, each has a share of
the tensors. Code that reads settings and tensor names alone gets a small file with the header of the whole: from the
first part's own, transformers would tie a head that is in the second, and gguf's reader opens no file with a tensor
of a type that it does not support.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aqlm_cli.errors import ModelError, shortened
from aqlm_cli.models.gguf_header import GgufHeader, GgufTensor, read_header
from aqlm_cli.models.weight_files import SHARD
from aqlm_cli.runs.digests import cached_digest


@dataclass(frozen=True)
class WholeGguf:
    """All parts of a file, in order; mostly one."""

    headers: tuple[GgufHeader, ...]

    @property
    def path(self) -> Path:
        """Path of the first part, which names the whole."""
        return self.headers[0].path

    @property
    def tensors(self) -> tuple[GgufTensor, ...]:
        return tuple(tensor for header in self.headers for tensor in header.tensors)

    def header_file(self) -> Iterable[bytes]:
        """A GGUF file with all settings and the names of all tensors, each with a single value, 0."""
        first, tensors = self.headers[0], self.tensors
        begin = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), first.settings_count) + first.settings
        names = [tensor.name.encode() for tensor in tensors]
        infos = b"".join(struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1, 0, 0) for name in names)
        size = len(begin) + len(infos)
        return [begin, infos, bytes(-size % first.alignment + first.alignment)]


def parts_of(path: Path) -> list[Path]:
    """The files of the set that `path` belongs to, in order; ModelError if some are missing."""
    named = SHARD.fullmatch(path.name)
    if named is None or int(named["count"]) > MOST_PARTS:
        return [path]
    stem, count, width = named["stem"], int(named["count"]), len(named["number"])
    paths = [path.with_name(f"{stem}-{number:0{width}d}-of-{named['count']}.gguf") for number in range(1, count + 1)]
    missing = [part for part in paths if not part.is_file()]
    if missing and path in paths:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{path} is one of {count} files; {missing[0]} is missing{more}: fetch the missing files")
    return paths if path in paths else [path]


MOST_PARTS = 10_000
"""Limit for the number of parts in a file name."""


def digest_of(parts: list[Path], cache: Path) -> str:
    """Digest of the file, or of the digests of all its parts."""
    digests = [cached_digest(part, cache) for part in parts]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_whole(parts: list[Path]) -> WholeGguf:
    """Read every header; ModelError if one is damaged, or if they are not the parts of one file."""
    headers = tuple(read_header(part) for part in parts)
    for number, header in enumerate(headers):
        _check_place(header, number, len(parts))
    whole = WholeGguf(headers)
    tensors, blocks = len(whole.tensors), max(header.numbers.get("block_count", 0) for header in headers)
    if blocks > tensors:
        raise ModelError(
            f"{whole.path} cannot be converted: it is not a complete GGUF file ({blocks} blocks, {tensors} tensors)"
        )
    stated = headers[0].numbers.get("split.tensors.count", tensors) if len(parts) > 1 else tensors
    if stated != tensors:
        raise ModelError(
            f"{whole.path} states {stated} tensors for its parts, but they have {tensors}; fetch the file again"
        )
    seen: set[str] = set()
    for tensor in whole.tensors:
        if tensor.name in seen:
            raise ModelError(f"{tensor.path} holds {shortened(tensor.name)} a second time; fetch the file again")
        seen.add(tensor.name)
    return whole


def _check_place(header: GgufHeader, number: int, count: int) -> None:
    """Raise ModelError if a file is another part than its name says."""
    own, of = header.numbers.get("split.no", 0), max(header.numbers.get("split.count", 0), 1)
    if (own, of) == (number, count):
        return
    if count == 1:
        name = f"NAME-{own + 1:05d}-of-{of:05d}.gguf"
        raise ModelError(
            f"{header.path} is part {own + 1} of {of}; give each part its name, here {name}, in one directory"
        )
    raise ModelError(
        f"{header.path} is part {own + 1} of {of}, but its name says {number + 1} of {count}; fetch "
        f"the file again, or rename it"
    )

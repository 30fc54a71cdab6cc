"""A GGUF file that may be split: its parts, checked, and one header for all of them.

llama.cpp splits a file into `NAME-00001-of-00003.gguf` and so on. The first part has the settings, each has a share of
the tensors. What reads settings and names of tensors alone is given a small file with the header of the whole: by the
first part's own, transformers would tie a head that lies in the second, and gguf's reader opens no file with a tensor
of a type that it does not know.
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
    """All parts of a file, in order; mostly there is one."""

    headers: tuple[GgufHeader, ...]

    @property
    def path(self) -> Path:
        """That of the first part, which stands for the whole."""
        return self.headers[0].path

    @property
    def tensors(self) -> tuple[GgufTensor, ...]:
        return tuple(tensor for header in self.headers for tensor in header.tensors)

    def header_file(self) -> Iterable[bytes]:
        """A GGUF file with all settings and with the names of all tensors, each of one number, which is 0."""
        first, tensors = self.headers[0], self.tensors
        begin = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), first.settings_count) + first.settings
        names = [tensor.name.encode() for tensor in tensors]
        infos = b"".join(struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1, 0, 0) for name in names)
        size = len(begin) + len(infos)
        return [begin, infos, bytes(-size % first.alignment + first.alignment)]


def parts_of(path: Path) -> list[Path]:
    """The files of which `path` is one, the first first; ModelError for those that are not there."""
    named = SHARD.fullmatch(path.name)
    if named is None or int(named["count"]) > MOST_PARTS:
        return [path]
    stem, count, width = named["stem"], int(named["count"]), len(named["number"])
    paths = [path.with_name(f"{stem}-{number:0{width}d}-of-{named['count']}.gguf") for number in range(1, count + 1)]
    missing = [part for part in paths if not part.is_file()]
    if missing and path in paths:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{path} is one of {count} files, and {missing[0]} is not there{more}; fetch what is missing")
    return paths if path in paths else [path]


MOST_PARTS = 10_000
"""Files that a name may ask for."""


def digest_of(parts: list[Path], cache: Path) -> str:
    """That of the file, or of the digests of all its parts."""
    digests = [cached_digest(part, cache) for part in parts]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_whole(parts: list[Path]) -> WholeGguf:
    """Every header; ModelError where one is damaged, or where they are not the parts of one file."""
    headers = tuple(read_header(part) for part in parts)
    for number, header in enumerate(headers):
        _check_place(header, number, len(parts))
    whole = WholeGguf(headers)
    tensors, blocks = len(whole.tensors), max(header.numbers.get("block_count", 0) for header in headers)
    if blocks > tensors:
        raise ModelError(
            f"{whole.path} cannot be converted: it is no whole GGUF file ({blocks} blocks, {tensors} tensors)"
        )
    said = headers[0].numbers.get("split.tensors.count", tensors) if len(parts) > 1 else tensors
    if said != tensors:
        raise ModelError(
            f"{whole.path} says that its parts have {said} tensors, and they have {tensors}; fetch it again"
        )
    seen: set[str] = set()
    for tensor in whole.tensors:
        if tensor.name in seen:
            raise ModelError(f"{tensor.path} holds {shortened(tensor.name)} a second time; fetch it again")
        seen.add(tensor.name)
    return whole


def _check_place(header: GgufHeader, number: int, count: int) -> None:
    """ModelError where a file is another part than its name says."""
    own, of = header.numbers.get("split.no", 0), max(header.numbers.get("split.count", 0), 1)
    if (own, of) == (number, count):
        return
    if count == 1:
        name = f"NAME-{own + 1:05d}-of-{of:05d}.gguf"
        raise ModelError(
            f"{header.path} is part {own + 1} of {of}; give each part its name, here {name}, in one directory"
        )
    raise ModelError(
        f"{header.path} says that it is part {own + 1} of {of}, and its name that it is {number + 1} of {count}; fetch "
        f"it again, or give it another name"
    )

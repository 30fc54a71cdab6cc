"""The one way anything gets written, and how tensors lie in files.

`write_file` is the only function of this package that writes: beside the place, synced, renamed, so that a file
exists whole or not at all. safetensors files are streamed through it, one tensor in memory at a time. (Hidden states
are memory-mapped files; they get their names in the same way, by `publish_file`.)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aqlm_cli.errors import ArtifactError, StorageError


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk into one line that names the file and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"no space left on device while writing {path}; free space and rerun"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            reason = f"{path} is read-only for this user; choose another place or change its permissions"
        elif error.errno == errno.ENOENT:
            reason = f"cannot write {path}: its directory is missing; put it back and rerun, or rerun to start again"
        else:
            reason = f"cannot write {path}: {error.strerror or error}"
        raise StorageError(reason) from error


def write_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """`path` holds all of `data` afterwards, or what it held before."""
    beside = path.with_name(path.name + ".tmp")
    with storage_errors(path):
        try:
            with open(beside, "wb") as file:
                for part in [data] if isinstance(data, bytes) else data:
                    file.write(part)
            publish_file(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def publish_file(beside: Path, path: Path) -> None:
    """Put the complete file `beside` in the place of `path`, once it is on the disk."""
    with storage_errors(path):
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)


def digest_file(path: Path) -> str:
    """sha256 as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def disk_bytes(directory: Path) -> int:
    """Bytes that everything below `directory` takes on the disk."""
    taken = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            taken += 512 * path.lstat().st_blocks
    return taken


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class TensorLayout:
    """Type and shape of a tensor, as a safetensors header names them before its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The names that a safetensors header has for types."""


def stream_tensors(
    path: Path,
    layouts: Mapping[str, TensorLayout],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time; `read` gives each by name as its turn comes.

    Wide types come first, so that every tensor lies aligned, then names in order: the same tensors always give the
    same bytes. (safetensors' own writer wants all tensors at once, and would open the file itself.)
    """
    order, text = _in_order(layouts), _header(layouts, metadata)

    def parts() -> Iterator[bytes]:
        yield text
        for name in order:
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (layouts[name].dtype, layouts[name].shape), name
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    write_file(path, parts())


def file_bytes(layouts: Mapping[str, TensorLayout], metadata: Mapping[str, str] | None = None) -> int:
    """The size of the file that `stream_tensors` writes."""
    return len(_header(layouts, metadata)) + sum(layout.bytes for layout in layouts.values())


def _in_order(layouts: Mapping[str, TensorLayout]) -> list[str]:
    return sorted(layouts, key=lambda name: (-layouts[name].dtype.itemsize, name))


def _header(layouts: Mapping[str, TensorLayout], metadata: Mapping[str, str] | None) -> bytes:
    """The header after its length, padded with spaces so that the tensors begin at a multiple of 8."""
    type_names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in _in_order(layouts):
        layout = layouts[name]
        end = start + layout.bytes
        header[name] = {"dtype": type_names[layout.dtype], "shape": list(layout.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    layouts = {name: TensorLayout(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensors(path, layouts, tensors.__getitem__, metadata)


def load_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names begin with `prefix`, named by what follows it, on the CPU."""
    with _reading(path), safe_open(path, framework="pt") as file:
        names = [name for name in sorted(file.keys()) if name.startswith(prefix)]
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file; the others are not read."""
    with _reading(path), safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def tensor_names(path: Path) -> list[str]:
    with _reading(path), safe_open(path, framework="pt") as file:
        return sorted(file.keys())


def read_metadata(path: Path) -> dict[str, str]:
    """The free text that a safetensors file carries beside its tensors."""
    with _reading(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors ({error}); rerun the stage that wrote it") from error

"""Writing a checkpoint's tensors: planned by name and shape, streamed into shards, read back and compared.

A checkpoint may be larger than memory, so it is never held. It is a mapping from names to `Entry`s, each of which knows
what its tensor looks like and how to get it. Names are written in sorted order and shards cut by size, so the same
entries always give the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aqlm_cli.errors import ArtifactError
from aqlm_cli.runs.files import TensorLayout, file_bytes, read_tensor, stream_tensors, write_file

SHARD_BYTES = 5_000_000_000
"""Largest file that hubs, and tools that read one file at a time, handle well."""


METADATA = {"format": "pt"}
"""transformers refuses a file that does not say which framework's layout it has."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint that is to be; `read` may be called more than once and must give the same tensor."""

    layout: TensorLayout
    read: Callable[[], Tensor]


def total_bytes(entries: Mapping[str, Entry]) -> int:
    return sum(entry.layout.bytes for entry in entries.values())


def checkpoint_bytes(layouts: Mapping[str, TensorLayout], shard_bytes: int = SHARD_BYTES) -> int:
    """The size of all safetensors files that `write_checkpoint` makes of such tensors."""
    shards = _shards(layouts, shard_bytes).values()
    return sum(file_bytes({name: layouts[name] for name in names}, METADATA) for names in shards)


def write_checkpoint(directory: Path, entries: Mapping[str, Entry], shard_bytes: int = SHARD_BYTES) -> None:
    """`model.safetensors`, or numbered shards with an index where one file would be larger than `shard_bytes`.

    Every tensor is read back from the disk and compared with its entry; ArtifactError names the first that differs.
    """
    files = _shards({name: entry.layout for name, entry in entries.items()}, shard_bytes)
    for file, names in files.items():
        layouts = {name: entries[name].layout for name in names}
        stream_tensors(directory / file, layouts, lambda name: entries[name].read(), METADATA)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total_bytes(entries)}, "weight_map": weight_map}
        write_file(directory / "model.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True).encode())
    for file, names in files.items():
        for name in names:
            if not torch.equal(read_tensor(directory / file, name), entries[name].read()):
                raise ArtifactError(f"{directory / file}: {name} reads back different; check the disk and rerun")


def _shards(layouts: Mapping[str, TensorLayout], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, filled in sorted order; a tensor larger than a shard gets one of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(layouts):
        size = layouts[name].bytes
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, start=1)}

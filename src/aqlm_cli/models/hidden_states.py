"""Hidden states between two blocks: too large for memory, so they are in files, read and written in batches."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ArtifactError
from aqlm_cli.models.walk import BlockInput
from aqlm_cli.runs.files import load_tensors, save_tensors, storage_errors


class Activations:
    """Hidden states `[n, ..., d]` of n sequences, float32, in the file at `path`, read and written in batches.

    The file is read and not mapped: pages of a mapped file count as memory of the process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        """Open the file of an earlier process. Raises ArtifactError if it has another size."""
        size, wanted = path.stat().st_size if path.is_file() else 0, 4 * math.prod(shape)
        if size != wanted:
            raise ArtifactError(f"{path} has {size} bytes, not {wanted}; remove {path.parent} to start again")
        self.shape = shape
        self._path = path
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - open for as long as the states are used

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...]) -> Activations:
        """New states, all zero; the disk space is allocated at once, so that it cannot run out later."""
        with storage_errors(path), open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
        return cls(path, shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The states `[b, ..., d]` of the sequences with these indices."""
        values = torch.empty(len(indices), *self.shape[1:])
        for row, place in zip(values, self._places(indices), strict=True):
            if os.preadv(self._file.fileno(), [row.numpy()], place) != row.nbytes:
                raise ArtifactError(f"{self._path} was truncated while it was read; run the same command again")
        return values

    def __setitem__(self, indices: Tensor, values: Tensor) -> None:
        with storage_errors(self._path):
            for row, place in zip(values.contiguous(), self._places(indices), strict=True):
                os.pwrite(self._file.fileno(), row.numpy(), place)

    def _places(self, indices: Tensor) -> list[int]:
        return [4 * math.prod(self.shape[1:]) * index for index in indices.tolist()]


class Handed:
    """Tensors that blocks hand on beside hidden states: one file for each sequence, or none if there are none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __getitem__(self, indices: Tensor) -> dict[str, Tensor]:
        """Tensors by name of the sequences with these indices; dimension 0 is the sequence."""
        if not self.directory.is_dir():
            return {}
        rows = [load_tensors(self._file(index)) for index in indices.tolist()]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def __setitem__(self, indices: Tensor, handed: Mapping[str, Tensor]) -> None:
        if handed:
            with storage_errors(self.directory):
                self.directory.mkdir(exist_ok=True)
            for place, index in enumerate(indices.tolist()):
                save_tensors(self._file(index), {name: tensor[place].cpu() for name, tensor in handed.items()})

    def remove(self) -> None:
        with storage_errors(self.directory):
            if self.directory.is_dir():
                shutil.rmtree(self.directory)

    def rename(self, directory: Path) -> None:
        """Move the complete files to `directory`."""
        with storage_errors(directory):
            if self.directory.is_dir():
                self.directory.rename(directory)

    def _file(self, index: int) -> Path:
        return self.directory / f"window-{index:06d}.safetensors"


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the machine multiplies it in hardware, several times as fast as float32; else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    features = torch.cpu.get_capabilities()
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast of matmuls to `dtype`; the residual stream, norms and the softmax stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def run_block(block: nn.Module, given: BlockInput, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output `[b, L, d]` in float32, and the tensors that it hands on to later blocks."""
    with autocast(given.device, dtype):
        output, handed = given.run(block)
    return output.float(), handed

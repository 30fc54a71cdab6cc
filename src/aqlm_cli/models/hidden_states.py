"""States between two blocks: too many for memory, so they live in files and are touched a batch at a time."""

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
    """Hidden states `[windows, ..., d]`, float32, in the file at `path`, read and written some windows at a time.

    Read and not mapped: pages of a mapped file count as memory of the process, and would all be there in the end.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        """Open what an earlier process left. Raises ArtifactError if it has another size."""
        size, wanted = path.stat().st_size if path.is_file() else 0, 4 * math.prod(shape)
        if size != wanted:
            raise ArtifactError(f"{path} has {size} bytes, not {wanted}; remove {path.parent} to begin anew")
        self.shape = shape
        self._path = path
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - open for as long as the states are used

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...]) -> Activations:
        """New ones, all zero; the disk's space is taken at once, so that it cannot run out later."""
        with storage_errors(path), open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
        return cls(path, shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, windows: Tensor) -> Tensor:
        """Of the windows with these numbers, `[b, ..., d]`."""
        values = torch.empty(len(windows), *self.shape[1:])
        for row, place in zip(values, self._places(windows), strict=True):
            if os.preadv(self._file.fileno(), [row.numpy()], place) != row.nbytes:
                raise ArtifactError(f"{self._path} was cut short while it was read; run the same command again")
        return values

    def __setitem__(self, windows: Tensor, values: Tensor) -> None:
        with storage_errors(self._path):
            for row, place in zip(values.contiguous(), self._places(windows), strict=True):
                os.pwrite(self._file.fileno(), row.numpy(), place)

    def _places(self, windows: Tensor) -> list[int]:
        return [4 * math.prod(self.shape[1:]) * window for window in windows.tolist()]


class Handed:
    """What blocks hand on beside hidden states, in a file for each window; no file where they hand on nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __getitem__(self, windows: Tensor) -> dict[str, Tensor]:
        """By name, of the windows with these numbers, which come first in each tensor."""
        if not self.directory.is_dir():
            return {}
        rows = [load_tensors(self._file(window)) for window in windows.tolist()]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def __setitem__(self, windows: Tensor, handed: Mapping[str, Tensor]) -> None:
        if handed:
            with storage_errors(self.directory):
                self.directory.mkdir(exist_ok=True)
            for place, window in enumerate(windows.tolist()):
                save_tensors(self._file(window), {name: tensor[place].cpu() for name, tensor in handed.items()})

    def remove(self) -> None:
        with storage_errors(self.directory):
            if self.directory.is_dir():
                shutil.rmtree(self.directory)

    def rename(self, directory: Path) -> None:
        """They are complete."""
        with storage_errors(directory):
            if self.directory.is_dir():
                self.directory.rename(directory)

    def _file(self, window: int) -> Path:
        return self.directory / f"window-{window:06d}.safetensors"


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it in hardware, several times as fast as float32; float32 elsewhere."""
    if device.type != "cpu":
        return torch.bfloat16
    features = torch.cpu.get_capabilities()
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in `dtype`; the residual stream, norms and the softmax stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def run_block(block: nn.Module, given: BlockInput, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output `[b, L, d]` in float32, and what it hands on to later ones."""
    with autocast(given.device, dtype):
        output, handed = given.run(block)
    return output.float(), handed

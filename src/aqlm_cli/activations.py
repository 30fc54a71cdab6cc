"""Hidden states between two blocks: too many for memory, so they live in a file and are touched a batch at a time."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from aqlm_cli.blocks import BlockCall, first_inputs
from aqlm_cli.errors import ArtifactError
from aqlm_cli.storage import storage_errors


class Activations:
    """Hidden states `[windows, L, d]` float32 in the file at `path`, read and written some windows at a time.

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
        """Of the windows with these numbers, `[b, L, d]`."""
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


def entering_states(network: nn.Module, ids: Tensor, batch: int, device: torch.device, path: Path) -> Activations:
    """What enters the first block for the token ids `[windows, L]`, in a new file at `path`; no block is computed."""
    features = first_inputs(network, ids[:1, :1].to(device)).shape[2]
    states = Activations.create(path, (*ids.shape, features))
    for chosen in torch.arange(len(ids)).split(batch):
        states[chosen] = first_inputs(network, ids[chosen].to(device)).float().cpu()
    return states


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
def run_block(block: nn.Module, call: BlockCall, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The block's output `[b, L, d]` in float32."""
    with autocast(hidden.device, dtype):
        return call(block, hidden).float()

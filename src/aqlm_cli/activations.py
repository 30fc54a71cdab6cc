"""Hidden states between two blocks: too many for memory, so they live in a file and are touched a batch at a time."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from aqlm_cli.blocks import BlockCall
from aqlm_cli.errors import ArtifactError
from aqlm_cli.storage import storage_errors


def activation_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor whose memory is a new file at `path`; the system writes and drops pages as it needs.

    The space is reserved at once: a disk that fills up later would kill the process in the middle of a store.
    """
    with storage_errors(path), open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
    return open_activations(path, shape)


def open_activations(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The tensor that an earlier process left at `path`. Raises ArtifactError if it has another size."""
    size = path.stat().st_size if path.is_file() else 0
    if size != 4 * math.prod(shape):
        raise ArtifactError(f"{path} has {size} bytes, not {4 * math.prod(shape)}; remove {path.parent} to begin anew")
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)


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

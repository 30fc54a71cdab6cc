"""The processes that train one model together, as torchrun starts them; one that was started alone is a world, too.

    torchrun --nproc-per-node 2 -m aqlm_cli finetune RUN

Each takes its share of the windows of a step, and torch's DistributedDataParallel makes a mean of their gradients. The
first one leads: it alone writes and reports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=30)
"""With one another: the first may quantize before it has anything to say. torchrun ends all when one has failed."""


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def described(self) -> dict[str, str]:
        """What of it decides the last bits of a sum."""
        return {} if self.size == 1 else {"processes": str(self.size)}

    def share(self, windows: Tensor) -> Tensor:
        """This process's own, as many as every other's."""
        return windows[self.rank :: self.size]

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module; its gradients become the mean over the world."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def apart(self, module: nn.Module) -> AbstractContextManager[None]:
        """While open, gradients are summed up in this process alone."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def total(self, value: float) -> float:
        """Over the world."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64, device=_message_device())
        distributed.all_reduce(found)
        return float(found)

    def broadcast(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """What the first one says; the others give None, and wait."""
        if self.size == 1:
            assert message is not None
            return message
        said = [json.dumps(message)]
        distributed.broadcast_object_list(said, src=0, device=_message_device())
        found: dict[str, Any] = json.loads(said[0])
        return found


def _message_device() -> torch.device:
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def processes_here() -> int:
    """Of the world, on this machine, which share its processor."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """`cuda` means a card for each process on this machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and processes_here() > 1 else device


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that torchrun has set up, over NCCL on GPUs and Gloo elsewhere; a world of one if it has not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield World(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()

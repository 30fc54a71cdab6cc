"""The processes that train one model together, as torchrun starts them; a single process is a world of one.

    torchrun --nproc-per-node 2 -m aqlm_cli finetune RUN

Each takes its share of the sequences of a step, and DistributedDataParallel averages their gradients. Rank 0 alone
writes and reports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(days=30)
"""Workers wait for rank 0, which may quantize first. torchrun ends all processes when one has failed."""


@dataclass(frozen=True)
class World:
    """All processes that train together, as one of them sees it."""

    rank: int = 0
    size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def described(self) -> dict[str, str]:
        """The part of it that decides the last bits of a sum."""
        return {} if self.size == 1 else {"processes": str(self.size)}

    def share(self, sequences: Tensor) -> Tensor:
        """The part of this process, as large as every other's."""
        return sequences[self.rank :: self.size]

    def parallel(self, module: nn.Module) -> nn.Module:
        """Wrap the module so that its gradients become the mean over the world."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def unsynchronized(self, module: nn.Module) -> AbstractContextManager[None]:
        """Sum gradients in this process alone while this is open."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def total(self, value: float) -> float:
        """The sum over all processes."""
        if self.size == 1:
            return value
        sum_ = torch.tensor(value, dtype=torch.float64, device=_message_device())
        distributed.all_reduce(sum_)
        return float(sum_)

    def from_rank_zero(self, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Call `compute` in rank 0 alone, and return its result in every process."""
        if self.size == 1:
            return compute()
        message = [json.dumps(compute()) if self.is_rank_zero else None]
        distributed.broadcast_object_list(message, src=0, device=_message_device())
        received: dict[str, Any] = json.loads(str(message[0]))
        return received


def _message_device() -> torch.device:
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def processes_here() -> int:
    """Number of processes of the world on this machine, which share its CPU."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """The device of this process: of `cuda`, a card of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and processes_here() > 1 else device


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the world that torchrun set up, over NCCL on GPUs and Gloo elsewhere; without torchrun, a world of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    try:
        yield World(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()

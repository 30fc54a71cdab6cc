"""Parts that every training shares: the LR schedule, the unit of learning rates, and a copy of the state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def learning_rate_factor(step: int, steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Factor of the full learning rate: a linear warm-up, then half a cosine down to `min_lr_ratio`."""
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    return warm * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def root_mean_square(parameter: Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt())


def copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in values.items()}


@torch.no_grad()
def put_back(values: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Copy saved values back; the inverse of `copied`."""
    for name, tensor in values.items():
        tensor.copy_(kept[name])

"""Adam (arXiv 1412.6980) and LAMB (arXiv 1904.00962), one tensor at a time, in moments of a chosen precision.

torch has no LAMB, and its Adam keeps a first moment even where beta1 is 0, which for the buffer of all weights would be
as much memory again as the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPSILON = 1e-12
"""Added to the root of the mean square: gradients of a mean over tokens are small, and 1e-8 would damp the steps."""


@dataclass(eq=False)
class Adam:
    """Moments of tensors by name, and the directions that they give."""

    beta1: float
    beta2: float
    dtype: torch.dtype = torch.float32  # of the moments
    moments: dict[str, Tensor] = field(default_factory=dict)  # "first/NAME", "second/NAME" and their "steps/NAME"

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """Direction of the next step, in float32: each value near 1 where gradients are all alike."""
        gradient = gradient.float()
        steps = self.moments.setdefault("steps/" + name, torch.tensor(0)).add_(1)
        second = self._average("second/" + name, gradient.square(), self.beta2, int(steps))
        first = self._average("first/" + name, gradient, self.beta1, int(steps)) if self.beta1 else gradient
        return first / (second.sqrt_() + EPSILON)

    def _average(self, key: str, value: Tensor, beta: float, steps: int) -> Tensor:
        """The running mean with this value, corrected for its start at zero."""
        kept = self.moments.get(key)
        mean = value * (1 - beta)
        if kept is not None:  # on the CPU, where it has just been restored
            mean.add_(kept.to(value.device, torch.float32), alpha=beta)
        self.moments[key] = mean.to(self.dtype, copy=True)
        return mean / (1 - beta**steps)

    def restore(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Take the moments from stored tensors whose names have this prefix."""
        ours = tuple(f"{prefix}{kind}/" for kind in ("first", "second", "steps"))
        names = (name for name in tensors if name.startswith(ours))
        self.moments = {name.removeprefix(prefix): tensors[name].clone() for name in names}


def trust_ratio(values: Tensor, direction: Tensor) -> float:
    """The trust ratio of LAMB, ||values|| / ||direction||; 0 for a tensor of zeros."""
    length = float(direction.norm())
    return float(values.norm()) / length if length > 0 else 0.0

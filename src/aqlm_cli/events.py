"""Events that a stage emits while it runs.

A stage never prints. It calls `emit(event)` for each thing worth telling, and the command line decides whether that
becomes a progress bar, a plain line or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

CHECK = "check"
"""Name by which the check of the block calls, which a stage runs first, tells its progress."""


@dataclass(frozen=True)
class StageStarted:
    """A stage of `total` steps of `unit` ("sequence", "block"); `done` were finished before an interruption."""

    stage: str
    total: int
    unit: str
    done: int = 0


@dataclass(frozen=True)
class Advanced:
    """`done` steps of the stage are finished, including those before an interruption."""

    stage: str
    done: int
    detail: str = ""


@dataclass(frozen=True)
class LayerQuantized:
    """`relative_error` is tr(dW H dW^T) / tr(W H W^T), over the undamped H, of the matrix in 16 bits; the fit of the
    block comes after it."""

    path: str
    relative_error: float
    bits_per_weight: float
    seconds: float


@dataclass(frozen=True)
class BlockQuantized:
    """`index` counts from 0. `relative_error` is the squared error of the block's output on the training sequences,
    divided by the square of the output; `gain` is the share of the held-out error that fitting removed."""

    index: int
    relative_error: float
    gain: float
    seconds: float


@dataclass(frozen=True)
class Noted:
    """A fact the user should see: a stage that is reused, a file that is fetched."""

    message: str


@dataclass(frozen=True)
class Warned:
    """Something that may not be what the user wants; the stage continues."""

    message: str


Event: TypeAlias = StageStarted | Advanced | LayerQuantized | BlockQuantized | Noted | Warned
Emit: TypeAlias = Callable[[Event], None]


def silent(_: Event) -> None:
    """Discard the event."""

"""The number of training steps that fit in a time, measured on a few steps whose effect is undone."""

from __future__ import annotations

import time

from aqlm_cli.quantization.training.distill import Distillation, Training, one_step
from aqlm_cli.spec.finetune import FinetuneConfig

TIMED_STEPS = 3


def steps_within(seconds: float, data: Distillation, training: Training, settings: FinetuneConfig, seed: int) -> int:
    """Steps that fit, evaluations included; at least 1. All processes get the number of rank 0."""
    timed = settings.model_copy(update={"steps": TIMED_STEPS})
    one_step(data, training, timed, seed)  # compiles whatever has to be compiled
    started = time.monotonic()
    for _ in range(TIMED_STEPS - 1):
        one_step(data, training, timed, seed)
    step = (time.monotonic() - started) / (TIMED_STEPS - 1)
    started = time.monotonic()
    data.held_out_divergence(settings.micro_batch)
    evaluation = (time.monotonic() - started) / settings.evaluate_every  # per step
    training.undo()
    return int(data.world.from_rank_zero(lambda: {"steps": max(1, int(seconds / (step + evaluation)))})["steps"])

"""Time of reading a prompt and of decoding after it, for several models in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aqlm_cli.evaluation.llama_cpp import LlamaModel
from aqlm_cli.events import Advanced, Emit, StageStarted
from aqlm_cli.models import Decoding
from aqlm_kernels import AdditiveLinear, CompressedLinear


class Speed(NamedTuple):
    """Tokens per second."""

    prefill: float
    decode: float


class Pass(NamedTuple):
    """One prompt, read and continued."""

    logits: Tensor  # [tokens, vocabulary], of every decode step
    speed: Speed


@dataclass(frozen=True)
class Candidate:
    """A model that is timed, its size, and the error of its logits (None where there is nothing to compare with)."""

    name: str
    decoding: Decoding | LlamaModel
    bytes: int
    read: Mapping[str, int]  # bytes that one token reads, by part; empty where the parts are not known
    relative_error: float | None
    layers: tuple[AdditiveLinear | CompressedLinear, ...] = ()  # the quantized ones that x is multiplied by

    @property
    def read_bytes(self) -> int:
        return sum(self.read.values()) if self.read else self.bytes

    def time(self, ids: Tensor, prompt: int) -> Speed:
        if isinstance(self.decoding, LlamaModel):
            return Speed(*self.decoding.speed(prompt, len(ids) - prompt, torch.get_num_threads()))
        return run_pass(self.decoding, ids, prompt).speed


def run_pass(decoding: Decoding, ids: Tensor, prompt: int) -> Pass:  # ids [prompt + tokens]
    """Read the prompt at once, then feed the other tokens one by one."""
    started = time.perf_counter()
    decoding.prefill(ids[:prompt])
    read = time.perf_counter()
    logits = [decoding.step(token) for token in ids[prompt:].tolist()]
    finished = time.perf_counter()
    return Pass(torch.stack(logits), Speed(prompt / (read - started), len(logits) / (finished - read)))


def interleave(
    candidates: Sequence[Candidate], ids: Tensor, prompt: int, repeats: int, emit: Emit
) -> dict[str, list[Speed]]:
    """Time every model once, then every model again. All have run before, so nothing is compiled any more."""
    passes: dict[str, list[Speed]] = {candidate.name: [] for candidate in candidates}
    emit(StageStarted("bench", repeats, "repeat"))
    for done in range(1, repeats + 1):
        for candidate in candidates:
            passes[candidate.name].append(candidate.time(ids, prompt))
        emit(Advanced("bench", done))
    return passes

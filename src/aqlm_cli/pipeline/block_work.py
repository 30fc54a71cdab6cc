"""The matrices of one block, quantized side by side and put into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from aqlm_cli.events import Emit, LayerQuantized, Noted, StageStarted, Warned
from aqlm_cli.memory import give_back_memory, peak_memory_bytes
from aqlm_cli.models.blocks import linears
from aqlm_cli.quantization.block_files import put_matrix
from aqlm_cli.quantization.parallel import Compressed, Task, compress_all
from aqlm_cli.quantization.resume import ResumeState
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.runs.artifact import Stage
from aqlm_cli.runs.files import disk_bytes
from aqlm_cli.runs.stages import QUANTIZE
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.treatment import Treatment

UNREACHED = "no text reaches it"
"""The reason of a layer that stays as it is, such as attention to an absent encoder. An expert that no token is routed
to is quantized with the H of all experts."""


@dataclass(frozen=True, eq=False)
class BlockWork:
    """The parts that stay the same from block to block."""

    config: RunConfig
    treatments: Mapping[str, Treatment]  # of every layer to quantize, by path
    workers: int  # matrices compressed at once
    stage: Stage
    resume_state: ResumeState
    emit: Emit

    def begin(self, done: int, blocks: int) -> None:
        """Tell how many blocks there are, and how many an interruption left finished."""
        if done:
            self.emit(Noted(f"{self.stage.directory} holds {done} of {blocks} blocks; resuming after them"))
        self.emit(StageStarted(QUANTIZE.name, blocks, "block", done=done))

    def record(self, index: int, found: Mapping[str, Any], started: float) -> float:
        """Write what was found of a block that is about to be finished, and what it took since `started`: seconds."""
        seconds = time.monotonic() - started
        taken = {"memory_bytes": peak_memory_bytes(), "disk_bytes": disk_bytes(self.stage.directory.parent)}
        self.resume_state.record(index, {**found, "seconds": seconds, **taken})
        return seconds


def figures_of(compressed: Mapping[str, Compressed]) -> dict[str, dict[str, float]]:
    """The figures of these layers that the manifest keeps, by path."""
    return {
        path: {"relative_error": one.relative_error, "seconds": one.seconds} for path, one in sorted(compressed.items())
    }


def compress_block(
    work: BlockWork,
    prefix: str,
    block: nn.Module,
    measure: Callable[[Mapping[str, nn.Linear]], Mapping[str, LayerStatistics]],
) -> tuple[dict[str, Compressed], dict[str, LayerStatistics]]:
    """Put the compressed layers into the block at `prefix`; `measure` gives the statistics of its layers by path.

    Returns each of them by its path in the model, and their statistics by their paths in the block.
    """
    section = work.config.quantize
    # Paths inside the block, as the block knows them.
    chosen = {path: layer for path, layer in linears(block, "").items() if f"{prefix}.{path}" in work.treatments}
    statistics = measure(chosen)
    give_back_memory()
    for path in chosen.keys() - statistics.keys():
        work.emit(Warned(f"{prefix}.{path} stays in 16 bits: {UNREACHED}; add text to quantize it"))
    chosen = {path: layer for path, layer in chosen.items() if path in statistics}
    kept = {path: work.resume_state.kept(f"{prefix}.{path}") for path in chosen}
    tasks = [
        Task(f"{prefix}.{path}", layer.weight.detach(), statistics[path], work.treatments[f"{prefix}.{path}"])
        for path, layer in chosen.items()
        if kept[path] is None
    ]
    made = compress_all(tasks, section.settings_of, work.config.seed, work.workers, _keeper(work))
    compressed = {**made, **{one.path: one for one in kept.values() if one is not None}}
    for path in chosen:
        put_matrix(block, path, compressed[f"{prefix}.{path}"].matrix)
    return compressed, {path: statistics[path] for path in chosen}  # and not of a layer that shares inputs with one


def _keeper(work: BlockWork) -> Callable[[Compressed], None]:
    def keep(one: Compressed) -> None:
        work.resume_state.keep(one)
        work.emit(LayerQuantized(one.path, one.relative_error, one.matrix.bits() / one.weights, one.seconds))

    return keep

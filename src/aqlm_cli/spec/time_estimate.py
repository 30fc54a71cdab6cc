"""The duration of a run: the sizes of cost.py times what this machine was measured to do (evaluation/machine.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aqlm_cli.spec.cost import BlockShape, ModelShape, Work
from aqlm_cli.spec.plan import Target


@dataclass(frozen=True)
class Rates:
    """Seconds that this machine was measured to take.

    `forward`, `quantized_forward` and `step` are per token and weight of a block: a pass of the dense block, of the
    quantized block, and a training step. `moment` is per token and entry of H. `matrices` are measured times of
    compression by (out, in); `weight` and `coupling` extend them to others, per weight, and per weight and input.
    `character` is of reading text, `byte` of writing a checkpoint.
    """

    forward: float
    quantized_forward: float
    step: float
    moment: float
    matrices: Mapping[tuple[int, int], float]
    weight: float
    coupling: float
    character: float
    byte: float

    def compression(self, target: Target) -> float:
        out, features = target.out_features, target.in_features
        measured = self.matrices.get((out, features))
        return measured if measured is not None else out * features * (self.weight + features * self.coupling)


CHARACTERS_PER_TOKEN = 4.5


def calibration_seconds(model: ModelShape, work: Work, rates: Rates) -> float:
    tokens = work.statistics_sequences_of * work.length
    weights = model.vocabulary * model.hidden + sum(block.weights_per_token for block in model.blocks)
    text = work.sequences * work.length * CHARACTERS_PER_TOKEN * rates.character
    return text + tokens * weights * rates.forward


def quantization_seconds(model: ModelShape, work: Work, rates: Rates) -> float:
    tables = sum(map(rates.compression, model.tables)) / work.workers  # whose rows go side by side
    return tables + sum(_block_seconds(block, work, rates) for block in model.quantized_blocks)


def _block_seconds(block: BlockShape, work: Work, rates: Rates) -> float:
    weights, all_sequences = block.weights_per_token, work.measured + work.held_out
    measuring = all_sequences * work.length * weights * rates.forward
    measuring += work.measured * work.length * block.entries_per_token * rates.moment
    epochs = work.fit.epochs or 0
    steps = epochs * work.fitted * work.length * weights * rates.step
    validation = (1 + epochs) * work.held_out * work.length * weights * rates.quantized_forward if work.fitted else 0.0
    advancing = all_sequences * work.length * weights * rates.quantized_forward
    return measuring + _makespan(map(rates.compression, block.quantized), work.workers) + steps + validation + advancing


def packing_seconds(packed_bytes: int, rates: Rates) -> float:
    """Written, read back and compared."""
    return 2 * packed_bytes * rates.byte


def _makespan(seconds: Iterable[float], workers: int) -> float:
    """Longest first, each to the worker that is free first, as `compress_all` does."""
    busy = [0.0] * workers
    for duration in sorted(seconds, reverse=True):
        busy[busy.index(min(busy))] += duration
    return max(busy)

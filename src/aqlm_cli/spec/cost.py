"""The cost estimate of a run before it starts: memory and disk of every stage (time: time_estimate.py).

Arithmetic on the shapes of a model and on what a short measurement says of this machine (evaluation/machine.py). Memory
is what the process has resident, so it counts Python and its libraries, too. The coefficients were read off the code
and checked against peaks of SmolLM2 and of a block of the size of Llama-3.2-1B's.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from aqlm_cli.errors import PlanError
from aqlm_cli.spec.calibration_split import split_sequences
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.methods import METHODS
from aqlm_cli.spec.plan import EXPERT, Target
from aqlm_cli.spec.quantize import FitConfig
from aqlm_cli.spec.schemes import total_bytes

PROCESS = 800_000_000
"""Bytes of Python with torch, transformers and the compiled search, before any model (measured, torch 2.13)."""

FLOAT = 4  # bytes

INPUTS_OF_ONE_WIDTH = 4
"""Hessians of inputs of the same width that a block has at most, in all families known: of the queries, of keys and
values, whose tokens count differently, of the attention's output, and of the feed-forward."""


ROUTED_SHARE = 0.25
"""Share of a block's experts that a token is sent to, at most, in all families known: 2 of 8, 4 of 32, 8 of 128."""


@dataclass(frozen=True)
class BlockShape:
    """The matrices of one block, and how many numbers it has in all."""

    targets: tuple[Target, ...]
    parameters: int

    @property
    def quantized(self) -> tuple[Target, ...]:
        return tuple(target for target in self.targets if target.scheme is not None)

    @property
    def input_widths(self) -> tuple[int, ...]:
        """Widths of all inputs whose Hessian is needed, but for experts; inputs that layers share count once."""
        layers: dict[int, int] = defaultdict(int)
        for target in self.quantized:
            layers[target.in_features] += target.kind != EXPERT
        return tuple(width for width, count in layers.items() for _ in range(min(count, INPUTS_OF_ONE_WIDTH)))

    @property
    def expert_widths(self) -> tuple[int, ...]:
        """Widths of the inputs of experts, each of which has a Hessian of its own."""
        return tuple(target.in_features for target in self.quantized if target.kind == EXPERT)

    @property
    def hessian_entries(self) -> int:
        """Numbers in all Hessians of the block, and in one that is the mean of all experts."""
        widths = (*self.input_widths, *self.expert_widths, max(self.expert_widths, default=0))
        return sum(width**2 for width in widths)

    @property
    def entries_per_token(self) -> float:
        """Entries of Hessians that one token adds to."""
        experts = sum(width**2 for width in self.expert_widths)
        return sum(width**2 for width in self.input_widths) + ROUTED_SHARE * experts

    @property
    def weights_per_token(self) -> float:
        """Weights that one token is multiplied by."""
        return sum(target.weights * (ROUTED_SHARE if target.kind == EXPERT else 1) for target in self.targets)

    @property
    def vectors(self) -> int:
        """Numbers in norms and biases."""
        return self.parameters - sum(target.weights for target in self.targets)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model. `outside` counts the parameters outside its blocks, a tied head once; the largest tensor there
    is `[vocabulary, hidden]`. `tables` are the matrices there that are quantized."""

    blocks: tuple[BlockShape, ...]
    outside: int
    vocabulary: int
    hidden: int
    tables: tuple[Target, ...] = ()

    @property
    def quantized_blocks(self) -> tuple[BlockShape, ...]:
        return tuple(block for block in self.blocks if block.quantized)


@dataclass(frozen=True)
class Work:
    """The amount of work of a run, and how much of it is done at a time."""

    sequences: int
    length: int  # tokens of a sequence
    statistics_sequences_of: int  # of calibrate
    measured: int  # sequences that measure the Hessians
    held_out: int
    batch: int  # sequences that go through a block at once
    fit: FitConfig
    workers: int  # matrices compressed at once
    product_bytes: int  # of a number in the products

    @property
    def fitted(self) -> int:
        return min(self.fit.sequences, self.measured) if self.fit.epochs else 0


def work_of(config: RunConfig, sequences: int, workers: int, product_bytes: int) -> Work:
    """The work that the settings ask for, on so many sequences of text."""
    section, split = config.quantize, split_sequences(config.quantize, sequences)
    return Work(
        sequences=sequences,
        length=config.calibrate.sequence_length,
        statistics_sequences_of=min(config.calibrate.statistics_sequences, sequences),
        measured=split.measured,
        held_out=split.held_out,
        batch=section.batch,
        fit=section.fitting,
        workers=workers,
        product_bytes=product_bytes,
    )


@dataclass(frozen=True)
class Cost:
    """One stage: seconds, peak resident memory, and the most that the run then has on the disk, in bytes."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


# --------------------------------------------------------------------------------------------------------------- memory


def calibration_memory(model: ModelShape, work: Work) -> int:
    """The logits of one sequence, beside everything outside the blocks; or one running block."""
    casts = work.product_bytes * model.vocabulary * model.hidden  # of the head's weight to the type of products
    logits = work.length * model.vocabulary * (work.product_bytes + 2 * FLOAT)
    running = max(FLOAT * block.parameters + _activations(block, 1, work) for block in model.blocks)
    return PROCESS + FLOAT * model.outside + max(casts + logits, running)


def quantization_memory(model: ModelShape, work: Work) -> int:
    """The largest of what the parts of a block need; freed memory is given back between them."""
    if not work.sequences:  # no text is read: nothing runs
        return PROCESS + max(_compressing(block, work) for block in model.blocks)
    entering = FLOAT * (model.outside + model.blocks[0].parameters + 2 * work.batch * work.length * model.hidden)
    parts = (_measuring, _compressing, _fitting)
    return PROCESS + max(entering, *(part(block, work) for block in model.blocks for part in parts))


def _measuring(block: BlockShape, work: Work) -> int:
    """Sums in float64, and either a forward pass or one product x^T x with what goes into it."""
    widths, tokens = block.input_widths, work.batch * work.length
    inputs = 3 * sum(widths) * tokens  # kept until the pass ends, some in 16 bits and some in 32; not those of experts
    widest = max((*widths, *block.expert_widths), default=0)
    product = FLOAT * (widest**2 + widest * tokens)
    sums = 2 * FLOAT * block.hessian_entries
    return FLOAT * block.parameters + sums + inputs + max(_activations(block, work.batch, work), product)


def _compressing(block: BlockShape, work: Work) -> int:
    moments = FLOAT * block.hessian_entries
    largest = sorted(map(_searching, block.quantized), reverse=True)[: work.workers]
    return FLOAT * block.parameters + moments + sum(largest)


def _searching(target: Target) -> int:
    """Memory that quantizing one matrix takes at most, beside the weight and the Hessian."""
    assert target.scheme is not None
    shape = target.out_features, target.in_features
    own = None if target.method is None else METHODS[target.method].peak_bytes
    return max(target.scheme.peak_bytes(*shape), 0 if own is None else own(*shape))


def _fitting(block: BlockShape, work: Work) -> int:
    """Dequantized weights and all that the backward pass needs of a training batch; or the pass that ends the block; or
    the base model's block, with which its layers are compared one by one."""
    weights = sum(target.weights * _copies(target, work) for target in block.quantized)
    codes = sum(quantized_bytes(target) for target in block.quantized)
    parts = ((t.in_features + t.out_features) * (ROUTED_SHARE if t.kind == EXPERT else 1) for t in block.targets)
    features = int(sum(parts))
    saved = FLOAT * features * work.fit.batch * work.length if work.fitted else 0
    training = weights + saved
    widest = max((*block.input_widths, *block.expert_widths), default=0)
    compared = FLOAT * (block.parameters + widest**2) if work.fitted else 0
    return codes + max(training, _activations(block, work.batch, work), compared)


def _copies(target: Target, work: Work) -> int:
    """Bytes per weight while a block is fitted: where no compiled product serves, torch keeps two factors, too."""
    compiled = target.scheme is not None and target.scheme.codebook_shape is not None
    return work.product_bytes + (FLOAT if compiled or not work.fitted else 3 * FLOAT)


def _activations(block: BlockShape, sequences: int, work: Work) -> int:
    """Bytes of one forward pass without gradients: four tensors of the widest layer, eight of the residual stream."""
    widest = max((target.out_features for target in block.targets), default=0)
    hidden = min((target.in_features for target in block.targets), default=0)
    return sequences * work.length * (4 * work.product_bytes * widest + 8 * FLOAT * hidden)


def packing_memory(model: ModelShape) -> int:
    """The largest tensor in 16 bits: as it was read, rounded, and as bytes."""
    largest = max(model.vocabulary * model.hidden, max(t.weights for b in model.blocks for t in b.targets))
    return PROCESS + 3 * 2 * largest


# ----------------------------------------------------------------------------------------------------------------- disk


def calibration_disk(model: ModelShape, work: Work) -> int:
    """Token ids, mean squares of single features, and hidden states while it runs."""
    return _calibration_bytes(model, work) + FLOAT * work.statistics_sequences_of * work.length * model.hidden


def quantization_disk(model: ModelShape, work: Work) -> int:
    """Hidden states twice, the finished blocks, and matrices and Hessians of the last one before it was fitted."""
    states = FLOAT * (work.measured + work.held_out) * work.length * model.hidden
    moments = FLOAT * max((block.hessian_entries for block in model.quantized_blocks), default=0) if work.fitted else 0
    finished = sum(_stored(block) for block in model.quantized_blocks)
    unfitted = max(map(_stored, model.quantized_blocks), default=0)
    return _calibration_bytes(model, work) + 2 * states + finished + unfitted + moments


def packing_disk(model: ModelShape, work: Work, packed_bytes: int) -> int:
    stored = sum(_stored(block) for block in model.quantized_blocks) + sum(map(quantized_bytes, model.tables))
    return _calibration_bytes(model, work) + stored + packed_bytes


def _calibration_bytes(model: ModelShape, work: Work) -> int:
    features = sum(target.in_features for block in model.blocks for target in block.targets)
    return FLOAT * (work.sequences * work.length + features)


def _stored(block: BlockShape) -> int:
    return sum(map(quantized_bytes, block.quantized)) + FLOAT * block.vectors


def quantized_bytes(target: Target) -> int:
    """Bytes of a matrix in `quantized/`."""
    assert target.scheme is not None
    return total_bytes(target.scheme.stored_layouts(target.out_features, target.in_features))


# --------------------------------------------------------------------------------------------------------------- limits


def within_memory(model: ModelShape, work: Work, limit: int | None) -> Work:
    """The work with the largest batch (as wanted, a half, a quarter, ...), then the most workers, below the limit.

    Raises PlanError with the least limit that can be kept.
    """
    if limit is None:
        return work
    for batch in (work.batch >> halvings for halvings in range(work.batch.bit_length())):
        for workers in range(work.workers, 0, -1):
            choice = replace(work, batch=batch, workers=workers)
            if peak_memory(model, choice) <= limit:
                return choice
    least = least_memory(model, work)
    raise PlanError(
        f"--max-memory {limit / 1e9:.2f}GB: this model needs {least / 1e9:.2f}GB with one sequence and one matrix at a "
        f"time; {what_needs_less(model)}"
    )


def least_memory(model: ModelShape, work: Work) -> int:
    """Peak memory with one sequence and one matrix at a time."""
    return peak_memory(model, replace(work, batch=1, workers=1))


def peak_memory(model: ModelShape, work: Work) -> int:
    return max(calibration_memory(model, work), quantization_memory(model, work), packing_memory(model))


def what_needs_less(model: ModelShape) -> str:
    """Advice against too little memory: the matrices with the most inputs take it."""
    targets = (target for block in model.blocks for target in block.quantized)
    widest = max(targets, key=lambda target: target.in_features, default=None)
    if widest is None:
        return "what remains is the model's own embeddings and head"
    return f"--skip '.*{widest.path.rpartition('.')[2]}' leaves those with {widest.in_features} inputs in 16 bits"

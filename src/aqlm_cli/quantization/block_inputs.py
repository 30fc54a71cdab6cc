"""The calibration pass: hidden states of all sequences, block by block, and the statistics of each block.

The output of the quantized blocks so far is the input of the next block, so that its Hessians and its fit see the
errors made before it. The target is the output of the base model's block for those same inputs. Hidden states of the
base model as targets, which would correct earlier errors too, were measured and are no better. The states lie in files
and are read a batch at a time. The inputs of a block stay on the disk until those of the next block are complete, so
that an interruption costs one block at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from aqlm_cli.events import CHECK, Advanced, Emit, StageStarted
from aqlm_cli.models import BlockLoader, ModelSource, load_outside
from aqlm_cli.models.blocks import find_blocks, observe_inputs, unfuse
from aqlm_cli.models.experts import expert_groups
from aqlm_cli.models.hidden_states import Activations, Handed, compute_dtype, run_block
from aqlm_cli.models.received_attention import received_attention
from aqlm_cli.models.walk import BlockInput, Walk
from aqlm_cli.models.walk_check import open_walk
from aqlm_cli.quantization.resume import ResumeState
from aqlm_cli.quantization.solvers.hessian import LayerStatistics, SecondMoment
from aqlm_cli.runs.artifact import Artifact
from aqlm_cli.runs.files import load_tensors, publish_file, storage_errors
from aqlm_cli.seeds import generator
from aqlm_cli.spec.calibration_split import split_sequences
from aqlm_cli.spec.config import RunConfig


@dataclass(frozen=True, eq=False)
class CalibrationPass:
    """State at one block: `hidden` are its inputs, `targets` its outputs in the base model.

    The first `fitted` sequences, and those after `measured`, have targets.
    """

    walk: Walk
    work: ResumeState
    index: int
    ids: Tensor  # [n, L]
    hidden: Activations  # [n, ..., d]
    targets: Activations  # [n, ..., d]; made by `measure`, overwritten by `advance`
    measured: int  # sequences whose inputs make the Hessians; those after them are held out
    fitted: int  # sequences that a block is fitted to, at most `measured`
    batch: int
    weighed: bool  # whether tokens count by the attention that they receive, where that is known

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matmuls."""
        return self.walk.dtype

    @property
    def device(self) -> torch.device:
        return self.walk.device

    @property
    def path(self) -> str:
        """Path of the block."""
        return self.walk.paths[self.index]

    def given(self, chosen: Tensor) -> BlockInput:
        """All arguments of the block for the sequences with these numbers."""
        handed = Handed(self.work.handed(self.index))[chosen]
        return self.walk.given(self.index, self.ids[chosen], self.hidden[chosen], handed)

    def measure(self, block: nn.Module, paths: Iterable[str]) -> dict[str, LayerStatistics]:
        """Run the block of the base model for `targets`, and for the Hessian of each of its layers in `paths`.

        Layers that share their inputs share one object; where tokens are weighed, keys and values share another one
        than queries. A layer that no token reaches has none, but for an expert, whose H is made up of that of the
        others: where one expert is in `paths`, all of them are measured.
        """
        wanted, groups = set(paths), expert_groups(block)
        groups = [group for group in groups if wanted.intersection(group)]
        measured = wanted.union(*groups)
        moments: dict[tuple[str, ...], SecondMoment] = {}

        def collect(sharing: tuple[str, ...], x: Tensor) -> None:  # x [tokens, in]
            receiving = tuple(path for path in sharing if path in received)
            for paths in receiving, tuple(path for path in sharing if path not in received):
                if measured.intersection(paths):
                    if paths not in moments:
                        moments[paths] = SecondMoment(x.shape[1], x.device)
                    moments[paths].add(x.to(self.dtype), received[paths[0]] if paths is receiving else None)

        attention = received_attention(block) if self.weighed else nullcontext(dict[str, Tensor]())
        with observe_inputs(block, collect), attention as received:
            for chosen in self._batches(0, self.measured):
                self.targets[chosen] = self._run(block, chosen)[0]
        for chosen in self._batches(self.measured, len(self.hidden)):
            self.targets[chosen] = self._run(block, chosen)[0]
        found: dict[str, LayerStatistics] = {}
        for group in groups:
            found.update(_of_experts([path for path in group if path in wanted], group, moments))
        while moments:  # sums are large, and so are their means: not all of both at once
            sharing, moment = moments.popitem()
            found.update(dict.fromkeys(sharing, moment.statistics()))
        return found

    def advance(self, block: nn.Module) -> float:
        """Run the quantized block; return the relative squared error of its output for the fitted sequences."""
        error = energy = 0.0
        handed_on = Handed(self.work.handing)
        handed_on.remove()  # what an interruption left
        for chosen in self._batches(0, len(self.hidden)):
            output, handed = self._run(block, chosen)
            target = self.targets[chosen]
            fitted = chosen < self.fitted
            error += float((output[fitted] - target[fitted]).square().sum(dtype=torch.float64))
            energy += float(target[fitted].square().sum(dtype=torch.float64))
            self.targets[chosen] = output
            handed_on[chosen] = handed
        return error / energy if energy > 0 else 0.0

    def next(self) -> CalibrationPass:
        """The state at the next block, whose inputs are the outputs of this one; this block is finished."""
        following = Handed(self.work.handed(self.index + 1))
        following.remove()
        Handed(self.work.handing).rename(following.directory)
        publish_file(self.work.targets, self.work.hidden(self.index + 1))
        with storage_errors(self.work.targets):
            self.work.hidden(self.index).replace(self.work.targets)  # its space serves again
        Handed(self.work.handed(self.index)).remove()
        return replace(self, index=self.index + 1, hidden=self.targets, targets=self.hidden)

    def _batches(self, first: int, last: int) -> Iterable[Tensor]:
        return torch.arange(first, last).split(self.batch) if first < last else ()  # split gives a part even of nothing

    def _run(self, block: nn.Module, chosen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output, handed = run_block(block, self.given(chosen), self.dtype)
        return output.cpu(), handed


def _of_experts(
    paths: Iterable[str], group: Sequence[str], moments: dict[tuple[str, ...], SecondMoment]
) -> Iterator[tuple[str, LayerStatistics]]:
    """Statistics of the experts in `paths`, of those in `group`, whose moments are taken out; none without a token."""
    own = {path: moments.pop((path,)) for path in group if (path,) in moments}
    if not own:
        return
    common = next(iter(own.values())).empty()
    for moment in own.values():
        common.merge(moment)
    for path in paths:
        moment = own.pop(path) if path in own else common.empty()
        yield path, moment.statistics(common)


def walk_through(source: ModelSource, ids: Tensor, device: torch.device, emit: Emit) -> Walk:
    """The block calls of a model whose blocks are not in memory, checked with the token ids `[n, L]`.

    Fused experts are taken apart, so that each of their matrices is a layer. Raises ModelError for a family that cannot
    be quantized block by block.
    """
    network = load_outside(source, torch.float32, device)
    blocks = len(find_blocks(network).paths)
    emit(StageStarted(CHECK, blocks, "block"))
    load = BlockLoader(source, torch.float32, device)

    def apart(index: int) -> nn.Module:
        return unfuse(load(index))

    return open_walk(network, apart, ids, compute_dtype(device), lambda done: emit(Advanced(CHECK, done)))


def start_calibration_pass(
    source: ModelSource,
    ids: Tensor,
    measured: int,
    config: RunConfig,
    work: ResumeState,
    emit: Emit,
    outside: Callable[[Walk], object] = lambda walk: None,
) -> CalibrationPass:
    """Hidden states of the token ids `[n, L]` at the first block that is not finished.

    `outside` quantizes what lies outside the blocks of the walk's network, so that the first block sees its errors.
    """
    section, device, index = config.quantize, torch.device(config.device), work.blocks
    walk = walk_through(source, ids, device, emit)
    outside(walk)
    shape = (len(ids), *walk.entering(ids[:1]).shape[1:])
    if not work.hidden(index).exists():
        entering_states(walk, ids, section.batch, work.targets)
        publish_file(work.targets, work.hidden(index))
    hidden = Activations(work.hidden(index), shape)
    with storage_errors(work.directory):
        for old in set(work.directory.glob("hidden-*.activations")) - {work.hidden(index)}:
            old.unlink()  # an interruption came between two renames
    for directory in set(work.directory.glob("handed-*")) - {work.handed(index)}:
        Handed(directory).remove()
    targets, fitted = Activations.create(work.targets, shape), min(section.fit.sequences, measured)
    return CalibrationPass(
        walk, work, index, ids, hidden, targets, measured, fitted, section.batch, section.weighs_tokens
    )


def entering_states(walk: Walk, ids: Tensor, batch: int, path: Path) -> Activations:
    """Inputs of the first block for the token ids `[n, L]`, in a new file at `path`; no block is computed."""
    states = Activations.create(path, (len(ids), *walk.entering(ids[:1]).shape[1:]))
    for chosen in torch.arange(len(ids)).split(batch):
        states[chosen] = walk.entering(ids[chosen]).float().cpu()
    return states


def mixed_sequences(config: RunConfig, calibration: Artifact) -> tuple[Tensor, int]:
    """Token ids `[n, L]`, and the number of sequences that are measured; the others, at the end, are held out.

    Shuffled once, so that any part of them holds text of all sources.
    """
    with calibration.reading("windows.safetensors") as file:
        ids = load_tensors(file)["ids"].long()
    ids = ids[torch.randperm(len(ids), generator=generator(config.seed, "windows"))]
    split = split_sequences(config.quantize, len(ids))
    return ids[: split.total], split.measured


def machine_of(config: RunConfig) -> dict[str, str]:
    """Everything beside settings that decides the last bits: processor, type of the matmuls, and versions."""
    device = torch.device(config.device)
    return {
        "device": device.type,
        "products": str(compute_dtype(device)).removeprefix("torch."),
        "version": metadata.version("aqlm-cli"),
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }

"""The hidden states of all windows on their way through the model, and what one block does with them.

What the quantized blocks so far really put out enters the next block, so that it is measured on, and fitted to, the
errors made before it. The target is what the original block makes of those same inputs; to aim at the original model's
own hidden states instead, which would correct earlier errors too, was measured and is no better. The states lie in
files and are touched a batch at a time. What enters a block stays until all of what enters the next one is on the disk,
so that an interruption costs one block at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata

import torch
from torch import Tensor, nn

from aqlm_cli.activations import Activations, compute_dtype, entering_states, run_block
from aqlm_cli.artifacts import Artifact
from aqlm_cli.blocks import BlockCall, find_blocks, first_inputs, observe_inputs, record_calls, replace_module
from aqlm_cli.config import RunConfig
from aqlm_cli.forecast import measured_windows
from aqlm_cli.methods.statistics import LayerStatistics, SecondMoment
from aqlm_cli.model import ModelSource, load_block, load_outside
from aqlm_cli.seeds import generator
from aqlm_cli.storage import load_tensors, publish_file, storage_errors
from aqlm_cli.unfinished import Unfinished


@dataclass(frozen=True, eq=False)
class Propagation:
    """`hidden` is what enters the block `index`; the first `fitted` windows, and those after `measured`, have
    targets."""

    work: Unfinished
    index: int
    hidden: Activations  # [windows, L, d]
    targets: Activations  # [windows, L, d], the original block's outputs; made by `measure`, and used up by `advance`
    measured: int  # windows whose inputs make the second moments; those after them are held out
    fitted: int  # windows that a block is fitted to, at most `measured`
    batch: int
    dtype: torch.dtype  # of the products
    device: torch.device

    def measure(self, block: nn.Module, call: BlockCall, paths: Iterable[str]) -> dict[str, LayerStatistics]:
        """Run the original block for `targets`, and for H of each of its layers in `paths`.

        Layers that share their inputs share one object.
        """
        wanted = set(paths)
        moments: dict[tuple[str, ...], SecondMoment] = {}

        def collect(sharing: tuple[str, ...], x: Tensor) -> None:  # x [tokens, in]
            if wanted.intersection(sharing):
                moments.setdefault(sharing, SecondMoment(x.shape[1], x.device)).add(x.to(self.dtype))

        with observe_inputs(block, collect):
            for chosen in self._batches(0, self.measured):
                self.targets[chosen] = self._run(block, call, chosen)
        for chosen in self._batches(self.measured, len(self.hidden)):
            self.targets[chosen] = self._run(block, call, chosen)
        found: dict[str, LayerStatistics] = {}
        while moments:  # sums are large, and so are their means: not all of both at once
            sharing, moment = moments.popitem()
            found.update(dict.fromkeys(sharing, moment.statistics()))
        return found

    def advance(self, block: nn.Module, call: BlockCall) -> float:
        """Run the quantized block; the squared error of what it puts out in the fitted windows, relative."""
        error = energy = 0.0
        for chosen in self._batches(0, len(self.hidden)):
            output, target = self._run(block, call, chosen), self.targets[chosen]
            fitted = chosen < self.fitted
            error += float((output[fitted] - target[fitted]).square().sum(dtype=torch.float64))
            energy += float(target[fitted].square().sum(dtype=torch.float64))
            self.targets[chosen] = output
        return error / energy if energy > 0 else 0.0

    def next(self) -> Propagation:
        """At the block after this one, which is finished from here on: what was put out is what enters."""
        publish_file(self.work.targets, self.work.hidden(self.index + 1))
        with storage_errors(self.work.targets):
            self.work.hidden(self.index).replace(self.work.targets)  # its space serves again
        return replace(self, index=self.index + 1, hidden=self.targets, targets=self.hidden)

    def _batches(self, first: int, last: int) -> Iterable[Tensor]:
        return torch.arange(first, last).split(self.batch) if first < last else ()  # split gives a part even of nothing

    def _run(self, block: nn.Module, call: BlockCall, windows: Tensor) -> Tensor:
        return run_block(block, call, self.hidden[windows].to(self.device), self.dtype).cpu()


@dataclass(frozen=True, eq=False)
class Route:
    """The blocks of a model by path, and what the model gives each besides its hidden states."""

    paths: tuple[str, ...]
    calls: Sequence[BlockCall]

    def last(self, layers: Iterable[str]) -> int:
        """The last block that holds one of the layers with these paths."""
        names = list(layers)
        return max(i for i, path in enumerate(self.paths) if any(name.startswith(path + ".") for name in names))


def route_of(source: ModelSource, ids: Tensor, device: torch.device) -> tuple[nn.Module, Route]:
    """For windows as long as those of the token ids `[windows, L]`; and the network, which has only its first block."""
    network = load_outside(source, torch.float32, device)
    paths = find_blocks(network).paths
    replace_module(network, paths[0], load_block(source, 0, torch.float32, device))
    return network, Route(paths, record_calls(network, ids[:1].to(device)))


def start_propagation(
    source: ModelSource, ids: Tensor, measured: int, config: RunConfig, work: Unfinished
) -> tuple[Route, Propagation]:
    """The states of the token ids `[windows, L]` at the first block that is not finished."""
    section, device, index = config.quantize, torch.device(config.device), work.blocks
    network, route = route_of(source, ids, device)
    if not work.hidden(index).exists():
        entering_states(network, ids, section.batch, device, work.targets)
        publish_file(work.targets, work.hidden(index))
    shape = (*ids.shape, first_inputs(network, ids[:1, :1].to(device)).shape[2])
    hidden = Activations(work.hidden(index), shape)
    with storage_errors(work.directory):
        for old in set(work.directory.glob("hidden-*.activations")) - {work.hidden(index)}:
            old.unlink()  # an interruption came between two renames
    targets, fitted = Activations.create(work.targets, shape), min(section.fit.sequences, measured)
    dtype = compute_dtype(device)
    return route, Propagation(work, index, hidden, targets, measured, fitted, section.batch, dtype, device)


def mixed_windows(config: RunConfig, calibration: Artifact) -> tuple[Tensor, int]:
    """Token ids `[windows, L]`, and how many of the windows are measured; the others, at the end, are held out.

    Mixed once, so that any part of them holds text of all sources.
    """
    with calibration.reading("windows.safetensors") as file:
        ids = load_tensors(file)["ids"].long()
    ids = ids[torch.randperm(len(ids), generator=generator(config.seed, "windows"))]
    measured, held_out = measured_windows(config, len(ids))
    return ids[: measured + held_out], measured


def machine_of(config: RunConfig) -> dict[str, str]:
    """What decides the last bits beside settings: who computes, in which type, with which program."""
    device = torch.device(config.device)
    return {
        "device": device.type,
        "products": str(compute_dtype(device)).removeprefix("torch."),
        "version": metadata.version("aqlm-cli"),
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }

"""The hidden states of all windows on their way through the model, and what one block does with them.

What the quantized blocks so far really put out enters the next block, so that it is measured on, and fitted to, the
errors made before it. The target is what the original block makes of those same inputs; to aim at the original model's
own hidden states instead, which would correct earlier errors too, was measured and is no better. The states lie in
files and are touched a batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from aqlm_cli.activations import activation_file, compute_dtype, run_block
from aqlm_cli.blocks import BlockCall, first_inputs, observe_inputs
from aqlm_cli.methods.statistics import LayerStatistics, SecondMoment


@dataclass(frozen=True, eq=False)
class Propagation:
    """`hidden` is what enters the present block; the first `fitted` windows, and those after `measured`, have
    targets."""

    hidden: Tensor  # [windows, L, d]
    targets: Tensor  # [windows, L, d], the original block's outputs; made by `measure`
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
            self._run(block, call, torch.arange(self.measured), self.targets)
        self._run(block, call, torch.arange(self.measured, len(self.hidden)), self.targets)
        found = {sharing: moment.statistics() for sharing, moment in moments.items()}
        return {path: statistics for sharing, statistics in found.items() for path in sharing}

    def advance(self, block: nn.Module, call: BlockCall) -> float:
        """Move `hidden` on to the quantized block's outputs; their squared error in the fitted windows, relative."""
        self._run(block, call, torch.arange(len(self.hidden)), self.hidden)
        error = energy = 0.0
        for chosen in torch.arange(self.fitted).split(self.batch):
            target = self.targets[chosen]
            error += float((self.hidden[chosen] - target).square().sum(dtype=torch.float64))
            energy += float(target.square().sum(dtype=torch.float64))
        return error / energy if energy > 0 else 0.0

    def _run(self, block: nn.Module, call: BlockCall, windows: Tensor, outputs: Tensor) -> None:
        for chosen in windows.split(self.batch) if len(windows) else ():  # split gives one part even of nothing
            outputs[chosen] = run_block(block, call, self.hidden[chosen].to(self.device), self.dtype).cpu()


def start_propagation(
    network: nn.Module, ids: Tensor, measured: int, fitted: int, batch: int, device: torch.device, directory: Path
) -> Propagation:
    """The states that enter the first block for the token ids `[windows, L]`, in files `directory/*.activations`."""
    shape = (*ids.shape, first_inputs(network, ids[:1, :1].to(device)).shape[2])
    hidden = activation_file(directory / "hidden.activations", shape)
    for chosen in torch.arange(len(ids)).split(batch):
        hidden[chosen] = first_inputs(network, ids[chosen].to(device)).float().cpu()
    targets = activation_file(directory / "targets.activations", shape)
    return Propagation(hidden, targets, measured, fitted, batch, compute_dtype(device), device)

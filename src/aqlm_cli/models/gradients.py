"""Gradients of the loss by embeddings and by layers of a model whose blocks are not in memory together.

The states between all blocks go to the disk on the way up, and on the way down each block is computed once more from
its own. Tensors that blocks hand on beside the hidden states pass no gradients on: in families where they do, that
share is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from aqlm_cli.models.blocks import linears
from aqlm_cli.models.hidden_states import Activations, Handed, autocast, run_block
from aqlm_cli.models.received_attention import receiving_layers
from aqlm_cli.models.walk import Walk

Watch: TypeAlias = Callable[[str, nn.Module], AbstractContextManager[Any]]
"""Called with the path of a block and the block; its context is that of the passes through it, forward and backward."""


def embedding_gradients(
    walk: Walk,
    ids: Tensor,
    directory: Path,
    rng: torch.Generator,
    done: Callable[[int], None] = lambda passes: None,
    watch: Watch = lambda path, block: nullcontext(),
) -> Activations:
    """d loss / d embedding `[n, L, d]` of every token of the sequences `[n, L]`, float32, in a file in `directory`.

    The loss is the sum over a sequence's positions of the negative log likelihood of a token drawn from the model's own
    prediction there, as Fisher information wants it. `done` is called with the number of blocks passed, up and down.
    """
    sequences, blocks = torch.arange(len(ids)).split(1), len(walk.paths)
    shape = (len(ids), *walk.entering(ids[:1]).shape[1:])
    states = [Activations.create(directory / f"states-{index:03d}.activations", shape) for index in range(blocks + 1)]
    handed = [Handed(directory / f"handed-{index:03d}") for index in range(blocks + 1)]
    for one in sequences:
        states[0][one] = walk.entering(ids[one]).float().cpu()
    for index in range(blocks):
        block = walk.load(index)
        for one in sequences:
            given = walk.given(index, ids[one], states[index][one], handed[index][one])
            output, handed[index + 1][one] = run_block(block, given, walk.dtype)
            states[index + 1][one] = output.cpu()
        done(index + 1)
    for one in sequences:  # the states above the last block become gradients
        states[blocks][one] = _of_loss(walk, ids[one], states[blocks][one], handed[blocks][one], rng)
    for index in reversed(range(blocks)):
        block = walk.load(index)
        with watch(walk.paths[index], block):
            for one in sequences:
                given = walk.given(index, ids[one], states[index][one], handed[index][one])
                given, leaf = given.differentiable(block)
                with torch.enable_grad(), autocast(walk.device, walk.dtype):
                    output = given(block)
                output.float().backward(states[index + 1][one].to(output.device))
                assert leaf.grad is not None
                states[index][one] = given.batch_first(leaf.grad).float().cpu()
        done(2 * blocks - index)
    return states[0]


def _of_loss(walk: Walk, ids: Tensor, hidden: Tensor, handed: dict[str, Tensor], rng: torch.Generator) -> Tensor:
    """d loss / d hidden `[1, L, d]` for the output of the last block."""
    leaf = hidden.detach().to(walk.device).requires_grad_()
    with autocast(walk.device, walk.dtype):
        logits = walk.logits(ids, leaf, handed, gradients=True)[0].float()  # [L, vocabulary]
    probabilities = logits.detach().softmax(1).cpu()
    drawn = torch.multinomial(probabilities, 1, generator=rng)[:, 0].to(logits.device)
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    assert leaf.grad is not None
    return leaf.grad.float().cpu()


@dataclass
class _Sums:
    """Sums over the tokens that a layer saw, of squares of its outputs y without bias and of their gradients g."""

    outputs: int
    receiving: bool  # whether it is of keys or values, whose tokens count by the attention that they receive
    tokens: int = 0
    squares: float = 0.0  # of |y|^2
    gradients: float = 0.0  # of |g|^2
    together: float = 0.0  # of |y|^2 |g|^2


class OutputGradients:
    """Sensitivities of the layers in the blocks: nats a token for a relative error of 1, to second order.

    An error e of a layer's output costs (g e)^2 / 2 on average, with g the gradient of the loss of a token drawn from
    the model's own prediction, which is |g|^2 |e|^2 / (2 out) where e has no direction of its own. A relative error r
    makes |e|^2 = r |y|^2 at every token if it is alike everywhere, and on average if it is not: the geometric mean of
    the two foretells the divergence of whole models best (SmolLM2-135M, 11 mixes at 3 bits: within 6 %). Errors of keys
    and values are measured under weights that are much like |g|^2 (received_attention.py): there it is the first alone.
    """

    def __init__(self, token_weights: bool) -> None:
        """`token_weights`: whether errors of keys and values are measured under weights."""
        self._token_weights = token_weights
        self._sums: dict[str, _Sums] = {}

    @contextmanager
    def watch(self, path: str, block: nn.Module) -> Iterator[None]:
        """Take part in the passes through the block at this path."""
        hooks = []
        named = receiving_layers(block).values() if self._token_weights else ()
        receiving = {f"{path}.{name}" for names in named for name in names}
        for name, layer in linears(block, path).items():
            sums = self._sums.setdefault(name, _Sums(layer.out_features, name in receiving))
            hooks.append(layer.register_forward_hook(_Outputs(sums)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sensitivities(self, tokens: int) -> dict[str, float]:
        """The sensitivity of every layer that saw text, by its path; `tokens` are those of the whole pass."""
        found = {}
        for path, sums in self._sums.items():
            if sums.tokens:
                apart = sums.together if sums.receiving else sums.gradients * sums.squares / sums.tokens
                value = math.sqrt(apart * sums.together) / (2 * sums.outputs * tokens)
                if math.isfinite(value) and value > 0:
                    found[path] = value
        return found


@dataclass(frozen=True)
class _Outputs:
    """The hook of one layer."""

    sums: _Sums

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad and output.numel():
            values = output.detach() if layer.bias is None else output.detach() - layer.bias.detach()
            output.register_hook(lambda gradient: self._add(values, gradient))

    def _add(self, values: Tensor, gradient: Tensor) -> None:  # [..., out]
        squares, gradients = (one.float().flatten(0, -2).square().sum(1).double() for one in (values, gradient))
        self.sums.tokens += len(squares)
        self.sums.squares += float(squares.sum())
        self.sums.gradients += float(gradients.sum())
        self.sums.together += float((squares * gradients).sum())

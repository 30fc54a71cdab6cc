"""Gradients of the loss by the embeddings of a model whose blocks are not in memory together.

The states between all blocks go to the disk on the way up, and on the way down each block is computed once more from
its own. Tensors that blocks hand on beside the hidden states pass no gradients on: in families where they do, that
share is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from aqlm_cli.models.hidden_states import Activations, Handed, autocast, run_block
from aqlm_cli.models.walk import Walk


def embedding_gradients(
    walk: Walk, ids: Tensor, directory: Path, rng: torch.Generator, done: Callable[[int], None] = lambda passes: None
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

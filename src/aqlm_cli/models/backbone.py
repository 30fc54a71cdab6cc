"""A language model in two halves: a backbone, from tokens to hidden states, and a head, from these to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.models.blocks import find_blocks


@dataclass(frozen=True)
class Halves:
    """`logits(states(ids))` are the network's logits for the ids."""

    network: transformers.PreTrainedModel
    body: nn.Module  # the backbone: the network's own forward calls it, and applies the head to its output
    answer: type[Any]  # class of the body's output, from transformers

    def states(self, ids: Tensor) -> Tensor:
        """Token ids `[b, L]` -> input of the head `[b, L, d]`, after the last norm."""
        hidden: Tensor = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def logits(self, states: Tensor) -> Tensor:
        """Input of the head `[tokens, d]` -> logits `[tokens, vocabulary]`.

        The network's own forward runs without its body: some families scale or bound their logits after the head.
        """
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        self.body.forward = lambda *_, **__: self.answer(last_hidden_state=states[None])
        try:
            logits: Tensor = self.network(input_ids=ids, use_cache=False).logits
        finally:
            del self.body.forward  # restores the forward of the class
        return logits[0]


@torch.no_grad()
def halves_of(network: transformers.PreTrainedModel) -> Halves:
    """Split a network; ModelError if it has no separate backbone and lm_head."""
    parts = find_blocks(network).path.split(".")
    called: list[tuple[nn.Module, Any]] = []
    hooks = [
        network.get_submodule(".".join(parts[:depth])).register_forward_hook(
            lambda module, _, output: called.append((module, output))
        )
        for depth in range(1, len(parts))
    ]
    ids = torch.arange(4, device=network.device)[None]
    whole = network(input_ids=ids, use_cache=False).logits[0]
    if not bool(whole.isfinite().all()):
        raise ModelError("its logits are not finite: the weights hold NaN or infinity, and the model is damaged")
    for hook in hooks:
        hook.remove()
    if called:
        body, output = called[-1]  # the outermost of those around the blocks: it returns last
        halves = Halves(network, body, type(output))
        if torch.allclose(halves.logits(halves.states(ids)[0]), whole, rtol=1e-2, atol=1e-3):
            return halves
    raise ModelError(
        f"{type(network).__name__} has no separate backbone and lm_head; finetune does not support this architecture"
    )

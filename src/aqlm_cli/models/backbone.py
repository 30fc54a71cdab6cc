"""A language model in two halves: what makes hidden states of tokens, and what makes logits of those."""

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
    """`logits(states(ids))` is what the network gives for the ids."""

    network: transformers.PreTrainedModel
    body: nn.Module  # what the network's own forward calls, and its head goes on from
    answer: type[Any]  # what the body returns, a class of transformers

    def states(self, ids: Tensor) -> Tensor:
        """Token ids `[b, L]` -> what enters the head `[b, L, d]`, the last norm done."""
        found: Tensor = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return found

    def logits(self, states: Tensor) -> Tensor:
        """What enters the head `[tokens, d]` -> logits `[tokens, vocabulary]`.

        The network's own forward runs without its body: some families scale or bound their logits after the head.
        """
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        self.body.forward = lambda *_, **__: self.answer(last_hidden_state=states[None])
        try:
            found: Tensor = self.network(input_ids=ids, use_cache=False).logits
        finally:
            del self.body.forward  # that of the class shows again
        return found[0]


@torch.no_grad()
def halves_of(network: transformers.PreTrainedModel) -> Halves:
    """Raises ModelError where the network is no body with a head on it."""
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
    for hook in hooks:
        hook.remove()
    if called:
        body, output = called[-1]  # the outermost of those around the blocks: it returns last
        halves = Halves(network, body, type(output))
        if torch.allclose(halves.logits(halves.states(ids)[0]), whole, rtol=1e-2, atol=1e-3):
            return halves
    raise ModelError(f"{type(network).__name__} is no body with a head on it, which finetune does not know")

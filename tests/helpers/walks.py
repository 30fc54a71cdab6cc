"""Walks through networks that are in memory whole."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from aqlm_cli.models.blocks import find_blocks
from aqlm_cli.models.walk import BlockInput, Walk
from aqlm_cli.models.walk_check import open_walk


def walk_of(network: nn.Module, ids: Tensor) -> Walk:
    """Through the blocks of `network`, checked with the token ids `[windows, L]`."""
    copies = copy.deepcopy(find_blocks(network).modules)  # the network's own are stood in for meanwhile
    return open_walk(network, copies.__getitem__, ids)


@torch.no_grad()
def inputs_of_blocks(network: nn.Module, ids: Tensor, walk: Walk | None = None) -> list[BlockInput]:
    """What each block is given; to be used once. `walk` None: the network's own."""
    walk = walk or walk_of(network, ids)
    hidden, handed = walk.entering(ids), dict[str, Tensor]()
    given = []
    for index, block in enumerate(find_blocks(network).modules):
        given.append(walk.given(index, ids, hidden, handed))
        hidden, handed = walk.given(index, ids, hidden, handed).run(block)
    return given


@torch.no_grad()
def states_of_blocks(network: nn.Module, ids: Tensor) -> list[Tensor]:
    """The hidden states that enter each block, and those that leave the last one."""
    walk = walk_of(network, ids)
    states, handed = [walk.entering(ids)], dict[str, Tensor]()
    for index, block in enumerate(find_blocks(network).modules):
        hidden, handed = walk.given(index, ids, states[-1], handed).run(block)
        states.append(hidden)
    return states


@torch.no_grad()
def logits_of_walk(network: nn.Module, ids: Tensor, batch: int, walk: Walk | None = None) -> Tensor:
    """The logits `[windows, L, vocabulary]`, so many windows at a time."""
    walk = walk or walk_of(network, ids)
    logits = []
    for part in ids.split(batch):
        hidden, handed = walk.entering(part), dict[str, Tensor]()
        for index, block in enumerate(find_blocks(network).modules):
            hidden, handed = walk.given(index, part, hidden, handed).run(block)
        logits.append(walk.logits(part, hidden, handed))
    return torch.cat(logits)

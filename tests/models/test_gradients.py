"""Gradients by the embeddings, block by block, against those of the whole network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.walks import walk_of
from torch.nn import functional as F

from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.gradients import embedding_gradients


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_they_are_those_of_the_whole_network(family: str, tmp_path: Path) -> None:
    network = load_network(resolve(str(tiny_models.save(family, tmp_path / "model"))), torch.float32)
    ids = tiny_models.token_ids(2, 12)
    passed: list[int] = []
    walk = walk_of(network, ids)
    found = embedding_gradients(walk, ids, tmp_path, torch.Generator().manual_seed(3), passed.append)
    assert passed == list(range(1, 2 * len(walk.paths) + 1))

    rng = torch.Generator().manual_seed(3)
    for number, row in enumerate(ids):
        entering = walk.entering(row[None]).detach()
        first, taken = walk.blocks.modules[0], list[torch.Tensor]()

        def replaced(module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> object:
            leaf = entering.clone().requires_grad_()  # noqa: B023 - called at once
            taken.append(leaf)  # noqa: B023
            return ((leaf, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf})

        hook = first.register_forward_pre_hook(replaced, with_kwargs=True)
        logits = network(input_ids=row[None], use_cache=False).logits[0]
        hook.remove()
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=rng)[:, 0]
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        expected = taken[0].grad
        assert expected is not None and float(expected.norm()) > 1e-3
        assert torch.allclose(found[torch.tensor([number])], expected, atol=1e-5 * float(expected.abs().max()))

"""Reading a text part by part gives what reading it at once gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import families, tiny_models
from helpers.meddling import FAMILIES as LOOKING

from aqlm_cli.errors import ModelError
from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.stepping import Stepping

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": tiny_models.SHAPE,
    "mamba2": LOOKING["mamba2"],  # keeps states under a name of its own
    "recurrent_gemma": {**tiny_models.SHAPE, "num_hidden_layers": 3, "lru_width": 64},  # keeps them to itself
    "bamba": {  # finds no places by a first layer without keys
        **tiny_models.SHAPE,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
}


@pytest.mark.parametrize("family", [*FAMILIES, "blt", "hrm_text", "xlstm"])  # the last three fail with a cache
@torch.no_grad()
def test_a_text_read_part_by_part_has_the_logits_of_the_whole(family: str, tmp_path: Path) -> None:
    if family in FAMILIES:
        tiny_models.save(family, tmp_path, **FAMILIES[family])
    else:
        families.save(family, tmp_path)
    network = load_network(resolve(str(tmp_path)), torch.float32)
    ids = tiny_models.token_ids(2, 16)
    whole, stepping = network(ids, use_cache=False).logits, Stepping(network)
    for first, last in [(0, 10), *((place, place + 1) for place in range(10, 16))]:
        assert torch.allclose(stepping(ids[:, first:last]), whole[:, last - 1], atol=1e-4), last


def test_a_forward_that_also_fails_without_a_cache_is_refused(tmp_path: Path) -> None:
    network = load_network(resolve(str(tiny_models.save("llama", tmp_path))), torch.float32)
    network.model.norm.forward = lambda hidden: hidden[..., :3]
    with pytest.raises(ModelError, match=r"family llama .* fails on a text of 4 tokens \(RuntimeError: "):
        Stepping(network)(tiny_models.token_ids(1, 4))

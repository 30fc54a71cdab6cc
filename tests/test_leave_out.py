"""Parts of models whose networks look into their modules while they are made and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aqlm_cli.blocks import find_blocks, replace_module
from aqlm_cli.model import BlockLoader, load_network, load_outside, load_without, resolve

STATES: Mapping[str, Any] = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16}
MULTIPLIED: Mapping[str, Any] = {
    **tiny_models.SHAPE,
    "head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "ssm_multipliers": [0.5, 1.0, 2.0, 0.25, 1.0],
}
SHARED: Mapping[str, Any] = {
    **tiny_models.SHAPE,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "layers_block_type": ["hybrid", "mamba", "hybrid", "hybrid"],
    "num_mem_blocks": 1,
    "adapter_rank": 8,
    "n_mamba_heads": 8,
    "mamba_d_state": 16,
    "mamba_ngroups": 1,
    "chunk_size": 16,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": tiny_models.SHAPE,
    "mamba2": {**tiny_models.SHAPE, **STATES},  # initializes a layer from the mixer that holds it
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},  # the same, with a tied head
    "nanochat": {**tiny_models.SHAPE, "head_dim": 16},
    "falcon_h1": MULTIPLIED,  # computes a buffer for each of its blocks
    "zamba2": SHARED,  # blocks that share their weights
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_blocks_loaded_one_by_one_is_the_whole(family: str, tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save(family, tmp_path / "model", **FAMILIES[family])))
    whole, network = load_network(source, torch.float32), load_outside(source, torch.float32)
    blocks, ids = find_blocks(whole), tiny_models.token_ids()
    for index, path in enumerate(blocks.paths):
        replace_module(network, path, BlockLoader(source, torch.float32)(index))
        assert tensors(network.get_submodule(path)).keys() == tensors(whole.get_submodule(path)).keys()
    assert not any(tensor.is_meta for tensor in tensors(network).values())
    with torch.no_grad():
        assert torch.equal(network(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_is_found_by_name_listed_nowhere_and_without_numbers(family: str, tmp_path: Path) -> None:
    source = resolve(str(tiny_models.save(family, tmp_path / "model", **FAMILIES[family])))
    paths = find_blocks(load_network(source, torch.float32)).paths
    network = load_without(source, paths, torch.float32)
    assert not any(name.startswith(paths) for name in (*tensors(network), *network.state_dict()))
    assert not any(tensor.is_meta for tensor in tensors(network).values())
    hidden = [
        value
        for path in paths
        for module in network.get_submodule(path).modules()
        for value in vars(module).values()
        if isinstance(value, Tensor)
    ]
    assert hidden and all(tensor.is_meta for tensor in hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_read_by_a_network_that_looks_into_its_linear_layers(family: str, tmp_path: Path) -> None:
    original = tiny_models.save(family, tmp_path / "original", tie_word_embeddings=False, **FAMILIES[family])
    weights = tiny_models.save_additive(original, tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float16).eval().float()
    for path, weight in weights.items():
        expected.get_submodule(path).weight.data = weight
    ids = tiny_models.token_ids()
    with torch.no_grad():
        wanted = expected(ids, use_cache=False).logits
        found = load_network(resolve(str(tmp_path / "packed")), torch.float32)(ids, use_cache=False).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5

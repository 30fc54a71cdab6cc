"""Parts of models whose networks look into their modules while they are made and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.meddling import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aqlm_cli.models import BlockLoader, load_network, load_outside, load_without, resolve
from aqlm_cli.models.blocks import find_blocks, replace_module


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
def test_a_skipped_module_is_found_by_name_but_listed_nowhere(family: str, tmp_path: Path) -> None:
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
def test_codes_are_read_by_a_network_that_inspects_its_linear_layers(family: str, tmp_path: Path) -> None:
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

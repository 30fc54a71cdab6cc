from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from torch import Tensor, nn
from transformers import AttentionInterface

from aqlm_cli.models import load_network, resolve
from aqlm_cli.models import received_attention as module
from aqlm_cli.models.received_attention import received_attention, receiving_layers

FAMILIES = {
    "llama": {},  # query heads share key heads
    "qwen2": {},
    "opt": {},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5},
}


def loaded(family: str, directory: Path, **settings: Any) -> Any:
    return load_network(resolve(str(tiny_models.save(family, directory / "model", **settings))), torch.float32)


def sharpened(network: Any) -> Any:
    """Queries that attend to some tokens much more than to others."""
    for path, parameter in network.named_parameters():
        if "q_proj.weight" in path:
            parameter.data.mul_(30)
    return network


@torch.no_grad()
def received(network: Any, ids: Tensor) -> dict[str, Tensor]:
    with received_attention(network) as weights:
        network(input_ids=ids, use_cache=False)
    return weights


@torch.no_grad()
def written_out(network: Any, ids: Tensor, every: int) -> list[Tensor]:
    """By layer, from the probabilities that transformers returns."""
    network.set_attn_implementation("eager")
    found = []
    for probabilities in network(input_ids=ids, use_cache=False, output_attentions=True).attentions:
        chosen = probabilities.double().flip(2)[:, :, ::every]  # [b, heads, queries, tokens]
        weights = chosen.square().sum((1, 2))
        found.append((weights / weights.mean(1, keepdim=True)).flatten())
    return found


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_squares_of_the_probabilities(
    family: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY", every)
    monkeypatch.setattr(module, "QUERIES", 3)  # many parts
    network, ids = sharpened(loaded(family, tmp_path, **FAMILIES[family])), tiny_models.token_ids(2, 21)
    found, wanted = received(network, ids), written_out(network, ids, every)
    assert len(found) == 2 * len(wanted)
    spread = []
    for (path, weights), layer in zip(found.items(), (one for one in wanted for _ in module.NAMES), strict=True):
        torch.testing.assert_close(weights.double(), layer, rtol=1e-4, atol=1e-6, msg=path)
        assert weights.view(2, 21).mean(1).tolist() == pytest.approx([1, 1])
        spread.append(float(weights.max()))
    assert max(spread) > 2, "and they are not all alike"


def test_one_token_has_a_weight_too(tmp_path: Path) -> None:
    weights = received(loaded("llama", tmp_path), tiny_models.token_ids(3, 1))
    assert weights and all(one.tolist() == [1, 1, 1] for one in weights.values())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_keys_and_values_of_one_fused_matrix_have_none(family: str, tmp_path: Path) -> None:
    network = loaded(family, tmp_path)
    assert not receiving_layers(network) and not received(network, tiny_models.token_ids())


def test_an_attention_that_computes_something_else_has_none(tmp_path: Path) -> None:
    network, table = loaded("llama", tmp_path), AttentionInterface()
    torchs = table["sdpa"]

    def with_a_sink(attending: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        output, none = torchs(attending, q, k, v, *rest, **options)
        return 0.5 * output, none  # half of the attention goes to no token

    AttentionInterface.register("sdpa", with_a_sink)
    try:
        assert receiving_layers(network) and not received(network, tiny_models.token_ids())
    finally:
        AttentionInterface.register("sdpa", torchs)


def test_a_mask_is_understood_by_its_name_too() -> None:
    """As afmoe and doge pass it."""
    block = nn.Module()
    block.k_proj, block.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)
    q, k, v = (torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)[None, None]
    found: list[Tensor] = []
    for arguments, named in (((mask,), {}), ((), {"attention_mask": mask}), ((), {})):
        with received_attention(block) as weights:
            AttentionInterface()["sdpa"](block, q, k, v, *arguments, **named)
        found.append(weights["v_proj"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_attention_that_is_in_no_table_has_none(tmp_path: Path) -> None:
    network = loaded("llama", tmp_path)
    network.set_attn_implementation("eager")
    assert not received(network, tiny_models.token_ids())


def test_outputs_and_the_table_are_left_as_they_were(tmp_path: Path) -> None:
    network, ids = loaded("llama", tmp_path), tiny_models.token_ids()
    before, expected = dict(AttentionInterface()), network(input_ids=ids, use_cache=False).logits
    with pytest.raises(KeyboardInterrupt), received_attention(network):
        assert torch.equal(network(input_ids=ids, use_cache=False).logits, expected)
        raise KeyboardInterrupt
    assert dict(AttentionInterface()) == before


def test_under_autocast_the_weights_are_nearly_the_same(tmp_path: Path) -> None:
    network, ids = sharpened(loaded("llama", tmp_path)), tiny_models.token_ids(2, 40)
    exact = received(network, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = received(network, ids)
    assert exact.keys() == rounded.keys()
    assert all((rounded[path] - one).norm() < 0.05 * one.norm() for path, one in exact.items())

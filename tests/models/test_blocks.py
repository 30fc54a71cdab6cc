from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.walks import inputs_of_blocks
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from aqlm_cli.errors import ModelError
from aqlm_cli.models.blocks import (
    count_parameters,
    describe_layers,
    find_blocks,
    linears,
    observe_inputs,
    replace_module,
    unfuse,
)

LLAMA_LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def load(family: str, directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_models.save(family, directory)).eval().requires_grad_(False)


def from_settings(family: str, **settings: object) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


# ------------------------------------------------------------------------------------------------------------ watching


def test_inputs_are_observed_once_for_all_layers_that_share_them(tmp_path: Path) -> None:
    network, ids = load("llama", tmp_path), tiny_models.token_ids()
    block, given = find_blocks(network).modules[0], inputs_of_blocks(network, ids)[0]
    seen: list[tuple[str, ...]] = []
    with observe_inputs(block, lambda paths, x: seen.append(paths)):
        given(block)
    q, k, v, o, gate, up, down = LLAMA_LINEARS
    assert seen == [(q, k, v), (o,), (gate, up), (down,)]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_linear_is_observed_with_exactly_its_input(family: str, tmp_path: Path) -> None:
    network, ids = load(family, tmp_path), tiny_models.token_ids()
    block, given = find_blocks(network).modules[0], inputs_of_blocks(network, ids)[0]
    inputs, outputs = {}, {}
    for path, layer in linears(block, "").items():
        layer.register_forward_hook(lambda _, __, out, path=path: outputs.update({path: out}))
    with observe_inputs(block, lambda paths, x: inputs.update(dict.fromkeys(paths, x))):
        given(block)
    assert inputs.keys() == linears(block, "").keys()
    for path, layer in linears(block, "").items():
        assert inputs[path].shape == (ids.numel(), layer.in_features)
        torch.testing.assert_close(layer(inputs[path]), outputs[path].flatten(0, -2))


def test_every_forward_is_observed_on_its_own(tmp_path: Path) -> None:
    network, ids = load("llama", tmp_path), tiny_models.token_ids()
    block, rows = find_blocks(network).modules[0], []
    given, fewer = inputs_of_blocks(network, ids)[0], inputs_of_blocks(network, ids[:1])[0]
    with observe_inputs(block, lambda paths, x: rows.append(len(x))):
        given(block)
        fewer(block)
    assert rows == [80] * 4 + [40] * 4


# ------------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_all_linears_of_the_blocks_are_found_and_the_head_is_not(family: str, tmp_path: Path) -> None:
    network = load(family, tmp_path)
    head = network.get_output_embeddings()
    expected = {
        path for path, module in network.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    blocks = find_blocks(network)
    found = [
        path for prefix, block in zip(blocks.paths, blocks.modules, strict=True) for path in linears(block, prefix)
    ]
    assert set(found) == expected
    described = {layer.path: layer for layer in describe_layers(network)}
    assert list(described) == found
    for path, layer in described.items():
        module = network.get_submodule(path)
        assert (layer.out_features, layer.in_features) == module.weight.shape
        assert layer.bias == (module.bias is not None)
        assert layer.reason is None


def test_a_longer_list_inside_a_block_is_not_the_list_of_blocks() -> None:
    network = nn.Module()
    network.heads = nn.ModuleList(nn.LayerNorm(4) for _ in range(20))
    network.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for layer in network.layers:
        layer.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
    assert find_blocks(network).paths == ("layers.0", "layers.1")


def test_a_network_without_repeated_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of repeated layers"):
        find_blocks(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_matrices_that_are_no_linear_come_with_the_reason() -> None:
    network = from_settings("gpt2", n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    layers = {layer.path: layer for layer in describe_layers(network)}
    assert len(layers) == 2 * 4
    assert "Conv1D" in str(layers["transformer.h.0.attn.c_attn"].reason)


def test_every_expert_of_a_fused_parameter_is_listed_as_a_matrix_of_its_own() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    network = from_settings("mixtral", **shape, num_hidden_layers=1, num_local_experts=3, vocab_size=32)
    layers = {layer.path: layer for layer in describe_layers(network) if layer.kind == "expert"}
    assert [path.removeprefix("model.layers.0.mlp.experts.") for path in layers] == [
        f"{number}.{name}" for number in range(3) for name in ("gate_up_proj", "down_proj")
    ]
    first, second = list(layers.values())[:2]
    assert (first.out_features, first.in_features, first.reason) == (48, 16, None)
    assert (second.out_features, second.in_features, second.reason) == (16, 24, None)


def test_fused_experts_that_compute_something_else_are_listed_with_the_reason() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    network = from_settings("mixtral", **shape, num_hidden_layers=1, num_local_experts=3, vocab_size=32)
    experts = network.model.layers[0].mlp.experts
    kind = type(experts)
    forward = kind.forward
    experts.__class__ = type("Doubled", (kind,), {"forward": lambda *given: 2 * forward(*given)})
    layers = {layer.path: layer for layer in describe_layers(network) if "experts" in layer.path}
    assert list(layers) == [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    reasons = {layer.reason for layer in layers.values()}
    assert reasons == {"Doubled computes something else than its experts one by one"}
    assert unfuse(network.model.layers[0]).mlp.experts is experts


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # an untied and a tied head
def test_parameters_are_counted_as_a_checkpoint_stores_them(family: str, tmp_path: Path) -> None:
    network = load(family, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert count_parameters(network) == sum(tensor.numel() for tensor in stored.values())


def test_a_replaced_module_is_the_one_that_runs(tmp_path: Path) -> None:
    network, ids = load("llama", tmp_path), tiny_models.token_ids()
    before = network(ids).logits
    replace_module(network, "model.layers.1.mlp", nn.Identity())
    assert isinstance(network.model.layers[1].mlp, nn.Identity)
    assert not torch.equal(network(ids).logits, before)

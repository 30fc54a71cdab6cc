from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from aqlm_cli.blocks import (
    count_parameters,
    describe_layers,
    find_blocks,
    first_inputs,
    linears,
    observe_inputs,
    record_calls,
    replace_module,
)
from aqlm_cli.errors import ModelError

LLAMA_LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def load(family: str, directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_models.save(family, directory)).eval().requires_grad_(False)


def from_settings(family: str, **settings: object) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


@contextmanager
def block_outputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what each block returns in an ordinary forward of the model."""
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in find_blocks(network).modules
    ]
    yield outputs
    for hook in hooks:
        hook.remove()


class KeywordModel(nn.Module):
    """Passes the hidden states by keyword, gives each block another mask `[b, 1, L]`, and its blocks return tuples."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, mask: Tensor, flag: bool) -> tuple[Tensor, None]:
            return hidden + self.linear(hidden) * mask.mT + flag, None

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 4)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.embedding(input_ids)
        for index, block in enumerate(self.blocks):
            mask = (input_ids % (index + 2) == 0).float()[:, None]
            hidden, _ = block(mask=mask, hidden=hidden, flag=index == 1)
        return hidden


# ---------------------------------------------------------------------------------------------------- calling blocks


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_blocks_called_alone_compute_what_they_compute_in_the_model(family: str, tmp_path: Path) -> None:
    network, ids = load(family, tmp_path), tiny_models.token_ids()
    calls, hidden = record_calls(network, ids), first_inputs(network, ids)
    with block_outputs(network) as expected:
        network(ids, use_cache=False)
    assert len(calls) == len(expected) > 1
    for block, call, output in zip(find_blocks(network).modules, calls, expected, strict=True):
        hidden = call(block, hidden)
        assert torch.equal(hidden, output)


def test_each_layer_of_gemma_3_gets_its_own_mask_and_rotary_base(tmp_path: Path) -> None:
    network, ids = load("gemma3_text", tmp_path), tiny_models.token_ids()
    sliding, full, _ = record_calls(network, ids)
    block, hidden = find_blocks(network).modules[0], first_inputs(network, ids)
    difference = sliding(block, hidden) - full(block, hidden)
    assert difference[:, tiny_models.WINDOW + 1 :].abs().max() > 1e-3
    assert record_calls(network, ids)[2].kwargs["attention_mask"].equal(sliding.kwargs["attention_mask"])


@pytest.mark.parametrize("family", ["mistral", "gemma2", "opt"])  # masks and positions with a row for each window
@pytest.mark.parametrize("rows", [1, 2])
def test_calls_recorded_with_a_batch_serve_a_smaller_one(family: str, rows: int, tmp_path: Path) -> None:
    network, ids = load(family, tmp_path), tiny_models.token_ids(windows=3)
    hidden = first_inputs(network, ids)
    for block, call in zip(find_blocks(network).modules, record_calls(network, ids), strict=True):
        torch.testing.assert_close(call(block, hidden[:rows]), call(block, hidden)[:rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "opt"])
def test_calls_recorded_with_one_window_serve_any_number(family: str, tmp_path: Path) -> None:
    network, ids = load(family, tmp_path), tiny_models.token_ids(windows=3)
    hidden = first_inputs(network, ids)
    with block_outputs(network) as expected:
        network(ids, use_cache=False)
    for block, call in zip(find_blocks(network).modules, record_calls(network, ids[:1]), strict=True):
        hidden = call(block, hidden)
    torch.testing.assert_close(hidden, expected[-1], rtol=1e-4, atol=1e-5)


def test_hidden_states_may_be_a_keyword_and_outputs_a_tuple() -> None:
    network, ids = KeywordModel(), tiny_models.token_ids(windows=2, length=5)
    hidden = first_inputs(network, ids)
    for block, call in zip(network.blocks, record_calls(network, ids), strict=True):
        hidden = call(block, hidden)
    assert torch.equal(hidden, network(ids, use_cache=False))


def test_a_mask_is_cut_to_the_windows_it_belongs_to() -> None:
    network, ids = KeywordModel(), tiny_models.token_ids(windows=4, length=4)  # as many windows as features and tokens
    call, hidden = record_calls(network, ids)[0], first_inputs(network, ids)
    assert torch.equal(call(network.blocks[0], hidden[:2]), call(network.blocks[0], hidden)[:2])


def test_gradients_flow_through_a_recorded_call(tmp_path: Path) -> None:
    network, ids = load("mistral", tmp_path), tiny_models.token_ids()
    block, call = find_blocks(network).modules[0], record_calls(network, ids)[0]
    weight = block.mlp.down_proj.weight.requires_grad_()
    call(block, first_inputs(network, ids)).square().mean().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_nothing_behind_the_wanted_point_is_computed(tmp_path: Path) -> None:
    network, ids = load("llama", tmp_path), tiny_models.token_ids()

    def refuse(*_: object) -> None:
        raise AssertionError("computed")

    network.lm_head.register_forward_pre_hook(refuse)
    assert len(record_calls(network, ids)) == 2
    find_blocks(network).modules[0].mlp.register_forward_pre_hook(refuse)
    assert first_inputs(network, ids).shape == (2, 40, 64)


def test_recording_and_observing_leave_no_hooks_behind(tmp_path: Path) -> None:
    network, ids = load("llama", tmp_path), tiny_models.token_ids()
    first_inputs(network, ids)
    record_calls(network, ids)
    with observe_inputs(find_blocks(network).modules[0], lambda paths, x: None):
        pass
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


# ------------------------------------------------------------------------------------------------------------ watching


def test_inputs_are_observed_once_for_all_layers_that_share_them(tmp_path: Path) -> None:
    network, ids = load("llama", tmp_path), tiny_models.token_ids()
    block, call = find_blocks(network).modules[0], record_calls(network, ids)[0]
    seen: list[tuple[str, ...]] = []
    with observe_inputs(block, lambda paths, x: seen.append(paths)):
        call(block, first_inputs(network, ids))
    q, k, v, o, gate, up, down = LLAMA_LINEARS
    assert seen == [(q, k, v), (o,), (gate, up), (down,)]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_linear_is_observed_with_exactly_its_input(family: str, tmp_path: Path) -> None:
    network, ids = load(family, tmp_path), tiny_models.token_ids()
    block, call = find_blocks(network).modules[0], record_calls(network, ids)[0]
    inputs, outputs = {}, {}
    for path, layer in linears(block, "").items():
        layer.register_forward_hook(lambda _, __, out, path=path: outputs.update({path: out}))
    with observe_inputs(block, lambda paths, x: inputs.update(dict.fromkeys(paths, x))):
        call(block, first_inputs(network, ids))
    assert inputs.keys() == linears(block, "").keys()
    for path, layer in linears(block, "").items():
        assert inputs[path].shape == (ids.numel(), layer.in_features)
        torch.testing.assert_close(layer(inputs[path]), outputs[path].flatten(0, -2))


def test_every_forward_is_observed_on_its_own(tmp_path: Path) -> None:
    network, ids = load("llama", tmp_path), tiny_models.token_ids()
    block, call = find_blocks(network).modules[0], record_calls(network, ids)[0]
    hidden, rows = first_inputs(network, ids), []
    with observe_inputs(block, lambda paths, x: rows.append(len(x))):
        call(block, hidden)
        call(block, hidden[:1])
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


def test_a_longer_list_inside_a_block_is_not_taken_for_the_blocks() -> None:
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


def test_fused_experts_are_listed_beside_the_linears_of_their_block() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    network = from_settings("mixtral", **shape, num_hidden_layers=1, num_local_experts=3, vocab_size=32)
    layers = {layer.path: layer for layer in describe_layers(network)}
    fused = layers["model.layers.0.mlp.experts.gate_up_proj"]
    assert "[3, 48, 16]" in str(fused.reason)
    assert fused.out_features * fused.in_features == 3 * 48 * 16
    assert layers["model.layers.0.self_attn.q_proj"].reason is None


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

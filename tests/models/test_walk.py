from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.walks import inputs_of_blocks, logits_of_walk, walk_of
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from aqlm_cli.errors import ModelError
from aqlm_cli.models.blocks import find_blocks
from aqlm_cli.models.walk_check import distinct_sequences, open_walk


def load(family: str, directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_models.save(family, directory)).eval().requires_grad_(False)


def from_settings(family: str, **settings: Any) -> nn.Module:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    common = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 258, "pad_token_id": 0, **shape}
    config = AutoConfig.for_model(family, **{**common, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def ids_of(windows: int, length: int = 40) -> Tensor:
    return tiny_models.token_ids(windows=windows, length=length)


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


class Toy(nn.Module):
    """Passes the hidden states by keyword, gives each block another mask `[b, 1, L]` of its tokens, and its blocks
    return tuples."""

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

    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        for index, block in enumerate(self.blocks):
            mask = (input_ids % (index + 2) == 0).float()[:, None]
            hidden, _ = block(mask=mask, hidden=hidden, flag=index == 1)
        return CausalLMOutput(logits=hidden)


# --------------------------------------------------------------------------------- what a block is given is the model's


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_walk_computes_what_the_model_computes(family: str, batch: int, tmp_path: Path) -> None:
    network, ids = load(family, tmp_path), ids_of(3)
    expected = network(ids, use_cache=False).logits
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits_of_walk(network, ids, batch), expected, rtol=0, atol=bound)


FOUR_BLOCKS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
OWN_INPUTS = {**FOUR_BLOCKS, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 258}
CARRYING: dict[str, tuple[str, dict[str, Any]]] = {
    "embeddings of each block's own": ("gemma4_text", {**OWN_INPUTS, "global_head_dim": 16, "num_kv_shared_layers": 0}),
    "keys of an earlier block": ("gemma4_text", {**OWN_INPUTS, "global_head_dim": 16, "num_kv_shared_layers": 2}),
    "batch in the second dimension": (
        "gemma3n_text",
        {**OWN_INPUTS, "num_kv_shared_layers": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "states of the router before": (
        "zaya",
        {"router_hidden_size": 16, "num_experts": 4, "moe_intermediate_size": 32, "num_hidden_layers": 3},
    ),
    "slopes of all heads of all sequences": ("bloom", {"n_layer": 2, "n_head": 4}),
    "masks of all sequences": ("xglm", {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", CARRYING)
def test_blocks_are_given_what_depends_on_their_tokens_and_on_earlier_blocks(kind: str, batch: int) -> None:
    family, settings = CARRYING[kind]
    network, ids = from_settings(family, **settings), ids_of(4)
    expected = network(ids, use_cache=False).logits
    bound = 1e-5 * float(expected.abs().max())
    walk = walk_of(network, ids_of(6, 30).flip(0))  # opened with other text, of another length
    torch.testing.assert_close(logits_of_walk(network, ids, batch, walk), expected, rtol=0, atol=bound)
    assert (expected[0] - expected[1]).abs().max() > 100 * bound  # so that another window's arguments would be seen


def test_only_what_later_blocks_need_is_handed_on() -> None:
    family, settings = CARRYING["states of the router before"]
    bloom, zaya = from_settings("bloom", n_layer=2, n_head=4), from_settings(family, **settings)
    assert walk_of(bloom, ids_of(3)).form.needed == frozenset()  # it returns attention weights
    assert walk_of(zaya, ids_of(3)).form.needed == {1}


def test_each_layer_of_gemma_3_gets_its_own_mask_and_rotary_base(tmp_path: Path) -> None:
    network, ids = load("gemma3_text", tmp_path), ids_of(2)
    walk = walk_of(network, ids)
    hidden, block = walk.entering(ids), find_blocks(network).modules[0]
    sliding, full, again = (walk.given(index, ids, hidden, {}) for index in range(3))
    assert again.kwargs["attention_mask"].equal(sliding.kwargs["attention_mask"])
    assert (sliding(block) - full(block))[:, tiny_models.WINDOW + 1 :].abs().max() > 1e-3


def test_hidden_states_may_be_a_keyword_and_outputs_a_tuple() -> None:
    network, ids = Toy().requires_grad_(False), ids_of(4, 5)
    for batch in 1, 3, 4:
        assert torch.equal(logits_of_walk(network, ids, batch), network(ids, use_cache=False).logits)


def test_gradients_flow_through_a_block_alone(tmp_path: Path) -> None:
    network, ids = load("mistral", tmp_path), ids_of(2)
    given, block = inputs_of_blocks(network, ids)[0], find_blocks(network).modules[0]
    weight = block.mlp.down_proj.weight.requires_grad_()
    given(block).square().mean().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_neither_blocks_nor_the_head_are_computed_for_what_a_block_is_given(tmp_path: Path) -> None:
    network, ids = load("llama", tmp_path), ids_of(2)
    walk = walk_of(network, ids)

    def refuse(*_: object) -> None:
        raise AssertionError("computed")

    for module in network.lm_head, *(block.mlp for block in walk.blocks.modules):
        module.register_forward_pre_hook(refuse)
    assert walk.entering(ids).shape == (2, 40, 64)
    assert walk.given(1, ids, walk.entering(ids), {}).device.type == "cpu"


def test_a_walk_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    network, ids = load("llama", tmp_path), ids_of(2)
    before = network(ids).logits
    inputs_of_blocks(network, ids)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
    assert not any("forward" in vars(block) for block in find_blocks(network).modules)
    assert torch.equal(network(ids).logits, before)


# ------------------------------------------------------------------------------------------- refused before any work


def test_a_family_that_runs_its_blocks_again_is_refused_by_name() -> None:
    network = from_settings("hrm_text", num_layers_per_stack=2)
    with pytest.raises(ModelError, match=r"family hrm_text .* runs its blocks more than once"):
        walk_of(network, ids_of(3))


class HeadOfAllBlocks(Toy):
    """The logits are made of what all blocks put out."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        outputs = []
        for block in self.blocks:
            hidden = block(hidden, torch.ones(1, 1, input_ids.shape[1]), False)[0]
            outputs.append(hidden)
        return CausalLMOutput(logits=sum(outputs))


class StateOfItsOwn(Toy):
    """Each block is given the largest entry that the first one put out."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutput:
        hidden, mask = self.embedding(input_ids), torch.ones(1, 1, input_ids.shape[1])
        first: Tensor | None = None
        for block in self.blocks:
            hidden = block(hidden, mask if first is None else first.max() * mask, False)[0]
            first = hidden if first is None else first
        return CausalLMOutput(logits=hidden)


class LeavesOneOut(Toy):
    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutput:
        hidden, mask = self.embedding(input_ids), torch.ones(1, 1, input_ids.shape[1])
        return CausalLMOutput(logits=self.blocks[2](self.blocks[0](hidden, mask, False)[0], mask, False)[0])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (HeadOfAllBlocks, "the logits differ from those of the model"),
        (StateOfItsOwn, "block 2 would get another mask than"),
        (LeavesOneOut, "leaves blocks out"),
    ],
)
def test_a_family_that_the_walk_does_not_compute_is_refused(kind: type[Toy], reason: str) -> None:
    with pytest.raises(ModelError, match=f"{kind.__name__} .*{reason}"):
        walk_of(kind().requires_grad_(False), ids_of(4))


class Refusing(Toy):
    """Reads texts of a multiple of 64 tokens alone."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutput:
        if input_ids.shape[1] % 64:
            raise ValueError("the length must be a multiple of 64")
        return super().forward(input_ids, use_cache)


def test_a_forward_that_fails_on_text_is_one_line_with_its_reason() -> None:
    with pytest.raises(ModelError, match=r"Refusing fails on 3 sequences of 24 tokens .*multiple of 64"):
        walk_of(Refusing().requires_grad_(False), ids_of(4))


class MixedTypes(Toy):
    """Its second block adds products in the type asked for to zeros in float32, as the experts of some families."""

    class Block(Toy.Block):
        def forward(self, hidden: Tensor, mask: Tensor, flag: bool) -> tuple[Tensor, None]:
            product = self.linear(hidden)
            return torch.zeros_like(hidden).index_add_(0, torch.arange(len(hidden)), product), None


@pytest.mark.parametrize(("kind", "dtype"), [(Toy, torch.bfloat16), (MixedTypes, torch.float32)])
def test_matmuls_are_in_float32_if_a_block_supports_no_other_type(kind: type[Toy], dtype: torch.dtype) -> None:
    network = kind().requires_grad_(False)
    network.blocks[1] = kind.Block().requires_grad_(False)
    copies = copy.deepcopy(network.blocks)
    assert open_walk(network, copies.__getitem__, ids_of(4), torch.bfloat16).dtype == dtype
    assert open_walk(network, copies.__getitem__, ids_of(4), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("text", [[5] * 8 + [6], list(range(9)), [1, 2] * 40, [3, 3, 4]])
@pytest.mark.parametrize("count", [3, 5])
def test_the_compared_sequences_are_distinct_and_from_the_text(text: list[int], count: int) -> None:
    rows = distinct_sequences(torch.tensor([text]), count)
    assert rows.shape == (count, min(len(text), 24)) and {*rows.flatten().tolist()} <= {*text}
    assert len({tuple(row) for row in rows.tolist()}) == count

"""What the plan quantizes can be replaced by its product: the network computes with it what it computed before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.packing import write_weight
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForCausalLM

from aqlm_cli.models.blocks import count_parameters, describe_layers, find_blocks, linears, unfuse
from aqlm_cli.models.plain_linear import is_plain, weight_readers, why_not_plain
from aqlm_cli.quantization.block_files import put_matrix
from aqlm_cli.spec.plan import Plan, make_plan
from aqlm_cli.spec.selection import Selection
from aqlm_cli.spec.treatment import parse_treatment
from aqlm_kernels import AdditiveMatrix

SHAPE: Mapping[str, Any] = {**tiny_models.SHAPE, "head_dim": 16, "vocab_size": 258, "pad_token_id": None}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
STATE = {"state_size": 8, "time_step_rank": 8, "mamba_d_state": 8, "mamba_dt_rank": 8, "expand": 2}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "falcon": tiny_models.SHAPE,
    "phimoe": {**SHAPE, **EXPERTS},
    "llama4_text": {**SHAPE, **EXPERTS, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2},
    "hunyuan_v1_moe": {**SHAPE, **EXPERTS, "moe_topk": 2},
    "qwen2_moe": {**SHAPE, **EXPERTS, "shared_expert_intermediate_size": 128},
    "longcat_flash": {
        **SHAPE,
        **LATENT,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 64,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "jamba": {
        **SHAPE,
        **EXPERTS,
        **STATE,
        "use_mamba_kernels": False,
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
    },
    "mamba": {**SHAPE, **STATE},
    "rwkv": {**SHAPE, "attention_hidden_size": 64},
}


def network(family: str, device: str = "cpu") -> Any:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def planned(of: nn.Module) -> Plan:
    return make_plan(describe_layers(of), count_parameters(of), Selection(parse_treatment("2x4g8")))


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_layers_can_be_replaced(family: str) -> None:
    plan = planned(network(family, "meta"))
    dense, coded, ids = network(family), network(family), tiny_models.token_ids(length=12)
    for block in find_blocks(coded).modules:
        unfuse(block)
    before = dense(ids, use_cache=False).logits
    draw = torch.Generator().manual_seed(0)
    for target in plan.quantized:
        codes = torch.randint(16, (target.out_features, target.in_features // 8, 2), generator=draw)
        matrix = AdditiveMatrix(codes, 0.1 * torch.randn(2, 16, 8, generator=draw), torch.ones(target.out_features))
        write_weight(dense, target.path, matrix.dequantize())
        put_matrix(coded, target.path, matrix)
    found, wanted = (one(ids, use_cache=False).logits for one in (coded, dense))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert (found - before).abs().max() > 1e-3 and len(plan.quantized) > 2


@pytest.mark.parametrize(
    ("family", "layer", "reason"),
    [
        ("phimoe", "mlp.router", "PhimoeTopKRouter computes something else"),
        ("llama4_text", "feed_forward.router", "Llama4Router computes something else"),
        ("hunyuan_v1_moe", "mlp.gate.wg", "HunYuanMoEV1Gate reads its weight itself"),
        ("longcat_flash", "mlp.router.classifier", "LongcatFlashTopkRouter reads its weight itself"),
        ("jamba", "mamba.dt_proj", "JambaMambaMixer reads its weight itself"),
        ("mamba", "mixer.dt_proj", "MambaMixer reads its weight itself"),
        ("rwkv", "attention.output", "RwkvModel reads its weight itself"),
    ],
)
def test_a_layer_that_cannot_be_replaced_says_why(family: str, layer: str, reason: str) -> None:
    reasons = [target.reason for target in planned(network(family, "meta")).skipped if target.path.endswith(layer)]
    assert reasons and all(str(found).startswith(reason) for found in reasons)


# ----------------------------------------------------------------------------------------------------- one layer alone


class OwnWords(nn.Linear):
    """As Falcon has it."""

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Choosing(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x).topk(2)


class Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.adapter = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapter(x)


def with_another_parameter() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.gain = nn.Parameter(torch.ones(8))
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_implementation_of_the_matmul_is_plain(bias: bool, device: str) -> None:
    assert is_plain(nn.Linear(40, 24, bias, device)) and is_plain(OwnWords(40, 24, bias, device))
    assert not is_plain(nn.LayerNorm(8))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scaled(8, 8), "Scaled computes something else"),
        (Choosing(8, 8), "Choosing computes something else"),
        (Adapted(), "Adapted holds more than a weight and a bias"),
        (with_another_parameter(), "Linear holds more than a weight and a bias"),
        (parametrizations.weight_norm(nn.Linear(8, 8)), "its weight is computed from other parameters"),
    ],
)
def test_a_layer_that_computes_or_holds_something_else_is_not_plain(layer: nn.Linear, reason: str) -> None:
    assert str(why_not_plain(layer)).startswith(reason)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    block = nn.ModuleList([nn.ModuleList([layer])])
    assert not linears(block, "") or linears(block, "").keys() == {"0.0.adapter"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


# ------------------------------------------------------------------------------------------------- a network of layers


class Reader(nn.Module):
    """A block of linear layers, used in all the ways in which one can be."""

    def __init__(self) -> None:
        super().__init__()
        names = ("called", "typed", "multiplied", "transposed", "in_training", "never", "measured")
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
        self.listed = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.direct = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers
        x = layers["called"](x) + layers["typed"](x.to(layers["typed"].weight.dtype))
        x = F.linear(x, layers["multiplied"].weight, layers["multiplied"].bias) @ layers["transposed"].weight.T
        x = x * len(next(layers["measured"].parameters()).shape) * layers["measured"].out_features
        if self.training:
            x = x @ layers["in_training"].weight
        for layer in self.listed:
            x = x + layer.weight.sum()
        return x + self.direct.weight.mean()

    def unused(self) -> Tensor:
        return self.layers.never.weight


class Network(nn.Module):
    def __init__(self, blocks: int = 2, refusing: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Reader() for _ in range(blocks))
        self.norm, self.refusing = nn.LayerNorm(8), refusing
        self.register_buffer("unit", torch.ones(1))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embedding(input_ids) * self.unit
        if self.refusing:
            raise TypeError("another argument, please")
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.blocks[0].layers["called"].weight


def read_in(of: nn.Module) -> dict[str, str]:
    blocks = find_blocks(of)
    return weight_readers(of, dict(zip(blocks.paths, blocks.modules, strict=True)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_readers_of_a_weight_are_found_and_nothing_is_changed(device: str) -> None:
    with torch.device(device):
        of = Network().train()
    before = dict(of.named_parameters())
    layers = ("layers.typed", "layers.multiplied", "layers.transposed", "listed.0", "listed.1", "direct")
    assert read_in(of) == {f"blocks.{index}.{layer}": "Reader" for index in range(2) for layer in layers}
    after = dict(of.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert of.training and not any(module._forward_hooks for module in of.modules())
    assert {type(module) for module in of.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


def test_blocks_that_cannot_run_are_checked_by_their_source() -> None:
    """Which has no eyes for lists and conditions."""
    layers = ("layers.never", "direct")
    assert read_in(Network(refusing=True)) == {
        f"blocks.{index}.{layer}": "Reader" for index in range(2) for layer in layers
    }


def test_a_weight_that_two_layers_share_stays_as_it_is() -> None:
    of = Network()
    of.blocks[1].layers["called"].weight = of.blocks[0].layers["called"].weight
    reasons = {layer.path: layer.reason for layer in describe_layers(of)}
    assert reasons["blocks.0.layers.called"] == "its weight is also blocks.1.layers.called.weight"
    assert reasons["blocks.1.layers.called"] == "its weight is also blocks.0.layers.called.weight"
    assert reasons["blocks.0.layers.measured"] is None


def test_a_model_of_real_size_is_planned_without_its_weights() -> None:
    """60 experts of 1408 are a billion numbers, and the copy that runs has none of them."""
    with torch.device("meta"):
        of = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", num_hidden_layers=2))
    plan = make_plan(describe_layers(of), count_parameters(of), Selection(parse_treatment("2x8g8")))
    gate = next(target for target in plan.skipped if target.path.endswith("layers.0.mlp.shared_expert_gate"))
    assert (gate.out_features, gate.in_features) == (1, 2048)
    assert gate.reason == "2x8g8 and its codebooks would make it larger than it is; name it with --only to quantize it"
    assert not plan.grown and len(plan.quantized) == 2 * (4 + 3 + 2 * 60)

from __future__ import annotations

import copy

import pytest
import torch
from helpers import families
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from aqlm_kernels import SingleExperts, expert_shapes, is_fused, why_not_single

EXPERTS, HIDDEN, INNER, TOKENS = 5, 16, 24, 40


class Configuration:
    """What transformers' experts functions read from the model's."""

    _experts_implementation = "eager"


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight / x.square().mean(-1, keepdim=True).sqrt()


def form(transposed: bool = False, bias: bool = False, gate: bool = True, norm: bool = False) -> nn.Module:
    """Fused experts of random numbers, whose forward is transformers' own."""
    first = "gate_up_proj" if gate else "up_proj"

    @use_experts_implementation(
        is_transposed=transposed, has_bias=bias, has_gate=gate, has_post_expert_norm=norm, is_concatenated=not bias
    )
    class Experts(nn.Module):
        def __init__(self, config: Configuration) -> None:
            super().__init__()
            self.num_experts, self.limit, self.act_fn = EXPERTS, 0.7, ACT2FN["silu"]
            shapes = {first: (INNER * (2 if gate else 1), HIDDEN), "down_proj": (HIDDEN, INNER)}
            for name, (rows, columns) in shapes.items():
                weight = torch.randn(EXPERTS, rows, columns) / columns**0.5
                setattr(self, name, nn.Parameter(weight.transpose(1, 2).contiguous() if transposed else weight))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))
            if norm:
                self.post_expert_norm = Norm()

        if bias:  # as gpt-oss has it

            def _apply_gate(self, x: Tensor) -> Tensor:
                return x[..., ::2].clamp(max=self.limit).sigmoid() * (x[..., 1::2] + 1)

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            total = torch.zeros_like(x)
            for token in range(len(x)):
                for place, number in enumerate(index[token].tolist()):
                    total[token] += weights[token, place] * self.one(number, x[token])
            return total

        def one(self, number: int, x: Tensor) -> Tensor:
            for name in (first, "down_proj"):
                weight = getattr(self, name)[number]
                x = (weight.T if transposed else weight) @ x
                x = x + getattr(self, f"{name}_bias")[number] if bias else x
                if name == first:
                    x = self._apply_gate(x) if gate else self.act_fn(x)
            return self.post_expert_norm(x) if norm else x

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Experts(Configuration()).requires_grad_(False)


def routed(top: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and numbers and weights of their experts; the last expert gets no token."""
    draw = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=draw)[:top] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN, generator=draw).to(dtype), index, torch.rand(TOKENS, top, generator=draw)


FORMS = [
    {},
    {"transposed": True},
    {"transposed": True, "bias": True},
    {"bias": True},
    {"gate": False},
    {"norm": True},
]


@pytest.mark.parametrize("flags", FORMS)
def test_experts_one_by_one_compute_what_the_fused_module_does(flags: dict[str, bool]) -> None:
    fused, given = form(**flags), routed()
    assert is_fused(fused) and why_not_single(fused) is None
    wanted, found = fused(*given), SingleExperts(fused)(*given)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("flags", FORMS)
def test_one_changed_weight_changes_the_result(flags: dict[str, bool]) -> None:
    """The tolerance above would see it."""
    fused, given = form(**flags), routed()
    single = SingleExperts(fused)
    wanted = fused(*given)
    single.get_submodule("1.down_proj").weight[3, 5] += 0.1
    assert float((single(*given) - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


def test_weights_are_views_of_the_fused_parameters() -> None:
    for flags in FORMS:
        fused = form(**flags)
        for path, name in SingleExperts(fused).layers():
            layer = SingleExperts(fused).get_submodule(path)
            assert layer.weight.shape == expert_shapes(fused)[name]
            assert layer.weight.untyped_storage().data_ptr() == fused.get_parameter(name).untyped_storage().data_ptr()


def test_other_parameters_keep_their_names() -> None:
    names = dict(SingleExperts(form(norm=True)).named_parameters())
    assert "post_expert_norm.weight" in names
    assert {name.partition(".")[0] for name in names} == {"post_expert_norm", *map(str, range(EXPERTS))}


def test_an_index_beyond_the_experts_stands_for_none() -> None:
    single, (x, index, weights) = SingleExperts(form()), routed()
    nowhere = index.clone()
    nowhere[:, 1] = EXPERTS
    torch.testing.assert_close(single(x, nowhere, weights), single(x, index[:, :1], weights[:, :1]))


def test_a_copy_computes_with_its_own_parts() -> None:
    single, given = SingleExperts(form(norm=True)), routed()
    before = single(*given)
    copied = copy.deepcopy(single)
    copied.post_expert_norm.weight.zero_()
    assert torch.equal(single(*given), before)
    assert float(copied(*given).abs().max()) == 0


def test_16_bit_states_are_summed_in_float32() -> None:
    single = SingleExperts(form()).to(torch.bfloat16)
    x, index, weights = routed(top=4, dtype=torch.bfloat16)
    whole = SingleExperts(form())
    for layer in whole.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.bfloat16().float(), requires_grad=False)
    found, wanted = single(x, index, weights), whole(x.float(), index, weights)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()) < 0.01


def test_gradients_reach_inputs_and_routing_weights() -> None:
    fused = form()
    x, index, weights = routed()
    gradients = []
    for module in (fused, SingleExperts(fused)):
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        module(given[0], index, given[1]).square().sum().backward()
        gradients.append((given[0].grad, given[1].grad))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_more_parameters_than_matrices_are_refused() -> None:
    fused = form()
    fused.extra = nn.Parameter(torch.ones(3))
    assert "more than the matrices" in str(why_not_single(fused))


def test_another_form_is_refused() -> None:
    fused = form()
    fused.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, INNER, HIDDEN))
    assert "another form" in str(why_not_single(fused))


def test_a_forward_that_fails_is_refused_with_its_error() -> None:
    fused = form()
    fused._apply_gate = None
    assert "TypeError" in str(why_not_single(fused))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_families_are_told_by_their_attributes_without_weights(family: str) -> None:
    network = families.network_of(families.config_of(family)).to("meta")
    fused = [module for module in network.modules() if is_fused(module)]
    assert fused
    assert [why_not_single(module) for module in fused] == [None] * len(fused)

"""Which linear layers are routers or gates, whatever their family calls them."""

from __future__ import annotations

import pytest
from torch import nn

from aqlm_cli.models.routers import router_paths


class Fused(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(nn.Linear(64, experts * 32).weight.data.view(experts, 32, 64))


class Mixture(nn.Module):
    """A router, experts, and one that all tokens go to, with a gate."""

    def __init__(self, experts: nn.Module, router: nn.Module) -> None:
        super().__init__()
        self.choice, self.experts = router, experts
        self.shared = nn.ModuleDict({"gate_proj": nn.Linear(64, 128), "down_proj": nn.Linear(128, 64)})
        self.shared_weight = nn.Linear(64, 1)


def block(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


def listed(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(64, 96) for _ in range(count))


@pytest.mark.parametrize("experts", [listed(8), Fused(8)])
def test_as_many_outputs_as_experts_beside_it_make_a_router(experts: nn.Module) -> None:
    found = router_paths(block(mlp=Mixture(experts, nn.Linear(64, 8))), "layers.0")
    assert found == {"layers.0.mlp.choice", "layers.0.mlp.shared_weight"}
    assert "layers.0.mlp.choice" not in router_paths(block(mlp=Mixture(experts, nn.Linear(64, 9))), "layers.0")


@pytest.mark.parametrize("experts", [listed(8), Fused(8)])
def test_a_router_may_be_in_a_module_of_its_own(experts: nn.Module) -> None:
    alone = nn.ModuleDict({"layer": nn.Linear(64, 8), "norm": nn.LayerNorm(64)})
    assert "l.mlp.choice.layer" in router_paths(block(mlp=Mixture(experts, alone)), "l")


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("gate", nn.Linear(64, 8), True),
        ("router", nn.Linear(64, 8), True),
        ("router_gate", nn.Linear(64, 16), True),
        ("gate", nn.ModuleDict({"down": nn.Linear(64, 64)}), True),
        ("anything", nn.Linear(64, 1), True),
        ("gate", nn.Linear(64, 128), False),  # a gated projection
        ("gate_proj", nn.Linear(64, 8), False),
        ("output_gate", nn.Linear(64, 64), False),
        ("k_proj", nn.Linear(64, 8), False),
    ],
)
def test_names_count_where_outputs_are_few(name: str, layer: nn.Module, expected: bool) -> None:
    assert bool(router_paths(block(mlp=nn.ModuleDict({name: layer})), "gate.0")) == expected


def test_channels_of_a_convolution_are_not_experts() -> None:
    mixer = nn.ModuleDict({"convolution": nn.Conv1d(32, 32, 4, groups=32), "in_proj": nn.Linear(64, 32)})
    assert not router_paths(block(mixer=mixer), "layers.0")

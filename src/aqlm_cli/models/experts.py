"""Experts that transformers fuses into 3-D parameters, as the plan, the Hessians and the exporters see them.

Each expert's matrix is a layer of its own at `<experts module>.<number>.<projection>`, such as
`model.layers.0.mlp.experts.3.gate_up_proj`. A block that is quantized has them as modules (`SingleExperts`); the
network of the base model has the fused parameter. No family is named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from aqlm_cli.spec.plan import EXPERT, Layer
from aqlm_kernels import SingleExperts, expert_shapes, is_fused


@dataclass(frozen=True)
class ExpertPlace:
    """Place of one expert's parameter in a network whose experts are fused."""

    parameter: str  # [experts, ...]
    number: int
    transposed: bool


def expert_layers(path: str, fused: nn.Module, shared: Mapping[str, str]) -> Iterator[Layer]:
    """The matrices of the fused module at `path`; `shared` are reasons against parameters, by name."""
    shapes = expert_shapes(fused)
    for number in range(len(fused.get_parameter(next(iter(shapes))))):
        for name, (rows, columns) in shapes.items():
            reason = shared.get(f"{path}.{name}")
            yield Layer(f"{path}.{number}.{name}", rows, columns, bool(fused.has_bias), EXPERT, reason)


def expert_groups(block: nn.Module) -> list[tuple[str, ...]]:
    """Paths of the layers that are one projection of all experts; each of them has inputs of its own."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, module in block.named_modules():
        if isinstance(module, SingleExperts):
            for inside, name in module.layers():
                groups.setdefault((path, name), []).append(f"{path}.{inside}" if path else inside)
    return [tuple(group) for group in groups.values()]


def expert_place(network: nn.Module, name: str) -> ExpertPlace | None:
    """Place of the weight (`name` is a path or ends in .weight) or the bias of an expert; None for any other name."""
    bias = name.endswith(".bias")
    around, _, projection = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
    around, _, number = around.rpartition(".")
    fused: Any = _submodule(network, around) if number.isdecimal() else None
    if fused is None or not is_fused(fused) or projection not in expert_shapes(fused) or (bias and not fused.has_bias):
        return None
    parameter = f"{around}.{projection}_bias" if bias else f"{around}.{projection}"
    return ExpertPlace(parameter, int(number), fused.is_transposed and not bias)


def experts_in(network: nn.Module, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Parameters that hold the weights of experts among the layers at `paths`: name -> path of each expert's layer."""
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        place = expert_place(network, path)
        if place is not None and place.parameter not in found:
            around, _, projection = place.parameter.rpartition(".")
            count = len(network.get_parameter(place.parameter))
            found[place.parameter] = tuple(f"{around}.{number}.{projection}" for number in range(count))
    return found


def weight_parameter(network: nn.Module, path: str) -> str:
    """Name of the network's parameter that holds the weight of the layer at `path`."""
    place = expert_place(network, path)
    return f"{path}.weight" if place is None else place.parameter


def _submodule(network: nn.Module, path: str) -> nn.Module | None:
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None

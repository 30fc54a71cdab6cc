"""Routers and gates: linear layers that choose experts or scale an output, found without the model type.

They are a ten-thousandth of a model, and an error in them sends a token to another expert.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def router_paths(block: nn.Module, prefix: str) -> set[str]:
    """The linear layers of the block at `prefix` that are routers or gates.

    A router has one output, or is inside a module that is named a router; or it has far fewer outputs than inputs, and
    is named so or has one output for each expert beside it.
    """
    modules = dict(block.named_modules(prefix=prefix))
    routers: set[str] = set()
    for path, module in modules.items():
        if isinstance(module, nn.Linear):
            *around, name = path.removeprefix(prefix + ".").split(".")
            few = 2 * module.out_features <= module.in_features
            decides = _is_router(name) or module.out_features in _experts_beside(path, modules)
            if module.out_features == 1 or (few and decides) or any(map(_is_router, around)):
                routers.add(path)
    return routers


def _is_router(name: str) -> bool:
    """True for the name of a router; gated projections are named `gate_proj` and the like."""
    return name == "gate" or "router" in name.split("_")


def _experts_beside(path: str, modules: dict[str, nn.Module]) -> Iterator[int]:
    """Counts of experts in the module that holds the layer, or in its parent if it holds no other layer."""
    parent = path.rpartition(".")[0]
    around = parent.rpartition(".")[0]
    holders = [parent]
    if around in modules and sum(isinstance(module, nn.Linear) for module in modules[parent].modules()) == 1:
        holders.append(around)
    for holder in holders:
        for sibling in modules[holder].children():
            if isinstance(sibling, nn.ModuleList) and len(sibling) > 1:
                yield len(sibling)
            fused = (parameter.shape for parameter in sibling.parameters(recurse=False) if parameter.ndim > 2)
            yield from (shape[0] for shape in fused if min(shape) > 1)  # a depthwise convolution has [d, 1, k]

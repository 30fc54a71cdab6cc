"""Linear layers that decide where tokens go, or how much of something they get, known without the name of a family.

They are a ten-thousandth of a model, and an error in them sends a token to another expert.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def router_paths(block: nn.Module, prefix: str) -> set[str]:
    """The linear layers of the block at `prefix` that are routers or gates.

    They put out one number, or lie in a module that is called a router; or they are called so, or put out one number
    for each expert beside them, and these are far fewer than they are given.
    """
    modules = dict(block.named_modules(prefix=prefix))
    found: set[str] = set()
    for path, module in modules.items():
        if isinstance(module, nn.Linear):
            *around, name = path.removeprefix(prefix + ".").split(".")
            few = 2 * module.out_features <= module.in_features
            decides = _is_router(name) or module.out_features in _experts_beside(path, modules)
            if module.out_features == 1 or (few and decides) or any(map(_is_router, around)):
                found.add(path)
    return found


def _is_router(name: str) -> bool:
    """By its name; gated projections are called `gate_proj` and the like."""
    return name == "gate" or "router" in name.split("_")


def _experts_beside(path: str, modules: dict[str, nn.Module]) -> Iterator[int]:
    """How many experts there are in the module that holds the layer, or in the one around it if it holds no other."""
    parent = path.rpartition(".")[0]
    around = parent.rpartition(".")[0]
    holders = [parent]
    if around in modules and sum(isinstance(one, nn.Linear) for one in modules[parent].modules()) == 1:
        holders.append(around)
    for holder in holders:
        for sibling in modules[holder].children():
            if isinstance(sibling, nn.ModuleList) and len(sibling) > 1:
                yield len(sibling)
            fused = (one.shape for one in sibling.parameters(recurse=False) if one.ndim > 2)
            yield from (shape[0] for shape in fused if min(shape) > 1)  # that of a depthwise convolution is [d, 1, k]

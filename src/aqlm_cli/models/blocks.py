"""Blocks of a decoder-only transformer: find, describe and observe them.

A language model is an embedding, a list of blocks, a last norm and a head.  Quantization goes through that list block
by block (walk.py).  Nothing here depends on a model type, or on transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.models.plain_linear import is_plain, weight_readers, why_not_plain
from aqlm_cli.models.routers import router_paths
from aqlm_cli.spec.plan import ROUTER, Layer


@dataclass(frozen=True)
class Blocks:
    """The model's repeated layers: `modules[i]` is the submodule at `paths[i]`."""

    path: str  # of the list itself, such as "model.layers"
    modules: tuple[nn.Module, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(f"{self.path}.{index}" for index in range(len(self.modules)))


def find_blocks(network: nn.Module) -> Blocks:
    """The `nn.ModuleList` that holds the most weights.

    Weight is a surer sign than length: a list of 64 experts lies inside a list of 28 blocks, and the vision tower of a
    multimodal model may be deeper than its text model.  Buffers count too: the codes of a packed model are buffers.
    """
    lists = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    path, modules = max(lists, key=lambda entry: _elements(entry[1]), default=("", nn.ModuleList()))
    if _elements(modules) == 0:
        raise ModelError(
            f"{type(network).__name__} has no list of repeated layers, so there are no blocks to quantize; "
            "choose a decoder-only transformer"
        )
    return Blocks(path, tuple(modules))


def _elements(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """Every linear layer of a block that computes x W^T + b alone, by its full path, in the order of definition."""
    return {path: module for path, module in block.named_modules(prefix=prefix) if is_plain(module)}


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the submodule of `root` at `path` by `module`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


# ------------------------------------------------------------------------------------------------ what a plan must know


def describe_layers(network: nn.Module) -> list[Layer]:
    """Every matrix inside the blocks, for the plan; one that cannot be quantized carries the reason.

    Such are experts fused into one 3-D parameter, GPT-2's `Conv1D`, a router's bare matrix or a linear layer with a
    forward of its own, layers whose weight another module reads, and weights that two layers share: they are listed, so
    that the plan can say why they stay as they are.
    """
    listed = find_blocks(network)
    blocks = dict(zip(listed.paths, listed.modules, strict=True))
    readers, shared = weight_readers(network, blocks), _shared_weights(network)
    layers: list[Layer] = []
    for prefix, block in blocks.items():
        routers = router_paths(block, prefix)
        for path, module in block.named_modules(prefix=prefix):
            if not is_plain(module):
                layers.extend(_other_matrices(path, module))
                continue
            reason = shared.get(f"{path}.weight")
            if path in readers:
                reason = f"{readers[path]} reads its weight itself"
            kind = ROUTER if path in routers else "linear"
            rows, columns = module.weight.shape
            layers.append(Layer(path, rows, columns, module.bias is not None, kind, reason))
    return layers


def _shared_weights(network: nn.Module) -> dict[str, str]:
    """Reason, by name, for every parameter that has a second name."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: f"its weight is also {next(other for other in group if other != name)}"
        for group in names.values()
        for name in group
        if len(group) > 1
    }


def _other_matrices(path: str, module: nn.Module) -> Iterator[Layer]:
    why = why_not_plain(module) if isinstance(module, nn.Linear) else None
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < 2:
            continue
        *rows, columns = parameter.shape
        held = f"{type(module).__name__} holds it as a tensor of shape {list(parameter.shape)}, not as nn.Linear"
        yield Layer(
            path=path if name == "weight" else f"{path}.{name}",
            out_features=torch.Size(rows).numel(),
            in_features=columns,
            bias=False,
            reason=why or held,
        )


def count_parameters(network: nn.Module) -> int:
    """Count of parameters in a checkpoint of the network; a head tied to the embeddings counts once."""
    unique = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in unique.values())


# --------------------------------------------------------------------------------------- watching the inputs of linears


@contextmanager
def observe_inputs(block: nn.Module, callback: Callable[[tuple[str, ...], Tensor], None]) -> Iterator[None]:
    """Call `callback(paths, x [tokens, in])` for each input of the linear layers, after every forward of `block`.

    Layers that read the same tensor (q, k and v; gate and up) share one call, so what is computed from x, such as
    x^T x, is computed once.  "The same" means the same tensor object in this forward.  Paths are relative to the block.
    """
    inputs: dict[int, tuple[Tensor, list[str]]] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.setdefault(id(args[0]), (args[0], []))[1].append(path)

        return hook

    def report(*_: object) -> None:
        for x, paths in inputs.values():
            callback(tuple(paths), x.detach().reshape(-1, x.shape[-1]))
        inputs.clear()

    layers = linears(block, prefix="")
    hooks = [layer.register_forward_pre_hook(note(path)) for path, layer in layers.items()]
    hooks.append(block.register_forward_hook(report))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

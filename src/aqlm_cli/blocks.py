"""The blocks of a decoder-only transformer: found, described, and watched.

A language model is an embedding, a list of blocks, a last norm and a head.  Quantization goes through that list block
by block (walk.py).  Nothing here knows a family, or transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.plan import Layer


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
    model with eyes may be deeper than its text model.  Buffers count too, for the codes of a packed model are buffers.
    """
    lists = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    path, found = max(lists, key=lambda entry: _elements(entry[1]), default=("", nn.ModuleList()))
    if _elements(found) == 0:
        raise ModelError(
            f"{type(network).__name__} has no list of repeated layers, so there are no blocks to quantize; "
            "choose a decoder-only transformer"
        )
    return Blocks(path, tuple(found))


def _elements(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """Every `nn.Linear` of a block by its full path, in the order in which the block defines them."""
    found = block.named_modules(prefix=prefix)
    return {path: module for path, module in found if isinstance(module, nn.Linear)}


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of `root` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


# ------------------------------------------------------------------------------------------------ what a plan must know


def describe_layers(network: nn.Module) -> list[Layer]:
    """Every matrix inside the blocks as the plan sees it; those that are no `nn.Linear` come with the reason.

    Experts fused into one 3-D parameter, GPT-2's `Conv1D` and a router's bare matrix are such: they are listed, so that
    the plan can say why they stay as they are.
    """
    blocks = find_blocks(network)
    layers = []
    for prefix, block in zip(blocks.paths, blocks.modules, strict=True):
        for path, module in block.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear):
                layers.append(Layer(path, module.out_features, module.in_features, bias=module.bias is not None))
            else:
                layers.extend(_other_matrices(path, module))
    return layers


def _other_matrices(path: str, module: nn.Module) -> Iterator[Layer]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < 2:
            continue
        *rows, columns = parameter.shape
        yield Layer(
            path=path if name == "weight" else f"{path}.{name}",
            out_features=torch.Size(rows).numel(),
            in_features=columns,
            bias=False,
            reason=f"{type(module).__name__} holds it as a tensor of shape {list(parameter.shape)}, not as nn.Linear",
        )


def count_parameters(network: nn.Module) -> int:
    """Numbers that a checkpoint of the network stores; a head tied to the embeddings counts once."""
    unique = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in unique.values())


# --------------------------------------------------------------------------------------- watching the inputs of linears


@contextmanager
def observe_inputs(block: nn.Module, callback: Callable[[tuple[str, ...], Tensor], None]) -> Iterator[None]:
    """While open, every forward of `block` ends with `callback(paths, x [tokens, in])` for each input of its linears.

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

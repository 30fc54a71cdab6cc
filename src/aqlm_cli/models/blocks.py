"""Blocks of a decoder-only transformer: find, describe and observe them.

A language model is an embedding, a list of blocks, a last norm and a head.  Quantization goes through that list block
by block (walk.py).  Nothing here depends on a model type, or on transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.models.experts import expert_groups, expert_layers
from aqlm_cli.models.plain_linear import is_plain, weight_readers, why_not_plain
from aqlm_cli.models.routers import router_paths
from aqlm_cli.spec.plan import ROUTER, Layer
from aqlm_kernels import SingleExperts, is_fused, why_not_single


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


def unfuse(block: nn.Module) -> nn.Module:
    """Take all fused experts of the block apart, in place; their layers are views of the fused parameters.

    The block computes the same. Experts that cannot be taken apart stay as they are (`describe_layers` says why).
    """
    for path, module in list(block.named_modules()):
        if is_fused(module) and why_not_single(module) is None:
            replace_module(block, path, SingleExperts(module))
    return block


# ------------------------------------------------------------------------------------------------ what a plan must know


def describe_layers(network: nn.Module) -> list[Layer]:
    """Every matrix inside the blocks, for the plan; one that cannot be quantized carries the reason.

    Such are GPT-2's `Conv1D`, a router's bare matrix or a linear layer with a forward of its own, layers whose weight
    another module reads, and weights that two layers share: they are listed, so that the plan can say why they stay as
    they are. Experts that are fused into one 3-D parameter are one matrix each; see `unfuse`.
    """
    listed = find_blocks(network)
    blocks = dict(zip(listed.paths, listed.modules, strict=True))
    readers, shared = weight_readers(network, blocks), _shared_weights(network)
    layers: list[Layer] = []
    refusals: dict[Hashable, str | None] = {}  # of fused experts, by their form
    for prefix, block in blocks.items():
        routers = router_paths(block, prefix)
        for path, module in block.named_modules(prefix=prefix):
            if is_fused(module):
                form = _form(module)
                refusals[form] = why = refusals[form] if form in refusals else why_not_single(module)
                layers.extend(_other_matrices(path, module, why) if why else expert_layers(path, module, shared))
                continue
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


def _form(module: nn.Module) -> Hashable:
    """Key that is equal for modules of one class with the same shapes and settings."""
    shapes = tuple((name, parameter.shape) for name, parameter in module.named_parameters())
    settings = (item for item in vars(module).items() if isinstance(item[1], (bool, int, float, str)))
    return type(module), shapes, tuple(sorted(settings))


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


def _other_matrices(path: str, module: nn.Module, why: str | None = None) -> Iterator[Layer]:
    why = why_not_plain(module) if isinstance(module, nn.Linear) else why
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
    An expert's input, the tokens routed to it, is its own: the call comes at once, so that none of them is kept.
    """
    inputs: dict[int, tuple[Tensor, list[str]]] = {}
    experts = {path for group in expert_groups(block) for path in group}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if path in experts:
                callback((path,), args[0].detach())
                return
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

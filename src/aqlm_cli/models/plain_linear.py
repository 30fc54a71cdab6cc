"""Check which linear layers can be quantized: those that take x, return x W^T + b, and do nothing else.

A quantized layer has no `weight`. So a layer must not compute something else (routers of Phi-3.5-MoE and Llama 4 are
subclasses of nn.Linear that return a choice of experts), and no other module may read its weight (the gate of Hunyuan
reads its type, Jamba multiplies by it itself). The first is tried on a small matrix. The second is observed in a
forward pass of a hollow copy of the network, whose linear layers return zeros without a weight to multiply by; for
blocks that this pass does not reach, the source code decides.
"""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import sys
import textwrap
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

TOKENS = 4
"""Tokens of the observed forward pass."""

MOST_COMPUTED = 2**22
"""Elements of a tensor of several matrices, such as fused experts, above which its module is not run."""


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True for an nn.Linear that holds a weight, perhaps a bias, and computes x W^T + b."""
    return isinstance(module, nn.Linear) and why_not_plain(module) is None


def why_not_plain(module: nn.Linear) -> str | None:
    """Reason why a linear layer cannot be quantized, or None."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return "its weight is computed from other parameters"
    if {name for name, _ in module.named_parameters(recurse=False)} - {"bias"} != {"weight"} or any(module.children()):
        return f"{kind} holds more than a weight and a bias"
    if type(module).forward is nn.Linear.forward or _computes_the_product(module):
        return None
    return f"{kind} computes something else than x W^T + b"


def _computes_the_product(module: nn.Linear) -> bool:
    """Try the layer with a small matrix as its weight: a subclass may implement the same matmul in its own code."""
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 8, generator=draw), torch.randn(2, 4, 8, generator=draw)
    bias = None if module.bias is None else torch.randn(3, generator=draw)
    small = copy.copy(module)
    small.__dict__ = {**module.__dict__, "in_features": 8, "out_features": 3}
    small._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    try:
        with torch.no_grad(), torch.device("cpu"):
            output = type(module).forward(small, x)  # without the hooks of the module
    except Exception:  # a custom forward may fail in any way
        return False
    expected = F.linear(x, weight, bias)
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------ who reads the weights


def weight_readers(network: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, str]:
    """Plain linear layers of the blocks whose weight another module reads: path -> class of that module.

    The network may be without weights, and is not changed. One of several blocks with the same structure is enough.
    """
    readers: dict[str, str] = {}
    finished: set[str] = set()
    kinds = {prefix: _kind(block) for prefix, block in blocks.items()}
    try:
        _watch_forward(network, kinds, readers, finished)
    except _Seen:
        pass
    except Exception:  # a model may need anything that a hollow network does not have
        one_of_each = {kind: prefix for prefix, kind in kinds.items()}
        for kind in one_of_each.keys() - {kinds[prefix] for prefix in finished}:
            readers |= _readers_by_source(one_of_each[kind], blocks[one_of_each[kind]])
    inside = {
        (kinds[prefix], path.removeprefix(prefix)): reader
        for path, reader in readers.items()
        for prefix in blocks
        if path.startswith(prefix + ".")
    }
    return {
        prefix + rest: reader for prefix in blocks for (kind, rest), reader in inside.items() if kind == kinds[prefix]
    }


class _Seen(Exception):
    """Signal that ends a forward pass once a block of each kind has run."""


def _kind(block: nn.Module) -> Hashable:
    """Key that is equal for blocks of the same modules with parameters of the same shapes."""
    shapes = ((path, type(module), module.named_parameters(recurse=False)) for path, module in block.named_modules())
    return tuple((path, kind, tuple((name, one.shape) for name, one in own)) for path, kind, own in shapes)


@torch.no_grad()
def _watch_forward(
    network: nn.Module, kinds: Mapping[str, Hashable], readers: dict[str, str], finished: set[str]
) -> None:
    """Fill `readers` with the class that reads each weight, and `finished` with the paths of completed blocks.

    Raises _Seen as soon as one block of each kind has run.
    """
    hollow = _hollow(network).eval()
    zeros = cache(lambda shape: _zeros(shape, torch.float32))  # one for all, because RWKV writes to its inputs

    def finish(path: str) -> None:
        finished.add(path)
        if len({kinds[prefix] for prefix in finished}) == len(set(kinds.values())):
            raise _Seen

    for path, module in hollow.named_modules():
        if path in kinds:
            module.register_forward_hook(lambda *_, path=path: finish(path))
        if is_plain(module):
            _watch(module, path, readers, zeros)
    with _silence():
        hollow(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress warnings and log messages, which a user should not see for a copy of the network."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _watch(layer: nn.Linear, path: str, readers: dict[str, str], zeros: Callable[[torch.Size], Tensor]) -> None:
    """Make the layer return zeros, and record in `readers` who reads its weight from outside."""
    kind: Any = type(layer)
    shape, outputs = layer.weight.shape, layer.out_features

    def read(_: nn.Linear) -> Tensor:
        readers.setdefault(path, _reader(sys._getframe(1)))
        return zeros(shape)

    def forward(_: nn.Linear, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], outputs)

    layer.__class__ = type(kind.__name__, (kind,), {"weight": property(read), "forward": forward})


def _reader(frame: FrameType | None) -> str:
    """The class of the innermost module that runs in this frame or around it."""
    while frame is not None and not isinstance(frame.f_locals.get("self"), nn.Module):
        frame = frame.f_back
    return "the network" if frame is None else type(frame.f_locals["self"]).__name__


def _hollow(network: nn.Module) -> nn.Module:
    """A copy on the CPU with zeros for all parameters but the weights of plain linear layers, which it lacks."""
    parameters = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in network.parameters()}
    copied = copy.deepcopy(network, memo=dict(parameters))
    for module in copied.modules():
        linear = is_plain(module)
        large = any(p.ndim > 2 and p.numel() > MOST_COMPUTED for p in module.parameters(recurse=False))
        if large:
            module.forward = _zeros_like_first
        for name, parameter in module.named_parameters(recurse=False):
            if not large and not (linear and name == "weight"):
                setattr(module, name, nn.Parameter(_zeros(parameter.shape, parameter.dtype), False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, _zeros(buffer.shape, buffer.dtype))
    return copied


def _zeros_like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(x)


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written to: numpy asks the system for pages that are zero already."""
    floating = dtype.is_floating_point
    zeros = torch.from_numpy(np.zeros(tuple(shape), np.float32 if floating else np.int64))
    return zeros if floating else zeros.to(dtype)


def _readers_by_source(prefix: str, block: nn.Module) -> dict[str, str]:
    """Layers named as `self.PATH.weight` in the methods of the block's modules, whether or not these are called."""
    readers: dict[str, str] = {}
    named: dict[type, set[str]] = {}
    for path, owner in block.named_modules(prefix=prefix):
        kind = type(owner)
        if kind not in named:
            named[kind] = _weights_in_source(kind)
        for inside in named[kind]:
            with suppress(AttributeError):
                if is_plain(owner.get_submodule(inside)):
                    readers[f"{path}.{inside}"] = kind.__name__
    return readers


def _weights_in_source(kind: type) -> set[str]:
    """Every PATH of a `self.PATH.weight` in the methods of a class and its bases, except those that initialize it."""
    paths: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        with suppress(OSError, TypeError, SyntaxError):  # a class created at run time has no source
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            methods = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            for method in methods:
                if method.name not in ("__init__", "_init_weights", "reset_parameters"):
                    paths.update(path for node in ast.walk(method) if (path := _weight_path(node)))
    return paths


def _weight_path(node: ast.AST) -> str:
    """PATH of `self.PATH.weight`; nothing of any other expression."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    own = isinstance(node, ast.Name) and node.id == "self" and names[:1] == ["weight"]
    return ".".join(reversed(names[1:])) if own else ""

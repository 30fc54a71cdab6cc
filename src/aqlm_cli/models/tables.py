"""The matrices outside the blocks: the table of embeddings and the output head, two or, where they are tied, one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from aqlm_cli.models.blocks import find_blocks, replace_module
from aqlm_cli.models.plain_linear import is_plain
from aqlm_cli.spec.plan import Layer
from aqlm_kernels import CompressedEmbedding, Matrix, embedding_scale


def describe_tables(network: nn.Module) -> list[Layer]:
    """The embeddings and the head for the plan; one that cannot be quantized carries the reason.

    A matrix with both duties is listed once, under the path of the embeddings.
    """
    embeddings, head = _outside(network, "input"), _outside(network, "output")
    layers: list[Layer] = []
    tied = embeddings is not None and head is not None and embeddings[1].weight is head[1].weight
    if embeddings is not None:
        path, module = embeddings
        reason = _why_not_table(module) or _also(network, module, {path, *([head[0]] if head and tied else [])})
        if head is not None and tied and reason is None and not is_plain(head[1]):
            reason = f"{type(head[1]).__name__} at {head[0]} does more than multiply by it"
        shape = _shape(module)
        bias = bool(head is not None and tied and getattr(head[1], "bias", None) is not None)
        layers.append(Layer(path, *shape, bias, "table" if tied else "embedding", reason))
    if head is not None and not tied:
        path, module = head
        reason = None if is_plain(module) else f"{type(module).__name__} does more than multiply by it"
        shape, bias = _shape(module), getattr(module, "bias", None) is not None
        layers.append(Layer(path, *shape, bias, "head", reason or _also(network, module, {path})))
    return layers


def output_head(network: nn.Module) -> nn.Linear | None:
    """The output head, where the network has one that multiplies by a matrix."""
    found = _outside(network, "output")
    return found[1] if found is not None and isinstance(found[1], nn.Linear) else None


def put_table(network: nn.Module, path: str, matrix: Matrix, device: Any = None) -> None:
    """Replace the embeddings, the head, or with the path of tied embeddings both, by layers of this matrix.

    They come to the device of the weights before, unless another is given.
    """
    module: Any = network.get_submodule(path)
    head, device = _outside(network, "output"), device or module.weight.device
    if not isinstance(module, nn.Embedding):
        replace_module(network, path, _layer(matrix, module.bias, device))
        return
    tied = head is not None and head[1].weight is module.weight
    layer = _layer(matrix, head[1].bias if head is not None and tied else None, device)
    embedding = CompressedEmbedding(layer, module.padding_idx, embedding_scale(module) or 1.0)
    replace_module(network, path, embedding.requires_grad_(False))
    if head is not None and tied:
        replace_module(network, head[0], layer)


def _layer(matrix: Matrix, bias: Any, device: Any) -> nn.Module:
    own = next(iter(matrix.tensors().values())).device
    return matrix.module(None if bias is None else bias.detach().to(own)).requires_grad_(False).to(device)


def _outside(network: Any, side: str) -> tuple[str, Any] | None:
    """Path and module of the embeddings (`input`) or the head (`output`); None where there is no such matrix."""
    module = None
    with suppress(AttributeError, NotImplementedError, TypeError):  # families without one raise different errors
        module = getattr(network, f"get_{side}_embeddings")()
    if module is None or getattr(getattr(module, "weight", None), "ndim", 0) != 2:
        return None
    blocks = find_blocks(network).path + "."
    paths = [path for path, one in network.named_modules() if one is module and not path.startswith(blocks)]
    return (paths[0], module) if paths else None


def _shape(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return rows, columns


def _why_not_table(module: nn.Module) -> str | None:
    if not isinstance(module, nn.Embedding):
        return f"{type(module).__name__} is no table of rows"
    if embedding_scale(module) is None:
        return f"{type(module).__name__} does more than look rows up"
    return None


def _also(network: nn.Module, module: Any, known: set[str]) -> str | None:
    """The reason against a weight that is also a parameter of another module."""
    for path, one in network.named_modules(remove_duplicate=False):
        if path not in known and any(other is module.weight for other in one.parameters(recurse=False)):
            return f"its weight is also that of {path}"
    return None

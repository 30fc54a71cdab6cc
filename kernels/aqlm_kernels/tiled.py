"""x W^T for a matrix of any kind: W is dequantized a tile of its rows at a time, and torch multiplies by the tile.

So the memory beside codes, x and y is that of a tile, even where W has a row for each token of a large vocabulary.
With gradients theta, the learnable tensors of W, is kept for the backward, and W is dequantized again there:

    dx = dy W        dW = dy^T x        dtheta = dW through the gradient of `dequantize`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from aqlm_kernels.cpu import dequantize as additive
from aqlm_kernels.cpu import uniform
from aqlm_kernels.matrices.matrix import Matrix


def _additive(codes: Tensor, codebooks: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    """W of an additive matrix; the bits that its codebooks are stored in do not matter to it."""
    return additive.dequantize(codes, codebooks, scales, rest[-1])


COMPILED: Mapping[str, Callable[..., Tensor]] = {"additive": _additive, "uniform": uniform.dequantize}
"""Kinds of matrix that compiled code dequantizes on a CPU: a function of their tensors in order, and the type of W."""

COMPILED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of W that compiled code gives."""

TILE_BYTES = {"cpu": 2**22, "cuda": 2**26}
"""Bytes of a tile of W in the type of x: on a CPU so many as stay in a cache, on a GPU so many as keep it busy."""


def linear(x: Tensor, kind: type[Matrix], tensors: Mapping[str, Tensor]) -> Tensor:
    """x W^T [..., out] of x [..., in] for the matrix of these tensors, in the type of x, or autocast's."""
    x = as_autocast(x)
    product: Tensor = _Linear.apply(x, kind, tuple(tensors), *tensors.values())  # type: ignore[no-untyped-call]
    return product


def as_autocast(x: Tensor) -> Tensor:
    """x in the type that autocast computes in, where it is on and x is not float64."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def dequantize(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """W `[out, in]`, equal to `matrix.dequantize` and with its gradients; in compiled code where none are recorded."""
    tensors = list(matrix.tensors().values())
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if records or tensors[0].device.type != "cpu" or dtype not in COMPILED_TYPES or matrix.kind not in COMPILED:
        return matrix.dequantize(dtype)
    weight: Tensor = _dequantize(matrix.kind, tensors, [matrix.out_features, matrix.in_features], dtype)
    return weight


@torch.library.custom_op("aqlm::dequantize", mutates_args=(), device_types="cpu")
def _dequantize(kind: str, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """W of this shape from the tensors of a matrix of a kind in COMPILED."""
    return COMPILED[kind](*tensors, dtype)


@_dequantize.register_fake
def _(kind: str, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(*shape, dtype=dtype)


class _Linear(torch.autograd.Function):
    """Saves x and the tensors of the matrix; never W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: type[Matrix], names: tuple[str, ...], *tensors: Tensor) -> Tensor:
        ctx.kind, ctx.names = kind, names
        ctx.save_for_backward(x, *tensors)
        matrix = kind.from_tensors(dict(zip(names, tensors, strict=True)))
        tiles = list(_tiles(matrix, x))
        if len(tiles) == 1:
            return F.linear(x, dequantize(matrix, x.dtype))
        rows = x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(rows), matrix.out_features)
        for tile in tiles:
            torch.mm(rows, dequantize(_rows(matrix, tile, x.device), x.dtype).T, out=y[:, tile])
        return y.view(*x.shape[:-1], matrix.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        tensors = dict(zip(ctx.names, saved, strict=True))
        wanted = [name for name, needed in zip(ctx.names, ctx.needs_input_grad[3:], strict=True) if needed]
        matrix = ctx.kind.from_tensors(tensors)
        rows, slopes = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(rows, dtype=torch.promote_types(x.dtype, torch.float32))
        gradients = {name: torch.zeros_like(tensors[name]) for name in wanted}
        for tile in _tiles(matrix, x):
            part = _rows(matrix, tile, x.device).tensors()
            with torch.enable_grad():
                learnable = {name: part[name].detach().requires_grad_() for name in wanted}
                weight = dequantize(ctx.kind.from_tensors({**part, **learnable}), x.dtype)  # [tile, in]
            if dx is not None:
                dx += slopes[:, tile] @ weight.detach()
            if wanted:
                found = torch.autograd.grad(weight, list(learnable.values()), slopes[:, tile].T @ rows)
                for name, gradient in zip(wanted, found, strict=True):
                    shared = part[name] is tensors[name]
                    gradients[name][... if shared else tile] += gradient
        of_x = None if dx is None else dx.to(x.dtype).view(x.shape)
        return of_x, None, None, *(gradients.get(name) for name in ctx.names)


def _rows(matrix: Matrix, tile: slice, device: torch.device) -> Matrix:
    return matrix.rows(torch.arange(tile.start, tile.stop, device=device))


def _tiles(matrix: Matrix, x: Tensor) -> Iterator[slice]:
    """Parts of the rows of W, of about TILE_BYTES in the type of x."""
    size = matrix.out_features * matrix.in_features * x.element_size()
    return equal_parts(matrix.out_features, size / TILE_BYTES.get(x.device.type, 2**26))


def equal_parts(length: int, count: float) -> Iterator[slice]:
    """About so many parts of a range of this length; at least one, and none of them is empty."""
    number = max(1, min(length, round(count)))
    for part in range(number):
        yield slice(part * length // number, (part + 1) * length // number)

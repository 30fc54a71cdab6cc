"""The products of quantized layers as operators of torch: torch.compile, export and autograd see them whole.

`decoding_product` and `packed_product` read the codes in the order of the matmul kernels. That order is made once for
each layer and kept here under its key, so that the operators have nothing but tensors, numbers and names for arguments.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from aqlm_kernels.backends import matmul, why_not_triton
from aqlm_kernels.cpu import gemm
from aqlm_kernels.cpu.uniform import PackedUniform
from aqlm_kernels.matrices.additive import AdditiveMatrix
from aqlm_kernels.packed import PackedMatrix

Made = TypeVar("Made")

PACKED: Mapping[str, Callable[..., PackedUniform]] = {"uniform": PackedUniform.of}
"""Kinds of matrix for which few rows of x are multiplied straight from the levels, and how to pack their tensors."""


@torch.library.custom_op("aqlm::decoding_product", mutates_args=(), device_types=("cpu", "cuda"))
def decoding_product(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, key: int, backend: str) -> Tensor:
    """x W^T [..., out] by the named backend, or the first that can if the name is empty; no gradients."""
    return matmul(x, packed(key, codes, codebooks, scales), backend or None)


@torch.library.custom_op("aqlm::packed_product", mutates_args=(), device_types="cpu")
def packed_product(x: Tensor, kind: str, tensors: Sequence[Tensor], out_features: int, key: int) -> Tensor:
    """x W^T [..., out] for a few rows of x and the tensors of a matrix of a kind in PACKED; no gradients."""
    rows = x.reshape(-1, x.shape[-1])
    y = _made(key, PACKED[kind], *tensors).matmul(rows)
    return y.reshape(*x.shape[:-1], out_features)


@torch.library.custom_op("aqlm::product", mutates_args=(), device_types="cpu")
def product(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """x W^T [..., out] in the type of x. W is written again in the backward, which is cheaper than keeping it."""
    return gemm.matmul(x, codes, codebooks, scales)


@torch.library.custom_op("aqlm::input_gradient", mutates_args=(), device_types="cpu")
def _input_gradient(dy: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """dy W [..., in]."""
    return gemm.input_gradient(dy, codes, codebooks, scales)


@torch.library.custom_op("aqlm::weight_gradients", mutates_args=(), device_types="cpu")
def _weight_gradients(dy: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the codebooks [M, K, g] and the scales [out]; matmuls in the type of the forward."""
    return gemm.weight_gradients(dy, x, codes, codebooks, scales)


@product.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    from aqlm_kernels.gpu import matmul

    return matmul.gemm(x, codes, codebooks, scales)


@_input_gradient.register_kernel("cuda")
def _(dy: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    from aqlm_kernels.gpu import matmul

    return matmul.input_gradient(dy, codes, codebooks, scales)


@_weight_gradients.register_kernel("cuda")
def _(dy: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    from aqlm_kernels.gpu import matmul

    return matmul.weight_gradients(dy, x, codes, codebooks, scales)


@decoding_product.register_fake
def _(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, key: int, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(scales))


@packed_product.register_fake
def _(x: Tensor, kind: str, tensors: Sequence[Tensor], out_features: int, key: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@product.register_fake
def _(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(scales))


@_input_gradient.register_fake
def _(dy: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], codes.shape[1] * codebooks.shape[2])


@_weight_gradients.register_fake
def _(dy: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(codebooks, dtype=torch.float32), torch.empty_like(scales, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    x, codes, codebooks, scales = ctx.saved_tensors
    dx = codebook_gradient = scale_gradient = None
    with torch.autocast(dy.device.type, enabled=False):
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy, codes, codebooks, scales)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            codebook_gradient, scale_gradient = _weight_gradients(dy, x, codes, codebooks, scales)
    return (
        dx,
        None,
        codebook_gradient if ctx.needs_input_grad[2] else None,
        scale_gradient if ctx.needs_input_grad[3] else None,
    )


def has_product(device: torch.device, group_size: int) -> bool:
    """Check that `product` runs there, with its gradients."""
    return device.type == "cpu" or why_not_triton(device, group_size) is None


product.register_autograd(_backward, setup_context=_keep)


# ------------------------------------------------------------------------------------------------ orders of the kernels


@dataclass(frozen=True)
class _Kept:
    """A value with the tensors it was made from: they are kept, so that no other can come to lie at their address."""

    made: Any
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Check that these are the same tensors, unchanged. A change in place through `.data` cannot be seen."""
        same = all(old.data_ptr() == new.data_ptr() for old, new in zip(self.sources, sources, strict=True))
        return same and self.versions == _versions(sources)


_keys = itertools.count()
_kept: dict[int, _Kept] = {}


def new_key(layer: object) -> int:
    """A number for what is kept as long as the layer lives."""
    key = next(_keys)
    weakref.finalize(layer, _kept.pop, key, None)
    return key


def packed(key: int, codes: Tensor, codebooks: Tensor, scales: Tensor) -> PackedMatrix:
    """The matrix in the matmul kernels' order: made at the first call, and again after a change."""
    return _made(key, lambda *tensors: PackedMatrix(AdditiveMatrix(*tensors)), codes, codebooks, scales)


def _made(key: int, make: Callable[..., Made], *sources: Tensor) -> Made:
    kept = _kept.get(key)
    if kept is None or not kept.is_of(sources):
        detached = tuple(tensor.detach() for tensor in sources)
        kept = _kept[key] = _Kept(make(*detached), detached, _versions(sources))
    made: Made = kept.made
    return made


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Count the changes in place of each; tensors made in inference mode do not count."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)

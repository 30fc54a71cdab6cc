"""The table of backends, the choice of one, and x W^T by it.

A backend says itself why it cannot serve. The first of the table that can is chosen; a backend asked for by name is
obeyed or raises its reason, it is never replaced in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from aqlm_kernels import reference
from aqlm_kernels.cpu import avx512, gather, lut
from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.additive import AdditiveMatrix
from aqlm_kernels.packed import PackedMatrix


@dataclass(frozen=True)
class Backend:
    """A way to compute y = x W^T.

    `on_request`: only when asked for by name, for what it computes is coarser. `fast`: as fast as is known on a machine
    of its kind.
    """

    name: str
    matmul: Callable[[Tensor, PackedMatrix], Tensor]  # x [rows, in] -> y [rows, out]
    refuses: Callable[[PackedMatrix, torch.device], str | None]  # why it cannot, or None
    on_request: bool = False
    fast: bool = False


def choose(packed: PackedMatrix, device: torch.device, name: str | None = None) -> Backend:
    """The first backend that can multiply x on the device, or the named one, or its reason as a KernelError."""
    for backend in BACKENDS:
        if name != backend.name and (name is not None or backend.on_request):
            continue
        reason = backend.refuses(packed, device)
        if reason is None:
            return backend
        if name is not None:
            raise KernelError(f"backend {name} {reason}; choose another or none")
    raise KernelError(f"there is no backend {name}; choose one of {', '.join(backend.name for backend in BACKENDS)}")


def smallest(num_codebooks: int, codebook_size: int, group_size: int) -> PackedMatrix:
    """A matrix of one group: backends decide by the scheme alone."""
    codes = torch.zeros(1, 1, num_codebooks, dtype=torch.int32)
    return PackedMatrix(AdditiveMatrix(codes, torch.zeros(num_codebooks, codebook_size, group_size), torch.ones(1)))


def matmul(x: Tensor, packed: PackedMatrix, backend: str | None = None) -> Tensor:
    """y = x W^T [..., out] of x [..., in] in x's type: float32, bfloat16 or float16. Gradients are not recorded.

    Meant for a few rows; AdditiveLinear is the differentiable one, and the faster for many.
    """
    if x.ndim == 0 or x.shape[-1] != packed.in_features:
        raise KernelError(f"x is {list(x.shape)}; its last axis must be the matrix's {packed.in_features} inputs")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(f"x is {x.dtype}; convert it to float32, bfloat16 or float16")
    if x.device != packed.device:
        raise KernelError(f"x is on {x.device}, the matrix on {packed.device}; move one of them")
    rows = x.detach().reshape(-1, packed.in_features)
    y = choose(packed, x.device, backend).matmul(rows, packed)  # [rows, out]
    return y.reshape(*x.shape[:-1], packed.out_features)


def _refuses_by_tables(packed: PackedMatrix, device: torch.device) -> str | None:
    if packed.codebook_size > 256:
        return f"needs codebooks of at most 256 entries, these have {packed.codebook_size}"
    return _refuses_elsewhere(packed, device)


def _refuses_by_lookup(packed: PackedMatrix, device: torch.device) -> str | None:
    if not avx512.HAS_VBMI:
        return "needs a processor with AVX-512 VBMI"
    return _refuses_by_tables(packed, device)


def _refuses_elsewhere(packed: PackedMatrix, device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"runs on the CPU, x is on {device}"


def why_not_triton(device: torch.device, group_size: int) -> str | None:
    """Return the reason why Triton cannot run there, or None."""
    if device.type != "cuda":
        return f"runs on a GPU, x is on {device}"
    if find_spec("triton") is None:
        return "needs the package triton"
    return f"needs groups of 4, 8 or 16 inputs, these have {group_size}" if group_size not in (4, 8, 16) else None


def _by_triton(x: Tensor, packed: PackedMatrix) -> Tensor:
    from aqlm_kernels.gpu import matmul

    return matmul.multiply(x, packed)


def _refuses_by_triton(packed: PackedMatrix, device: torch.device) -> str | None:
    return why_not_triton(device, packed.codebooks.shape[2])


def _never_refuses(packed: PackedMatrix, device: torch.device) -> str | None:
    return None


BACKENDS = (
    Backend("cpu-avx512", lut.by_lookup, _refuses_by_lookup, fast=True),
    Backend("cpu-avx512-8bit", lut.by_byte_lookup, _refuses_by_lookup, on_request=True, fast=True),
    Backend("cpu-lut", lut.by_float_lookup, _refuses_by_tables, fast=True),
    Backend("cpu-gather", gather.by_gather, _refuses_elsewhere),
    Backend("gpu-triton", _by_triton, _refuses_by_triton, fast=True),
    Backend("reference", reference.matmul, _never_refuses),
)

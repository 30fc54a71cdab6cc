"""AdditiveLinear: nn.Linear whose weight is an AdditiveMatrix, differentiable in its input, codebooks and scales.

Three ways to the same product. A few rows without gradients on the CPU read the codes directly (`backends.matmul`).
More rows, or gradients, on the CPU: compiled code writes W in the type of x, torch multiplies. Elsewhere, and for
float64: the same in plain torch. The result has the type of x, or autocast's, whatever the type of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from aqlm_kernels import additive, checkpoint
from aqlm_kernels.additive import AdditiveMatrix
from aqlm_kernels.backends import matmul
from aqlm_kernels.cpu import dequantize
from aqlm_kernels.errors import KernelError
from aqlm_kernels.packed import PackedMatrix, pack

FEW_ROWS = 8
COMPILED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdditiveLinear(nn.Module):
    """y = x W^T + bias with W[o, j*g + i] = scales[o] * sum_m codebooks[m, codes[o, j, m], i].

    Codebooks, scales and bias are parameters in float32 (float64 if they come so), whatever type x will have. The
    `state_dict` is the checkpoint's own layout (checkpoint.py): saving rounds to float16, so to keep a state exactly,
    clone the parameters.
    """

    codes: Tensor  # [out, n, M]
    codebooks: nn.Parameter  # [M, K, g]
    scales: nn.Parameter  # [out]
    bias: nn.Parameter | None  # [out]

    def __init__(self, matrix: AdditiveMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None and bias.shape != matrix.scales.shape:
            raise KernelError(f"bias is {list(bias.shape)}, the matrix has {matrix.out_features} outputs")
        self.register_buffer("codes", matrix.codes)
        self.codebooks = _parameter(matrix.codebooks)
        self.scales = _parameter(matrix.scales)
        self.bias = None if bias is None else _parameter(bias)
        self.backend: str | None = None  # of products with a few rows; None: the first that can
        self._packed: _Packed | None = None

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        *,
        num_codebooks: int,
        codebook_bits: int,
        group_size: int,
        bias: bool,
        device: torch.device | str = "cpu",
    ) -> AdditiveLinear:
        """A layer of zeros, to load a checkpoint into; on the meta device with `load_state_dict(..., assign=True)`."""
        matrix = AdditiveMatrix(
            codes=torch.zeros(out_features, in_features // group_size, num_codebooks, dtype=torch.uint8, device=device),
            codebooks=torch.zeros(num_codebooks, 2**codebook_bits, group_size, device=device),
            scales=torch.zeros(out_features, device=device),
        )
        return cls(matrix, torch.zeros(out_features, device=device) if bias else None)

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * self.codebooks.shape[2]

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def matrix(self) -> AdditiveMatrix:
        """The present values; they share memory with the parameters."""
        return AdditiveMatrix(self.codes, self.codebooks.detach(), self.scales.detach())

    def packed(self) -> PackedMatrix:
        """The present values in the product kernels' order: made at the first call, and again after a change."""
        sources = self.codes, self.codebooks, self.scales
        if self._packed is None or not self._packed.is_of(sources):
            self._packed = _Packed(pack(self.matrix), tuple(t.detach() for t in sources), _versions(sources))
        return self._packed.matrix

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        if device != "cpu" or x.dtype not in COMPILED_TYPES:
            y = F.linear(x, additive.dequantize(self.codes, self.codebooks, self.scales, x.dtype))
        elif self._records_gradients(x) or x.numel() > FEW_ROWS * self.in_features:
            y = _product(x, self.codebooks, self.scales, self.codes)
        else:
            y = matmul(x, self.packed(), self.backend)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        num_codebooks, codebook_size, group_size = self.codebooks.shape
        scheme = f"{num_codebooks}x{codebook_size.bit_length() - 1}g{group_size}"
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={scheme}, bias={bias}"

    def _records_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (x, self.codebooks, self.scales))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        stored = checkpoint.to_checkpoint(self.matrix)
        if self.bias is not None:
            stored["bias"] = checkpoint.to_float16(self.bias, "bias")
        destination.update({prefix + name: tensor for name, tensor in stored.items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Bring what is stored into the layer's own layout; torch does the rest, and reports what does not fit."""
        own = dict(state_dict)
        for name, tensor in state_dict.items():
            if name == prefix + "codes":
                dtype = additive.code_dtype(self.codebooks.shape[1])
                own[name] = checkpoint.unsigned(tensor, self.codebooks.shape[1]).to(dtype)
            elif name == prefix + "codebooks":
                own[name] = tensor.squeeze(2).float()
            elif name in (prefix + "scales", prefix + "bias"):
                own[name] = tensor.flatten().float()
        super()._load_from_state_dict(own, prefix, *rest)


@dataclass(frozen=True)
class _Packed:
    """A packed matrix with what it was made from: kept, so that no other tensor can come to lie at the same address."""

    matrix: PackedMatrix
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether these are the same tensors, and unchanged. A change through `.data` in place cannot be seen."""
        same = all(old.data_ptr() == new.data_ptr() for old, new in zip(self.sources, sources, strict=True))
        return same and self.versions == _versions(sources)


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How often each was changed in place; tensors made in inference mode do not count."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().to(torch.promote_types(values.dtype, torch.float32)))


class _Product(torch.autograd.Function):
    """x W^T in the type of x, on the CPU. W is written anew in the backward, which is cheaper than keeping it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, codebooks: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(x, codebooks, scales, codes)
        return F.linear(x, dequantize.dequantize(codes, codebooks, scales, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, codebooks, scales, codes = ctx.saved_tensors
        dx = codebook_gradient = scale_gradient = None
        with torch.autocast("cpu", enabled=False):  # products in the type of the forward
            if ctx.needs_input_grad[0]:
                dx = dy @ dequantize.dequantize(codes, codebooks, scales, dy.dtype)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                dw = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # [out, in]
                codebook_gradient, scale_gradient = dequantize.gradients(dw, codes, codebooks, scales)
        return dx, codebook_gradient, scale_gradient, None


_product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _Product.apply

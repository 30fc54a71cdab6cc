"""CompressedLinear: nn.Linear whose weight is a matrix of any kind, differentiable in its learnable tensors.

The weight is dequantized tile by tile at every forward (tiled.py), which costs little beside the product of many rows.
For some kinds (ops.PACKED) a few rows without gradients are multiplied straight from the levels, on the CPU. A kind
with more compiled products has a layer of its own, such as AdditiveLinear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aqlm_kernels import ops, tiled
from aqlm_kernels.errors import KernelError
from aqlm_kernels.linear import FEW_ROWS
from aqlm_kernels.matrices.matrix import Matrix


class CompressedLinear(nn.Module):
    """y = x W^T + bias with W = matrix.dequantize().

    The learnable tensors and the bias are parameters in float32 (float64 if they come so); `matrix()` has them in their
    stored types. All other tensors are buffers.
    """

    bias: nn.Parameter | None  # [out]

    def __init__(self, matrix: Matrix, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None and bias.shape != (matrix.out_features,):
            raise KernelError(f"bias is {list(bias.shape)}, the matrix has {matrix.out_features} outputs")
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.kind = matrix.kind
        tensors = matrix.tensors()
        self._kind, self._learnable = type(matrix), matrix.learnable
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if name in self._learnable:
                self.register_parameter(name, _parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.bias = None if bias is None else _parameter(bias)
        self._key = ops.new_key(self)

    def matrix(self) -> Matrix:
        """The present values in their stored types."""
        return self._kind.from_tensors(
            {name: tensor.detach().to(self._dtypes[name]) for name, tensor in self._tensors()}
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        """Learnable tensors and bias, by name."""
        return dict(self.named_parameters(recurse=False))

    @torch.no_grad()
    def balance(self) -> None:
        """Bring the learnable tensors into the range of float16, in place and without a change of W."""
        balanced = self._live().balanced().tensors()
        for name, tensor in self._tensors():
            tensor.copy_(balanced[name])

    @property
    def weight(self) -> Tensor:
        """W `[out, in]`, for models that read the weight of a linear layer themselves."""
        return self._live().dequantize()

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of W at this index, `[n, in]`, with gradients; all others stay as they are stored."""
        return tiled.dequantize(self._live().rows(index), dtype)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if x.shape[-1] != self.in_features:
            raise KernelError(f"x is {list(x.shape)}; its last axis must be the layer's {self.in_features} inputs")
        tensors = dict(self._tensors())
        x = tiled.as_autocast(x)
        records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors.values()))
        few = x.device.type == "cpu" and x.numel() <= FEW_ROWS["cpu"] * self.in_features and not records
        y: Tensor
        if few and x.dtype in tiled.COMPILED_TYPES and self.kind in ops.PACKED:
            y = ops.packed_product(x, self.kind, list(tensors.values()), self.out_features, self._key)
        else:
            y = tiled.linear(x, self._kind, tensors)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:  # also of a copy
        self.__dict__.update(state)
        self._key = ops.new_key(self)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}, bias={bias}"

    def _live(self) -> Matrix:
        """The matrix of the parameters themselves, to record gradients through it."""
        return self._kind.from_tensors(dict(self._tensors()))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, getattr(self, name)) for name in self._dtypes]


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().to(torch.promote_types(values.dtype, torch.float32)))

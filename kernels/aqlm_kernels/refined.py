"""RefinedLinear: the products of a base layer and of a patch, added at the outputs that the patch has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aqlm_kernels.matrices.refined import RefinedMatrix, refined_rows


class RefinedLinear(nn.Module):
    """y = x base^T + bias, and y[..., index] += x patch^T."""

    index: Tensor  # [rows] int32
    base: Any  # nn.Module and QuantizedLayer
    patch: Any

    def __init__(self, matrix: RefinedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.kind = matrix.kind
        self.base, self.patch = matrix.base.module(bias), matrix.patch.module()
        self.register_buffer("index", matrix.index)

    @property
    def bias(self) -> nn.Parameter | None:
        bias: nn.Parameter | None = self.base.bias
        return bias

    @property
    def weight(self) -> Tensor:
        """W `[out, in]`, for models that read the weight of a linear layer themselves."""
        return self.rows(torch.arange(self.out_features, device=self.index.device))

    def matrix(self) -> RefinedMatrix:
        """The present values in their stored types."""
        return RefinedMatrix(self.base.matrix(), self.index, self.patch.matrix())

    def trainable(self) -> dict[str, nn.Parameter]:
        """Learnable tensors of both by name, and the bias."""
        base, patch = self.base.trainable(), self.patch.trainable()
        bias = {name: base.pop(name) for name in ("bias",) if name in base}
        return {
            **{f"base_{name}": parameter for name, parameter in base.items()},
            **{f"patch_{name}": parameter for name, parameter in patch.items()},
            **bias,
        }

    def balance(self) -> None:
        """Bring the parameters of both into the range of float16, in place and without a change of W."""
        self.base.balance()
        self.patch.balance()

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of W at this index, `[n, in]`, with gradients."""
        rows: Tensor = self.base.rows(index, dtype)
        hit, position = refined_rows(self.index, index)
        return rows.index_add(0, hit, self.patch.rows(position, dtype)) if len(hit) else rows

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y: Tensor = self.base(x)
        return y.index_add_(-1, self.index, self.patch(x).to(y.dtype))  # a fresh tensor, that no gradient needs

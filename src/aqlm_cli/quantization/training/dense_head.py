"""DenseHead: a quantized head in training, whose weight is dequantized once a step, not for every chunk of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DenseHead(nn.Module):
    """y = x W^T + bias with the W of a quantized layer, as `unfold` last dequantized it.

    W takes 4 bytes a weight, and so does its gradient, which all chunks of a step add to.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer  # a QuantizedLayer
        self._weight: Tensor | None = None

    def unfold(self) -> tuple[Tensor, ...]:
        """W `[out, in]` of the present parameters, differentiable in them, and the bias where there is one."""
        rows = torch.arange(self.layer.out_features, device=next(self.layer.parameters()).device)
        self._weight = self.layer.rows(rows)
        assert self._weight is not None
        return (self._weight,) if self.layer.bias is None else (self._weight, self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if self._weight is None:
            self.unfold()
        bias = self.layer.bias
        assert self._weight is not None
        return F.linear(x, self._weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

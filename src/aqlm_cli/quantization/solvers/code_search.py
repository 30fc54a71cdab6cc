"""The kernels that the solvers need: compiled on the CPU, plain torch elsewhere.

Methods and tuning are written once against `CodeSearch`. The two forms agree; the kernels' tests hold them together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from aqlm_kernels import search
from aqlm_kernels.cpu import dequantize as compiled
from aqlm_kernels.cpu import search as compiled_search
from aqlm_kernels.matrices import additive

Gradients: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Dequantize: TypeAlias = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class CodeSearch:
    """Codes are int64 `[out, n, M]` throughout, as torch wants them for an index."""

    choose: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]  # search.choose_codes
    nearest: Callable[[Tensor, Tensor, Tensor], Tensor]  # search.nearest_entries
    dequantize: Dequantize  # additive.dequantize
    _gradients: Gradients

    def gradients(self, values: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of sum(values * W) by codebooks `[M, K, g]` and scales `[out]`; `values` is `[out, in]`."""
        narrow = codes.to(additive.code_dtype(codebooks.shape[1]))
        by_codebooks, by_scales = self._gradients(values, narrow, codebooks, scales)
        return by_codebooks.float(), by_scales.float()

    def expand(self, codebooks: Tensor, codes: Tensor) -> Tensor:
        """Sums of entries, `[out, in]`."""
        ones = torch.ones(len(codes), device=codes.device)
        return self.dequantize(codes.to(additive.code_dtype(codebooks.shape[1])), codebooks, ones, torch.float32)


def code_search(device: torch.device) -> CodeSearch:
    """The compiled form on the CPU."""
    if device.type == "cpu":
        return CodeSearch(
            compiled_search.choose_codes, compiled_search.nearest_entries, compiled.dequantize, compiled.gradients
        )
    return CodeSearch(search.choose_codes, search.nearest_entries, additive.dequantize, _plain_gradients)


def sum_of_entries(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Codebooks `[M, K, g]` and codes `[rows, M]` to `[rows, g]`."""
    return torch.stack([book[codes[:, m]] for m, book in enumerate(codebooks)]).sum(0)


def _plain_gradients(values: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    codebooks, scales = codebooks.double().requires_grad_(), scales.double().requires_grad_()
    with torch.enable_grad():
        total = (values * additive.dequantize(codes, codebooks, scales, torch.float64)).sum()
    by_codebooks, by_scales = torch.autograd.grad(total, (codebooks, scales))
    return by_codebooks, by_scales

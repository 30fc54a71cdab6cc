"""The lm_head of a decode step: dense in 16 bits or 8, or quantized, also with some rows refined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numba
import torch
from torch import Tensor

from aqlm_kernels.cpu.dequantize import array
from aqlm_kernels.cpu.lm_head import ByteRows, matmul_dense
from aqlm_kernels.cpu.stacks import DecoderLayer, HeadLayer, Matmuls, matmuls, why_not_compiled
from aqlm_kernels.refined import RefinedLinear


class Head(Protocol):
    """The last product of a decode step."""

    def logits(self, hidden: Tensor, lut_bytes: int) -> Tensor:
        """Logits `[1, vocabulary]` in float32 of a normed hidden state `[1, d]`; `lut_bytes` as in lut.py."""


def head_of(head: Tensor | ByteRows | HeadLayer) -> Head:
    """The head of these weights `[vocabulary, d]`; KernelError for a layer that `why_not_head` refuses."""
    if isinstance(head, (Tensor, ByteRows)):
        return _DenseHead(head)
    if isinstance(head, RefinedLinear):
        return _RefinedHead(_QuantizedHead.of(head.base), head.index.long(), _QuantizedHead.of(head.patch))
    return _QuantizedHead.of(head)


def why_not_head(layer: HeadLayer) -> str | None:
    """Reason why a layer cannot be a compiled head, or None."""
    if isinstance(layer, RefinedLinear):
        return why_not_compiled(layer.base) or why_not_compiled(layer.patch)
    return why_not_compiled(layer)


@dataclass(frozen=True, eq=False)
class _DenseHead:
    weight: Tensor | ByteRows

    def logits(self, hidden: Tensor, lut_bytes: int) -> Tensor:
        return matmul_dense(hidden, self.weight)


@dataclass(frozen=True, eq=False)
class _QuantizedHead:
    matmuls: Matmuls
    vocabulary: int

    @classmethod
    def of(cls, layer: DecoderLayer) -> _QuantizedHead:
        return cls(Matmuls.of([layer]), layer.out_features)

    def logits(self, hidden: Tensor, lut_bytes: int) -> Tensor:
        y = matmuls(array(hidden), self.matmuls.fields, lut_bytes, numba.get_num_threads())
        return torch.from_numpy(y[:, : self.vocabulary])


@dataclass(frozen=True, eq=False)
class _RefinedHead:
    base: _QuantizedHead
    index: Tensor  # [rows] int64, of those that have a patch
    patch: _QuantizedHead

    def logits(self, hidden: Tensor, lut_bytes: int) -> Tensor:
        return self.base.logits(hidden, lut_bytes).index_add_(1, self.index, self.patch.logits(hidden, lut_bytes))

"""Rows of a table of embeddings, from its weights or codes: one for a decode step, many for a prompt.

A row equals that of the dequantized table bit for bit, and the table is never dequantized.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aqlm_kernels.cpu.compile import compiled
from aqlm_kernels.cpu.dequantize import Floats, array, dequantize, write_row
from aqlm_kernels.matrices.additive import AdditiveMatrix
from aqlm_kernels.matrices.matrix import Matrix
from aqlm_kernels.matrices.uniform import UniformMatrix

Bytes = NDArray[np.uint8]


class Rows(Protocol):
    """The rows of a table `[vocabulary, d]`. Raises IndexError for a token that has none."""

    def row(self, token: int) -> Floats:
        """One row [1, d], in memory of its own."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows [length, d] in float32."""


def rows_of(table: Tensor | Matrix) -> Rows:
    """Rows of weights or of a quantized matrix, by torch for a kind that has no compiled ones here."""
    if isinstance(table, Tensor):
        return _DenseRows(table.detach())
    if isinstance(table, AdditiveMatrix):
        return _AdditiveRows(table)
    if isinstance(table, UniformMatrix):
        return _UniformRows(table)
    return _OtherRows(table)


class _DenseRows:
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def row(self, token: int) -> Floats:
        return array(self._weight[token])[None].copy()

    def rows(self, ids: Tensor) -> Tensor:
        return self._weight[ids].float()


class _OtherRows:
    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix

    def row(self, token: int) -> Floats:
        return array(self.rows(torch.tensor([token])))

    def rows(self, ids: Tensor) -> Tensor:
        return self._matrix.rows(ids).dequantize()


class _AdditiveRows:
    def __init__(self, matrix: AdditiveMatrix) -> None:
        self._matrix, self._width = matrix, matrix.in_features
        self._codes = matrix.codes.contiguous().numpy()
        self._codebooks, self._scales = array(matrix.codebooks), array(matrix.scales)

    def row(self, token: int) -> Floats:
        row = np.empty((1, self._width), np.float32)
        write_row(self._codes[token], self._codebooks, self._scales[token], row[0], self._codebooks.shape[2])
        return row

    def rows(self, ids: Tensor) -> Tensor:
        matrix = self._matrix
        return dequantize(matrix.codes[ids], matrix.codebooks, matrix.scales[ids], torch.float32)


class _UniformRows:
    def __init__(self, matrix: UniformMatrix) -> None:
        self._levels, self._zeros = matrix.levels, matrix.zeros
        self._scales = torch.ldexp(matrix.scales.detach().float(), matrix.exponent)
        self._arrays = self._levels.contiguous().numpy(), self._zeros.contiguous().numpy(), array(self._scales)

    def row(self, token: int) -> Floats:
        row = np.empty((1, self._levels.shape[1]), np.float32)
        levels, zeros, scales = self._arrays
        _write_uniform(levels[token], zeros[token], scales[token], row[0])
        return row

    def rows(self, ids: Tensor) -> Tensor:
        levels, zeros, scales = (values[ids] for values in (self._levels, self._zeros, self._scales))
        steps = levels.float().view(*zeros.shape, -1) - zeros.float()[..., None]  # [length, n, g]
        return (steps * scales[..., None]).flatten(1)


@compiled()
def _write_uniform(levels: Bytes, zeros: Bytes, scales: Floats, row: Floats) -> None:
    """row[j*g + i] = scales[j] * (levels[j*g + i] - zeros[j])"""
    group_size = levels.shape[0] // scales.shape[0]
    for j in range(scales.shape[0]):
        zero = np.float32(zeros[j])
        for i in range(j * group_size, (j + 1) * group_size):
            row[i] = (np.float32(levels[i]) - zero) * scales[j]

"""Time of single matmuls y = x W^T beside torch's own, with weights that come from memory.

In a model every matrix has left the cache by the time it is needed again. So each matmul goes through more copies of
its matrix than any cache holds, and passes of the candidates are interleaved.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_cli.evaluation.speed_report import MatmulRow
from aqlm_kernels import AdditiveMatrix, PackedMatrix, choose, matmul, reference

ROTATED = 2**28
"""Bytes of weights that a pass reads, more than any last-level cache holds."""

MOST_COPIES = 512

Rotation: TypeAlias = tuple[int, Callable[[int], Tensor]]
"""Number of copies of a matrix, and the matmul with one of them."""


def measure_product(
    shape: Sequence[int],
    codebooks: Sequence[int],
    backend: str | None,
    rows: int,
    repeats: int,
    bandwidth: float,
    dtypes: Mapping[str, torch.dtype],
) -> MatmulRow:
    """Time x W^T on the CPU, with W of `shape` (out, in), `codebooks` (M, K, g), and so many rows of x.

    `bandwidth` in bytes per second; `dtypes` are those of torch's matmuls beside it.
    """
    out_features, in_features = shape
    num_codebooks, codebook_size, group_size = codebooks
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, in_features, generator=draw)
    code_bits = codebook_size.bit_length() - 1
    size = out_features * in_features // group_size * num_codebooks * code_bits / 8
    packed = [PackedMatrix(_matrix(shape, codebooks, draw)) for _ in range(_copies(size))]
    error = relative_error(matmul(x, packed[0], backend).double(), reference.matmul(x.double(), packed[0]))

    def ours(number: int) -> Tensor:
        return matmul(x, packed[number], backend)

    for number in range(len(packed)):  # brings each into the kernel's order
        ours(number)
    passes: dict[str, Rotation] = {"packed": (len(packed), ours)}
    for name, dtype in dtypes.items():
        passes[name] = _torch_product(x.to(dtype), shape, draw)
    medians = _interleaved(passes, repeats)
    return MatmulRow(
        out_features=out_features,
        in_features=in_features,
        rows=rows,
        backend=choose(packed[0], x.device, backend).name,
        microseconds=1e6 * medians["packed"],
        times={name: medians[name] / medians["packed"] for name in dtypes},
        bandwidth_share=size / medians["packed"] / bandwidth,
        relative_error=error,
    )


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||"""
    return float((found - exact).norm() / exact.norm())


def _interleaved(passes: Mapping[str, Rotation], repeats: int) -> dict[str, float]:
    """Seconds of one matmul, the median of the passes."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, (copies, product) in passes.items():
            started = time.perf_counter()
            for number in range(copies):
                product(number)
            seconds[name].append((time.perf_counter() - started) / copies)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _matrix(shape: Sequence[int], codebooks: Sequence[int], draw: torch.Generator) -> AdditiveMatrix:
    (out_features, in_features), (num_codebooks, size, group_size) = shape, codebooks
    codes = torch.randint(size, (out_features, in_features // group_size, num_codebooks), generator=draw)
    return AdditiveMatrix(codes, torch.randn(*codebooks, generator=draw), torch.ones(out_features))


def _torch_product(x: Tensor, shape: Sequence[int], draw: torch.Generator) -> Rotation:
    copies = _copies(shape[0] * shape[1] * x.element_size())
    one = torch.randn(*shape, generator=draw).to(x.dtype)
    weights = [one.clone() for _ in range(copies)]
    F.linear(x, one)
    return copies, lambda number: F.linear(x, weights[number])


def _copies(size: float) -> int:
    return max(1, min(MOST_COPIES, -(-ROTATED // max(1, int(size)))))

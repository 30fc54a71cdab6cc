"""Time of single matmuls y = x W^T beside torch's own, with weights that come from memory.

In a model every matrix has left the cache by the time it is needed again. So each matmul goes through more copies of
its matrix than any cache holds, and passes of the candidates are interleaved.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_cli.evaluation.speed_report import MatmulRow
from aqlm_kernels import (
    AdditiveLinear,
    AdditiveMatrix,
    CompressedLinear,
    PackedMatrix,
    UniformMatrix,
    choose,
    matmul,
    reference,
)

ROTATED = 2**28
"""Bytes of weights that a pass reads, more than any last-level cache holds."""

MOST_COPIES = 512

Rotation: TypeAlias = tuple[int, Callable[[int], Tensor]]
"""Number of copies of a matrix, and the matmul with one of them."""


class MatmulScheme(NamedTuple):
    """Sizes that a matmul depends on: `codebooks` (M, K, g) of an additive matrix, `levels` (bits, g) of a uniform."""

    out_features: int
    in_features: int
    codebooks: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: AdditiveLinear | CompressedLinear) -> MatmulScheme:
        shape, matrix = (layer.out_features, layer.in_features), layer.matrix()
        if isinstance(matrix, UniformMatrix):
            return cls(*shape, levels=(int(matrix.level_bits), matrix.group_size))
        assert isinstance(matrix, AdditiveMatrix)
        return cls(*shape, codebooks=tuple(matrix.codebooks.shape))

    @property
    def bytes(self) -> float:
        """Bytes of the codes or levels."""
        weights = self.out_features * self.in_features
        if self.levels:
            return weights * self.levels[0] / 8
        num_codebooks, codebook_size, group_size = self.codebooks
        return weights // group_size * num_codebooks * (codebook_size.bit_length() - 1) / 8


def measure_product(
    scheme: MatmulScheme,
    backend: str | None,
    rows: int,
    repeats: int,
    bandwidth: float,
    dtypes: Mapping[str, torch.dtype],
) -> MatmulRow:
    """Time x W^T on the CPU, with a random W of the scheme and so many rows of x.

    `bandwidth` in bytes per second; `dtypes` are those of torch's matmuls beside it.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, scheme.in_features, generator=draw)
    ours, exact, name = (_uniform if scheme.levels else _additive)(x, scheme, backend, draw)
    copies, product = ours
    error = relative_error(product(0).double(), exact)
    for number in range(copies):  # brings each into the kernel's order
        product(number)
    passes: dict[str, Rotation] = {"packed": ours}
    for other, dtype in dtypes.items():
        passes[other] = _torch_product(x.to(dtype), (scheme.out_features, scheme.in_features), draw)
    medians = _interleaved(passes, repeats)
    return MatmulRow(
        out_features=scheme.out_features,
        in_features=scheme.in_features,
        rows=rows,
        backend=name,
        microseconds=1e6 * medians["packed"],
        times={other: medians[other] / medians["packed"] for other in dtypes},
        bandwidth_share=scheme.bytes / medians["packed"] / bandwidth,
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


def _additive(
    x: Tensor, scheme: MatmulScheme, backend: str | None, draw: torch.Generator
) -> tuple[Rotation, Tensor, str]:
    """Matmuls by a backend, x W^T of the first in float64, and the backend's name."""
    packed = [PackedMatrix(_matrix(scheme, draw)) for _ in range(_copies(scheme.bytes))]
    ours: Rotation = len(packed), lambda number: matmul(x, packed[number], backend)
    return ours, reference.matmul(x.double(), packed[0]), choose(packed[0], x.device, backend).name


def _matrix(scheme: MatmulScheme, draw: torch.Generator) -> AdditiveMatrix:
    num_codebooks, size, group_size = scheme.codebooks
    shape = (scheme.out_features, scheme.in_features // group_size, num_codebooks)
    codes = torch.randint(size, shape, generator=draw)
    return AdditiveMatrix(codes, torch.randn(*scheme.codebooks, generator=draw), torch.ones(scheme.out_features))


def _uniform(
    x: Tensor, scheme: MatmulScheme, backend: str | None, draw: torch.Generator
) -> tuple[Rotation, Tensor, str]:
    """The same for a uniform matrix, for which there are no other backends; layers share all but the kernel's order."""
    bits, group_size = scheme.levels
    levels = torch.randint(1 << bits, (scheme.out_features, scheme.in_features), generator=draw, dtype=torch.uint8)
    zeros = torch.full((scheme.out_features, scheme.in_features // group_size), 1 << bits - 1, dtype=torch.uint8)
    numbers = torch.tensor(bits, dtype=torch.uint8), torch.tensor(0, dtype=torch.int16)
    matrix = UniformMatrix(levels, zeros, torch.ones(zeros.shape, dtype=torch.float16), *numbers)
    layers = [matrix.module().requires_grad_(False) for _ in range(_copies(scheme.bytes))]
    return (len(layers), lambda number: layers[number](x)), layers[0](x.double()), "uniform"


def _torch_product(x: Tensor, shape: Sequence[int], draw: torch.Generator) -> Rotation:
    copies = _copies(shape[0] * shape[1] * x.element_size())
    one = torch.randn(*shape, generator=draw).to(x.dtype)
    weights = [one.clone() for _ in range(copies)]
    F.linear(x, one)
    return copies, lambda number: F.linear(x, weights[number])


def _copies(size: float) -> int:
    return max(1, min(MOST_COPIES, -(-ROTATED // max(1, int(size)))))

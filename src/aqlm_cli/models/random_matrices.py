"""Random matrices of every kind: what a speed depends on, before anything is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from aqlm_cli.spec.schemes import AdditiveScheme, BlockFloatScheme, LevelScheme, RefinedScheme, Scheme, UniformScheme
from aqlm_cli.spec.schemes.base import groups_of
from aqlm_kernels import AdditiveMatrix, BlockFloatMatrix, LevelMatrix, Matrix, RefinedMatrix, UniformMatrix
from aqlm_kernels.matrices.blockfloat import of_blocks
from aqlm_kernels.matrices.level import of_levels

SIZE = 0.02
"""Standard deviation of the weights, about."""


def random_matrix(scheme: Scheme, out_features: int, in_features: int, draw: torch.Generator) -> Matrix:
    """A matrix `[out, in]`, of a shape that the scheme takes, with random codes in numbers that float16 holds."""
    return KINDS[scheme.kind](scheme, out_features, in_features, draw)


def _additive(scheme: AdditiveScheme, rows: int, columns: int, draw: torch.Generator) -> AdditiveMatrix:
    num_codebooks, size, group_size = scheme.codebook_shape
    shape = (rows, columns // group_size, num_codebooks)
    codes = torch.randint(0, size, shape, generator=draw, dtype=torch.uint8 if size <= 256 else torch.int32)
    codebooks = torch.randn(num_codebooks, size, group_size, generator=draw)
    scales = torch.full((rows,), SIZE / math.sqrt(num_codebooks))
    return AdditiveMatrix(codes, codebooks, scales, scheme.entry_bits)


def _uniform(scheme: UniformScheme, rows: int, columns: int, draw: torch.Generator) -> UniformMatrix:
    levels = torch.randint(0, 2**scheme.bits, (rows, columns), generator=draw, dtype=torch.uint8)
    groups = rows, columns // scheme.group_size
    scales = torch.full(groups, SIZE * math.sqrt(12) / 2**scheme.bits, dtype=torch.float16)
    zeros = torch.full(groups, 2 ** (scheme.bits - 1), dtype=torch.uint8)
    return UniformMatrix(
        levels, zeros, scales, torch.tensor(scheme.bits, dtype=torch.uint8), torch.tensor(0, dtype=torch.int16)
    )


def _levels(scheme: LevelScheme, rows: int, columns: int, draw: torch.Generator) -> LevelMatrix:
    groups = rows, groups_of(columns, scheme.group)
    scales = torch.full(groups, 2 * SIZE, dtype=torch.float16)
    shifts = torch.zeros(groups, dtype=torch.float16) if scheme.shifted else None
    empty = of_levels(scheme.table, scheme.bits, scales, shifts, torch.tensor(0, dtype=torch.int16), columns)
    return empty.nearest(SIZE * torch.randn(rows, columns, generator=draw))


def _blocks(scheme: BlockFloatScheme, rows: int, columns: int, draw: torch.Generator) -> BlockFloatMatrix:
    codes = torch.randint(0, 2**scheme.width, (rows, columns), generator=draw, dtype=torch.uint8)
    exponents = torch.full((rows, columns // scheme.group_size), round(math.log2(2 * SIZE)))
    return of_blocks(scheme.form_name, scheme.width, scheme.own, codes, exponents)


def _refined(scheme: RefinedScheme, rows: int, columns: int, draw: torch.Generator) -> RefinedMatrix:
    index = torch.randperm(rows, generator=draw)[: scheme.rows].sort().values
    patch = _uniform(scheme.patch, scheme.rows, columns, draw)
    return RefinedMatrix(random_matrix(scheme.base, rows, columns, draw), index.int(), patch)


KINDS: Mapping[str, Callable[[Any, int, int, torch.Generator], Matrix]] = {
    "additive": _additive,
    "uniform": _uniform,
    "level": _levels,
    "blockfloat": _blocks,
    "refined": _refined,
}
"""Random matrices by the kind of their scheme."""

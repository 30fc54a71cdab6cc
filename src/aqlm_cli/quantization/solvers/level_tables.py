"""Scales and shifts for fixed tables of levels, and how a weight finds its level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from aqlm_cli.quantization.solvers.grids import LARGEST
from aqlm_cli.spec.schemes import LevelScheme
from aqlm_kernels import LevelMatrix
from aqlm_kernels.matrices.level import of_levels
from aqlm_kernels.matrices.uniform import grid_exponent


def reach(groups: Tensor, scheme: LevelScheme) -> tuple[Tensor, Tensor | None]:
    """The largest size in each of the groups `[rows, n, g]`, seen from its shift, and the shifts, both `[rows, n]`.

    A shift is the middle between the least and the largest weight; None for a scheme without.
    """
    shifts = groups.amax(2) / 2 + groups.amin(2) / 2 if scheme.shifted else None
    return (groups if shifts is None else groups - shifts[..., None]).abs().amax(2), shifts


def exponent_of(numbers: Sequence[Tensor]) -> Tensor:
    """The power of two that brings scales and shifts, of any shapes, into the range of float16."""
    return grid_exponent(torch.cat([one.abs().flatten() for one in numbers]))


def of_reach(
    sizes: Tensor, shifts: Tensor | None, scheme: LevelScheme, inputs: int, exponent: Tensor | None = None
) -> LevelMatrix:
    """A matrix without codes yet, whose levels go from shifts - sizes to shifts + sizes, both `[rows, n]`.

    They are rounded to float16 here, so that levels are chosen for what is stored; `exponent` is theirs if None.
    """
    if exponent is None:
        exponent = exponent_of([sizes] if shifts is None else [sizes, shifts])
    stored = None if shifts is None else _storable(shifts, exponent)
    return of_levels(scheme.table, scheme.bits, _storable(sizes, exponent), stored, exponent, inputs)


def _storable(numbers: Tensor, exponent: Tensor) -> Tensor:
    return torch.ldexp(numbers, -exponent).clamp(-LARGEST, LARGEST).half()


def _nearest(matrix: LevelMatrix, weight: Tensor) -> LevelMatrix:
    return matrix.nearest(weight)


def _companded(matrix: LevelMatrix, weight: Tensor) -> LevelMatrix:
    """Rounded to integers after companding, y = sign(w) (|w| / s)^(1/3), as arXiv 2403.06408 does.

    That is not the level nearest to w: between two of them the border is the cube of the middle of their roots.
    """
    tensors = matrix.tensors()
    scales = torch.ldexp(matrix.scales.float(), matrix.exponent)[..., None]  # [out, n, 1]
    groups = weight.view(*matrix.scales.shape, -1)
    if matrix.shifts is not None:
        groups = groups - torch.ldexp(matrix.shifts.float(), matrix.exponent)[..., None]
    places = groups / torch.where(scales != 0, scales, 1.0)
    top = len(matrix.levels) // 2
    codes = (places.sign() * places.abs().pow(1 / 3) * top).round().clamp(-top, top) + top
    return LevelMatrix.from_tensors({**tensors, "codes": codes.flatten(1).to(torch.uint8)})


ROUNDED: Mapping[str, Callable[[LevelMatrix, Tensor], LevelMatrix]] = {"nf": _nearest, "cube": _companded}
"""The choice of codes for W `[out, in]` by `rtn`, by the name of the table."""

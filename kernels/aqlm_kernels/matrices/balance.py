"""A power of two moved between the codebooks and the scales of a matrix, so that float16 holds both precisely.

W = scales * sums of entries does not change when the entries are multiplied by 2^k and the scales by 2^-k, and neither
does any digit of either. What changes is where they lie in the range of float16: its 11 bits are there from 2^-14 to
2^16. Below it bits are lost one after the other until nothing is left at 2^-25, and above it there is infinity. A row
of weights of 1e-7 has a scale of about 1e-6 to entries of ordinary size, of which 5 bits would be left.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aqlm_kernels.errors import KernelError

if TYPE_CHECKING:
    from aqlm_kernels.matrices.additive import AdditiveMatrix

HIGHEST = 15  # exponent: numbers below 2^15 stay finite when they are rounded
LOWEST = -13  # from 2^-14 on, which has this exponent, a float16 has all of its bits
FINEST = -10  # exponent of the largest entry: those an eighth as large have all their bits, smaller ones matter little


def float16_holds(sizes: Tensor) -> bool:
    """Check that float16 has all of its bits for these sizes, at least 0, or all but one; zeros do not count."""
    largest = torch.finfo(torch.float16).max
    return bool(((sizes == 0) | ((sizes >= 2.0 ** (LOWEST - 1)) & (sizes <= largest))).all())


def balanced(matrix: AdditiveMatrix) -> AdditiveMatrix:
    """The same matrix with codebooks and scales in the range of float16; untouched where they are in it already."""
    shift = balancing_shift(matrix.codebooks, matrix.scales)
    if shift == 0:
        return matrix
    return replace(matrix, codebooks=matrix.codebooks * 2.0**shift, scales=matrix.scales * 2.0**-shift)


def balancing_shift(codebooks: Tensor, scales: Tensor) -> int:
    """k for codebooks * 2^k and scales * 2^-k: the one nearest to 0 with all scales and the largest entries in range.

    Where scales reach over more than the range, the largest are held and the smallest lose bits; where even the largest
    are too small for both, codebooks and scales lose equally many. Scales that are zero, or that no k can hold, do not
    count.
    """
    sizes, entries = scales.detach().abs(), codebooks.detach().abs()
    sizes, entries = sizes[sizes != 0], entries[entries != 0]
    if not (len(sizes) and len(entries) and bool(sizes.isfinite().all()) and bool(entries.isfinite().all())):
        return 0
    largest, entry = _exponent(sizes.max()), _exponent(entries.max())
    lowest = max(largest - HIGHEST, FINEST - entry)  # or scales overflow, or entries lose bits
    furthest = min((lowest + largest - LOWEST) // 2, lowest)
    held = sizes[sizes >= 2.0 ** (furthest - 25)]
    if not len(held):
        return 0
    highest = min(_exponent(held.min()) - LOWEST, HIGHEST - entry)  # or scales lose bits, or entries overflow
    return min(max(0, lowest), highest) if lowest <= highest else furthest


def to_float16(values: Tensor, name: str) -> Tensor:
    """Values rounded to float16, or a KernelError if one is out of its range or not a number."""
    rounded = values.detach().to(torch.float16)
    if not (rounded.is_meta or rounded.isfinite().all()):
        largest = float(values.detach().abs().max())
        raise KernelError(f"{name} reach {largest:.4g}, a checkpoint holds float16, at most 65504; quantize again")
    return rounded


def _exponent(size: Tensor) -> int:
    """e of a number in [2^(e-1), 2^e)."""
    return math.frexp(float(size))[1]

"""Codebooks in 8 bits: int8 levels and, for each place of an entry in each codebook, a range in float16.

    entry = float16(level * range / 127), levels of -127 to 127

The range of a place is the size of its largest number, over all entries of the codebook. So that one keeps its value,
and rounding twice changes nothing: no step has to be remembered while codebooks are trained as floats. float16 holds
every entry, and so does any format with codebooks in float16.

A codebook has M of entries K of g places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aqlm_kernels.errors import KernelError

HIGHEST = 127
"""The level of the largest number of a place; -128 has no counterpart and is not used."""


def round_entries(codebooks: Tensor) -> Tensor:
    """Codebooks `[M, K, g]` as they are after storing them in 8 bits, in their own type; NaN where out of range."""
    return entries_of(*levels_of(codebooks)).to(codebooks.dtype)


def levels_of(codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Levels `[M, K, g]` in int8 and ranges `[M, g]` in float16, of codebooks of floats `[M, K, g]`."""
    codebooks = codebooks.detach().float()
    ranges = codebooks.abs().amax(1).half()  # [M, g]
    units = torch.where(ranges == 0, 1.0, ranges.float())[:, None]
    return (codebooks / units * HIGHEST).round().clamp(-HIGHEST, HIGHEST).to(torch.int8), ranges


def entries_of(levels: Tensor, ranges: Tensor) -> Tensor:
    """Codebooks `[M, K, g]` in float16 from levels and ranges; KernelError where these do not fit each other."""
    if levels.dtype != torch.int8 or levels.ndim != 3 or ranges.shape != levels.shape[::2]:
        raise KernelError(
            f"codebooks {list(levels.shape)} of {levels.dtype} and ranges {list(ranges.shape)} are not [M, K, g] in "
            "int8 and [M, g]"
        )
    return (levels.float() * ranges.float()[:, None] / HIGHEST).half()

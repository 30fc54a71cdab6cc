"""The tensors of one linear layer as the `aqlm` inference package, and so `transformers`, stores them.

    codes      int8 if B <= 8, else int16   [out, in/g, M]
    codebooks  float16                      [M, 2^B, 1, g]
    scales     float16                      [out, 1, 1, 1]

A code c of [0, 2^B) is stored as c if c < 2^(B-1), else as c - 2^B, so that it fits the signed type with B bits; a
reader takes the stored number modulo 2^B. Only for B = 8 and 16 is that a plain reinterpretation of the bits. The unit
axes stand for groups of several output rows, which the format could hold and nobody uses. Codebooks of 8 bits are not
in the format: their entries are float16 numbers, and are stored as such.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.additive import AdditiveMatrix, rounded_codebooks
from aqlm_kernels.matrices.balance import to_float16


def to_checkpoint(matrix: AdditiveMatrix) -> dict[str, Tensor]:
    """The three tensors above; codebooks and scales are rounded as `stored` does, and refused where that overflows."""
    codebooks = rounded_codebooks(matrix.codebooks, matrix.entry_bits)
    size = matrix.codebook_size
    signed = matrix.codes.to(torch.int32)  # [out, n, M]
    signed = torch.where(signed < size // 2, signed, signed - size)
    return {
        "codes": signed.to(torch.int8 if size <= 256 else torch.int16),
        "codebooks": to_float16(codebooks, "codebooks").unsqueeze(2),  # [M, K, 1, g]
        "scales": to_float16(matrix.scales, "scales")[:, None, None, None],  # [out, 1, 1, 1]
    }


def from_checkpoint(tensors: Mapping[str, Tensor]) -> AdditiveMatrix:
    """The matrix of `codes`, `codebooks` and `scales`, whoever wrote them; other keys are ignored."""
    codes, codebooks, scales = tensors["codes"], tensors["codebooks"], tensors["scales"]
    if codebooks.ndim != 4 or codebooks.shape[2] != 1 or scales.shape[1:].numel() != 1:
        raise KernelError(
            f"codebooks {list(codebooks.shape)}, scales {list(scales.shape)} are not [M, K, 1, g], [out, 1, 1, 1]; "
            "only checkpoints with out_group_size 1 can be read"
        )
    return AdditiveMatrix(unsigned(codes, codebooks.shape[1]), codebooks.squeeze(2), scales.flatten())


def unsigned(stored: Tensor, codebook_size: int) -> Tensor:
    """Stored codes modulo 2^B: int32 in [0, 2^B)."""
    return stored.to(torch.int32) & (codebook_size - 1)

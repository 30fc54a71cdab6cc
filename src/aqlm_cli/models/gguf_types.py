"""Values of a GGUF file in every supported block format: gguf's own, and three that it lacks.

    Q1_0: 128 weights in 18 bytes, a float16 scale d and a bit for each, the lowest first: w = d or -d
    Q2_0: 64 weights in 18 bytes, or 128 in 34, d and two bits for each, the lowest first: w = (q - 1) d

llama.cpp writes Q2_0 in blocks of 64. PrismML's branch of it, where the type comes from, writes blocks of 128 under the
same code; the room that a tensor takes in its file tells which.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from aqlm_cli.errors import ModelError, shortened
from aqlm_cli.models.gguf_header import GgufTensor

Q1_0, Q2_0 = 41, 42
BITS = {Q1_0: 1, Q2_0: 2}
Q2_0_BLOCKS = (64, 128)
F32, F16, F64 = 0, 1, 28

Blocks = tuple[int, int]
"""Weights in a block, and bytes of a block."""


def check_types(tensors: Sequence[GgufTensor]) -> dict[str, Blocks]:
    """The blocks of each tensor by its name; ModelError for an unsupported type or missing bytes."""
    known = {tensor.name: _blocks(tensor) for tensor in tensors}
    of_q2_0 = [tensor for tensor in tensors if tensor.kind == Q2_0]
    fitting = [size for size in Q2_0_BLOCKS if all(_fills(tensor, (size, 2 + size // 4)) for tensor in of_q2_0)]
    if not fitting:
        raise ModelError(
            f"{of_q2_0[0].path}: {shortened(of_q2_0[0].name)} is of the type Q2_0, and fills neither blocks of 64 "
            f"weights nor of 128; use the model in another type, such as Q8_0"
        )
    for tensor in of_q2_0:
        known[tensor.name] = (fitting[0], 2 + fitting[0] // 4)
    for tensor in tensors:
        size, size_bytes = known[tensor.name]
        needed = tensor.count // size * size_bytes
        if (tensor.shape[-1] if tensor.shape else 1) % size:
            raise ModelError(f"{tensor.path}: {tensor.name} has rows of {tensor.shape[-1]}, not a multiple of {size}")
        if needed > tensor.room:
            reason = f"{shortened(tensor.name)} needs {needed} bytes, the file has {tensor.room}"
            raise ModelError(f"{tensor.path} cannot be converted: {reason}; fetch it again")
    return known


def _blocks(tensor: GgufTensor) -> Blocks:
    """Block format of the tensor's type; for Q2_0 the one of llama.cpp."""
    if tensor.kind in BITS:
        size = {Q1_0: 128, Q2_0: 64}[tensor.kind]
        return size, 2 + size * BITS[tensor.kind] // 8
    name, blocks = f"number {tensor.kind}", None
    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        name, blocks = kind.name, gguf.GGML_QUANT_SIZES[kind]
        if tensor.kind != F64:
            gguf.dequantize(np.zeros((1, blocks[1]), np.uint8).view(_NUMPY.get(tensor.kind, np.uint8)), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"{tensor.path}: {shortened(tensor.name)} is of the type {name}, which gguf {version('gguf')} cannot read; "
            f"use the model in another type, such as Q8_0"
        ) from error
    return int(blocks[0]), int(blocks[1])


_NUMPY: dict[int, Any] = {F32: np.float32, F16: np.float16}


def _fills(tensor: GgufTensor, blocks: Blocks) -> bool:
    """True if the tensor in these blocks fills its bytes in the file, apart from padding."""
    size, size_bytes = blocks
    if not tensor.shape or tensor.shape[-1] % size:
        return False
    return 0 <= tensor.room - tensor.count // size * size_bytes < tensor.alignment


def read_values(tensor: GgufTensor, blocks: Blocks) -> npt.NDArray[np.float32]:
    """Values of the tensor in float32, in torch's shape."""
    size, size_bytes = blocks
    count = tensor.count // size * size_bytes
    data = np.memmap(tensor.path, np.uint8, "r", tensor.start, (count,)) if count else np.zeros(0, np.uint8)
    if tensor.kind == F64:
        return data.view("<f8").astype(np.float32).reshape(tensor.shape)
    if tensor.kind in BITS:
        return _of_bits(data.reshape(-1, size_bytes), BITS[tensor.kind]).reshape(tensor.shape)
    rows = data.reshape(*tensor.shape[:-1], -1) if tensor.shape else data
    kind = gguf.GGMLQuantizationType(tensor.kind)
    values: npt.NDArray[np.float32] = gguf.dequantize(rows.view(_NUMPY.get(tensor.kind, np.uint8)), kind)
    return values.astype(np.float32, copy=False).reshape(tensor.shape)


def _of_bits(blocks: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.float32]:
    """Weights [blocks, size] of blocks [blocks, bytes] that start with a float16 scale."""
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)  # [blocks, 1]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (blocks[:, 2:, None] >> shifts) & ((1 << bits) - 1)  # [blocks, bytes, codes of a byte]
    levels = codes.reshape(len(blocks), -1).astype(np.float32)
    return scales * (2 * levels - 1 if bits == 1 else levels - 1)

"""Integers of 1 to 16 bits side by side in bytes: how codes and levels are stored in a checkpoint.

Bit b of value i is bit (i * bits + b) % 8 of byte (i * bits + b) // 8. So 8 values take `bits` whole bytes, and all of
them are packed at once: value k of each 8 starts at the same bit of the same byte.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_kernels.errors import KernelError


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many values take: the last one may have bits that are 0."""
    return -(-count * bits // 8)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers of [0, 2^bits) along the last axis, `[..., n]`, as bytes `[..., packed_bytes(n, bits)]`.

    Raises KernelError for a value out of range and for bits that are not 1 to 16.
    """
    _check_width(bits)
    if values.numel():
        low, high = (int(bound) for bound in torch.aminmax(values))
        if low < 0 or high >= 1 << bits:
            raise KernelError(f"values lie in [{low}, {high}], {bits} bits hold 0 to {(1 << bits) - 1}")
    if bits == 8:
        return values.to(torch.uint8)
    count = values.shape[-1]
    eights = F.pad(values, (0, -count % 8)).unflatten(-1, (-1, 8))  # [..., n / 8, 8]
    packed = torch.empty(*eights.shape[:-1], bits, dtype=torch.uint8, device=values.device)
    for byte in range(bits):
        total = torch.zeros(eights.shape[:-1], dtype=torch.int32, device=values.device)
        for k in range(8 * byte // bits, (8 * byte + 7) // bits + 1):  # the values that have bits in this byte
            total |= _shifted(eights[..., k].int(), k * bits - 8 * byte)
        packed[..., byte] = total & 255
    return packed.flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` values of each row of bytes, `[..., count]`: uint8 up to 8 bits, int32 above.

    Raises KernelError where the rows have another length than `count` values take.
    """
    _check_width(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_bytes(count, bits):
        found = f"{packed.shape[-1]} of {packed.dtype}"
        raise KernelError(f"{count} values of {bits} bits take {packed_bytes(count, bits)} bytes, found {found}")
    if bits == 8:
        return packed
    eights = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))  # [..., n / 8, bits]
    dtype = torch.uint8 if bits < 8 else torch.int32
    values = torch.empty(*eights.shape[:-1], 8, dtype=dtype, device=packed.device)
    for k in range(8):
        total = torch.zeros(eights.shape[:-1], dtype=torch.int32, device=packed.device)
        for byte in range(k * bits // 8, (k * bits + bits - 1) // 8 + 1):  # the bytes that have bits of this value
            total |= _shifted(eights[..., byte].int(), 8 * byte - k * bits)
        values[..., k] = total & ((1 << bits) - 1)
    return values.flatten(-2)[..., :count].contiguous()


def _shifted(values: Tensor, left: int) -> Tensor:
    return values << left if left >= 0 else values >> -left


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise KernelError(f"{bits} bits a value; choose 1 to 16")

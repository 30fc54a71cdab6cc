"""A matrix W on uniform grids: y = x W^T for a few rows of x straight from its levels, and tiles of W for many.

A row of W has in group j the scale s_j, the zero z_j and for input i the level q_i, each of b bits. A level becomes a
float without a conversion: its bits are the upper ones of the mantissa of 1 + q_i / 2^b. So

    y = 2^b * sum over j of s_j * (sum over i of x_i (1 + q_i / 2^b) - (1 + z_j / 2^b) * sum over i of x_i)

in float32, and x is not rounded. The lanes of a register are outputs: they need no sum across them, and fit groups of
any size. A word of 32 bits has as many levels of one output as it can hold; where the last of a group has places left,
x is 0 there.

`dequantize` equals that of UniformMatrix bit for bit.

One thread owns a tile of LANES outputs, and its sums run over the inputs in order: the result does not depend on the
number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from aqlm_kernels.cpu.avx512 import AHEAD, VECTORS
from aqlm_kernels.cpu.compile import arrays, at, compiled, instruction, load, prange, splat, store
from aqlm_kernels.cpu.dequantize import Floats, array
from aqlm_kernels.errors import KernelError

Words = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Scales = NDArray[np.int16] | NDArray[np.float32]
Length = tuple[int, ...]

WIDE = VECTORS > 1
"""True where there are 32 registers of 16 floats; else 16 of 8."""

LANES = 64 if WIDE else 32  # outputs in a tile: their sums stay in registers
ROWS = 4 if WIDE else 2  # of x at most whose sums stay in registers, too
LINE = 64  # bytes that one prefetch brings
TILE = 16  # rows of W that are dequantized by one thread at a time

_VECTOR = 16  # lanes of a vector in the code below, which LLVM cuts to what the machine has
_MANTISSA = 23  # bits of a float32
_int, _long, _float = ir.IntType(32), ir.IntType(64), ir.FloatType()
_ints, _floats = ir.VectorType(_int, _VECTOR), ir.VectorType(_float, _VECTOR)
_bytes, _halves = ir.VectorType(ir.IntType(8), _VECTOR), ir.VectorType(ir.HalfType(), _VECTOR)


@dataclass(frozen=True, eq=False)
class PackedUniform:
    """A matrix on uniform grids in the order in which `multiply` reads it; outputs that a last tile lacks have scale 0.

    Level k of a word is its bits from k * bits on.
    """

    words: Tensor  # [tiles, n, words of a group, LANES] int32
    zeros: Tensor  # [tiles, n, LANES] uint8
    scales: Tensor  # [tiles, n, LANES]: bits of float16 as int16, or float32 where float16 would round
    bits: int
    group_size: int
    out_features: int
    exponent: int

    @classmethod
    def of(cls, levels: Tensor, zeros: Tensor, scales: Tensor, bits: Tensor, exponent: Tensor) -> PackedUniform:
        """Pack the tensors of a UniformMatrix: levels `[out, in]`, zeros and scales `[out, n]`."""
        (out_features, in_features), groups = levels.shape, scales.shape[1]
        group_size, missing = in_features // groups, -out_features % LANES
        held = 32 // int(bits)
        count = -(-group_size // held)
        words = torch.empty(-(-out_features // LANES), groups, count, LANES, dtype=torch.int32)
        for tile, rows in enumerate(levels.split(LANES)):
            padded = F.pad(rows.view(len(rows), groups, group_size), (0, count * held - group_size))
            parts = padded.view(len(rows), groups, count, held).int()
            word = parts[..., 0].clone()
            for k in range(1, held):
                word |= parts[..., k] << (k * int(bits))
            words[tile] = F.pad(word, (0, 0, 0, 0, 0, LANES - len(rows))).permute(1, 2, 0)
        half = scales.half()
        exact = torch.equal(half.to(scales.dtype), scales)
        scales = half.view(torch.int16) if exact else scales.float()
        zeros, scales = (
            F.pad(tensor, (0, 0, 0, missing)).view(-1, LANES, groups).transpose(1, 2).contiguous()
            for tensor in (zeros, scales)
        )
        return cls(words, zeros, scales, int(bits), group_size, out_features, int(exponent))

    def matmul(self, x: Tensor) -> Tensor:
        """y [rows, out] of x [rows, in], in float32, rounded once to x's type."""
        rows, groups = x.shape[0], self.words.shape[1]
        if x.shape[1] != groups * self.group_size:
            raise KernelError(f"x is {list(x.shape)}, the matrix has {groups * self.group_size} inputs")
        together = min(ROWS, 1 << max(0, rows - 1).bit_length())
        padded = torch.empty(-(-rows // together) * together, groups, self.words.shape[2] * (32 // self.bits))
        sums, y = torch.empty(padded.shape[:2]), torch.empty(len(padded), len(self.words) * LANES)
        spread(array(x), self.group_size, padded.numpy(), sums.numpy())
        words, zeros, scales = self.words.numpy(), self.zeros.numpy(), self.scales.numpy()
        multiply(padded.numpy(), sums.numpy(), words, zeros, scales, (0,) * self.bits, (0,) * together, y.numpy())
        return torch.ldexp(y[:rows, : self.out_features], torch.tensor(self.exponent)).to(x.dtype)


def dequantize(
    levels: Tensor, zeros: Tensor, scales: Tensor, bits: Tensor, exponent: Tensor, dtype: torch.dtype
) -> Tensor:
    """W [out, in] from the tensors of a UniformMatrix, in float32 or rounded once to bfloat16 or float16."""
    weight = torch.empty(levels.shape)
    steps = torch.ldexp(scales.detach().float(), exponent)
    _dequantize(levels.contiguous().numpy(), zeros.contiguous().numpy(), array(steps), weight.numpy())
    return weight.to(dtype)


@compiled(parallel=True)
def _dequantize(levels: Bytes, zeros: Bytes, steps: Floats, weight: Floats) -> None:
    group_size = levels.shape[1] // zeros.shape[1]
    for tile in prange(-(-levels.shape[0] // TILE)):
        for o in range(tile * TILE, min(tile * TILE + TILE, levels.shape[0])):
            for j in range(zeros.shape[1]):
                zero, step = np.float32(zeros[o, j]), steps[o, j]
                for i in range(j * group_size, (j + 1) * group_size):
                    weight[o, i] = (np.float32(levels[o, i]) - zero) * step


@compiled()
def spread(x: Floats, group_size: int, padded: Floats, sums: Floats) -> None:
    """Bring x [rows, in] into the groups of words, [rows or more, n, places], with their sums; 0 where nothing is."""
    for row in range(padded.shape[0]):
        for j in range(padded.shape[1]):
            total = np.float64(0)
            for i in range(padded.shape[2]):
                inside = row < x.shape[0] and i < group_size
                value = x[row, j * group_size + i] if inside else np.float32(0)
                padded[row, j, i] = value
                total += value
            sums[row, j] = total


@compiled(parallel=True)
def multiply(
    x: Floats,  # as `spread` gives it; the rows are a multiple of those `together`
    sums: Floats,
    words: Words,  # as in PackedUniform, these three
    zeros: Bytes,
    scales: Scales,
    bits: Length,  # a tuple as long as a level has bits: code is compiled for each length
    together: Length,  # and for each number of rows whose sums stay in registers
    y: Floats,  # [rows, tiles * LANES], becomes the product without the power of two
) -> None:
    for tile in prange(words.shape[0]):
        for row in range(0, x.shape[0], len(together)):
            multiply_tile(x, sums, words, zeros, scales, y, row, tile, bits, together)


@instruction
def multiply_tile(
    typing_context: Any,
    x: Any,
    sums: Any,
    words: Any,
    zeros: Any,
    scales: Any,
    y: Any,
    row: Any,
    tile: Any,
    bits: Any,
    together: Any,
) -> Any:
    """y[row + r, tile * LANES + lane] for `together` rows r."""
    signature = types.void(x, sums, words, zeros, scales, y, row, tile, bits, together)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, sums, words, zeros, scales, y = arrays(context, builder, signature, arguments, 0, 1, 2, 3, 4, 5)
        row, tile = arguments[6:8]
        rows = [builder.add(row, ir.Constant(_long, r)) for r in range(together.count)]
        lanes = range(0, LANES, _VECTOR)
        totals = _places(builder, len(rows), len(lanes))
        with cgutils.for_range(builder, builder.extract_value(words.shape, 1)) as groups:
            j = groups.index
            dots = _places(builder, len(rows), len(lanes))
            here = at(builder, zeros, tile, j)
            for r, place in enumerate(rows):
                negative = builder.fneg(splat(builder, load(builder, at(builder, sums, place, j), _float, 0), _VECTOR))
                for v, lane in enumerate(lanes):
                    zero = builder.zext(load(builder, here, _bytes, lane), _ints)
                    builder.store(builder.fmul(_as_float(builder, zero, 0, bits.count), negative), dots[r][v])
            _add_group(builder, [at(builder, x, place, j) for place in rows], words, tile, j, bits.count, dots)
            here = at(builder, scales, tile, j)
            for v, lane in enumerate(lanes):
                if signature.args[4].dtype == types.int16:
                    scale = builder.fpext(load(builder, here, _halves, 2 * lane), _floats)
                else:
                    scale = load(builder, here, _floats, 4 * lane)
                for r in range(len(rows)):
                    total = _fma(builder, scale, builder.load(dots[r][v]), builder.load(totals[r][v]))
                    builder.store(total, totals[r][v])
        power = ir.Constant(_floats, [float(1 << bits.count)] * _VECTOR)
        for r, place in enumerate(rows):
            start = at(builder, y, place, builder.mul(tile, ir.Constant(_long, LANES)))
            for v, lane in enumerate(lanes):
                store(builder, builder.fmul(builder.load(totals[r][v]), power), start, 4 * lane)
        return context.get_dummy_value()

    return signature, generate


def _add_group(builder: Any, x: Any, words: Any, tile: Any, j: Any, bits: int, dots: Any) -> None:
    """dots[r][lanes] += sum over i of x[r][i] (1 + q_i / 2^bits); `x` has a pointer for each row."""
    held, lanes = 32 // bits, range(0, LANES, _VECTOR)
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _int, _int, _int])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    with cgutils.for_range(builder, builder.extract_value(words.shape, 2)) as loop:
        here = at(builder, words, tile, j, loop.index)
        for line in range(0, 4 * LANES, LINE):
            soon = builder.gep(here, [ir.Constant(_long, AHEAD + line)])
            builder.call(prefetch, [soon, *(ir.Constant(_int, flag) for flag in (0, 3, 1))])
        levels = [load(builder, here, _ints, 4 * lane) for lane in lanes]
        offset = builder.mul(loop.index, ir.Constant(_long, 4 * held))
        values = [builder.gep(start, [offset]) for start in x]
        for k in range(held):
            weights = [_as_float(builder, word, k * bits, bits) for word in levels]
            for start, places in zip(values, dots, strict=True):
                value = splat(builder, load(builder, start, _float, 4 * k), _VECTOR)
                for weight, place in zip(weights, places, strict=True):
                    builder.store(_fma(builder, value, weight, builder.load(place)), place)


def _as_float(builder: Any, words: Any, first: int, bits: int) -> Any:
    """1 + q / 2^bits for the levels q in the bits of the words from `first` on."""
    right = first + bits - _MANTISSA
    shift = builder.lshr if right > 0 else builder.shl
    if right:
        words = shift(words, ir.Constant(_ints, [abs(right)] * _VECTOR))
    mask = ((1 << bits) - 1) << (_MANTISSA - bits)
    words = builder.and_(words, ir.Constant(_ints, [mask] * _VECTOR))
    return builder.bitcast(builder.or_(words, ir.Constant(_ints, [0x3F800000] * _VECTOR)), _floats)


def _places(builder: Any, rows: int, vectors: int) -> list[list[Any]]:
    """Vectors of zeros in registers."""
    places = [[cgutils.alloca_once(builder, _floats) for _ in range(vectors)] for _ in range(rows)]
    for row in places:
        for place in row:
            builder.store(ir.Constant(_floats, None), place)
    return places


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_floats, [_floats] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), [a, b, c])

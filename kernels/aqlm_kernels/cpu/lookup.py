"""y = x W^T for a few rows of x by table look-ups inside vector registers, for codebooks of at most 256 entries.

For input group j, all that W can multiply x_j with are M * K vectors, so that each code costs one look-up:

    T[j, m, k] = <x_j, C_m[k]>          y_o = s_o * sum over (j, m) of T[j, m, a[o, j, m]]

A table of 256 bytes is four 512-bit registers, and `vpermi2b` of AVX-512 VBMI looks 64 codes up in two of them at once.
So tables are rounded to integers, of two bytes (two planes of such registers) or of one. The least entry of each table
is subtracted first and added back at the end, which costs nothing; BLOCK tables share one unit. Sums of bytes are kept
in 16-bit lanes, even and odd bytes apart: A += word and B += word >> 8, then B is the odd sum and A - (B << 8) the even
one. They are integers, hence exact, and go to float32 once a block.

Where the instructions are missing, tables stay in float32 and are read one entry at a time: a fifth of the speed.

Threads share the blocks in fixed parts, and the parts are added in order, so the result is the same for any number of
threads. Two-byte units are powers of two: where x and W are small integers, so is everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray
from torch import Tensor

from aqlm_kernels.cpu.compile import at, compiled, instruction, load, prange, store
from aqlm_kernels.cpu.dequantize import Floats, array
from aqlm_kernels.packed import PackedMatrix

Bytes = NDArray[np.uint8]
Tiles = NDArray[np.int64]

BLOCK = 32
"""Tables that share a unit. They stay in the first cache with their exact values; so many bytes fit a 16-bit lane."""

PARTS = 4
"""Into which the sum over the blocks is divided, whatever the number of threads, each with its own sums."""

AHEAD = 24
"""Look-ups of one tile that codes are prefetched ahead."""

LANES = 64  # outputs in a tile, bytes in a register
ENTRIES = 256  # of a table; smaller codebooks are filled up


def _has(feature: str) -> bool:
    """Whether the machine that Numba compiles for has it: this one, or what NUMBA_CPU_FEATURES says."""
    settings: Any = numba.config
    named = settings.CPU_FEATURES
    return bool(binding.get_host_cpu_features().get(feature)) if named is None else f"+{feature}" in named


HAS_VBMI = _has("avx512vbmi")
"""Without it tables of integers are read a byte at a time, which is slow."""

VECTORS = 4 if _has("avx512f") else 1
"""Of 16 numbers, of each of four tables, that fit the registers while the tables are made."""

_byte, _word, _int, _long, _float = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_bytes, _words = ir.VectorType(_byte, LANES), ir.VectorType(_word, LANES // 2)
_floats, _ints = ir.VectorType(_float, 16), ir.VectorType(_int, 16)


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices that multiply the same x, one above the other: alike in inputs, M, K and g, each with its codebooks."""

    codes: Bytes  # [tiles, n * M, LANES], the tiles of one matrix after those of the other
    columns: Floats  # [matrices, M, g, K], the codebooks transposed
    scales: Floats  # [tiles * LANES], 0 where a last tile has no output
    ends: Tiles  # [matrices], tiles up to the end of each

    @classmethod
    def of(cls, matrices: Sequence[PackedMatrix]) -> Stack:
        return cls(
            codes=torch.cat([one.codes.flatten(1, 2) for one in matrices]).numpy(),
            columns=torch.stack([one.columns for one in matrices]).numpy(),
            scales=torch.cat([one.tile_scales for one in matrices]).numpy(),
            ends=np.cumsum([len(one.codes) for one in matrices]),
        )


def by_lookup(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y [rows, out] of x [rows, in], by tables of two bytes; rounded once to x's type. K <= 256."""
    return _product(x, packed, planes=2)


def by_float_lookup(x: Tensor, packed: PackedMatrix) -> Tensor:
    """The same by tables of float32 in the cache, without rounding: for machines without the instructions."""
    return _product(x, packed, planes=0)


def by_byte_lookup(x: Tensor, packed: PackedMatrix) -> Tensor:
    """The same by tables of one byte: nearly twice as fast, with an error of some percent."""
    return _product(x, packed, planes=1)


def _product(x: Tensor, packed: PackedMatrix, planes: int) -> Tensor:
    codes, scales = packed.codes.flatten(1, 2).numpy(), packed.tile_scales.numpy()
    ends = np.array([codes.shape[0]])
    y = np.empty((x.shape[0], scales.shape[0]), np.float32)
    multiply(array(x), codes, packed.columns[None].numpy(), scales, ends, planes, numba.get_num_threads(), y)
    return torch.from_numpy(y)[:, : packed.out_features].to(x.dtype).contiguous()


@compiled(parallel=True)
def multiply(
    x: Floats,  # [rows, in]
    codes: Bytes,  # as in Stack, these four
    columns: Floats,
    scales: Floats,
    ends: Tiles,
    planes: int,  # bytes of a table's entry: 2, 1, or 0 for float32
    threads: int,
    y: Floats,  # [rows, tiles * LANES], becomes the product
) -> None:
    rows, outputs = y.shape
    blocks, tiles = -(-codes.shape[1] // BLOCK), codes.shape[0]
    parts = min(PARTS, blocks)
    ranges = -(-threads // parts)
    sums = np.empty((parts, rows, outputs), np.float32)
    for job in prange(parts * ranges):
        part, piece = job // ranges, job % ranges
        first, last = part * blocks // parts, (part + 1) * blocks // parts
        start, end = piece * tiles // ranges, (piece + 1) * tiles // ranges
        sums[part, :, start * LANES : end * LANES] = 0
        _sum_blocks(x, codes, columns, ends, planes, first, last, start, end, sums[part])
    for tile in prange(tiles):
        for row in range(rows):
            for o in range(tile * LANES, tile * LANES + LANES):
                total = np.float32(0)
                for part in range(parts):
                    total += sums[part, row, o]
                y[row, o] = scales[o] * total


@compiled()
def _sum_blocks(
    x: Floats,
    codes: Bytes,
    columns: Floats,
    ends: Tiles,
    planes: int,
    first: int,
    last: int,
    start: int,
    end: int,
    sums: Floats,
) -> None:
    """Add to sums `[rows, outputs]` what the blocks from first to before last give the tiles from start to before end;
    the tables of a block are in the nearest cache meanwhile."""
    exact, bounds = np.empty((BLOCK, ENTRIES), np.float32), np.empty((BLOCK, 2), np.float32)
    tables = np.empty((BLOCK, planes, ENTRIES), np.uint8)
    for block in range(first, last):
        count = min(BLOCK, codes.shape[1] - block * BLOCK)
        for matrix in range(ends.shape[0]):
            tile, stop = max(start, ends[matrix - 1] if matrix else 0), min(end, ends[matrix])
            if tile < stop:
                for row in range(x.shape[0]):
                    if planes == 0:
                        _make_exact(x[row], columns[matrix], block * BLOCK, count, exact, bounds)
                        _look_up_floats(codes, exact, tile, stop, block * BLOCK, count, sums[row])
                    else:
                        unit, offset = _make_tables(
                            x[row], columns[matrix], block * BLOCK, count, exact, bounds, tables
                        )
                        _look_up_tiles(codes, tables, tile, stop, block * BLOCK, count, row, unit, offset, sums)


@compiled()
def _make_exact(x: Floats, columns: Floats, first: int, count: int, exact: Floats, bounds: Floats) -> None:
    """So many tables from the `first` on, and the least and the greatest of each."""
    num_codebooks, group_size = columns.shape[:2]
    for m in range(num_codebooks):
        t = (m - first) % num_codebooks  # the first table of the block that belongs to codebook m
        while t < count:
            start = (first + t) // num_codebooks * group_size
            if t + 3 * num_codebooks < count:
                _products_4(x, start, columns, m, exact, bounds, t)
                t += 4 * num_codebooks
            else:
                _products_1(x, start, columns, m, exact, bounds, t)
                t += num_codebooks


@compiled(fastmath=("contract",))
def _make_tables(
    x: Floats, columns: Floats, first: int, count: int, exact: Floats, bounds: Floats, tables: Bytes
) -> tuple[np.float32, np.float32]:
    """The same as integers: T = unit * integer + the least of T. Returns the unit and the sum of what is least."""
    num_codebooks, group_size = columns.shape[:2]
    planes = tables.shape[1]
    _make_exact(x, columns, first, count, exact, bounds)
    widest, total = np.float32(0), 0.0
    for t in range(count):
        widest = max(widest, bounds[t, 1] - bounds[t, 0])
        total += bounds[t, 0]
    finite = True
    for i in range(first // num_codebooks * group_size, -(-(first + count) // num_codebooks) * group_size):
        finite &= np.isfinite(x[i])
    unit = _unit(widest, planes) if finite and widest < np.inf else np.float32(np.nan)
    inverse = np.float32(1) / unit if unit > 0 else np.float32(0)
    for t in range(count):
        shift = np.float32(0.5) - bounds[t, 0] * inverse
        if planes == 2:
            _round_2(exact, t, inverse, shift, tables, t)
        else:
            _round_1(exact, t, inverse, shift, tables, t)
    return unit, np.float32(total)


@compiled()
def _unit(widest: np.float32, planes: int) -> np.float32:
    """What one step of an integer table stands for, so that `widest` is the greatest integer at most."""
    if planes == 1:
        return widest / np.float32(255)
    mantissa, exponent = math.frexp(widest / np.float32(65535))
    if mantissa == 0:
        return np.float32(0)
    return np.float32(math.ldexp(1.0, max(exponent - (mantissa == 0.5), -120)))


@compiled()
def _look_up_tiles(
    codes: Bytes,
    tables: Bytes,
    tile: int,
    stop: int,
    start: int,
    count: int,
    row: int,
    unit: np.float32,
    offset: np.float32,
    sums: Floats,
) -> None:
    """Add one block's look-ups to the sums of the tiles from `tile` to before `stop`, four at a time."""
    while tile < stop:
        size = 4 if stop - tile >= 4 else 2 if stop - tile >= 2 else 1
        if tables.shape[1] == 2:
            if size == 4:
                _look_up_4_2(codes, tile, start, tables, count, unit, offset, sums, row)
            elif size == 2:
                _look_up_2_2(codes, tile, start, tables, count, unit, offset, sums, row)
            else:
                _look_up_1_2(codes, tile, start, tables, count, unit, offset, sums, row)
        elif size == 4:
            _look_up_4_1(codes, tile, start, tables, count, unit, offset, sums, row)
        elif size == 2:
            _look_up_2_1(codes, tile, start, tables, count, unit, offset, sums, row)
        else:
            _look_up_1_1(codes, tile, start, tables, count, unit, offset, sums, row)
        tile += size


@compiled()
def _look_up_floats(codes: Bytes, exact: Floats, tile: int, stop: int, start: int, count: int, sums: Floats) -> None:
    """The same from tables of float32, four at a time: that saves three of four updates of the sums."""
    fours = count // 4 * 4
    for number in range(tile, stop):
        total = sums[number * LANES : number * LANES + LANES]
        for t in range(0, fours, 4):
            first, second, third, fourth = exact[t], exact[t + 1], exact[t + 2], exact[t + 3]
            a, b = codes[number, start + t], codes[number, start + t + 1]
            c, d = codes[number, start + t + 2], codes[number, start + t + 3]
            for lane in range(LANES):
                total[lane] += (first[a[lane]] + second[b[lane]]) + (third[c[lane]] + fourth[d[lane]])
        for t in range(fours, count):
            table, code = exact[t], codes[number, start + t]
            for lane in range(LANES):
                total[lane] += table[code[lane]]


# ------------------------------------------------------------------------------------------------- LLVM, by its builder


def _products(groups: int) -> Callable[..., Any]:
    """exact[t + r * M, k] = <x[start + r * g:], column k of codebook m> for so many groups r, and the least and the
    greatest of each in bounds[t + r * M].

    VECTORS of each group stay in registers, so that what is read is used several times.
    """

    @instruction
    def products(typing_context: Any, x: Any, start: Any, columns: Any, m: Any, exact: Any, bounds: Any, t: Any) -> Any:
        signature = types.void(x, start, columns, m, exact, bounds, t)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, start, columns, m, exact, bounds, t = arguments
            x, columns, exact, bounds = (
                context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 2, 4, 5)
            )
            num_codebooks, group_size = (builder.extract_value(columns.shape, axis) for axis in (0, 1))
            step = builder.mul(num_codebooks, ir.Constant(_long, 1))
            rows = [builder.add(t, builder.mul(step, ir.Constant(_long, r))) for r in range(groups)]
            _generate_products(
                builder,
                [
                    at(builder, x, builder.add(start, builder.mul(group_size, ir.Constant(_long, r))))
                    for r in range(groups)
                ],
                group_size,
                at(builder, columns, m),
                [at(builder, exact, row) for row in rows],
                [at(builder, bounds, row) for row in rows],
            )
            return context.get_dummy_value()

        return signature, generate

    return products


def _generate_products(builder: Any, x: Any, group_size: Any, columns: Any, exact: Any, bounds: Any) -> None:
    """`x`, `exact` and `bounds` have one pointer for each group."""
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_floats, [_floats] * 3), "llvm.fma.v16f32")
    lows = [cgutils.alloca_once(builder, _floats) for _ in x]
    highs = [cgutils.alloca_once(builder, _floats) for _ in x]
    sums = [[cgutils.alloca_once(builder, _floats) for _ in range(VECTORS)] for _ in x]
    for low, high in zip(lows, highs, strict=True):
        builder.store(ir.Constant(_floats, [math.inf] * 16), low)
        builder.store(ir.Constant(_floats, [-math.inf] * 16), high)
    with cgutils.for_range(builder, ir.Constant(_long, ENTRIES // (16 * VECTORS))) as part:
        first = builder.mul(part.index, ir.Constant(_long, 64 * VECTORS))  # in bytes
        for places in sums:
            for place in places:
                builder.store(ir.Constant(_floats, None), place)
        with cgutils.for_range(builder, group_size) as loop:
            column = builder.gep(
                columns, [builder.add(first, builder.mul(loop.index, ir.Constant(_long, 4 * ENTRIES)))]
            )
            entries = [load(builder, column, _floats, 64 * q) for q in range(VECTORS)]
            for places, start in zip(sums, x, strict=True):
                number = builder.load(
                    builder.bitcast(
                        builder.gep(start, [builder.mul(loop.index, ir.Constant(_long, 4))]), _float.as_pointer()
                    )
                )
                factor = _spread(builder, number, 16)
                for place, entry in zip(places, entries, strict=True):
                    builder.store(builder.call(fma, [factor, entry, builder.load(place)]), place)
        for places, low, high, row in zip(sums, lows, highs, exact, strict=True):
            for q, place in enumerate(places):
                values = builder.load(place)
                store(builder, values, builder.gep(row, [first]), 64 * q)
                for bound, sign in ((low, "<"), (high, ">")):
                    before = builder.load(bound)
                    builder.store(builder.select(builder.fcmp_ordered(sign, values, before), values, before), bound)
    for low, high, row in zip(lows, highs, bounds, strict=True):
        for offset, (bound, name) in enumerate(((low, "fmin"), (high, "fmax"))):
            reduce = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_float, [_floats]), f"llvm.vector.reduce.{name}.v16f32"
            )
            store(builder, builder.call(reduce, [builder.load(bound)], fastmath=("nnan",)), row, 4 * offset)


def _round(planes: int) -> Callable[..., Any]:
    """tables[t, p, k] = byte p of the integer part of exact[row, k] * inverse + shift."""

    @instruction
    def rounded(typing_context: Any, exact: Any, row: Any, inverse: Any, shift: Any, tables: Any, t: Any) -> Any:
        signature = types.void(exact, row, inverse, shift, tables, t)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            exact, row, inverse, shift, tables, t = arguments
            exact, tables = (
                context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 4)
            )
            source, target = at(builder, exact, row), at(builder, tables, t)
            factor, summand = _spread(builder, inverse, 16), _spread(builder, shift, 16)
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_floats, [_floats] * 3), "llvm.fma.v16f32"
            )
            for start in range(0, ENTRIES, 16):
                values = builder.call(fma, [load(builder, source, _floats, 4 * start), factor, summand])
                levels = builder.fptosi(values, _ints)
                for plane in range(planes):
                    byte = builder.lshr(levels, ir.Constant(_ints, [8 * plane] * 16)) if plane else levels
                    store(builder, builder.trunc(byte, ir.VectorType(_byte, 16)), target, ENTRIES * plane + start)
            return context.get_dummy_value()

        return signature, generate

    return rounded


def _look_up(tiles: int, planes: int) -> Callable[..., Any]:
    """sums[row, tile * LANES + lane] += offset + unit * sum over i < count of tables[i, codes[tile, start + i, lane]]

    for so many `tiles` at once: a table's registers are loaded once for all of them.
    """

    @instruction
    def look_up(
        typing_context: Any,
        codes: Any,
        tile: Any,
        start: Any,
        tables: Any,
        count: Any,
        unit: Any,
        offset: Any,
        sums: Any,
        row: Any,
    ) -> Any:
        signature = types.void(codes, tile, start, tables, count, unit, offset, sums, row)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _generate(_Arguments(context, builder, signature, arguments), tiles, planes)
            return context.get_dummy_value()

        return signature, generate

    return look_up


class _Arguments:
    """Pointers to where the look-ups of one call begin, and its numbers."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.builder = builder
        codes, tile, start, tables, self.count, self.unit, self.offset, sums, row = arguments
        codes, tables, sums = (
            context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 3, 7)
        )
        self.codes = at(builder, codes, tile, start)
        self.tile_stride = builder.extract_value(codes.strides, 0)
        self.tables = at(builder, tables)
        self.sums = at(builder, sums, row, builder.mul(tile, ir.Constant(_long, LANES)))


def _generate(a: _Arguments, tiles: int, planes: int) -> None:
    builder = a.builder
    eight = ir.Constant(_words, [8] * (LANES // 2))
    zero = ir.Constant(_words, None)
    permute = _permute(builder.module)
    kind = ir.FunctionType(ir.VoidType(), [_byte.as_pointer(), _int, _int, _int])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    both = [[cgutils.alloca_once(builder, _words) for _ in range(2)] for _ in range(tiles * planes)]  # A and B
    for pair in both:
        for place in pair:
            builder.store(zero, place)
    with cgutils.for_range(builder, a.count) as loop:
        i = loop.index
        table = builder.gep(a.tables, [builder.mul(i, ir.Constant(_long, 256 * planes))])
        quarters = [load(builder, table, _bytes, LANES * q) for q in range(4 * planes)]
        code = builder.gep(a.codes, [builder.mul(i, ir.Constant(_long, LANES))])
        for t in range(tiles):
            here = builder.gep(code, [builder.mul(a.tile_stride, ir.Constant(_long, t))])
            soon = builder.gep(here, [ir.Constant(_long, LANES * AHEAD)])
            builder.call(prefetch, [soon, *(ir.Constant(_int, flag) for flag in (0, 3, 1))])
            index = load(builder, here, _bytes, 0)
            upper_half = builder.icmp_signed("<", index, ir.Constant(_bytes, None))
            for p in range(planes):
                q = quarters[4 * p : 4 * p + 4]
                low, high = builder.call(permute, [q[0], index, q[1]]), builder.call(permute, [q[2], index, q[3]])
                words = builder.bitcast(builder.select(upper_half, high, low), _words)
                for place, addend in zip(both[t * planes + p], (words, builder.lshr(words, eight)), strict=True):
                    builder.store(builder.add(builder.load(place), addend), place)
    for t in range(tiles):
        totals = [None, None]  # of even and of odd bytes, as integers
        for p in range(planes):
            whole, odd = (builder.load(place) for place in both[t * planes + p])
            even = builder.sub(whole, builder.shl(odd, eight))
            for parity, sums in enumerate((even, odd)):
                wide = builder.zext(sums, ir.VectorType(_int, LANES // 2))
                if p:
                    wide = builder.shl(wide, ir.Constant(wide.type, [8 * p] * (LANES // 2)))
                totals[parity] = wide if totals[parity] is None else builder.add(totals[parity], wide)
        even, odd = (builder.uitofp(total, ir.VectorType(_float, LANES // 2)) for total in totals)
        order = ir.Constant(ir.VectorType(_int, LANES), [lane % 2 * (LANES // 2) + lane // 2 for lane in range(LANES)])
        values = builder.shuffle_vector(even, odd, order)
        values = builder.fadd(builder.fmul(values, _spread(builder, a.unit, LANES)), _spread(builder, a.offset, LANES))
        before = load(builder, a.sums, values.type, 4 * LANES * t)
        store(builder, builder.fadd(before, values), a.sums, 4 * LANES * t)


def _permute(module: Any) -> Any:
    """(lower [64], index [64], upper [64]) -> the bytes that the low 7 bits of the index choose from the two."""
    kind = ir.FunctionType(_bytes, [_bytes, _bytes, _bytes])
    name = "llvm.x86.avx512.vpermi2var.qi.512" if HAS_VBMI else "aqlm_permute_bytes"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, kind, name)
    if not HAS_VBMI:
        _write_permute(function)
    return function


def _write_permute(function: Any) -> None:
    """The same on any machine, a byte at a time."""
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    lower, index, upper = function.args
    table = cgutils.alloca_once(builder, ir.VectorType(_byte, 2 * LANES))
    order = ir.Constant(ir.VectorType(_int, 2 * LANES), list(range(2 * LANES)))
    builder.store(builder.shuffle_vector(lower, upper, order), table)
    start = builder.bitcast(table, _byte.as_pointer())
    found = ir.Constant(_bytes, ir.Undefined)
    for lane in range(LANES):
        place = builder.and_(builder.extract_element(index, ir.Constant(_int, lane)), ir.Constant(_byte, 127))
        byte = builder.load(builder.gep(start, [builder.zext(place, _long)]))
        found = builder.insert_element(found, byte, ir.Constant(_int, lane))
    builder.ret(found)


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    kind = ir.VectorType(_float, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(_int, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_int, lanes), [0] * lanes))


_products_4, _products_1 = _products(4), _products(1)
_round_2, _round_1 = _round(2), _round(1)
_look_up_4_2, _look_up_2_2, _look_up_1_2 = (_look_up(tiles, 2) for tiles in (4, 2, 1))
_look_up_4_1, _look_up_2_1, _look_up_1_1 = (_look_up(tiles, 1) for tiles in (4, 2, 1))

"""The instructions of lut.py, written with LLVM's builder: a table's registers must stay in place inside a loop.

A function that makes an instruction is called once for every size that is needed; the instructions are at the end.

Shapes: M codebooks of K entries, each of g features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from aqlm_kernels.cpu.compile import arrays, at, instruction, load, splat, store

AHEAD = 2**13
"""Prefetch distance in bytes: the stream of all codes is longer than what a core prefetches by itself."""

LANES = 64  # outputs in a tile, bytes in a register
ENTRIES = 256  # of a table; smaller codebooks are filled up


def _has(feature: str) -> bool:
    """True if Numba's target machine has the feature: this machine, or the one in NUMBA_CPU_FEATURES."""
    settings: Any = numba.config
    named = settings.CPU_FEATURES
    return bool(binding.get_host_cpu_features().get(feature)) if named is None else f"+{feature}" in named


HAS_VBMI = _has("avx512vbmi")
"""AVX-512 VBMI; without it integer tables are read a byte at a time, which is slow."""

VECTORS = 4 if _has("avx512f") else 1
"""Vectors of 16 floats, of each of four tables, that fit the registers while the tables are computed."""

_byte, _word, _int, _long, _float = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_bytes, _words = ir.VectorType(_byte, LANES), ir.VectorType(_word, LANES // 2)
_floats, _ints = ir.VectorType(_float, 16), ir.VectorType(_int, 16)


def _products(groups: int) -> Callable[..., Any]:
    """exact[t + r * M, k] = <x[start + r * g:], column k of codebook m> for so many groups r, and the least and the
    greatest of each in bounds[t + r * M].

    VECTORS of each group stay in registers, so that each loaded value is used several times.
    """

    @instruction
    def products(typing_context: Any, x: Any, start: Any, columns: Any, m: Any, exact: Any, bounds: Any, t: Any) -> Any:
        signature = types.void(x, start, columns, m, exact, bounds, t)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, start, columns, m, exact, bounds, t = arguments
            x, columns, exact, bounds = arrays(context, builder, signature, arguments, 0, 2, 4, 5)
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
                factor = splat(builder, number, 16)
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


def _round(lut_bytes: int) -> Callable[..., Any]:
    """tables[t, p, k] = byte p of the integer part of exact[row, k] * inverse + shift."""

    @instruction
    def rounded(typing_context: Any, exact: Any, row: Any, inverse: Any, shift: Any, tables: Any, t: Any) -> Any:
        signature = types.void(exact, row, inverse, shift, tables, t)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            exact, row, inverse, shift, tables, t = arguments
            exact, tables = arrays(context, builder, signature, arguments, 0, 4)
            source, target = at(builder, exact, row), at(builder, tables, t)
            factor, summand = splat(builder, inverse, 16), splat(builder, shift, 16)
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_floats, [_floats] * 3), "llvm.fma.v16f32"
            )
            for start in range(0, ENTRIES, 16):
                values = builder.call(fma, [load(builder, source, _floats, 4 * start), factor, summand])
                levels = builder.fptosi(values, _ints)
                for number in range(lut_bytes):
                    byte = builder.lshr(levels, ir.Constant(_ints, [8 * number] * 16)) if number else levels
                    store(builder, builder.trunc(byte, ir.VectorType(_byte, 16)), target, ENTRIES * number + start)
            return context.get_dummy_value()

        return signature, generate

    return rounded


def _look_up(tiles: int, lut_bytes: int) -> Callable[..., Any]:
    """sums[row, (tile + t) * LANES + lane] += offset + unit * sum over i < count of tables[i, codes of table i]

    with codes[start + (i * tiles + t) * LANES + lane], for `tiles` tiles t at once: a table's registers are loaded
    once for all of them.
    """

    @instruction
    def look_up(
        typing_context: Any,
        codes: Any,
        start: Any,
        tables: Any,
        count: Any,
        unit: Any,
        offset: Any,
        sums: Any,
        row: Any,
        tile: Any,
    ) -> Any:
        signature = types.void(codes, start, tables, count, unit, offset, sums, row, tile)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _generate(_Arguments(context, builder, signature, arguments), tiles, lut_bytes)
            return context.get_dummy_value()

        return signature, generate

    return look_up


class _Arguments:
    """Start pointers of the lookups of one call, and its scalars."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.builder = builder
        _, start, _, self.count, self.unit, self.offset, _, row, tile = arguments
        codes, tables, sums = arrays(context, builder, signature, arguments, 0, 2, 6)
        self.codes = at(builder, codes, start)
        self.tables = at(builder, tables)
        self.sums = at(builder, sums, row, builder.mul(tile, ir.Constant(_long, LANES)))


def _generate(a: _Arguments, tiles: int, lut_bytes: int) -> None:
    builder = a.builder
    eight = ir.Constant(_words, [8] * (LANES // 2))
    zero = ir.Constant(_words, None)
    permute = _permute(builder.module)
    kind = ir.FunctionType(ir.VoidType(), [_byte.as_pointer(), _int, _int, _int])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    both = [[cgutils.alloca_once(builder, _words) for _ in range(2)] for _ in range(tiles * lut_bytes)]  # A and B
    for pair in both:
        for place in pair:
            builder.store(zero, place)
    with cgutils.for_range(builder, a.count) as loop:
        i = loop.index
        table = builder.gep(a.tables, [builder.mul(i, ir.Constant(_long, 256 * lut_bytes))])
        quarters = [load(builder, table, _bytes, LANES * q) for q in range(4 * lut_bytes)]
        code = builder.gep(a.codes, [builder.mul(i, ir.Constant(_long, LANES * tiles))])
        for t in range(tiles):
            here = builder.gep(code, [ir.Constant(_long, LANES * t)])
            soon = builder.gep(here, [ir.Constant(_long, AHEAD)])
            builder.call(prefetch, [soon, *(ir.Constant(_int, flag) for flag in (0, 3, 1))])
            index = load(builder, here, _bytes, 0)
            upper_half = builder.icmp_signed("<", index, ir.Constant(_bytes, None))
            for p in range(lut_bytes):
                q = quarters[4 * p : 4 * p + 4]
                low, high = builder.call(permute, [q[0], index, q[1]]), builder.call(permute, [q[2], index, q[3]])
                words = builder.bitcast(builder.select(upper_half, high, low), _words)
                for place, addend in zip(both[t * lut_bytes + p], (words, builder.lshr(words, eight)), strict=True):
                    builder.store(builder.add(builder.load(place), addend), place)
    for t in range(tiles):
        totals = [None, None]  # of even and of odd bytes, as integers
        for p in range(lut_bytes):
            whole, odd = (builder.load(place) for place in both[t * lut_bytes + p])
            even = builder.sub(whole, builder.shl(odd, eight))
            for parity, sums in enumerate((even, odd)):
                wide = builder.zext(sums, ir.VectorType(_int, LANES // 2))
                if p:
                    wide = builder.shl(wide, ir.Constant(wide.type, [8 * p] * (LANES // 2)))
                totals[parity] = wide if totals[parity] is None else builder.add(totals[parity], wide)
        even, odd = (builder.uitofp(total, ir.VectorType(_float, LANES // 2)) for total in totals)
        order = ir.Constant(ir.VectorType(_int, LANES), [lane % 2 * (LANES // 2) + lane // 2 for lane in range(LANES)])
        values = builder.shuffle_vector(even, odd, order)
        values = builder.fadd(builder.fmul(values, splat(builder, a.unit, LANES)), splat(builder, a.offset, LANES))
        before = load(builder, a.sums, values.type, 4 * LANES * t)
        store(builder, builder.fadd(before, values), a.sums, 4 * LANES * t)


def _permute(module: Any) -> Any:
    """(lower [64], index [64], upper [64]) -> the bytes that the low 7 bits of the index select from the two."""
    kind = ir.FunctionType(_bytes, [_bytes, _bytes, _bytes])
    name = "llvm.x86.avx512.vpermi2var.qi.512" if HAS_VBMI else "aqlm_permute_bytes"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, kind, name)
    if not HAS_VBMI:
        _write_permute(function)
    return function


def _write_permute(function: Any) -> None:
    """Write the body of the permutation for any machine, a byte at a time."""
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    lower, index, upper = function.args
    table = cgutils.alloca_once(builder, ir.VectorType(_byte, 2 * LANES))
    order = ir.Constant(ir.VectorType(_int, 2 * LANES), list(range(2 * LANES)))
    builder.store(builder.shuffle_vector(lower, upper, order), table)
    start = builder.bitcast(table, _byte.as_pointer())
    permuted = ir.Constant(_bytes, ir.Undefined)
    for lane in range(LANES):
        place = builder.and_(builder.extract_element(index, ir.Constant(_int, lane)), ir.Constant(_byte, 127))
        byte = builder.load(builder.gep(start, [builder.zext(place, _long)]))
        permuted = builder.insert_element(permuted, byte, ir.Constant(_int, lane))
    builder.ret(permuted)


products_4, products_1 = _products(4), _products(1)
round_2, round_1 = _round(2), _round(1)
look_up_4_2, look_up_2_2, look_up_1_2 = (_look_up(tiles, 2) for tiles in (4, 2, 1))
look_up_4_1, look_up_2_1, look_up_1_1 = (_look_up(tiles, 1) for tiles in (4, 2, 1))

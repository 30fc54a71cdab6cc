"""y = x W^T for a few rows of x and codebooks of many entries: load the entry of each code, and multiply.

Tables as in lut.py would cost more than the matmul. One thread owns a tile of outputs, and its sums run over the input
groups in order: the result does not depend on the number of threads.

Shapes: M codebooks of K entries, each of g features; n input groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray
from torch import Tensor

from aqlm_kernels.cpu.compile import arrays, at, compiled, instruction, load, prange, store
from aqlm_kernels.cpu.dequantize import Floats, array
from aqlm_kernels.packed import PackedMatrix

Codes = NDArray[np.uint8] | NDArray[np.uint16]

BLOCK = 64  # groups whose x and codes stay in the L1 cache
LANES = 4  # outputs whose sums are in registers: so many additions run at a time

_long = ir.IntType(64)


def by_gather(x: Tensor, packed: PackedMatrix) -> Tensor:
    """y [rows, out] of x [rows, in], in float32, rounded once to x's type; any K."""
    y = torch.empty(x.shape[0], packed.out_features)
    _by_gather(array(x), packed.tiled.numpy(), array(packed.codebooks), array(packed.scales), y.numpy())
    return y.to(x.dtype)


@compiled(parallel=True)
def _by_gather(x: Floats, codes: Codes, codebooks: Floats, scales: Floats, y: Floats) -> None:
    tiles, groups, tile_size = codes.shape[0], codes.shape[1], codes.shape[3]
    group_size = codebooks.shape[2]
    for tile in prange(tiles):
        products = np.empty((tile_size, group_size), np.float32)
        for row in range(x.shape[0]):
            products[:] = 0
            for first in range(0, groups, BLOCK):
                count = min(BLOCK, groups - first)
                for lane in range(0, tile_size, LANES):
                    if group_size == 8:
                        _multiply_8(x, row, codes, tile, first, count, lane, codebooks, products)
                    elif group_size == 16:
                        _multiply_16(x, row, codes, tile, first, count, lane, codebooks, products)
                    elif group_size == 4:
                        _multiply_4(x, row, codes, tile, first, count, lane, codebooks, products)
                    else:
                        _multiply(x[row], codes[tile], first, count, lane, codebooks, products)
            _store(products.sum(axis=1), scales, tile * tile_size, y[row])


@compiled(fastmath=["contract"])
def _multiply(x: Floats, codes: Codes, first: int, count: int, lane: int, codebooks: Floats, products: Floats) -> None:
    """products[lane + q, i] += x[j * g + i] * sum_m codebooks[m, codes[j, m, lane + q], i] for the groups from first on
    and q < LANES; the i stay apart, so that they run side by side."""
    group_size = codebooks.shape[2]
    for j in range(first, first + count):
        for m in range(codes.shape[1]):
            for output in range(lane, lane + LANES):
                entry, product = codebooks[m, codes[j, m, output]], products[output]  # [g]
                for i in range(group_size):
                    product[i] += x[j * group_size + i] * entry[i]


@compiled()
def _store(sums: Floats, scales: Floats, first: int, y: Floats) -> None:
    """y[first + l] = scales[first + l] * sums[l], for the outputs that exist."""
    for lane in range(min(sums.shape[0], y.shape[0] - first)):
        y[first + lane] = scales[first + lane] * sums[lane]


def _gather(group_size: int) -> Callable[..., Any]:
    """`_multiply` with a group in one vector, and the sums of LANES outputs in registers."""
    numbers = ir.VectorType(ir.FloatType(), group_size)

    @instruction
    def multiply(
        typing_context: Any,
        x: Any,
        row: Any,
        codes: Any,
        tile: Any,
        first: Any,
        count: Any,
        lane: Any,
        codebooks: Any,
        products: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, row, _, tile, first, count, lane, _, _ = arguments
            x, codes, codebooks, products = arrays(context, builder, signature, arguments, 0, 2, 7, 8)
            name = f"llvm.fma.v{group_size}f32"
            fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(numbers, [numbers] * 3), name)
            sums = [cgutils.alloca_once(builder, numbers) for _ in range(LANES)]
            outputs = [builder.add(lane, ir.Constant(_long, q)) for q in range(LANES)]
            for output, place in zip(outputs, sums, strict=True):
                builder.store(load(builder, at(builder, products, output), numbers, 0), place)
            code_type = codes.data.type.pointee
            with cgutils.for_range(builder, count) as groups:
                j = builder.add(first, groups.index)
                start = builder.mul(j, ir.Constant(_long, group_size * 4))
                values = load(builder, builder.gep(at(builder, x, row), [start]), numbers, 0)
                with cgutils.for_range(builder, builder.extract_value(codebooks.shape, 0)) as books:
                    m = books.index
                    here = at(builder, codes, tile, j, m, lane)
                    for q, place in enumerate(sums):
                        code = builder.zext(load(builder, here, code_type, q * code_type.width // 8), _long)
                        entry = load(builder, at(builder, codebooks, m, code), numbers, 0)
                        builder.store(builder.call(fma, [values, entry, builder.load(place)]), place)
            for output, place in zip(outputs, sums, strict=True):
                store(builder, builder.load(place), at(builder, products, output), 0)
            return context.get_dummy_value()

        return types.void(x, row, codes, tile, first, count, lane, codebooks, products), generate

    return multiply


_multiply_4, _multiply_8, _multiply_16 = (_gather(group_size) for group_size in (4, 8, 16))

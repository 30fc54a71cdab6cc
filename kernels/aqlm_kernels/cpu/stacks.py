"""y = x W^T for one row of x and the layers that share it, whatever their schemes, called from compiled code.

Layers of one additive (lut.py) or uniform scheme (uniform.py) are one stack; a dense layer is a matmul of its own. Each
matmul is a row of integers: its kind, its sizes, and the addresses of its arrays. So compiled code has one type for all
mixes of schemes, which is compiled once, and goes from one matmul to the next without Python.

Whoever holds the integers keeps the `Matmuls` too: it owns the memory at those addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor, nn

from aqlm_kernels.compressed import CompressedLinear
from aqlm_kernels.cpu.avx512 import ENTRIES, LANES
from aqlm_kernels.cpu.compile import array_at, compiled, instruction, prange
from aqlm_kernels.cpu.dequantize import Floats
from aqlm_kernels.cpu.lm_head import multiply_dense
from aqlm_kernels.cpu.lut import Stack, multiply
from aqlm_kernels.cpu.uniform import Bytes, PackedUniform, Scales, Words, multiply_tile, spread
from aqlm_kernels.errors import KernelError
from aqlm_kernels.linear import AdditiveLinear
from aqlm_kernels.matrices.additive import AdditiveMatrix
from aqlm_kernels.matrices.uniform import UniformMatrix
from aqlm_kernels.packed import PackedMatrix
from aqlm_kernels.refined import RefinedLinear

DecoderLayer: TypeAlias = AdditiveLinear | CompressedLinear | nn.Linear
HeadLayer: TypeAlias = DecoderLayer | RefinedLinear
Integers = NDArray[np.int64]

NONE, ADDITIVE, UNIFORM_FLOAT16, UNIFORM_FLOAT32, FLOAT32, BFLOAT16, FLOAT16 = range(7)
"""Kinds of matmul; of uniform matrices by the type of their scales."""

DENSE = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

KIND, INPUTS, OUTPUTS, STORED, SCALES = range(5)
"""Places in the integers of a matmul. STORED is the address of W, or of its codes or levels, SCALES that of scales."""

BLOCKS, BLOCK_BYTES, COLUMNS, MATRICES, CODEBOOKS, GROUP, ENDS = range(5, 12)
"""Places of an additive one: sizes of `lut.Stack.codes`, address and sizes of its `columns`, address of its `ends`."""

TILES, GROUPS, WORDS, BITS, EXPONENT, ZEROS = range(5, 11)
"""Places of a uniform one: sizes of `PackedUniform.words`, its numbers, and the address of its zeros."""

FIELDS = ENDS + 1


@dataclass(frozen=True, eq=False)
class Matmuls:
    """The matmuls of layers that share x, and where in y the outputs of each layer start."""

    fields: Integers  # [matmuls, FIELDS]
    starts: Integers  # [layers]
    kept: Sequence[Any]  # the arrays at the addresses

    @classmethod
    def of(cls, layers: Sequence[DecoderLayer]) -> Matmuls:
        """Raises KernelError for a layer that `why_not_compiled` refuses."""
        starts, start = np.zeros(len(layers), np.int64), 0
        fields, kept = [], []
        for places in _stacks(layers):
            row, arrays, outputs = _matmul_of([layers[place] for place in places])
            fields.append(row)
            kept.append(arrays)
            for place, count in zip(places, outputs, strict=True):
                starts[place] = start
                start += count
        return cls(np.array(fields), starts, kept)

    @property
    def outputs(self) -> int:
        """The length of y."""
        return int(self.fields[:, OUTPUTS].sum())


def why_not_compiled(layer: HeadLayer) -> str | None:
    """Reason why there is no compiled matmul with a layer, or None."""
    if isinstance(layer, AdditiveLinear):
        entries = layer.codebooks.shape[1]
        return None if entries <= ENTRIES else f"has codebooks of {entries} entries; {ENTRIES} at most are supported"
    if isinstance(layer, nn.Linear):
        return None if layer.weight.dtype in DENSE else f"has weights of type {layer.weight.dtype}"
    compiled_kind = layer.kind == UniformMatrix.kind
    return None if compiled_kind else f"is a matrix of kind {layer.kind}, which has no compiled matmul"


def _stacks(layers: Sequence[DecoderLayer]) -> list[list[int]]:
    """Places of the layers that are one matmul."""
    stacks: dict[object, list[int]] = {}
    for place, layer in enumerate(layers):
        key: object = place
        if isinstance(layer, AdditiveLinear):
            key = tuple(layer.codebooks.shape)
        elif isinstance(layer, CompressedLinear) and isinstance(matrix := layer.matrix(), UniformMatrix):
            key = int(matrix.level_bits), matrix.group_size, int(matrix.exponent)
        stacks.setdefault(key, []).append(place)
    return list(stacks.values())


def _matmul_of(layers: Sequence[DecoderLayer]) -> _Matmul:
    for layer in layers:
        if (reason := why_not_compiled(layer)) is not None:
            raise KernelError(f"the decoder cannot multiply by a layer that {reason}")
    if isinstance(layers[0], nn.Linear):
        return _dense(layers[0].weight.detach().contiguous())
    matrices = [layer.matrix() for layer in layers if not isinstance(layer, nn.Linear)]
    if isinstance(matrices[0], AdditiveMatrix):
        return _additive([PackedMatrix(matrix) for matrix in matrices if isinstance(matrix, AdditiveMatrix)])
    return _uniform([PackedUniform.of(*matrix.tensors().values()) for matrix in matrices])


class _Matmul(NamedTuple):
    fields: Integers  # [FIELDS]
    kept: Sequence[Any]  # the arrays at its addresses
    outputs: list[int]  # of each layer in y


def _dense(weight: Tensor) -> _Matmul:
    fields = np.zeros(FIELDS, np.int64)
    fields[KIND], fields[STORED] = DENSE[weight.dtype], weight.data_ptr()
    fields[OUTPUTS], fields[INPUTS] = weight.shape
    return _Matmul(fields, [weight], [len(weight)])


def _additive(matrices: Sequence[PackedMatrix]) -> _Matmul:
    stack = Stack.of(matrices)
    ends = stack.ends.astype(np.int64)
    fields = np.zeros(FIELDS, np.int64)
    fields[KIND], fields[INPUTS], fields[OUTPUTS] = ADDITIVE, matrices[0].in_features, len(stack.scales)
    fields[STORED], fields[COLUMNS], fields[SCALES], fields[ENDS] = (
        values.ctypes.data for values in (stack.codes, stack.columns, stack.scales, ends)
    )
    fields[BLOCKS], fields[BLOCK_BYTES] = stack.codes.shape
    fields[MATRICES], fields[CODEBOOKS], fields[GROUP], _ = stack.columns.shape
    return _Matmul(fields, [stack, ends], [int(tiles) * LANES for tiles in np.diff(ends, prepend=0)])


def _uniform(matrices: Sequence[PackedUniform]) -> _Matmul:
    first, halves = matrices[0], all(one.scales.dtype == torch.int16 for one in matrices)
    words, zeros = _joined([one.words for one in matrices]), _joined([one.zeros for one in matrices])
    scales = _joined([one.scales if halves else _as_float32(one.scales) for one in matrices])
    fields = np.zeros(FIELDS, np.int64)
    fields[KIND] = UNIFORM_FLOAT16 if halves else UNIFORM_FLOAT32
    fields[TILES], fields[GROUPS], fields[WORDS], lanes = words.shape
    fields[INPUTS], fields[OUTPUTS] = fields[GROUPS] * first.group_size, fields[TILES] * lanes
    fields[BITS], fields[EXPONENT] = first.bits, first.exponent
    fields[STORED], fields[ZEROS], fields[SCALES] = (values.data_ptr() for values in (words, zeros, scales))
    return _Matmul(fields, [words, zeros, scales], [len(one.words) * lanes for one in matrices])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _as_float32(scales: Tensor) -> Tensor:
    """The scales of a `PackedUniform`, in which int16 stands for float16."""
    return scales.view(torch.float16).float() if scales.dtype == torch.int16 else scales


def _pointer(kind: Any) -> Callable[[int], Any]:
    """The instruction that makes a pointer to values of a type from their address."""

    @instruction
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), generate

    return pointer


_bytes, _shorts, _unsigned = _pointer(types.uint8), _pointer(types.int16), _pointer(types.uint16)
_ints, _longs, _floats = _pointer(types.int32), _pointer(types.int64), _pointer(types.float32)


@compiled()
def matmul(x: Floats, fields: Integers, lut_bytes: int, threads: int, y: Floats) -> None:
    """y [1, OUTPUTS] = x W^T of x [1, in], for the integers of one matmul; `lut_bytes` as in lut.py."""
    kind, shape = fields[KIND], (fields[OUTPUTS], fields[INPUTS])
    if kind == ADDITIVE:
        codes = array_at(_bytes(fields[STORED]), (fields[BLOCKS], fields[BLOCK_BYTES]))
        entries = fields[MATRICES], fields[CODEBOOKS], fields[GROUP], ENTRIES
        columns = array_at(_floats(fields[COLUMNS]), entries)
        scales = array_at(_floats(fields[SCALES]), fields[OUTPUTS])
        ends = array_at(_longs(fields[ENDS]), fields[MATRICES])
        multiply(x, codes, columns, scales, ends, lut_bytes, threads, y)
    elif kind in (UNIFORM_FLOAT16, UNIFORM_FLOAT32):
        _multiply_uniform(x, fields, y)
    elif kind == FLOAT32:
        multiply_dense(x, array_at(_floats(fields[STORED]), shape), y)
    elif kind == BFLOAT16:
        multiply_dense(x, array_at(_unsigned(fields[STORED]), shape), y)  # 16-bit floats as lm_head.py reads them
    elif kind == FLOAT16:
        multiply_dense(x, array_at(_shorts(fields[STORED]), shape), y)


@compiled()
def _multiply_uniform(x: Floats, fields: Integers, y: Floats) -> None:
    tiles, groups, words, bits = fields[TILES], fields[GROUPS], fields[WORDS], fields[BITS]
    padded, sums = np.empty((1, groups, words * (32 // bits)), np.float32), np.empty((1, groups), np.float32)
    spread(x, fields[INPUTS] // groups, padded, sums)
    lanes = fields[OUTPUTS] // tiles
    levels = array_at(_ints(fields[STORED]), (tiles, groups, words, lanes))
    zeros = array_at(_bytes(fields[ZEROS]), (tiles, groups, lanes))
    if fields[KIND] == UNIFORM_FLOAT16:
        scales = array_at(_shorts(fields[SCALES]), (tiles, groups, lanes))
        _multiply_levels(padded, sums, levels, zeros, scales, bits, y)
    else:
        scales_32 = array_at(_floats(fields[SCALES]), (tiles, groups, lanes))
        _multiply_levels(padded, sums, levels, zeros, scales_32, bits, y)
    if fields[EXPONENT] != 0:
        power = np.float32(2.0 ** fields[EXPONENT])
        for o in range(y.shape[1]):
            y[0, o] *= power


ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN, EIGHT = ((0,) * bits for bits in range(1, 9))
"""Bits of a level, or rows of x, as `multiply_tile` takes them."""


@compiled(parallel=True)
def _multiply_levels(x: Floats, sums: Floats, words: Words, zeros: Bytes, scales: Scales, bits: int, y: Floats) -> None:
    """One row of `uniform.multiply`, for any number of bits: the code of all of them is compiled once."""
    for tile in prange(words.shape[0]):
        if bits == 4:
            multiply_tile(x, sums, words, zeros, scales, y, 0, tile, FOUR, ONE)
        elif bits == 8:
            multiply_tile(x, sums, words, zeros, scales, y, 0, tile, EIGHT, ONE)
        elif bits == 3:
            multiply_tile(x, sums, words, zeros, scales, y, 0, tile, THREE, ONE)
        elif bits == 5:
            multiply_tile(x, sums, words, zeros, scales, y, 0, tile, FIVE, ONE)
        elif bits == 6:
            multiply_tile(x, sums, words, zeros, scales, y, 0, tile, SIX, ONE)
        elif bits == 2:
            multiply_tile(x, sums, words, zeros, scales, y, 0, tile, TWO, ONE)
        elif bits == 7:
            multiply_tile(x, sums, words, zeros, scales, y, 0, tile, SEVEN, ONE)
        else:
            multiply_tile(x, sums, words, zeros, scales, y, 0, tile, ONE, ONE)


@compiled()
def matmuls(x: Floats, fields: Integers, lut_bytes: int, threads: int) -> Floats:
    """y [1, outputs of all], one matmul after the other, of the integers [matmuls, FIELDS]."""
    y = np.empty((1, fields[:, OUTPUTS].sum()), np.float32)
    start = 0
    for number in range(fields.shape[0]):
        stop = start + fields[number, OUTPUTS]
        if start < stop:
            matmul(x, fields[number], lut_bytes, threads, y[0, start:stop].reshape(1, stop - start))
        start = stop
    return y

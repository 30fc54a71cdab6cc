"""y = x W^T for one row of x and the layers that share it, whatever their schemes, called from compiled code.

Layers of one additive scheme are one stack (lut.py); every other layer is a matmul of its own. Each matmul is a row of
integers: its kind, its sizes, and the addresses of its arrays. So compiled code has one type for all mixes of schemes,
which is compiled once, and goes from one matmul to the next without Python.

Whoever holds the integers keeps the `Matmuls` too: it owns the memory at those addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor, nn

from aqlm_kernels.compressed import CompressedLinear
from aqlm_kernels.cpu.avx512 import ENTRIES, LANES
from aqlm_kernels.cpu.compile import array_at, compiled, instruction
from aqlm_kernels.cpu.dequantize import Floats
from aqlm_kernels.cpu.lm_head import multiply_dense
from aqlm_kernels.cpu.lut import Stack, multiply
from aqlm_kernels.errors import KernelError
from aqlm_kernels.linear import AdditiveLinear
from aqlm_kernels.packed import PackedMatrix

DecoderLayer: TypeAlias = AdditiveLinear | CompressedLinear | nn.Linear
Integers = NDArray[np.int64]

NONE, ADDITIVE, FLOAT32, BFLOAT16, FLOAT16 = range(5)
"""Kinds of matmul."""

DENSE = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

KIND, INPUTS, OUTPUTS, STORED, ROWS, WIDTH, COLUMNS, MATRICES, CODEBOOKS, GROUP, SCALES, ENDS = range(12)
"""Places in the integers of a matmul. STORED, COLUMNS, SCALES and ENDS are addresses: STORED of the codes or of W, the
others of what `lut.Stack` names so."""

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


def why_not_compiled(layer: DecoderLayer) -> str | None:
    """Reason why there is no compiled matmul with a layer, or None."""
    if isinstance(layer, AdditiveLinear):
        entries = layer.codebooks.shape[1]
        return None if entries <= ENTRIES else f"has codebooks of {entries} entries; {ENTRIES} at most are supported"
    if isinstance(layer, nn.Linear):
        return None if layer.weight.dtype in DENSE else f"has weights of type {layer.weight.dtype}"
    return f"is a matrix of kind {layer.matrix().kind}, which has no compiled matmul"


def _stacks(layers: Sequence[DecoderLayer]) -> list[list[int]]:
    """Places of the layers that are one matmul."""
    stacks: dict[object, list[int]] = {}
    for place, layer in enumerate(layers):
        key = tuple(layer.codebooks.shape) if isinstance(layer, AdditiveLinear) else place
        stacks.setdefault(key, []).append(place)
    return list(stacks.values())


def _matmul_of(layers: Sequence[DecoderLayer]) -> tuple[Integers, Sequence[Any], list[int]]:
    """The integers of one matmul, its arrays, and the outputs of each layer in y."""
    for layer in layers:
        if (reason := why_not_compiled(layer)) is not None:
            raise KernelError(f"the decoder cannot multiply by a layer that {reason}")
    if isinstance(layers[0], nn.Linear):
        return _dense(layers[0].weight.detach().contiguous())
    return _stacked([PackedMatrix(layer.matrix()) for layer in layers if isinstance(layer, AdditiveLinear)])


def _dense(weight: Tensor) -> tuple[Integers, Sequence[Any], list[int]]:
    fields = np.zeros(FIELDS, np.int64)
    fields[KIND], fields[STORED] = DENSE[weight.dtype], weight.data_ptr()
    fields[OUTPUTS], fields[INPUTS] = fields[ROWS], fields[WIDTH] = weight.shape
    return fields, [weight], [len(weight)]


def _stacked(matrices: Sequence[PackedMatrix]) -> tuple[Integers, Sequence[Any], list[int]]:
    stack = Stack.of(matrices)
    ends = stack.ends.astype(np.int64)
    fields = np.zeros(FIELDS, np.int64)
    fields[KIND], fields[INPUTS], fields[OUTPUTS] = ADDITIVE, matrices[0].in_features, len(stack.scales)
    fields[STORED], fields[COLUMNS], fields[SCALES], fields[ENDS] = (
        values.ctypes.data for values in (stack.codes, stack.columns, stack.scales, ends)
    )
    fields[ROWS], fields[WIDTH] = stack.codes.shape
    fields[MATRICES], fields[CODEBOOKS], fields[GROUP], _ = stack.columns.shape
    return fields, [stack, ends], [int(tiles) * LANES for tiles in np.diff(ends, prepend=0)]


def _pointer(kind: Any) -> Callable[[int], Any]:
    """The instruction that makes a pointer to values of a type from their address."""

    @instruction
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), generate

    return pointer


_bytes, _words, _halves = _pointer(types.uint8), _pointer(types.uint16), _pointer(types.int16)  # as STORED_AS says
_floats, _longs = _pointer(types.float32), _pointer(types.int64)


@compiled()
def matmul(x: Floats, fields: Integers, lut_bytes: int, threads: int, y: Floats) -> None:
    """y [1, OUTPUTS] = x W^T of x [1, in], for the integers of one matmul; `lut_bytes` as in lut.py."""
    kind, shape = fields[KIND], (fields[ROWS], fields[WIDTH])
    if kind == ADDITIVE:
        entries = fields[MATRICES], fields[CODEBOOKS], fields[GROUP], ENTRIES
        codes = array_at(_bytes(fields[STORED]), shape)
        columns = array_at(_floats(fields[COLUMNS]), entries)
        scales, ends = (
            array_at(_floats(fields[SCALES]), fields[OUTPUTS]),
            array_at(_longs(fields[ENDS]), fields[MATRICES]),
        )
        multiply(x, codes, columns, scales, ends, lut_bytes, threads, y)
    elif kind == FLOAT32:
        multiply_dense(x, array_at(_floats(fields[STORED]), shape), y)
    elif kind == BFLOAT16:
        multiply_dense(x, array_at(_words(fields[STORED]), shape), y)
    elif kind == FLOAT16:
        multiply_dense(x, array_at(_halves(fields[STORED]), shape), y)


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

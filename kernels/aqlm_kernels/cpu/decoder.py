"""A Llama-like model on the CPU, without transformers: prefill in torch, each decode step in compiled code.

A small model spends most of a token's time in Python. A block is RMSNorm; queries, keys and values with rotary
positions; attention over all positions so far; RMSNorm; a gated SiLU network. In a decode step queries, keys and values
are one stack of matrices, gate and up another, so that a block has four matmuls. Everything is float32 but the codes
and the head, which has its own type.

Shapes: d hidden size, f size of the gated network, e head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_kernels.cpu.avx512 import LANES
from aqlm_kernels.cpu.compile import compiled, prange
from aqlm_kernels.cpu.dequantize import Floats, array
from aqlm_kernels.cpu.lm_head import ByteRows, matmul_dense
from aqlm_kernels.cpu.lut import Bytes, Stack, Tiles, multiply
from aqlm_kernels.errors import KernelError
from aqlm_kernels.linear import AdditiveLinear
from aqlm_kernels.packed import PackedMatrix

SHORT = 16
"""Most tokens of a prompt that run as decode steps, which is then faster than dequantizing every weight."""


@dataclass(frozen=True, eq=False)
class DecoderBlock:
    """The weights of one block."""

    attention_norm: Tensor  # [d]
    attention_in: Sequence[AdditiveLinear]  # of queries [heads * e, d], keys and values [key_heads * e, d]
    attention_out: AdditiveLinear  # [d, heads * e]
    network_norm: Tensor  # [d]
    network_in: Sequence[AdditiveLinear]  # of gate and up [f, d]
    network_out: AdditiveLinear  # [d, f]


class Decoder:
    """A model with a cache for the keys and values of as many positions as it has angles.

    `embeddings` is `[vocabulary, d]`, `head` likewise; `angles` are the cosines and the sines `[positions, e]` of the
    rotary positions. `lut_bytes`: bytes of a LUT entry, 2 or 1, or 0 for float32. Only queries, keys and values may
    have a bias. Raises KernelError for a codebook of more than 256 entries, and where the positions are used up.
    """

    def __init__(
        self,
        blocks: Sequence[DecoderBlock],
        embeddings: Tensor,
        norm: Tensor,
        head: Tensor | ByteRows,
        angles: tuple[Tensor, Tensor],
        key_heads: int,
        epsilon: float,
        lut_bytes: int,
    ) -> None:
        cosines, sines = angles
        self._layers = blocks
        self._blocks = [_Block.of(block) for block in blocks]
        self._embeddings, self._norm, self._head = embeddings, norm.detach().float(), head
        self._cosines, self._sines = array(cosines), array(sines)
        self._heads = blocks[0].attention_in[0].out_features // cosines.shape[1]
        self._epsilon, self._lut_bytes = epsilon, lut_bytes
        shape = (len(blocks), key_heads, *cosines.shape)
        self._keys, self._values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.position = 0

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Start again with a prompt [length]; the logits [vocabulary] after it."""
        self.position = 0
        self._refuse_beyond(len(ids))
        if len(ids) <= SHORT:
            for token in ids[:-1].tolist():
                self._step(token)
            return self._logits(self._step(int(ids[-1])))
        hidden = self._embeddings[ids].float()  # [length, d]
        for number, block in enumerate(self._layers):
            hidden = self._prefill_block(hidden, block, number)
        self.position = len(ids)
        return self._logits(hidden[-1:])

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """One decode step: put the token at the next position; the logits [vocabulary] after it."""
        self._refuse_beyond(1)
        return self._logits(self._step(token))

    def _refuse_beyond(self, tokens: int) -> None:
        capacity = self._keys.shape[2]
        if self.position + tokens > capacity:
            raise KernelError(f"the decoder has a capacity of {capacity} positions: use a larger max_length")

    def _prefill_block(self, hidden: Tensor, block: DecoderBlock, number: int) -> Tensor:
        length, e = len(hidden), self._cosines.shape[1]
        x = self._normed(hidden, block.attention_norm)
        queries, keys, values = (layer(x).view(length, -1, e).transpose(0, 1) for layer in block.attention_in)
        queries, keys = self._rotated(queries), self._rotated(keys)  # [heads, length, e]
        self._keys[number, :, :length], self._values[number, :, :length] = array(keys), array(values)
        context = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, enable_gqa=True
        )  # [1, heads, length, e]
        hidden = hidden + block.attention_out(context[0].transpose(0, 1).reshape(length, -1))
        x = self._normed(hidden, block.network_norm)
        gate, up = (layer(x) for layer in block.network_in)
        change: Tensor = block.network_out(F.silu(gate) * up)
        return hidden + change

    def _rotated(self, heads: Tensor) -> Tensor:  # [heads, length, e]
        length = heads.shape[1]
        cosines, sines = (torch.from_numpy(angles[:length]) for angles in (self._cosines, self._sines))
        first, second = heads.chunk(2, dim=2)
        return heads * cosines + torch.cat([-second, first], dim=2) * sines

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight.float(), self._epsilon)

    def _step(self, token: int) -> Tensor:
        """The hidden state [1, d] of a token at the next position, which is then in use."""
        hidden = array(self._embeddings[token])[None].copy()
        angles = self._cosines[self.position], self._sines[self.position]
        threads = numba.get_num_threads()
        for number, block in enumerate(self._blocks):
            cache = self._keys[number], self._values[number]
            _step(hidden, *block, *angles, *cache, self.position, self._heads, self._epsilon, self._lut_bytes, threads)
        self.position += 1
        return torch.from_numpy(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:  # [1, d] -> [vocabulary]
        return matmul_dense(self._normed(hidden, self._norm), self._head)[0]


class _Matrices(NamedTuple):
    """A `lut.Stack` in the form that Numba takes, and the length of x."""

    codes: Bytes
    columns: Floats
    scales: Floats
    ends: Tiles
    inputs: int


class _Block(NamedTuple):
    attention_norm: Floats
    attention_in: _Matrices
    bias: Floats  # [tiles * LANES], in the order of attention_in's outputs
    attention_out: _Matrices
    network_norm: Floats
    network_in: _Matrices
    network_out: _Matrices

    @classmethod
    def of(cls, block: DecoderBlock) -> _Block:
        biases = [
            F.pad(
                torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float(),
                (0, -layer.out_features % LANES),
            )
            for layer in block.attention_in
        ]
        return cls(
            array(block.attention_norm),
            _matrices(block.attention_in),
            array(torch.cat(biases)),
            _matrices([block.attention_out]),
            array(block.network_norm),
            _matrices(block.network_in),
            _matrices([block.network_out]),
        )


def _matrices(layers: Sequence[AdditiveLinear]) -> _Matrices:
    stack = Stack.of([PackedMatrix(layer.matrix()) for layer in layers])
    return _Matrices(stack.codes, stack.columns, stack.scales, stack.ends, layers[0].in_features)


@compiled(fastmath=("contract",))
def _step(
    hidden: Floats,  # [1, d], becomes the block's output
    attention_norm: Floats,
    attention_in: _Matrices,
    bias: Floats,
    attention_out: _Matrices,
    network_norm: Floats,
    network_in: _Matrices,
    network_out: _Matrices,
    cosines: Floats,  # [e]
    sines: Floats,
    keys: Floats,  # [key_heads, positions, e]
    values: Floats,
    position: int,
    heads: int,
    epsilon: float,
    lut_bytes: int,
    threads: int,
) -> None:
    d, e = hidden.shape[1], cosines.shape[0]
    inputs = _matmul(_normed(hidden, attention_norm, epsilon), attention_in, lut_bytes, threads)[0]
    for o in range(bias.shape[0]):
        inputs[o] += bias[o]
    first_key, first_value = attention_in.ends[0] * LANES, attention_in.ends[1] * LANES
    _rotate(inputs[: heads * e], cosines, sines)
    _rotate(inputs[first_key : first_key + keys.shape[0] * e], cosines, sines)
    for head in range(keys.shape[0]):
        for i in range(e):
            keys[head, position, i] = inputs[first_key + head * e + i]
            values[head, position, i] = inputs[first_value + head * e + i]
    context = np.empty((1, heads * e), np.float32)
    _attend(inputs, keys, values, position + 1, heads, context[0])
    change = _matmul(context, attention_out, lut_bytes, threads)[0]
    for i in range(d):
        hidden[0, i] += change[i]
    inputs = _matmul(_normed(hidden, network_norm, epsilon), network_in, lut_bytes, threads)[0]
    first_up = network_in.ends[0] * LANES
    gated = np.empty((1, network_out.inputs), np.float32)
    for i in range(gated.shape[1]):
        gated[0, i] = inputs[i] / (np.float32(1) + np.exp(-inputs[i])) * inputs[first_up + i]
    change = _matmul(gated, network_out, lut_bytes, threads)[0]
    for i in range(d):
        hidden[0, i] += change[i]


@compiled()
def _matmul(x: Floats, matrices: _Matrices, lut_bytes: int, threads: int) -> Floats:
    y = np.empty((1, matrices.scales.shape[0]), np.float32)
    multiply(x, matrices.codes, matrices.columns, matrices.scales, matrices.ends, lut_bytes, threads, y)
    return y


@compiled(fastmath=("contract", "reassoc"))
def _normed(hidden: Floats, weight: Floats, epsilon: float) -> Floats:
    total = np.float32(0)
    for i in range(hidden.shape[1]):
        total += hidden[0, i] * hidden[0, i]
    scale = np.float32(1 / math.sqrt(total / hidden.shape[1] + epsilon))
    normed = np.empty_like(hidden)
    for i in range(hidden.shape[1]):
        normed[0, i] = hidden[0, i] * scale * weight[i]
    return normed


@compiled()
def _rotate(heads: Floats, cosines: Floats, sines: Floats) -> None:
    """Rotary positions, in place; heads are one after the other, and a pair of features is half a head apart."""
    e = cosines.shape[0]
    for start in range(0, heads.shape[0], e):
        for i in range(e // 2):
            a, b = heads[start + i], heads[start + e // 2 + i]
            heads[start + i] = a * cosines[i] - b * sines[i]
            heads[start + e // 2 + i] = b * cosines[e // 2 + i] + a * sines[e // 2 + i]


@compiled(parallel=True, fastmath=("contract", "reassoc"))
def _attend(queries: Floats, keys: Floats, values: Floats, length: int, heads: int, context: Floats) -> None:
    """Softmax attention of every head to the first `length` positions; context is `[heads * e]`."""
    e = keys.shape[2]
    for head in prange(heads):
        key, value = keys[head * keys.shape[0] // heads], values[head * keys.shape[0] // heads]
        query = queries[head * e : head * e + e]
        scores = np.empty(length, np.float32)
        highest = np.float32(-np.inf)
        for t in range(length):
            total = np.float32(0)
            for i in range(e):
                total += query[i] * key[t, i]
            scores[t] = total / np.float32(math.sqrt(e))
            highest = max(highest, scores[t])
        out = context[head * e : head * e + e]
        out[:] = 0
        total = np.float32(0)
        for t in range(length):
            weight = np.exp(scores[t] - highest)
            total += weight
            for i in range(e):
                out[i] += weight * value[t, i]
        for i in range(e):
            out[i] /= total

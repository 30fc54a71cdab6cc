"""A Llama-like model on the CPU, without transformers: prefill in torch, each decode step in compiled code.

A small model spends most of a token's time in Python. A block is RMSNorm; queries, keys and values with rotary
positions; attention over all positions so far; RMSNorm; a gated SiLU network. A decode step goes through all blocks in
one compiled call. Each layer has a scheme of its own, or dense weights; those of one additive scheme that share x are
one stack, so that a block has four matmuls where all layers have the same (stacks.py). Embeddings and head may be
quantized too, as one matrix or as two. Everything is float32 but the codes and the dense weights, which have their own
type.

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
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_kernels.cpu.compile import compiled, prange
from aqlm_kernels.cpu.dequantize import Floats, array
from aqlm_kernels.cpu.head import head_of
from aqlm_kernels.cpu.lm_head import ByteRows
from aqlm_kernels.cpu.rows import rows_of
from aqlm_kernels.cpu.stacks import FIELDS, INPUTS, DecoderLayer, HeadLayer, Integers, Matmuls, matmuls
from aqlm_kernels.errors import KernelError
from aqlm_kernels.matrices.matrix import Matrix

SHORT = 16
"""Most tokens of a prompt that run as decode steps, which is then faster than dequantizing every weight."""


@dataclass(frozen=True, eq=False)
class DecoderBlock:
    """The weights of one block."""

    attention_norm: Tensor  # [d]
    attention_in: Sequence[DecoderLayer]  # of queries [heads * e, d], keys and values [key_heads * e, d]
    attention_out: DecoderLayer  # [d, heads * e]
    network_norm: Tensor  # [d]
    network_in: Sequence[DecoderLayer]  # of gate and up [f, d]
    network_out: DecoderLayer  # [d, f]


class Decoder:
    """A model with a cache for the keys and values of as many positions as it has angles.

    `embeddings` is `[vocabulary, d]`, `head` likewise; `angles` are the cosines and the sines `[positions, e]` of the
    rotary positions. `lut_bytes`: bytes of a LUT entry, 2 or 1, or 0 for float32. Only queries, keys and values may
    have a bias. Raises KernelError for a layer that `why_not_compiled` refuses, and where the positions are used up.
    """

    def __init__(
        self,
        blocks: Sequence[DecoderBlock],
        embeddings: Tensor | Matrix,
        norm: Tensor,
        head: Tensor | ByteRows | HeadLayer,
        angles: tuple[Tensor, Tensor],
        key_heads: int,
        epsilon: float,
        lut_bytes: int,
    ) -> None:
        cosines, sines = angles
        self._layers, self._blocks = blocks, _Blocks.of(blocks)
        self._embeddings, self._norm = rows_of(embeddings), norm.detach().float()
        self._head = head_of(head)
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
        hidden = self._embeddings.rows(ids)  # [length, d]
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
        queries, keys, values = (_apply(layer, x).view(length, -1, e).transpose(0, 1) for layer in block.attention_in)
        queries, keys = self._rotated(queries), self._rotated(keys)  # [heads, length, e]
        self._keys[number, :, :length], self._values[number, :, :length] = array(keys), array(values)
        context = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, enable_gqa=True
        )  # [1, heads, length, e]
        hidden = hidden + _apply(block.attention_out, context[0].transpose(0, 1).reshape(length, -1))
        x = self._normed(hidden, block.network_norm)
        gate, up = (_apply(layer, x) for layer in block.network_in)
        return hidden + _apply(block.network_out, F.silu(gate) * up)

    def _rotated(self, heads: Tensor) -> Tensor:  # [heads, length, e]
        length = heads.shape[1]
        cosines, sines = (torch.from_numpy(angles[:length]) for angles in (self._cosines, self._sines))
        first, second = heads.chunk(2, dim=2)
        return heads * cosines + torch.cat([-second, first], dim=2) * sines

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight.float(), self._epsilon)

    def _step(self, token: int) -> Tensor:
        """The hidden state [1, d] of a token at the next position, which is then in use."""
        hidden = self._embeddings.row(token)
        angles = self._cosines[self.position], self._sines[self.position]
        caches, threads = (self._keys, self._values), numba.get_num_threads()
        sizes = self.position, self._heads
        _step(hidden, *self._blocks.arrays, *angles, *caches, *sizes, self._epsilon, self._lut_bytes, threads)
        self.position += 1
        return torch.from_numpy(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:  # [1, d] -> [vocabulary]
        normed = self._normed(hidden, self._norm)
        return self._head.logits(normed, self._lut_bytes)[0]


def _apply(layer: DecoderLayer, x: Tensor) -> Tensor:
    """x W^T + bias [length, out] in float32, whatever type the weights have."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())
    y: Tensor = layer(x)
    return y


ATTENTION_IN, ATTENTION_OUT, NETWORK_IN, NETWORK_OUT, SLOTS = 0, 3, 4, 6, 7
"""First of a block's matmuls with each x, of which there are at most as many as layers, and the count of all."""


class _Arrays(NamedTuple):
    """The weights of all blocks, as the compiled step takes them."""

    norms: Floats  # [blocks, 2, d], of attention and network
    biases: Floats  # [blocks, longest y], in the order of the outputs that x of the attention gives
    fields: Integers  # [blocks, SLOTS, FIELDS], zeros where layers share a matmul
    starts: Integers  # [blocks, 5], of queries, keys and values in their y, of gate and up in theirs


class _Blocks(NamedTuple):
    arrays: _Arrays
    kept: Sequence[Matmuls]

    @classmethod
    def of(cls, blocks: Sequence[DecoderBlock]) -> _Blocks:
        fields, starts = np.zeros((len(blocks), SLOTS, FIELDS), np.int64), np.zeros((len(blocks), 5), np.int64)
        kept: list[Matmuls] = []
        for number, block in enumerate(blocks):
            inputs = [block.attention_in, [block.attention_out], block.network_in, [block.network_out]]
            shared = [Matmuls.of(layers) for layers in inputs]
            for slot, one in zip((ATTENTION_IN, ATTENTION_OUT, NETWORK_IN, NETWORK_OUT), shared, strict=True):
                fields[number, slot : slot + len(one.fields)] = one.fields
            starts[number] = [*shared[0].starts, *shared[2].starts]
            kept += shared
        norms = [torch.stack([block.attention_norm.float(), block.network_norm.float()]) for block in blocks]
        biases = np.zeros((len(blocks), max(one.outputs for one in kept)), np.float32)
        for row, block, begins in zip(biases, blocks, starts, strict=True):
            for layer, start in zip(block.attention_in, begins, strict=False):
                if layer.bias is not None:
                    row[start : start + layer.out_features] = array(layer.bias)
        return cls(_Arrays(array(torch.stack(norms)), biases, fields, starts), kept)


@compiled(fastmath=("contract",))
def _step(
    hidden: Floats,  # [1, d], becomes the last block's output
    norms: Floats,  # as in _Arrays, these four
    biases: Floats,
    fields: Integers,
    starts: Integers,
    cosines: Floats,  # [e]
    sines: Floats,
    keys: Floats,  # [blocks, key_heads, positions, e]
    values: Floats,
    position: int,
    heads: int,
    epsilon: float,
    lut_bytes: int,
    threads: int,
) -> None:
    for number in range(norms.shape[0]):
        _attention(
            hidden,
            norms[number, 0],
            biases[number],
            fields[number],
            starts[number],
            cosines,
            sines,
            keys[number],
            values[number],
            position,
            heads,
            epsilon,
            lut_bytes,
            threads,
        )
        _network(hidden, norms[number, 1], fields[number], starts[number], epsilon, lut_bytes, threads)


@compiled(fastmath=("contract",))
def _attention(
    hidden: Floats,
    norm: Floats,
    bias: Floats,
    fields: Integers,
    starts: Integers,
    cosines: Floats,
    sines: Floats,
    keys: Floats,
    values: Floats,
    position: int,
    heads: int,
    epsilon: float,
    lut_bytes: int,
    threads: int,
) -> None:
    d, e = hidden.shape[1], cosines.shape[0]
    inputs = matmuls(_normed(hidden, norm, epsilon), fields[ATTENTION_IN:ATTENTION_OUT], lut_bytes, threads)[0]
    for o in range(inputs.shape[0]):
        inputs[o] += bias[o]
    first_query, first_key, first_value = starts[0], starts[1], starts[2]
    queries = inputs[first_query : first_query + heads * e]
    _rotate(queries, cosines, sines)
    _rotate(inputs[first_key : first_key + keys.shape[0] * e], cosines, sines)
    for head in range(keys.shape[0]):
        for i in range(e):
            keys[head, position, i] = inputs[first_key + head * e + i]
            values[head, position, i] = inputs[first_value + head * e + i]
    context = np.empty((1, heads * e), np.float32)
    _attend(queries, keys, values, position + 1, heads, context[0])
    change = matmuls(context, fields[ATTENTION_OUT:NETWORK_IN], lut_bytes, threads)[0]
    for i in range(d):
        hidden[0, i] += change[i]


@compiled(fastmath=("contract",))
def _network(
    hidden: Floats, norm: Floats, fields: Integers, starts: Integers, epsilon: float, lut_bytes: int, threads: int
) -> None:
    inputs = matmuls(_normed(hidden, norm, epsilon), fields[NETWORK_IN:NETWORK_OUT], lut_bytes, threads)[0]
    first_gate, first_up = starts[3], starts[4]
    gated = np.empty((1, fields[NETWORK_OUT, INPUTS]), np.float32)
    for i in range(gated.shape[1]):
        gate = inputs[first_gate + i]
        gated[0, i] = gate / (np.float32(1) + np.exp(-gate)) * inputs[first_up + i]
    change = matmuls(gated, fields[NETWORK_OUT:], lut_bytes, threads)[0]
    for i in range(hidden.shape[1]):
        hidden[0, i] += change[i]


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

"""The search over codes for the CPU: `search.choose_codes`, compiled, all rows in parallel.

Three choices make it fast (K = 256 and two codebooks take about half a microsecond per row and group):

- The table X of products between two codebooks is built once per group and shared by all rows; 256 KiB stay in L2.
- LLVM vectorises neither a floating-point minimum nor an argmin. Both are written over integers: the bits of a float32,
  with all but the sign flipped for negative numbers, order as the numbers do, and integer minima do vectorise.
- Codebooks are read transposed, `[g, K]`, so that the loop over entries is the innermost one and has unit stride.

A row's codes depend on that row alone, so the result is the same for any number of threads.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from aqlm_kernels.cpu.compile import compiled, instruction
from aqlm_kernels.search import check_search

Floats = NDArray[np.float32]
Codes = NDArray[np.int64]
Keys = NDArray[np.int32]

LARGEST_TABLE = 1024
"""Most entries of a codebook for the table X (4 MiB then); beyond, its rows are computed when they are needed."""

ROWS_AT_ONCE = 16
"""Rows per thread at a time: they share one set of scratch vectors."""

NEVER = np.int32(2**31 - 1)


@instruction
def _ordered(typing_context: Any, value: Any) -> Any:
    """The int32 whose order among such integers is that of the float32 among floats."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        sign = builder.ashr(bits, ir.Constant(ir.IntType(32), 31))
        return builder.xor(bits, builder.and_(sign, ir.Constant(ir.IntType(32), 0x7FFFFFFF)))

    return types.int32(types.float32), generate


@instruction
def _float_of(typing_context: Any, value: Any) -> Any:
    """The inverse of `_ordered`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sign = builder.ashr(arguments[0], ir.Constant(ir.IntType(32), 31))
        bits = builder.xor(arguments[0], builder.and_(sign, ir.Constant(ir.IntType(32), 0x7FFFFFFF)))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


@instruction
def _smaller(typing_context: Any, x: Any, y: Any) -> Any:
    """The minimum of two int32, as a compare and a select, which LLVM turns into a vector minimum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.icmp_signed("<", arguments[0], arguments[1]), arguments[0], arguments[1])

    return types.int32(types.int32, types.int32), generate


@compiled(fastmath=("contract",))
def _add_product(factors: Floats, rows: Floats, out: Floats) -> None:
    """out[k] += factors.rows[:, k], for `rows` `[g, K]`; four at a time, so that out is read and written less often."""
    group = rows.shape[0]
    for d in range(0, group - 3, 4):
        f0, f1, f2, f3 = factors[d], factors[d + 1], factors[d + 2], factors[d + 3]
        r0, r1, r2, r3 = rows[d], rows[d + 1], rows[d + 2], rows[d + 3]
        for k in range(out.shape[0]):
            out[k] += f0 * r0[k] + f1 * r1[k] + f2 * r2[k] + f3 * r3[k]
    for d in range(group - group % 4, group):
        factor, row = factors[d], rows[d]
        for k in range(out.shape[0]):
            out[k] += factor * row[k]


@compiled()
def _score(squares: Floats, target: Floats, codebook: Floats, factors: Floats, out: Floats) -> None:
    """out[k] = squares[k] - 2 target.codebook[:, k]; codebook is transposed, `[g, K]`, factors `[g]` scratch."""
    for d in range(factors.shape[0]):
        factors[d] = np.float32(-2) * target[d]
    out[:] = squares
    _add_product(factors, codebook, out)


@compiled()
def _best_entry(scores: Floats) -> int:
    """The first index of the lowest score."""
    least = NEVER
    for k in range(scores.shape[0]):
        least = _smaller(least, _ordered(scores[k]))
    index = NEVER
    for k in range(scores.shape[0]):
        index = _smaller(index, np.int32(k) if _ordered(scores[k]) == least else NEVER)
    return int(index)


@compiled()
def _best_of_classes(scores: Floats, least: Keys, blocks: Keys, best: Codes) -> None:
    """best[c] = the first index of the lowest score among c, c + classes, ...; least and blocks are scratch."""
    classes = best.shape[0]
    least[:] = NEVER
    for block in range(scores.shape[0] // classes):
        part = scores[block * classes : (block + 1) * classes]
        for c in range(classes):
            key = _ordered(part[c])
            blocks[c] = np.int32(block) if key < least[c] else blocks[c]
            least[c] = _smaller(key, least[c])
    for c in range(classes):
        best[c] = blocks[c] * classes + c


@compiled(fastmath=("contract",))
def _least_sum(partner: Floats, cross: Floats) -> np.float32:
    """min_b partner[b] + cross[b]."""
    least = NEVER
    for b in range(partner.shape[0]):
        least = _smaller(least, _ordered(partner[b] + cross[b]))
    return np.float32(_float_of(least))


@compiled()
def _cross_row(weighted: Floats, codebook: Floats, out: Floats) -> None:
    """out[b] = weighted.codebook[:, b]: the row of the table X of an entry a, `weighted` being 2 H C_p[a]."""
    out[:] = np.float32(0)
    _add_product(weighted, codebook, out)


@compiled(parallel=True)
def _nearest(squares: Floats, targets: Floats, codebook: Floats, codes: Codes) -> None:
    """codes `[rows, n]` <- the best entry of one codebook `[g, K]` for each target `[rows, n, g]`; squares `[n, K]`."""
    rows, groups, group = targets.shape
    for chunk in numba.prange((rows + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE):
        scores, factors = np.empty(codebook.shape[1], np.float32), np.empty(group, np.float32)
        for i in range(chunk * ROWS_AT_ONCE, min(rows, (chunk + 1) * ROWS_AT_ONCE)):
            for j in range(groups):
                _score(squares[j], targets[i, j], codebook, factors, scores)
                codes[i, j] = _best_entry(scores)


@compiled(parallel=True)
def _fill_table(weighted: Floats, codebook: Floats, table: Floats) -> None:
    """table[a, b] = weighted[a].codebook[:, b]."""
    for a in numba.prange(table.shape[0]):
        _cross_row(weighted[a], codebook, table[a])


@compiled(parallel=True)
def _choose_pairs(
    squares: tuple[Floats, Floats],  # c^T H c of every entry, [K] each
    codebooks: tuple[Floats, Floats],  # transposed, [g, K] each
    crossing: Floats,  # 2 H c of the first one's entries, [K, g]
    pulls: Floats,  # H c of the second one's entries, [K, g]
    table: Floats,  # X [K, K], or [0, 0] where it would be too large
    targets: Floats,  # [rows, g], without the codebooks that are held
    first: Codes,  # [rows], changed
    second: Codes,  # [rows], changed
    beam: int,
) -> None:
    """Every row's pair of codes <- the best pair among the candidates of `search.choose_codes`."""
    rows, group = targets.shape
    entries = squares[0].shape[0]
    half = beam // 2
    for chunk in numba.prange((rows + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE):
        alone, partner = np.empty(entries, np.float32), np.empty(entries, np.float32)
        given, computed = np.empty(entries, np.float32), np.empty(entries, np.float32)
        rest, factors = np.empty(group, np.float32), np.empty(group, np.float32)
        keys, blocks, tried = np.empty(half, np.int32), np.empty(half, np.int32), np.empty(beam + 1, np.int64)
        for i in range(chunk * ROWS_AT_ONCE, min(rows, (chunk + 1) * ROWS_AT_ONCE)):
            _score(squares[0], targets[i], codebooks[0], factors, alone)
            _score(squares[1], targets[i], codebooks[1], factors, partner)
            tried[0] = first[i]
            if beam >= entries:
                for entry in range(entries):
                    tried[entry + 1] = entry
            else:
                for d in range(group):
                    rest[d] = targets[i, d] - pulls[second[i], d]
                _score(squares[0], rest, codebooks[0], factors, given)
                _best_of_classes(given, keys, blocks, tried[1 : half + 1])
                _best_of_classes(alone, keys, blocks, tried[half + 1 :])
            best, least = first[i], np.float32(np.inf)
            for a in tried:
                if table.shape[0] == 0:
                    _cross_row(crossing[a], codebooks[1], computed)
                value = alone[a] + _least_sum(partner, table[a] if table.shape[0] > 0 else computed)
                if value < least:
                    best, least = a, value
            if table.shape[0] == 0:
                _cross_row(crossing[best], codebooks[1], computed)
            cross = table[best] if table.shape[0] > 0 else computed
            for b in range(entries):
                given[b] = partner[b] + cross[b]
            first[i], second[i] = best, _best_entry(given)


def choose_codes(metric: Tensor, targets: Tensor, codebooks: Tensor, codes: Tensor, beam: int) -> Tensor:
    """`search.choose_codes` for float32 tensors on the CPU."""
    check_search(metric, targets, codebooks, codes, beam)
    num_codebooks, entries, _ = codebooks.shape
    weighted = codebooks @ metric  # [M, K, g]
    crossing = 2 * weighted
    squares = (weighted * codebooks).sum(2)  # [M, K]
    flipped = codebooks.transpose(1, 2).contiguous()  # [M, g, K]
    if num_codebooks == 1:
        return _nearest_entries(squares, targets[:, None], flipped[0])
    chosen = codes.T.to(torch.int64, copy=True).contiguous()  # [M, rows]
    new = chosen.numpy()
    tabled = entries if entries <= LARGEST_TABLE else 0
    table = np.empty((tabled, tabled), np.float32)
    for p, q in combinations(range(num_codebooks), 2):
        held = targets.clone()  # [rows, g]
        for m in range(num_codebooks):
            if m not in (p, q):
                held -= weighted[m][chosen[m]]
        if tabled:
            _fill_table(crossing[p].numpy(), flipped[q].numpy(), table)
        _choose_pairs(
            _pair(squares, p, q),
            _pair(flipped, p, q),
            crossing[p].numpy(),
            weighted[q].numpy(),
            table,
            held.numpy(),
            new[p],
            new[q],
            min(beam, entries),
        )
    return chosen.T


def nearest_entries(importance: Tensor, targets: Tensor, codebook: Tensor) -> Tensor:
    """`search.nearest_entries` for float32 tensors on the CPU."""
    return _nearest_entries(importance @ codebook.square().T, targets, codebook.T.contiguous())


def _nearest_entries(squares: Tensor, targets: Tensor, flipped: Tensor) -> Tensor:
    codes = torch.empty(targets.shape[:2], dtype=torch.int64)
    _nearest(squares.numpy(), targets.contiguous().numpy(), flipped.numpy(), codes.numpy())
    return codes


def _pair(parts: Tensor, p: int, q: int) -> tuple[Floats, Floats]:
    return parts[p].numpy(), parts[q].numpy()

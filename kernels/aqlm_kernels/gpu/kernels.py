"""Triton kernels. W is dequantized in registers, a tile of outputs at a time, from codes in either order.

The code of output `tile * TILE + lane`, group `j` and codebook `m` is at
`tile * tile_step + lane * lane_step + j * group_step + m * codebook_step`.

Shapes: M codebooks of K entries, each of G features; TILE outputs, GROUPS groups and ROWS rows of x per program.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def restore(
    codes, codebooks, tile, j, outputs, last, tile_step, lane_step, group_step, codebook_step,
    M: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """W without its scales, [TILE, GROUPS, G], of one tile and the groups j; zeros outside of the matrix."""
    lane, i = tl.arange(0, TILE), tl.arange(0, G)
    inside = (tile * TILE + lane < outputs)[:, None] & (j < last)[None, :]
    weights = tl.zeros([TILE, GROUPS, G], tl.float32)
    for m in tl.static_range(M):
        place = tile * tile_step + lane[:, None] * lane_step + j[None, :] * group_step + m * codebook_step  # int64
        code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)  # [TILE, GROUPS]
        entry = codebooks + (m * K + code[:, :, None]) * G + i[None, None, :]
        weights += tl.load(entry, mask=inside[:, :, None], other=0).to(tl.float32)
    return weights


@triton.jit
def matrix_at(start, rows, columns, row, column):
    """A piece [row, column] of a matrix of `rows` x `columns`; zeros outside."""
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    return tl.load(start + row[:, None] * columns + column[None, :], mask=mask, other=0)


@triton.jit
def decode(
    x, codes, codebooks, scales, shares, outputs, groups, share, tile_step, lane_step, group_step, codebook_step,
    M: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """shares[program, o] = contribution of a share of the inputs to y[o], for x [in]."""
    tile = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, groups)
    i = tl.arange(0, G)
    total = tl.zeros([TILE], tl.float32)
    for start in range(first, last, GROUPS):
        j = start + tl.arange(0, GROUPS)
        weights = restore(
            codes, codebooks, tile, j, outputs, last, tile_step, lane_step, group_step, codebook_step,
            M, K, G, TILE, GROUPS,
        )  # fmt: skip
        values = tl.load(x + j[:, None] * G + i[None, :], mask=(j < last)[:, None], other=0).to(tl.float32)
        total += tl.sum(tl.sum(weights * values[None, :, :], axis=2), axis=1)
    o = tile * TILE + tl.arange(0, TILE)
    scale = tl.load(scales + o, mask=o < outputs, other=0).to(tl.float32)
    tl.store(shares + tl.program_id(1).to(tl.int64) * outputs + o, total * scale, mask=o < outputs)


@triton.jit
def multiply(
    x, codes, codebooks, scales, y, rows, outputs, groups, tile_step, lane_step, group_step, codebook_step,
    M: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y [rows, out] = x W^T for ROWS rows and one tile."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, TILE], tl.float32)
    for start in range(0, groups, GROUPS):
        j = start + tl.arange(0, GROUPS)
        weights = restore(
            codes, codebooks, tile, j, outputs, groups, tile_step, lane_step, group_step, codebook_step,
            M, K, G, TILE, GROUPS,
        )  # fmt: skip
        values = matrix_at(x, rows, groups * G, row, start * G + tl.arange(0, GROUPS * G))
        flat = tl.reshape(weights, [TILE, GROUPS * G]).to(values.dtype)
        total = tl.dot(values, tl.trans(flat), total, input_precision="ieee")
    o = tile * TILE + tl.arange(0, TILE)
    scale = tl.load(scales + o, mask=o < outputs, other=0).to(tl.float32)
    mask = (row[:, None] < rows) & (o[None, :] < outputs)
    tl.store(y + row[:, None] * outputs + o[None, :], (total * scale[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def multiply_transposed(
    dy, codes, codebooks, scales, dx, rows, outputs, groups, tile_step, lane_step, group_step, codebook_step,
    M: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx [rows, in] = dy W for ROWS rows and GROUPS groups of inputs."""
    j = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, GROUPS * G], tl.float32)
    for number in range(0, tl.cdiv(outputs, TILE)):
        tile = tl.cast(number, tl.int64)
        o = tile * TILE + tl.arange(0, TILE)
        weights = restore(
            codes, codebooks, tile, j, outputs, groups, tile_step, lane_step, group_step, codebook_step,
            M, K, G, TILE, GROUPS,
        )  # fmt: skip
        weights *= tl.load(scales + o, mask=o < outputs, other=0).to(tl.float32)[:, None, None]
        gradient = matrix_at(dy, rows, outputs, row, o)
        flat = tl.reshape(weights, [TILE, GROUPS * G]).to(gradient.dtype)
        total = tl.dot(gradient, flat, total, input_precision="ieee")
    column = tl.program_id(0) * GROUPS * G + tl.arange(0, GROUPS * G)
    mask = (row[:, None] < rows) & (column[None, :] < groups * G)
    tl.store(dx + row[:, None] * groups * G + column[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient(
    dy, x, codes, codebooks, scales, codebook_gradient, shares, rows, outputs, groups,
    tile_step, lane_step, group_step, codebook_step,
    M: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one tile and GROUPS groups to dC; shares[program, o] = that of the groups to ds[o].

    dW = dy^T x of the piece stays in registers.
    """
    tile = tl.program_id(0).to(tl.int64)
    o = tile * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.program_id(1) * GROUPS * G + tl.arange(0, GROUPS * G)
    flat = tl.zeros([TILE, GROUPS * G], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        gradient = matrix_at(dy, rows, outputs, row, o)
        values = matrix_at(x, rows, groups * G, row, column)
        flat = tl.dot(tl.trans(gradient), values, flat, input_precision="ieee")
    piece = tl.reshape(flat, [TILE, GROUPS, G])
    weights = restore(
        codes, codebooks, tile, j, outputs, groups, tile_step, lane_step, group_step, codebook_step,
        M, K, G, TILE, GROUPS,
    )  # fmt: skip
    share = tl.sum(tl.sum(piece * weights, axis=2), axis=1)
    tl.store(shares + tl.program_id(1).to(tl.int64) * outputs + o, share, mask=o < outputs)
    piece *= tl.load(scales + o, mask=o < outputs, other=0).to(tl.float32)[:, None, None]
    lane, i = tl.arange(0, TILE), tl.arange(0, G)
    inside = (o < outputs)[:, None] & (j < groups)[None, :]
    for m in tl.static_range(M):
        place = tile * tile_step + lane[:, None] * lane_step + j[None, :] * group_step + m * codebook_step
        code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
        entry = codebook_gradient + (m * K + code[:, :, None]) * G + i[None, None, :]
        tl.atomic_add(entry, piece, mask=inside[:, :, None], sem="relaxed")

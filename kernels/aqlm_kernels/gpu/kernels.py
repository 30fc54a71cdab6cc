"""What runs on the GPU. W is restored from PackedMatrix, where the codes of a tile of outputs lie side by side."""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def restore(
    codes, codebooks, tile, j, inside, groups,
    M: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """W without its scales, [TILE, GROUPS, G], of one tile and the groups j; zeros outside."""
    lane, i = tl.arange(0, TILE), tl.arange(0, G)
    weights = tl.zeros([TILE, GROUPS, G], tl.float32)
    for m in tl.static_range(M):
        place = ((tile * groups + j[None, :]) * M + m) * TILE + lane[:, None]  # int64
        code = tl.load(codes + place, mask=inside[None, :], other=0).to(tl.int32)  # [TILE, GROUPS]
        entry = codebooks + (m * K + code[:, :, None]) * G + i[None, None, :]
        weights += tl.load(entry, mask=inside[None, :, None], other=0).to(tl.float32)
    return weights


@triton.jit
def decode(
    x, codes, codebooks, scales, shares, outputs, groups, share,
    M: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """shares[program, o] = what a share of the inputs gives y[o], of x [in]."""
    tile = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, groups)
    i = tl.arange(0, G)
    total = tl.zeros([TILE], tl.float32)
    for start in range(first, last, GROUPS):
        j = start + tl.arange(0, GROUPS)
        inside = j < last
        weights = restore(codes, codebooks, tile, j, inside, groups, M, K, G, TILE, GROUPS)
        values = tl.load(x + j[:, None] * G + i[None, :], mask=inside[:, None], other=0).to(tl.float32)
        total += tl.sum(tl.sum(weights * values[None, :, :], axis=2), axis=1)
    o = tile * TILE + tl.arange(0, TILE)
    scale = tl.load(scales + o, mask=o < outputs, other=0).to(tl.float32)
    tl.store(shares + tl.program_id(1).to(tl.int64) * outputs + o, total * scale, mask=o < outputs)


@triton.jit
def multiply(
    x, codes, codebooks, scales, y, rows, outputs, groups,
    M: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y [rows, out] = x W^T for ROWS rows and one tile."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, TILE], tl.float32)
    for start in range(0, groups, GROUPS):
        j = start + tl.arange(0, GROUPS)
        weights = restore(codes, codebooks, tile, j, j < groups, groups, M, K, G, TILE, GROUPS)
        column = start * G + tl.arange(0, GROUPS * G)
        mask = (row[:, None] < rows) & (column[None, :] < groups * G)
        values = tl.load(x + row[:, None] * groups * G + column[None, :], mask=mask, other=0)
        flat = tl.reshape(weights, [TILE, GROUPS * G]).to(values.dtype)
        total = tl.dot(values, tl.trans(flat), total, input_precision="ieee")
    o = tile * TILE + tl.arange(0, TILE)
    scale = tl.load(scales + o, mask=o < outputs, other=0).to(tl.float32)
    mask = (row[:, None] < rows) & (o[None, :] < outputs)
    tl.store(y + row[:, None] * outputs + o[None, :], (total * scale[None, :]).to(y.dtype.element_ty), mask=mask)

"""A tile of a matrix product x weight^T, as the kernels of layer.py make it: where it lies, its weights ahead of the rows, sums, scale, bias, store.

Weights are of the storage type or 8 bits, int8 or E4M3, each value of which 16 bits hold exactly; then a column's sum of products has one scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.engine.product_columns import column_product, together
from sessa_deploy.kernels.engine.product_row import row_ahead, row_product
from sessa_deploy.kernels.engine.widen import wide
from sessa_deploy.kernels.launch.limits import PRODUCT_ROWS

FEW = tl.constexpr(PRODUCT_ROWS[-1])  # rows beyond which weights of 8 bits are widened before the product
# FORM of a product of several rows of 16-bit weights none of which come ahead; 0: its parts of the depth are added across warps. Weights of 8 bits have theirs.
TOGETHER = tl.constexpr(1)  # the parts change places and are added within threads
COLUMNS = tl.constexpr(2)  # the columns are the long side of the matrix instructions, see product_columns.py
SIDEWAYS = tl.constexpr(3)  # the columns, 64 or more, are the rows of a warpgroup's instructions, whose operands stay in shared memory
GROUP = tl.constexpr(8)  # tiles of rows whose programs are neighbours, so that they share a tile of weights in the cache


@triton.jit
def place(i, rows, tiles_n, BM: tl.constexpr):
    """(row tile, column tile) of the i-th program: GROUP row tiles walk the columns together."""
    tiles_m = tl.cdiv(rows, BM)
    i_m, i_n = i * 0, i
    if tiles_m > 1:  # divisions cost a fraction of a microsecond
        span = GROUP * tiles_n
        first = i // span * GROUP
        size = tl.minimum(tiles_m - first, GROUP)
        i_m, i_n = first + (i % span) % size, (i % span) // size
    return i_m, i_n


@triton.jit
def tile_of(rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """This program's tile of (rows, columns): its first row and column, 64 bit, and which of its rows and columns exist."""
    i_m, i_n = place(tl.program_id(0), rows, tl.cdiv(columns, BN), BM)
    row, column = (i_m * BM).to(tl.int64), (i_n * BN).to(tl.int64)
    m_m, m_n = tl.arange(0, BM) < rows - i_m * BM, tl.arange(0, BN) < columns - i_n * BN
    return row, column, m_m, m_n


@triton.jit
def ahead(weight, m_n, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr):
    """The first AHEAD * BK columns of a tile's weights; called before `begin`, so that they are here when the rows are. As `strip`; of one row
    as `row_ahead`."""
    if AHEAD == 0:
        b_w = 0.0
    elif BM == 1:
        b_w = row_ahead(weight, m_n, depth, BN, BK, KS, AHEAD)
    else:
        tl.static_assert(AHEAD == 1, "of several rows' weights one step comes ahead")
        b_w = strip(weight, m_n, depth, 0, depth, BN, BK, KS)
    return b_w


@triton.jit
def strip_columns(BK: tl.constexpr, KS: tl.constexpr):
    """Which of BK columns stands where in a `strip`, (4, 1, KS, 1, BK / (32 KS), 8)."""
    o_k = tl.arange(0, BK // (32 * KS))[None, None, None, None, :, None] * KS + tl.arange(0, KS)[None, None, :, None, None, None]
    return (o_k * 4 + tl.arange(0, 4)[:, None, None, None, None, None]) * 8 + tl.arange(0, 8)[None, None, None, None, None, :]


@triton.jit
def strip(x, m_r, row, start, depth, R: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """Columns [start, start + BK) of R rows of x as (4, 8, KS, R / 8, BK / (32 KS), 8); m_r: which rows there are.

    The first three axes are a lane's and a warp's number, so that a thread reads 16 bytes at a time and holds what its matrix instructions take (`left`):
    nothing goes through shared memory.
    """
    o_k = strip_columns(BK, KS)
    o_r = tl.arange(0, R // 8)[None, None, None, :, None, None] * 8 + tl.arange(0, 8)[None, :, None, None, None, None]
    m_r = tl.reshape(tl.trans(tl.reshape(m_r, [R // 8, 8])), [1, 8, 1, R // 8, 1, 1])
    return tl.load(x + o_r * row + (start + o_k), mask=m_r & (o_k < depth - start), other=0.0)


@triton.jit
def left(b_x, R: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """A `strip` as the left operand of KS products, (KS,R,BK / KS). Columns change places in each 32 as they do in `right`: their sum is the same."""
    b_x = tl.permute(tl.reshape(b_x, [4, 8, KS, R // 8, BK // (32 * KS), 2, 2, 2]), [2, 3, 1, 4, 5, 6, 0, 7])
    return tl.reshape(b_x, [KS, R, BK // KS])


@triton.jit
def right(b_w, R: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """A `strip` as the right operand, (KS,BK / KS,R)."""
    b_w = tl.permute(tl.reshape(b_w, [4, 8, KS, R // 8, BK // (32 * KS), 2, 2, 2]), [2, 4, 5, 6, 0, 7, 3, 1])
    return tl.reshape(b_w, [KS, BK // KS, R])


@triton.jit
def _strip_product(
    x, gate, weight, b_w, rows, m_n, depth, row, gate_row, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr
):
    """`product` of up to BM rows, 8 or 16, whose weights came ahead; 8 at a time, which are the short side of a matrix instruction."""
    b_low = tl.zeros([KS, BN, 8], dtype=tl.float32)
    b_high = b_low if BM > 8 else 0.0
    b_low, b_high = _add(b_low, b_high, x, gate, b_w, rows, depth, row, gate_row, 0, GATED, BM, BN, BK, KS)
    for start in tl.range(BK, depth, BK, num_stages=1):
        b_w = strip(weight, m_n, depth, start, depth, BN, BK, KS)
        b_low, b_high = _add(b_low, b_high, x, gate, b_w, rows, depth, row, gate_row, start, GATED, BM, BN, BK, KS)
    if BM > 8:
        b_acc = sixteen(tl.sum(b_low, 0), tl.sum(b_high, 0), BN)
    else:
        b_acc = tl.trans(tl.sum(b_low, 0))
    return b_acc


@triton.jit
def _add(
    b_low, b_high, x, gate, b_w, rows, depth, row, gate_row, start, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    KS: tl.constexpr,
):  # fmt: skip
    """Adds columns [start, start + BK) to both sums (KS,BN,8), each of 8 rows; the second where there are any."""
    b_a = left(wide(b_w, x.dtype.element_ty), BN, BK, KS)
    b_low = tl.dot(b_a, _eight(x, gate, 0, rows, row, gate_row, start, depth, GATED, BK, KS), b_low, input_precision="ieee")
    if BM > 8:  # noqa: SIM102
        if rows > 8:
            b_high = tl.dot(b_a, _eight(x, gate, 8, rows, row, gate_row, start, depth, GATED, BK, KS), b_high, input_precision="ieee")
    return b_low, b_high


@triton.jit
def _eight(x, gate, first, rows, row, gate_row, start, depth, GATED: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """Rows [first, first + 8) of x, those below `rows`, as the right operand of `_strip_product`."""
    m_m = first + tl.arange(0, 8) < rows
    b_x = strip(x + first * row, m_m, row, start, depth, 8, BK, KS)
    if GATED:
        b_g = strip(gate + first * gate_row, m_m, gate_row, start, depth, 8, BK, KS)
        b_x = (b_x.to(tl.float32) * b_g.to(tl.float32)).to(b_x.dtype)
    return right(b_x, 8, BK, KS)


@triton.jit
def sixteen(b_low, b_high, BN: tl.constexpr):
    """(16,BN) of (BN,8) twice."""
    return tl.reshape(tl.permute(tl.join(b_low, b_high), [2, 1, 0]), [16, BN])


@triton.jit
def product(
    x, gate, weight, b_w, rows, m_m, m_n, depth, row, gate_row,
    GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """(BM,BN) float32 of x weight^T, rows of x `row` elements apart, all three from their tile's first row; GATED: of (x * gate) rounded.

    b_w: of `ahead`; rows: how many x has from there on. FORM: see TOGETHER and those below it.

    KS > 1: BK is taken as KS parts, each with sums of its own, which go to a warp each and are added at the end: few rows make short sums of products
    that wait for one another, and a warp's chain is 1 / KS as long. Of one row see product_row.py.
    """
    if BM == 1:
        b_acc = row_product(x, gate, weight, b_w, m_n, depth, GATED, BN, BK, KS, AHEAD)
    elif BM > FEW:
        tl.static_assert(KS == 1, "large tiles have depth enough for every warp")
        b_acc = _large_product(x, gate, weight, m_m, m_n, depth, row, gate_row, GATED, BM, BN, BK)
    elif AHEAD > 0:
        tl.static_assert((BM == 8) | (BM == 16), "weights ahead are for at most 16 rows")
        b_acc = _strip_product(x, gate, weight, b_w, rows, m_n, depth, row, gate_row, GATED, BM, BN, BK, KS)
    elif FORM == SIDEWAYS:
        tl.static_assert((KS == 1) & (BN >= 64) & (not GATED), "a warpgroup takes both operands as they are")
        b_acc = _sideways_product(x, weight, m_m, m_n, depth, row, BM, BN, BK)
    elif BM == 8:
        b_acc = _few_product(x, gate, weight, m_m, m_n, depth, row, gate_row, GATED, BN, BK, KS)
    elif (FORM == COLUMNS) | ((weight.dtype.element_ty.primitive_bitwidth == 8) & (BM > 16) & (KS > 1)):
        b_acc = column_product(x, gate, weight, m_m, m_n, depth, row, gate_row, GATED, BM, BN, BK, KS)
    else:
        b_acc = _tile_product(x, gate, weight, m_m, m_n, depth, row, gate_row, GATED, BM, BN, BK, KS, FORM)
    return b_acc


@triton.jit
def _tile_product(
    x, gate, weight, m_m, m_n, depth, row, gate_row, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """`product` of several rows."""
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    if KS == 1:
        o_k = tl.arange(0, BK)
        p_x = x + o_m[:, None] * row + o_k[None, :]
        p_g = gate + o_m[:, None] * gate_row + o_k[None, :]
        p_w = weight + o_n[None, :] * depth + o_k[:, None]
        b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    else:
        o_k = tl.arange(0, KS)[:, None] * (BK // KS) + tl.arange(0, BK // KS)[None, :]
        p_x = x + o_m[None, :, None] * row + o_k[:, None, :]
        p_g = gate + o_m[None, :, None] * gate_row + o_k[:, None, :]
        p_w = weight + o_n[None, None, :] * depth + o_k[:, :, None]
        b_acc = tl.zeros([KS, BM, BN], dtype=tl.float32)
    for start in range(0, depth, BK):
        m_k = o_k < depth - start
        if KS == 1:
            m_x, m_w = m_m[:, None] & m_k[None, :], m_n[None, :] & m_k[:, None]
        else:
            m_x, m_w = m_m[None, :, None] & m_k[:, None, :], m_n[None, None, :] & m_k[:, :, None]
        b_x = tl.load(p_x, mask=m_x, other=0.0)
        if GATED:
            b_g = tl.load(p_g, mask=m_x, other=0.0)
            b_x = (b_x.to(tl.float32) * b_g.to(tl.float32)).to(b_x.dtype)
            p_g += BK
        b_w = wide(tl.load(p_w, mask=m_w, other=0.0), b_x.dtype)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
        p_x += BK
        p_w += BK
    if KS > 1 and (FORM == TOGETHER or weight.dtype.element_ty.primitive_bitwidth == 8):
        b_acc = together(tl.permute(b_acc, [1, 2, 0]), BM, BN, KS)
    elif KS > 1:
        b_acc = tl.sum(b_acc, 0)
    return b_acc


@triton.jit
def _sideways_product(x, weight, m_m, m_n, depth, row, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """`product` of few rows, as (weight x^T)^T: a warpgroup's instructions take both from shared memory. Columns that there are not repeat the last."""
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    o_n = tl.minimum(o_n, tl.max(tl.where(m_n, o_n, 0), 0))
    p_x = x + o_m[:, None] * row + o_k[None, :]
    p_w = weight + o_n[:, None] * depth + o_k[None, :]
    b_acc = tl.zeros([BN, BM], dtype=tl.float32)
    for start in range(0, depth, BK):
        m_k = (o_k < depth - start)[None, :]
        b_x = tl.load(p_x + start, mask=m_m[:, None] & m_k, other=0.0)
        b_w = tl.load(p_w + start, mask=m_k, other=0.0)
        b_acc = tl.dot(b_w, tl.trans(b_x), b_acc, input_precision="ieee")
    return tl.trans(b_acc)


@triton.jit
def _few_product(x, gate, weight, m_m, m_n, depth, row, gate_row, GATED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """`product` of up to 8 rows, which are the short side of the matrix instructions: half of what `_tile_product` reads and keeps of them, the same sums."""
    o_m, o_n = tl.arange(0, 8), tl.arange(0, BN)
    o_k = tl.arange(0, KS)[:, None] * (BK // KS) + tl.arange(0, BK // KS)[None, :]
    p_x = x + o_m[None, None, :] * row + o_k[:, :, None]
    p_g = gate + o_m[None, None, :] * gate_row + o_k[:, :, None]
    p_w = weight + o_n[None, :, None] * depth + o_k[:, None, :]
    b_acc = tl.zeros([KS, BN, 8], dtype=tl.float32)
    for start in range(0, depth, BK):
        m_k = o_k < depth - start
        m_x = m_m[None, None, :] & m_k[:, :, None]
        b_x = tl.load(p_x, mask=m_x, other=0.0)
        if GATED:
            b_g = tl.load(p_g, mask=m_x, other=0.0)
            b_x = (b_x.to(tl.float32) * b_g.to(tl.float32)).to(b_x.dtype)
            p_g += BK
        b_w = wide(tl.load(p_w, mask=m_n[None, :, None] & m_k[:, None, :], other=0.0), b_x.dtype)
        b_acc = tl.dot(b_w, b_x, b_acc, input_precision="ieee")
        p_x += BK
        p_w += BK
    return tl.trans(tl.sum(b_acc, 0))


@triton.jit
def _large_product(x, gate, weight, m_m, m_n, depth, row, gate_row, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """`product` of a tile that fills a multiprocessor. Rows and columns that there are not repeat the last one: a mask of each would take its registers."""
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    o_m = tl.minimum(o_m, tl.max(tl.where(m_m, o_m, 0), 0))
    o_n = tl.minimum(o_n, tl.max(tl.where(m_n, o_n, 0), 0))
    p_x = x + o_m[:, None] * row + o_k[None, :]
    p_g = gate + o_m[:, None] * gate_row + o_k[None, :]
    p_w = weight + o_n[:, None] * depth + o_k[None, :]
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, depth, BK):
        m_k = (o_k < depth - start)[None, :]
        b_x = tl.load(p_x + start, mask=m_k, other=0.0)
        if GATED:
            b_g = tl.load(p_g + start, mask=m_k, other=0.0)
            b_x = (b_x.to(tl.float32) * b_g.to(tl.float32)).to(b_x.dtype)
        b_w = wide(tl.load(p_w + start, mask=m_k, other=0.0), b_x.dtype)
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def bias_of(bias, m_n, BM: tl.constexpr, BN: tl.constexpr):
    """The bias of a tile's columns; of a large tile 0, and nothing is read yet: see `with_bias`."""
    if BM > FEW:
        b_bias = 0.0
    else:
        b_bias = tl.load(bias + tl.arange(0, BN), mask=m_n, other=0.0)
    return b_bias


@triton.jit
def scale_of(scale, weight, column, m_n, BN: tl.constexpr):
    """The scales of a tile's columns, float32, where weights are of 8 bits; else 1, and nothing is read yet: see `scaled`."""
    if weight.dtype.element_ty.primitive_bitwidth == 8:
        b_scale = tl.load(scale + column + tl.arange(0, BN), mask=m_n, other=0.0)
    else:
        b_scale = 1.0
    return b_scale


@triton.jit
def scaled(b_y, b_scale, scale, weight, column, m_n, BM: tl.constexpr, BN: tl.constexpr):
    """b_y (BM,BN) times `scale_of`. Large tiles of 16-bit weights may be of `layer_widen`: they have scales where `scale` is not the weights' address.

    Those are read here: ahead of the product they would take registers that let one program fewer run beside another.
    """
    if weight.dtype.element_ty.primitive_bitwidth == 8:
        b_y = b_y * b_scale[None, :]
    elif BM > FEW:
        given = scale.to(tl.int64) != weight.to(tl.int64)
        b_y = b_y * tl.load(scale + column + tl.arange(0, BN), mask=m_n & given, other=1.0)[None, :]
    return b_y


@triton.jit
def with_bias(b_y, b_bias, bias, m_n, BM: tl.constexpr, BN: tl.constexpr):
    """b_y (BM,BN) plus `bias_of`. Large tiles read it here: through the product it would take half as many registers as the sums."""
    if BM > FEW:
        b_bias = tl.load(bias + tl.arange(0, BN), mask=m_n, other=0.0)
    return b_y + b_bias.to(tl.float32)[None, :]


@triton.jit
def put(out, b_y, m_m, m_n, row, BM: tl.constexpr, BN: tl.constexpr):
    o_y = tl.arange(0, BM)[:, None] * row + tl.arange(0, BN)[None, :]
    tl.store(out + o_y, b_y.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])

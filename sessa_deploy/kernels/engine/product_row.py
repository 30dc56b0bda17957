"""`product` of one row, in three forms.

With KS = 1 single multiplications, each column's by all warps; with KS > 1 and 16-bit weights by one warp, which has KS columns. With KS > 1 and 8-bit weights
matrix instructions, of whose 8 columns one is used: they take less than half of the instructions that single multiplications take with the conversions to
float32 before them, and those are not hidden behind the weights' way from memory. Weights are then held as `strip` in product.py holds them, 16 at a time: a
thread reads 16 bytes and has what its matrix instructions take.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.engine.pointwise import normal
from sessa_deploy.kernels.engine.widen import wide


@triton.jit
def row_ahead(weight, m_n, depth, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr):
    """The first AHEAD * BK columns of BN rows of weights, AHEAD > 0; with KS > 1 as `_fan` has them, of 8-bit weights a tuple of AHEAD `_piece`s."""
    if (KS > 1) & (weight.dtype.element_ty.primitive_bitwidth == 8):
        b_w = (_piece(weight, m_n, depth, 0, BN, BK, KS),)
        for i in tl.static_range(1, AHEAD):
            b_w = b_w + (_piece(weight, m_n, depth, i * BK, BN, BK, KS),)  # type: ignore[assignment]  # noqa: RUF005
    elif KS > 1:
        tl.static_assert(AHEAD == 1, "of a row's weights one step comes ahead")
        b_w = _fan(weight, m_n, depth, 0, BN, BK, KS)
    else:
        o_k = tl.arange(0, AHEAD * BK)
        b_w = tl.load(weight + tl.arange(0, BN)[:, None] * depth + o_k[None, :], mask=m_n[:, None] & (o_k < depth)[None, :], other=0.0)
    return b_w


@triton.jit
def row_product(
    x, gate, weight, b_w, m_n, depth, GATED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr
):
    """(1,BN) float32, as `product.product`. By matrix instructions depth is at most AHEAD * BK, and KS the number of warps, each of which has sums of its own
    (of more, Triton 3.6 gave wrong ones)."""
    if (KS > 1) & (weight.dtype.element_ty.primitive_bitwidth == 8):
        b_acc = tl.zeros([KS, BN, 1 if AHEAD < 2 else 8], dtype=tl.float32)
        for i in tl.static_range(0, AHEAD):
            b_acc = _add(b_acc, x, gate, b_w[i], i * BK, depth, GATED, BN, BK, KS, AHEAD)
        b_y = _total(b_acc)
    elif KS > 1:
        b_y = _fan_product(x, gate, weight, b_w, m_n, depth, GATED, BN, BK, KS)
    else:
        b_y = _plain_product(x, gate, weight, b_w, m_n, depth, GATED, BN, BK, AHEAD)
    return b_y


@triton.jit
def _plain_product(x, gate, weight, b_w, m_n, depth, GATED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):
    """`product` of one row: no matrix instruction, whose 16 rows would be 15 of zeros, and nothing goes through shared memory but the last sums."""
    b_acc = tl.zeros([1, BN], dtype=tl.float32)
    if AHEAD > 0:
        b_first = _row(x, gate, tl.arange(0, AHEAD * BK), depth, GATED)
        b_acc += tl.sum(wide(b_w, tl.float32) * b_first[None, :], 1)[None, :]
    o_n, o_k = tl.arange(0, BN), tl.arange(0, BK)
    for start in range(AHEAD * BK, depth, BK):
        b_x = _row(x, gate, start + o_k, depth, GATED)
        b_v = tl.load(weight + o_n[:, None] * depth + (start + o_k)[None, :], mask=m_n[:, None] & (start + o_k < depth)[None, :], other=0.0)
        b_acc += tl.sum(wide(b_v, tl.float32) * b_x[None, :], 1)[None, :]
    return b_acc


@triton.jit
def _fan(weight, m_n, depth, start, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """Columns [start, start + BK) of BN rows of weights as (BN / KS, KS, BK / SPAN, SPAN): each of BN / KS warps has KS rows, of which it reads SPAN columns at
    a time, 16 bytes a lane."""
    SPAN: tl.constexpr = 4096 // weight.dtype.element_ty.primitive_bitwidth
    o_k = start + tl.arange(0, BK // SPAN)[None, None, :, None] * SPAN + tl.arange(0, SPAN)[None, None, None, :]
    o_n = tl.arange(0, BN // KS)[:, None, None, None] * KS + tl.arange(0, KS)[None, :, None, None]
    m_n = tl.reshape(m_n, [BN // KS, KS, 1, 1])
    return tl.load(weight + o_n * depth + o_k, mask=m_n & (o_k < depth), other=0.0)


@triton.jit
def _fan_product(x, gate, weight, b_w, m_n, depth, GATED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """`product` of one row, each of whose columns is one warp's, which reads the whole row: no sum crosses warps. Where columns are many a multiprocessor has
    as many instructions to issue as a row has elements, and this form has the fewest."""
    SPAN: tl.constexpr = 4096 // weight.dtype.element_ty.primitive_bitwidth
    o_k = tl.arange(0, BK // SPAN)[None, None, :, None] * SPAN + tl.arange(0, SPAN)[None, None, None, :]
    o_k = tl.broadcast_to(o_k, [BN // KS, 1, BK // SPAN, SPAN])
    b_acc = tl.sum(wide(b_w, tl.float32) * _row(x, gate, o_k, depth, GATED), 2)
    for start in range(BK, depth, BK):
        b_v = _fan(weight, m_n, depth, start, BN, BK, KS)
        b_acc += tl.sum(wide(b_v, tl.float32) * _row(x, gate, start + o_k, depth, GATED), 2)
    return tl.reshape(tl.sum(b_acc, 2), [1, BN])


@triton.jit
def _row(x, gate, o_k, depth, GATED: tl.constexpr):
    """Columns o_k of the row, float32."""
    if GATED:
        b_g = tl.load(gate + o_k, mask=o_k < depth, other=0.0)
    b_x = tl.load(x + o_k, mask=o_k < depth, other=0.0)
    if GATED:
        b_x = (b_x.to(tl.float32) * b_g.to(tl.float32)).to(b_x.dtype)
    return b_x.to(tl.float32)


@triton.jit
def norm_product(x, b_w, b_gain, b_shift, depth, eps, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """(1,BN) float32 of `layer_norm` of the row x times one piece of weights, BK >= depth."""
    o_k = tl.arange(0, BK)
    b_x = normal(tl.load(x + o_k, mask=o_k < depth, other=0.0), b_gain, b_shift, o_k < depth, depth, eps).to(x.dtype.element_ty)
    b_acc = tl.zeros([KS, BN, 1], dtype=tl.float32)
    return _total(_dot(b_acc, _whole(b_x, BK, KS), b_w, BN, BK, KS))


@triton.jit
def _piece(weight, m_n, depth, start, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """Columns [start, start + BK) of BN rows of weights as (4, 8, KS, BN / 8, BK / (64 KS), 16); the first three axes are a lane's and a warp's number."""
    o_k = tl.arange(0, BK // (64 * KS))[None, None, None, None, :, None] * KS + tl.arange(0, KS)[None, None, :, None, None, None]
    o_k = start + (o_k * 4 + tl.arange(0, 4)[:, None, None, None, None, None]) * 16 + tl.arange(0, 16)[None, None, None, None, None, :]
    o_n = tl.arange(0, BN // 8)[None, None, None, :, None, None] * 8 + tl.arange(0, 8)[None, :, None, None, None, None]
    m_n = tl.reshape(tl.trans(tl.reshape(m_n, [BN // 8, 8])), [1, 8, 1, BN // 8, 1, 1])
    return tl.load(weight + o_n * depth + o_k, mask=m_n & (o_k < depth), other=0.0)


@triton.jit
def _left(b_w, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """A piece as the left operand of KS products, (KS,BN,BK / KS). Columns change places in each 64 as they do in the right one: their sum is the same."""
    b_w = tl.permute(tl.reshape(b_w, [4, 8, KS, BN // 8, BK // (64 * KS), 4, 4]), [2, 3, 1, 4, 5, 0, 6])
    return tl.reshape(b_w, [KS, BN, BK // KS])


@triton.jit
def _add(b_acc, x, gate, b_w, start, depth, GATED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr):
    """b_acc plus the products of columns [start, start + BK). One piece's row goes through shared memory; the registers that it is taken from would
    hold as much as the weights. Of several pieces, each in its turn, it is read straight into them."""
    if AHEAD < 2:
        o_k = start + tl.arange(0, BK)
        b_x = tl.load(x + o_k, mask=o_k < depth, other=0.0)
        if GATED:
            b_x = (b_x.to(tl.float32) * tl.load(gate + o_k, mask=o_k < depth, other=0.0).to(tl.float32)).to(b_x.dtype)
        b_b = _whole(b_x, BK, KS)
    else:
        b_x = _read(x, start, depth, BK, KS)
        if GATED:
            b_x = (b_x.to(tl.float32) * _read(gate, start, depth, BK, KS).to(tl.float32)).to(b_x.dtype)
        b_b = tl.reshape(tl.permute(tl.reshape(b_x, [4, 8, KS, BK // (64 * KS), 4, 4]), [2, 3, 4, 0, 5, 1]), [KS, BK // KS, 8])
    return _dot(b_acc, b_b, b_w, BN, BK, KS)


@triton.jit
def _dot(b_acc, b_b, b_w, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """b_acc (KS,BN,columns of b_b) plus a piece times b_b."""
    return tl.dot(_left(wide(b_w, b_b.dtype), BN, BK, KS), b_b, b_acc, input_precision="ieee")


@triton.jit
def _whole(b_x, BK: tl.constexpr, KS: tl.constexpr):
    """A row's (BK,) as the right operand, (KS,BK / KS,1): it goes through shared memory, so that what was done to it was done once."""
    return tl.reshape(tl.permute(tl.reshape(b_x, [BK // (64 * KS), KS, 4, 4, 4]), [1, 0, 3, 2, 4]), [KS, BK // KS, 1])


@triton.jit
def _read(x, start, depth, BK: tl.constexpr, KS: tl.constexpr):
    """Columns [start, start + BK) of the row x as (4, 8, KS, 1, BK / (64 KS), 2, 8), the second axis of 8 alike: as a piece lies, so that the right operand
    is taken from these registers."""
    o_k = tl.arange(0, BK // (64 * KS))[None, None, None, None, :, None, None] * KS + tl.arange(0, KS)[None, None, :, None, None, None, None]
    o_k = (o_k * 4 + tl.arange(0, 4)[:, None, None, None, None, None, None]) * 16 + tl.arange(0, 2)[None, None, None, None, None, :, None] * 8
    o_k = start + o_k + tl.arange(0, 8)[None, None, None, None, None, None, :] + tl.zeros([4, 8, KS, 1, BK // (64 * KS), 2, 8], dtype=tl.int32)
    return tl.load(x + o_k, mask=o_k < depth, other=0.0)


@triton.jit
def _total(b_acc):
    """(1,BN) of (KS,BN,columns), which are all alike."""
    return tl.sum(tl.max(b_acc, 2), 0)[None, :]

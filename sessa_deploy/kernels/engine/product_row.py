"""`product` of one row, in three forms.

With KS = 1 single multiplications, each column's by all warps; with KS > 1 and 16-bit weights by one warp, which has KS columns. With KS > 1 and 8-bit weights
matrix instructions, of whose 8 columns each is a part of the row: they take less than half of the instructions that single multiplications take with the
conversions to float32 before them, and those are not hidden behind the weights' way from memory. Weights are then held as `strip` in product.py holds them, 16
at a time: a thread reads 16 bytes and has what its matrix instructions take.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.device import open_early
from sessa_deploy.kernels.engine.pointwise import normal_once
from sessa_deploy.kernels.engine.product_columns import together
from sessa_deploy.kernels.engine.widen import BITS as PTX
from sessa_deploy.kernels.engine.widen import wide

SOON = tl.constexpr(4096)  # bytes of a warp's weights up to which they are widened before the wait: 64 registers a thread then


@triton.jit
def row_ahead(weight, m_n, depth, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr):
    """The first AHEAD * BK columns of BN rows of weights, AHEAD > 0; with KS > 1, where AHEAD is 1, as `_fan` has them, of 8-bit weights as `_piece`."""
    tl.static_assert((KS == 1) | (AHEAD == 1), "of a row's weights one step comes ahead")
    if (KS > 1) & (weight.dtype.element_ty.primitive_bitwidth == 8):
        b_w = _piece(weight, m_n, depth, BN, BK, KS)
    elif KS > 1:
        b_w = _fan(weight, m_n, depth, 0, BN, BK, KS)
    else:
        o_k = tl.arange(0, AHEAD * BK)
        b_w = tl.load(weight + tl.arange(0, BN)[:, None] * depth + o_k[None, :], mask=m_n[:, None] & (o_k < depth)[None, :], other=0.0)
    return b_w


@triton.jit
def row_soon(weight, b_w, kind: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, PDL: tl.constexpr):
    """What `row_ahead` gave, in `kind` where it is for matrix instructions and little: such weights are here long before the row is, and what is done to them
    by then takes no time. Of more, the registers would keep other programs out. Called right before `begin`."""
    if (SOON * KS >= BN * BK) & (KS > 1) & (weight.dtype.element_ty.primitive_bitwidth == 8):
        open_early(PDL)
        b_w = wide(b_w, kind)
    return b_w


@triton.jit
def row_product(
    x, gate, weight, b_w, m_n, depth, GATED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr
):
    """(1,BN) float32, as `product.product`. By matrix instructions depth is at most BK, and KS the number of warps, each of which has sums of its own (of
    more, Triton 3.6 gave wrong ones)."""
    if (KS > 1) & (weight.dtype.element_ty.primitive_bitwidth == 8):
        b_y = _dot(_part(x, gate, depth, GATED, BK), b_w, BN, BK, KS)
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
    """(1,BN) float32 of `layer_norm` of the row x times a `_piece` of weights, BK >= depth."""
    o_k = tl.arange(0, BK)
    b_x = normal_once(tl.load(x + o_k, mask=o_k < depth, other=0.0), tl.load(x), b_gain, b_shift, o_k < depth, depth, eps, BK, KS)
    return _dot(_settled(b_x.to(x.dtype.element_ty)), b_w, BN, BK, KS)


@triton.jit
def _piece(weight, m_n, depth, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """BN rows of weights, BK >= depth, as (4, 8, KS, BN / 8, BK / (64 KS), 16); the first three axes are a lane's and a warp's number."""
    o_k = tl.arange(0, BK // (64 * KS))[None, None, None, None, :, None] * KS + tl.arange(0, KS)[None, None, :, None, None, None]
    o_k = (o_k * 4 + tl.arange(0, 4)[:, None, None, None, None, None]) * 16 + tl.arange(0, 16)[None, None, None, None, None, :]
    o_n = tl.arange(0, BN // 8)[None, None, None, :, None, None] * 8 + tl.arange(0, 8)[None, :, None, None, None, None]
    m_n = tl.reshape(tl.trans(tl.reshape(m_n, [BN // 8, 8])), [1, 8, 1, BN // 8, 1, 1])
    return tl.load(weight + o_n * depth + o_k, mask=m_n & (o_k < depth), other=0.0)


@triton.jit
def _part(x, gate, depth, GATED: tl.constexpr, BK: tl.constexpr):
    """The row (BK,) as it is stored."""
    o_k = tl.arange(0, BK)
    b_x = tl.load(x + o_k, mask=o_k < depth, other=0.0)
    if GATED:
        b_x = (b_x.to(tl.float32) * tl.load(gate + o_k, mask=o_k < depth, other=0.0).to(tl.float32)).to(b_x.dtype)
        b_x = _settled(b_x)
    return b_x


@triton.jit
def _settled(b_x):
    """b_x of 16 bits, made here: the compiler may else take all that it is made of through shared memory, and make it in every lane that needs it."""
    if PTX:
        b_x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_x], b_x.dtype, False, 2)
    return b_x


@triton.jit
def _dot(b_x, b_w, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """(1,BN): the row (BK,) times a `_piece`. The row goes through shared memory: it is asked for, and what was done to it was done, once, not by each warp.
    Columns change places in each 64 on both sides alike.

    A matrix instruction waits for the one before it that has the same sums. So a warp's part of the depth is N parts, whose weights are rows of their own and
    whose rows are the columns: of each part's sums its own column is taken. And of the row a thread then has an N-th. Weights up to SOON have a part for each
    64 of a warp's columns: no more than 8, and no more than 64 rows with sums of their own. Of more weights the sums would take the registers.
    """
    N: tl.constexpr = BK // (64 * KS) if SOON * KS >= BN * BK else 1
    C: tl.constexpr = BK // (64 * KS * N)
    PAIRS: tl.constexpr = b_w.dtype == tl.int8
    b_w = wide(b_w, b_x.dtype)
    b_w, b_x = tl.reshape(b_w, [4, 8, KS, BN // 8, C, N, 2, 2, 2, 2]), tl.reshape(b_x, [C, N, KS, 4, 2, 2, 2, 2])
    if PAIRS:
        b_w, b_x = tl.permute(b_w, [2, 5, 3, 1, 4, 6, 7, 0, 8, 9]), tl.permute(b_x, [2, 0, 4, 5, 3, 6, 7, 1])
    else:
        b_w, b_x = tl.permute(b_w, [2, 5, 3, 1, 4, 6, 8, 0, 7, 9]), tl.permute(b_x, [2, 0, 4, 6, 3, 5, 7, 1])
    b_w, b_x = tl.reshape(b_w, [KS, N * BN, C * 64]), tl.reshape(b_x, [KS, C * 64, N])
    b_y = tl.dot(b_w, b_x, tl.zeros([KS, N * BN, N], dtype=tl.float32), input_precision="ieee")
    if N > 1:
        b_own = tl.arange(0, N)[None, :, None, None] == tl.arange(0, N)[None, None, None, :]
        b_y = tl.sum(tl.sum(tl.where(b_own, tl.reshape(b_y, [KS, N, BN, N]), 0.0), 1), 2)
    else:
        b_y = tl.max(b_y, 2)
    return together(tl.reshape(tl.trans(b_y), [1, BN, KS]), 1, BN, KS)

"""Products of 17 to 64 rows: weights go to registers as the matrix instructions take them, and stay out of shared memory, which holds rows alone.

Weights are the left operand, their columns the long side of a matrix instruction, and rows the right one. A thread reads BYTES of weights at a time, and the
rows' columns are put in the order in which those come to it; a sum does not mind. What is on its way while a loop goes round are words of 32 bits: of smaller
numbers each would take a register.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.engine.widen import BITS, words_wide

BYTES = tl.constexpr(16)  # that a thread reads at a time
# Where $5 is not 0; what else comes is not looked at.
_LOAD = tl.constexpr("{ .reg .pred p; setp.ne.b32 p, $5, 0; @p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }")


@triton.jit
def _units(C: tl.constexpr, KS: tl.constexpr):
    """Numbers of the BYTES of weights that stand in a strip, (4, 1, KS, 1, C)."""
    o_c = tl.arange(0, C)[None, None, None, None, :] * KS + tl.arange(0, KS)[None, None, :, None, None]
    return o_c * 4 + tl.arange(0, 4)[:, None, None, None, None]


@triton.jit
def matrix_strip(weight, m_n, depth, start, full, EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """Columns [start, start + BK) of BN rows of a matrix as words, (4, 8, KS, BN / 8, C, 4). Rows that there are not, m_n, repeat the first.

    The first three axes are a lane's and a warp's number. EVEN: columns are read below `full` alone, all of them or none, by loads that are written
    out, since Triton would have those of a loop come through shared memory.
    """
    EACH: tl.constexpr = BYTES * 8 // weight.dtype.element_ty.primitive_bitwidth
    C: tl.constexpr = BK // (4 * EACH * KS)
    o_k = _units(C, KS) * EACH
    o_n = tl.arange(0, BN // 8)[None, None, None, :, None] * 8 + tl.arange(0, 8)[None, :, None, None, None]
    o_n = tl.where(tl.reshape(tl.trans(tl.reshape(m_n, [BN // 8, 8])), [1, 8, 1, BN // 8, 1]), o_n, 0)
    p_w = weight + start + o_n * depth + o_k
    if BITS & EVEN:
        there = (start < full).to(tl.int32)
        b_0, b_1, b_2, b_3 = tl.inline_asm_elementwise(
            _LOAD, "=r,=r,=r,=r,l,r", [p_w, there], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
        )  # fmt: skip
        b_w = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [4, 8, KS, BN // 8, C, 4])
    else:
        p_w = p_w.to(tl.pointer_type(tl.int32), bitcast=True)[:, :, :, :, :, None] + tl.arange(0, 4)[None, None, None, None, None, :]
        b_w = tl.load(p_w, mask=(o_k < depth - start)[:, :, :, :, :, None], other=0)
    return b_w


@triton.jit
def _rows(
    x, gate, rows, row, gate_row, depth, start,
    GATED: tl.constexpr, EACH: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """Columns [start, start + BK) of x, times those of its gate and rounded if GATED, as (KS, BM, BK / KS), in the order of a `matrix_strip`."""
    o_j = tl.arange(0, BK // KS)
    o_k = o_j // 4 % 4 * EACH + o_j // 32 * 8 % EACH + o_j // 16 % 2 * 4 + o_j % 4
    o_k = tl.arange(0, KS)[:, None] * (4 * EACH) + (o_j // (4 * EACH) * (4 * EACH * KS) + o_k)[None, :]
    o_k = tl.max_contiguous(tl.multiple_of(o_k, [1, 4]), [1, 4])
    b_x = _part(x, rows, row, o_k, depth, start, EVEN, BM)
    if GATED:
        b_g = _part(gate, rows, gate_row, o_k, depth, start, EVEN, BM)
        b_x = (b_x.to(tl.float32) * b_g.to(tl.float32)).to(b_x.dtype)
    return b_x


@triton.jit
def _part(x, rows, row, o_k, depth, start, EVEN: tl.constexpr, BM: tl.constexpr):
    """Columns start + o_k (KS, N) of x as (KS, BM, N). Rows from `rows` on repeat the last one."""
    p_x = x + start + tl.minimum(tl.arange(0, BM), rows - 1)[None, :, None] * row + o_k[:, None, :]
    if EVEN:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=(o_k < depth - start)[:, None, :], other=0.0)
    return b_x


@triton.jit
def _dot(b_w, b_x, b_acc, type: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """b_acc (KS,BN,BM) plus the products of a `matrix_strip` of numbers of `type` and of `_rows`."""
    EACH: tl.constexpr = BYTES * 8 // type.primitive_bitwidth
    b_a = tl.reshape(words_wide(b_w, type, b_x.dtype), [4, 8, KS, BN // 8, BK // (4 * EACH * KS), EACH // 8, 2, 4])
    b_a = tl.reshape(tl.permute(b_a, [2, 3, 1, 4, 5, 6, 0, 7]), [KS, BN, BK // KS])
    return tl.dot(b_a, tl.permute(b_x, [0, 2, 1]), b_acc, input_precision="ieee")


@triton.jit
def strips_product(
    x, gate, weight, b_w, rows, m_n, depth, row, gate_row,
    GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """(BM,BN) float32, see `product.product`. b_w: the first AHEAD * BK columns, AHEAD 1 or 2."""
    type: tl.constexpr = weight.dtype.element_ty
    EACH: tl.constexpr = BYTES * 8 // type.primitive_bitwidth
    b_acc = tl.zeros([KS, BN, BM], dtype=tl.float32)
    full = depth // BK * BK
    if AHEAD == 2:  # one value from one turn of the loop to the next: Triton reads no rows ahead in a loop that keeps one for longer
        b_w = tl.permute(tl.reshape(b_w, [4, 8, KS, BN // 8, 2, BK // (4 * EACH * KS), 4]), [0, 1, 2, 3, 5, 6, 4])
    for start in range(0, full, BK):
        b_x = _rows(x, gate, rows, row, gate_row, depth, start, GATED, EACH, True, BM, BK, KS)
        b_next = matrix_strip(weight, m_n, depth, start + AHEAD * BK, full, True, BN, BK, KS)
        if AHEAD == 2:
            b_now, b_second = tl.split(b_w)
            b_next = tl.join(b_second, b_next)
        else:
            b_now = b_w
        b_acc = _dot(b_now, b_x, b_acc, type, BN, BK, KS)
        b_w = b_next
    if full < depth:
        b_last = matrix_strip(weight, m_n, depth, full, full, False, BN, BK, KS)
        b_x = _rows(x, gate, rows, row, gate_row, depth, full, GATED, EACH, False, BM, BK, KS)
        b_acc = _dot(b_last, b_x, b_acc, type, BN, BK, KS)
    return tl.trans(tl.sum(b_acc, 0))

"""Products of 17 to 64 rows: weights and rows in registers as the matrix instructions take them, nothing in shared memory but sums.

Weights are the left operand, their columns the long side of a matrix instruction, and rows the right one, 32 at a time. Programs of a multiprocessor read
the same rows, which its cache then holds; weights they read once each. What is on its way while a loop goes round are words of 32 bits: of smaller numbers
each would take a register.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.engine.widen import words_wide

BYTES = tl.constexpr(16)  # that a thread reads at a time


@triton.jit
def _units(C: tl.constexpr, KS: tl.constexpr):
    """Numbers of the BYTES of weights that stand in a strip, (4, 1, KS, 1, C)."""
    o_c = tl.arange(0, C)[None, None, None, None, :] * KS + tl.arange(0, KS)[None, None, :, None, None]
    return o_c * 4 + tl.arange(0, 4)[:, None, None, None, None]


@triton.jit
def matrix_strip(weight, m_n, depth, start, EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """Columns [start, start + BK) of BN rows of a matrix as words, (4, 8, KS, BN / 8, C, 4). Rows that there are not, m_n, repeat the first."""
    EACH: tl.constexpr = BYTES * 8 // weight.dtype.element_ty.primitive_bitwidth
    o_k = _units(BK // (4 * EACH * KS), KS)[:, :, :, :, :, None] * EACH
    o_n = tl.arange(0, BN // 8)[None, None, None, :, None, None] * 8 + tl.arange(0, 8)[None, :, None, None, None, None]
    o_n = tl.where(tl.reshape(tl.trans(tl.reshape(m_n, [BN // 8, 8])), [1, 8, 1, BN // 8, 1, 1]), o_n, 0)
    p_w = _words(weight + start + o_n * depth + o_k) + tl.arange(0, 4)[None, None, None, None, None, :]
    if EVEN:
        b_w = tl.load(p_w, eviction_policy="evict_first")
    else:
        b_w = tl.load(p_w, mask=o_k < depth - start, other=0, eviction_policy="evict_first")
    return b_w


@triton.jit
def _words(p):
    return p.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def rows_strip(
    x, rows, row, depth, start, EACH: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr
):  # fmt: skip
    """Columns [start, start + BK) of BM rows of x, `row` elements apart, as words, (4, 8, KS, BM / 8, C, EACH / 8, 4). Rows from `rows` on repeat the last."""
    o_k = _units(BK // (4 * EACH * KS), KS)[:, :, :, :, :, None, None] * EACH + tl.arange(0, EACH // 8)[None, None, None, None, None, :, None] * 8
    o_m = tl.arange(0, BM // 8)[None, None, None, :, None, None, None] * 8 + tl.arange(0, 8)[None, :, None, None, None, None, None]
    o_m = tl.minimum(o_m, rows - 1)
    p_x = _words(x + start + o_m * row + o_k) + tl.arange(0, 4)[None, None, None, None, None, None, :]
    if EVEN:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=o_k < depth - start, other=0)
    return b_x


@triton.jit
def strips_dot(
    b_w, b_x, b_g, b_acc, kind: tl.constexpr, type: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr
):  # fmt: skip
    """b_acc (KS,BN,BM) plus the products of a `matrix_strip` and a `rows_strip`, which is times b_g, rounded, if GATED. Columns change places alike."""
    EACH: tl.constexpr = BYTES * 8 // type.primitive_bitwidth
    C: tl.constexpr = BK // (4 * EACH * KS)
    b_a = words_wide(b_w, type, kind)
    b_y = words_wide(b_x, kind, kind)
    if GATED:
        b_y = (b_y.to(tl.float32) * words_wide(b_g, kind, kind).to(tl.float32)).to(kind)
    b_a = tl.permute(tl.reshape(b_a, [4, 8, KS, BN // 8, C, EACH // 8, 2, 2, 2]), [2, 3, 1, 4, 5, 7, 0, 6, 8])
    b_y = tl.permute(tl.reshape(b_y, [4, 8, KS, BM // 8, C, EACH // 8, 2, 2, 2]), [2, 4, 5, 7, 0, 6, 8, 3, 1])
    return tl.dot(tl.reshape(b_a, [KS, BN, BK // KS]), tl.reshape(b_y, [KS, BK // KS, BM]), b_acc, input_precision="ieee")


@triton.jit
def direct_product(
    x, gate, weight, b_w, rows, m_n, depth, row, gate_row,
    GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """(BM,BN) float32, see `product.product`. b_w: the first BK columns."""
    kind: tl.constexpr = x.dtype.element_ty
    type: tl.constexpr = weight.dtype.element_ty
    EACH: tl.constexpr = BYTES * 8 // type.primitive_bitwidth
    b_acc = tl.zeros([KS, BN, BM], dtype=tl.float32)
    full = depth // BK * BK
    if AHEAD == 2:
        b_x, b_g = _both(x, gate, rows, row, gate_row, depth, 0, GATED, EACH, False, BM, BK, KS)
        for start in tl.range(BK, full, BK, num_stages=1):
            b_next = matrix_strip(weight, m_n, depth, start, True, BN, BK, KS)
            b_y, b_h = _both(x, gate, rows, row, gate_row, depth, start, GATED, EACH, True, BM, BK, KS)
            b_acc = strips_dot(b_w, b_x, b_g, b_acc, kind, type, GATED, BM, BN, BK, KS)
            b_w, b_x, b_g = b_next, b_y, b_h
    elif AHEAD == 3:
        C: tl.constexpr = BK // (4 * EACH * KS)
        b_w, b_second = tl.split(tl.permute(tl.reshape(b_w, [4, 8, KS, BN // 8, 2, C, 4]), [0, 1, 2, 3, 5, 6, 4]))
        for start in tl.range(2 * BK, full, BK, num_stages=1):
            b_next = matrix_strip(weight, m_n, depth, start, True, BN, BK, KS)
            b_y, b_h = _both(x, gate, rows, row, gate_row, depth, start - 2 * BK, GATED, EACH, True, BM, BK, KS)
            b_acc = strips_dot(b_w, b_y, b_h, b_acc, kind, type, GATED, BM, BN, BK, KS)
            b_w, b_second = b_second, b_next
        last = tl.maximum(full - 2 * BK, 0)
        b_x, b_g = _both(x, gate, rows, row, gate_row, depth, last, GATED, EACH, False, BM, BK, KS)
        b_acc = strips_dot(b_w, b_x, b_g, b_acc, kind, type, GATED, BM, BN, BK, KS)
        b_w = b_second
        b_x, b_g = _both(x, gate, rows, row, gate_row, depth, last + BK, GATED, EACH, False, BM, BK, KS)
    else:
        for start in tl.range(BK, full, BK, num_stages=1):
            b_next = matrix_strip(weight, m_n, depth, start, True, BN, BK, KS)
            b_y, b_h = _both(x, gate, rows, row, gate_row, depth, start - BK, GATED, EACH, True, BM, BK, KS)
            b_acc = strips_dot(b_w, b_y, b_h, b_acc, kind, type, GATED, BM, BN, BK, KS)
            b_w = b_next
        b_x, b_g = _both(x, gate, rows, row, gate_row, depth, tl.maximum(full - BK, 0), GATED, EACH, False, BM, BK, KS)
    b_acc = strips_dot(b_w, b_x, b_g, b_acc, kind, type, GATED, BM, BN, BK, KS)
    if tl.maximum(full, (2 if AHEAD == 3 else 1) * BK) < depth:
        b_w = matrix_strip(weight, m_n, depth, full, False, BN, BK, KS)
        b_x, b_g = _both(x, gate, rows, row, gate_row, depth, full, GATED, EACH, False, BM, BK, KS)
        b_acc = strips_dot(b_w, b_x, b_g, b_acc, kind, type, GATED, BM, BN, BK, KS)
    return tl.trans(tl.sum(b_acc, 0))


@triton.jit
def _both(
    x, gate, rows, row, gate_row, depth, start,
    GATED: tl.constexpr, EACH: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """`rows_strip` of x and of its gate; twice that of x if not GATED."""
    b_x = rows_strip(x, rows, row, depth, start, EACH, EVEN, BM, BK, KS)
    b_g = b_x
    if GATED:
        b_g = rows_strip(gate, rows, gate_row, depth, start, EACH, EVEN, BM, BK, KS)
    return b_x, b_g

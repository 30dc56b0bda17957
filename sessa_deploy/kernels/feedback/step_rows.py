"""A step of 2 to ROWS new rows of feedback attention: the past read once for all of them.

s_t = f_t + gamma_t * (sum_j alpha[t,j] s_j over the past rows j < past_length[b] and the new rows j < t). `feedback_rows_partial` gives each split of the past
to a program, for which the T queries are one matrix tile of ROWS rows, whatever T is; a program more makes the scores of the new rows among themselves.
`feedback_rows_combine` adds the splits in a fixed order, joins both normalisers and inverts I - (gamma alpha) of the new rows by forward substitution, all
float32; then s = (I - gamma alpha)^-1 (f + gamma * the past's sum). A past's weights go into its product as pairs of the storage type. Past rows from
past_length[b] on are never read; a new row's NaN or Inf reaches itself and later rows only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.device import rows_each, splits_used
from sessa_deploy.kernels.device_rows import ROWS, join


@triton.jit
def _scores(b_q, k, o_row, stride, o_kd, mask, scale):
    """(ROWS,R) float32, of N chunks' products b_q (N,ROWS,L) with rows o_row (R,) of k, in all N tiles alike: (N,ROWS,R)."""
    b_k = tl.load(k + o_row[None, None, :] * stride + o_kd, mask=mask, other=0.0)
    b_x = tl.dot(b_q, b_k, input_precision="ieee")
    return tl.broadcast_to(tl.sum(b_x, 0, keep_dims=True), b_x.shape) * scale


@triton.jit
def piece(
    item, q, k, past_k, past_s, past_length, part, stat, scores, stride_kb, stride_kr, stride_sb, stride_sr, i_b, tokens, splits, capacity, width, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What program `item` of 1 + splits of sequence i_b computes: the first the scores (B,ROWS,ROWS) of the new rows, the others a split each.

    part (B,T,splits,D), stat (.., 2). A tile is (BLOCK_R, BLOCK_C, BLOCK_L): rows, chunks of D, lanes.
    """
    i_split = item - 1
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    each = rows_each(length, splits, BLOCK_R)
    first = i_split * each
    if first < length:  # of the new rows it is below 0
        o_c, o_t, o_l, o_r = tl.arange(0, BLOCK_C), tl.arange(0, ROWS), tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
        m_t = o_t < tokens
        o_nd = o_c[:, None, None] * BLOCK_L + o_l[None, None, :]  # (C,1,L)
        o_kd = o_c[:, None, None] * BLOCK_L + o_l[None, :, None]  # (C,L,1)
        m_nd, m_kd = o_nd < width, o_kd < width
        o_new = i_b * tokens * width
        b_q = tl.load(q + o_new + o_t[None, :, None] * width + o_nd, mask=m_t[None, :, None] & m_nd, other=0.0)
        if i_split < 0:
            b_x = _scores(b_q, k + o_new, o_r, width, o_kd, (o_r < tokens)[None, None, :] & m_kd, scale)
            p_x = scores + i_b * ROWS * ROWS + o_t[:, None] * ROWS + o_r[None, :]
            tl.store(p_x, tl.max(b_x, 0), mask=m_t[:, None] & (o_r < ROWS)[None, :])
        else:
            SHIFT: tl.constexpr = 12.0 if past_s.dtype.element_ty == tl.float16 else 0.0  # of all weights alike: small ones stay normal numbers
            BACK: tl.constexpr = 2.0**-12 if past_s.dtype.element_ty == tl.float16 else 1.0
            p_k, p_s, end = past_k + i_b * stride_kb, past_s + i_b * stride_sb, tl.minimum(first + each, length)
            b_max = tl.full([BLOCK_C, ROWS], float("-inf"), dtype=tl.float32)
            b_sum = tl.zeros([BLOCK_C, ROWS], dtype=tl.float32)
            b_acc = tl.zeros([BLOCK_C, ROWS, BLOCK_L], dtype=tl.float32)
            for start in tl.range(first, end, BLOCK_R, num_stages=STAGES):
                o_j = start + o_r
                m_j = o_j < end
                o_j = o_j.to(tl.int64)
                b_x = _scores(b_q, p_k, o_j, stride_kr, o_kd, m_j[None, None, :] & m_kd, scale)
                b_s = tl.load(p_s + o_j[None, :, None] * stride_sr + o_nd, mask=m_j[None, :, None] & m_nd, other=0.0)
                b_x = tl.where(m_j[None, None, :], b_x, float("-inf"))
                b_top = tl.maximum(b_max, tl.max(b_x, 2))
                b_fade = tl.exp2(b_max - b_top)
                b_p = tl.exp2(b_x - (b_top - SHIFT)[:, :, None])
                b_high = b_p.to(b_s.dtype)
                b_low = (b_p - b_high.to(tl.float32)).to(b_s.dtype)
                b_sum = b_sum * b_fade + tl.sum(b_p, 2)
                b_acc = tl.dot(b_high, b_s, b_acc * b_fade[:, :, None], input_precision="ieee")
                b_acc = tl.dot(b_low, b_s, b_acc, input_precision="ieee")
                b_max = b_top
            o_part = (i_b * tokens + o_t) * splits + i_split
            tl.store(part + o_part[None, :, None] * width + o_nd, b_acc * BACK, mask=m_t[None, :, None] & m_nd)
            tl.store(stat + o_part * 2, tl.max(b_max, 0), mask=m_t)
            tl.store(stat + o_part * 2 + 1, tl.max(b_sum, 0) * BACK, mask=m_t)


@triton.jit
def added(part, stat, scores, gamma, length, i_b, o_t, tokens, splits, rows, width, o_d, m_d, BLOCK_S: tl.constexpr):
    """Columns o_d of gamma times the past's share of the sums of new rows o_t (N,); BLOCK_S covers every split, rows is what one takes at least."""
    m_t = o_t < tokens
    o_q, o_j = i_b * tokens + o_t, tl.arange(0, ROWS)
    b_past, w_past, m_past = join(part, stat, o_q * splits, m_t, splits_used(length, splits, rows), width, o_d, m_d, BLOCK_S)
    m_x = m_t[:, None] & (o_j[None, :] < o_t[:, None])
    b_x = tl.load(scores + (i_b * ROWS + o_t)[:, None] * ROWS + o_j[None, :], mask=m_x, other=float("-inf"))
    b_top = tl.maximum(m_past, tl.max(b_x, 1))
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_fade = tl.exp2(m_past - b_base)
    b_sum = w_past * b_fade + tl.sum(tl.exp2(b_x - b_base[:, None]), 1)
    b_share = tl.load(gamma + o_q, mask=m_t, other=0.0) * (b_fade / b_sum)
    return tl.where(((length > 0) | (o_t > 0))[:, None], b_past * b_share[:, None], 0.0)


@triton.jit
def invert(stat, scores, gamma, inverse, length, i_b, tokens, splits, rows, BLOCK_S: tl.constexpr):
    """inverse (B,ROWS,ROWS) = (I - gamma alpha)^-1 of the new rows of sequence i_b; rows from T on are those of I."""
    o_t, o_s = tl.arange(0, ROWS), tl.arange(0, BLOCK_S)
    m_t = o_t < tokens
    o_part = (i_b * tokens + o_t)[:, None] * splits + o_s[None, :]
    m_part = m_t[:, None] & (o_s < splits_used(length, splits, rows))[None, :]
    b_max = tl.load(stat + o_part * 2, mask=m_part, other=float("-inf"))
    b_sum = tl.load(stat + o_part * 2 + 1, mask=m_part, other=0.0)
    m_x = m_t[:, None] & (o_t[None, :] < o_t[:, None])
    b_x = tl.load(scores + i_b * ROWS * ROWS + o_t[:, None] * ROWS + o_t[None, :], mask=m_x, other=float("-inf"))
    b_gamma = tl.load(gamma + i_b * tokens + o_t, mask=m_t, other=0.0)
    b_top = tl.maximum(tl.max(b_max, 1), tl.max(b_x, 1))
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)[:, None]
    b_x = tl.exp2(b_x - b_base)
    b_total = tl.sum(b_sum * tl.exp2(b_max - b_base), 1) + tl.sum(b_x, 1)
    b_a = tl.where(m_x, b_x * (b_gamma / b_total)[:, None], 0.0)
    # Row i of the inverse x is e_i + sum_j a[i,j] x[j,:]; b_i[c,j] = x[j,c], so that a sum over j stays inside a warp.
    b_i = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0)
    for i in range(1, tokens):
        b_row = tl.sum(tl.where(o_t[:, None] == i, b_a, 0.0), 0)
        b_i += tl.where(o_t[None, :] == i, tl.sum(b_row[None, :] * b_i, 1)[:, None], 0.0)
    tl.store(inverse + i_b * ROWS * ROWS + o_t[None, :] * ROWS + o_t[:, None], b_i)


@triton.jit
def solved(b_inverse, b_y, o_t):
    """b_inverse (ROWS,ROWS) times b_y (ROWS,N), both float32. What is not finite goes to its own row and those behind it: a factor of zero does not stop it."""
    fine = tl.abs(b_y) < float("inf")
    b_first = tl.min(tl.where(fine, ROWS, o_t[:, None]), 0)
    b_s = tl.dot(b_inverse, tl.where(fine, b_y, 0.0), input_precision="ieee")
    return tl.where(o_t[:, None] < b_first[None, :], b_s, float("nan"))

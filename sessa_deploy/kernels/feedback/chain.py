"""The solves with one program for a whole chain: `feedback_solve` and `feedback_solve_transposed` for batches that fill the GPU with (sequence, columns).

A program goes through the row blocks of its sequence one after the other, so nobody waits for anybody: no ticket, no counter, no fence beyond a barrier. The
sums are those of the other solves, in the same order, to the same bits. Every product is on one path: no branch holds one.
"""

import triton
import triton.language as tl

from sessa_deploy.kernels.feedback.tiles import apply_inverse, finite, store_split
from sessa_deploy.kernels.launch import table


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_chain"))
def feedback_chain(
    e, peak, row_peak, factor, inverse, inverse_low, near, near_low, near_scale, f, s, s_low, w, w_low, scales, past_length, sync,
    T, D, C, R, NP, NT, row0, B, panel, panels, keep,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, BN columns of D), for bfloat16 storage and blocks of 128 rows. See `feedback_solve`; sync is not used."""
    tiles_n = tl.cdiv(D, BN)
    i_n, i_b = tl.program_id(0) % tiles_n, (tl.program_id(0) // tiles_n).to(tl.int64)
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BT)
    o_r, o_k, o_n = tl.arange(0, BT), tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    o_e = o_r[:, None] * C + o_k[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    o_i = o_r[:, None] * BT + o_k[None, :]
    p_w = w + i_b * C * D
    p_scale = scales + i_b * NT * tiles_n + i_n
    deep = (B * R).to(tl.int64)
    for i_r in range(tl.cdiv(tl.minimum(R, T - row0), BT)):
        block = row0 // BT + i_r
        p_e = e + (i_b * R + i_r * BT) * C
        p_peak = peak + i_b * NT * R + i_r * BT + o_r
        p_row = i_b * R + i_r * BT + o_r
        start = row0 + i_r * BT
        m_f = (start + o_r < T)[:, None] & m_n
        p_f = (i_b * T + start) * D
        p_i = (i_b * R + i_r * BT) * BT + o_i
        b_top, b_factor = tl.load(row_peak + p_row), tl.load(factor + p_row)
        if AHEAD == 2:
            b_f = tl.load(f + p_f + o_w, mask=m_f, other=0.0)
            b_ih, b_il = tl.load(inverse + p_i), tl.load(inverse_low + p_i)
        acc = tl.zeros([BT, BN], dtype=tl.float32)
        for j in tl.range(0, past_tiles + tl.maximum(block - 2, 0), num_stages=STAGES):
            i_t = tl.where(j < past_tiles, j, j - past_tiles + NP)
            b_e = tl.load(p_e + i_t * BT + o_e)
            b_w = tl.load(p_w + i_t.to(tl.int64) * BT * D + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
            b_r = b_factor * tl.exp(tl.load(p_peak + i_t.to(tl.int64) * R) - b_top)
            b_r = b_r * tl.load(p_scale + i_t * tiles_n)
            acc += tl.dot(b_e, b_w) * b_r[:, None]
        m_2, m_1 = block > 1, block > 0
        i_2, i_1 = NP + tl.maximum(block - 2, 0), NP + tl.maximum(block - 1, 0)
        if AHEAD < 2:
            b_f = tl.load(f + p_f + o_w, mask=m_f, other=0.0)
            b_ih, b_il = tl.load(inverse + p_i), tl.load(inverse_low + p_i)
        b_r2 = tl.load(near_scale + deep + p_row, mask=m_2, other=0.0) * tl.load(p_scale + i_2 * tiles_n, mask=m_2, other=0.0)
        b_r1 = tl.load(near_scale + p_row, mask=m_1, other=0.0) * tl.load(p_scale + i_1 * tiles_n, mask=m_1, other=0.0)
        if AHEAD > 0:
            b_n = tl.load(near + deep * BT + p_i, mask=m_2, other=0.0)
            b_w = tl.load(p_w + i_2.to(tl.int64) * BT * D + o_w, mask=m_n & m_2, other=0.0, cache_modifier=".cg")
        b_x = acc + b_f.to(tl.float32)
        m_ok = finite(b_x) & finite(b_factor)[:, None]
        b_s = apply_inverse(b_ih, b_il, tl.where(m_ok, b_x, 0.0), True)
        if tl.max(tl.max(tl.where(m_ok, 0, 1), axis=1), axis=0) > 0:  # rare: poison each column from its first bad row on, not the rows before it
            b_first = tl.min(tl.where(m_ok, BT, o_r[:, None]), axis=0)
            b_s = tl.where(o_r[:, None] >= b_first[None, :], float("nan"), b_s)
        if AHEAD == 0:
            b_n = tl.load(near + deep * BT + p_i, mask=m_2, other=0.0)
            b_w = tl.load(p_w + i_2.to(tl.int64) * BT * D + o_w, mask=m_n & m_2, other=0.0, cache_modifier=".cg")
        b_n1 = tl.load(near + p_i, mask=m_1, other=0.0)
        b_w1 = tl.load(p_w + i_1.to(tl.int64) * BT * D + o_w, mask=m_n & m_1, other=0.0, cache_modifier=".cg")
        b_s += tl.dot(b_n, b_w) * b_r2[:, None]
        b_s += tl.dot(b_n1, b_w1) * b_r1[:, None]
        amax = tl.max(tl.max(tl.abs(b_s), axis=1), axis=0)
        p_tile = (NP + block).to(tl.int64) * BT * D
        store_split(b_s, amax, p_w + p_tile, p_w, scales, o_w, (i_b * NT + NP + block) * tiles_n + i_n, m_n, True, False)
        b_out = b_s.to(s.dtype.element_ty)
        tl.store(s + p_f + o_w, b_out, mask=m_f)
        tl.store(s_low + p_f + o_w, (b_s - b_out.to(tl.float32)).to(s.dtype.element_ty), mask=m_f & (keep != 0))
        tl.debug_barrier()  # what one thread stored, others read in the blocks to come


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_chain_transposed"))
def feedback_chain_transposed(
    e, factor, inverse, inverse_low, near, near_low, near_scale, ds, u, u_low, w, w_low, scales, carry, dpast_s, past_length, bad, sync,
    T, P, D, C, R, NP, row0, blocks, B, panel, panels, add,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """`feedback_solve_transposed` for the only panel without a past, as in `feedback_chain`; carry, dpast_s and sync are not used."""
    tiles_n = tl.cdiv(D, BN)
    i_n, i_b = tl.program_id(0) % tiles_n, (tl.program_id(0) // tiles_n).to(tl.int64)
    end = T - tl.load(bad + i_b)
    o_r, o_k, o_n = tl.arange(0, BT), tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    o_e = o_k[:, None] * C + o_r[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    o_i = o_k[:, None] * BT + o_r[None, :]
    p_w = w + i_b * R * D
    p_scale = scales + i_b * (R // BT) * tiles_n + i_n
    deep = (B * R).to(tl.int64)
    for rank in range(blocks):
        i_r = blocks - 1 - rank
        start = i_r * BT
        p_e = e + i_b * R * C + start
        p_row = i_b * R + start + o_r
        m_f = (start + o_r < T)[:, None] & m_n
        m_ok = (start + o_r < end)[:, None] & m_n
        p_f = (i_b * T + start) * D
        p_i = (i_b * R + start) * BT + o_i
        if AHEAD == 2:
            b_ds = tl.load(ds + p_f + o_w, mask=m_ok, other=0.0)
            b_ih, b_il = tl.load(inverse + p_i), tl.load(inverse_low + p_i)
        acc = tl.zeros([BT, BN], dtype=tl.float32)
        for j in tl.range(0, tl.maximum(rank - 2, 0), num_stages=STAGES):
            i_l = (blocks - 1 - j).to(tl.int64)
            b_e = tl.load(p_e + i_l * BT * C + o_e)
            b_w = tl.load(p_w + i_l * BT * D + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
            acc += tl.dot(tl.trans(b_e), b_w) * tl.load(p_scale + i_l * tiles_n)
        m_2, m_1 = rank > 1, rank > 0
        i_2, i_1 = tl.minimum(i_r + 2, blocks - 1), tl.minimum(i_r + 1, blocks - 1)
        if AHEAD < 2:
            b_ds = tl.load(ds + p_f + o_w, mask=m_ok, other=0.0)
            b_ih, b_il = tl.load(inverse + p_i), tl.load(inverse_low + p_i)
        b_factor = tl.load(factor + p_row)
        b_r2 = tl.load(near_scale + deep + p_row, mask=m_2, other=0.0) * tl.load(p_scale + i_2 * tiles_n, mask=m_2, other=0.0)
        b_r1 = tl.load(near_scale + p_row, mask=m_1, other=0.0) * tl.load(p_scale + i_1 * tiles_n, mask=m_1, other=0.0)
        if AHEAD > 0:
            b_n = tl.load(near + deep * BT + p_i, mask=m_2, other=0.0)
            b_w = tl.load(p_w + i_2.to(tl.int64) * BT * D + o_w, mask=m_n & m_2, other=0.0, cache_modifier=".cg")
        b_x = acc + b_ds.to(tl.float32)
        b_u = apply_inverse(tl.trans(b_ih), tl.trans(b_il), b_x, True)
        if AHEAD == 0:
            b_n = tl.load(near + deep * BT + p_i, mask=m_2, other=0.0)
            b_w = tl.load(p_w + i_2.to(tl.int64) * BT * D + o_w, mask=m_n & m_2, other=0.0, cache_modifier=".cg")
        b_n1 = tl.load(near + p_i, mask=m_1, other=0.0)
        b_w1 = tl.load(p_w + i_1.to(tl.int64) * BT * D + o_w, mask=m_n & m_1, other=0.0, cache_modifier=".cg")
        b_u += tl.dot(tl.trans(b_n), b_w) * b_r2[:, None]
        b_u += tl.dot(tl.trans(b_n1), b_w1) * b_r1[:, None]
        b_w = b_u * b_factor[:, None]
        amax = tl.max(tl.max(tl.abs(b_w), axis=1), axis=0)
        store_split(b_w, amax, p_w + i_r.to(tl.int64) * BT * D, p_w, scales, o_w, (i_b * (R // BT) + i_r) * tiles_n + i_n, m_n, True, False)
        b_out = b_u.to(u.dtype.element_ty)
        tl.store(u + p_f + o_w, b_out, mask=m_f)
        tl.store(u_low + p_f + o_w, (b_u - b_out.to(tl.float32)).to(u.dtype.element_ty), mask=m_f)
        tl.debug_barrier()

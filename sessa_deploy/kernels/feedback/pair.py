"""The solves of feedback attention two row blocks at a time: half the reads of s, and one handshake between programs for two steps of the chain.

The sums are those of `feedback_solve` and `feedback_solve_transposed`, in the same order. For 16-bit storage whose near blocks read the high half alone.
Rows go in twos, so a panel's rows are padded to 2 BT; what a pair computes beyond the last block is never stored.
"""

import triton
import triton.language as tl

from sessa_deploy.kernels.feedback.tiles import apply_inverse, finite, power_scale, wait_for
from sessa_deploy.kernels.launch import table


@triton.jit
def scaled(b_x, scales, p_scale, there):
    """b_x over a power of two as float16, and that power, which also goes to scales."""
    c, inv = power_scale(tl.max(tl.max(tl.abs(b_x), axis=1), axis=0))
    tl.store(scales + p_scale, inv, mask=there)
    return (b_x * c).to(tl.float16), inv


@triton.jit
def within_block(acc, f, inverse, inverse_low, p_f, p_i, m_f, o_w, o_i, b_factor, o_r, BT: tl.constexpr):
    """inverse (f + acc), each column poisoned from its first row on that is not finite."""
    b_x = acc + tl.load(f + p_f + o_w, mask=m_f, other=0.0).to(tl.float32)
    m_ok = finite(b_x) & finite(b_factor)[:, None]
    b_s = apply_inverse(tl.load(inverse + p_i + o_i), tl.load(inverse_low + p_i + o_i), tl.where(m_ok, b_x, 0.0), True)
    if tl.max(tl.max(tl.where(m_ok, 0, 1), axis=1), axis=0) > 0:
        b_first = tl.min(tl.where(m_ok, BT, o_r[:, None]), axis=0)
        b_s = tl.where(o_r[:, None] >= b_first[None, :], float("nan"), b_s)
    return b_s


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve_pair"))
def feedback_solve_pair(
    e, peak, row_peak, factor, inverse, inverse_low, near, near_low, near_scale, f, s, s_low, w, w_low, scales, past_length, sync,
    T, D, C, R, NP, NT, row0, B, panel, panels, keep,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`feedback_solve` for blocks a and b = a + 1 of a panel, one program per (pair, sequence, BN columns of D)."""
    tiles_n = tl.cdiv(D, BN)
    ticket = tl.atomic_add(sync + panel, 1, sem="relaxed", scope="gpu")
    i_n = ticket % tiles_n
    i_b = ((ticket // tiles_n) % B).to(tl.int64)
    i_r = ticket // (tiles_n * B) * 2
    block = row0 // BT + i_r
    p_done = sync + panels + i_b * tiles_n + i_n
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BT)
    far = past_tiles + tl.maximum(block - 2, 0)

    o_r, o_k, o_n = tl.arange(0, BT), tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    o_e = o_r[:, None] * C + o_k[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    o_i = o_r[:, None] * BT + o_k[None, :]
    p_e = e + (i_b * R + i_r * BT) * C
    p_w = w + i_b * C * D
    p_peak = peak + i_b * NT * R + i_r * BT + o_r
    p_scale = scales + i_b * NT * tiles_n + i_n
    p_row = i_b * R + i_r * BT + o_r
    b_top, b_top_b = tl.load(row_peak + p_row), tl.load(row_peak + p_row + BT)
    b_factor, b_factor_b = tl.load(factor + p_row), tl.load(factor + p_row + BT)

    acc = tl.zeros([BT, BN], dtype=tl.float32)
    acc_b = tl.zeros([BT, BN], dtype=tl.float32)
    i = 0
    while i < far:
        stop = past_tiles
        if i >= past_tiles:
            stop = tl.minimum(past_tiles + wait_for(p_done, i - past_tiles + 1), far)
        for j in tl.range(i, stop, num_stages=STAGES):
            i_t = tl.where(j < past_tiles, j, j - past_tiles + NP)
            b_w = tl.load(p_w + i_t.to(tl.int64) * BT * D + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
            b_c = tl.load(p_scale + i_t * tiles_n)
            b_r = b_factor * tl.exp(tl.load(p_peak + i_t.to(tl.int64) * R) - b_top) * b_c
            acc += tl.dot(tl.load(p_e + i_t * BT + o_e), b_w) * b_r[:, None]
            b_r = b_factor_b * tl.exp(tl.load(p_peak + i_t.to(tl.int64) * R + BT) - b_top_b) * b_c
            acc_b += tl.dot(tl.load(p_e + BT * C + i_t * BT + o_e), b_w) * b_r[:, None]
        i = stop

    start = row0 + i_r * BT
    p_f = (i_b * T + start) * D
    p_i = (i_b * R + i_r * BT) * BT
    deep = (B * R).to(tl.int64) * BT  # between near[0] and near[1]
    m_a = (start + o_r < T)[:, None] & m_n
    m_b = (start + BT + o_r < T)[:, None] & m_n
    b_s = within_block(acc, f, inverse, inverse_low, p_f, p_i, m_a, o_w, o_i, b_factor, o_r, BT)

    # block a - 2: near a, the last of the far ones for b
    there = block >= 2
    b_near = tl.load(near + p_i + deep + o_i, mask=there, other=0.0)
    b_e = tl.load(p_e + BT * C + (NP + block - 2) * BT + o_e, mask=there, other=0.0)
    b_p = tl.load(p_peak + BT + (NP + block - 2).to(tl.int64) * R, mask=there, other=float("-inf"))
    b_r = tl.load(near_scale + p_row + B * R, mask=there, other=0.0)
    wait_for(p_done, block - 1)
    b_c = tl.load(p_scale + (NP + block - 2) * tiles_n, mask=there, other=0.0)
    b_w = tl.load(p_w + (NP + block - 2).to(tl.int64) * BT * D + o_w, mask=m_n & there, other=0.0, cache_modifier=".cg")
    b_s += tl.dot(b_near, b_w) * (b_r * b_c)[:, None]
    acc_b += tl.dot(b_e, b_w) * (b_factor_b * tl.exp(b_p - b_top_b) * b_c)[:, None]
    b_sb = within_block(acc_b, f, inverse, inverse_low, p_f + D.to(tl.int64) * BT, p_i + BT * BT, m_b, o_w, o_i, b_factor_b, o_r, BT)

    # block a - 1: the nearest to a, near b
    there = block >= 1
    b_near = tl.load(near + p_i + o_i, mask=there, other=0.0)
    b_near_b = tl.load(near + p_i + deep + BT * BT + o_i, mask=there, other=0.0)
    b_r = tl.load(near_scale + p_row, mask=there, other=0.0)
    b_r_b = tl.load(near_scale + p_row + B * R + BT, mask=there, other=0.0)
    wait_for(p_done, block)
    b_c = tl.load(p_scale + (NP + block - 1) * tiles_n, mask=there, other=0.0)
    b_w = tl.load(p_w + (NP + block - 1).to(tl.int64) * BT * D + o_w, mask=m_n & there, other=0.0, cache_modifier=".cg")
    b_s += tl.dot(b_near, b_w) * (b_r * b_c)[:, None]
    b_wa, b_ca = scaled(b_s, scales, (i_b * NT + NP + block) * tiles_n + i_n, True)
    p_tile = (NP + block).to(tl.int64) * BT * D
    tl.store(p_w + p_tile + o_w, b_wa, mask=m_n)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, block + 1, sem="release", scope="gpu")
    b_sb += tl.dot(b_near_b, b_w) * (b_r_b * b_c)[:, None]

    # block a: the nearest to b
    b_near = tl.load(near + p_i + BT * BT + o_i)
    b_r = tl.load(near_scale + p_row + BT)
    b_sb += tl.dot(b_near, b_wa) * (b_r * b_ca)[:, None]
    more = start + BT < T
    b_wb, _ = scaled(b_sb, scales, (i_b * NT + NP + block + 1) * tiles_n + i_n, more)
    tl.store(p_w + p_tile + D.to(tl.int64) * BT + o_w, b_wb, mask=m_n & more)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, block + 2, sem="release", scope="gpu")
    b_out, b_out_b = b_s.to(s.dtype.element_ty), b_sb.to(s.dtype.element_ty)
    tl.store(s + p_f + o_w, b_out, mask=m_a)
    tl.store(s_low + p_f + o_w, (b_s - b_out.to(tl.float32)).to(s.dtype.element_ty), mask=m_a & (keep != 0))
    p_f += BT * D
    tl.store(s + p_f + o_w, b_out_b, mask=m_b)
    tl.store(s_low + p_f + o_w, (b_sb - b_out_b.to(tl.float32)).to(s.dtype.element_ty), mask=m_b & (keep != 0))


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve_transposed_pair"))
def feedback_solve_transposed_pair(
    e, factor, inverse, inverse_low, near, near_scale, ds, u, u_low, w, scales, bad, sync, T, D, C, R, blocks, B,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`feedback_solve_transposed` for blocks a and b = a - 1 of the only panel, without a past; one program per (pair, sequence, BN columns of D)."""
    tiles_n = tl.cdiv(D, BN)
    ticket = tl.atomic_add(sync, 1, sem="relaxed", scope="gpu")
    i_n = ticket % tiles_n
    i_b = ((ticket // tiles_n) % B).to(tl.int64)
    rank = ticket // (tiles_n * B) * 2
    i_r = blocks - 1 - rank
    i_rb = tl.maximum(i_r - 1, 0)
    more = i_r > 0
    p_done = sync + 1 + i_b * tiles_n + i_n
    far = tl.maximum(rank - 2, 0)

    o_r, o_k, o_n = tl.arange(0, BT), tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    o_e = o_k[:, None] * C + o_r[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    o_i = o_k[:, None] * BT + o_r[None, :]
    p_e = e + i_b * R * C + i_r * BT
    p_eb = e + i_b * R * C + i_rb * BT
    p_w = w + i_b * R * D
    p_scale = scales + i_b * (R // BT) * tiles_n + i_n

    acc = tl.zeros([BT, BN], dtype=tl.float32)
    acc_b = tl.zeros([BT, BN], dtype=tl.float32)
    i = 0
    while i < far:
        stop = tl.minimum(wait_for(p_done, i + 1), far)
        for j in tl.range(i, stop, num_stages=STAGES):
            i_l = (blocks - 1 - j).to(tl.int64)
            b_w = tl.load(p_w + i_l * BT * D + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
            b_c = tl.load(p_scale + i_l * tiles_n)
            acc += tl.dot(tl.trans(tl.load(p_e + i_l * BT * C + o_e)), b_w) * b_c
            acc_b += tl.dot(tl.trans(tl.load(p_eb + i_l * BT * C + o_e)), b_w) * b_c
        i = stop

    end = T - tl.load(bad + i_b)
    p_row, p_row_b = i_b * R + i_r * BT + o_r, i_b * R + i_rb * BT + o_r
    p_i, p_ib = (i_b * R + i_r * BT) * BT, (i_b * R + i_rb * BT) * BT
    p_f, p_fb = (i_b * T + i_r * BT) * D, (i_b * T + i_rb * BT) * D
    deep = (B * R).to(tl.int64) * BT  # between near[0] and near[1]
    b_x = acc + tl.load(ds + p_f + o_w, mask=(i_r * BT + o_r < end)[:, None] & m_n, other=0.0).to(tl.float32)
    b_u = apply_inverse(tl.trans(tl.load(inverse + p_i + o_i)), tl.trans(tl.load(inverse_low + p_i + o_i)), b_x, True)

    # block a + 2: near a, the last of the far ones for b
    there = rank >= 2
    b_near = tl.load(near + p_i + deep + o_i, mask=there, other=0.0)
    b_e = tl.load(p_eb + (i_r + 2).to(tl.int64) * BT * C + o_e, mask=there, other=0.0)
    b_r = tl.load(near_scale + p_row + B * R, mask=there, other=0.0)
    wait_for(p_done, rank - 1)
    b_c = tl.load(p_scale + (i_r + 2) * tiles_n, mask=there, other=0.0)
    b_w = tl.load(p_w + (i_r + 2).to(tl.int64) * BT * D + o_w, mask=m_n & there, other=0.0, cache_modifier=".cg")
    b_u += tl.dot(tl.trans(b_near), b_w) * (b_r * b_c)[:, None]
    acc_b += tl.dot(tl.trans(b_e), b_w) * b_c
    b_x = acc_b + tl.load(ds + p_fb + o_w, mask=(i_rb * BT + o_r < end)[:, None] & m_n, other=0.0).to(tl.float32)
    b_ub = apply_inverse(tl.trans(tl.load(inverse + p_ib + o_i)), tl.trans(tl.load(inverse_low + p_ib + o_i)), b_x, True)

    # block a + 1: the nearest to a, near b
    there = rank >= 1
    b_near = tl.load(near + p_i + o_i, mask=there, other=0.0)
    b_near_b = tl.load(near + p_ib + deep + o_i, mask=there, other=0.0)
    b_r = tl.load(near_scale + p_row, mask=there, other=0.0)
    b_r_b = tl.load(near_scale + p_row_b + B * R, mask=there, other=0.0)
    wait_for(p_done, rank)
    b_c = tl.load(p_scale + (i_r + 1) * tiles_n, mask=there, other=0.0)
    b_w = tl.load(p_w + (i_r + 1).to(tl.int64) * BT * D + o_w, mask=m_n & there, other=0.0, cache_modifier=".cg")
    b_u += tl.dot(tl.trans(b_near), b_w) * (b_r * b_c)[:, None]
    p_s = i_b * (R // BT) * tiles_n + i_n
    b_wa, b_ca = scaled(b_u * tl.load(factor + p_row)[:, None], scales, p_s + i_r * tiles_n, True)
    tl.store(p_w + i_r.to(tl.int64) * BT * D + o_w, b_wa, mask=m_n)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, rank + 1, sem="release", scope="gpu")
    b_ub += tl.dot(tl.trans(b_near_b), b_w) * (b_r_b * b_c)[:, None]

    # block a: the nearest to b
    b_near = tl.load(near + p_ib + o_i)
    b_ub += tl.dot(tl.trans(b_near), b_wa) * (tl.load(near_scale + p_row_b) * b_ca)[:, None]
    b_wb, _ = scaled(b_ub * tl.load(factor + p_row_b)[:, None], scales, p_s + i_rb * tiles_n, more)
    tl.store(p_w + i_rb.to(tl.int64) * BT * D + o_w, b_wb, mask=m_n & more)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, rank + 2, sem="release", scope="gpu")
    m_a = (i_r * BT + o_r < T)[:, None] & m_n
    b_out = b_u.to(u.dtype.element_ty)
    tl.store(u + p_f + o_w, b_out, mask=m_a)
    tl.store(u_low + p_f + o_w, (b_u - b_out.to(tl.float32)).to(u.dtype.element_ty), mask=m_a)
    m_b = m_n & more & (o_r >= 0)[:, None]
    b_out = b_ub.to(u.dtype.element_ty)
    tl.store(u + p_fb + o_w, b_out, mask=m_b)
    tl.store(u_low + p_fb + o_w, (b_ub - b_out.to(tl.float32)).to(u.dtype.element_ty), mask=m_b)

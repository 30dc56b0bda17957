"""Gradient kernels of feedback attention after the transposed solve: r = u . s, its row sums, the scores' gradient, dq and dk. See README.md."""

import triton
import triton.language as tl

from sessa_deploy.kernels import launch
from sessa_deploy.kernels.feedback_tiles import grouped_tile, power_scale, product_nt


@triton.jit(do_not_specialize=launch.do_not_specialize("feedback_first_bad"))
def feedback_first_bad(q, k, s, bad, T, D, BT: tl.constexpr, BN: tl.constexpr):
    """Grid (row blocks, B): bad[b] = T - first row that holds NaN or Inf in q, k or s (0: none); the caller zeroes bad."""
    i_b = tl.program_id(1)
    o_t, o_n = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN)
    offset = i_b.to(tl.int64) * T * D + o_t.to(tl.int64)[:, None] * D + o_n[None, :]
    b_max = tl.zeros([BT, BN], dtype=tl.float32)
    for i_n in range(0, D, BN):
        mask = (o_t < T)[:, None] & (o_n < D - i_n)[None, :]
        b_q = tl.load(q + offset + i_n, mask=mask, other=0.0).to(tl.float32)
        b_k = tl.load(k + offset + i_n, mask=mask, other=0.0).to(tl.float32)
        b_s = tl.load(s + offset + i_n, mask=mask, other=0.0).to(tl.float32)
        # 0 * x is NaN exactly where x is NaN or Inf
        b_max += 0.0 * b_q + 0.0 * b_k + 0.0 * b_s
    b_bad = tl.max(tl.where(b_max == 0.0, 0, 1), axis=1)
    left = tl.max(tl.where(b_bad == 1, T - o_t, 0), axis=0)
    if left > 0:
        tl.atomic_max(bad + i_b, left, sem="relaxed")


@triton.jit(do_not_specialize=launch.do_not_specialize("feedback_grad_products"))
def feedback_grad_products(
    u, s, past_s, past_length, bad, e, r, r_scales, r_sums, T, P, D, C, R, NP, NT, row0,
    BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NB: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """r_ij = u_i . s_j for the tiles of `feedback_scores`, rounded once (with SPLIT a float16 with a scale per tile), and sum_j e_ij r_ij per tile.

    The sums use the rounded r, so that a saturated softmax still gets an exactly vanishing gradient.
    """
    i_b = tl.program_id(1)
    i_m, i_t = grouped_tile(tl.program_id(0), (NP + row0 // BT) // NB, BM, NB * BT, GROUP)
    i_t = i_t * NB
    first = row0 + i_m * BM
    is_past = i_t < NP
    column = tl.where(is_past, i_t, i_t - NP) * BT
    limit = tl.where(is_past, tl.load(past_length + i_b), T)
    if (i_m * BM < R) & (i_t < NT) & (first < T) & (column < limit) & (is_past | (column < first + BM)):
        p_s = s + i_b.to(tl.int64) * T * D + column.to(tl.int64) * D
        if is_past:
            p_s = past_s + i_b.to(tl.int64) * P * D + column.to(tl.int64) * D
        p_u = u + i_b.to(tl.int64) * T * D + first.to(tl.int64) * D
        acc = product_nt(p_u, p_s, T - first, limit - column, D, BM, NB * BT, BK)
        o_m, o_t = first + tl.arange(0, BM), column + tl.arange(0, NB * BT)
        end = T - tl.load(bad + i_b)
        seen = (o_t < limit)[None, :] & (o_m < end)[:, None] & (is_past | ((o_t[None, :] < o_m[:, None]) & (o_t < end)[None, :]))
        acc = tl.where(seen, acc, 0.0)
        o_r = i_m * BM + tl.arange(0, BM)
        p_tile = (i_b.to(tl.int64) * R + i_m * BM) * C + i_t * BT
        p_tile += tl.arange(0, BM)[:, None] * C + tl.arange(0, NB * BT)[None, :]
        if SPLIT:
            c, inv = power_scale(tl.max(tl.max(tl.abs(acc), axis=1), axis=0))
            b_r = (acc * c).to(r.dtype.element_ty)
            tl.store(r_scales + (i_b * (R // BM) + i_m) * NT + i_t + tl.arange(0, NB), inv + tl.zeros([NB], dtype=tl.float32))
            acc = b_r.to(tl.float32) * inv
        else:
            b_r = acc
        tl.store(r + p_tile, b_r)
        b_e = tl.load(e + p_tile).to(tl.float32)
        p_sum = (i_b.to(tl.int64) * NT + i_t + tl.arange(0, NB))[None, :] * R + o_r[:, None]
        tl.store(r_sums + p_sum, tl.sum(tl.reshape(b_e * acc, [BM, NB, BT]), axis=2))


@triton.jit(do_not_specialize=launch.do_not_specialize("feedback_grad_scores"))
def feedback_grad_scores(
    e, r, r_scales, r_sums, gain, inverse_sum, grad, grad_scales, dgamma, past_length, bad, T, C, R, NP, NT, row0,
    BM: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, groups of TILES column tiles, B): grad = gain e (r - delta) in place of r, delta = dgamma = sum_j e r / row sum.

    SCALED (float16 storage): a power of two per tile, else grad is in the storage type as it is.
    """
    i_r, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BT)
    count = past_tiles + row0 // BT + i_r + 1
    if i_c * TILES < count:
        o_r, o_t = tl.arange(0, BT), tl.arange(0, BT)
        p_row = i_b * R + i_r * BT + o_r
        p_sums = i_b * NT * R + i_r * BT + o_r
        b_sum = tl.zeros([BT], dtype=tl.float32)
        for i in range(0, count, CHUNK):
            o_c = i + tl.arange(0, CHUNK)
            o_x = tl.where(o_c < past_tiles, o_c, o_c - past_tiles + NP).to(tl.int64)
            b_sum += tl.sum(tl.load(r_sums + o_x[:, None] * R + p_sums[None, :], mask=(o_c < count)[:, None], other=0.0), axis=0)
        b_delta = b_sum * tl.load(inverse_sum + p_row)
        row = row0 + i_r * BT + o_r
        if i_c == 0:
            tl.store(dgamma + i_b * T + row, b_delta, mask=row < T)
        b_gain = tl.load(gain + p_row)
        for i in range(i_c * TILES, tl.minimum((i_c + 1) * TILES, count)):
            i_t = tl.where(i < past_tiles, i, i - past_tiles + NP)
            p_tile = (i_b * R + i_r * BT) * C + i_t * BT + o_r[:, None] * C + o_t[None, :]
            b_e = tl.load(e + p_tile).to(tl.float32)
            b_r = tl.load(r + p_tile).to(tl.float32)
            if SPLIT:
                b_r = b_r * tl.load(r_scales + (i_b * (R // BM) + i_r * BT // BM) * NT + i_t)
            b_g = tl.where(b_e == 0.0, 0.0, b_gain[:, None] * b_e * (b_r - b_delta[:, None]))
            if SCALED:
                c, inv = power_scale(tl.max(tl.max(tl.abs(b_g), axis=1), axis=0))
                b_g = b_g * c
                tl.store(grad_scales + (i_b * (R // BT) + i_r) * NT + i_t, inv)
            tl.debug_barrier()
            tl.store(grad + p_tile, b_g.to(grad.dtype.element_ty))


@triton.jit
def grad_q_part(acc, p_g, p_k, p_c, last, limit, D, m_n, BT: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr):
    """acc + grad @ k over `last` column tiles of one side, rows of k from `limit` on read as zeros."""
    o_t, step = tl.arange(0, BT), D.to(tl.int64) * BT
    for i in tl.range(0, last, num_stages=STAGES):
        b_g = tl.load(p_g + i * BT)
        b_k = tl.load(p_k + i * step, mask=(i * BT + o_t < limit)[:, None] & m_n, other=0.0)
        if SCALED:
            acc += tl.dot(b_g, b_k) * tl.load(p_c + i)
        else:
            acc = tl.dot(b_g, b_k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=launch.do_not_specialize("feedback_grad_q"))
def feedback_grad_q(
    grad, grad_scales, k, past_k, past_length, bad, dq, T, P, D, C, R, NP, NT, row0, scale,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (D tiles, row blocks, B), last rows first: dq_i = scale sum_j grad_ij k_j. BK divides BT."""
    i_r = tl.num_programs(1) - 1 - tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_r, o_t, o_n = tl.arange(0, BT), tl.arange(0, BK), tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    length = tl.load(past_length + i_b)
    end = T - tl.load(bad + i_b)
    block = row0 // BT + i_r
    per = BT // BK
    p_g = grad + (i_b * R + i_r * BT) * C + o_r[:, None] * C + o_t[None, :]
    p_c = grad_scales + (i_b * (R // BT) + i_r) * NT
    acc = tl.zeros([BT, BN], dtype=tl.float32)
    offset = o_t[:, None] * D + o_n[None, :]
    acc = grad_q_part(acc, p_g, past_k + i_b * P * D + offset, p_c, tl.cdiv(length, BT) * per, length, D, m_n, BK, SCALED, STAGES)
    acc = grad_q_part(acc, p_g + NP * BT, k + i_b * T * D + offset, p_c + NP, (block + 1) * per, end, D, m_n, BK, SCALED, STAGES)
    row = row0 + i_r * BT
    m_q = (row + o_r < T)[:, None] & m_n
    tl.store(dq + (i_b * T + row) * D + o_r[:, None] * D + o_n[None, :], (acc * scale).to(dq.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=launch.do_not_specialize("feedback_grad_k"))
def feedback_grad_k(
    grad, grad_scales, q, past_length, bad, carry, dk, dpast_k, T, P, D, C, R, NP, NT, row0, blocks, add, scale,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (D tiles, column tiles, B): dk_j = scale sum_i grad_ij q_i over the panel's rows, past columns into dpast_k.

    Column tiles of earlier panels go to carry (B,C,D) float32 and come back from it (add) in the panel that owns them; the past's in the last one.
    """
    i_t = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_t, o_k, o_n = tl.arange(0, BT), tl.arange(0, BK), tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    is_past = i_t < NP
    own = tl.where(is_past, -1, i_t - NP - row0 // BT)
    end = T - tl.load(bad + i_b)
    live = (i_t < tl.cdiv(tl.load(past_length + i_b), BT)) | (i_t >= NP)
    per = BT // BK
    first = tl.maximum(own, 0) * per
    last = tl.where(live, blocks, 0) * per
    p_g = grad + i_b * R * C + i_t * BT + o_k[:, None] * C + o_t[None, :]
    p_q = q + (i_b * T + row0) * D + o_k[:, None] * D + o_n[None, :]
    p_c = grad_scales + i_b * (R // BT) * NT + i_t
    step_g, step_q = C.to(tl.int64) * BK, D.to(tl.int64) * BK
    acc = tl.zeros([BT, BN], dtype=tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        b_g = tl.load(p_g + i * step_g)
        b_q = tl.load(p_q + i * step_q, mask=(row0 + i * BK + o_k < end)[:, None] & m_n, other=0.0)
        if SCALED:
            acc += tl.dot(tl.trans(b_g), b_q) * tl.load(p_c + i // per * NT)
        else:
            acc = tl.dot(tl.trans(b_g), b_q, acc, input_precision="ieee")
    acc = acc * scale
    p_carry = carry + (i_b * C + i_t * BT) * D + o_t[:, None] * D + o_n[None, :]
    if add != 0:
        acc += tl.load(p_carry, mask=m_n, other=0.0)
    if is_past:
        if row0 == 0:
            row = i_t * BT
            p_out = dpast_k + (i_b * P + row) * D + o_t[:, None] * D + o_n[None, :]
            tl.store(p_out, acc.to(dk.dtype.element_ty), mask=(row + o_t < P)[:, None] & m_n)
        else:
            tl.store(p_carry, acc, mask=m_n)
    elif own >= 0:
        row = (i_t - NP) * BT
        p_out = dk + (i_b * T + row) * D + o_t[:, None] * D + o_n[None, :]
        tl.store(p_out, acc.to(dk.dtype.element_ty), mask=(row + o_t < T)[:, None] & m_n)
    else:
        tl.store(p_carry, acc, mask=m_n)

"""Gradient kernels of feedback attention after the transposed solve: packing, r = u . s, its row sums, the scores' gradient, dq and dk. See README.md."""

import triton
import triton.language as tl

from sessa_deploy.kernels.feedback.tiles import apart, grouped_tile, power_scale, product_nt
from sessa_deploy.kernels.launch import table


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_grad_pack"))
def feedback_grad_pack(
    x, x_low, past, past_length, q, k, lse, bad, y, y_low, y_scale, T, P, D, C, first, row0, look,
    BT: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Grid (C / BT, B): y (B,C,D) = rows [past | x + x_low from row0 on], the latter from column `first` on, zeros where no live row is.

    With SPLIT each row as a float16 over a power of two, 1 / which goes to y_scale (B,C), and with FULL what that leaves in y_low. 8 times finer
    than bfloat16 rows, and of one scale over D, so that a product takes it out once.
    look: bad[b] becomes T - the first row that holds NaN or Inf in x, q or k (0: none), those of the latter among rows whose lse is NaN; the caller zeroes
    bad. Rows from there on are then packed as they are; else they are zeros.
    """
    i_b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BT
    o_c, o_n = column + tl.arange(0, BT), tl.arange(0, BN)
    is_past = column < first
    p_x = x + i_b * T * D
    o_x = o_c - first + row0
    limit = T
    if look == 0:
        limit = T - tl.load(bad + i_b)
    if is_past:
        p_x = past + i_b * P * D
        o_x = o_c
        limit = tl.minimum(tl.load(past_length + i_b), P)
    m_x = (o_x < limit)[:, None]
    offset = o_x.to(tl.int64)[:, None] * D + o_n[None, :]
    p_l = x_low + i_b * T * D + offset
    p_y = (i_b * C + o_c)[:, None] * D + o_n[None, :]
    m_l = m_x & (column >= first)
    amax = tl.zeros([BT], dtype=tl.float32)
    if SPLIT:
        for i_n in range(0, D, BN):
            m_n = (o_n < D - i_n)[None, :]
            b_x = tl.load(p_x + offset + i_n, mask=m_x & m_n, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(tl.abs(b_x), axis=1))
    c, inv = power_scale(amax)
    b_bad = tl.zeros([BT, BN], dtype=tl.float32)
    for i_n in range(0, D, BN):
        m_n = (o_n < D - i_n)[None, :]
        b_x = tl.load(p_x + offset + i_n, mask=m_x & m_n, other=0.0).to(tl.float32)
        b_bad += 0.0 * b_x  # NaN exactly where x is NaN or Inf
        if SPLIT:
            b_x = (b_x + tl.load(p_l + i_n, mask=m_l & m_n, other=0.0).to(tl.float32)) * c[:, None]
        b_y = b_x.to(y.dtype.element_ty)
        tl.store(y + p_y + i_n, b_y, mask=m_n)
        if FULL:
            tl.store(y_low + p_y + i_n, (b_x - b_y.to(tl.float32)).to(y.dtype.element_ty), mask=m_n)
    tl.store(y_scale + i_b * C + o_c, inv)
    if (look != 0) & (is_past == 0):
        m_t = o_x < T
        b_lse = tl.load(lse + i_b * T + o_x, mask=m_t, other=0.0)
        if tl.max(tl.where(b_lse == b_lse, 0, 1), axis=0) > 0:
            for i_n in range(0, D, BN):
                m_n = m_t[:, None] & (o_n < D - i_n)[None, :]
                b_bad += 0.0 * tl.load(q + i_b * T * D + offset + i_n, mask=m_n, other=0.0).to(tl.float32)
                b_bad += 0.0 * tl.load(k + i_b * T * D + offset + i_n, mask=m_n, other=0.0).to(tl.float32)
        left = tl.max(tl.where(tl.max(tl.where(b_bad == 0.0, 0, 1), axis=1) > 0, T - o_x, 0), axis=0)
        if left > 0:
            tl.atomic_max(bad + i_b, left, sem="relaxed")


MAIN = tl.constexpr(0.75 * 32768.0)  # e beyond which a column has most of its row's weight: at most one a row


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_grad_products"))
def feedback_grad_products(
    u, u_low, u_scale, s, s_low, s_scale, past_length, bad, e, r, r_scales, r_sums, T, D, C, R, NP, NT, row0,
    BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NB: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """r_ij = u_i . s_j for the tiles of `feedback_scores`, u (B,R,D) and s (B,C,D) packed, and three sums per row and tile.

    r is rounded once: a float16 with a scale per tile, or with FULL and without SPLIT a float32. The sums (3,B,NT,R), of the rounded r: e r and e
    over the columns that are not MAIN, and e r over the one that is, so that a saturated softmax still gets its vanishing gradient right.
    """
    i_b = tl.program_id(1)
    i_m, i_t = grouped_tile(tl.program_id(0), (NP + row0 // BT) // NB, BM, NB * BT, GROUP)
    i_t = i_t * NB
    first = row0 + i_m * BM
    is_past = i_t < NP
    column = tl.where(is_past, i_t, i_t - NP) * BT
    limit = tl.where(is_past, tl.load(past_length + i_b), T)
    if (i_m * BM < R) & (i_t < NT) & (first < T) & (column < limit) & (is_past | (column < first + BM)):
        row_u, row_s = i_b.to(tl.int64) * R + i_m * BM, i_b.to(tl.int64) * C + i_t * BT
        o_r, o_c = tl.arange(0, BM), tl.arange(0, NB * BT)
        acc = tl.zeros([BM, NB * BT], dtype=tl.float32)
        if FULL:
            acc = product_nt(acc, u + row_u * D, s_low + row_s * D, BM, NB * BT, D, BM, NB * BT, BK)
            acc = product_nt(acc, u_low + row_u * D, s + row_s * D, BM, NB * BT, D, BM, NB * BT, BK)
        acc = product_nt(acc, u + row_u * D, s + row_s * D, BM, NB * BT, D, BM, NB * BT, BK)
        if SPLIT:
            acc = acc * tl.load(u_scale + row_u + o_r)[:, None] * tl.load(s_scale + row_s + o_c)[None, :]
        o_m, o_t = first + o_r, column + o_c
        end = T - tl.load(bad + i_b)
        seen = (o_t < limit)[None, :] & (o_m < end)[:, None] & (is_past | ((o_t[None, :] < o_m[:, None]) & (o_t < end)[None, :]))
        acc = tl.where(seen, acc, 0.0)
        p_tile = row_u * C + i_t * BT + o_r[:, None] * C + o_c[None, :]
        if SPLIT and not FULL:
            c, inv = power_scale(tl.max(tl.max(tl.abs(acc), axis=1), axis=0))
            b_r = (acc * c).to(r.dtype.element_ty)
            tl.store(r_scales + (i_b * (R // BM) + i_m) * NT + i_t + tl.arange(0, NB), inv + tl.zeros([NB], dtype=tl.float32))
            acc = b_r.to(tl.float32) * inv
        else:
            b_r = acc
        tl.store(r + p_tile, b_r)
        b_e = tl.load(e + p_tile).to(tl.float32)
        main = b_e > MAIN
        b_rest = tl.where(main, 0.0, b_e)
        p_sum = r_sums + (i_b.to(tl.int64) * NT + i_t + tl.arange(0, NB))[None, :] * R + (i_m * BM + o_r)[:, None]
        size = tl.num_programs(1).to(tl.int64) * NT * R
        tl.store(p_sum, tl.sum(tl.reshape(b_rest * acc, [BM, NB, BT]), axis=2))
        tl.store(p_sum + size, tl.sum(tl.reshape(b_rest, [BM, NB, BT]), axis=2))
        tl.store(p_sum + 2 * size, tl.sum(tl.reshape(tl.where(main, b_e * acc, 0.0), [BM, NB, BT]), axis=2))


@triton.jit
def sum_tiles(p_sums, count, past_tiles, NP, R, BT: tl.constexpr, CHUNK: tl.constexpr):
    """Sum over a row block's live column tiles of per-tile sums, p_sums (BT,) at tile 0."""
    b_sum = tl.zeros([BT], dtype=tl.float32)
    for i in range(0, count, CHUNK):
        o_c = i + tl.arange(0, CHUNK)
        o_x = tl.where(o_c < past_tiles, o_c, o_c - past_tiles + NP).to(tl.int64)
        b_sum += tl.sum(tl.load(o_x[:, None] * R + p_sums[None, :], mask=(o_c < count)[:, None], other=0.0), axis=0)
    return b_sum


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_grad_scores"))
def feedback_grad_scores(
    e, r, r_scales, r_sums, factor, inverse_sum, grad, grad_scales, dgamma, past_length, bad, T, C, R, NP, NT, row0, each,
    BM: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, groups of `each` column tiles, B): grad = factor e (r - delta) in place of r, delta = dgamma = sum_j e r / row sum.

    In the column that has most of the weight, r - delta = (r sum_rest e - sum_rest e r) / row sum, over the others: nothing cancels.
    SCALED (float16 storage): r is float32, and grad beside it has a power of two per tile; else grad is in the storage type as it is.
    """
    i_r, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BT)
    count = past_tiles + row0 // BT + i_r + 1
    if i_c * each < count:
        o_r, o_t = tl.arange(0, BT), tl.arange(0, BT)
        p_row = i_b * R + i_r * BT + o_r
        p_sums = r_sums + i_b * NT * R + i_r * BT + o_r
        size = tl.num_programs(2).to(tl.int64) * NT * R
        b_rest_r = sum_tiles(p_sums, count, past_tiles, NP, R, BT, CHUNK)
        b_rest = sum_tiles(p_sums + size, count, past_tiles, NP, R, BT, CHUNK)
        b_main_r = sum_tiles(p_sums + 2 * size, count, past_tiles, NP, R, BT, CHUNK)
        b_inverse = tl.load(inverse_sum + p_row)
        b_delta = (b_rest_r + b_main_r) * b_inverse
        row = row0 + i_r * BT + o_r
        if i_c == 0:
            tl.store(dgamma + i_b * T + row, b_delta, mask=row < T)
        b_factor = tl.load(factor + p_row)
        for i in range(i_c * each, tl.minimum((i_c + 1) * each, count)):
            i_t = tl.where(i < past_tiles, i, i - past_tiles + NP)
            p_tile = (i_b * R + i_r * BT) * C + i_t * BT + o_r[:, None] * C + o_t[None, :]
            b_e = tl.load(e + p_tile).to(tl.float32)
            b_r = tl.load(r + p_tile).to(tl.float32)
            if SPLIT and not SCALED:
                b_r = b_r * tl.load(r_scales + (i_b * (R // BM) + i_r * BT // BM) * NT + i_t)
            b_d = tl.where(b_e > MAIN, (b_r * b_rest[:, None] - b_rest_r[:, None]) * b_inverse[:, None], b_r - b_delta[:, None])
            b_g = tl.where(b_e == 0.0, 0.0, b_factor[:, None] * b_e * b_d)
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
        elif p_k.dtype.element_ty == tl.float32:
            acc += apart(tl.dot(b_g, b_k, input_precision="ieee"), D)
        else:
            acc = tl.dot(b_g, b_k, acc)
    return acc


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_grad_q"))
def feedback_grad_q(
    grad, grad_scales, k, past_k, past_length, bad, dq, T, P, D, C, R, NP, NT, row0, scale,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (D tiles, row blocks, B), last rows first: dq_i = scale sum_j grad_ij k_j. BK divides BT."""
    i_r = tl.num_programs(1) - 1 - tl.program_id(1)
    grad_q_block(i_r, grad, grad_scales, k, past_k, past_length, bad, dq, T, P, D, C, R, NP, NT, row0, scale, BT, BN, BK, STAGES, SCALED)


@triton.jit
def grad_q_block(
    i_r, grad, grad_scales, k, past_k, past_length, bad, dq, T, P, D, C, R, NP, NT, row0, scale,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
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


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_grad_k"))
def feedback_grad_k(
    grad, grad_scales, q, past_length, bad, carry, dk, dpast_k, T, P, D, C, R, NP, NT, row0, blocks, add, scale,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (D tiles, column tiles, B): dk_j = scale sum_i grad_ij q_i over the panel's rows, past columns into dpast_k.

    Column tiles of earlier panels go to carry (B,C,D) float32 and come back from it (add) in the panel that owns them; the past's in the last one.
    """
    i_t = tl.program_id(1)
    grad_k_block(i_t, grad, grad_scales, q, past_length, bad, carry, dk, dpast_k, T, P, D, C, R, NP, NT, row0, blocks, add, scale, BT, BN, BK, STAGES, SCALED)


@triton.jit
def grad_k_block(
    i_t, grad, grad_scales, q, past_length, bad, carry, dk, dpast_k, T, P, D, C, R, NP, NT, row0, blocks, add, scale,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
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
        elif p_q.dtype.element_ty == tl.float32:
            acc += apart(tl.dot(tl.trans(b_g), b_q, input_precision="ieee"), D)
        else:
            acc = tl.dot(tl.trans(b_g), b_q, acc)
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


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_grad_qk"))
def feedback_grad_qk(
    grad, grad_scales, q, k, past_length, bad, dq, dk, T, D, C, R, NT, blocks, scale,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (D tiles, 2 blocks, B): `feedback_grad_q` and `feedback_grad_k` in turn, the longest first, for the only panel without a past."""
    i_r = tl.program_id(1) // 2
    if tl.program_id(1) % 2 == 0:
        grad_q_block(blocks - 1 - i_r, grad, grad_scales, k, k, past_length, bad, dq, T, 0, D, C, R, 0, NT, 0, scale, BT, BN, BK, STAGES, SCALED)
    else:
        grad_k_block(i_r, grad, grad_scales, q, past_length, bad, dq, dk, dk, T, 0, D, C, R, 0, NT, 0, blocks, 0, scale, BT, BN, BK, STAGES, SCALED)

"""The solves of feedback attention with a sum that never leaves the tensor cores: bfloat16, one panel, no past.

The sums over far blocks run as chains of products, which the next loads overlap; a chain ends where its terms' unit does, never where a program had to wait:
the same inputs give the same bits. Between row blocks s keeps the scale of the block before as long as float16 can hold it (`sticky`). In the forward the
references of a row's tiles lie on a coarse grid (`feedback_scores`, GRID), so that most tiles of a row share theirs; `feedback_combine_direct` marks those
that do not.
"""

import triton
import triton.language as tl

from sessa_deploy.kernels.feedback.tiles import apply_inverse, finite, near_product, power_scale, wait_for
from sessa_deploy.kernels.launch import table


@triton.jit
def sticky(b_x, inv_before):
    """(b_x over a power of two as float16, 1 / that power): that of the block before, 1 / inv_before (0: there is none), while the largest value is then
    in 4 .. 2^15."""
    amax = tl.max(tl.max(tl.where(finite(b_x), tl.abs(b_x), 0.0), axis=1), axis=0)
    c, inv = power_scale(amax)
    stays = (inv_before > 0) & (amax < 32768.0 * inv_before) & (amax >= 4.0 * inv_before)
    inv = tl.where(stays, inv_before, inv * 16.0)  # with room to grow
    c = tl.where(stays, 1.0 / tl.where(stays, inv_before, 1.0), c * 0.0625)
    return (b_x * c).to(tl.float16), inv


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve_stream"))
def feedback_solve_stream(
    e, peak, row_peak, factor, flags, inverse, inverse_low, near, near_scale, f, s, s_low, w, scales, sync, T, D, C, R, NT, B, keep,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`feedback_solve` for one panel without a past, every block but the one before being far.

    flags (B, R / BT, NT) float32: not zero where a tile's references differ from those of the one before.
    """
    tiles_n = tl.cdiv(D, BN)
    ticket = tl.atomic_add(sync, 1, sem="relaxed", scope="gpu")
    i_n = ticket % tiles_n
    i_b = ((ticket // tiles_n) % B).to(tl.int64)
    block = ticket // (tiles_n * B)
    p_done = sync + 1 + i_b * tiles_n + i_n
    far = tl.maximum(block - 1, 0)

    o_r, o_k, o_n = tl.arange(0, BT), tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    p_e = e + (i_b * R + block * BT) * C + o_r[:, None] * C + o_k[None, :]
    p_w = w + i_b * C * D
    p_peak = peak + i_b * NT * R + block * BT + o_r
    p_scale = scales + i_b * NT * tiles_n + i_n
    p_flag = flags + (i_b * (R // BT) + block) * NT
    p_row = i_b * R + block * BT + o_r
    step_p, step_w = R.to(tl.int64), D.to(tl.int64) * BT  # from tile to tile
    b_factor, b_top = tl.load(factor + p_row), tl.load(row_peak + p_row)

    total = tl.zeros([BT, BN], dtype=tl.float32)
    acc = tl.zeros([BT, BN], dtype=tl.float32)
    unit = 0.0
    i = 0
    while i < far:
        stop = tl.minimum(wait_for(p_done, i + 1), far)
        c_x = tl.load(p_scale + i * tiles_n)
        if (i > 0) & ((tl.load(p_flag + i) != 0.0) | (c_x != unit)):
            total += acc * (b_factor * tl.exp(tl.load(p_peak + (i - 1) * step_p) - b_top) * unit)[:, None]
            acc = tl.zeros([BT, BN], dtype=tl.float32)
        unit = c_x
        for j in tl.range(i, stop, num_stages=STAGES):
            b_e = tl.load(p_e + j * BT)
            b_w = tl.load(p_w + j * step_w + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
            acc = tl.dot(b_e, b_w, acc)
            i_x = tl.minimum(j + 1, stop - 1)
            c_x = tl.load(p_scale + i_x * tiles_n)
            if (j + 1 < stop) & ((tl.load(p_flag + i_x) != 0.0) | (c_x != unit)):
                total += acc * (b_factor * tl.exp(tl.load(p_peak + j * step_p) - b_top) * unit)[:, None]
                acc = tl.zeros([BT, BN], dtype=tl.float32)
            unit = c_x
        i = stop
    total += acc * (b_factor * tl.exp(tl.load(p_peak + tl.maximum(far - 1, 0) * step_p) - b_top) * unit)[:, None]

    start = block * BT
    m_f = (start + o_r < T)[:, None] & m_n
    p_f = (i_b * T + start) * D
    o_i = o_r[:, None] * BT + o_k[None, :]
    p_i = (i_b * R + start) * BT
    b_x = total + tl.load(f + p_f + o_w, mask=m_f, other=0.0).to(tl.float32)
    m_ok = finite(b_x) & finite(b_factor)[:, None]
    b_s = apply_inverse(tl.load(inverse + p_i + o_i), tl.load(inverse_low + p_i + o_i), tl.where(m_ok, b_x, 0.0), True)
    if tl.max(tl.max(tl.where(m_ok, 0, 1), axis=1), axis=0) > 0:  # rare: poison each column from its first bad row on, not the rows before it
        b_first = tl.min(tl.where(m_ok, BT, o_r[:, None]), axis=0)
        b_s = tl.where(o_r[:, None] >= b_first[None, :], float("nan"), b_s)
    inv = 0.0
    for _ in tl.range(0, tl.minimum(block, 1), num_stages=1):  # a loop, not a branch: see README.md, a trap
        b_near = tl.load(near + p_i + o_i)
        b_r = tl.load(near_scale + p_row)
        wait_for(p_done, block)
        inv = tl.load(p_scale + (block - 1) * tiles_n)
        p_tile = p_w + (block - 1) * step_w
        b_s += near_product(b_near, b_near, p_tile, p_tile, o_w, m_n, False, False, True) * (b_r * inv)[:, None]
    b_w, inv = sticky(b_s, inv)
    tl.store(p_w + block * step_w + o_w, b_w, mask=m_n)
    tl.store(scales + (i_b * NT + block) * tiles_n + i_n, inv)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, block + 1, sem="release", scope="gpu")
    b_out = b_s.to(s.dtype.element_ty)
    tl.store(s + p_f + o_w, b_out, mask=m_f)
    tl.store(s_low + p_f + o_w, (b_s - b_out.to(tl.float32)).to(s.dtype.element_ty), mask=m_f & (keep != 0))


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve_transposed_stream"))
def feedback_solve_transposed_stream(
    e, factor, inverse, inverse_low, near, near_scale, ds, u, u_low, w, scales, bad, sync, T, D, C, R, blocks, B,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`feedback_solve_transposed` for one panel without a past."""
    tiles_n = tl.cdiv(D, BN)
    ticket = tl.atomic_add(sync, 1, sem="relaxed", scope="gpu")
    i_n = ticket % tiles_n
    i_b = ((ticket // tiles_n) % B).to(tl.int64)
    rank = ticket // (tiles_n * B)
    i_r = blocks - 1 - rank
    p_done = sync + 1 + i_b * tiles_n + i_n
    far = tl.maximum(rank - 1, 0)

    o_r, o_k, o_n = tl.arange(0, BT), tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    p_e = e + i_b * R * C + i_r * BT + o_k[:, None] * C + o_r[None, :]
    p_w = w + i_b * R * D
    step_e, step_w = C.to(tl.int64) * BT, D.to(tl.int64) * BT  # from tile to tile
    p_scale = scales + i_b * (R // BT) * tiles_n + i_n

    total = tl.zeros([BT, BN], dtype=tl.float32)
    acc = tl.zeros([BT, BN], dtype=tl.float32)
    unit = 0.0
    i = 0
    while i < far:
        stop = tl.minimum(wait_for(p_done, i + 1), far)
        c_x = tl.load(p_scale + (blocks - 1 - i) * tiles_n)
        if (i > 0) & (c_x != unit):
            total += acc * unit
            acc = tl.zeros([BT, BN], dtype=tl.float32)
        unit = c_x
        for j in tl.range(i, stop, num_stages=STAGES):
            i_l = blocks - 1 - j
            b_e = tl.load(p_e + i_l * step_e)
            b_w = tl.load(p_w + i_l * step_w + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
            acc = tl.dot(tl.trans(b_e), b_w, acc)
            c_x = tl.load(p_scale + (blocks - 1 - tl.minimum(j + 1, stop - 1)) * tiles_n)
            if (j + 1 < stop) & (c_x != unit):
                total += acc * unit
                acc = tl.zeros([BT, BN], dtype=tl.float32)
            unit = c_x
        i = stop
    total += acc * unit

    start = i_r * BT
    m_f = (start + o_r < T)[:, None] & m_n
    p_f = (i_b * T + start) * D
    m_ok = (start + o_r < T - tl.load(bad + i_b))[:, None] & m_n
    b_x = total + tl.load(ds + p_f + o_w, mask=m_ok, other=0.0).to(tl.float32)
    p_row = i_b * R + start + o_r
    o_i = o_k[:, None] * BT + o_r[None, :]
    p_i = (i_b * R + start) * BT
    b_factor = tl.load(factor + p_row)
    b_u = apply_inverse(tl.trans(tl.load(inverse + p_i + o_i)), tl.trans(tl.load(inverse_low + p_i + o_i)), b_x, True)
    inv = 0.0
    for _ in tl.range(0, tl.minimum(rank, 1), num_stages=1):
        b_near = tl.trans(tl.load(near + p_i + o_i))
        b_r = tl.load(near_scale + p_row)
        wait_for(p_done, rank)
        inv = tl.load(p_scale + (i_r + 1) * tiles_n)
        p_tile = p_w + (i_r + 1) * step_w
        b_u += near_product(b_near, b_near, p_tile, p_tile, o_w, m_n, False, False, True) * (b_r * inv)[:, None]
    b_w, inv = sticky(b_u * b_factor[:, None], inv)
    tl.store(p_w + i_r * step_w + o_w, b_w, mask=m_n)
    tl.store(scales + (i_b * (R // BT) + i_r) * tiles_n + i_n, inv)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, rank + 1, sem="release", scope="gpu")
    b_out = b_u.to(u.dtype.element_ty)
    tl.store(u + p_f + o_w, b_out, mask=m_f)
    tl.store(u_low + p_f + o_w, (b_u - b_out.to(tl.float32)).to(u.dtype.element_ty), mask=m_f)

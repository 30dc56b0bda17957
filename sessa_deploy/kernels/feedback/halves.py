"""The solves in bfloat16, small enough that a multiprocessor runs two programs: what one does at its ends hides behind the other's products.

A program's columns are two halves, so that a product's sums take half the registers beside the accumulators; a routing tile is read once for both. The
inverse is one float16 over its row's largest magnitude, what it multiplies one float16 over a power of two.
"""

import triton
import triton.language as tl

from sessa_deploy.kernels.feedback.inverse import INVERSE
from sessa_deploy.kernels.feedback.tiles import finite, power_scale, wait_for
from sessa_deploy.kernels.launch import table


@triton.jit
def larger(a, b):
    """The larger one, NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_top(b_x):
    """The largest of each row, NaN where it holds one."""
    return tl.reduce(b_x, 1, larger)


@triton.jit
def top(b_a, b_b):
    """The largest magnitude in both halves, NaN where they hold one."""
    return tl.reduce(row_top(larger(tl.abs(b_a), tl.abs(b_b))), 0, larger)


@triton.jit
def to_storage(b_x, like):
    """x rounded to the storage type, and what that took from it. By integers: a single conversion is sixteen times slower than a pair of them."""
    b_i = b_x.to(tl.int32, bitcast=True)
    b_high = ((b_i + 32767 + ((b_i >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return b_x.to(like.dtype.element_ty), (b_x - b_high).to(like.dtype.element_ty)


@triton.jit
def poisoned(b_x, p_bad, m_tile, o_r):
    """x with NaN in each column from the first row on that is not zero at p_bad: not in the rows before it."""
    b_bad = tl.load(p_bad, mask=m_tile, other=0.0).to(tl.float32)
    b_first = tl.min(tl.where(finite(b_bad), o_r.shape[0], o_r[:, None]), axis=0)
    return tl.where(o_r[:, None] >= b_first[None, :], float("nan"), b_x)


@triton.jit
def two(b_a, b_b, c):
    """Both halves times c as float16."""
    return (b_a * c).to(tl.float16), (b_b * c).to(tl.float16)


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve"))
def feedback_solve(
    e, peak, row_peak, factor, inverse, inverse_low, near, near_low, near_scale, f, s, s_low, w, w_low, scales, past_length, sync,
    T, D, C, R, NP, NT, row0, B, panel, panels, keep,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NEAR: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """`forward.feedback_solve`."""
    H: tl.constexpr = BN // 2
    PARTS: tl.constexpr = BT // BK
    tiles_n = tl.cdiv(D, BN)
    ticket = tl.atomic_add(sync + panel, 1, sem="relaxed", scope="gpu")
    i_n = ticket % tiles_n
    i_b = ((ticket // tiles_n) % B).to(tl.int64)
    i_r = ticket // (tiles_n * B)
    block = row0 // BT + i_r
    p_done = sync + panels + i_b * tiles_n + i_n
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BT)
    far = past_tiles + tl.maximum(block - NEAR, 0)

    o_r, o_k, o_p, o_n = tl.arange(0, BT), tl.arange(0, BT), tl.arange(0, BK), i_n * BN + tl.arange(0, H)
    m_a, m_b = (o_n < D)[None, :], (o_n + H < D)[None, :]
    o_e = o_r[:, None] * C + o_p[None, :]
    o_f = o_p[:, None] * D + o_n[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    p_e = e + (i_b * R + i_r * BT) * C
    p_w = w + i_b * C * D
    p_peak = peak + i_b * NT * R + i_r * BT + o_r
    p_scale = scales + i_b * NT * tiles_n + i_n
    p_row = i_b * R + i_r * BT + o_r
    b_top = tl.load(row_peak + p_row)
    b_factor = tl.load(factor + p_row)
    bad_rows = tl.max(tl.where(finite(b_factor), 0.0, 1.0), axis=0)

    b_a = tl.zeros([BT, H], dtype=tl.float32)
    b_b = tl.zeros([BT, H], dtype=tl.float32)
    i = 0
    ready = 0
    while i < far:
        stop = past_tiles
        if i >= past_tiles:
            ready = wait_for(p_done, i - past_tiles + 1)
            stop = tl.minimum(past_tiles + ready, far)
        for j in tl.range(i * PARTS, stop * PARTS, num_stages=STAGES):
            tile = j // PARTS
            i_t = tl.where(tile < past_tiles, tile, tile - past_tiles + NP)
            b_e = tl.load(p_e + i_t * BT + j % PARTS * BK + o_e)
            p_tile = p_w + (i_t.to(tl.int64) * BT + j % PARTS * BK) * D + o_f
            b_r = b_factor * tl.exp(tl.load(p_peak + i_t.to(tl.int64) * R) - b_top) * tl.load(p_scale + i_t * tiles_n)
            b_a += tl.dot(b_e, tl.load(p_tile, mask=m_a, other=0.0, cache_modifier=".cg")) * b_r[:, None]
            b_b += tl.dot(b_e, tl.load(p_tile + H, mask=m_b, other=0.0, cache_modifier=".cg")) * b_r[:, None]
        i = stop

    start = row0 + i_r * BT
    m_f = (start + o_r < T)[:, None]
    p_f = (i_b * T + start) * D
    o_i = o_r[:, None] * BT + o_k[None, :]
    p_i = (i_b * R + i_r * BT) * BT
    deep = (B * R).to(tl.int64)
    b_inverse = tl.load(near + INVERSE * deep * BT + p_i + o_i)
    m_row = finite(b_factor)[:, None]
    b_top = row_top(larger(tl.abs(b_a), tl.abs(b_b)))
    b_f = tl.load(f + p_f + o_w, mask=m_f & m_a, other=0.0)
    b_top += row_top(tl.abs(b_f.to(tl.float32)))
    b_a += b_f.to(tl.float32)
    b_f = tl.load(f + p_f + o_w + H, mask=m_f & m_b, other=0.0)
    b_top += row_top(tl.abs(b_f.to(tl.float32)))
    b_b += b_f.to(tl.float32)
    amax = tl.reduce(b_top, 0, larger)
    bad = (bad_rows > 0) | (not finite(amax))
    if bad:  # rare; s keeps where, so that nothing stays in registers
        tl.store(s + p_f + o_w, tl.where(finite(b_a) & m_row, 0.0, float("nan")).to(s.dtype.element_ty), mask=m_f & m_a)
        tl.store(s + p_f + o_w + H, tl.where(finite(b_b) & m_row, 0.0, float("nan")).to(s.dtype.element_ty), mask=m_f & m_b)
        b_a, b_b = tl.where(finite(b_a) & m_row, b_a, 0.0), tl.where(finite(b_b) & m_row, b_b, 0.0)
        amax = top(b_a, b_b)
    c, inv = power_scale(amax)
    b_xa, b_xb = two(b_a, b_b, c)
    b_r = tl.load(near_scale + INVERSE * deep + p_row) * inv
    b_a = tl.dot(b_inverse, b_xa) * b_r[:, None]
    b_b = tl.dot(b_inverse, b_xb) * b_r[:, None]
    if bad:
        tl.debug_barrier()
        b_a = poisoned(b_a, s + p_f + o_w, m_f & m_a, o_r)
        b_b = poisoned(b_b, s + p_f + o_w + H, m_f & m_b, o_r)
    o_i = o_r[:, None] * BT + o_p[None, :]
    i = tl.maximum(block - NEAR, 0)
    while i < block:
        if ready <= i:
            ready = wait_for(p_done, i + 1)
        stop = tl.minimum(ready, block)
        for j in tl.range(i * PARTS, stop * PARTS, num_stages=STAGES):
            at = (block - 1 - j // PARTS) * deep
            b_e = tl.load(near + at * BT + p_i + j % PARTS * BK + o_i)
            p_tile = p_w + ((NP + j // PARTS).to(tl.int64) * BT + j % PARTS * BK) * D + o_f
            b_r = tl.load(near_scale + at + p_row) * tl.load(p_scale + (NP + j // PARTS) * tiles_n)
            b_a += tl.dot(b_e, tl.load(p_tile, mask=m_a, other=0.0, cache_modifier=".cg")) * b_r[:, None]
            b_b += tl.dot(b_e, tl.load(p_tile + H, mask=m_b, other=0.0, cache_modifier=".cg")) * b_r[:, None]
        i = stop
    c, inv = power_scale(top(b_a, b_b))
    b_xa, b_xb = two(b_a, b_b, c)
    p_tile = p_w + (NP + block).to(tl.int64) * BT * D + o_w
    tl.store(p_tile, b_xa, mask=m_a)
    tl.store(p_tile + H, b_xb, mask=m_b)
    tl.store(p_scale + (NP + block) * tiles_n, inv)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, block + 1, sem="release", scope="gpu")
    b_out, b_low = to_storage(b_a, s)
    tl.store(s + p_f + o_w, b_out, mask=m_f & m_a)
    tl.store(s_low + p_f + o_w, b_low, mask=m_f & m_a & (keep != 0))
    b_out, b_low = to_storage(b_b, s)
    tl.store(s + p_f + o_w + H, b_out, mask=m_f & m_b)
    tl.store(s_low + p_f + o_w + H, b_low, mask=m_f & m_b & (keep != 0))


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve_transposed"))
def feedback_solve_transposed(
    e, factor, inverse, inverse_low, near, near_low, near_scale, ds, u, u_low, w, w_low, scales, carry, dpast_s, past_length, bad, sync,
    T, P, D, C, R, NP, row0, blocks, B, panel, panels, add,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NEAR: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """`backward.feedback_solve_transposed`."""
    H: tl.constexpr = BN // 2
    PARTS: tl.constexpr = BT // BK
    tiles_n = tl.cdiv(D, BN)
    ticket = tl.atomic_add(sync + panel, 1, sem="relaxed", scope="gpu")
    i_n = ticket % tiles_n
    i_b = ((ticket // tiles_n) % B).to(tl.int64)
    rank = ticket // (tiles_n * B)
    inside = rank < blocks
    i_r = blocks - 1 - rank
    # column tile: the panel's own blocks downwards, then everything before them downwards
    i_t = NP + row0 // BT + i_r
    p_done = sync + panels + (panel * B + i_b) * tiles_n + i_n
    live = (i_t >= NP) | (i_t < tl.cdiv(tl.load(past_length + i_b), BT))
    far = tl.where(inside, tl.maximum(rank - NEAR, 0), tl.where(live, blocks, 0))

    o_r, o_k, o_p, o_n = tl.arange(0, BT), tl.arange(0, BT), tl.arange(0, BK), i_n * BN + tl.arange(0, H)
    m_a, m_b = (o_n < D)[None, :], (o_n + H < D)[None, :]
    o_e = o_p[:, None] * C + o_r[None, :]
    o_f = o_p[:, None] * D + o_n[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    p_e = e + i_b * R * C + i_t * BT
    p_w = w + i_b * R * D
    p_scale = scales + i_b * (R // BT) * tiles_n + i_n

    start = row0 + i_r * BT
    m_f = inside & (start + o_r < T)[:, None]
    m_ok = inside & (start + o_r < T - tl.load(bad + i_b))[:, None]
    p_f = (i_b * T + start) * D + o_w
    p_carry = carry + (i_b * C + i_t * BT) * D + o_w
    b_a = tl.load(ds + p_f, mask=m_ok & m_a, other=0.0).to(tl.float32)
    b_b = tl.load(ds + p_f + H, mask=m_ok & m_b, other=0.0).to(tl.float32)
    if add != 0:
        b_a += tl.load(p_carry, mask=m_a, other=0.0)
        b_b += tl.load(p_carry + H, mask=m_b, other=0.0)
    i = 0
    ready = 0
    while i < far:
        ready = wait_for(p_done, i + 1)
        stop = tl.minimum(ready, far)
        for j in tl.range(i * PARTS, stop * PARTS, num_stages=STAGES):
            i_l = (blocks - 1 - j // PARTS).to(tl.int64)
            row = i_l * BT + j % PARTS * BK
            b_e = tl.trans(tl.load(p_e + row * C + o_e))
            p_tile = p_w + row * D + o_f
            r = tl.load(p_scale + i_l * tiles_n)
            b_a += tl.dot(b_e, tl.load(p_tile, mask=m_a, other=0.0, cache_modifier=".cg")) * r
            b_b += tl.dot(b_e, tl.load(p_tile + H, mask=m_b, other=0.0, cache_modifier=".cg")) * r
        i = stop

    if inside:
        p_row = i_b * R + i_r * BT + o_r
        p_i = (i_b * R + i_r * BT) * BT
        deep = (B * R).to(tl.int64)
        b_inverse = tl.trans(tl.load(near + INVERSE * deep * BT + p_i + o_k[:, None] * BT + o_r[None, :]))
        b_c = tl.load(near_scale + INVERSE * deep + p_row)[:, None]
        b_a = b_a * b_c
        b_b = b_b * b_c
        c, inv = power_scale(top(b_a, b_b))
        b_xa, b_xb = two(b_a, b_b, c)
        b_a = tl.dot(b_inverse, b_xa) * inv
        b_b = tl.dot(b_inverse, b_xb) * inv
        o_i = o_p[:, None] * BT + o_r[None, :]
        i = tl.maximum(rank - NEAR, 0)
        while i < rank:
            if ready <= i:
                ready = wait_for(p_done, i + 1)
            stop = tl.minimum(ready, rank)
            for j in tl.range(i * PARTS, stop * PARTS, num_stages=STAGES):
                back = rank - j // PARTS  # 2, then 1
                at = (back - 1) * deep
                b_e = tl.trans(tl.load(near + (at + j % PARTS * BK) * BT + p_i + o_i))
                p_tile = p_w + ((i_r + back).to(tl.int64) * BT + j % PARTS * BK) * D + o_f
                b_r = tl.load(near_scale + at + p_row) * tl.load(p_scale + (i_r + back) * tiles_n)
                b_a += tl.dot(b_e, tl.load(p_tile, mask=m_a, other=0.0, cache_modifier=".cg")) * b_r[:, None]
                b_b += tl.dot(b_e, tl.load(p_tile + H, mask=m_b, other=0.0, cache_modifier=".cg")) * b_r[:, None]
            i = stop
        b_factor = tl.load(factor + p_row)
        c, inv = power_scale(top(b_a * b_factor[:, None], b_b * b_factor[:, None]))
        b_xa, b_xb = two(b_a, b_b, (b_factor * c)[:, None])
        p_tile = p_w + i_r.to(tl.int64) * BT * D + o_w
        tl.store(p_tile, b_xa, mask=m_a)
        tl.store(p_tile + H, b_xb, mask=m_b)
        tl.store(p_scale + i_r * tiles_n, inv)
        tl.debug_barrier()
        tl.atomic_xchg(p_done, rank + 1, sem="release", scope="gpu")
        b_out, b_low = to_storage(b_a, u)
        tl.store(u + p_f, b_out, mask=m_f & m_a)
        tl.store(u_low + p_f, b_low, mask=m_f & m_a)
        b_out, b_low = to_storage(b_b, u)
        tl.store(u + p_f + H, b_out, mask=m_f & m_b)
        tl.store(u_low + p_f + H, b_low, mask=m_f & m_b)
    elif (i_t < NP) & (row0 == 0):
        row = i_t * BT
        p_past = dpast_s + (i_b * P + row) * D + o_w
        m_past = (row + o_r < P)[:, None]
        tl.store(p_past, b_a.to(dpast_s.dtype.element_ty), mask=m_past & m_a)
        tl.store(p_past + H, b_b.to(dpast_s.dtype.element_ty), mask=m_past & m_b)
    else:
        tl.store(p_carry, b_a, mask=m_a)
        tl.store(p_carry + H, b_b, mask=m_b)

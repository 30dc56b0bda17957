"""The solves in bfloat16 behind `feedback_inverse` and `feedback_near`: see README.md, "Kernels that stand in for others".

With TWO a program's columns are two halves, so that a product's sums take half the registers beside the accumulators, and a multiprocessor runs two programs:
what one does at its ends hides behind the other's products. The bits are those of one half: products are over BK columns of a routing tile at a time in both.
The inverse is one float16 over a power of two, and so is what it multiplies.
"""

import triton
import triton.language as tl

from sessa_deploy.kernels.device import wait_early
from sessa_deploy.kernels.feedback.inverse import INVERSE
from sessa_deploy.kernels.feedback.tiles import finite, power_scale
from sessa_deploy.kernels.feedback.waits import take_ticket, wait_each, wait_for, wait_one
from sessa_deploy.kernels.launch import table


@triton.jit
def larger(a, b):
    """The larger one, NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_top(b_x):
    """The largest magnitude of each row, NaN where it holds one."""
    return tl.reduce(tl.abs(b_x), 1, larger)


@triton.jit
def reach(b_a, b_b, TWO: tl.constexpr):
    """The largest magnitude in both halves of what is no NaN: columns do not mix, so a bad one is nothing to the others."""
    b_x = tl.abs(b_a)
    if TWO:
        b_x = tl.maximum(b_x, tl.abs(b_b))
    return tl.max(tl.max(b_x, axis=1), axis=0)


@triton.jit
def number(b_x):
    """x with NaN in place of infinities."""
    return tl.where(finite(b_x), b_x, float("nan"))


@triton.jit
def part(acc, b_e, p_w, m_n, b_r):
    """acc + r (e @ w), w at p_w."""
    return acc + tl.dot(b_e, tl.load(p_w, mask=m_n, other=0.0, cache_modifier=".cg")) * b_r


@triton.jit
def near_parts(acc, b_0, b_1, p_w, step, m_n, b_r):
    """acc + r (near @ w), near in two halves of its columns; both parts of w are asked for at once."""
    b_w0 = tl.load(p_w, mask=m_n, other=0.0, cache_modifier=".cg")
    b_w1 = tl.load(p_w + step, mask=m_n, other=0.0, cache_modifier=".cg")
    acc += tl.dot(b_0, b_w0) * b_r
    acc += tl.dot(b_1, b_w1) * b_r
    return acc


@triton.jit
def store_rounded(b_x, p_x, p_low, m_x, keep):
    """Store x rounded to the storage type and, unless keep is 0, what that took from it: by integers, as a single conversion is sixteen times slower than a
    pair of them."""
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=m_x)
    if keep != 0:
        b_i = b_x.to(tl.int32, bitcast=True)
        b_high = ((b_i + 32767 + ((b_i >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        tl.store(p_low, (b_x - b_high).to(p_low.dtype.element_ty), mask=m_x)


@triton.jit
def summit(b_a, b_b, m_row, TWO: tl.constexpr):
    """The largest magnitude in both halves, NaN where one is or a row is bad; infinite where that is the largest."""
    b_x = tl.abs(b_a)
    if TWO:
        b_x = larger(b_x, tl.abs(b_b))
    return tl.reduce(tl.where(m_row, b_x, float("nan")), None, larger)


@triton.jit
def cleaned(b_x, b_zero, p_bad, m_x):
    """x with zeros in place of what is not finite and of bad rows, whose b_zero is NaN and else 0; p_bad, in the storage type, keeps NaN where that was, so
    that no register has to."""
    b_mark = b_x * b_zero[:, None]
    tl.store(p_bad, b_mark.to(p_bad.dtype.element_ty), mask=m_x)
    return tl.where(b_mark == 0.0, b_x, 0.0)


@triton.jit
def poisoned(b_x, p_bad, m_x, o_r):
    """x with NaN in each column from the first row on where p_bad keeps one: not in the rows before it."""
    b_bad = tl.load(p_bad, mask=m_x, other=0.0).to(tl.float32)
    b_first = tl.min(tl.where(finite(b_bad), o_r.shape[0], o_r[:, None]), axis=0)
    return tl.where(o_r[:, None] >= b_first[None, :], float("nan"), b_x)


@triton.jit
def places(i_b, i_r, o_r, row0, T, D, R, B, BT: tl.constexpr):
    """Of the block's rows: which there are, where those of f, those of the inverse; offsets within a tile, and rows of all blocks."""
    start = row0 + i_r * BT
    m_f = (start + o_r < T)[:, None]
    p_f = (i_b * T + start) * D
    o_i = o_r[:, None] * BT + o_r[None, :]
    p_i = (i_b * R + i_r * BT) * BT
    return m_f, p_f, p_i, o_i, (B * R).to(tl.int64)


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve_halves"))
def feedback_solve_halves(
    e, peak, row_peak, factor, inverse, inverse_low, near, near_low, near_scale, f, s, s_low, w, w_low, scales, past_length, sync,
    T, D, C, R, NP, NT, row0, B, panel, panels, keep,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TWO: tl.constexpr, ALONE: tl.constexpr, PAST: tl.constexpr = True,
    PDL: tl.constexpr = 0,
):  # fmt: skip
    """`forward.feedback_solve`; inverse, near_low and w_low are not used. ALONE, where a program has a multiprocessor to itself: what needs no other block is
    asked for before the far products, and every thread waits for the neighbours itself. PAST: whether there may be one. With PDL only near tiles are what the
    kernel before this one makes: it may be launched while that one runs."""
    H: tl.constexpr = BN // 2 if TWO else BN
    PARTS: tl.constexpr = BT // BK
    tl.static_assert(PARTS == 2)
    tiles_n = tl.cdiv(D, BN)
    i_n, i_b, i_r = take_ticket(sync + panel, tiles_n, B)
    block = row0 // BT + i_r
    p_done = sync + panels + i_b * tiles_n + i_n
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BT) if PAST else 0
    far = past_tiles + tl.maximum(block - 2, 0)

    o_r, o_p, o_n = tl.arange(0, BT), tl.arange(0, BK), i_n * BN + tl.arange(0, H)
    m_a, m_b = (o_n < D)[None, :], (o_n + H < D)[None, :]
    o_e = o_r[:, None] * C + o_p[None, :]
    o_f = o_p[:, None] * D + o_n[None, :]
    o_w = o_r[:, None] * D + o_n[None, :]
    p_e = e + (i_b * R + i_r * BT) * C
    p_w = w + i_b * C * D
    p_peak = peak + i_b * NT * R + i_r * BT + o_r
    p_scale = scales + i_b * NT * tiles_n + i_n
    p_row = i_b * R + i_r * BT + o_r
    b_most = tl.load(row_peak + p_row)
    b_factor = tl.load(factor + p_row)

    if ALONE:
        tl.static_assert(not TWO)
        m_f, p_f, p_i, o_i, deep = places(i_b, i_r, o_r, row0, T, D, R, B, BT)
        b_inverse = tl.load(near + INVERSE * deep * BT + p_i + o_i)
        b_c = tl.load(near_scale + INVERSE * deep + p_row)
        b_f = tl.load(f + p_f + o_w, mask=m_f & m_a, other=0.0)
        b_top = row_top(b_f.to(tl.float32))
    b_a = tl.zeros([BT, H], dtype=tl.float32)
    b_b = b_a
    i = 0
    ready = 0
    while i < far:
        stop = past_tiles
        own = i >= past_tiles if PAST else True
        if own:
            ready = wait_for(p_done, i - past_tiles + 1)
            stop = tl.minimum(past_tiles + ready, far)
        for j in tl.range(i * PARTS, stop * PARTS, num_stages=STAGES):
            tile = j // PARTS
            i_t = tl.where(tile < past_tiles, tile, tile - past_tiles + NP) if PAST else tile + NP
            b_e = tl.load(p_e + i_t * BT + j % PARTS * BK + o_e)
            p_tile = p_w + (i_t.to(tl.int64) * BT + j % PARTS * BK) * D + o_f
            b_r = b_factor * tl.exp(tl.load(p_peak + i_t.to(tl.int64) * R) - b_most) * tl.load(p_scale + i_t * tiles_n)
            b_a = part(b_a, b_e, p_tile, m_a, b_r[:, None])
            if TWO:
                b_b = part(b_b, b_e, p_tile + H, m_b, b_r[:, None])
        i = stop

    if not ALONE:
        m_f, p_f, p_i, o_i, deep = places(i_b, i_r, o_r, row0, T, D, R, B, BT)
        b_inverse = tl.load(near + INVERSE * deep * BT + p_i + o_i)
    if ALONE:  # a bound of what x can be is as good as its largest magnitude
        b_top = row_top(b_a) + b_top
        b_a += b_f.to(tl.float32)
        amax = tl.reduce(tl.where(finite(b_factor), b_top, float("nan")), 0, larger)
    else:
        b_a += tl.load(f + p_f + o_w, mask=m_f & m_a, other=0.0).to(tl.float32)
        if TWO:
            b_b += tl.load(f + p_f + o_w + H, mask=m_f & m_b, other=0.0).to(tl.float32)
        amax = summit(b_a, b_b, finite(b_factor)[:, None], TWO)
    bad = not finite(amax)
    if bad:  # rare, and of few registers: what it needs is stored and loaded wherever it is
        b_zero = 0.0 * b_factor
        b_a = cleaned(b_a, b_zero, s + p_f + o_w, m_f & m_a)
        if TWO:
            b_b = cleaned(b_b, b_zero, s + p_f + o_w + H, m_f & m_b)
        amax = tl.max(tl.maximum(tl.abs(b_a), tl.abs(b_b)) if TWO else tl.abs(b_a))
    c, inv = power_scale(amax)
    if not ALONE:
        b_c = tl.load(near_scale + INVERSE * deep + p_row)
    b_r = (b_c * inv)[:, None]
    b_x, b_y = (b_a * c).to(tl.float16), (b_b * c).to(tl.float16)
    b_a = tl.dot(b_inverse, b_x)
    if TWO:
        b_b = tl.dot(b_inverse, b_y) * b_r
    b_a *= b_r
    if bad:
        tl.debug_barrier()
        b_a = poisoned(b_a, s + p_f + o_w, m_f & m_a, o_r)
        if TWO:
            b_b = poisoned(b_b, s + p_f + o_w + H, m_f & m_b, o_r)
    if PDL:  # noqa: SIM102
        if block > 0:  # near tiles of the first there are none
            wait_early(PDL)
    o_i = o_r[:, None] * BT + o_p[None, :]
    if TWO:  # as above: fewer registers, where the way from block to block is not what the solve waits for
        i = tl.maximum(block - 2, 0)
        while i < block:
            if ready <= i:
                ready = wait_for(p_done, i + 1)
            stop = tl.minimum(ready, block)
            for j in tl.range(i * PARTS, stop * PARTS, num_stages=STAGES):
                at = (block - 1 - j // PARTS) * deep
                b_e = tl.load(near + at * BT + p_i + j % PARTS * BK + o_i)
                p_tile = p_w + ((NP + j // PARTS).to(tl.int64) * BT + j % PARTS * BK) * D + o_f
                b_s = tl.load(near_scale + at + p_row) * tl.load(p_scale + (NP + j // PARTS) * tiles_n)
                b_a = part(b_a, b_e, p_tile, m_a, b_s[:, None])
                b_b = part(b_b, b_e, p_tile + H, m_b, b_s[:, None])
            i = stop
    else:
        nearest = tl.minimum(block, 2)
        for d in tl.range(0, nearest, num_stages=1):
            back = nearest - d  # 2, then 1
            i_t = NP + block - back
            p_near = near + (back - 1) * deep * BT + p_i + o_i
            b_0, b_1 = tl.load(p_near), tl.load(p_near + BK)
            b_s = tl.load(near_scale + (back - 1) * deep + p_row)
            if ALONE:
                if ready < block - back + 1:
                    ready = wait_each(p_done, block - back + 1)
                at = i_t.to(tl.int64) * BT * D
            else:
                at = i_t.to(tl.int64) * BT * D
                if ready < block - back + 1:
                    at = wait_one(p_done, block - back + 1, at)
                at = tl.multiple_of(at, 16)
            b_s = (b_s * tl.load(p_scale + i_t * tiles_n))[:, None]
            p_tile = p_w + at + o_f
            b_a = near_parts(b_a, b_0, b_1, p_tile, BK * D, m_a, b_s)
    c, inv = power_scale(tl.max(tl.abs(b_a)) if ALONE else reach(b_a, b_b, TWO))
    p_tile = p_w + (NP + block).to(tl.int64) * BT * D + o_w
    tl.store(p_tile, (b_a * c).to(tl.float16), mask=m_a)
    if TWO:
        tl.store(p_tile + H, (b_b * c).to(tl.float16), mask=m_b)
    tl.store(p_scale + (NP + block) * tiles_n, inv)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, block + 1, sem="release", scope="gpu")
    store_rounded(b_a, s + p_f + o_w, s_low + p_f + o_w, m_f & m_a, keep)
    if TWO:
        store_rounded(b_b, s + p_f + o_w + H, s_low + p_f + o_w + H, m_f & m_b, keep)


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve_halves_transposed"))
def feedback_solve_halves_transposed(
    e, factor, inverse, inverse_low, near, near_low, near_scale, ds, u, u_low, w, w_low, scales, carry, dpast_s, past_length, bad, sync,
    T, P, D, C, R, NP, row0, blocks, B, panel, panels, add,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """`backward.feedback_solve_transposed`; inverse, near_low and w_low are not used."""
    H: tl.constexpr = BN // 2 if TWO else BN
    PARTS: tl.constexpr = BT // BK
    tl.static_assert(PARTS == 2)
    tiles_n = tl.cdiv(D, BN)
    i_n, i_b, rank = take_ticket(sync + panel, tiles_n, B)
    inside = rank < blocks
    i_r = blocks - 1 - rank
    # column tile: the panel's own blocks downwards, then everything before them downwards
    i_t = NP + row0 // BT + i_r
    p_done = sync + panels + (panel * B + i_b) * tiles_n + i_n
    live = (i_t >= NP) | (i_t < tl.cdiv(tl.load(past_length + i_b), BT))
    far = tl.where(inside, tl.maximum(rank - 2, 0), tl.where(live, blocks, 0))

    o_r, o_p, o_n = tl.arange(0, BT), tl.arange(0, BK), i_n * BN + tl.arange(0, H)
    m_a, m_b = (o_n < D)[None, :], (o_n + H < D)[None, :]
    o_e = o_p[:, None] * C + o_r[None, :]
    o_f = o_p[:, None] * D + o_n[None, :]
    o_w = o_r[:, None] * D + o_n[None, :]
    p_e = e + i_b * R * C + i_t * BT
    p_w = w + i_b * R * D
    p_scale = scales + i_b * (R // BT) * tiles_n + i_n

    start = row0 + i_r * BT
    m_f = inside & (start + o_r < T)[:, None]
    m_ds = inside & (start + o_r < T - tl.load(bad + i_b))[:, None]
    p_f = (i_b * T + start) * D + o_w
    p_carry = carry + (i_b * C + i_t * BT) * D + o_w
    b_a = tl.load(ds + p_f, mask=m_ds & m_a, other=0.0).to(tl.float32)
    b_b = b_a
    if TWO:
        b_b = tl.load(ds + p_f + H, mask=m_ds & m_b, other=0.0).to(tl.float32)
    if add != 0:
        b_a += tl.load(p_carry, mask=m_a, other=0.0)
        if TWO:
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
            b_a = part(b_a, b_e, p_tile, m_a, r)
            if TWO:
                b_b = part(b_b, b_e, p_tile + H, m_b, r)
        i = stop

    if inside:
        p_row = i_b * R + i_r * BT + o_r
        p_i = (i_b * R + i_r * BT) * BT + o_r[None, :]
        deep = (B * R).to(tl.int64)
        b_inverse = tl.trans(tl.load(near + INVERSE * deep * BT + p_i + o_r[:, None] * BT))
        b_c = tl.load(near_scale + INVERSE * deep + p_row)[:, None]
        b_a = b_a * b_c
        if TWO:
            b_b = b_b * b_c
        c, inv = power_scale(reach(number(b_a), number(b_b), TWO))
        b_a = tl.dot(b_inverse, (b_a * c).to(tl.float16)) * inv
        if TWO:
            b_b = tl.dot(b_inverse, (b_b * c).to(tl.float16)) * inv
        if TWO:
            i = tl.maximum(rank - 2, 0)
            while i < rank:
                if ready <= i:
                    ready = wait_for(p_done, i + 1)
                stop = tl.minimum(ready, rank)
                for j in tl.range(i * PARTS, stop * PARTS, num_stages=STAGES):
                    back = rank - j // PARTS  # 2, then 1
                    at = (back - 1) * deep
                    b_e = tl.trans(tl.load(near + (at + j % PARTS * BK) * BT + p_i + o_p[:, None] * BT))
                    p_tile = p_w + ((i_r + back).to(tl.int64) * BT + j % PARTS * BK) * D + o_f
                    b_s = tl.load(near_scale + at + p_row) * tl.load(p_scale + (i_r + back) * tiles_n)
                    b_a = part(b_a, b_e, p_tile, m_a, b_s[:, None])
                    b_b = part(b_b, b_e, p_tile + H, m_b, b_s[:, None])
                i = stop
        else:
            nearest = tl.minimum(rank, 2)
            for d in tl.range(0, nearest, num_stages=1):
                back = nearest - d  # 2, then 1
                i_l = i_r + back
                p_near = near + (back - 1) * deep * BT + p_i + o_p[:, None] * BT
                b_0, b_1 = tl.trans(tl.load(p_near)), tl.trans(tl.load(p_near + BK * BT))
                b_s = tl.load(near_scale + (back - 1) * deep + p_row)
                if ready < rank - back + 1:
                    ready = wait_for(p_done, rank - back + 1)
                b_s = (b_s * tl.load(p_scale + i_l * tiles_n))[:, None]
                p_tile = p_w + i_l.to(tl.int64) * BT * D + o_f
                b_a = near_parts(b_a, b_0, b_1, p_tile, BK * D, m_a, b_s)
        b_factor = tl.load(factor + p_row)[:, None]
        c, inv = power_scale(reach(number(b_a * b_factor), number(b_b * b_factor), TWO))
        p_tile = p_w + i_r.to(tl.int64) * BT * D + o_w
        tl.store(p_tile, (b_a * (b_factor * c)).to(tl.float16), mask=m_a)
        if TWO:
            tl.store(p_tile + H, (b_b * (b_factor * c)).to(tl.float16), mask=m_b)
        tl.store(p_scale + i_r * tiles_n, inv)
        tl.debug_barrier()
        tl.atomic_xchg(p_done, rank + 1, sem="release", scope="gpu")
        store_rounded(b_a, u + p_f, u_low + p_f, m_f & m_a, 1)
        if TWO:
            store_rounded(b_b, u + p_f + H, u_low + p_f + H, m_f & m_b, 1)
    elif (i_t < NP) & (row0 == 0):
        row = i_t * BT
        p_past = dpast_s + (i_b * P + row) * D + o_w
        m_past = (row + o_r < P)[:, None]
        tl.store(p_past, b_a.to(dpast_s.dtype.element_ty), mask=m_past & m_a)
        if TWO:
            tl.store(p_past + H, b_b.to(dpast_s.dtype.element_ty), mask=m_past & m_b)
    else:
        tl.store(p_carry, b_a, mask=m_a)
        if TWO:
            tl.store(p_carry + H, b_b, mask=m_b)

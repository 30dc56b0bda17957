"""Block inverses of feedback attention in registers: `feedback_combine` for 128 rows in 16-bit storage, with fewer waits for memory.

Every piece of the block is loaded before the row sums are known, halves are merged in registers, and what the solve reads is stored as it comes.
"""

import triton
import triton.language as tl

from sessa_deploy.kernels.feedback.tiles import finite, store_near
from sessa_deploy.kernels.launch import table

BLOCK = tl.constexpr(128)


@triton.jit
def routed(b_e, b_own):
    """b_e by row factors that broadcast to it; rows of factor zero, bad ones among them, are zero whatever they hold."""
    return tl.where(b_own == 0.0, 0.0, b_e.to(tl.float32) * b_own)


@triton.jit
def lower_rows(b_v, N: tl.constexpr, H: tl.constexpr):
    """Of each 2H entries of b_v (2 N H,) the last H, as (N,H)."""
    _, b_low = tl.split(tl.permute(tl.reshape(b_v, [N, 2, H]), [0, 2, 1]))
    return b_low


@triton.jit
def halves(b_x, N: tl.constexpr, H: tl.constexpr):
    """(N,H,H) even and odd members of b_x (2 N,H,H)."""
    return tl.split(tl.permute(tl.reshape(b_x, [N, 2, H, H]), [0, 2, 3, 1]))


@triton.jit
def pair_of(b_x):
    """b_x as a bfloat16 pair of 16 bits. The high half is cut, not rounded: it is then b_x without its low bits, which costs one instruction."""
    b_h = (b_x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return b_h.to(tl.bfloat16), (b_x - b_h).to(tl.bfloat16)


@triton.jit
def pair_product(b_ah, b_al, b_bh, b_bl):
    """a @ b of two bfloat16 pairs."""
    acc = tl.dot(b_ah, b_bl)
    acc = tl.dot(b_al, b_bh, acc)
    return tl.dot(b_ah, b_bh, acc)


@triton.jit
def product(b_a, b_b):
    """a @ b of float32 operands, 16 bits of each."""
    b_ah, b_al = pair_of(b_a)
    b_bh, b_bl = pair_of(b_b)
    return pair_product(b_ah, b_al, b_bh, b_bl)


@triton.jit
def merged(b_x, b_21, N: tl.constexpr, H: tl.constexpr):
    """Inverses (N,2H,2H) of blocks whose diagonal halves have the inverses b_x (2 N,H,H), b_21 (N,H,H) below them: x21 = x22 (b21 x11)."""
    b_11, b_22 = halves(b_x, N, H)
    b_y = product(b_22, product(b_21, b_11))
    b_rows = tl.join(tl.join(b_11, b_y), tl.join(tl.zeros([N, H, H], dtype=tl.float32), b_22))  # (n, row, column, lower row, right column)
    return tl.reshape(tl.permute(b_rows, [0, 3, 1, 4, 2]), [N, 2 * H, 2 * H])


@triton.jit
def store_pair(b_x, high, low, p):
    """b_x as a bfloat16 pair."""
    b_h, b_l = pair_of(b_x)
    tl.store(high + p, b_h)
    tl.store(low + p, b_l)


@triton.jit
def below(p_e, C, N: tl.constexpr, H: tl.constexpr):
    """(N,H,H) blocks under the diagonal halves of the 2H-wide blocks of the tile at p_e."""
    o_n, o_h = tl.arange(0, N), tl.arange(0, H)
    return tl.load(p_e + (o_n[:, None, None] * 2 * H + H + o_h[None, :, None]) * C + o_n[:, None, None] * 2 * H + o_h[None, None, :])


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_combine_direct"))
def feedback_combine_direct(
    e, peak, total, gamma, past_length, row_peak, factor, lse, x, inverse, inverse_low, near, near_low, near_scale, T, C, R, NP, NT, row0, B, blocks,
    CHUNK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """`feedback_combine` with BT = 128 and SPLIT, of near the high halves alone; x is not used."""
    i_r, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = row0 // BLOCK + i_r
    o_r = tl.arange(0, BLOCK)
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BLOCK)
    count = past_tiles + block + 1
    p_stat = i_b * NT * R + i_r * BLOCK + o_r
    row = row0 + i_r * BLOCK + o_r
    b_gamma = tl.load(gamma + i_b * T + row, mask=row < T, other=0.0)
    p_own = e + (i_b * R + i_r * BLOCK) * C + (NP + block) * BLOCK
    o_8, o_16 = tl.arange(0, 8), tl.arange(0, 16)
    b_e16 = tl.load(p_own + (o_8[:, None, None] * 16 + o_16[None, :, None]) * C + o_8[:, None, None] * 16 + o_16[None, None, :])
    b_e21 = below(p_own, C, 4, 16)
    b_e32 = below(p_own, C, 2, 32)
    o_h = tl.arange(0, 64)
    o_q = o_h[:, None] * C + o_h[None, :]
    b_e64 = tl.load(p_own + 64 * C + o_q)
    # the two tiles beside it: before the block in its rows, or below it in its columns
    o_e = o_r[:, None] * C + o_r[None, :]
    step = BLOCK * C if BACKWARD else -BLOCK
    sides = blocks - 1 - i_r if BACKWARD else block
    b_n = tl.load(p_own + step + o_e, mask=sides > 0, other=0.0)
    p_beside = peak + p_stat + (NP + block).to(tl.int64) * R
    if not BACKWARD:
        b_p = tl.load(p_beside)

    b_peak = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i_c in range(0, count, CHUNK):
        o_c = i_c + tl.arange(0, CHUNK)
        o_t = tl.where(o_c < past_tiles, o_c, o_c - past_tiles + NP).to(tl.int64)
        m_c = (o_c < count)[:, None]
        b_l = tl.load(total + o_t[:, None] * R + p_stat[None, :], mask=m_c, other=0.0)
        if BACKWARD:
            b_sum += tl.sum(b_l, axis=0)
        else:
            b_t = tl.load(peak + o_t[:, None] * R + p_stat[None, :], mask=m_c, other=float("-inf"))
            b_new = tl.maximum(b_peak, tl.max(b_t, axis=0))
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_sum = b_sum * tl.exp(b_peak - b_base) + tl.sum(b_l * tl.exp(b_t - b_base[None, :]), axis=0)
            b_peak = b_new
    b_base = tl.where(b_peak == float("-inf"), 0.0, b_peak)
    p_row = i_b * R + i_r * BLOCK + o_r
    b_factor = tl.where(b_sum > 0, b_gamma / b_sum, tl.where(b_sum == 0, 0.0 * b_gamma, float("nan")))
    m_ok = finite(b_factor)
    b_scale = tl.where(m_ok, b_factor, 0.0)
    b_own = b_scale
    if BACKWARD:
        tl.store(factor + p_row, b_scale)
        tl.store(row_peak + p_row, tl.where(b_sum > 0, 1.0 / b_sum, 0.0))
    else:
        tl.store(factor + p_row, tl.where(m_ok, b_factor, float("nan")))
        tl.store(row_peak + p_row, b_base)
        tl.store(lse + i_b * T + row, tl.where(b_sum == 0, float("-inf"), b_peak + tl.log(b_sum)), mask=row < T)
        b_own = tl.where(m_ok, b_scale * tl.exp(b_p - b_base), 0.0)

    # 16-wide blocks: the sum of b^k, k < 16, by squaring
    b_b = tl.where(o_16[None, None, :] < o_16[None, :, None], routed(b_e16, tl.reshape(b_own, [8, 16])[:, :, None]), 0.0)
    b_x = b_b + tl.where((o_16[None, :, None] == o_16[None, None, :]) & (o_8[:, None, None] >= 0), 1.0, 0.0)
    for _ in tl.static_range(3):
        b_b = product(b_b, b_b)
        b_x += product(b_x, b_b)
    b_x = merged(b_x, routed(b_e21, lower_rows(b_own, 4, 16)[:, :, None]), 4, 16)
    b_x = merged(b_x, routed(b_e32, lower_rows(b_own, 2, 32)[:, :, None]), 2, 32)
    b_11, b_22 = tl.split(tl.permute(b_x, [1, 2, 0]))
    b_own64 = tl.reshape(lower_rows(b_own, 1, 64), [64])
    b_y = product(b_22, product(routed(b_e64, b_own64[:, None]), b_11))
    p_i = (i_b * R + i_r * BLOCK) * BLOCK
    o_i = o_h[:, None] * BLOCK + o_h[None, :]
    store_pair(b_11, inverse, inverse_low, p_i + o_i)
    store_pair(b_22, inverse, inverse_low, p_i + 64 * BLOCK + 64 + o_i)
    store_pair(b_y, inverse, inverse_low, p_i + 64 * BLOCK + o_i)
    store_pair(tl.zeros([64, 64], dtype=tl.float32), inverse, inverse_low, p_i + 64 + o_i)
    tl.debug_barrier()
    p_n = p_i + o_r[:, None] * BLOCK + o_r[None, :]
    b_h, b_l = tl.load(inverse + p_n), tl.load(inverse_low + p_n)
    deep = (B * R).to(tl.int64)
    for d in tl.static_range(2):
        b_other = b_n
        if d == 0:  # the second tile comes in beside the first product
            b_n = tl.load(p_own + 2 * step + o_e, mask=sides > 1, other=0.0)
        if BACKWARD:
            b_nh, b_nl = pair_of(b_other.to(tl.float32))
            b_m = pair_product(b_nh, b_nl, b_h, b_l)
        else:
            b_p = tl.load(p_beside - (1 + d) * R.to(tl.int64), mask=sides > d, other=float("-inf"))
            b_nh, b_nl = pair_of(routed(b_other, tl.where(m_ok, b_scale * tl.exp(b_p - b_base), 0.0)[:, None]))
            b_m = pair_product(b_h, b_l, b_nh, b_nl)
        store_near(b_m, near, near_low, near_scale, p_n + d * deep * BLOCK, p_row + d * deep, 0 if BACKWARD else 1, False)

"""What the forward and the backward of feedback attention share: tile products, the reduced-precision split, row statistics, block inverses.

Names: b_ a block's values, p_ a pointer, o_ offsets, m_ a mask, i_ an index. BM rows, BT columns of a routing tile (and rows of a diagonal block),
BN columns of D. The routing matrix has columns [past | new], each part padded to a multiple of BT. See README.md for the algorithm.
"""

import triton
import triton.language as tl

from sessa_deploy.kernels.device import open_early
from sessa_deploy.kernels.launch import table

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp four for the sake of numbers below the normal ones
SUB = tl.constexpr(16)  # edge of the blocks that are inverted by forward substitution


@triton.jit
def finite(x):
    """Elementwise: neither NaN nor Inf."""
    return tl.abs(x) < float("inf")


@triton.jit
def power_scale(amax):
    """(c, 1/c), powers of two, with c * amax in [2^14, 2^15) for a finite positive float32 amax; harmless values for 0, NaN and Inf."""
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) & 255
    biased = tl.minimum(tl.maximum(268 - exponent, 1), 253)
    return (biased << 23).to(tl.float32, bitcast=True), ((254 - biased) << 23).to(tl.float32, bitcast=True)


@triton.jit
def apart(b_y, n):
    """b_y, a float32 dot, kept out of the sum it is added to; n: any positive number known only at run time.

    A bare addition is folded into the dot, which then rounds after each of its terms at the size of the whole sum.
    """
    return b_y * tl.where(n > 0, 1.0, 0.0)


@triton.jit
def product_nt(acc, p_a, p_b, rows_a, rows_b, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """acc + a b^T over D columns, a (BM rows of stride D), b (BN rows of stride D); rows from rows_a / rows_b on repeat the last one.

    acc and the sums are float32. float32 operands are summed BK columns at a time: a sum that cancels then keeps more of its digits.
    """
    o_a, o_b, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    p_a = p_a + tl.minimum(o_a, rows_a - 1)[:, None] * D + o_k[None, :]
    p_b = p_b + tl.minimum(o_b, rows_b - 1)[:, None] * D + o_k[None, :]
    for i_k in range(0, D, BK):
        m_k = (o_k < D - i_k)[None, :]
        b_a = tl.load(p_a + i_k, mask=m_k, other=0.0)
        b_b = tl.load(p_b + i_k, mask=m_k, other=0.0)
        if p_a.dtype.element_ty == tl.float32:
            acc += apart(tl.dot(b_a, tl.trans(b_b), input_precision="ieee"), D)
        else:
            acc = tl.dot(b_a, tl.trans(b_b), acc, input_precision="ieee")
    return acc


@triton.jit
def grouped_tile(pid, base, BM: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of program `pid`: groups of GROUP row tiles, column-major inside, each group as wide as its last row needs.

    base: column tiles before the first row's own. The launch grid is `grouped_size`.
    """
    step = GROUP * BM // BT  # column tiles a group adds
    half = base + 0.5 * step
    group = ((tl.sqrt(half * half + 2.0 * step * (pid // GROUP).to(tl.float32)) - half) / step).to(tl.int32)
    group = tl.maximum(group, 0)
    if GROUP * (base * group + step * group * (group + 1) // 2) > pid:
        group -= 1
    if GROUP * (base * (group + 1) + step * (group + 1) * (group + 2) // 2) <= pid:
        group += 1
    inside = pid - GROUP * (base * group + step * group * (group + 1) // 2)
    return group * GROUP + inside % GROUP, inside // GROUP


def grouped_size(row_tiles: int, base: int, rows: int, columns: int, group: int) -> int:
    """Programs that `grouped_tile` needs for `row_tiles` tiles of `rows` rows."""
    n, step = -(-row_tiles // group), group * rows // columns
    return group * (base * n + step * n * (n + 1) // 2)


@triton.jit
def grouped_count(row_tiles, base, BM: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr):
    """`grouped_size` on the device."""
    n = tl.cdiv(row_tiles, GROUP)
    return GROUP * (base * n + (GROUP * BM // BT) * n * (n + 1) // 2)


@triton.jit
def clear(sync, n_sync):
    """Zeros in the counters of a solve, for one program to write."""
    for i in range(0, n_sync, 1024):
        o_i = i + tl.arange(0, 1024)
        tl.store(sync + o_i, tl.zeros([1024], dtype=tl.int32), mask=o_i < n_sync)


@triton.jit
def _score_tile(
    pid, i_b, length, live, q, k, past_k, lse, bad, e, peak, total, T, P, D, C, R, NP, NT, row0, scale,
    BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NB: tl.constexpr, GROUP: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The pid-th tile of `feedback_scores`, of a past of `live` column tiles, a multiple of NB."""
    i_m, i_t = grouped_tile(pid, (live + row0 // BT) // NB, BM, NB * BT, GROUP)
    i_t = i_t * NB
    is_past = i_t < live
    column = tl.where(is_past, i_t, i_t - live) * BT
    i_t = tl.where(is_past, i_t, i_t - live + NP)
    first = row0 + i_m * BM
    limit = tl.where(is_past, length, T)
    if (i_m * BM < R) & (i_t < NT) & (first < T) & (column < limit) & (is_past | (column < first + BM)):
        p_k = k + i_b.to(tl.int64) * T * D + column.to(tl.int64) * D
        if is_past:
            p_k = past_k + i_b.to(tl.int64) * P * D + column.to(tl.int64) * D
        p_q = q + i_b.to(tl.int64) * T * D + first.to(tl.int64) * D
        acc = product_nt(tl.zeros([BM, NB * BT], dtype=tl.float32), p_q, p_k, T - first, limit - column, D, BM, NB * BT, BK) * scale
        o_m, o_t = first + tl.arange(0, BM), column + tl.arange(0, NB * BT)
        if BACKWARD:
            end = T - tl.load(bad + i_b)
            seen = (o_t < limit)[None, :] & (o_m < end)[:, None] & (is_past | ((o_t[None, :] < o_m[:, None]) & (o_t < end)[None, :]))
            b_ref = tl.load(lse + i_b.to(tl.int64) * T + o_m, mask=o_m < end, other=0.0)
            b_ref = tl.where(finite(b_ref), b_ref, 0.0)
            b_e = (tl.exp2(tl.where(seen, acc - b_ref[:, None], float("-inf")) * LOG2E) * 32768.0).to(e.dtype.element_ty)
            b_e = tl.reshape(b_e, [BM, NB, BT])
        else:
            tl.static_assert(NB * BT >= BM)
            if (column <= first) & (first < column + NB * BT) & (is_past == 0):
                # q_t . k_t is not finite where q_t or k_t is not
                b_own = tl.sum(tl.where(o_t[None, :] == o_m[:, None], acc, 0.0), axis=1)
                tl.store(lse + i_b.to(tl.int64) * T + o_m, 0.0 * b_own, mask=o_m < T)
            if (column + NB * BT > limit) | (first + BM > T) | ((column + NB * BT > first) & (is_past == 0)):  # of most tiles every element counts
                seen = (o_t < limit)[None, :] & (o_m < T)[:, None] & (is_past | (o_t[None, :] < o_m[:, None]))
                acc = tl.where(seen, acc, float("-inf"))
            acc = tl.reshape(acc, [BM, NB, BT])
            b_peak = tl.max(acc, axis=2)
            b_e = tl.exp2((acc - tl.where(b_peak == float("-inf"), 0.0, b_peak)[:, :, None]) * LOG2E).to(e.dtype.element_ty)
        o_r = i_m * BM + tl.arange(0, BM)
        p_stat = (i_b.to(tl.int64) * NT + i_t + tl.arange(0, NB))[None, :] * R + o_r[:, None]
        if not BACKWARD:
            tl.store(peak + p_stat, b_peak)
        tl.store(total + p_stat, tl.sum(b_e.to(tl.float32), axis=2))
        p_e = e + (i_b.to(tl.int64) * R + i_m * BM) * C + i_t * BT
        tl.store(p_e + tl.arange(0, BM)[:, None] * C + tl.arange(0, NB * BT)[None, :], tl.reshape(b_e, [BM, NB * BT]))


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_scores"))
def feedback_scores(
    q, k, past_k, past_length, lse, bad, e, peak, total, sync, T, P, D, C, R, NP, NT, row0, n_sync, scale,
    BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NB: tl.constexpr, GROUP: tl.constexpr, BACKWARD: tl.constexpr,
    PAST: tl.constexpr = False, PDL: tl.constexpr = 0,
):  # fmt: skip
    """Routing weights of rows row0 .. row0 + R, not yet normalised, in the work type, and their sums per row and column tile.

    Forward: e = exp(score - peak), peak the row's maximum within the column tile, stored beside; lse is 0, or NaN where q or k may hold NaN or Inf.
    Backward: e = 2^15 exp(score - lse), zero in rows and columns from the sequence's first bad row on (bad = T - row). A program makes NB column tiles;
    NP and NT are multiples of NB.
    `total` sums the rounded values, so normalisation is exact. PAST: the programs take the tiles that there are in turns, whatever the capacity. PDL: the
    next kernel may start when all programs have: the scores of other rows, which read and write nothing of these.
    """
    open_early(PDL)
    i_b = tl.program_id(1)
    if (tl.program_id(0) == 0) & (i_b == 0):
        clear(sync, n_sync)
    length = tl.load(past_length + i_b)
    if PAST:
        live = tl.cdiv(tl.minimum(length, P), NB * BT) * NB
        count = grouped_count(tl.cdiv(tl.minimum(R, T - row0), BM), (live + row0 // BT) // NB, BM, NB * BT, GROUP)
        for pid in range(tl.program_id(0), count, tl.num_programs(0)):
            _score_tile(
                i_b * 0 + pid, i_b, length, live, q, k, past_k, lse, bad, e, peak, total, T, P, D, C, R, NP, NT, row0, scale, BM, BT, BK, NB, GROUP, BACKWARD
            )  # fmt: skip
    else:
        _score_tile(
            tl.program_id(0), i_b, length, NP, q, k, past_k, lse, bad, e, peak, total, T, P, D, C, R, NP, NT, row0, scale, BM, BT, BK, NB, GROUP, BACKWARD
        )  # fmt: skip


@triton.jit
def pair_product(b_ah, b_al, b_bh, b_bl):
    """a @ b of two bfloat16 pairs in three products: 16 bits, float32's range."""
    acc = tl.dot(b_ah, b_bl)
    acc = tl.dot(b_al, b_bh, acc)
    return tl.dot(b_ah, b_bh, acc)


@triton.jit
def pair_dot(b_a, b_b, SPLIT: tl.constexpr):
    """b_a @ b_b for float32 operands: bfloat16 pairs in three products (16 bits, float32's range), or float32 products."""
    if SPLIT:
        b_ah, b_bh = b_a.to(tl.bfloat16), b_b.to(tl.bfloat16)
        b_al, b_bl = (b_a - b_ah.to(tl.float32)).to(tl.bfloat16), (b_b - b_bh.to(tl.float32)).to(tl.bfloat16)
        acc = pair_product(b_ah, b_al, b_bh, b_bl)
    else:
        acc = tl.dot(b_a, b_b, input_precision="ieee")
    return acc


@triton.jit
def merge_inverse(p_x, H: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr):
    """Double the width of the inverted diagonal blocks of p_x (BT,BT) from H to 2H, all pairs at once: x21 = x22 (b21 x11), b21 in place."""
    o_h, o_n = tl.arange(0, H), tl.arange(0, BT // (2 * H))
    if BT == 2 * H:
        p_11 = p_x + o_h[:, None] * BT + o_h[None, :]
    else:
        p_11 = p_x + o_n[:, None, None] * (2 * H * (BT + 1)) + o_h[None, :, None] * BT + o_h[None, None, :]
    b_11, b_21, b_22 = tl.load(p_11), tl.load(p_11 + H * BT), tl.load(p_11 + H * (BT + 1))
    if SPLIT and BT == 2 * H:
        b_y = pair_dot(b_22, pair_dot(b_21, b_11, SPLIT), SPLIT)
    else:
        b_y = tl.dot(b_22, tl.dot(b_21, b_11, input_precision="ieee"), input_precision="ieee")
    tl.debug_barrier()
    tl.store(p_11 + H * BT, b_y)
    tl.debug_barrier()


@triton.jit
def store_near(b_m, near, near_low, near_scale, p_tile, p_vector, AXIS: tl.constexpr, SPLIT: tl.constexpr):
    """Store b_m, each row (AXIS 1) or column (AXIS 0) over its largest magnitude, as a float16 pair, and those magnitudes."""
    b_c = tl.max(tl.abs(b_m), axis=AXIS)
    b_c = tl.where(finite(b_c) & (b_c > 1e-30), b_c, 1.0)
    b_i = 1.0 / b_c
    b_m = b_m * (b_i[:, None] if AXIS == 1 else b_i[None, :])
    b_high = b_m.to(near.dtype.element_ty)
    tl.store(near + p_tile, b_high)
    if SPLIT:
        tl.store(near_low + p_tile, (b_m - b_high.to(tl.float32)).to(near.dtype.element_ty))
    tl.store(near_scale + p_vector, b_c)


@triton.jit
def row_sums(peak, total, p_stat, past_tiles, count, R, NP, BT: tl.constexpr, CHUNK: tl.constexpr, BACKWARD: tl.constexpr):
    """(maximum, sum of exponentials) of each of a block's BT rows over its first `count` tiles' own, at p_stat (BT,). Backward: the sum alone counts."""
    b_peak = tl.full([BT], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BT], dtype=tl.float32)
    for i_c in range(0, count, CHUNK):
        o_c = i_c + tl.arange(0, CHUNK)
        o_t = tl.where(o_c < past_tiles, o_c, o_c - past_tiles + NP).to(tl.int64)
        m_c = (o_c < count)[:, None]
        b_l = tl.load(total + o_t[:, None] * R + p_stat[None, :], mask=m_c, other=0.0)
        if BACKWARD:
            b_sum += tl.sum(b_l, axis=0)
        else:
            b_p = tl.load(peak + o_t[:, None] * R + p_stat[None, :], mask=m_c, other=float("-inf"))
            b_new = tl.maximum(b_peak, tl.max(b_p, axis=0))
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_sum = b_sum * tl.exp(b_peak - b_base) + tl.sum(b_l * tl.exp(b_p - b_base[None, :]), axis=0)
            b_peak = b_new
    return b_peak, b_sum


@triton.jit
def row_factors(row_peak, factor, lse, b_gamma, b_peak, b_sum, p_row, p_lse, m_t, BACKWARD: tl.constexpr):
    """Stores what `feedback_combine` says of its rows; (gamma / sum, not finite for a bad row; the same with 0 there; the maximum, 0 where there is none)."""
    b_base = tl.where(b_peak == float("-inf"), 0.0, b_peak)
    b_factor = tl.where(b_sum > 0, b_gamma / b_sum, tl.where(b_sum == 0, 0.0 * b_gamma, float("nan")))
    b_own = tl.where(finite(b_factor), b_factor, 0.0)
    if BACKWARD:
        tl.store(factor + p_row, b_own)
        tl.store(row_peak + p_row, tl.where(b_sum > 0, 1.0 / b_sum, 0.0))
    else:
        tl.store(factor + p_row, tl.where(finite(b_factor), b_factor, float("nan")))
        tl.store(row_peak + p_row, b_base)
        b_mark = tl.load(lse + p_lse, mask=m_t, other=0.0)
        tl.store(lse + p_lse, b_mark + tl.where(b_sum == 0, float("-inf"), b_peak + tl.log(b_sum)), mask=m_t)
    return b_factor, b_own, b_base


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_combine"))
def feedback_combine(
    e, peak, total, gamma, past_length, row_peak, factor, lse, x, inverse, inverse_low, near, near_low, near_scale, T, C, R, NP, NT, row0, B, blocks,
    BT: tl.constexpr, CHUNK: tl.constexpr, BACKWARD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program per block of BT rows: factor = gamma / row sum, (I - B_ii)^-1, and that inverse times the two nearest routing tiles.

    Forward: row maximum and lse too; factor is NaN for a bad row; near[d] = inverse_i B_{i,i-1-d}. Backward: row_peak receives 1 / row sum and
    near[d] = e_{i+1+d,i} inverse_i. The inverse is formed in float32 in the scratch x (B,R,BT): SUB-wide blocks, then merged pairwise, and
    with SPLIT stored as a bfloat16 pair. Bad rows of B_ii count as zero rows: the solve poisons them.
    """
    i_r, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = row0 // BT + i_r
    o_r = tl.arange(0, BT)
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BT)
    count = past_tiles + block + 1
    p_stat = i_b * NT * R + i_r * BT + o_r
    b_peak, b_sum = row_sums(peak, total, p_stat, past_tiles, count, R, NP, BT, CHUNK, BACKWARD)
    row = row0 + i_r * BT + o_r
    b_gamma = tl.load(gamma + i_b * T + row, mask=row < T, other=0.0)
    p_row = i_b * R + i_r * BT + o_r
    b_factor, b_scale, b_base = row_factors(row_peak, factor, lse, b_gamma, b_peak, b_sum, p_row, i_b * T + row, row < T, BACKWARD)

    m_ok = finite(b_factor)[:, None]
    p_e = e + (i_b * R + i_r * BT) * C + (NP + block) * BT + o_r[:, None] * C + o_r[None, :]
    b_own = b_scale
    if not BACKWARD:
        b_own = b_scale * tl.exp(tl.load(peak + p_stat + (NP + block).to(tl.int64) * R) - b_base)
    b_b = tl.where((o_r[None, :] < o_r[:, None]) & m_ok, tl.load(p_e).to(tl.float32) * b_own[:, None], 0.0)
    p_x = x + (i_b * R + i_r * BT) * BT
    p_full = p_x + o_r[:, None] * BT + o_r[None, :]
    tl.store(p_full, b_b)
    tl.debug_barrier()
    N: tl.constexpr = BT // SUB
    o_n, o_s = tl.arange(0, N), tl.arange(0, SUB)
    if SPLIT:
        # sum of b^k, k < 16, by squaring: at this width its error is far below the pair's 16 bits
        p_s = p_x + o_n[:, None, None] * (SUB * BT + SUB) + o_s[None, :, None] * BT + o_s[None, None, :]
        b_p = tl.load(p_s)
        b_x = b_p + tl.where((o_s[None, :, None] == o_s[None, None, :]) & (o_n[:, None, None] >= 0), 1.0, 0.0)
        for _ in tl.static_range(3):
            b_p = tl.dot(b_p, b_p, input_precision="ieee")
            b_x += tl.dot(b_x, b_p, input_precision="ieee")
    else:
        # Row i of a block's inverse is e_i + sum_j b[i,j] x[j,:]; b_x[n,c,j] = x[j,c], so that a sum over j stays inside a warp.
        p_s = p_x + o_n[:, None, None] * (SUB * BT + SUB) + o_s[None, None, :] * BT + o_s[None, :, None]
        b_x = tl.where((o_s[None, :, None] == o_s[None, None, :]) & (o_n[:, None, None] >= 0), 1.0, 0.0)
        for i_s in tl.static_range(1, SUB):
            b_row = tl.load(p_x + o_n[:, None, None] * (SUB * BT + SUB) + i_s * BT + o_s[None, None, :])
            b_new = tl.sum(b_row * b_x, axis=2)
            b_x += tl.where((o_s == i_s)[None, None, :], b_new[:, :, None], 0.0)
    tl.debug_barrier()
    tl.store(p_s, b_x)
    tl.debug_barrier()
    if BT >= 32:
        merge_inverse(p_x, 16, BT, SPLIT)
    if BT >= 64:
        merge_inverse(p_x, 32, BT, SPLIT)
    if BT >= 128:
        merge_inverse(p_x, 64, BT, SPLIT)
    b_x = tl.where(o_r[None, :] <= o_r[:, None], tl.load(p_full), 0.0)
    p_i = (i_b * R + i_r * BT) * BT + o_r[:, None] * BT + o_r[None, :]
    b_high = b_x.to(inverse.dtype.element_ty)
    tl.store(inverse + p_i, b_high)
    if SPLIT:
        tl.store(inverse_low + p_i, (b_x - b_high.to(tl.float32)).to(inverse.dtype.element_ty))
    for d in tl.static_range(2):
        p_n = p_i + d * B * R * BT
        p_v = p_row + d * B * R
        if BACKWARD:
            if i_r + 1 + d < blocks:
                b_e = tl.load(p_e + (1 + d) * BT * C).to(tl.float32)
                store_near(pair_dot(b_e, b_x, SPLIT), near, near_low, near_scale, p_n, p_v, 0, SPLIT)
        elif block > d:
            b_own = b_scale * tl.exp(tl.load(peak + p_stat + (NP + block - 1 - d).to(tl.int64) * R) - b_base)
            b_b = tl.where(m_ok, tl.load(p_e - (1 + d) * BT).to(tl.float32) * b_own[:, None], 0.0)
            store_near(pair_dot(b_x, b_b, SPLIT), near, near_low, near_scale, p_n, p_v, 1, SPLIT)


@triton.jit
def store_split(b_x, amax, high, low, scales, p_tile, p_scale, m_tile, SPLIT: tl.constexpr, LOW: tl.constexpr):
    """Store b_x for later products: with SPLIT as a scaled float16, with LOW a pair of them (22 bits), and 1/scale, else as it is in float32."""
    if SPLIT:
        c, inv = power_scale(amax)
        b_x = b_x * c
        b_high = b_x.to(high.dtype.element_ty)
        tl.store(high + p_tile, b_high, mask=m_tile)
        if LOW:
            tl.store(low + p_tile, (b_x - b_high.to(tl.float32)).to(low.dtype.element_ty), mask=m_tile)
        tl.store(scales + p_scale, inv)
    else:
        tl.store(high + p_tile, b_x, mask=m_tile)


@triton.jit
def near_product(b_near, b_low, w, w_low, o_tile, m_n, FULL: tl.constexpr, LOW: tl.constexpr, SPLIT: tl.constexpr):
    """near @ s of one block: high halves, with LOW also the low half of s, with FULL near's as well."""
    b_w = tl.load(w + o_tile, mask=m_n, other=0.0, cache_modifier=".cg")
    if SPLIT and LOW:
        b_l = tl.load(w_low + o_tile, mask=m_n, other=0.0, cache_modifier=".cg")
        acc = tl.dot(b_near, b_l)
        if FULL:
            acc = tl.dot(b_low, b_w, acc)
        acc = tl.dot(b_near, b_w, acc)
    else:
        acc = tl.dot(b_near, b_w, input_precision="ieee")
    return acc


@triton.jit
def apply_inverse(b_inv, b_low, b_x, SPLIT: tl.constexpr):
    """inverse @ x to float32 accuracy: bfloat16 pairs in three products (16 bits, float32's range), else float32 products."""
    if SPLIT:
        b_h = b_x.to(tl.bfloat16)
        b_l = (b_x - b_h.to(tl.float32)).to(tl.bfloat16)
        acc = pair_product(b_inv, b_low, b_h, b_l)
    else:
        acc = tl.dot(b_inv, b_x, input_precision="ieee")
    return acc

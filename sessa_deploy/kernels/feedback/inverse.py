"""Inverses of blocks in registers, and what they make of the nearest routing tiles: the combination in two kernels, for bfloat16 and blocks of 128 rows.

Products are of bfloat16 pairs on tensor cores, three each, 16 bits with float32's range, but for near forward. A pair's high half is rounded: where it was cut
off, low halves were of one sign, and their product, which is left out, added up along a chain.
"""

import triton
import triton.language as tl

from sessa_deploy.kernels.device import open_early
from sessa_deploy.kernels.feedback.tiles import finite, pair_product, power_scale, row_factors, row_sums
from sessa_deploy.kernels.launch import table

BLOCK = tl.constexpr(128)
INVERSE = tl.constexpr(2)  # where the inverse stands behind the two nearest blocks in near and near_scale


@triton.jit
def pair_of(b_x, HALF: tl.constexpr = False):
    """b_x as a bfloat16 pair, with HALF a float16 pair. Rounded by integers, half up: converting a single value to bfloat16 is sixteen times slower."""
    if HALF:
        b_high = b_x.to(tl.float16)
        b_low = (b_x - b_high.to(tl.float32)).to(tl.float16)
    else:
        b_h = ((b_x.to(tl.int32, bitcast=True) + 32768) & -65536).to(tl.float32, bitcast=True)
        b_high, b_low = b_h.to(tl.bfloat16), (b_x - b_h).to(tl.bfloat16)
    return b_high, b_low


@triton.jit
def product(b_a, b_b, HALF: tl.constexpr = False):
    """a @ b of float32 operands, 16 bits of each, with HALF 22."""
    b_ah, b_al = pair_of(b_a, HALF)
    b_bh, b_bl = pair_of(b_b, HALF)
    return pair_product(b_ah, b_al, b_bh, b_bl)


@triton.jit
def routed(b_e, b_own):
    """b_e by row factors that broadcast to it; rows of factor zero, bad ones among them, are zero whatever they hold."""
    return tl.where(b_own == 0.0, 0.0, b_e.to(tl.float32) * b_own)


@triton.jit
def joined(b_11, b_21, b_22, N: tl.constexpr, H: tl.constexpr):
    """(N,2H,2H) of their quarters (N,H,H), the upper right one zero."""
    b_rows = tl.join(tl.join(b_11, b_21), tl.join(tl.zeros([N, H, H], dtype=tl.float32), b_22))  # (n, row, column, lower row, right column)
    return tl.reshape(tl.permute(b_rows, [0, 3, 1, 4, 2]), [N, 2 * H, 2 * H])


@triton.jit
def merged(b_x, b_21, N: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr = False):
    """Inverses (N,2H,2H) of blocks whose diagonal halves have the inverses b_x (2 N,H,H), b_21 (N,H,H) below them: x21 = x22 (b21 x11)."""
    b_11, b_22 = tl.split(tl.permute(tl.reshape(b_x, [N, 2, H, H]), [0, 2, 3, 1]))
    return joined(b_11, product(b_22, product(b_21, b_11, HALF), HALF), b_22, N, H)


@triton.jit
def inverted(b_e16, b_e21, b_e32, b_e64, b_own16, b_own21, b_own32, b_own64, HALF: tl.constexpr = False):
    """Quarters (64,64) of (I - b)^-1: upper left, lower left, lower right. b: the tile of which b_e16 .. b_e64 are the diagonal blocks and those under them,
    times their rows' factors b_own16 .. b_own64."""
    o_8, o_16 = tl.arange(0, 8), tl.arange(0, 16)
    # 16-wide blocks: the sum of b^k, k < 16, by squaring
    b_b = tl.where(o_16[None, None, :] < o_16[None, :, None], routed(b_e16, b_own16[:, :, None]), 0.0)
    b_x = b_b + tl.where((o_16[None, :, None] == o_16[None, None, :]) & (o_8[:, None, None] >= 0), 1.0, 0.0)
    for _ in tl.static_range(3):
        b_b = product(b_b, b_b, HALF)
        b_x += product(b_x, b_b, HALF)
    b_x = merged(b_x, routed(b_e21, b_own21[:, :, None]), 4, 16, HALF)
    b_x = merged(b_x, routed(b_e32, b_own32[:, :, None]), 2, 32, HALF)
    b_11, b_22 = tl.split(tl.permute(b_x, [1, 2, 0]))
    return b_11, product(b_22, product(routed(b_e64, b_own64[:, None]), b_11, HALF), HALF), b_22


@triton.jit
def tile_factors(p_peak, row_peak, factor, p_row):
    """What a routing tile's rows are multiplied by, its peaks at p_peak; 0 for a bad row."""
    b_factor = tl.load(factor + p_row)
    b_own = b_factor * tl.exp(tl.load(p_peak) - tl.load(row_peak + p_row))
    return tl.where(finite(b_factor), b_own, 0.0)


@triton.jit
def below(p_e, C, N: tl.constexpr, H: tl.constexpr):
    """(N,H,H) blocks under the diagonal halves of the 2H-wide blocks of the tile at p_e."""
    o_n, o_h = tl.arange(0, N), tl.arange(0, H)
    return tl.load(p_e + (o_n[:, None, None] * 2 * H + H + o_h[None, :, None]) * C + o_n[:, None, None] * 2 * H + o_h[None, None, :])


@triton.jit
def store_quarter(b_x, c, high, low, half, p_i, PAIR: tl.constexpr):
    """Store a quarter of an inverse times c as one float16 and, with PAIR, as a pair."""
    if PAIR:
        b_h, b_l = pair_of(b_x)
        tl.store(high + p_i, b_h)
        tl.store(low + p_i, b_l)
    tl.store(half + p_i, (b_x * c).to(half.dtype.element_ty))


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_inverse"))
def feedback_inverse(
    e, peak, total, gamma, past_length, row_peak, factor, lse, x, inverse, inverse_low, near, near_low, near_scale, T, C, R, NP, NT, row0, B, blocks,
    CHUNK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The first half of `feedback_combine`: row statistics, and the inverses of blocks, in near. Backward as pairs too, which the solve of wide rows reads."""
    i_r, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = row0 // BLOCK + i_r
    o_r = tl.arange(0, BLOCK)
    row = row0 + i_r * BLOCK + o_r
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BLOCK)
    count = past_tiles + block + 1
    p_stat = i_b * NT * R + i_r * BLOCK + o_r
    b_gamma = tl.load(gamma + i_b * T + row, mask=row < T, other=0.0)
    p_own = e + (i_b * R + i_r * BLOCK) * C + (NP + block) * BLOCK
    o_8, o_16, o_64 = tl.arange(0, 8), tl.arange(0, 16), tl.arange(0, 64)
    b_e16 = tl.load(p_own + (o_8[:, None, None] * 16 + o_16[None, :, None]) * C + o_8[:, None, None] * 16 + o_16[None, None, :])
    b_e21, b_e32 = below(p_own, C, 4, 16), below(p_own, C, 2, 32)
    b_e64 = tl.load(p_own + 64 * C + o_64[:, None] * C + o_64[None, :])
    b_peak, b_sum = row_sums(peak, total, p_stat, past_tiles, count, R, NP, BLOCK, CHUNK, BACKWARD)
    p_row = i_b * R + i_r * BLOCK + o_r
    b_factor, b_own, b_base = row_factors(row_peak, factor, lse, b_gamma, b_peak, b_sum, p_row, i_b * T + row, row < T, BACKWARD)
    if not BACKWARD:
        b_own = tl.where(finite(b_factor), b_own * tl.exp(tl.load(peak + p_stat + (NP + block).to(tl.int64) * R) - b_base), 0.0)

    p_own = x + i_b * R + i_r * BLOCK  # through memory: each product below wants the rows' factors laid out in another way
    tl.store(p_own + o_r, b_own)
    tl.debug_barrier()
    o_2 = tl.arange(0, 2)
    b_own16 = tl.load(p_own + o_8[:, None] * 16 + o_16[None, :])
    b_own21 = tl.load(p_own + tl.arange(0, 4)[:, None] * 32 + 16 + o_16[None, :])
    b_own32 = tl.load(p_own + o_2[:, None] * 64 + 32 + tl.arange(0, 32)[None, :])
    b_own64 = tl.load(p_own + 64 + o_64)

    b_11, b_21, b_22 = inverted(b_e16, b_e21, b_e32, b_e64, b_own16, b_own21, b_own32, b_own64)
    deep = INVERSE * (B * R).to(tl.int64)
    c, inv = power_scale(tl.maximum(tl.max(tl.abs(b_11)), tl.maximum(tl.max(tl.abs(b_21)), tl.max(tl.abs(b_22)))))
    tl.store(near_scale + deep + p_row, tl.full([BLOCK], 1.0, dtype=tl.float32) * inv)
    p_i = (i_b * R + i_r * BLOCK) * BLOCK + o_64[:, None] * BLOCK + o_64[None, :]
    p_half = near + deep * BLOCK
    store_quarter(b_11, c, inverse, inverse_low, p_half, p_i, BACKWARD)
    store_quarter(tl.zeros([64, 64], dtype=tl.float32), c, inverse, inverse_low, p_half, p_i + 64, BACKWARD)
    store_quarter(b_21, c, inverse, inverse_low, p_half, p_i + 64 * BLOCK, BACKWARD)
    store_quarter(b_22, c, inverse, inverse_low, p_half, p_i + 64 * BLOCK + 64, BACKWARD)


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_near"))
def feedback_near(
    e, peak, total, gamma, past_length, row_peak, factor, lse, x, inverse, inverse_low, near, near_low, near_scale, T, C, R, NP, NT, row0, B, blocks,
    BACKWARD: tl.constexpr, PDL: tl.constexpr = 0,
):  # fmt: skip
    """The second half, grid (blocks, B, 4): near[d] of a block, its high half alone, which is all that the solves read of it in bfloat16. A program
    makes 64 of its rows, backward 64 columns: little shared memory, so that there is room for another kernel's programs beside it. Forward the inverse is taken
    as the float16 that near holds: one product in place of a pair's three, whose last bits near's own rounding takes away. With PDL the solve may start when
    all programs have."""
    open_early(PDL)
    i_r, i_b, d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) // 2
    block = row0 // BLOCK + i_r
    sides = blocks - 1 - i_r if BACKWARD else block
    if sides > d:
        o_r, o_m = tl.arange(0, BLOCK), tl.program_id(2) % 2 * 64 + tl.arange(0, 64)
        p_row, p_m = i_b * R + i_r * BLOCK + o_r, i_b * R + i_r * BLOCK + o_m
        p_i = p_row[:, None] * BLOCK + o_m[None, :] if BACKWARD else p_m[:, None] * BLOCK + o_r[None, :]
        p_e = e + p_row[:, None] * C + (NP + block) * BLOCK + o_r[None, :]
        if BACKWARD:
            b_h, b_l = tl.load(inverse + p_i), tl.load(inverse_low + p_i)
            b_eh, b_el = pair_of(tl.load(p_e + (1 + d) * BLOCK * C).to(tl.float32))
            b_m = pair_product(tl.trans(b_h), tl.trans(b_l), tl.trans(b_eh), tl.trans(b_el))  # transposed: its scales are those of rows
        else:
            deep = INVERSE * (B * R).to(tl.int64)
            b_i = tl.load(near + deep * BLOCK + p_i)
            unit = tl.load(near_scale + deep + i_b * R + i_r * BLOCK)
            b_e = tl.load(p_e - (1 + d) * BLOCK)
            b_own = tile_factors(peak + (i_b * NT + NP + block - 1 - d) * R + i_r * BLOCK + o_r, row_peak, factor, p_row)
            c, inv = power_scale(tl.max(tl.abs(b_own)))
            b_m = tl.dot(b_i, routed(b_e, (b_own * c)[:, None]).to(near.dtype.element_ty)) * (inv * unit)
        deep = d * (B * R).to(tl.int64)
        b_c = tl.max(tl.abs(b_m), axis=1)
        b_c = tl.where(finite(b_c) & (b_c > 1e-30), b_c, 1.0)
        b_m = (b_m * (1.0 / b_c)[:, None]).to(near.dtype.element_ty)
        tl.store(near + deep * BLOCK + p_i, tl.trans(b_m) if BACKWARD else b_m)
        tl.store(near_scale + deep + p_m, b_c)

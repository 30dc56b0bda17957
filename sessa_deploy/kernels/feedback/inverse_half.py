"""The combination in two kernels for float16 and blocks of 128 rows, forward: as inverse.py, with products of float16 pairs, and near's low halves.

float16's rule of errors is eight times tighter than bfloat16's. A float16 pair has 22 bits down to 2^-25, which is enough where no |gamma| is above 1: a
block's inverse then holds nothing larger than 1, nor does any product on the way. With larger gains products are of bfloat16 pairs, which have float32's range.
"""

import triton
import triton.language as tl

from sessa_deploy.kernels.feedback.inverse import BLOCK, below, inverted, joined, pair_of, routed, tile_factors
from sessa_deploy.kernels.feedback.tiles import finite, pair_product, row_factors, row_sums
from sessa_deploy.kernels.launch import table


@triton.jit
def _lower(b_v, N: tl.constexpr, H: tl.constexpr):
    """Of each 2H entries of b_v (2 N H,) the last H, as (N,H)."""
    _, b_low = tl.split(tl.permute(tl.reshape(b_v, [N, 2, H]), [0, 2, 1]))
    return b_low


@triton.jit
def _inverse(b_e16, b_e21, b_e32, b_e64, b_own, HALF: tl.constexpr):
    """`inverted`, whole, as a bfloat16 pair; b_own (BLOCK,)."""
    b_own16, b_own21, b_own32, b_own64 = tl.reshape(b_own, [8, 16]), _lower(b_own, 4, 16), _lower(b_own, 2, 32), tl.reshape(_lower(b_own, 1, 64), [64])
    b_11, b_21, b_22 = inverted(b_e16, b_e21, b_e32, b_e64, b_own16, b_own21, b_own32, b_own64, HALF)
    return pair_of(tl.reshape(joined(b_11[None, :, :], b_21[None, :, :], b_22[None, :, :], 1, 64), [BLOCK, BLOCK]))


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_inverse_half"))
def feedback_inverse_half(
    e, peak, total, gamma, past_length, row_peak, factor, lse, x, inverse, inverse_low, near, near_low, near_scale, T, C, R, NP, NT, row0, B, blocks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The first half of `feedback_combine`: row statistics, and the inverses of blocks. x and near are not used."""
    i_r, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = row0 // BLOCK + i_r
    o_r = tl.arange(0, BLOCK)
    row = row0 + i_r * BLOCK + o_r
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BLOCK)
    p_stat = i_b * NT * R + i_r * BLOCK + o_r
    b_gamma = tl.load(gamma + i_b * T + row, mask=row < T, other=0.0)
    p_own = e + (i_b * R + i_r * BLOCK) * C + (NP + block) * BLOCK
    o_8, o_16, o_64 = tl.arange(0, 8), tl.arange(0, 16), tl.arange(0, 64)
    b_e16 = tl.load(p_own + (o_8[:, None, None] * 16 + o_16[None, :, None]) * C + o_8[:, None, None] * 16 + o_16[None, None, :])
    b_e21, b_e32 = below(p_own, C, 4, 16), below(p_own, C, 2, 32)
    b_e64 = tl.load(p_own + 64 * C + o_64[:, None] * C + o_64[None, :])
    b_peak, b_sum = row_sums(peak, total, p_stat, past_tiles, past_tiles + block + 1, R, NP, BLOCK, CHUNK, False)
    p_row = i_b * R + i_r * BLOCK + o_r
    b_factor, b_own, b_base = row_factors(row_peak, factor, lse, b_gamma, b_peak, b_sum, p_row, i_b * T + row, row < T, False)
    b_own = tl.where(finite(b_factor), b_own * tl.exp(tl.load(peak + p_stat + (NP + block).to(tl.int64) * R) - b_base), 0.0)
    if tl.max(tl.abs(b_gamma), axis=0) <= 1.0:
        b_h, b_l = _inverse(b_e16, b_e21, b_e32, b_e64, b_own, True)
    else:
        b_h, b_l = _inverse(b_e16, b_e21, b_e32, b_e64, b_own, False)
    p_i = p_row[:, None] * BLOCK + o_r[None, :]
    tl.store(inverse + p_i, b_h)
    tl.store(inverse_low + p_i, b_l)


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_near_half"))
def feedback_near_half(
    e, peak, total, gamma, past_length, row_peak, factor, lse, x, inverse, inverse_low, near, near_low, near_scale, T, C, R, NP, NT, row0, B, blocks,
    BT: tl.constexpr,
):  # fmt: skip
    """The second half, grid (blocks, B, 2): near[d] of a block, as a float16 pair."""
    i_r, i_b, d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    block = row0 // BT + i_r
    if block > d:
        o_r = tl.arange(0, BT)
        p_row = i_b * R + i_r * BT + o_r
        p_i = p_row[:, None] * BT + o_r[None, :]
        b_h, b_l = tl.load(inverse + p_i), tl.load(inverse_low + p_i)
        p_e = e + p_row[:, None] * C + (NP + block - 1 - d) * BT + o_r[None, :]
        p_peak = peak + (i_b * NT + NP + block - 1 - d) * R + i_r * BT + o_r
        b_eh, b_el = pair_of(routed(tl.load(p_e), tile_factors(p_peak, row_peak, factor, p_row)[:, None]))
        b_m = pair_product(b_h, b_l, b_eh, b_el)
        b_c = tl.max(tl.abs(b_m), axis=1)
        b_c = tl.where(finite(b_c) & (b_c > 1e-30), b_c, 1.0)
        b_m = b_m * (1.0 / b_c)[:, None]
        b_high = b_m.to(near.dtype.element_ty)
        deep = d * (B * R).to(tl.int64)
        tl.store(near + deep * BT + p_i, b_high)
        tl.store(near_low + deep * BT + p_i, (b_m - b_high.to(tl.float32)).to(near.dtype.element_ty))
        tl.store(near_scale + deep + p_row, b_c)

"""Past values in the form that the solves of feedback attention read."""

import triton
import triton.language as tl

from sessa_deploy.kernels.feedback.tiles import store_split
from sessa_deploy.kernels.launch import table


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_pack"))
def feedback_pack(past_s, past_length, w, w_low, scales, P, D, C, BT: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    """Grid (programs, D tiles, B): past_s in the form the solve reads, zeros from past_length on. Tiles without a live row stay unwritten."""
    i_n, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(past_length + i_b), P)
    for i_t in range(tl.program_id(0), tl.cdiv(length, BT), tl.num_programs(0)):
        o_t, o_n = tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
        m_n = (o_n < D)[None, :]
        m_t = (i_t * BT + o_t < length)[:, None]
        b_x = tl.load(past_s + (i_b * P + i_t * BT) * D + o_t[:, None] * D + o_n[None, :], mask=m_t & m_n, other=0.0).to(tl.float32)
        p_tile = (i_b * C + i_t * BT) * D + o_t[:, None] * D + o_n[None, :]
        p_scale = (i_b * (C // BT) + i_t) * tl.num_programs(1) + i_n
        store_split(b_x, tl.max(tl.max(tl.abs(b_x), axis=1), axis=0), w, w_low, scales, p_tile, p_scale, m_n, SPLIT, True)

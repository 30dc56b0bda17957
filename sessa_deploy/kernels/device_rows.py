"""What the kernels of a step of several rows inline, whichever family they belong to.

A step of 2 to ROWS new rows of a sequence reads its past once: the rows are one matrix tile, padded to ROWS whatever their number, so that a row's bits depend
neither on how many there are nor on those behind it. The past is dealt out in splits as in a step of one row (device.py), a program each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sessa_deploy.contract import STEP_ROWS

if TYPE_CHECKING:
    from torch import Tensor

ROWS = tl.constexpr(STEP_ROWS)
FAR = 1 << 25  # elements between the rows of a past beyond which a tile's, 32 of them at most, would not be reached by 32 bits


def near(past: Tensor) -> Tensor:
    """past (B,P,..) as it is, or dense where its rows are FAR apart."""
    return past if past.stride(1) <= FAR else past.contiguous()


@triton.jit
def join(part, stat, o_first, m_n, used, width, o_d, m_d, BLOCK_S: tl.constexpr):
    """For each of o_first (N,): (columns o_d of the sum of `used` splits from it on, its weight, the maximum both are relative to).

    The order is one that `used` alone decides. part (.., width), stat (.., 2) = (maximum in log2 units, sum of weights), float32; BLOCK_S covers every
    split. Without a split: zeros and -inf.
    """
    o_s = tl.arange(0, BLOCK_S)
    m_s = m_n[:, None] & (o_s < used)[None, :]
    o_part = o_first[:, None] + o_s[None, :]
    b_part = tl.load(part + o_part[:, :, None] * width + o_d[None, None, :], mask=m_s[:, :, None] & m_d[None, None, :], other=0.0)
    b_max = tl.load(stat + o_part * 2, mask=m_s, other=float("-inf"))
    b_sum = tl.load(stat + o_part * 2 + 1, mask=m_s, other=0.0)
    b_top = tl.max(b_max, 1)
    b_w = tl.exp2(b_max - tl.where(b_top == float("-inf"), 0.0, b_top)[:, None])
    return tl.sum(b_part * b_w[:, :, None], 1), tl.sum(b_w * b_sum, 1), b_top

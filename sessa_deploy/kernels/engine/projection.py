"""What the projections of a layer do beside their product: the angles that turn a tile of q and k, and gamma."""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.device import begin, tanh


@triton.jit
def angles(cos, sin, m_m, first, pairs, BM: tl.constexpr, BN: tl.constexpr):
    """cos and sin (BM, BN / 2) of a tile; cos, sin: from its first row, first: its first column."""
    o_p = tl.arange(0, BN // 2)
    o_p = tl.max_contiguous(tl.multiple_of((first // 2 + o_p) % pairs, 4), 4)  # what the remainder hides: pairs and first / 2 are multiples of 4
    o_t = tl.arange(0, BM)[:, None] * pairs + o_p[None, :]
    return tl.load(cos + o_t, mask=m_m[:, None], other=0.0), tl.load(sin + o_t, mask=m_m[:, None], other=0.0)


@triton.jit
def gamma_rows(a, a_row, weight, bias, gamma, first, rows, depth, gamma_max, ROWS: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """gamma_max tanh(bias + a . weight) of ROWS rows of a, which lie a_row elements apart. Waits for the kernel ahead, with weights on their way."""
    o_m, o_k = first + tl.arange(0, ROWS), tl.arange(0, BK)
    m_m = o_m < rows
    b_bias, b_w = tl.load(bias), tl.load(weight + o_k, mask=o_k < depth, other=0.0)
    begin(PDL)
    b_acc = tl.zeros([ROWS, BK], dtype=tl.float32)
    for start in range(0, depth, BK):
        m_k = o_k < depth - start
        b_a = tl.load(a + o_m.to(tl.int64)[:, None] * a_row + start + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_acc += b_a.to(tl.float32) * b_w[None, :]
        b_w = tl.load(weight + start + BK + o_k, mask=o_k < depth - start - BK, other=0.0)  # the next
    tl.store(gamma + o_m, gamma_max * tanh(b_bias + tl.sum(b_acc, 1)), mask=m_m)

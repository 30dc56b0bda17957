"""`product` of several rows whose columns are the long side of the matrix instructions: of weights of 8 bits no two warps widen the same."""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.engine.widen import wide


@triton.jit
def column_product(
    x, gate, weight, m_m, m_n, depth, row, gate_row, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr
):
    """As `product.product`, with KS > 1 parts of BK, a warp each. Columns that there are not repeat the last one: a mask of each would be an instruction of
    every load."""
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    o_n = tl.minimum(o_n, tl.max(tl.where(m_n, o_n, 0), 0))
    o_k = tl.arange(0, KS)[:, None, None] * (BK // KS) + tl.arange(0, BK // KS)[None, None, :]
    p_x = x + o_m[None, :, None] * row + o_k
    p_g = gate + o_m[None, :, None] * gate_row + o_k
    p_w = weight + o_n[None, :, None] * depth + o_k
    b_acc = tl.zeros([KS, BN, BM], dtype=tl.float32)
    for start in range(0, depth, BK):
        m_k = o_k < depth - start
        m_x = m_m[None, :, None] & m_k
        b_x = tl.load(p_x + start, mask=m_x, other=0.0)
        if GATED:
            b_g = tl.load(p_g + start, mask=m_x, other=0.0)
            b_x = (b_x.to(tl.float32) * b_g.to(tl.float32)).to(b_x.dtype)
        b_w = wide(tl.load(p_w + start, mask=m_k, other=0.0), b_x.dtype)
        b_acc = tl.dot(b_w, tl.permute(b_x, [0, 2, 1]), b_acc, input_precision="ieee")
    return together(tl.permute(b_acc, [2, 1, 0]), BM, BN, KS)


@triton.jit
def together(b_acc, BM: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr):
    """(BM,BN) of sums (BM,BN,KS), each of a warp: they change places once and are added within threads, where `tl.sum` takes turns, an element each."""
    if KS == 1:
        b_sum = tl.reshape(b_acc, [BM, BN])
    else:
        b_even, b_odd = tl.split(tl.reshape(b_acc, [BM, BN, KS // 2, 2]))
        b_sum = together(b_even + b_odd, BM, BN, KS // 2)
    return b_sum

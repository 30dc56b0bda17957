"""What the kernels of layer.py do to the elements of a row around a product: LayerNorm ahead of it, GELU behind it."""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.device import begin
from sessa_deploy.kernels.engine.product_columns import together


@triton.jit
def norm_row(p_x, weight, bias, p_out, width, eps, BD: tl.constexpr, PDL: tl.constexpr):
    """LayerNorm of the row at p_x, of which nothing is read before the wait."""
    o_d = tl.arange(0, BD)
    m_d = o_d < width
    b_w, b_b = tl.load(weight + o_d, mask=m_d, other=0.0), tl.load(bias + o_d, mask=m_d, other=0.0)
    begin(PDL)
    b_y = normal(tl.load(p_x + o_d, mask=m_d, other=0.0), b_w, b_b, m_d, width, eps)
    tl.store(p_out + o_d, b_y.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit
def normal(b_x, b_w, b_b, m_d, width, eps):
    """LayerNorm of a row, float32."""
    b_x = b_x.to(tl.float32)
    b_c = tl.where(m_d, b_x - tl.sum(b_x, 0) / width, 0.0)
    b_scale = 1.0 / tl.sqrt(tl.sum(b_c * b_c, 0) / width + eps)
    return b_c * b_scale * b_w.to(tl.float32) + b_b.to(tl.float32)


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def normal_once(b_x, first, b_w, b_b, m_d, width, eps, BD: tl.constexpr, WARPS: tl.constexpr):
    """`normal` of (BD,) with both of its sums at once; first: any element of the row. Each of WARPS adds what it has, and every thread what they have.

    Sums of squares about it are at most `width` times those about the mean, which is what their difference may lose: no element is further than sqrt(width)
    standard deviations from the mean.
    """
    b_c = tl.where(m_d, b_x.to(tl.float32) - first.to(tl.float32), 0.0)
    b_each = tl.reshape(b_c, [WARPS, BD // WARPS])
    b_total, b_squares = tl.reduce((b_each, b_each * b_each), 1, _both)
    total, squares = tl.split(together(tl.reshape(tl.trans(tl.join(b_total, b_squares)), [1, 2, WARPS]), 1, 2, WARPS))
    mean = total / width
    scale = 1.0 / tl.sqrt(tl.maximum(squares / width - mean * mean, 0.0) + eps)
    return (b_c - mean) * scale * b_w.to(tl.float32) + b_b.to(tl.float32)


@triton.jit
def gelu(x):
    """x Phi(x), float32, as max(x, 0) - |x| Phi(-|x|). Phi's logarithm there is a polynomial, fitted so that the result is within 6e-8, as with erf, which
    takes four times the instructions; beyond 6 it is 0 to that."""
    b_u = tl.minimum(tl.abs(x), 6.0, propagate_nan=tl.PropagateNan.ALL)
    b_log = 3.309512612759136e-05 * b_u - 0.0007692297804169357
    b_log = b_log * b_u + 0.008080708794295788
    b_log = b_log * b_u - 0.053412020206451416
    b_log = b_log * b_u - 0.45877110958099365
    b_log = b_log * b_u - 1.151201605796814
    b_log = b_log * b_u - 0.999993085861206
    return tl.maximum(x, 0.0) - b_u * tl.exp2(b_log)


@triton.jit
def half_gelu(b_y, first, depth, kind: tl.constexpr, BN: tl.constexpr):
    """b_y (BM,BN), columns from `first` on, with GELU on those left of `depth`, as a rounded product would give it."""
    if first < depth:
        b_y = tl.where((first + tl.arange(0, BN) < depth)[None, :], gelu(b_y.to(kind).to(tl.float32)), b_y)
    return b_y

"""Norm and entrance of 2 to 16 rows in one kernel, as `layer_norm_enter` is for one: every program normalises the rows for itself.

They stay in the registers that the matrix instructions take them from (product.py, `strip`), 8 at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.device import begin
from sessa_deploy.kernels.device_rows import ROWS
from sessa_deploy.kernels.engine.pointwise import half_gelu
from sessa_deploy.kernels.engine.product import ahead, bias_of, left, put, right, sixteen, strip, strip_columns, with_bias
from sessa_deploy.kernels.engine.spec import WIDE_ROWS, ahead_variant, few_variant
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, available, launcher, pinned, weights_name
from sessa_deploy.kernels.launch.limits import AHEAD_DEPTH

_NAME = "layer_norm_enter_rows"


@triton.jit
def _normal(x, first, rows, b_gain, b_shift, m_k, depth, eps, BK: tl.constexpr, KS: tl.constexpr):
    """Rows [first, first + 8) of x, normalised and rounded, as the right operand."""
    b_x = strip(x + first * depth, first + tl.arange(0, 8) < rows, depth, 0, depth, 8, BK, KS).to(tl.float32)
    b_x = tl.where(m_k, b_x - _total(b_x) / depth, 0.0)
    b_x = b_x * (1.0 / tl.sqrt(_total(b_x * b_x) / depth + eps)) * b_gain.to(tl.float32) + b_shift.to(tl.float32)
    return right(b_x.to(x.dtype.element_ty), 8, BK, KS)


@triton.jit
def _total(b_x):
    """The sum of each row of a `strip`: a thread's columns, those of a warp, those of all warps."""
    b_y = tl.sum(tl.sum(b_x, 5, keep_dims=True), 4, keep_dims=True)
    return tl.sum(tl.sum(b_y, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _statistics(x, first, rows, depth, eps, SPAN: tl.constexpr):
    """(mean, 1 / deviation) of rows [first, first + 8) of x as a `strip` takes them, SPAN columns at a time."""
    o_r, o_k = first + tl.arange(0, 8)[:, None], tl.arange(0, SPAN)[None, :]
    p_x, m_r = x + o_r * depth + o_k, o_r < rows
    b_sum = tl.zeros([8], dtype=tl.float32)
    for start in tl.range(0, depth, SPAN, num_stages=1):
        b_sum += tl.sum(tl.load(p_x + start, mask=m_r & (o_k < depth - start), other=0.0).to(tl.float32), 1)
    b_mean, b_square = b_sum / depth, tl.zeros([8], dtype=tl.float32)
    for start in tl.range(0, depth, SPAN, num_stages=1):
        m_x = m_r & (o_k < depth - start)
        b_c = tl.where(m_x, tl.load(p_x + start, mask=m_x, other=0.0).to(tl.float32) - b_mean[:, None], 0.0)
        b_square += tl.sum(b_c * b_c, 1)
    b_scale = 1.0 / tl.sqrt(b_square / depth + eps)
    return tl.reshape(b_mean, [1, 8, 1, 1, 1, 1]), tl.reshape(b_scale, [1, 8, 1, 1, 1, 1])


@triton.jit
def _normal_part(x, first, rows, b_mean, b_scale, b_gain, b_shift, start, depth, BK: tl.constexpr, KS: tl.constexpr):
    """Columns [start, start + BK) of rows [first, first + 8) of x, normalised and rounded, as the right operand."""
    m_k = strip_columns(BK, KS) < depth - start
    b_x = strip(x + first * depth, first + tl.arange(0, 8) < rows, depth, start, depth, 8, BK, KS).to(tl.float32)
    b_x = tl.where(m_k, (b_x - b_mean) * b_scale * b_gain.to(tl.float32) + b_shift.to(tl.float32), 0.0)
    return right(b_x.to(x.dtype.element_ty), 8, BK, KS)


@triton.jit
def _in_parts(
    x, norm_weight, norm_bias, weight, b_w, m_n, rows, depth, eps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """(BM,BN) float32 of the normalised rows times a tile of weights, BK of the depth at a time; b_w: of `ahead`."""
    b_low = tl.zeros([KS, BN, 8], dtype=tl.float32)
    b_high = b_low
    b_mean, b_scale = _statistics(x, 0, rows, depth, eps, SPAN)
    b_mean_high, b_scale_high = b_mean, b_scale
    if BM > 8:  # noqa: SIM102
        if rows > 8:
            b_mean_high, b_scale_high = _statistics(x, 8, rows, depth, eps, SPAN)
    b_next = b_w[0] if AHEAD > 1 else b_w
    b_after = b_w[1] if AHEAD > 1 else b_w
    o_k = strip_columns(BK, KS)
    for start in tl.range(0, depth, BK, num_stages=1):
        m_k = o_k < depth - start
        b_gain = tl.load(norm_weight + start + o_k, mask=m_k, other=0.0)
        b_shift = tl.load(norm_bias + start + o_k, mask=m_k, other=0.0)
        b_a = left(b_next, BN, BK, KS)
        b_low = tl.dot(b_a, _normal_part(x, 0, rows, b_mean, b_scale, b_gain, b_shift, start, depth, BK, KS), b_low, input_precision="ieee")
        if BM > 8:  # noqa: SIM102
            if rows > 8:
                b_x = _normal_part(x, 8, rows, b_mean_high, b_scale_high, b_gain, b_shift, start, depth, BK, KS)
                b_high = tl.dot(b_a, b_x, b_high, input_precision="ieee")
        b_next = b_after
        b_more = strip(weight, m_n, depth, start + AHEAD * BK, depth, BN, BK, KS)
        if AHEAD > 1:
            b_after = b_more
        else:
            b_next = b_more
    if BM > 8:
        b_y = sixteen(tl.sum(b_low, 0), tl.sum(b_high, 0), BN)
    else:
        b_y = tl.trans(tl.sum(b_low, 0))
    return b_y


@triton.jit
def _whole(
    x, norm_weight, norm_bias, b_w, rows, depth, eps, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, PDL: tl.constexpr
):
    """The same where BK holds all of the depth. Waits for the kernel ahead, with the norm's weights on their way."""
    o_k = strip_columns(BK, KS)
    m_k = o_k < depth
    b_gain, b_shift = tl.load(norm_weight + o_k, mask=m_k, other=0.0), tl.load(norm_bias + o_k, mask=m_k, other=0.0)
    begin(PDL)
    b_low = tl.sum(tl.dot(b_w, _normal(x, 0, rows, b_gain, b_shift, m_k, depth, eps, BK, KS), input_precision="ieee"), 0)
    if BM == 8:
        b_y = tl.trans(b_low)
    else:
        b_high = tl.zeros([BN, 8], dtype=tl.float32)
        if rows > 8:
            b_high = tl.sum(tl.dot(b_w, _normal(x, 8, rows, b_gain, b_shift, m_k, depth, eps, BK, KS), input_precision="ieee"), 0)
        b_y = sixteen(b_low, b_high, BN)
    return b_y


@triton.jit(do_not_specialize=table.do_not_specialize("layer_norm_enter_rows"))
def layer_norm_enter_rows(
    x, norm_weight, norm_bias, weight, bias, out, rows, depth, eps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(2D / BN),), at most BM rows, 8 or 16: `layer_norm` and `layer_enter`. SPAN 0: BK >= D; else rows of any D, whose means and deviations are made
    of SPAN columns at a time, and the product of BK."""
    i_n = tl.program_id(0) * BN
    column = i_n.to(tl.int64)
    m_n = tl.arange(0, BN) < 2 * depth - i_n
    if SPAN > 0:
        b_w = ahead(weight + column * depth, m_n, depth, BM, BN, BK, KS, AHEAD)
        b_bias = bias_of(bias + column, m_n, BM, BN)
        begin(PDL)
        b_y = _in_parts(x, norm_weight, norm_bias, weight + column * depth, b_w, m_n, rows, depth, eps, BM, BN, BK, KS, AHEAD, SPAN)
    else:
        b_w = left(strip(weight + column * depth, m_n, depth, 0, depth, BN, BK, KS), BN, BK, KS)
        b_bias = bias_of(bias + column, m_n, BM, BN)
        b_y = _whole(x, norm_weight, norm_bias, b_w, rows, depth, eps, BM, BN, BK, KS, PDL)
    b_y = half_gelu(with_bias(b_y, b_bias, bias + column, m_n, BM, BN), i_n, depth, out.dtype.element_ty, BN)
    put(out + column, b_y, tl.arange(0, BM) < rows, m_n, 2 * depth, BM, BN)


def chosen(kernel: str, variant: str, weights: str, depth: int, like: Tensor, rows: int = 0) -> str:
    """`variant` of a product of so many rows, or that of `few_variant` or `ahead_variant`, where the device and type of `like` have it."""
    others = few_variant(kernel, rows, weights, depth), ahead_variant(kernel, variant, weights, depth)
    return next((v for v in others if v and available(kernel, like.device, like.dtype, v, weights)), variant)


def taken(x: Tensor, weight: Tensor) -> str:
    """The variant for the rows x (rows, D) and this weight on their device; "" if there is none."""
    rows, depth = x.shape
    if not 1 < rows <= ROWS.value or weights_name(weight.dtype):
        return ""
    variant = chosen(_NAME, "any", "", depth, x, rows).removeprefix("any")
    wide = depth > AHEAD_DEPTH and WIDE_ROWS in table.kernel(_NAME).optional and available(_NAME, x.device, x.dtype, WIDE_ROWS)
    return variant or (WIDE_ROWS if wide else "")


def norm_enter(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor, variant: str, early: int = 0) -> Tensor:
    """`layer.norm_enter` of rows for which `taken` gave a variant."""
    rows, depth = x.shape
    options = pinned((_NAME,), x.device, x.dtype, variant, early)[_NAME]
    out = torch.empty(rows, 2 * depth, dtype=x.dtype, device=x.device)
    launcher(layer_norm_enter_rows, x.device, x.dtype, options)(
        (triton.cdiv(2 * depth, options["BN"]),), *map(address, (x, norm_weight, norm_bias, weight, bias, out)), rows, depth, eps
    )
    return out

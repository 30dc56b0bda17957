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
from sessa_deploy.kernels.engine.product import bias_of, left, put, right, sixteen, strip, strip_columns, with_bias
from sessa_deploy.kernels.engine.spec import ahead_variant, few_variant
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


@triton.jit(do_not_specialize=table.do_not_specialize("layer_norm_enter_rows"))
def layer_norm_enter_rows(
    x, norm_weight, norm_bias, weight, bias, out, rows, depth, eps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(2D / BN),), BK >= D, at most BM rows, 8 or 16: `layer_norm` and `layer_enter`."""
    i_n = tl.program_id(0) * BN
    column = i_n.to(tl.int64)
    m_n = tl.arange(0, BN) < 2 * depth - i_n
    b_w = left(strip(weight + column * depth, m_n, depth, 0, depth, BN, BK, KS), BN, BK, KS)
    b_bias = bias_of(bias + column, m_n, BM, BN)
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
    b_y = half_gelu(with_bias(b_y, b_bias, bias + column, m_n, BM, BN), i_n, depth, out.dtype.element_ty, BN)
    put(out + column, b_y, tl.arange(0, BM) < rows, m_n, 2 * depth, BM, BN)


def chosen(kernel: str, variant: str, weights: str, depth: int, like: Tensor, rows: int = 0) -> str:
    """`variant` of a product of so many rows, or that of `few_variant` or `ahead_variant`, where the device and type of `like` have it."""
    others = few_variant(kernel, rows, weights, depth), ahead_variant(kernel, variant, weights, depth)
    return next((v for v in others if v and available(kernel, like.device, like.dtype, v, weights)), variant)


def taken(x: Tensor, weight: Tensor) -> str:
    """The variant for the rows x (rows, D) and this weight on their device; "" if there is none."""
    rows, depth = x.shape
    if not 1 < rows <= ROWS.value or depth > AHEAD_DEPTH or weights_name(weight.dtype):
        return ""
    return chosen(_NAME, "any", "", depth, x, rows).removeprefix("any")


def norm_enter(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor, variant: str, early: int = 0) -> Tensor:
    """`layer.norm_enter` of rows for which `taken` gave a variant."""
    rows, depth = x.shape
    options = pinned((_NAME,), x.device, x.dtype, variant, early)[_NAME]
    out = torch.empty(rows, 2 * depth, dtype=x.dtype, device=x.device)
    launcher(layer_norm_enter_rows, x.device, x.dtype, options)(
        (triton.cdiv(2 * depth, options["BN"]),), *map(address, (x, norm_weight, norm_bias, weight, bias, out)), rows, depth, eps
    )
    return out

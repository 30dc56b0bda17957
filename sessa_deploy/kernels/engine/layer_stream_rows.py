"""The products of layer_stream.py for 2 to ROWS wide rows, which stand in the registers as the matrix instructions take them while the weights pass."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.device import begin, turn
from sessa_deploy.kernels.device_rows import ROWS
from sessa_deploy.kernels.engine import layer_stream
from sessa_deploy.kernels.engine.layer_stream import behind, gamma_rows, part_of
from sessa_deploy.kernels.engine.product import half_gelu
from sessa_deploy.kernels.feedback.step_rows import solved
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import available, weights_name
from sessa_deploy.kernels.launch.limits import LAYER_WIDTHS


@triton.jit
def _columns(BK: tl.constexpr, KS: tl.constexpr):
    """Columns of a row as (4, 1, KS, 1, BK / (16 KS), 2, 2): the first three axes are a lane's and a warp's number, the rest what a thread holds of a row for
    its matrix instructions. A warp has a part of each row, and sums of its own, which are added behind a tile's products."""
    o_a = tl.arange(0, 4)[:, None, None, None, None, None, None] * 2 + tl.arange(0, 2)[None, None, None, None, None, None, :]
    o_k = tl.arange(0, KS)[None, None, :, None, None, None, None] * (BK // KS) + tl.arange(0, BK // KS // 16)[None, None, None, None, :, None, None] * 16
    return o_k + tl.arange(0, 2)[None, None, None, None, None, :, None] * 8 + o_a


@triton.jit
def _rows(x, row, rows, o_k, depth):
    """Rows of x, `row` elements apart, (4, 8, KS, 2, BK / (16 KS), 2, 2)."""
    o_t = tl.arange(0, 8)[None, :, None, None, None, None, None] + tl.arange(0, 2)[None, None, None, :, None, None, None] * 8
    return tl.load(x + o_t * row + o_k, mask=(o_t < rows) & (o_k < depth), other=0.0)


@triton.jit
def _left(b_x, BK: tl.constexpr, KS: tl.constexpr):
    """`_rows` as the left operand of KS products, (KS,ROWS,BK / KS)."""
    return tl.reshape(tl.permute(b_x, [2, 3, 1, 4, 5, 0, 6]), [KS, ROWS, BK // KS])


@triton.jit
def _weights(weight, column, width, depth, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr):
    """A tile of weights whose first column is `column`, (KS,BK / KS,BN); width: columns there are."""
    o_k = tl.arange(0, KS)[:, None] * (BK // KS) + tl.arange(0, BK // KS)[None, :]
    o_n = column + tl.arange(0, BN)[None, None, :]
    return tl.load(weight + o_n * depth + o_k[:, :, None], mask=(o_n < width) & (o_k < depth)[:, :, None], other=0.0)


@triton.jit
def _sums(b_x, b_w):
    return tl.sum(tl.dot(b_x, b_w, input_precision="ieee"), 0)


@triton.jit
def _normal(b_x, b_gain, b_shift, m_k, depth, eps):
    """LayerNorm of `_rows`, float32."""
    b_x = b_x.to(tl.float32)
    b_c = tl.where(m_k, b_x - _total(b_x) / depth, 0.0)
    return b_c * (1.0 / tl.sqrt(_total(b_c * b_c) / depth + eps)) * b_gain.to(tl.float32) + b_shift.to(tl.float32)


@triton.jit
def _total(b_x):
    """The sum of each row: a thread's columns, those of a warp, those of all warps."""
    b_y = tl.sum(tl.sum(tl.sum(b_x, 6, keep_dims=True), 5, keep_dims=True), 4, keep_dims=True)
    return tl.sum(tl.sum(b_y, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_norm_enter_rows_stream"))
def layer_norm_enter_rows_stream(
    x, norm_weight, norm_bias, weight, bias, out, rows, depth, eps,
    BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(tiles / EACH),), BK >= D: `layer_norm` and `layer_enter`."""
    o_k, o_t, o_n = _columns(BK, KS), tl.arange(0, ROWS)[:, None], tl.arange(0, BN)
    b_x = tl.zeros([KS, ROWS, BK // KS], dtype=x.dtype.element_ty)
    first = tl.program_id(0)
    for i in tl.range(first, tl.cdiv(2 * depth, BN), tl.num_programs(0), num_stages=STAGES):
        column = i * BN
        b_w = _weights(weight, column, 2 * depth, depth, BN, BK, KS)
        m_n = column + o_n < 2 * depth
        b_bias = tl.load(bias + column + o_n, mask=m_n, other=0.0)
        if i == first:
            b_gain = tl.load(norm_weight + o_k, mask=o_k < depth, other=0.0)
            b_shift = tl.load(norm_bias + o_k, mask=o_k < depth, other=0.0)
            begin(PDL)
            b_x = _left(_normal(_rows(x, depth, rows, o_k, depth), b_gain, b_shift, o_k < depth, depth, eps).to(x.dtype.element_ty), BK, KS)
        b_y = _sums(b_x, b_w) + b_bias.to(tl.float32)[None, :]
        b_y = half_gelu(b_y, column, depth, out.dtype.element_ty, BN)
        tl.store(out + o_t * (2 * depth) + (column + o_n)[None, :], b_y.to(out.dtype.element_ty), mask=(o_t < rows) & m_n[None, :])
    begin(PDL)  # of a program that had nothing to do


@triton.jit(do_not_specialize=table.do_not_specialize("layer_tail_rows_stream"))
def layer_tail_rows_stream(
    s, h, weight, scale, bias, x, out, rows, depth,
    BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(tiles / EACH),), BK >= D: `layer_tail`."""
    o_k, o_t, o_n = _columns(BK, KS), tl.arange(0, ROWS)[:, None], tl.arange(0, BN)
    b_x = tl.zeros([KS, ROWS, BK // KS], dtype=s.dtype.element_ty)
    first = tl.program_id(0)
    for i in tl.range(first, tl.cdiv(depth, BN), tl.num_programs(0), num_stages=STAGES):
        column = i * BN
        b_w = _weights(weight, column, depth, depth, BN, BK, KS)
        m_n = column + o_n < depth
        b_bias = tl.load(bias + column + o_n, mask=m_n, other=0.0)
        if i == first:
            begin(PDL)
            b_g = _rows(h + depth, 2 * depth, rows, o_k, depth).to(tl.float32)
            b_x = _left((_rows(s, depth, rows, o_k, depth).to(tl.float32) * b_g).to(s.dtype.element_ty), BK, KS)
        o_y, m_y = o_t * depth + (column + o_n)[None, :], (o_t < rows) & m_n[None, :]
        b_add = behind(x + o_y, m_y, i, first)
        b_y = _sums(b_x, b_w) + b_bias.to(tl.float32)[None, :] + b_add.to(tl.float32)
        tl.store(out + o_y, b_y.to(out.dtype.element_ty), mask=m_y)
    begin(PDL)


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_rows_out_stream"))
def mixer_rows_out_stream(
    x, weight, scale, bias, add, inverse, out, tokens, depth,
    BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(tiles / EACH), B), BK >= D: `mixer_rows_out`."""
    i_b = tl.program_id(1).to(tl.int64)
    x, add, out, inverse = x + i_b * tokens * depth, add + i_b * tokens * depth, out + i_b * tokens * depth, inverse + i_b * ROWS * ROWS
    o_k, o_t, o_n = _columns(BK, KS), tl.arange(0, ROWS), tl.arange(0, BN)
    b_x = tl.zeros([KS, ROWS, BK // KS], dtype=x.dtype.element_ty)
    first = tl.program_id(0)
    for i in tl.range(first, tl.cdiv(depth, BN), tl.num_programs(0), num_stages=STAGES):
        column = i * BN
        b_w = _weights(weight, column, depth, depth, BN, BK, KS)
        m_n = column + o_n < depth
        b_bias = tl.load(bias + column + o_n, mask=m_n, other=0.0)
        if i == first:
            begin(PDL)
            b_x = _left(_rows(x, depth, tokens, o_k, depth), BK, KS)
        o_y, m_y = o_t[:, None] * depth + (column + o_n)[None, :], (o_t < tokens)[:, None] & m_n[None, :]
        b_add = behind(add + o_y, m_y, i, first)
        b_inverse = behind(inverse + o_t[:, None] * ROWS + o_t[None, :], o_t[:, None] < ROWS, i, first)
        b_f = (_sums(b_x, b_w) + b_bias.to(tl.float32)[None, :]).to(out.dtype.element_ty).to(tl.float32)
        tl.store(out + o_y, solved(b_inverse, b_f + b_add, o_t).to(out.dtype.element_ty), mask=m_y)
    begin(PDL)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_project_gain_rows_stream"))
def layer_project_gain_rows_stream(
    h, weight, scale, bias_q, bias_k, bias_v, bias_fb, cos, sin, gamma_weight, gamma_bias, q, k, v, q_b, k_b, gamma, rows, depth, kv_width, units, gamma_max,
    BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (1 + ceil(tiles / EACH),), BK >= D: `layer_project_gain`; the first program computes the gammas, the others share the tiles."""
    if tl.program_id(0) == 0:
        gamma_rows(h, 2 * depth, gamma_weight, gamma_bias, gamma, 0, rows, depth, gamma_max, ROWS, 256, PDL)
    else:
        o_k, o_t, o_n = _columns(BK, KS), tl.arange(0, ROWS)[:, None], tl.arange(0, BN)
        n_q, n_k = tl.cdiv(depth, BN), tl.cdiv(kv_width, BN)
        tiles, first, programs = 3 * n_q + 2 * n_k, tl.program_id(0) - 1, tl.num_programs(0) - 1
        pairs = units * 4
        b_x = tl.zeros([KS, ROWS, BK // KS], dtype=h.dtype.element_ty)
        for i in tl.range(first, tiles, programs, num_stages=STAGES):
            part, column, width, above = part_of(i, n_q, n_k, depth, kv_width, BN)
            b_w = _weights(weight, above + column, above + width, depth, BN, BK, KS)
            out, bias = q, bias_q
            if part == 1:
                out, bias = k, bias_k
            elif part == 2:
                out, bias = v, bias_v
            elif part == 3:
                out, bias = q_b, bias_fb
            elif part == 4:
                out, bias = k_b, bias_fb + depth
            m_n = column + o_n < width
            b_bias = tl.load(bias + column + o_n, mask=m_n, other=0.0).to(tl.float32)
            if i == first:
                begin(PDL)
                b_x = _left(_rows(h, 2 * depth, rows, o_k, depth), BK, KS)
            o_p = tl.arange(0, BN // 2)
            m_p = (o_t < rows) & ((column + o_p * 2 < width) & (part < 2))[None, :]
            o_p = o_t * pairs + ((column // 2 + o_p) % pairs)[None, :]
            b_cos, b_sin = behind(cos + o_p, m_p, i, first), behind(sin + o_p, m_p, i, first)
            b_y = _sums(b_x, b_w) + b_bias[None, :]
            if part < 2:
                b_y = turn(b_y, b_cos, b_sin, ROWS, BN)
            tl.store(out + o_t * width + (column + o_n)[None, :], b_y.to(out.dtype.element_ty), mask=(o_t < rows) & m_n[None, :])
    begin(PDL)


# Those that give way to these for a few wide rows. Their parameters are the same.
KERNELS = {"layer_norm_enter_rows": layer_norm_enter_rows_stream, "layer_tail": layer_tail_rows_stream, "layer_project_gain": layer_project_gain_rows_stream,
           "mixer_rows_out": mixer_rows_out_stream}  # fmt: skip


def stream(kernel: str, like: Tensor, rows: int, weight: Tensor) -> tuple[Any, str]:
    """(one of KERNELS or of layer_stream.KERNELS in place of `kernel`, its variant), or (None, "") where the device of `like` has none for so many rows."""
    fn: Any = (layer_stream.KERNELS if rows == 1 else KERNELS).get(kernel)
    (narrow, widest), kind = LAYER_WIDTHS[:2], weights_name(weight.dtype)
    fits = fn is not None and rows <= ROWS.value and narrow < weight.shape[1] <= widest and (rows == 1 or not kind)
    return (fn, str(widest)) if fits and available(fn.__name__, like.device, like.dtype, str(widest), kind) else (None, "")

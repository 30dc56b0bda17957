"""Products of one wide row through shared memory: few programs, each of which asks for its first tiles of weights before it waits for the kernel ahead.

The registers hold the weights of one product of a narrow row and its neighbour's, not those of wide ones. Shared memory, which the kernels of layer.py leave
alone, holds as much again: a product's weights come while the kernels before it still run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.device import begin, tanh
from sessa_deploy.kernels.engine.product import gelu, wide
from sessa_deploy.kernels.launch import table


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


@triton.jit
def _row(x, o_p, o_k, depth):
    """The row as a tile's warps take it, each of them whole."""
    return tl.load(x + o_p * 0 + o_k, mask=o_k < depth, other=0.0)


@triton.jit
def _sums(b_w, b_x):
    """A tile's columns times the row, float32: (BN / 2, 2, chunks, lanes) -> (BN / 2, 2). A warp has whole columns, two of them where there are BN / 2."""
    return tl.sum(tl.sum(wide(b_w, tl.float32) * b_x.to(tl.float32), 2), 2)


@triton.jit
def behind(p_x, m_x, i, first):
    """What kernels ahead write, read in each turn i behind the wait, which stands in turn `first`. In a branch, which is always taken: the compiler asks for
    what a loop reads some turns ahead, but not for what a branch in it reads."""
    b_x = tl.zeros(p_x.shape, dtype=p_x.dtype.element_ty)
    if i >= first:
        b_x = tl.load(p_x, mask=m_x, other=0.0)
    return b_x


@triton.jit
def _scale(scale, weight, o_c, m_c):
    if weight.dtype.element_ty.primitive_bitwidth == 8:
        b_scale = tl.load(scale + o_c, mask=m_c, other=0.0)
    else:
        b_scale = 1.0
    return b_scale


@triton.jit(do_not_specialize=table.do_not_specialize("layer_norm_enter_stream"))
def layer_norm_enter_stream(
    x, norm_weight, norm_bias, weight, scale, bias, out, depth, eps, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(tiles / EACH),), BK >= D: `layer_norm_enter`."""
    LANES: tl.constexpr = 4096 // weight.dtype.element_ty.primitive_bitwidth
    o_k = tl.arange(0, BK // LANES)[None, None, :, None] * LANES + tl.arange(0, LANES)[None, None, None, :]
    o_p = tl.arange(0, BN // 2)[:, None, None, None]
    o_n = o_p * 2 + tl.arange(0, 2)[None, :, None, None]
    o_c = tl.arange(0, BN // 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
    m_k = o_k < depth
    b_gain, b_shift = _row(norm_weight, o_p, o_k, depth), _row(norm_bias, o_p, o_k, depth)
    b_x = tl.zeros([BN // 2, 1, BK // LANES, LANES], dtype=x.dtype.element_ty)
    first = tl.program_id(0)
    for i in tl.range(first, tl.cdiv(2 * depth, BN), tl.num_programs(0), num_stages=STAGES):
        column = i * BN
        b_w = tl.load(weight + (column + o_n) * depth + o_k, mask=m_k & (o_n < 2 * depth - column), other=0.0)
        m_c = o_c < 2 * depth - column
        b_scale, b_bias = _scale(scale, weight, column + o_c, m_c), tl.load(bias + column + o_c, mask=m_c, other=0.0)
        if i == first:
            begin(PDL)
            b_x = _normal(_row(x, o_p, o_k, depth), b_gain, b_shift, m_k, depth, eps).to(x.dtype.element_ty)
        b_y = _sums(b_w, b_x) * b_scale + b_bias.to(tl.float32)
        if column < depth:
            b_y = tl.where(column + o_c < depth, gelu(b_y, out.dtype.element_ty), b_y)
        tl.store(out + column + o_c, b_y.to(out.dtype.element_ty), mask=m_c)
    begin(PDL)  # of a program that had nothing to do


@triton.jit
def _normal(b_x, b_gain, b_shift, m_k, depth, eps):
    """LayerNorm of a `_row`, float32."""
    b_x = b_x.to(tl.float32)
    b_c = tl.where(m_k, b_x - _total(b_x) / depth, 0.0)
    return b_c * (1.0 / tl.sqrt(_total(b_c * b_c) / depth + eps)) * b_gain.to(tl.float32) + b_shift.to(tl.float32)


@triton.jit
def _total(b_x):
    return tl.sum(tl.sum(b_x, 2, keep_dims=True), 3, keep_dims=True)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_out_stream"))
def layer_out_stream(
    x, weight, scale, bias, add, out, rows, depth, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(tiles / EACH),), BK >= D: `layer_out` of one row."""
    LANES: tl.constexpr = 4096 // weight.dtype.element_ty.primitive_bitwidth
    o_k = tl.arange(0, BK // LANES)[None, None, :, None] * LANES + tl.arange(0, LANES)[None, None, None, :]
    o_p = tl.arange(0, BN // 2)[:, None, None, None]
    o_n = o_p * 2 + tl.arange(0, 2)[None, :, None, None]
    o_c = tl.arange(0, BN // 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
    b_x = tl.zeros([BN // 2, 1, BK // LANES, LANES], dtype=x.dtype.element_ty)
    first = tl.program_id(0)
    for i in tl.range(first, tl.cdiv(depth, BN), tl.num_programs(0), num_stages=STAGES):
        column = i * BN
        b_w = tl.load(weight + (column + o_n) * depth + o_k, mask=(o_k < depth) & (o_n < depth - column), other=0.0)
        m_c = o_c < depth - column
        b_scale, b_bias = _scale(scale, weight, column + o_c, m_c), tl.load(bias + column + o_c, mask=m_c, other=0.0)
        if i == first:
            begin(PDL)
            b_x = _row(x, o_p, o_k, depth)
        b_add = behind(add + column + o_c, m_c, i, first)
        b_y = _sums(b_w, b_x) * b_scale + b_bias.to(tl.float32)
        tl.store(out + column + o_c, (b_y.to(out.dtype.element_ty).to(tl.float32) + b_add).to(out.dtype.element_ty), mask=m_c)
    begin(PDL)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_tail_stream"))
def layer_tail_stream(
    s, h, weight, scale, bias, x, out, rows, depth, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(tiles / EACH),), BK >= D: `layer_tail` of one row."""
    LANES: tl.constexpr = 4096 // weight.dtype.element_ty.primitive_bitwidth
    o_k = tl.arange(0, BK // LANES)[None, None, :, None] * LANES + tl.arange(0, LANES)[None, None, None, :]
    o_p = tl.arange(0, BN // 2)[:, None, None, None]
    o_n = o_p * 2 + tl.arange(0, 2)[None, :, None, None]
    o_c = tl.arange(0, BN // 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
    b_x = tl.zeros([BN // 2, 1, BK // LANES, LANES], dtype=s.dtype.element_ty)
    first = tl.program_id(0)
    for i in tl.range(first, tl.cdiv(depth, BN), tl.num_programs(0), num_stages=STAGES):
        column = i * BN
        b_w = tl.load(weight + (column + o_n) * depth + o_k, mask=(o_k < depth) & (o_n < depth - column), other=0.0)
        m_c = o_c < depth - column
        b_scale, b_bias = _scale(scale, weight, column + o_c, m_c), tl.load(bias + column + o_c, mask=m_c, other=0.0)
        if i == first:
            begin(PDL)
            b_g = _row(h + depth, o_p, o_k, depth).to(tl.float32)
            b_x = (_row(s, o_p, o_k, depth).to(tl.float32) * b_g).to(s.dtype.element_ty)
        b_add = behind(x + column + o_c, m_c, i, first).to(tl.float32)
        b_y = _sums(b_w, b_x) * b_scale + b_bias.to(tl.float32)
        tl.store(out + column + o_c, (b_y + b_add).to(out.dtype.element_ty), mask=m_c)
    begin(PDL)


@triton.jit
def part_of(i, n_q, n_k, depth, kv_width, BN: tl.constexpr):
    """Of the i-th tile of columns: which of q, k, v, q_b, k_b it belongs to, its first column there, that output's width and how many columns are before."""
    part = (i >= n_q).to(tl.int32) + (i >= n_q + n_k).to(tl.int32) + (i >= n_q + 2 * n_k).to(tl.int32) + (i >= 2 * n_q + 2 * n_k).to(tl.int32)
    queries, keys = (part > 0).to(tl.int32) + (part > 3).to(tl.int32), tl.minimum(tl.maximum(part - 1, 0), 2)  # outputs of either width before it
    width = tl.where((part == 1) | (part == 2), kv_width, depth)
    return part, (i - queries * n_q - keys * n_k) * BN, width, queries * depth + keys * kv_width


@triton.jit(do_not_specialize=table.do_not_specialize("layer_project_gain_stream"))
def layer_project_gain_stream(
    h, weight, scale, bias_q, bias_k, bias_v, bias_fb, cos, sin, gamma_weight, gamma_bias, q, k, v, q_b, k_b, gamma, rows, depth, kv_width, units, gamma_max,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (1 + ceil(tiles / EACH),), BK >= D: `layer_project_gain` of one row; the first program computes gamma, the others share the tiles.

    A tile is (BN / 2, 2, chunks of D, lanes), so that a warp has both columns of a rotary pair.
    """
    if tl.program_id(0) == 0:
        gamma_rows(h, 2 * depth, gamma_weight, gamma_bias, gamma, 0, 1, depth, gamma_max, 1, 1024, PDL)
    else:
        LANES: tl.constexpr = 4096 // weight.dtype.element_ty.primitive_bitwidth
        PAIRS: tl.constexpr = BN // 2
        o_k = tl.arange(0, BK // LANES)[None, None, :, None] * LANES + tl.arange(0, LANES)[None, None, None, :]
        o_p = tl.arange(0, PAIRS)
        o_r = o_p[:, None, None, None]
        o_n = o_r * 2 + tl.arange(0, 2)[None, :, None, None]
        m_k = o_k < depth
        n_q, n_k = tl.cdiv(depth, BN), tl.cdiv(kv_width, BN)
        tiles, first, programs = 3 * n_q + 2 * n_k, tl.program_id(0) - 1, tl.num_programs(0) - 1
        pairs = units * 4
        b_x = tl.zeros([PAIRS, 1, BK // LANES, LANES], dtype=h.dtype.element_ty)
        for i in tl.range(first, tiles, programs, num_stages=STAGES):
            part, column, width, above = part_of(i, n_q, n_k, depth, kv_width, BN)
            b_w = tl.load(weight + (above + column + o_n) * depth + o_k, mask=m_k & (o_n < width - column), other=0.0)
            out, bias = q, bias_q
            if part == 1:
                out, bias = k, bias_k
            elif part == 2:
                out, bias = v, bias_v
            elif part == 3:
                out, bias = q_b, bias_fb
            elif part == 4:
                out, bias = k_b, bias_fb + depth
            o_c = column + o_p * 2
            m_c = o_c < width
            b_scale, b_scale_odd = _scale(scale, weight, above + o_c, m_c), _scale(scale, weight, above + o_c + 1, m_c)
            b_bias, b_bias_odd = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32), tl.load(bias + o_c + 1, mask=m_c, other=0.0).to(tl.float32)
            if i == first:
                begin(PDL)
                b_x = _row(h, o_r, o_k, depth)
            m_t = m_c & (part < 2)
            o_t = (column // 2 + o_p) % pairs
            b_cos, b_sin = behind(cos + o_t, m_t, i, first), behind(sin + o_t, m_t, i, first)
            b_even, b_odd = tl.split(_sums(b_w, b_x))
            b_even, b_odd = b_even * b_scale + b_bias, b_odd * b_scale_odd + b_bias_odd
            if part < 2:
                b_turned = b_even * b_cos - b_odd * b_sin
                b_odd = b_even * b_sin + b_odd * b_cos
                b_even = b_turned
            tl.store(out + o_c, b_even.to(out.dtype.element_ty), mask=m_c)
            tl.store(out + o_c + 1, b_odd.to(out.dtype.element_ty), mask=m_c)
    begin(PDL)


# Of layer.py's kernels, those that give way to these for one wide row. Their parameters are the same.
KERNELS = {"layer_norm_enter": layer_norm_enter_stream, "layer_out": layer_out_stream, "layer_tail": layer_tail_stream,
           "layer_project_gain": layer_project_gain_stream}  # fmt: skip

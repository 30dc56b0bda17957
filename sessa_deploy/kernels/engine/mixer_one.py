"""Decode step of a whole mixer for one sequence, in two kernels: `mixer_one_partial` reads both pasts, `mixer_one_out` adds the splits on its way.

The mathematics is mixer.py's. What differs is what one sequence waits for. A dependent kernel costs some microseconds however little it does, so nothing
stands between the pasts and the output projection: each program of `mixer_one_out` adds the few splits of causal attention for itself, all heads of them,
and those of feedback attention for its own columns. And the rows of a past do not depend on the kernel ahead: `mixer_one_partial` has asked for the first
tiles of its split before it waits for the queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.device import begin, rows_each, splits_used
from sessa_deploy.kernels.engine.product import ahead, bias_of, put, with_bias
from sessa_deploy.kernels.engine.spec import mixer_variant
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, launcher, pinned, workspace
from sessa_deploy.kernels.launch.limits import HEAD_MULTIPLE, LOG2E
from sessa_deploy.kernels.launch.splits import step_splits


@triton.jit
def _fold(b_q, b_max, b_sum, b_acc, b_k, b_v, m_row):
    """Adds a tile of rows to the running softmax of each slot: b_k, b_v, b_acc (rows, heads, lanes), b_max, b_sum (rows, heads)."""
    b_x = tl.where(m_row[:, None], tl.sum(b_k * b_q[None, :, :], 2), float("-inf"))
    b_top = tl.maximum(b_max, b_x)
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)  # a slot that has seen no row yet
    b_p = tl.exp2(b_x - b_base)
    b_fade = tl.exp2(b_max - b_base)
    return b_top, b_sum * b_fade + b_p, b_acc * b_fade[:, :, None] + b_v * b_p[:, :, None]


@triton.jit
def _query(p_q, mask, scale):
    return tl.load(p_q, mask=mask, other=0.0).to(tl.float32) * scale


@triton.jit
def _finish(part, stat, o_head, m_head, o_d, m_d, width, b_max, b_sum, b_acc):
    """Adds the slots of a split and stores their mean, part (.., d), and the logarithm of their weight in log2 units, stat (..,), of heads o_head."""
    b_top = tl.max(b_max, 0)
    b_w = tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - b_top[None, :]))
    b_total = tl.sum(b_sum * b_w, 0)
    b_mean = tl.sum(b_acc * b_w[:, :, None], 0) / b_total[:, None]
    tl.store(part + o_head[:, None] * width + o_d[None, :], b_mean, mask=m_head[:, None] & m_d[None, :])
    tl.store(stat + o_head, b_top + tl.log2(b_total), mask=m_head)


@triton.jit
def _causal_split(
    program, q, k, v, past_k, past_v, part, stat, length, splits, heads, group, units, scale,
    ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split for one block of heads: part (splits,Hq,d), stat (splits,Hq). Split 0 takes the new row too."""
    blocks_g = tl.cdiv(group, GROUP)
    blocks = tl.cdiv(heads, HEADS) * blocks_g
    i_split, block = program // blocks, program % blocks
    width = units * 8
    o_r = tl.arange(0, ROWS)
    o_h = (block // blocks_g) * HEADS + tl.arange(0, HEADS)
    o_d = tl.arange(0, LANES)
    m_h, m_d = o_h < heads, o_d < width
    m_hd = m_h[:, None] & m_d[None, :]
    o_hd = o_h[:, None] * width + o_d[None, :]
    i_g = (block % blocks_g) * GROUP
    o_q = o_h * group + i_g  # query heads, the first of the GROUP
    p_q = q + o_q[:, None] * width + o_d[None, :]
    b_q0 = tl.zeros([HEADS, LANES], dtype=tl.float32)
    b_max0 = tl.full([ROWS, HEADS], float("-inf"), dtype=tl.float32)
    b_sum0 = tl.zeros([ROWS, HEADS], dtype=tl.float32)
    b_acc0 = tl.zeros([ROWS, HEADS, LANES], dtype=tl.float32)
    if GROUP == 4:
        m_1, m_2, m_3 = m_h & (i_g + 1 < group), m_h & (i_g + 2 < group), m_h & (i_g + 3 < group)
        b_q1, b_q2, b_q3 = b_q0, b_q0, b_q0
        b_max1, b_sum1, b_acc1 = b_max0, b_sum0, b_acc0
        b_max2, b_sum2, b_acc2 = b_max0, b_sum0, b_acc0
        b_max3, b_sum3, b_acc3 = b_max0, b_sum0, b_acc0
    row = heads * units
    p_k, p_v = past_k + o_hd[None, :, :], past_v + o_hd[None, :, :]
    each = rows_each(length, splits, ROWS * TILES)
    first = i_split * each
    end = tl.minimum(first + each, length)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        o_row = start + o_r
        m_row = o_row < end
        mask = m_row[:, None, None] & m_hd[None, :, :]
        o_row = o_row.to(tl.int64)[:, None, None] * row * 8
        b_k = tl.load(p_k + o_row, mask=mask, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_row, mask=mask, other=0.0).to(tl.float32)
        if start == first:  # here and not ahead of the loop: the loads of its first STAGES - 1 turns come before it
            begin(PDL)
            b_q0 = _query(p_q, m_hd, scale)
            if GROUP == 4:
                b_q1 = _query(p_q + width, m_1[:, None] & m_d[None, :], scale)
                b_q2 = _query(p_q + 2 * width, m_2[:, None] & m_d[None, :], scale)
                b_q3 = _query(p_q + 3 * width, m_3[:, None] & m_d[None, :], scale)
        b_max0, b_sum0, b_acc0 = _fold(b_q0, b_max0, b_sum0, b_acc0, b_k, b_v, m_row)
        if GROUP == 4:
            b_max1, b_sum1, b_acc1 = _fold(b_q1, b_max1, b_sum1, b_acc1, b_k, b_v, m_row)
            b_max2, b_sum2, b_acc2 = _fold(b_q2, b_max2, b_sum2, b_acc2, b_k, b_v, m_row)
            b_max3, b_sum3, b_acc3 = _fold(b_q3, b_max3, b_sum3, b_acc3, b_k, b_v, m_row)
    begin(PDL)  # a split without rows waits too
    if i_split == 0:
        m_row = o_r == 0
        b_k = tl.load(k + o_hd, mask=m_hd, other=0.0).to(tl.float32)
        b_bad = tl.max(tl.where(tl.abs(b_k) < float("inf"), 0, 1), 1)  # an infinite key makes the row NaN, not a weight of zero
        b_k = tl.where(b_bad[:, None] > 0, float("nan"), b_k)[None, :, :]
        b_v = tl.load(v + o_hd, mask=m_hd, other=0.0).to(tl.float32)[None, :, :]
        b_max0, b_sum0, b_acc0 = _fold(_query(p_q, m_hd, scale), b_max0, b_sum0, b_acc0, b_k, b_v, m_row)
        if GROUP == 4:
            b_max1, b_sum1, b_acc1 = _fold(_query(p_q + width, m_1[:, None] & m_d[None, :], scale), b_max1, b_sum1, b_acc1, b_k, b_v, m_row)
            b_max2, b_sum2, b_acc2 = _fold(_query(p_q + 2 * width, m_2[:, None] & m_d[None, :], scale), b_max2, b_sum2, b_acc2, b_k, b_v, m_row)
            b_max3, b_sum3, b_acc3 = _fold(_query(p_q + 3 * width, m_3[:, None] & m_d[None, :], scale), b_max3, b_sum3, b_acc3, b_k, b_v, m_row)
    if (first < length) | (i_split == 0):  # without rows: nobody reads this split
        o_head = i_split * heads * group + o_q
        _finish(part, stat, o_head, m_h, o_d, m_d, width, b_max0, b_sum0, b_acc0)
        if GROUP == 4:
            _finish(part, stat, o_head + 1, m_1, o_d, m_d, width, b_max1, b_sum1, b_acc1)
            _finish(part, stat, o_head + 2, m_2, o_d, m_d, width, b_max2, b_sum2, b_acc2)
            _finish(part, stat, o_head + 3, m_3, o_d, m_d, width, b_max3, b_sum3, b_acc3)


@triton.jit
def _feedback_split(
    i_split, q, past_k, past_s, part, stat, length, splits, width, scale,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split: part (splits,D), stat (splits,). With 256 lanes a tile's warps lie along its rows, so that a row's sum crosses none."""
    o_r = tl.arange(0, ROWS)
    o_d = tl.arange(0, CHUNKS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m_d = o_d < width
    p_k, p_s = past_k + o_d[None, :, :], past_s + o_d[None, :, :]
    b_q = tl.zeros([CHUNKS, LANES], dtype=tl.float32)
    b_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([ROWS], dtype=tl.float32)
    b_acc = tl.zeros([ROWS, CHUNKS, LANES], dtype=tl.float32)
    each = rows_each(length, splits, ROWS * TILES)
    first = i_split * each
    end = tl.minimum(first + each, length)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        o_row = start + o_r
        m_row = o_row < end
        mask = m_row[:, None, None] & m_d[None, :, :]
        o_row = o_row.to(tl.int64)[:, None, None] * width
        b_k = tl.load(p_k + o_row, mask=mask, other=0.0)
        b_s = tl.load(p_s + o_row, mask=mask, other=0.0)
        if start == first:  # as in `_causal_split`
            begin(PDL)
            b_q = _query(q + o_d, m_d, scale)
        b_x = tl.where(m_row, tl.sum(tl.sum(b_k.to(tl.float32) * b_q[None, :, :], 1), 1), float("-inf"))
        b_top = tl.maximum(b_max, b_x)
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)  # a slot that has seen no row yet
        b_p = tl.exp2(b_x - b_base)
        b_fade = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_fade + b_p
        b_acc = b_acc * b_fade[:, None, None] + b_s.to(tl.float32) * b_p[:, None, None]
        b_max = b_top
    begin(PDL)
    if first < length:
        b_top = tl.max(b_max, 0)
        b_w = tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - b_top))
        b_total = tl.sum(b_sum * b_w, 0)
        tl.store(part + i_split * width + o_d, tl.sum(b_acc * b_w[:, None, None], 0) / b_total, mask=m_d)
        tl.store(stat + i_split, b_top + tl.log2(b_total))


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_one_partial"))
def mixer_one_partial(
    q, k, v, past_k, past_v, q_b, past_kb, past_s, past_length, part_f, stat_f, part_b, stat_b,
    splits_f, splits_b, capacity, heads, group, units, width, scale_f, scale_b,
    ROWS_F: tl.constexpr, HEADS_F: tl.constexpr, GROUP_F: tl.constexpr, LANES_F: tl.constexpr, STAGES_F: tl.constexpr, TILES_F: tl.constexpr,
    ROWS_B: tl.constexpr, CHUNKS_B: tl.constexpr, LANES_B: tl.constexpr, STAGES_B: tl.constexpr, TILES_B: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (blocks of heads * splits_f + splits_b,). past_k, past_v (P,Hkv,d), past_kb, past_s (P,D), dense. heads = Hkv, group = Hq / Hkv, d = 8 units.

    Writes the mean of the values (rows of s) that each split has seen, and the logarithm of their weight, to base 2: part_f (splits_f,Hq,d), stat_f
    (splits_f,Hq), part_b (splits_b,D), stat_b (splits_b,), float32.

    The rows of a past and its length are read before the wait: see `begin` and ../README.md on who may stand ahead of this kernel.
    """
    length = tl.minimum(tl.load(past_length), capacity)
    programs_f = tl.cdiv(heads, HEADS_F) * tl.cdiv(group, GROUP_F) * splits_f
    program = tl.program_id(0)
    if program < programs_f:
        _causal_split(
            program, q, k, v, past_k, past_v, part_f, stat_f, length, splits_f, heads, group, units, scale_f,
            ROWS_F, HEADS_F, GROUP_F, LANES_F, STAGES_F, TILES_F, PDL,
        )  # fmt: skip
    else:
        _feedback_split(
            program - programs_f, q_b, past_kb, past_s, part_b, stat_b, length, splits_b, width, scale_b, ROWS_B, CHUNKS_B, LANES_B, STAGES_B, TILES_B, PDL
        )


@triton.jit
def _weights(b_stat, m_s):
    """Weights of splits from the logarithms, along axis 0, and their sum; m_s: which there are."""
    b_w = tl.where(m_s, tl.exp2(b_stat - tl.max(b_stat, 0)[None, :]), 0.0)
    return b_w, tl.sum(b_w, 0)


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_one_out"))
def mixer_one_out(
    part_f, stat_f, part_b, stat_b, past_length, gamma, weight, bias, out, capacity, splits_f, rows_f, splits_b, rows_b, heads, units, depth,
    SPLITS_F: tl.constexpr, SPLITS_B: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(D / BN),), BK >= D: out (D,) = (o weight^T + bias), rounded, + gamma times feedback attention's sum, 0 without a past.

    heads = Hq. rows_f, rows_b: what a split takes at least. SPLITS_F, SPLITS_B cover every split. Splits are added in an order that these alone decide.
    """
    column = (tl.program_id(0) * BN).to(tl.int64)
    o_n = tl.arange(0, BN)
    m_n = o_n < depth - tl.program_id(0) * BN
    b_w = ahead(weight + column * depth, m_n, depth, 1, BN, BK, 1)
    b_bias = bias_of(bias + column, m_n, BN)
    begin(PDL)
    length = tl.minimum(tl.load(past_length), capacity)
    o_s, o_u, o_l = tl.arange(0, SPLITS_F), tl.arange(0, BK // 8), tl.arange(0, 8)
    m_s = (o_s < tl.maximum(splits_used(length, splits_f, rows_f), 1))[:, None]
    m_u = (o_u * 8 < depth)[None, :]
    b_stat = tl.load(stat_f + o_s[:, None] * heads + (o_u // units)[None, :], mask=m_s & m_u, other=float("-inf"))
    o_f = o_s[:, None, None] * depth + (o_u * 8)[None, :, None] + o_l[None, None, :]
    b_part = tl.load(part_f + o_f, mask=(m_s & m_u)[:, :, None], other=0.0)
    o_b = tl.arange(0, SPLITS_B)
    m_b = o_b < splits_used(length, splits_b, rows_b)
    b_stat_b = tl.load(stat_b + o_b, mask=m_b, other=float("-inf"))
    b_part_b = tl.load(part_b + o_b[:, None] * depth + column + o_n[None, :], mask=m_b[:, None] & m_n[None, :], other=0.0)
    b_gamma = tl.load(gamma)
    b_share, b_total = _weights(b_stat, m_s & m_u)
    b_o = tl.sum(b_part * b_share[:, :, None], 0) / b_total[:, None]
    b_o = tl.where(tl.trans(m_u), b_o, 0.0).to(out.dtype.element_ty)
    b_x = tl.reshape(b_o, [BK]).to(tl.float32)
    b_y = tl.sum(b_w.to(tl.float32) * b_x[None, :], 1)[None, :]
    b_share = tl.where(m_b, tl.exp2(b_stat_b - tl.max(b_stat_b, 0)), 0.0)
    b_add = b_gamma * (tl.sum(b_part_b * b_share[:, None], 0) / tl.sum(b_share, 0))
    b_add = tl.where(length > 0, b_add, 0.0)
    b_y = with_bias(b_y, b_bias).to(out.dtype.element_ty).to(tl.float32) + b_add[None, :]
    put(out + column, b_y, tl.arange(0, 1) < 1, m_n, depth, 1, BN)


def step(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, weight: Tensor, bias: Tensor, q_b: Tensor, gamma: Tensor, past_kb: Tensor,
    past_s: Tensor, past_length: Tensor, early: int = 0,
) -> Tensor:
    """`mixer.step` of one sequence: s (1,D)."""
    _, q_heads, head = q.shape
    heads, capacity, width, device, dtype = k.shape[1], past_k.shape[1], q_b.shape[1], q.device, q.dtype
    group, units = q_heads // heads, head // HEAD_MULTIPLE
    variant = mixer_variant(width, head, group)
    partial = pinned(("mixer_one_partial",), device, dtype, variant, early)["mixer_one_partial"]
    last = pinned(("mixer_one_out",), device, dtype, variant.split(".")[0], early)["mixer_one_out"]
    rows_f, rows_b = partial["ROWS_F"] * partial["TILES_F"], partial["ROWS_B"] * partial["TILES_B"]
    splits_f = step_splits(capacity, rows_f, last["SPLITS_F"])
    splits_b = step_splits(capacity, rows_b, last["SPLITS_B"])
    f32 = torch.float32
    at, _memory = workspace(device, {
        "part_f": (splits_f * width, f32), "stat_f": (splits_f * q_heads, f32), "part_b": (splits_b * width, f32), "stat_b": (splits_b, f32),
    })  # fmt: skip
    out = torch.empty(1, width, dtype=dtype, device=device)
    parts = [at[name] for name in ("part_f", "stat_f", "part_b", "stat_b")]
    programs_f = triton.cdiv(heads, partial["HEADS_F"]) * triton.cdiv(group, partial["GROUP_F"]) * splits_f
    launcher(mixer_one_partial, device, dtype, partial)(
        (programs_f + splits_b,), *map(address, (q, k, v, past_k, past_v, q_b, past_kb, past_s, past_length)), *parts,
        splits_f, splits_b, capacity, heads, group, units, width, head**-0.5 * LOG2E, width**-0.5 * LOG2E,
    )  # fmt: skip
    launcher(mixer_one_out, device, dtype, last)(
        (triton.cdiv(width, last["BN"]),), *parts, *map(address, (past_length, gamma, weight, bias, out)),
        capacity, splits_f, rows_f, splits_b, rows_b, q_heads, units, width,
    )  # fmt: skip
    return out

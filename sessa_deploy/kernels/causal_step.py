"""Decode step of causal attention with a cache: one new token against a fixed-capacity past, read once and in place.

o = sum_j softmax_j(q . k_j * d^-1/2) v_j over the past rows j < past_length[b] and the new row itself, for every query head.
`causal_step_partial` gives each split of the past to one program, which keeps for each of its row slots a running maximum, a running sum and an
unnormalised sum of values, all float32; split 0 also holds the new row. `causal_step_combine` adds the splits in a fixed order. Splits interleave
tiles of rows, so that a short context in a large cache still spreads over many programs, and their number follows from the capacity and the
tiles alone: a sequence's bits do not depend on the batch around it. Rows from past_length[b] on are never read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels import launch
from sessa_deploy.kernels.feedback_launch import address, aligned, launcher, pinned, workspace
from sessa_deploy.kernels.launch_causal import MULTIPLE, head_variant

LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=launch.do_not_specialize("causal_step_partial"))
def causal_step_partial(
    q, k, v, past_k, past_v, past_length, part, stat,
    stride_kb: tl.int64, stride_kr, stride_vb: tl.int64, stride_vr, capacity, heads, group, units, scale,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(Hkv / BLOCK_H) * ceil(group / BLOCK_G), splits, B). part (B,Hq,splits,d), stat (B,Hq,splits,2) = (maximum, sum).

    heads = Hkv, group = Hq / Hkv, scale = d^-1/2 * log2(e); units = d / 8, and the strides are in units of 8 elements too. A tile is
    (BLOCK_R, BLOCK_G, BLOCK_H, BLOCK_D): rows, query heads of a key/value head, key/value heads, lanes. Each row slot is on its own until the end,
    so that nothing crosses warps inside the loop.
    """
    i_split = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(1)
    group_blocks = tl.cdiv(group, BLOCK_G)
    width = units * 8
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    o_r = tl.arange(0, BLOCK_R)
    o_g = (tl.program_id(0) % group_blocks) * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    o_h = (tl.program_id(0) // group_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_hd = (o_h < heads)[:, None] & (o_d < width)[None, :]
    o_hd = o_h[:, None] * width + o_d[None, :]
    o_q = i_b * heads * group + o_h[None, :] * group + o_g  # (BLOCK_G, BLOCK_H): query heads
    m_q = (o_h < heads)[None, :] & (o_g < group)
    m_qd = m_q[:, :, None] & (o_d < width)[None, None, :]
    b_q = tl.load(q + o_q[:, :, None] * width + o_d[None, None, :], mask=m_qd, other=0.0).to(tl.float32)
    # The new row stands in row slot 0 of split 0.
    m_new = m_hd & (i_split == 0)
    b_k0 = tl.load(k + i_b * heads * width + o_hd, mask=m_new, other=0.0).to(tl.float32)
    b_v0 = tl.load(v + i_b * heads * width + o_hd, mask=m_new, other=0.0).to(tl.float32)
    b_bad = tl.max(tl.where(tl.abs(b_k0) < float("inf"), 0, 1), 1)  # an infinite key makes the row NaN, not a weight of zero
    b_x0 = tl.where(b_bad[None, :] > 0, float("nan"), tl.sum(b_q * b_k0[None, :, :], 2))
    first = (o_r == 0) & (i_split == 0)
    b_max = tl.where(first[:, None, None], b_x0[None, :, :], float("-inf"))
    b_sum = tl.where(first[:, None, None], tl.full([BLOCK_R, BLOCK_G, BLOCK_H], 1.0, dtype=tl.float32), 0.0)
    b_acc = tl.where(first[:, None, None, None], tl.zeros([BLOCK_R, BLOCK_G, BLOCK_H, BLOCK_D], dtype=tl.float32) + b_v0[None, None, :, :], 0.0)
    p_k = past_k + i_b * stride_kb * 8 + o_hd[None, :, :]
    p_v = past_v + i_b * stride_vb * 8 + o_hd[None, :, :]
    for start in tl.range(i_split * BLOCK_R, length, splits * BLOCK_R, num_stages=STAGES):
        o_row = start + o_r
        m_row = o_row < length
        mask = m_row[:, None, None] & m_hd[None, :, :]
        o_row = o_row.to(tl.int64)[:, None, None] * 8
        b_k = tl.load(p_k + o_row * stride_kr, mask=mask, other=0.0)
        b_v = tl.load(p_v + o_row * stride_vr, mask=mask, other=0.0)
        b_x = tl.sum(b_k.to(tl.float32)[:, None, :, :] * b_q[None, :, :, :], 3)  # (BLOCK_R, BLOCK_G, BLOCK_H)
        b_x = tl.where(m_row[:, None, None], b_x, float("-inf"))
        b_top = tl.maximum(b_max, b_x)
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)  # a slot that has seen no row yet
        b_p = tl.exp2((b_x - b_base) * scale)
        b_fade = tl.exp2((b_max - b_base) * scale)
        b_sum = b_sum * b_fade + b_p
        b_acc = b_acc * b_fade[:, :, :, None] + b_v.to(tl.float32)[:, None, :, :] * b_p[:, :, :, None]
        b_max = b_top
    if (i_split * BLOCK_R < length) | (i_split == 0):  # a split without rows writes nothing, and the combination does not read it
        b_top = tl.max(b_max, 0)
        b_w = tl.where(b_max == float("-inf"), 0.0, tl.exp2((b_max - b_top[None, :, :]) * scale))
        o_part = o_q * splits + i_split
        tl.store(part + o_part[:, :, None] * width + o_d[None, None, :], tl.sum(b_acc * b_w[:, :, :, None], 0), mask=m_qd)
        tl.store(stat + o_part * 2, b_top, mask=m_q)
        tl.store(stat + o_part * 2 + 1, tl.sum(b_sum * b_w, 0), mask=m_q)


@triton.jit(do_not_specialize=launch.do_not_specialize("causal_step_combine"))
def causal_step_combine(part, stat, past_length, out, capacity, splits, rows, units, scale, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (Hq, ceil(d / BLOCK_D), B): o (B,Hq,d), the sum of the splits over its weight; BLOCK_S covers every split, rows is the partial kernel's tile."""
    i_b = tl.program_id(2)
    width = units * 8
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    used = tl.maximum(tl.minimum(splits, tl.cdiv(length, rows)), 1)
    i_q = i_b.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_s = o_s < used
    m_d = o_d < width
    o_part = i_q * splits + o_s
    b_part = tl.load(part + o_part[:, None] * width + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
    b_max = tl.load(stat + o_part * 2, mask=m_s, other=float("-inf"))
    b_sum = tl.load(stat + o_part * 2 + 1, mask=m_s, other=0.0)
    b_w = tl.where(m_s, tl.exp2((b_max - tl.max(b_max, 0)) * scale), 0.0)
    b_o = tl.sum(b_part * b_w[:, None], 0) / tl.sum(b_w * b_sum, 0)
    tl.store(out + i_q * width + o_d, b_o.to(out.dtype.element_ty), mask=m_d)


def in_place(x: Tensor) -> Tensor:
    """x (B,P,Hkv,d) as it is where its rows (Hkv,d) are dense and its address and strides keep the kernels' promise; else a copy."""
    strides = x.stride(0) % MULTIPLE == 0 and x.stride(1) % MULTIPLE == 0 and x.data_ptr() % launch.ALIGNMENT == 0
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] and strides else aligned(x)


def strides(x: Tensor) -> tuple[int, int]:
    """Batch and row stride of a past, as the kernels take them."""
    return x.stride(0) // MULTIPLE, x.stride(1) // MULTIPLE


def splits_of(capacity: int, rows: int, most: int) -> int:
    """Splits of a past of `capacity` rows in tiles of `rows`: split i reads tiles i, i + splits, ... Nothing else decides."""
    return max(1, min(most, -(-capacity // rows)))


def step(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> Tensor:
    """One decode step of causal attention on a GPU: o (B,1,Hq,d) over past rows j < past_length[b] and the new row.

    q: (B,1,Hq,d), k, v: (B,1,Hkv,d), rotated, float32, float16 or bfloat16, d a multiple of 8 up to 256, Hq a multiple of Hkv. past_k, past_v:
    (B,P,Hkv,d) in the storage dtype, P >= 0; views with any batch and row stride that is a multiple of 8 are read in place. past_length: (B,) int32.
    Raises ValueError on T != 1 or heads wider than 256.
    """
    batch, tokens, q_heads, width = q.shape
    if tokens != 1:
        raise ValueError(f"sessa: the step kernel takes T = 1, got {tuple(q.shape)}")
    heads, capacity = k.shape[2], past_k.shape[1]
    device, dtype, group = q.device, q.dtype, q_heads // k.shape[2]
    partial = pinned(("causal_step_partial",), device, dtype, head_variant(width, group))["causal_step_partial"]
    combine = pinned(("causal_step_combine",), device, dtype, "any")["causal_step_combine"]
    splits = splits_of(capacity, partial["BLOCK_R"], combine["BLOCK_S"])
    q, k, v, past_length = aligned(q), aligned(k), aligned(v), past_length.to(torch.int32).contiguous()
    past_k, past_v = in_place(past_k), in_place(past_v)
    parts = batch * q_heads * splits
    at, _memory = workspace(device, {"part": (parts * width, torch.float32), "stat": (parts * 2, torch.float32)})
    out, scale = torch.empty_like(q), width**-0.5 * LOG2E
    blocks = triton.cdiv(heads, partial["BLOCK_H"]) * triton.cdiv(group, partial["BLOCK_G"])
    launcher(causal_step_partial, device, dtype, partial)(
        (blocks, splits, batch), address(q), address(k), address(v), address(past_k), address(past_v), address(past_length), at["part"], at["stat"],
        *strides(past_k), *strides(past_v), capacity, heads, group, width // MULTIPLE, scale,
    )  # fmt: skip
    launcher(causal_step_combine, device, dtype, combine)(
        (q_heads, triton.cdiv(width, combine["BLOCK_D"]), batch), at["part"], at["stat"], address(past_length), address(out),
        capacity, splits, partial["BLOCK_R"], width // MULTIPLE, scale,
    )  # fmt: skip
    return out

"""Decode step of causal attention with a cache: one new token against a fixed-capacity past, read once and in place.

o = sum_j softmax_j(q . k_j * d^-1/2) v_j over the past rows j < past_length[b] and the new row itself, for every query head.
`causal_step_partial` gives each split of the past to one program, which keeps for each of its row slots a running maximum, a running sum and an
unnormalised sum of values, all float32; split 0 also holds the new row. `causal_step_combine` adds the splits in a fixed order. A split is a run of
rows, as long as every other one of its sequence and no shorter than some tiles; how many there may be follows from the capacity and the tiles
alone: a sequence's bits do not depend on the batch around it. Rows from past_length[b] on are never read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.causal.spec import head_variant
from sessa_deploy.kernels.device import add_splits, begin, locate, pieces, rows_each, seat, splits_used
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, aligned, launcher, pinned, workspace
from sessa_deploy.kernels.launch.limits import ALIGNMENT, HEAD_MULTIPLE, LOG2E
from sessa_deploy.kernels.launch.splits import step_programs, step_splits


@triton.jit
def _with_new(b_q, b_max, b_sum, b_acc, b_k, b_v, o_r):
    """Puts the new row into row slot 0: b_k, b_v (heads, lanes)."""
    b_bad = tl.max(tl.where(tl.abs(b_k) < float("inf"), 0, 1), 1)  # an infinite key makes the row NaN, not a weight of zero
    b_x = tl.where(b_bad > 0, float("nan"), tl.sum(b_q * b_k, 1))
    slot = (o_r == 0)[:, None]
    return tl.where(slot, b_x[None, :], b_max), tl.where(slot, 1.0, b_sum), tl.where(slot[:, :, None], b_v[None, :, :], b_acc)


@triton.jit
def _row(p_x, m_x, SOON: tl.constexpr = False):
    """SOON: asked for where it stands, and not where it is wanted: volatile."""
    return tl.load(p_x, mask=m_x, other=0.0, volatile=SOON).to(tl.float32)


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
def _finish(part, stat, o_part, m_head, o_d, m_d, width, b_max, b_sum, b_acc):
    """Adds the slots of a split and stores them: part (.., d), stat (.., 2) at o_part."""
    b_top = tl.max(b_max, 0)
    b_w = tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - b_top[None, :]))
    tl.store(part + o_part[:, None] * width + o_d[None, :], tl.sum(b_acc * b_w[:, :, None], 0), mask=m_head[:, None] & m_d[None, :])
    tl.store(stat + o_part * 2, b_top, mask=m_head)
    tl.store(stat + o_part * 2 + 1, tl.sum(b_sum * b_w, 0), mask=m_head)


@triton.jit(do_not_specialize=table.do_not_specialize("causal_step_partial"))
def causal_step_partial(
    q, k, v, past_k, past_v, past_length, part, stat,
    stride_kb: tl.int64, stride_kr, stride_vb: tl.int64, stride_vr, batch, splits, capacity, heads, group, units, scale,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, TILES: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(Hkv / BLOCK_H) * ceil(group / BLOCK_G), at most B * splits), shared out as in feedback/step.py.

    part (B,Hq,splits,d), stat (B,Hq,splits,2) = (maximum in log2 units, sum). heads = Hkv, group = Hq / Hkv,
    scale = d^-1/2 * log2(e); units = d / 8, and the strides are in units of 8 elements too. A tile is
    (BLOCK_R, BLOCK_H, BLOCK_D): rows, key/value heads, lanes; a split takes TILES of them at least, and serves BLOCK_G (1 or 4) query heads of each.
    Each row slot is on its own until the end, so that nothing crosses warps inside the loop; tensors of another rank in there would cost a trip through
    shared memory each.
    """
    begin(PDL)
    share(
        tl.program_id(1), tl.num_programs(1), tl.program_id(0), q, k, v, past_k, past_v, past_length, part, stat, stride_kb, stride_kr, stride_vb, stride_vr,
        batch, splits, capacity, heads, group, units, scale, BLOCK_R, BLOCK_H, BLOCK_G, BLOCK_D, STAGES, TILES,
    )  # fmt: skip


@triton.jit
def share(
    program, programs, block, q, k, v, past_k, past_v, past_length, part, stat,
    stride_kb, stride_kr, stride_vb, stride_vr, batch, splits, capacity, heads, group, units, scale,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, TILES: tl.constexpr,
    many=1, LATE: tl.constexpr = False, UNIT: tl.constexpr = 1,
):  # fmt: skip
    """What one of `programs` programs that share a block of heads of the batch computes.

    many: how many times TILES tiles a split takes at least. LATE: it waits for the kernel ahead, see `begin`, with the first tiles of a past on their way;
    a program that gets nothing to do does not wait here. UNIT: see `rows_each`.
    """
    every, rows = programs >= batch * splits, BLOCK_R * TILES * many
    total, b_first, b_n = pieces(every, past_length, batch, capacity, splits, rows, 1, UNIT)
    for start in tl.range(0, total, programs, num_stages=1):
        item = start + seat(program, programs, start)
        if item < total:
            i_b, i_split = locate(item, b_first, b_n, every, past_length, batch, capacity, splits, rows, 1, UNIT)
            length = tl.minimum(tl.load(past_length + i_b), capacity)
            each = rows_each(length, splits, rows, UNIT)
            if (i_split * each < length) | (i_split == 0):  # without rows: the combination does not read this split
                _one_split(
                    block, q, k, v, past_k, past_v, part, stat, stride_kb, stride_kr, stride_vb, stride_vr, i_b.to(tl.int64), i_split, splits, each, length,
                    heads, group, units, scale, BLOCK_R, BLOCK_H, BLOCK_G, BLOCK_D, STAGES, LATE,
                )  # fmt: skip


@triton.jit
def _one_split(
    block, q, k, v, past_k, past_v, part, stat,
    stride_kb, stride_kr, stride_vb, stride_vr, i_b, i_split, splits, each, length, heads, group, units, scale,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Split i_split of sequence i_b for one block of heads."""
    group_blocks = tl.cdiv(group, BLOCK_G)
    width = units * 8
    o_r = tl.arange(0, BLOCK_R)
    o_h = (block // group_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_h, m_d = o_h < heads, o_d < width
    m_hd = m_h[:, None] & m_d[None, :]
    o_hd = o_h[:, None] * width + o_d[None, :]
    i_g = (block % group_blocks) * BLOCK_G
    o_q = (i_b * heads + o_h) * group + i_g  # query heads, the first of the BLOCK_G
    p_q = q + o_q[:, None] * width + o_d[None, :]
    p_k0, p_v0 = k + i_b * heads * width + o_hd, v + i_b * heads * width + o_hd
    b_q0 = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    b_max0 = tl.full([BLOCK_R, BLOCK_H], float("-inf"), dtype=tl.float32)
    b_sum0 = tl.zeros([BLOCK_R, BLOCK_H], dtype=tl.float32)
    b_acc0 = tl.zeros([BLOCK_R, BLOCK_H, BLOCK_D], dtype=tl.float32)
    if BLOCK_G == 4:
        m_1, m_2, m_3 = m_h & (i_g + 1 < group), m_h & (i_g + 2 < group), m_h & (i_g + 3 < group)
        p_q1, p_q2, p_q3 = p_q + width, p_q + 2 * width, p_q + 3 * width
        m_q1, m_q2, m_q3 = m_1[:, None] & m_d[None, :], m_2[:, None] & m_d[None, :], m_3[:, None] & m_d[None, :]
        b_q1, b_max1, b_sum1, b_acc1 = b_q0, b_max0, b_sum0, b_acc0
        b_q2, b_max2, b_sum2, b_acc2 = b_q0, b_max0, b_sum0, b_acc0
        b_q3, b_max3, b_sum3, b_acc3 = b_q0, b_max0, b_sum0, b_acc0
    if not LATE:
        b_q0 = _row(p_q, m_hd) * scale
        if BLOCK_G == 4:
            b_q1, b_q2, b_q3 = _row(p_q1, m_q1) * scale, _row(p_q2, m_q2) * scale, _row(p_q3, m_q3) * scale
        if i_split == 0:
            b_k0, b_v0 = _row(p_k0, m_hd), _row(p_v0, m_hd)
            b_max0, b_sum0, b_acc0 = _with_new(b_q0, b_max0, b_sum0, b_acc0, b_k0, b_v0, o_r)
            if BLOCK_G == 4:
                b_max1, b_sum1, b_acc1 = _with_new(b_q1, b_max1, b_sum1, b_acc1, b_k0, b_v0, o_r)
                b_max2, b_sum2, b_acc2 = _with_new(b_q2, b_max2, b_sum2, b_acc2, b_k0, b_v0, o_r)
                b_max3, b_sum3, b_acc3 = _with_new(b_q3, b_max3, b_sum3, b_acc3, b_k0, b_v0, o_r)
    p_k = past_k + i_b * stride_kb * 8 + o_hd[None, :, :]
    p_v = past_v + i_b * stride_vb * 8 + o_hd[None, :, :]
    first = i_split * each
    end = tl.minimum(first + each, length)
    last = tl.maximum(end, first + 1) if LATE else end  # without a past, the new row is looked at in the loop all the same
    for start in tl.range(first, last, BLOCK_R, num_stages=STAGES):
        o_row = start + o_r
        m_row = o_row < end
        mask = m_row[:, None, None] & m_hd[None, :, :]
        o_row = o_row.to(tl.int64)[:, None, None] * 8
        b_k = tl.load(p_k + o_row * stride_kr, mask=mask, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_row * stride_vr, mask=mask, other=0.0).to(tl.float32)
        if LATE:  # noqa: SIM102
            if start == first:
                begin(LATE)
                b_q0 = _row(p_q, m_hd, BLOCK_G == 1) * scale
                if BLOCK_G == 1:  # the new row together with q; several q hold its registers
                    b_k0, b_v0 = _row(p_k0, m_hd & (i_split == 0), True), _row(p_v0, m_hd & (i_split == 0), True)
                if BLOCK_G == 4:
                    b_q1, b_q2, b_q3 = _row(p_q1, m_q1) * scale, _row(p_q2, m_q2) * scale, _row(p_q3, m_q3) * scale
                if i_split == 0:
                    if BLOCK_G == 4:
                        b_k0, b_v0 = _row(p_k0, m_hd), _row(p_v0, m_hd)
                    b_max0, b_sum0, b_acc0 = _with_new(b_q0, b_max0, b_sum0, b_acc0, b_k0, b_v0, o_r)
                    if BLOCK_G == 4:
                        b_max1, b_sum1, b_acc1 = _with_new(b_q1, b_max1, b_sum1, b_acc1, b_k0, b_v0, o_r)
                        b_max2, b_sum2, b_acc2 = _with_new(b_q2, b_max2, b_sum2, b_acc2, b_k0, b_v0, o_r)
                        b_max3, b_sum3, b_acc3 = _with_new(b_q3, b_max3, b_sum3, b_acc3, b_k0, b_v0, o_r)
        b_max0, b_sum0, b_acc0 = _fold(b_q0, b_max0, b_sum0, b_acc0, b_k, b_v, m_row)
        if BLOCK_G == 4:
            b_max1, b_sum1, b_acc1 = _fold(b_q1, b_max1, b_sum1, b_acc1, b_k, b_v, m_row)
            b_max2, b_sum2, b_acc2 = _fold(b_q2, b_max2, b_sum2, b_acc2, b_k, b_v, m_row)
            b_max3, b_sum3, b_acc3 = _fold(b_q3, b_max3, b_sum3, b_acc3, b_k, b_v, m_row)
    o_part = o_q * splits + i_split
    _finish(part, stat, o_part, m_h, o_d, m_d, width, b_max0, b_sum0, b_acc0)
    if BLOCK_G == 4:
        _finish(part, stat, o_part + splits, m_1, o_d, m_d, width, b_max1, b_sum1, b_acc1)
        _finish(part, stat, o_part + 2 * splits, m_2, o_d, m_d, width, b_max2, b_sum2, b_acc2)
        _finish(part, stat, o_part + 3 * splits, m_3, o_d, m_d, width, b_max3, b_sum3, b_acc3)


@triton.jit(do_not_specialize=table.do_not_specialize("causal_step_combine"))
def causal_step_combine(part, stat, past_length, out, capacity, splits, rows, units, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (Hq, ceil(d / BLOCK_D), B): o (B,Hq,d), the sum of the splits over its weight; BLOCK_S covers every split, rows is what one takes at least."""
    begin(PDL)
    i_b = tl.program_id(2)
    width = units * 8
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    used = tl.maximum(splits_used(length, splits, rows), 1)
    i_q = i_b.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_o = add_splits(part, stat, i_q * splits, used, width, o_d, m_d, BLOCK_S)
    tl.store(out + i_q * width + o_d, b_o.to(out.dtype.element_ty), mask=m_d)


def in_place(x: Tensor) -> Tensor:
    """x (B,P,Hkv,d) as it is where its rows (Hkv,d) are dense and its address and strides keep the kernels' promise; else a copy."""
    strides = x.stride(0) % HEAD_MULTIPLE == 0 and x.stride(1) % HEAD_MULTIPLE == 0 and x.data_ptr() % ALIGNMENT == 0
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] and strides else aligned(x)


def strides(x: Tensor) -> tuple[int, int]:
    """Batch and row stride of a past, as the kernels take them."""
    return x.stride(0) // HEAD_MULTIPLE, x.stride(1) // HEAD_MULTIPLE


def step(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor, early: int = 0) -> Tensor:
    """One decode step of causal attention on a GPU: o (B,1,Hq,d) over past rows j < past_length[b] and the new row.

    q: (B,1,Hq,d), k, v: (B,1,Hkv,d), rotated, float32, float16 or bfloat16, d a multiple of 8 up to 256, Hq a multiple of Hkv. past_k, past_v:
    (B,P,Hkv,d) in the storage dtype, P >= 0; views with any batch and row stride that is a multiple of 8 are read in place. past_length: (B,) int32.
    early: see `jit.pinned`. Raises ValueError on T != 1 or heads wider than 256.
    """
    batch, tokens, q_heads, width = q.shape
    if tokens != 1:
        raise ValueError(f"sessa: the step kernel takes T = 1, got {tuple(q.shape)}")
    heads, capacity = k.shape[2], past_k.shape[1]
    device, dtype, group = q.device, q.dtype, q_heads // k.shape[2]
    partial = pinned(("causal_step_partial",), device, dtype, head_variant(width, group), early)["causal_step_partial"]
    combine = pinned(("causal_step_combine",), device, dtype, "any", early)["causal_step_combine"]
    rows = partial["BLOCK_R"] * partial["TILES"]
    splits = step_splits(capacity, rows, combine["BLOCK_S"])
    q, k, v, past_length = aligned(q), aligned(k), aligned(v), past_length.to(torch.int32).contiguous()
    past_k, past_v = in_place(past_k), in_place(past_v)
    parts = batch * q_heads * splits
    at, _memory = workspace(device, {"part": (parts * width, torch.float32), "stat": (parts * 2, torch.float32)})
    out, scale = torch.empty_like(q), width**-0.5 * LOG2E
    blocks = triton.cdiv(heads, partial["BLOCK_H"]) * triton.cdiv(group, partial["BLOCK_G"])
    run = launcher(causal_step_partial, device, dtype, partial)
    run(
        (blocks, step_programs(batch * splits, blocks, run.resident)),
        address(q), address(k), address(v), address(past_k), address(past_v), address(past_length), at["part"], at["stat"],
        *strides(past_k), *strides(past_v), batch, splits, capacity, heads, group, width // HEAD_MULTIPLE, scale,
    )  # fmt: skip
    launcher(causal_step_combine, device, dtype, combine)(
        (q_heads, triton.cdiv(width, combine["BLOCK_D"]), batch), at["part"], at["stat"], address(past_length), address(out),
        capacity, splits, rows, width // HEAD_MULTIPLE,
    )  # fmt: skip
    return out

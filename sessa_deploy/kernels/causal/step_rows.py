"""A step of 2 to ROWS new rows of causal attention with a cache: the past read once for all of them.

o_t = sum_j softmax_j(q_t . k_j * d^-1/2) v_j over past rows j < past_length[b] and new rows j <= t. `causal_rows_partial` gives each split of the past, and
the new rows, to a program: the T queries of a head are one matrix tile of ROWS rows, whatever T is. Maximum, sum and values run along in float32, the weights
of a tile are rounded to the storage type and summed as rounded. `causal_rows_combine` adds the splits in a fixed order. Past rows from past_length[b] on are
never read; a new row's NaN or Inf reaches itself and later rows only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.contract import STEP_ROWS
from sessa_deploy.kernels.causal.step import in_place, strides
from sessa_deploy.kernels.device import begin, rows_each, splits_used
from sessa_deploy.kernels.device_rows import ROWS, join, near
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import Options, address, aligned, launcher, pinned, workspace
from sessa_deploy.kernels.launch.limits import HEAD_MULTIPLE, LOG2E
from sessa_deploy.kernels.launch.splits import step_splits


@triton.jit
def _tile(b_acc, b_max, b_sum, b_q, b_k, b_v, o_j, m_j, scale, QUERIES: tl.constexpr, NEW: tl.constexpr):
    """Adds keys o_j (R,) of k, v to the running softmax of N heads: b_q, b_acc (N,d,QUERIES), b_max, b_sum (N,QUERIES), b_k (N,R,d), b_v (N,d,R).

    NEW: key j counts for rows t >= j only.
    """
    SHIFT: tl.constexpr = 12.0 if b_k.dtype == tl.float16 else 0.0  # of all weights alike: small ones stay normal numbers
    b_x = tl.dot(b_k, b_q, input_precision="ieee")
    if NEW:
        # A weight of zero does not stop a NaN: the row's bad values go, and those who may see it get a NaN weight.
        odd = tl.sum(b_k * 0.0) + tl.sum(b_v * 0.0)  # NaN where one is not finite: what follows is long, and hardly ever needed
        if odd != 0.0:
            fine = tl.abs(b_v.to(tl.float32)) < float("inf")
            b_bad = tl.max(tl.where(fine, 0, 1), 1) + tl.max(tl.where(tl.abs(b_k.to(tl.float32)) < float("inf"), 0, 1), 2)
            b_v = tl.where(fine, b_v, 0.0).to(b_v.dtype)
            b_x = tl.where(b_bad[:, :, None] > 0, float("nan"), b_x)
        b_x = tl.where((m_j[:, None] & (o_j[:, None] <= tl.arange(0, QUERIES)[None, :]))[None, :, :], b_x, float("-inf"))
    else:
        b_x = tl.where(m_j[None, :, None], b_x, float("-inf"))
    b_top = tl.maximum(b_max, tl.max(b_x, 1) * scale)
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)  # a padded row of the new ones sees none
    b_fade = tl.exp2(b_max - b_base)
    b_p = tl.exp2(b_x * scale - (b_base - SHIFT)[:, None, :]).to(b_v.dtype)
    b_sum = b_sum * b_fade + tl.sum(b_p.to(tl.float32), 1)
    b_acc = tl.dot(b_v, b_p, b_acc * b_fade[:, None, :], input_precision="ieee")
    return b_acc, b_top, b_sum


@triton.jit
def _keys(k, v, o_k, o_v, o_nd, o_dn, m_nd, m_dn):
    """Keys (N,R,d) and values (N,d,R) of rows that begin o_k and o_v (R,) behind k and v."""
    b_k = tl.load(k + (o_k[None, :, None] + o_nd), mask=m_nd, other=0.0)
    b_v = tl.load(v + (o_v[None, None, :] + o_dn), mask=m_dn, other=0.0)
    return b_k, b_v


@triton.jit
def piece(
    item, q, k, v, past_k, past_v, past_length, part, stat, stride_kb, stride_kr, stride_vb, stride_vr,
    i_b, tokens, splits, capacity, heads, group, units, scale, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    LATE: tl.constexpr = False, QUERIES: tl.constexpr = ROWS,
):  # fmt: skip
    """What program `item` of (1 + splits) * blocks of BLOCK_H query heads of sequence i_b computes: the first `blocks` the new rows, the others a split each.

    part (B,T,Hq,1 + splits,d), stat (.., 2): the new rows, then every split. T <= QUERIES, which are columns of the products: no bit depends on how many.
    """
    blocks = tl.cdiv(heads * group, BLOCK_H)
    i_split = item // blocks - 1
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    each = rows_each(length, splits, BLOCK_R)
    first = i_split * each
    if first < length:  # of the new rows it is below 0
        width, row = units * 8, heads * units
        o_t, o_r, o_d = tl.arange(0, QUERIES), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
        o_h = item % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        m_h, m_d = o_h < heads * group, o_d < width
        m_q = m_h[:, None] & (o_t < tokens)[None, :]
        o_q = (i_b * tokens + o_t)[None, :] * heads * group + o_h[:, None]
        p_q, m_qd = q + o_q[:, None, :] * width + o_d[None, :, None], m_q[:, None, :] & m_d[None, :, None]
        b_max = tl.full([BLOCK_H, QUERIES], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_H, QUERIES], dtype=tl.float32)
        b_acc = tl.zeros([BLOCK_H, BLOCK_D, QUERIES], dtype=tl.float32)
        o_kv = (o_h // group * width)[:, None, None]
        o_nd, o_dn = o_kv + o_d[None, None, :], o_kv + o_d[None, :, None]
        m_nd, m_dn = m_h[:, None, None] & m_d[None, None, :], m_h[:, None, None] & m_d[None, :, None]
        if i_split < 0:
            if LATE:
                begin(True)
            o_new, o_row = i_b * tokens * row * 8, tl.minimum(o_r, tokens - 1) * (row * 8)
            b_q = tl.load(p_q, mask=m_qd, other=0.0)
            b_k, b_v = _keys(k + o_new, v + o_new, o_row, o_row, o_nd, o_dn, m_nd, m_dn)
            b_acc, b_max, b_sum = _tile(b_acc, b_max, b_sum, b_q, b_k, b_v, o_r, o_r < tokens, scale, QUERIES, NEW=True)
        else:
            p_k, p_v, end = past_k + i_b * stride_kb * 8, past_v + i_b * stride_vb * 8, tl.minimum(first + each, length)
            if LATE:
                b_q = tl.zeros([BLOCK_H, BLOCK_D, QUERIES], dtype=q.dtype.element_ty)
            else:
                b_q = tl.load(p_q, mask=m_qd, other=0.0)
            for start in tl.range(first, end, BLOCK_R, num_stages=STAGES):
                o_j = tl.minimum(o_r, end - 1 - start)  # the last row stands for those that there are not
                at = tl.cast(start, tl.int64) * 8
                b_k, b_v = _keys(p_k + at * stride_kr, p_v + at * stride_vr, o_j * (stride_kr * 8), o_j * (stride_vr * 8), o_nd, o_dn, m_nd, m_dn)
                if LATE:  # noqa: SIM102
                    if start == first:
                        begin(True)
                        b_q = tl.load(p_q, mask=m_qd, other=0.0)
                b_acc, b_max, b_sum = _tile(b_acc, b_max, b_sum, b_q, b_k, b_v, start + o_r, start + o_r < end, scale, QUERIES, NEW=False)
        o_part = o_q * (1 + splits) + 1 + i_split
        tl.store(part + o_part[:, None, :] * width + o_d[None, :, None], b_acc, mask=m_q[:, None, :] & m_d[None, :, None])
        tl.store(stat + o_part * 2, b_max, mask=m_q)
        tl.store(stat + o_part * 2 + 1, b_sum, mask=m_q)


@triton.jit
def combined(part, stat, length, o_q, m_q, splits, rows, width, o_d, m_d, BLOCK_S: tl.constexpr):
    """Columns o_d of o for rows and query heads o_q (N,): the new rows' part and that of every split.

    BLOCK_S covers every split, rows is what one takes at least.
    """
    o_first = o_q * (1 + splits)
    b_new = tl.load(part + o_first[:, None] * width + o_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)
    m_new = tl.load(stat + o_first * 2, mask=m_q, other=0.0)
    b_past, w_past, m_past = join(part, stat, o_first + 1, m_q, splits_used(length, splits, rows), width, o_d, m_d, BLOCK_S)
    b_top = tl.maximum(m_new, m_past)
    b_new_fade, b_past_fade = tl.exp2(m_new - b_top), tl.exp2(m_past - b_top)
    b_sum = w_past * b_past_fade + tl.load(stat + o_first * 2 + 1, mask=m_q, other=1.0) * b_new_fade
    return (b_past * b_past_fade[:, None] + b_new * b_new_fade[:, None]) / b_sum[:, None]


@triton.jit(do_not_specialize=table.do_not_specialize("causal_rows_partial"))
def causal_rows_partial(
    q, k, v, past_k, past_v, past_length, part, stat,
    stride_kb: tl.int64, stride_kr, stride_vb: tl.int64, stride_vr, tokens, splits, capacity, heads, group, units, scale,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid ((1 + splits) * ceil(Hq / BLOCK_H), B).

    heads = Hkv, group = Hq / Hkv, scale = d^-1/2 * log2(e); units = d / 8, and the strides are in units of 8 elements too. A tile is BLOCK_R rows for each of
    BLOCK_H query heads.
    """
    begin(PDL)
    piece(
        tl.program_id(0), q, k, v, past_k, past_v, past_length, part, stat, stride_kb, stride_kr, stride_vb, stride_vr,
        tl.program_id(1).to(tl.int64), tokens, splits, capacity, heads, group, units, scale, BLOCK_R, BLOCK_H, BLOCK_D, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=table.do_not_specialize("causal_rows_combine"))
def causal_rows_combine(
    part, stat, past_length, out, tokens, capacity, splits, rows, heads, units,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(T Hq / BLOCK_N), ceil(d / BLOCK_D), B): o (B,T,Hq,d). heads = Hq; BLOCK_S covers every split, rows is what a split takes at least."""
    begin(PDL)
    i_b = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    width = units * 8
    o_n, o_d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < tokens * heads, o_d < width
    o_q = i_b * tokens * heads + o_n
    b_o = combined(part, stat, length, o_q, m_n, splits, rows, width, o_d, m_d, BLOCK_S)
    tl.store(out + o_q[:, None] * width + o_d[None, :], b_o.to(out.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])


def step(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor, early: int = 0, tiles: Options | None = None) -> Tensor:
    """A step of 2 <= T <= 16 new rows of causal attention on a GPU: o (B,T,Hq,d) over past rows j < past_length[b] and new rows j <= t.

    q: (B,T,Hq,d), k, v: (B,T,Hkv,d), rotated, float16 or bfloat16, d a multiple of 8 up to 128, Hq a multiple of Hkv. past_k, past_v: (B,P,Hkv,d) in the
    storage dtype, P >= 1; views with any batch and row stride that is a multiple of 8 are read in place. past_length: (B,) int32. early: see `jit.pinned`;
    tiles: kernel -> launch options in place of the pinned ones. Raises ValueError on any other T or wider heads.
    """
    batch, tokens, q_heads, width = q.shape
    if not 2 <= tokens <= STEP_ROWS:
        raise ValueError(f"sessa: a step of several rows takes T = 2 to {STEP_ROWS}, got {tuple(q.shape)}")
    heads, capacity, device, dtype, group = k.shape[2], past_k.shape[1], q.device, q.dtype, q_heads // k.shape[2]
    options = tiles or {**pinned(("causal_rows_partial",), device, dtype, table.width_variant("causal_rows_partial", width), early),
                        **pinned(("causal_rows_combine",), device, dtype, "any", early)}  # fmt: skip
    partial, combine = options["causal_rows_partial"], options["causal_rows_combine"]
    rows = partial["BLOCK_R"]
    splits = step_splits(capacity, rows, combine["BLOCK_S"])
    q, k, v, past_length = aligned(q), aligned(k), aligned(v), past_length.to(torch.int32).contiguous()
    past_k, past_v = near(in_place(past_k)), near(in_place(past_v))
    parts, units = batch * tokens * q_heads * (1 + splits), width // HEAD_MULTIPLE
    at, _memory = workspace(device, {"part": (parts * width, torch.float32), "stat": (parts * 2, torch.float32)})
    out = torch.empty_like(q)
    launcher(causal_rows_partial, device, dtype, partial)(
        ((1 + splits) * triton.cdiv(q_heads, partial["BLOCK_H"]), batch), *map(address, (q, k, v, past_k, past_v, past_length)), at["part"], at["stat"],
        *strides(past_k), *strides(past_v), tokens, splits, capacity, heads, group, units, width**-0.5 * LOG2E,
    )  # fmt: skip
    launcher(causal_rows_combine, device, dtype, combine)(
        (triton.cdiv(tokens * q_heads, combine["BLOCK_N"]), triton.cdiv(width, combine["BLOCK_D"]), batch),
        at["part"], at["stat"], address(past_length), address(out), tokens, capacity, splits, rows, q_heads, units,
    )  # fmt: skip
    return out

"""Decode step of feedback attention: one new token against a fixed-capacity past, read once and in place.

s = f + gamma * sum_j softmax_j(q . k_j * D^-1/2) s_j over the past rows j < past_length[b]; with an empty past, s = f exactly.
`feedback_step_partial` gives each split of the past to one program, which keeps a running maximum, a running sum and an unnormalised
sum of s rows, all float32; `feedback_step_combine` adds the splits in a fixed order. A split is a run of rows, as long as every other one of its
sequence and no shorter than some tiles; how many there may be follows from the capacity and the tiles alone: a sequence's bits do not depend
on the batch around it. Rows from past_length[b] on are never read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.device import add_splits, begin, locate, pieces, rows_each, seat, splits_used
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, aligned, launcher, pinned, workspace
from sessa_deploy.kernels.launch.limits import ALIGNMENT, LOG2E
from sessa_deploy.kernels.launch.splits import step_programs, step_splits

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_step_partial"))
def feedback_step_partial(
    q, past_k, past_s, past_length, part, stat,
    stride_kb: tl.int64, stride_kr, stride_sb: tl.int64, stride_sr, batch, splits, capacity, width, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr, TILES: tl.constexpr, OWN: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (at most B * splits,). part (B,splits,D) and stat (B,splits,2) = (maximum in log2 units, sum); scale = D^-1/2 * log2(e).

    With a program for every split each takes its own; with fewer they share out those that have rows, so that short sequences of a large batch leave
    no programs idle. Which program computes a split changes no bit of it.

    A tile is (BLOCK_R, BLOCK_C, BLOCK_L): rows, chunks of D, lanes; a split takes TILES of them at least. Wide rows have all warps
    side by side along the lanes and share one maximum, sum and accumulator. Narrow rows (OWN) have warps along the rows:
    each row slot keeps its own, and nothing crosses warps until the end.
    """
    begin(PDL)
    share(
        tl.program_id(0), tl.num_programs(0), q, past_k, past_s, past_length, part, stat, stride_kb, stride_kr, stride_sb, stride_sr, batch, splits, capacity,
        width, scale, BLOCK_R, BLOCK_C, BLOCK_L, STAGES, TILES, OWN,
    )  # fmt: skip


@triton.jit
def share(
    program, programs, q, past_k, past_s, past_length, part, stat, stride_kb, stride_kr, stride_sb, stride_sr, batch, splits, capacity, width, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr, TILES: tl.constexpr, OWN: tl.constexpr,
    many=1, LATE: tl.constexpr = False, UNIT: tl.constexpr = 1,
):  # fmt: skip
    """What one of `programs` programs that share the batch computes.

    many: how many times TILES tiles a split takes at least. LATE: it waits for the kernel ahead, see `begin`, with the first tiles of a past on their way;
    a program that gets nothing to read does not wait here. UNIT: see `rows_each`.
    """
    every, rows = programs >= batch * splits, BLOCK_R * TILES * many
    total, b_first, b_n = pieces(every, past_length, batch, capacity, splits, rows, 0, UNIT)
    for start in tl.range(0, total, programs, num_stages=1):
        item = start + seat(program, programs, start)
        if item < total:
            i_b, i_split = locate(item, b_first, b_n, every, past_length, batch, capacity, splits, rows, 0, UNIT)
            _one_split(
                q, past_k, past_s, past_length, part, stat, stride_kb, stride_kr, stride_sb, stride_sr, i_b.to(tl.int64), i_split, splits, rows, capacity,
                width, scale, BLOCK_R, BLOCK_C, BLOCK_L, STAGES, OWN, LATE, UNIT,
            )  # fmt: skip


@triton.jit
def _one_split(
    q, past_k, past_s, past_length, part, stat,
    stride_kb, stride_kr, stride_sb, stride_sr, i_b, i_split, splits, rows, capacity, width, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr, OWN: tl.constexpr, LATE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Split i_split of sequence i_b."""
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    each = rows_each(length, splits, rows, UNIT)
    o_d = tl.arange(0, BLOCK_C)[:, None] * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    o_r = tl.arange(0, BLOCK_R)
    m_d = o_d < width
    if LATE:
        b_q = tl.zeros([BLOCK_C, BLOCK_L], dtype=tl.float32)
    else:
        b_q = tl.load(q + i_b * width + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_k = past_k + i_b * stride_kb + o_d[None, :, :]
    p_s = past_s + i_b * stride_sb + o_d[None, :, :]
    SLOTS: tl.constexpr = BLOCK_R if OWN else 1
    b_max = tl.full([SLOTS], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([SLOTS], dtype=tl.float32)
    b_acc = tl.zeros([SLOTS, BLOCK_C, BLOCK_L], dtype=tl.float32)
    first = i_split * each
    end = tl.minimum(first + each, length)
    for start in tl.range(first, end, BLOCK_R, num_stages=STAGES):
        o_row = start + o_r
        m_row = o_row < end
        mask = m_row[:, None, None] & m_d[None, :, :]
        o_row = o_row.to(tl.int64)[:, None, None]
        b_k = tl.load(p_k + o_row * stride_kr, mask=mask, other=0.0)
        b_s = tl.load(p_s + o_row * stride_sr, mask=mask, other=0.0)
        if LATE:  # noqa: SIM102
            if start == first:
                begin(LATE)
                b_q = tl.load(q + i_b * width + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_x = tl.sum(tl.sum(b_k.to(tl.float32) * b_q[None, :, :], 1), 1)  # (BLOCK_R,)
        b_x = tl.where(m_row, b_x * scale, float("-inf"))
        b_new = tl.maximum(b_max, b_x if OWN else tl.max(b_x, 0, keep_dims=True))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # a slot that has seen no row yet
        b_p = tl.exp2(b_x - b_base)
        b_fade = tl.exp2(b_max - b_base)
        b_y = b_s.to(tl.float32) * b_p[:, None, None]
        b_sum = b_sum * b_fade + (b_p if OWN else tl.sum(b_p, 0, keep_dims=True))
        b_acc = b_acc * b_fade[:, None, None] + (b_y if OWN else tl.sum(b_y, 0, keep_dims=True))
        b_max = b_new
    if first < length:  # a split without rows writes nothing, and the combination does not read it
        b_top = tl.max(b_max, 0)
        b_w = tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - b_top))
        o_part = i_b * splits + i_split
        tl.store(part + o_part * width + o_d, tl.sum(b_acc * b_w[:, None, None], 0), mask=m_d)
        tl.store(stat + o_part * 2, b_top)
        tl.store(stat + o_part * 2 + 1, tl.sum(b_sum * b_w, 0))


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_step_combine"))
def feedback_step_combine(
    part, stat, past_length, gamma, f, out, capacity, splits, rows, width,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (B, ceil(D / BLOCK_D)): s = f + gamma * (sum of the splits); BLOCK_S covers every split, rows is what one takes at least."""
    begin(PDL)
    i_d = tl.program_id(1)
    i_b = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    used = splits_used(length, splits, rows)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_f, b_gamma = tl.load(f + i_b * width + o_d, mask=m_d, other=0.0), tl.load(gamma + i_b)
    b_acc = add_splits(part, stat, i_b * splits, used, width, o_d, m_d, BLOCK_S)
    b_s = b_f.to(tl.float32) + b_gamma * b_acc
    tl.store(out + i_b * width + o_d, tl.where(length > 0, b_s.to(b_f.dtype), b_f), mask=m_d)


def _in_place(x: Tensor) -> Tensor:
    """x (B,P,D) as it is where its rows are dense and its address and strides keep the kernels' alignment promise; else a copy."""
    promised = x.stride(0) % ALIGNMENT == 0 and x.stride(1) % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0
    return x if x.stride(2) == 1 and promised else aligned(x)


def step(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor, early: int = 0) -> Tensor:
    """One decode step of feedback attention (arXiv 2604.18580, section 3) on a GPU.

    q, k, f: (B,1,D) float32, float16 or bfloat16, D a multiple of 16 up to 4096; k, the new token's own key, is not read (a token does not
    attend to itself). gamma: (B,1) float32. past_k, past_s: (B,P,D) in the storage dtype, P >= 0; views with any batch and row stride that is
    a multiple of 16 are read in place. past_length: (B,) int32. early: see `jit.pinned`. Returns s (B,1,D). Raises ValueError on T != 1 or an
    unsupported D or dtype.
    """
    batch, tokens, width = q.shape
    if tokens != 1 or width % ALIGNMENT or q.dtype not in _DTYPES:
        raise ValueError(f"sessa: the step kernel takes T = 1, D a multiple of {ALIGNMENT} and 16 or 32 bit floats, got {tuple(q.shape)} {q.dtype}")
    capacity = past_k.shape[1]
    if batch == 0 or capacity == 0:
        return f.clone()
    device, dtype = q.device, q.dtype
    partial = pinned(("feedback_step_partial",), device, dtype, table.width_variant("feedback_step_partial", width), early)["feedback_step_partial"]
    combine = pinned(("feedback_step_combine",), device, dtype, "128", early)["feedback_step_combine"]
    rows = partial["BLOCK_R"] * partial["TILES"]
    splits = step_splits(capacity, rows)
    q, f, gamma, past_length = aligned(q), aligned(f), gamma.contiguous(), past_length.to(torch.int32).contiguous()
    past_k, past_s = _in_place(past_k), _in_place(past_s)
    at, _memory = workspace(device, {"part": (batch * splits * width, torch.float32), "stat": (2 * batch * splits, torch.float32)})
    out = torch.empty_like(f)
    run = launcher(feedback_step_partial, device, dtype, partial)
    run(
        (step_programs(batch * splits, 1, run.resident),), address(q), address(past_k), address(past_s), address(past_length), at["part"], at["stat"],
        past_k.stride(0), past_k.stride(1), past_s.stride(0), past_s.stride(1), batch, splits, capacity, width, width**-0.5 * LOG2E,
    )  # fmt: skip
    launcher(feedback_step_combine, device, dtype, combine)(
        (batch, triton.cdiv(width, combine["BLOCK_D"])), at["part"], at["stat"], address(past_length), address(gamma), address(f), address(out),
        capacity, splits, rows, width,
    )  # fmt: skip
    return out

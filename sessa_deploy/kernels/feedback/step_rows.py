"""A step of 2 to ROWS new rows of feedback attention: the past read once for all of them.

s_t = f_t + gamma_t * (sum_j alpha[t,j] s_j over the past rows j < past_length[b] and the new rows j < t). `feedback_rows_partial` gives each split of the past
to a program, for which the T queries are one matrix tile of ROWS rows, whatever T is; a program more makes the scores of the new rows among themselves.
`feedback_rows_combine` adds the splits in a fixed order, joins both normalisers and inverts I - (gamma alpha) of the new rows by products of its powers, all
float32; `feedback_rows_finish` is s = (I - gamma alpha)^-1 (f + gamma * the past's sum). A past's weights go into its product as pairs of the storage type.
Past rows from past_length[b] on are never read; a new row's NaN or Inf reaches itself and later rows only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.contract import STEP_ROWS
from sessa_deploy.kernels.device import begin, rows_each, splits_used
from sessa_deploy.kernels.device_rows import ROWS, join, near
from sessa_deploy.kernels.feedback.step import _in_place
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import Options, address, aligned, launcher, pinned, workspace
from sessa_deploy.kernels.launch.limits import LOG2E
from sessa_deploy.kernels.launch.splits import step_splits

DOUBLINGS = tl.constexpr(STEP_ROWS.bit_length() - 2)


@triton.jit
def _scores(b_k, b_q, scale):
    """(R,N) float32, of C chunks' products of rows b_k (C,R,L) with b_q (C,L,N), in all C tiles alike: (C,R,N)."""
    b_x = tl.dot(b_k, b_q, input_precision="ieee")
    return tl.broadcast_to(tl.sum(b_x, 0, keep_dims=True), b_x.shape) * scale


@triton.jit
def piece(
    item, q, k, past_k, past_s, past_length, part, stat, scores, stride_kb, stride_kr, stride_sb, stride_sr, i_b, tokens, splits, capacity, width, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr, LATE: tl.constexpr = False, QUERIES: tl.constexpr = ROWS,
):  # fmt: skip
    """What program `item` of 1 + splits of sequence i_b computes: the first the scores (B,ROWS,ROWS) of the new rows, the others a split each.

    part (B,T,splits,D), stat (.., 2). A tile is (BLOCK_R, BLOCK_C, BLOCK_L): rows, chunks of D, lanes. T <= QUERIES, which are columns of the products: no bit
    depends on how many.
    """
    i_split = item - 1
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    each = rows_each(length, splits, BLOCK_R)
    first = i_split * each
    if first < length:  # of the new rows it is below 0
        o_c, o_t, o_l, o_r = tl.arange(0, BLOCK_C), tl.arange(0, QUERIES), tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
        m_t = o_t < tokens
        o_nd = o_c[:, None, None] * BLOCK_L + o_l[None, None, :]  # (C,1,L)
        o_kd = o_c[:, None, None] * BLOCK_L + o_l[None, :, None]  # (C,L,1)
        m_nd, m_kd = o_nd < width, o_kd < width
        o_new = i_b * tokens * width
        p_q, m_q = q + o_new + o_t[None, None, :] * width + o_kd, m_t[None, None, :] & m_kd
        if i_split < 0:
            if LATE:
                begin(True)
            b_q = tl.load(p_q, mask=m_q, other=0.0)
            b_k = tl.load(k + o_new + o_r[None, :, None] * width + o_nd, mask=(o_r < tokens)[None, :, None] & m_nd, other=0.0)
            b_x = _scores(b_k, b_q, scale)
            p_x = scores + i_b * ROWS * ROWS + o_t[None, :] * ROWS + o_r[:, None]
            tl.store(p_x, tl.max(b_x, 0), mask=m_t[None, :] & (o_r < ROWS)[:, None])
        else:
            SHIFT: tl.constexpr = 12.0 if past_s.dtype.element_ty == tl.float16 else 0.0  # of all weights alike: small ones stay normal numbers
            BACK: tl.constexpr = 2.0**-12 if past_s.dtype.element_ty == tl.float16 else 1.0
            p_k, p_s, end = past_k + i_b * stride_kb, past_s + i_b * stride_sb, tl.minimum(first + each, length)
            if LATE:
                b_q = tl.zeros([BLOCK_C, BLOCK_L, QUERIES], dtype=q.dtype.element_ty)
            else:
                b_q = tl.load(p_q, mask=m_q, other=0.0)
            b_max = tl.full([BLOCK_C, QUERIES], float("-inf"), dtype=tl.float32)
            b_sum = tl.zeros([BLOCK_C, QUERIES], dtype=tl.float32)
            b_acc = tl.zeros([BLOCK_C, BLOCK_L, QUERIES], dtype=tl.float32)
            for start in tl.range(first, end, BLOCK_R, num_stages=STAGES):
                o_j, at = tl.minimum(o_r, end - 1 - start), tl.cast(start, tl.int64)  # the last row stands for those that there are not
                b_k = tl.load(p_k + at * stride_kr + (o_j[None, :, None] * stride_kr + o_nd), mask=m_nd, other=0.0)
                b_s = tl.load(p_s + at * stride_sr + (o_j[None, None, :] * stride_sr + o_kd), mask=m_kd, other=0.0)
                if LATE:  # noqa: SIM102
                    if start == first:
                        begin(True)
                        b_q = tl.load(p_q, mask=m_q, other=0.0)
                b_x = _scores(b_k, b_q, scale)
                b_x = tl.where((o_r < end - start)[None, :, None], b_x, float("-inf"))
                b_top = tl.maximum(b_max, tl.max(b_x, 1))
                b_fade = tl.exp2(b_max - b_top)
                b_p = tl.exp2(b_x - (b_top - SHIFT)[:, None, :])
                b_high = b_p.to(b_s.dtype)
                b_low = (b_p - b_high.to(tl.float32)).to(b_s.dtype)
                b_sum = b_sum * b_fade + tl.sum(b_p, 1)
                b_acc = tl.dot(b_s, b_high, b_acc * b_fade[:, None, :], input_precision="ieee")
                b_acc = tl.dot(b_s, b_low, b_acc, input_precision="ieee")
                b_max = b_top
            o_part = (i_b * tokens + o_t) * splits + i_split
            tl.store(part + o_part[None, None, :] * width + o_kd, b_acc * BACK, mask=m_t[None, None, :] & m_kd)
            tl.store(stat + o_part * 2, tl.max(b_max, 0), mask=m_t)
            tl.store(stat + o_part * 2 + 1, tl.max(b_sum, 0) * BACK, mask=m_t)


@triton.jit
def added(part, stat, scores, gamma, length, i_b, o_t, tokens, splits, rows, width, o_d, m_d, BLOCK_S: tl.constexpr):
    """Columns o_d of gamma times the past's share of the sums of new rows o_t (N,); BLOCK_S covers every split, rows is what one takes at least."""
    m_t = o_t < tokens
    o_q, o_j = i_b * tokens + o_t, tl.arange(0, ROWS)
    b_past, w_past, m_past = join(part, stat, o_q * splits, m_t, splits_used(length, splits, rows), width, o_d, m_d, BLOCK_S)
    m_x = m_t[:, None] & (o_j[None, :] < o_t[:, None])
    b_x = tl.load(scores + (i_b * ROWS + o_t)[:, None] * ROWS + o_j[None, :], mask=m_x, other=float("-inf"))
    b_top = tl.maximum(m_past, tl.max(b_x, 1))
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_fade = tl.exp2(m_past - b_base)
    b_sum = w_past * b_fade + tl.sum(tl.exp2(b_x - b_base[:, None]), 1)
    b_share = tl.load(gamma + o_q, mask=m_t, other=0.0) * (b_fade / b_sum)
    return tl.where(((length > 0) | (o_t > 0))[:, None], b_past * b_share[:, None], 0.0)


@triton.jit
def _finite(b_x, fine):
    """b_x with 0 for what is no finite number, and `fine` without those places."""
    its = tl.abs(b_x) < float("inf")
    return tl.where(its, b_x, 0.0), fine & its


@triton.jit
def _sound(fine, o_t):
    """Which of rows o_t lie before the first that is not all fine, as a column."""
    b_bad = tl.max(tl.where(fine, 0, 1), 1)
    return (o_t < tl.min(tl.where(b_bad > 0, o_t, ROWS), 0))[:, None]


@triton.jit
def invert(stat, scores, gamma, inverse, length, i_b, tokens, splits, rows, BLOCK_S: tl.constexpr, BOUNDED: tl.constexpr = False):
    """inverse (B,ROWS,ROWS) = (I - gamma alpha)^-1 of the new rows of sequence i_b; rows from T on are those of I.

    BOUNDED: |gamma| <= 1. Else products of several, of rows that a batch pads with, may pass float32, and must not reach a row before them.
    """
    o_t, o_s = tl.arange(0, ROWS), tl.arange(0, BLOCK_S)
    m_t = o_t < tokens
    o_part = (i_b * tokens + o_t)[:, None] * splits + o_s[None, :]
    m_part = m_t[:, None] & (o_s < splits_used(length, splits, rows))[None, :]
    b_max = tl.load(stat + o_part * 2, mask=m_part, other=float("-inf"))
    b_sum = tl.load(stat + o_part * 2 + 1, mask=m_part, other=0.0)
    m_x = m_t[:, None] & (o_t[None, :] < o_t[:, None])
    b_x = tl.load(scores + i_b * ROWS * ROWS + o_t[:, None] * ROWS + o_t[None, :], mask=m_x, other=float("-inf"))
    b_gamma = tl.load(gamma + i_b * tokens + o_t, mask=m_t, other=0.0)
    b_top = tl.maximum(tl.max(b_max, 1), tl.max(b_x, 1))
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)[:, None]
    b_x = tl.exp2(b_x - b_base)
    b_total = tl.sum(b_sum * tl.exp2(b_max - b_base), 1) + tl.sum(b_x, 1)
    b_a = tl.where(m_x, b_x * (b_gamma / b_total)[:, None], 0.0)
    # Of a row that is no number all later ones are none; for the others a zero weight would not stop it.
    fine = tl.abs(b_a) < float("inf")
    m_fine = _sound(fine, o_t)
    b_a = tl.where(m_fine, b_a, 0.0)
    # (I - a)^-1 = (I + a) (I + a^2) (I + a^4) (I + a^8), since a^ROWS = 0; of half as many rows the last is I
    b_i = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0) + b_a
    for i in tl.static_range(DOUBLINGS):
        if (i < DOUBLINGS - 1) | (tokens > ROWS // 2):
            b_a = tl.dot(b_a, b_a, input_precision="ieee")
            if not BOUNDED:
                b_a, fine = _finite(b_a, fine)
            b_i += tl.dot(b_a, b_i, input_precision="ieee")
            if not BOUNDED:
                b_i, fine = _finite(b_i, fine)
    if not BOUNDED:
        m_fine = _sound(fine, o_t)
    tl.store(inverse + i_b * ROWS * ROWS + o_t[:, None] * ROWS + o_t[None, :], tl.where(m_fine, b_i, float("nan")))


@triton.jit
def solved(b_inverse, b_y, o_t):
    """b_inverse (ROWS,ROWS) times b_y (ROWS,N), both float32. What is not finite goes to its own row and those behind it: a factor of zero does not stop it."""
    fine = tl.abs(b_y) < float("inf")
    b_first = tl.min(tl.where(fine, ROWS, o_t[:, None]), 0)
    b_s = tl.dot(b_inverse, tl.where(fine, b_y, 0.0), input_precision="ieee")
    return tl.where(o_t[:, None] < b_first[None, :], b_s, float("nan"))


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_rows_partial"))
def feedback_rows_partial(
    q, k, past_k, past_s, past_length, part, stat, scores,
    stride_kb: tl.int64, stride_kr, stride_sb: tl.int64, stride_sr, tokens, splits, capacity, width, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (1 + splits, B): see `piece`; scale = D^-1/2 * log2(e)."""
    begin(PDL)
    piece(
        tl.program_id(0), q, k, past_k, past_s, past_length, part, stat, scores, stride_kb, stride_kr, stride_sb, stride_sr,
        tl.program_id(1).to(tl.int64), tokens, splits, capacity, width, scale, BLOCK_R, BLOCK_C, BLOCK_L, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_rows_combine"))
def feedback_rows_combine(
    part, stat, scores, past_length, gamma, add, inverse, tokens, capacity, splits, rows, width,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (1 + ceil(T / BLOCK_N) ceil(D / BLOCK_D), B): add (B,T,D) and inverse (B,ROWS,ROWS), both float32; see `added` and `invert`."""
    begin(PDL)
    i_b = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    program, parts = tl.program_id(0) - 1, tl.cdiv(width, BLOCK_D)
    if program < 0:
        invert(stat, scores, gamma, inverse, length, i_b, tokens, splits, rows, BLOCK_S)
    else:
        o_t, o_d = program // parts * BLOCK_N + tl.arange(0, BLOCK_N), program % parts * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        b_add = added(part, stat, scores, gamma, length, i_b, o_t, tokens, splits, rows, width, o_d, m_d, BLOCK_S)
        tl.store(add + (i_b * tokens + o_t)[:, None] * width + o_d[None, :], b_add, mask=(o_t < tokens)[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_rows_finish"))
def feedback_rows_finish(f, add, inverse, out, tokens, width, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (ceil(D / BLOCK_D), B): s (B,T,D) = inverse times (f + add)."""
    begin(PDL)
    i_b = tl.program_id(1).to(tl.int64)
    o_t, o_d = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_y = (i_b * tokens + o_t)[:, None] * width + o_d[None, :]
    m_y = (o_t < tokens)[:, None] & (o_d < width)[None, :]
    b_f, b_add = tl.load(f + o_y, mask=m_y, other=0.0), tl.load(add + o_y, mask=m_y, other=0.0)
    b_inverse = tl.load(inverse + i_b * ROWS * ROWS + o_t[:, None] * ROWS + o_t[None, :])
    tl.store(out + o_y, solved(b_inverse, b_f.to(tl.float32) + b_add, o_t).to(b_f.dtype), mask=m_y)


def step(
    q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor, early: int = 0, tiles: Options | None = None
) -> Tensor:
    """A step of 2 <= T <= 16 new rows of feedback attention (arXiv 2604.18580, section 3) on a GPU: s (B,T,D).

    q, k, f: (B,T,D) float16 or bfloat16, D a multiple of 16 up to 2048. gamma: (B,T) float32. past_k, past_s: (B,P,D) in the storage dtype, P >= 1; views
    with any batch and row stride that is a multiple of 16 are read in place. past_length: (B,) int32. early: see `jit.pinned`; tiles: kernel -> launch
    options in place of the pinned ones. Raises ValueError on any other T or a wider D.
    """
    batch, tokens, width = q.shape
    if not 2 <= tokens <= STEP_ROWS:
        raise ValueError(f"sessa: a step of several rows takes T = 2 to {STEP_ROWS}, got {tuple(q.shape)}")
    capacity, device, dtype = past_k.shape[1], q.device, q.dtype
    options = tiles or {**pinned(("feedback_rows_partial",), device, dtype, table.width_variant("feedback_rows_partial", width), early),
                        **pinned(("feedback_rows_combine",), device, torch.float32, "any", early),
                        **pinned(("feedback_rows_finish",), device, dtype, "any", early)}  # fmt: skip
    partial, combine, finish = (options[f"feedback_rows_{name}"] for name in ("partial", "combine", "finish"))
    rows, f32, square = partial["BLOCK_R"], torch.float32, STEP_ROWS * STEP_ROWS
    splits = step_splits(capacity, rows, combine["BLOCK_S"])
    q, k, f, gamma, past_length = aligned(q), aligned(k), aligned(f), gamma.contiguous(), past_length.to(torch.int32).contiguous()
    past_k, past_s = near(_in_place(past_k)), near(_in_place(past_s))
    at, _memory = workspace(device, {
        "part": (batch * tokens * splits * width, f32), "stat": (2 * batch * tokens * splits, f32), "scores": (batch * square, f32),
        "add": (batch * tokens * width, f32), "inverse": (batch * square, f32),
    })  # fmt: skip
    out, parts = torch.empty_like(f), [at[name] for name in ("part", "stat", "scores")]
    launcher(feedback_rows_partial, device, dtype, partial)(
        (1 + splits, batch), *map(address, (q, k, past_k, past_s, past_length)), *parts,
        past_k.stride(0), past_k.stride(1), past_s.stride(0), past_s.stride(1), tokens, splits, capacity, width, width**-0.5 * LOG2E,
    )  # fmt: skip
    launcher(feedback_rows_combine, device, f32, combine)(
        (1 + triton.cdiv(tokens, combine["BLOCK_N"]) * triton.cdiv(width, combine["BLOCK_D"]), batch),
        *parts, address(past_length), address(gamma), at["add"], at["inverse"], tokens, capacity, splits, rows, width,
    )  # fmt: skip
    launcher(feedback_rows_finish, device, dtype, finish)(
        (triton.cdiv(width, finish["BLOCK_D"]), batch), address(f), at["add"], at["inverse"], address(out), tokens, width
    )
    return out

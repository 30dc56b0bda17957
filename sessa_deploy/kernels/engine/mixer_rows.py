"""A step of 2 to ROWS new rows of a whole mixer: causal attention, its output projection and feedback attention, in three kernels as for one row (mixer.py).

`mixer_rows_partial` gives some of its programs to causal attention and the others to feedback attention (causal/step_rows.py, feedback/step_rows.py),
`mixer_rows_combine` adds the splits of both and inverts the routing among the new rows, `mixer_rows_out` projects o to f and solves for s while it has the rows
of a sequence in one tile: s = (I - gamma alpha)^-1 (f + gamma * the past's sum), which needs f at its end only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.contract import STEP_ROWS
from sessa_deploy.kernels.causal.step_rows import combined
from sessa_deploy.kernels.causal.step_rows import piece as piece_causal
from sessa_deploy.kernels.device import begin
from sessa_deploy.kernels.device_rows import ROWS
from sessa_deploy.kernels.engine.layer_rows import chosen
from sessa_deploy.kernels.engine.product import ahead, bias_of, product, scale_of, scaled, sixteen, with_bias
from sessa_deploy.kernels.engine.spec import mixer_rows_variants, rows_combines, rows_early
from sessa_deploy.kernels.feedback.step_rows import added, invert, solved
from sessa_deploy.kernels.feedback.step_rows import piece as piece_feedback
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, available, launcher, pinned, weights_name, workspace
from sessa_deploy.kernels.launch.limits import HEAD_MULTIPLE, LOG2E, ROWS_WIDTHS
from sessa_deploy.kernels.launch.splits import step_splits

LATE_QUERIES = tl.constexpr(ROWS_WIDTHS[0] * STEP_ROWS)  # elements of queries up to which the pasts' first tiles are asked for before the wait; registers


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_rows_partial"))
def mixer_rows_partial(
    q, k, v, past_k, past_v, q_b, k_b, past_kb, past_s, past_length, part_f, stat_f, part_b, stat_b, scores,
    tokens, splits_f, splits_b, capacity, heads, group, units, width, scale_f, scale_b, programs_f,
    ROWS_F: tl.constexpr, HEADS_F: tl.constexpr, LANES_F: tl.constexpr, STAGES_F: tl.constexpr,
    ROWS_B: tl.constexpr, CHUNKS_B: tl.constexpr, LANES_B: tl.constexpr, STAGES_B: tl.constexpr, QUERIES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (programs_f + 1 + splits_b, B). Pasts are dense: past_k, past_v (B,P,Hkv,d), past_kb, past_s (B,P,D).

    The first programs_f = (1 + splits_f) * ceil(Hq / HEADS_F) compute causal attention's pieces, the others feedback attention's; *_F of causal attention,
    *_B of feedback attention, as in their `piece`.

    An early start is for the stream's next kernel behind `layer_project_gain`, as that of `mixer_step_partial`.
    """
    LATE: tl.constexpr = PDL and CHUNKS_B * LANES_B * QUERIES <= LATE_QUERIES
    if not LATE:
        begin(PDL)
    program = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    if program < programs_f:
        row = heads * units
        piece_causal(
            program, q, k, v, past_k, past_v, past_length, part_f, stat_f, capacity.to(tl.int64) * row, row, capacity.to(tl.int64) * row, row,
            i_b, tokens, splits_f, capacity, heads, group, units, scale_f, ROWS_F, HEADS_F, LANES_F, STAGES_F, LATE, QUERIES,
        )  # fmt: skip
    else:
        piece_feedback(
            program - programs_f, q_b, k_b, past_kb, past_s, past_length, part_b, stat_b, scores, capacity.to(tl.int64) * width, width,
            capacity.to(tl.int64) * width, width, i_b, tokens, splits_b, capacity, width, scale_b, ROWS_B, CHUNKS_B, LANES_B, STAGES_B, LATE, QUERIES,
        )  # fmt: skip
    begin(LATE)  # of a program that had nothing to do


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_rows_combine"))
def mixer_rows_combine(
    part_f, stat_f, part_b, stat_b, scores, past_length, gamma, o, add, inverse,
    tokens, capacity, splits_f, rows_f, splits_b, rows_b, heads, units, width,
    BLOCK_F: tl.constexpr, BLOCK_B: tl.constexpr, MOST_F: tl.constexpr, MOST_B: tl.constexpr,
    NF: tl.constexpr, NB: tl.constexpr, DF: tl.constexpr, DB: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (1 + ceil(T Hq / NF) ceil(d / DF) + ceil(T / NB) ceil(D / DB), B): o (B,T,Hq,d), add (B,T,D) float32 = gamma times the past's
    part of feedback attention's sum, and inverse (B,ROWS,ROWS) float32.

    heads = Hq. A program adds up NF rows of heads or NB rows. rows_f, rows_b: what a split takes at least; BLOCK_F, BLOCK_B cover every split,
    of which there are at most MOST_F and MOST_B.
    """
    tl.static_assert((MOST_F <= BLOCK_F) & (MOST_B <= BLOCK_B))
    i_b = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(past_length + i_b), capacity)  # written before the kernel ahead began: it waits itself before it lets this one in
    begin(PDL)
    head = units * 8
    parts_f, parts_b = tl.cdiv(head, DF), tl.cdiv(width, DB)
    program, programs_f = tl.program_id(0) - 1, tl.cdiv(tokens * heads, NF) * tl.cdiv(head, DF)
    if program < 0:
        invert(stat_b, scores, gamma, inverse, length, i_b, tokens, splits_b, rows_b, BLOCK_B, BOUNDED=True)
    elif program < programs_f:
        o_q = program // parts_f * NF + tl.arange(0, NF)
        o_d = program % parts_f * DF + tl.arange(0, DF)
        m_q, m_d = o_q < tokens * heads, o_d < head
        o_q = i_b * tokens * heads + o_q
        b_o = combined(part_f, stat_f, length, o_q, m_q, splits_f, rows_f, head, o_d, m_d, BLOCK_F)
        tl.store(o + o_q[:, None] * head + o_d[None, :], b_o.to(o.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])
    else:
        program -= programs_f
        o_t = program // parts_b * NB + tl.arange(0, NB)
        o_d = program % parts_b * DB + tl.arange(0, DB)
        m_d = o_d < width
        b_add = added(part_b, stat_b, scores, gamma, length, i_b, o_t, tokens, splits_b, rows_b, width, o_d, m_d, BLOCK_B)
        tl.store(add + (i_b * tokens + o_t)[:, None] * width + o_d[None, :], b_add, mask=(o_t < tokens)[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_rows_out"))
def mixer_rows_out(
    x, weight, scale, bias, add, inverse, out, tokens, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(D / BN), B): out (B,T,D) = inverse (B,ROWS,ROWS) times ((x weight^T + bias), rounded, + add (B,T,D) float32). T <= BM, 8 or 16."""
    i_b, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BN
    o_t, o_n = tl.arange(0, ROWS), tl.arange(0, BN)
    m_t, m_n = o_t < tokens, o_n < depth - first
    column = first.to(tl.int64)
    b_w = ahead(weight + column * depth, m_n, depth, BM, BN, BK, KS, AHEAD)
    b_scale, b_bias = scale_of(scale, weight, column, m_n, BN), bias_of(bias + column, m_n, 1, BN)
    begin(PDL)
    o_y = (i_b * tokens + o_t)[:, None] * depth + (column + o_n)[None, :]
    m_y = m_t[:, None] & m_n[None, :]
    b_add = tl.load(add + o_y, mask=m_y, other=0.0)
    b_inverse = tl.load(inverse + i_b * ROWS * ROWS + o_t[:, None] * ROWS + o_t[None, :])
    p_x = x + i_b * tokens * depth
    b_y = product(p_x, p_x, weight + column * depth, b_w, tokens, tl.arange(0, BM) < tokens, m_n, depth, depth, depth, False, BM, BN, BK, KS, AHEAD, FORM)
    if BM == 8:
        b_y = sixteen(tl.trans(b_y), tl.zeros([BN, 8], dtype=tl.float32), BN)
    b_f = with_bias(scaled(b_y, b_scale, scale, weight, column, m_n, ROWS, BN), b_bias, bias + column, m_n, 1, BN).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + o_y, solved(b_inverse, b_f + b_add, o_t).to(out.dtype.element_ty), mask=m_y)


def step(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, weight: Tensor, bias: Tensor, q_b: Tensor, k_b: Tensor, gamma: Tensor, past_kb: Tensor,
    past_s: Tensor, past_length: Tensor, early: int = 0, tiles: dict[str, dict[str, Any]] | None = None, scale: Tensor | None = None,
    behind: bool = False,
) -> Tensor:
    """s (B,T,D) of 2 <= T <= 16 new tokens a sequence, from PyTorch: for tests and timings.

    q (B,T,Hq,d), k, v (B,T,Hkv,d), past_k, past_v (B,P,Hkv,d), P >= 1, weight (D,D) and bias (D,) of the output projection, q_b, k_b (B,T,D), gamma (B,T)
    float32, past_kb, past_s (B,P,D), past_length (B,) int32; all dense. early: see `jit.pinned`. tiles: kernel -> launch options in place of the pinned ones.
    scale (D,) float32: of a weight of 8 bits. behind: as in `mixer.step`; of no use where `rows_early` says no.
    """  # fmt: skip
    batch, tokens, q_heads, head = q.shape
    heads, capacity, width, device, dtype = k.shape[2], past_k.shape[1], q_b.shape[2], q.device, q.dtype
    group, units, weights = q_heads // heads, head // HEAD_MULTIPLE, weights_name(weight.dtype)
    variant, adds = (
        next(v for v in variants if available(name, device, dtype, v))
        for name, variants in (("mixer_rows_partial", mixer_rows_variants(tokens, width, head)), ("mixer_rows_combine", rows_combines(width)))
    )
    options = {
        **pinned(("mixer_rows_partial",), device, dtype, variant, early if behind and rows_early(tokens, width) else 0),
        **pinned(("mixer_rows_combine",), device, dtype, adds, early),
        **pinned(("mixer_rows_out",), device, dtype, chosen("mixer_rows_out", "any", weights, width, q, tokens), early, weights), **(tiles or {}),
    }  # fmt: skip
    partial, combine, out = (options[f"mixer_rows_{name}"] for name in ("partial", "combine", "out"))
    rows_f, rows_b, f32, square = partial["ROWS_F"], partial["ROWS_B"], torch.float32, STEP_ROWS * STEP_ROWS
    splits_f, splits_b = step_splits(capacity, rows_f, combine["MOST_F"]), step_splits(capacity, rows_b, combine["MOST_B"])
    programs_f, n_f = (1 + splits_f) * triton.cdiv(q_heads, partial["HEADS_F"]), 1 + splits_f
    at, _memory = workspace(device, {
        "part_f": (batch * tokens * q_heads * n_f * head, f32), "stat_f": (2 * batch * tokens * q_heads * n_f, f32),
        "part_b": (batch * tokens * splits_b * width, f32), "stat_b": (2 * batch * tokens * splits_b, f32), "scores": (batch * square, f32),
        "o": (batch * tokens * width, dtype), "add": (batch * tokens * width, f32), "inverse": (batch * square, f32),
    })  # fmt: skip
    s = torch.empty(batch, tokens, width, dtype=dtype, device=device)
    parts = [at[name] for name in ("part_f", "stat_f", "part_b", "stat_b", "scores")]
    launcher(mixer_rows_partial, device, dtype, partial)(
        (programs_f + 1 + splits_b, batch), *map(address, (q, k, v, past_k, past_v, q_b, k_b, past_kb, past_s, past_length)), *parts,
        tokens, splits_f, splits_b, capacity, heads, group, units, width, head**-0.5 * LOG2E, width**-0.5 * LOG2E, programs_f,
    )  # fmt: skip
    programs = triton.cdiv(tokens * q_heads, combine["NF"]) * triton.cdiv(head, combine["DF"])
    programs += triton.cdiv(tokens, combine["NB"]) * triton.cdiv(width, combine["DB"])
    launcher(mixer_rows_combine, device, dtype, combine)(
        (1 + programs, batch), *parts, address(past_length), address(gamma), at["o"], at["add"], at["inverse"],
        tokens, capacity, splits_f, rows_f, splits_b, rows_b, q_heads, units, width,
    )  # fmt: skip
    launcher(mixer_rows_out, device, dtype, out, weights)(
        (triton.cdiv(width, out["BN"]), batch), at["o"], address(weight), address(weight if scale is None else scale), address(bias),
        at["add"], at["inverse"], address(s), tokens, width,
    )  # fmt: skip
    return s

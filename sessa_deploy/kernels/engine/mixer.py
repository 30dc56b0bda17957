"""Decode step of a whole mixer: causal attention, its output projection and feedback attention, in three kernels instead of five.

s = f + gamma * sum_j softmax_j(q_b . k_b,j) s_j needs f = W_o o only at its end, so that both attentions read their pasts at the same time:
`mixer_step_partial` gives some of its programs to the splits of causal attention and the others to those of feedback attention, `mixer_step_combine` adds the
splits of both, and the output projection adds gamma times the sum on its way (`layer.layer_out`). Who reads what, and in which order it is added, is as in
causal/step.py and feedback/step.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.causal.step import share as share_causal
from sessa_deploy.kernels.device import add_splits, begin, splits_used
from sessa_deploy.kernels.engine.layer import out_add
from sessa_deploy.kernels.engine.mixer_batch import UNIT_B, UNIT_F, mixer_batch_combine, tasks, variant_for
from sessa_deploy.kernels.engine.spec import WIDE_ROW, combine_variant, step_variants
from sessa_deploy.kernels.feedback.step import share as share_feedback
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, available, launcher, pinned, workspace
from sessa_deploy.kernels.launch.limits import HEAD_MULTIPLE, LOG2E, MIXER_BROAD, MIXER_MANY_B, MIXER_MANY_F, MIXER_MOST_B, MIXER_SHORT
from sessa_deploy.kernels.launch.splits import least_rows, shares, step_splits

BROAD, SHORT, MANY_F, MANY_B = tl.constexpr(MIXER_BROAD), tl.constexpr(MIXER_SHORT), tl.constexpr(MIXER_MANY_F), tl.constexpr(MIXER_MANY_B)


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_step_partial"))
def mixer_step_partial(
    q, k, v, past_k, past_v, q_b, past_kb, past_s, past_length, part_f, stat_f, part_b, stat_b,
    batch, splits_f, splits_b, capacity, heads, group, units, width, scale_f, scale_b, programs_f,
    ROWS_F: tl.constexpr, HEADS_F: tl.constexpr, GROUP_F: tl.constexpr, LANES_F: tl.constexpr, STAGES_F: tl.constexpr, TILES_F: tl.constexpr,
    ROWS_B: tl.constexpr, CHUNKS_B: tl.constexpr, LANES_B: tl.constexpr, STAGES_B: tl.constexpr, TILES_B: tl.constexpr, OWN_B: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (programs_f + those of feedback attention,). Pasts are dense: past_k, past_v (B,P,Hkv,d), past_kb, past_s (B,P,D).

    The first programs_f, a multiple of the blocks of heads, compute what `causal_step_partial` does, the others what `feedback_step_partial` does; tiles and
    parameters are those kernels', *_F of causal attention, *_B of feedback attention; how many rows a split takes at least: `splits.least_rows`.

    An early start is for the stream's next kernel behind `layer_project_gain`: the pasts and past_length are read before the wait, which no kernel of a layer
    writes; what did write them, a step's first kernels (`layer_rotary` among them) have waited for before any of a layer begins.
    """
    program = tl.program_id(0)
    broad = (width > BROAD) & (capacity <= SHORT)
    if program < programs_f:
        blocks = tl.cdiv(heads, HEADS_F) * tl.cdiv(group, GROUP_F)
        row = heads * units
        share_causal(
            program // blocks, programs_f // blocks, program % blocks, q, k, v, past_k, past_v, past_length, part_f, stat_f, capacity.to(tl.int64) * row, row,
            capacity.to(tl.int64) * row, row, batch, splits_f, capacity, heads, group, units, scale_f, ROWS_F, HEADS_F, GROUP_F, LANES_F, STAGES_F, TILES_F,
            tl.where(broad, MANY_F, 1), PDL, UNIT_F,
        )  # fmt: skip
    else:
        share_feedback(
            program - programs_f, tl.num_programs(0) - programs_f, q_b, past_kb, past_s, past_length, part_b, stat_b, capacity.to(tl.int64) * width, width,
            capacity.to(tl.int64) * width, width, batch, splits_b, capacity, width, scale_b, ROWS_B, CHUNKS_B, LANES_B, STAGES_B, TILES_B, OWN_B,
            tl.where(broad, MANY_B, 1), PDL, UNIT_B,
        )  # fmt: skip
    begin(PDL)  # of a program that had nothing to do


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_step_combine"))
def mixer_step_combine(
    part_f, stat_f, part_b, stat_b, past_length, gamma, o, add, capacity, splits_f, rows_f, splits_b, rows_b, heads, units, width,
    BLOCK_F: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (Hq * ceil(d / BLOCK_D) + ceil(D / BLOCK_D), B): o (B,Hq,d), and add (B,D) float32 = gamma times feedback attention's sum, 0 without a past.

    heads = Hq. rows_f, rows_b: what a split takes at least. BLOCK_F, BLOCK_B cover every split; CHUNK: see `add_splits`.

    Before it waits it reads past_length, which no kernel of a layer writes.
    """
    i_b = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    begin(PDL)
    head = units * 8
    parts = tl.cdiv(head, BLOCK_D)
    program = tl.program_id(0)
    if program < heads * parts:
        i_q = i_b * heads + program // parts
        o_d = (program % parts) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < head
        used = tl.maximum(splits_used(length, splits_f, rows_f, UNIT_F), 1)
        b_o = add_splits(part_f, stat_f, i_q * splits_f, used, head, o_d, m_d, BLOCK_F, BLOCK_D, CHUNK)
        tl.store(o + i_q * head + o_d, b_o.to(o.dtype.element_ty), mask=m_d)
    else:
        o_d = (program - heads * parts) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        b_gamma = tl.load(gamma + i_b)
        used = splits_used(length, splits_b, rows_b, UNIT_B)
        b_add = b_gamma * add_splits(part_b, stat_b, i_b * splits_b, used, width, o_d, m_d, BLOCK_B, BLOCK_D, CHUNK)
        tl.store(add + i_b * width + o_d, tl.where(length > 0, b_add, 0.0), mask=m_d)


def step(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, weight: Tensor, bias: Tensor, q_b: Tensor, gamma: Tensor, past_kb: Tensor,
    past_s: Tensor, past_length: Tensor, early: int = 0, scale: Tensor | None = None, behind: bool = False,
) -> Tensor:
    """s (B,D) of one new token a sequence, from PyTorch: for tests and timings.

    q (B,Hq,d), k, v (B,Hkv,d), past_k, past_v (B,P,Hkv,d), weight (D,D) and bias (D,) of the output projection, q_b (B,D), gamma (B,) float32, past_kb,
    past_s (B,P,D), past_length (B,) int32; all dense. early: see `jit.pinned`.
    scale (D,) float32: of a weight of 8 bits. behind: `layer.project_gain` is what the stream runs right before, and its end needs no waiting for where the
    pasts are read.
    """  # fmt: skip
    batch, q_heads, head = q.shape
    heads, capacity, width, device, dtype = k.shape[1], past_k.shape[1], q_b.shape[1], q.device, q.dtype
    group, units = q_heads // heads, head // HEAD_MULTIPLE
    variant = next(v for v in step_variants(batch, width, head, group) if available("mixer_step_partial", device, dtype, v))
    partial = pinned(("mixer_step_partial",), device, dtype, variant, early if behind else 0)["mixer_step_partial"]
    broad = width > MIXER_BROAD and available("mixer_step_combine", device, dtype, WIDE_ROW)
    adds = WIDE_ROW if broad and batch == 1 else combine_variant(batch, width)
    combine = pinned(("mixer_step_combine",), device, dtype, adds, early)["mixer_step_combine"]
    rows_f, rows_b = least_rows(partial["ROWS_F"] * partial["TILES_F"], partial["ROWS_B"] * partial["TILES_B"], capacity, width)
    splits_f = step_splits(capacity, rows_f, combine["BLOCK_F"])
    splits_b = step_splits(capacity, rows_b, MIXER_MOST_B if broad else combine["BLOCK_B"])
    blocks = triton.cdiv(heads, partial["HEADS_F"]) * triton.cdiv(group, partial["GROUP_F"])
    run = launcher(mixer_step_partial, device, dtype, partial)
    programs_f, programs_b = shares(batch * splits_f, blocks, batch * splits_b, heads * head, width, run.resident)
    f32 = torch.float32
    at, _memory = workspace(device, {
        "part_f": (batch * q_heads * splits_f * head, f32), "stat_f": (2 * batch * q_heads * splits_f, f32), "part_b": (batch * splits_b * width, f32),
        "stat_b": (2 * batch * splits_b, f32),
    })  # fmt: skip
    o, add = torch.empty(batch, width, dtype=dtype, device=device), torch.empty(batch, width, dtype=f32, device=device)
    parts = [at[name] for name in ("part_f", "stat_f", "part_b", "stat_b")]
    run(
        (programs_f + programs_b,), *map(address, (q, k, v, past_k, past_v, q_b, past_kb, past_s, past_length)), *parts,
        batch, splits_f, splits_b, capacity, heads, group, units, width, head**-0.5 * LOG2E, width**-0.5 * LOG2E, programs_f,
    )  # fmt: skip
    operands, sizes = (*parts, *map(address, (past_length, gamma, o, add))), (capacity, splits_f, rows_f, splits_b, rows_b, q_heads, units, width)
    if shared := variant_for(q, width):
        tiles = pinned(("mixer_batch_combine",), device, dtype, shared, early)["mixer_batch_combine"]
        run = launcher(mixer_batch_combine, device, dtype, tiles)
        run((min(batch * tasks(q_heads, head, width, tiles), run.resident),), *operands, batch, *sizes)
    else:
        grid = (q_heads * triton.cdiv(head, combine["BLOCK_D"]) + triton.cdiv(width, combine["BLOCK_D"]), batch)
        launcher(mixer_step_combine, device, dtype, combine)(grid, *operands, *sizes)
    return out_add(o, weight, bias, add, early, scale)

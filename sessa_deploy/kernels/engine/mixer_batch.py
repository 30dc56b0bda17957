"""The combination of a mixer's step (mixer.py) of several sequences, most of which may be short in a large cache.

A sequence of few splits is few programs of many columns, one of many splits many programs of few: each program costs its beginning, and the longest
sequence decides when the last one ends. Which programs take what follows from the lengths, and changes no bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.device import _SEQUENCES, _sum, add_splits, begin, splits_used
from sessa_deploy.kernels.engine.spec import batch_variant
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import available
from sessa_deploy.kernels.launch.limits import MIXER_UNIT_B, MIXER_UNIT_F

UNIT_F, UNIT_B = tl.constexpr(MIXER_UNIT_F), tl.constexpr(MIXER_UNIT_B)


@triton.jit
def _tasks(past_length, start, batch, capacity, splits_f, rows_f, splits_b, rows_b, short, long, FEW_F: tl.constexpr, FEW_B: tl.constexpr):
    """(for each of _SEQUENCES sequences from `start` on how many tasks of these come before its own, how many it has: `short` or `long`). Long ones first."""
    o_b = start + tl.arange(0, _SEQUENCES)
    b_length = tl.minimum(tl.load(past_length + o_b, mask=o_b < batch, other=0), capacity)
    b_many = (splits_used(b_length, splits_f, rows_f, UNIT_F) > FEW_F) | (splits_used(b_length, splits_b, rows_b, UNIT_B) > FEW_B)
    b_n = tl.where(o_b < batch, tl.where(b_many, long, short), 0)
    b_long = tl.where(b_many, b_n, 0)
    b_first = tl.where(b_many, tl.cumsum(b_long, 0), tl.sum(b_long, 0) + tl.cumsum(b_n - b_long, 0)) - b_n
    return b_first, b_n


@triton.jit
def _heads(part, stat, o, i_b, i_h, splits, used, heads, head, FEW: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr):
    """HEADS heads of o from i_h on: `_sum` of each."""
    o_s, o_h, o_l = tl.arange(0, FEW), i_h + tl.arange(0, HEADS), tl.arange(0, LANES)
    m_h, m_l = o_h < heads, o_l < head
    m_s = (o_s < used)[:, None] & m_h[None, :]
    o_part = (i_b * heads + o_h)[None, :] * splits + o_s[:, None]
    b_part = tl.load(part + o_part[:, :, None] * head + o_l[None, None, :], mask=m_s[:, :, None] & m_l[None, None, :], other=0.0)
    b_max = tl.load(stat + o_part * 2, mask=m_s, other=float("-inf"))
    b_sum = tl.load(stat + o_part * 2 + 1, mask=m_s, other=0.0)
    b_w = tl.where(m_s, tl.exp2(b_max - tl.max(b_max, 0)[None, :]), 0.0)
    b_o = tl.sum(b_part * b_w[:, :, None], 0) / tl.sum(b_w * b_sum, 0)[:, None]
    tl.store(o + (i_b * heads + o_h)[:, None] * head + o_l[None, :], b_o.to(o.dtype.element_ty), mask=m_h[:, None] & m_l[None, :])


@triton.jit
def _columns(part, stat, add, i_b, b_gamma, o_d, splits, used, width, FEW: tl.constexpr):
    """Columns o_d of add."""
    m_d = o_d < width
    b_add = b_gamma * _sum(part, stat, i_b * splits, used, width, o_d, m_d, FEW)
    tl.store(add + i_b * width + o_d, tl.where(used > 0, b_add, 0.0), mask=m_d)


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_batch_combine"))
def mixer_batch_combine(
    part_f, stat_f, part_b, stat_b, past_length, gamma, o, add, batch, capacity, splits_f, rows_f, splits_b, rows_b, heads, units, width,
    BLOCK_F: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (programs,), which share the tasks of the batch: what `mixer_step_combine` computes, whose parameters these are.

    A sequence of more splits than an eighth of BLOCK_F or BLOCK_B has tasks of BLOCK_D columns, any other of HEADS heads, LANES >= d, and of SPAN columns of D.

    An early start is behind `mixer_step_partial`, which writes neither lengths nor gamma; who wrote them has ended where it lets this kernel in. Gamma, which
    every layer writes anew, is read past the caches that a kernel's own start clears.
    """
    FEW_F: tl.constexpr = BLOCK_F // 8
    FEW_B: tl.constexpr = BLOCK_B // 8
    program = tl.program_id(0)
    head = units * 8
    short_f, parts = tl.cdiv(heads, HEADS), tl.cdiv(head, BLOCK_D)
    short, long = short_f + tl.cdiv(width, SPAN), heads * parts + tl.cdiv(width, BLOCK_D)
    b_first, b_n = _tasks(past_length, 0, batch, capacity, splits_f, rows_f, splits_b, rows_b, short, long, FEW_F, FEW_B)
    head_tasks = tl.sum(b_n, 0)
    total = head_tasks
    for start in range(_SEQUENCES, batch, _SEQUENCES):
        _, b_more = _tasks(past_length, start, batch, capacity, splits_f, rows_f, splits_b, rows_b, short, long, FEW_F, FEW_B)
        total += tl.sum(b_more, 0)
    for task in tl.range(program, total, tl.num_programs(0), num_stages=1):
        its = (b_first <= task) & (task < b_first + b_n)
        i_b = tl.sum(tl.where(its, tl.arange(0, _SEQUENCES), 0), 0)
        i = task - tl.sum(tl.where(its, b_first, 0), 0)
        before = head_tasks
        start = _SEQUENCES  # on a line of its own: see device.locate
        while (start < batch) & (before <= task):
            b_begun, b_more = _tasks(past_length, start, batch, capacity, splits_f, rows_f, splits_b, rows_b, short, long, FEW_F, FEW_B)
            its = (before + b_begun <= task) & (task < before + b_begun + b_more)
            i_b = tl.sum(tl.where(its, start + tl.arange(0, _SEQUENCES), 0), 0)
            i = task - tl.sum(tl.where(its, before + b_begun, 0), 0)
            before += tl.sum(b_more, 0)
            start += _SEQUENCES
        length = tl.minimum(tl.load(past_length + i_b), capacity)
        i_b = i_b.to(tl.int64)
        used_f, used_b = splits_used(length, splits_f, rows_f, UNIT_F), splits_used(length, splits_b, rows_b, UNIT_B)
        b_gamma = tl.load(gamma + i_b, cache_modifier=".cg")
        begin(PDL)
        if (used_f > FEW_F) | (used_b > FEW_B):
            if i < heads * parts:
                i_q = i_b * heads + i // parts
                o_d = (i % parts) * BLOCK_D + tl.arange(0, BLOCK_D)
                m_d = o_d < head
                b_o = add_splits(part_f, stat_f, i_q * splits_f, tl.maximum(used_f, 1), head, o_d, m_d, BLOCK_F, BLOCK_D, CHUNK)
                tl.store(o + i_q * head + o_d, b_o.to(o.dtype.element_ty), mask=m_d)
            else:
                o_d = (i - heads * parts) * BLOCK_D + tl.arange(0, BLOCK_D)
                m_d = o_d < width
                b_add = b_gamma * add_splits(part_b, stat_b, i_b * splits_b, used_b, width, o_d, m_d, BLOCK_B, BLOCK_D, CHUNK)
                tl.store(add + i_b * width + o_d, b_add, mask=m_d)
        elif i < short_f:
            _heads(part_f, stat_f, o, i_b, i * HEADS, splits_f, tl.maximum(used_f, 1), heads, head, FEW_F, HEADS, LANES)
        else:
            _columns(part_b, stat_b, add, i_b, b_gamma, (i - short_f) * SPAN + tl.arange(0, SPAN), splits_b, used_b, width, FEW_B)
    begin(PDL)  # of a program that had nothing to do


def variant_for(q: Tensor, width: int) -> str:
    """The variant for queries q (B,Hq,d) of a step, "" where their device has this kernel not for them."""
    variant = batch_variant(q.shape[0], width, q.shape[2])
    return variant if variant and available("mixer_batch_combine", q.device, q.dtype, variant) else ""


def tasks(heads: int, head: int, width: int, tiles: dict[str, Any]) -> int:
    """The most that a sequence has."""
    few = triton.cdiv(heads, tiles["HEADS"]) + triton.cdiv(width, tiles["SPAN"])
    return max(few, heads * triton.cdiv(head, tiles["BLOCK_D"]) + triton.cdiv(width, tiles["BLOCK_D"]))

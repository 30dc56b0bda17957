"""The combination of a mixer's step (mixer.py) of several sequences, most of which may be short in a large cache.

A sequence of few splits is few programs of many columns, one of many splits many programs of few: each program costs its beginning, and the longest
sequence decides when the last one ends. Which programs take what follows from the lengths, and changes no bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.device import _SEQUENCES, begin, blend, is_long, lengths, neighbours, rows_each, weights
from sessa_deploy.kernels.engine.spec import batch_variant
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import available
from sessa_deploy.kernels.launch.limits import MIXER_JOIN, MIXER_UNIT_B, MIXER_UNIT_F

JOIN, UNIT_F, UNIT_B = tl.constexpr(MIXER_JOIN), tl.constexpr(MIXER_UNIT_F), tl.constexpr(MIXER_UNIT_B)


@triton.jit
def _tasks(b_length, start, batch, splits_f, rows_f, splits_b, rows_b, short, long, FEW_F: tl.constexpr, FEW_B: tl.constexpr):
    """(for each of _SEQUENCES sequences from `start` on, of b_length rows, how many tasks of these come before its own, how many it has: `short` or `long`).
    Long ones first."""
    o_b = start + tl.arange(0, _SEQUENCES)
    b_many = (b_length > FEW_F * rows_each(b_length, splits_f, rows_f, UNIT_F)) | (b_length > FEW_B * rows_each(b_length, splits_b, rows_b, UNIT_B))
    b_n = tl.where(o_b < batch, tl.where(b_many, long, short), 0)
    b_long = tl.where(b_many, b_n, 0)
    b_first = tl.where(b_many, tl.cumsum(b_long, 0), tl.sum(b_long, 0) + tl.cumsum(b_n - b_long, 0)) - b_n
    return b_first, b_n


@triton.jit
def _heads(part, stat, o, i_b, i_h, splits, found, apart, heads, head, PLACES: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr):
    """HEADS heads of o from i_h on, for a sequence of so few splits that each is of the shortest. found, apart: see `_found`."""
    o_s, o_h, o_l = tl.arange(0, PLACES), i_h + tl.arange(0, HEADS), tl.arange(0, LANES)
    m_h, m_l = o_h < heads, o_l < head
    o_base = ((i_b * heads + o_h) * splits)[None, :]
    b_max, b_sum = tl.full([PLACES, HEADS], float("-inf"), dtype=tl.float32), tl.zeros([PLACES, HEADS], dtype=tl.float32)
    b_part = tl.zeros([PLACES, HEADS, LANES], dtype=tl.float32)
    for j in tl.static_range(JOIN):
        o_part = (o_s * apart + j)[:, None]
        m_s = (o_part < found) & m_h[None, :] & (j < apart)
        o_part = o_base + o_part
        b_its = tl.load(part + o_part[:, :, None] * head + o_l[None, None, :], mask=m_s[:, :, None] & m_l[None, None, :], other=0.0)
        b_top, b_all = tl.load(stat + o_part * 2, mask=m_s, other=float("-inf")), tl.load(stat + o_part * 2 + 1, mask=m_s, other=0.0)
        b_max, b_fade, b_w = weights(b_max, b_top)
        b_sum, b_part = blend(b_sum, b_fade, b_all, b_w), blend(b_part, b_fade[:, :, None], b_its, b_w[:, :, None])
    b_w = tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - tl.max(b_max, 0)[None, :]))
    b_o = tl.sum(b_part * b_w[:, :, None], 0) / tl.sum(b_w * b_sum, 0)[:, None]
    tl.store(o + (i_b * heads + o_h)[:, None] * head + o_l[None, :], b_o.to(o.dtype.element_ty), mask=m_h[:, None] & m_l[None, :])


@triton.jit
def _split(part, stat, o_first, o_s, m_s, width, o_d, m_d):
    """(maximum, sum, weighted rows) of splits o_s, or of neighbours that one program took together."""
    o_part = o_first + o_s
    b_part = tl.load(part + o_part[:, None] * width + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
    return tl.load(stat + o_part * 2, mask=m_s, other=float("-inf")), tl.load(stat + o_part * 2 + 1, mask=m_s, other=0.0), b_part


@triton.jit
def _place(part, stat, o_first, o_s, found, apart, width, o_d, m_d, PLACES: tl.constexpr, COLUMNS: tl.constexpr):
    """(maximum, sum, weighted rows) of the neighbours in each of the places o_s, added one by one by the same operations (`blend`) as in one program.

    There are `found` sums of splits, `apart` of which are neighbours: 1 where they were taken together, whose sums this leaves as they are.
    """
    b_max, b_sum = tl.full([PLACES], float("-inf"), dtype=tl.float32), tl.zeros([PLACES], dtype=tl.float32)
    b_part = tl.zeros([PLACES, COLUMNS], dtype=tl.float32)
    for j in tl.static_range(JOIN):
        o_part = o_s * apart + j
        b_top, b_all, b_its = _split(part, stat, o_first, o_part, (o_part < found) & (j < apart), width, o_d, m_d)
        b_max, b_fade, b_w = weights(b_max, b_top)
        b_sum, b_part = blend(b_sum, b_fade, b_all, b_w), blend(b_part, b_fade[:, None], b_its, b_w[:, None])
    return b_max, b_sum, b_part


@triton.jit
def _few(part, stat, o_first, found, apart, width, o_d, m_d, PLACES: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns o_d of the softmax-weighted sum over splits of the shortest kind, PLACES * JOIN of them at most."""
    b_max, b_sum, b_part = _place(part, stat, o_first, tl.arange(0, PLACES), found, apart, width, o_d, m_d, PLACES, COLUMNS)
    b_w = tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - tl.max(b_max, 0)))
    return tl.sum(b_part * b_w[:, None], 0) / tl.sum(b_w * b_sum, 0)


@triton.jit
def _many(part, stat, o_first, found, apart, width, o_d, m_d, PLACES: tl.constexpr, COLUMNS: tl.constexpr):
    """The same over any number of splits, PLACES times as many at a time as are neighbours; each place has a maximum and sums of its own until the end."""
    b_max = tl.full([PLACES], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([PLACES], dtype=tl.float32)
    b_acc = tl.zeros([PLACES, COLUMNS], dtype=tl.float32)
    for start in tl.range(0, tl.cdiv(found, apart), PLACES, num_stages=1):
        b_top, b_its, b_part = _place(part, stat, o_first, start + tl.arange(0, PLACES), found, apart, width, o_d, m_d, PLACES, COLUMNS)
        b_max, b_fade, b_w = weights(b_max, b_top)
        b_sum, b_acc = b_sum * b_fade + b_its * b_w, b_acc * b_fade[:, None] + b_part * b_w[:, None]
    b_last = tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - tl.max(b_max, 0)))
    return tl.sum(b_acc * b_last[:, None], 0) / tl.sum(b_sum * b_last, 0)


@triton.jit
def _found(length, each, rows, together):
    """(sums of splits that a sequence has, how many of these are neighbours)."""
    count, used = neighbours(each, rows, JOIN), tl.cdiv(length, each)
    return tl.where(together, tl.cdiv(used, count), used), tl.where(together, 1, count)


@triton.jit(do_not_specialize=table.do_not_specialize("mixer_batch_combine"))
def mixer_batch_combine(
    part_f, stat_f, part_b, stat_b, past_length, gamma, o, add, batch, least, capacity, splits_f, rows_f, splits_b, rows_b, heads, units, width,
    FEW_F: tl.constexpr, FEW_B: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (programs,), which share the tasks of the batch: what `mixer_step_combine` computes, whose parameters these are.

    A sequence of more splits than FEW_F or FEW_B has tasks of BLOCK_D columns, any other of HEADS heads, LANES >= d, and of SPAN columns of D; with as few
    splits these are of the shortest kind. least: as for `mixer_step_partial`.

    An early start is behind `mixer_step_partial`, which does not write the lengths; who wrote them has ended where it lets this kernel in.
    """
    program = tl.program_id(0)
    head = units * 8
    short_f, parts = tl.cdiv(heads, HEADS), tl.cdiv(head, BLOCK_D)
    short, long = short_f + tl.cdiv(width, SPAN), heads * parts + tl.cdiv(width, BLOCK_D)
    b_length = lengths(past_length, 0, batch, capacity)
    b_first, b_n = _tasks(b_length, 0, batch, splits_f, rows_f, splits_b, rows_b, short, long, FEW_F, FEW_B)
    head_tasks = tl.sum(b_n, 0)
    total = head_tasks
    for start in range(_SEQUENCES, batch, _SEQUENCES):
        _, b_more = _tasks(lengths(past_length, start, batch, capacity), start, batch, splits_f, rows_f, splits_b, rows_b, short, long, FEW_F, FEW_B)
        total += tl.sum(b_more, 0)
    together = is_long(b_length, past_length, batch, capacity, least)
    for task in tl.range(program, total, tl.num_programs(0), num_stages=1):
        its = (b_first <= task) & (task < b_first + b_n)
        i_b = tl.sum(tl.where(its, tl.arange(0, _SEQUENCES), 0), 0)
        i = task - tl.sum(tl.where(its, b_first, 0), 0)
        before = head_tasks
        start = _SEQUENCES  # on a line of its own: see device.locate
        while (start < batch) & (before <= task):
            b_begun, b_more = _tasks(lengths(past_length, start, batch, capacity), start, batch, splits_f, rows_f, splits_b, rows_b, short, long, FEW_F, FEW_B)
            its = (before + b_begun <= task) & (task < before + b_begun + b_more)
            i_b = tl.sum(tl.where(its, start + tl.arange(0, _SEQUENCES), 0), 0)
            i = task - tl.sum(tl.where(its, before + b_begun, 0), 0)
            before += tl.sum(b_more, 0)
            start += _SEQUENCES
        length = tl.minimum(tl.load(past_length + i_b), capacity)
        i_b = i_b.to(tl.int64)
        each_f, each_b = rows_each(length, splits_f, rows_f, UNIT_F), rows_each(length, splits_b, rows_b, UNIT_B)
        few = (length <= FEW_F * each_f) & (length <= FEW_B * each_b)
        found_f, apart_f = _found(tl.maximum(length, 1), each_f, rows_f, together)  # without a past there is the new row
        found_b, apart_b = _found(length, each_b, rows_b, together)
        b_gamma = tl.load(gamma + i_b)
        begin(PDL)
        if not few:
            if i < heads * parts:
                part, stat, found, apart, across, i_q, i_part = part_f, stat_f, found_f, apart_f, head, i_b * heads + i // parts, i % parts
                o_first = i_q * splits_f
            else:
                part, stat, found, apart, across, i_q, i_part = part_b, stat_b, found_b, apart_b, width, i_b, i - heads * parts
                o_first = i_q * splits_b
            o_d = i_part * BLOCK_D + tl.arange(0, BLOCK_D)
            m_d = o_d < across
            b_x = _many(part, stat, o_first, found, apart, across, o_d, m_d, CHUNK, BLOCK_D)
            if i < heads * parts:
                tl.store(o + i_q * head + o_d, b_x.to(o.dtype.element_ty), mask=m_d)
            else:
                tl.store(add + i_q * width + o_d, b_gamma * b_x, mask=m_d)
        elif i < short_f:
            _heads(part_f, stat_f, o, i_b, i * HEADS, splits_f, found_f, apart_f, heads, head, FEW_F // JOIN, HEADS, LANES)
        else:
            o_d = (i - short_f) * SPAN + tl.arange(0, SPAN)
            m_d = o_d < width
            b_add = b_gamma * _few(part_b, stat_b, i_b * splits_b, found_b, apart_b, width, o_d, m_d, FEW_B // JOIN, SPAN)
            tl.store(add + i_b * width + o_d, tl.where(length > 0, b_add, 0.0), mask=m_d)
    begin(PDL)  # of a program that had nothing to do


def variant_for(q: Tensor, width: int) -> str:
    """The variant for queries q (B,Hq,d) of a step, "" where their device has this kernel not for them."""
    variant = batch_variant(q.shape[0], width, q.shape[2])
    return variant if variant and available("mixer_batch_combine", q.device, q.dtype, variant) else ""


def tasks(heads: int, head: int, width: int, tiles: dict[str, Any]) -> int:
    """The most that a sequence has."""
    few = triton.cdiv(heads, tiles["HEADS"]) + triton.cdiv(width, tiles["SPAN"])
    return max(few, heads * triton.cdiv(head, tiles["BLOCK_D"]) + triton.cdiv(width, tiles["BLOCK_D"]))

"""`feedback_scores` by tensor descriptors: the programs that a device holds walk over tiles of 128 x 256, the same bits.

A program's steps are those of all its tiles in one loop (engine/layer_many.py), so that the first columns of the next tile are on their way while this one's
weights are formed. A product of that size reads a quarter less than one of 128 x 128, and the L2 cache is what those wait for.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sessa_deploy.kernels.feedback.tiles import LOG2E, clear, finite
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import Launcher
from sessa_deploy.kernels.launch.limits import MANY_PROGRAMS, SCORE_COLUMNS

BLOCK = tl.constexpr(128)
WIDE = tl.constexpr(SCORE_COLUMNS)  # columns of a tile


@triton.jit
def _place(i, each, base):
    """(sequence, row tile, column tile) of the i-th of `each` tiles a sequence: row tiles go in pairs, of base + 1 tiles of columns, then one more each."""
    i_b, p = i // each, i % each
    w = 2.0 * base + 1.0
    pair = tl.maximum(((tl.sqrt(w * w + 4.0 * p.to(tl.float32)) - w) * 0.5).to(tl.int32), 0)
    if pair * (pair + 1) + 2 * base * pair > p:
        pair -= 1
    if (pair + 1) * (pair + 2) + 2 * base * (pair + 1) <= p:
        pair += 1
    inside = p - pair * (pair + 1) - 2 * base * pair
    return i_b, pair * 2 + inside % 2, inside // 2


def tiles_of(blocks: int, base: int) -> int:
    """How many tiles `_place` numbers for `blocks` row tiles."""
    pairs = -(-blocks // 2)
    return pairs * (pairs + 1) + 2 * base * pairs


@triton.jit
def _weights(
    acc, i_b, i_m, column, d_e, lse, bad, peak, total, T, R, NT, row0, scale, limit, before, BACKWARD: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """What `feedback_scores` makes of a tile (BLOCK,BLOCK) of products, with the columns of new rows or, PAST, of past ones, of which there are `limit`;
    `before` column tiles go before them. No branch ends early: the sums would no longer stay where the products left them."""
    first = row0 + i_m * BLOCK
    if PAST:
        live = (column < limit) & (first < T)
    else:
        live = (column < first + BLOCK) & (first < T)
    acc = acc * scale
    o_m, o_t = first + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    p_lse = lse + i_b.to(tl.int64) * T + o_m
    if BACKWARD:
        end = T - tl.load(bad + i_b)
        b_ref = tl.load(p_lse, mask=o_m < end, other=0.0)
        acc = acc - tl.where(finite(b_ref), b_ref, 0.0)[:, None]
        if (column + BLOCK > end) | (first + BLOCK > end) | (column + BLOCK > first):
            seen = (o_m < end)[:, None] & (o_t[None, :] < o_m[:, None]) & (o_t < end)[None, :]
            acc = tl.where(seen, acc, float("-inf"))
        b_e = (tl.exp2(acc * LOG2E) * 32768.0).to(tl.float16)
    else:
        if PAST:
            if (column + BLOCK > limit) | (first + BLOCK > T):
                acc = tl.where((o_t < limit)[None, :] & (o_m < T)[:, None], acc, float("-inf"))
        elif (column + BLOCK > T) | (first + BLOCK > T) | (column + BLOCK > first):
            b_own = tl.sum(tl.where(o_t[None, :] == o_m[:, None], acc, 0.0), axis=1)
            tl.store(p_lse, 0.0 * b_own, mask=(o_m < T) & (column == first))
            seen = (o_t < T)[None, :] & (o_m < T)[:, None] & (o_t[None, :] < o_m[:, None])
            acc = tl.where(seen, acc, float("-inf"))
        b_peak = tl.max(acc, axis=1)
        b_e = tl.exp2((acc - tl.where(b_peak == float("-inf"), 0.0, b_peak)[:, None]) * LOG2E).to(tl.float16)
    o_r = tl.arange(0, BLOCK)
    p_stat = (i_b.to(tl.int64) * NT + before + column // BLOCK) * R + i_m * BLOCK + o_r
    m_r = live & (o_r >= 0)
    if not BACKWARD:
        tl.store(peak + p_stat, b_peak, mask=m_r)
    tl.store(total + p_stat, tl.sum(b_e.to(tl.float32), axis=1), mask=m_r)
    # beyond the end of the matrix nothing is stored
    d_e.store([tl.where(live, i_b * R + i_m * BLOCK, 1 << 30), before * BLOCK + column], b_e)


@triton.jit
def _spot(i, i_b, each, base, PAST: tl.constexpr):
    """`_place`; PAST: of sequence i_b's past the i-th tile of `each` row tiles."""
    if PAST:
        i_m, i_t = i % each, i // each
    else:
        i_b, i_m, i_t = _place(i, each, base)
    return i_b, i_m, i_t


@triton.jit
def _walk(
    begin, count, i_b, each, base, d_q, d_k, d_e, lse, bad, peak, total, T, rows, D, R, NT, row0, scale, limit, before,
    BK: tl.constexpr, BACKWARD: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile (`_spot`) of `count` from `begin` on. d_k: of `rows` rows a sequence."""
    programs, steps = tl.num_programs(0), tl.cdiv(D, BK)
    i, done, i_k = begin - programs, begin - programs, steps - 1
    row_q, row_k = begin * 0, begin * 0
    acc = tl.zeros([BLOCK, WIDE], dtype=tl.float32)
    for _ in tl.range(0, tl.cdiv(count - begin, programs) * steps):
        i_k = tl.where(i_k == steps - 1, 0, i_k + 1)
        if i_k == 0:
            i += programs
            j_b, i_m, i_t = _spot(i, i_b, each, base, PAST)
            row_q, row_k = j_b * T + row0 + i_m * BLOCK, j_b * rows + i_t * WIDE
        acc = tl.dot(d_q.load([row_q, i_k * BK]), d_k.load([row_k, i_k * BK]).T, acc)
        if i_k == steps - 1:
            done += programs
            j_b, i_m, i_t = _spot(done, i_b, each, base, PAST)
            b_0, b_1 = tl.split(tl.permute(tl.reshape(acc, [BLOCK, 2, BLOCK]), [0, 2, 1]))
            _weights(b_0, j_b, i_m, i_t * WIDE, d_e, lse, bad, peak, total, T, R, NT, row0, scale, limit, before, BACKWARD, PAST)
            _weights(b_1, j_b, i_m, i_t * WIDE + BLOCK, d_e, lse, bad, peak, total, T, R, NT, row0, scale, limit, before, BACKWARD, PAST)
            acc = tl.zeros([BLOCK, WIDE], dtype=tl.float32)


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_scores_many"))
def feedback_scores_many(
    q, k, lse, bad, e, peak, total, sync, T, D, C, R, NT, row0, n_sync, scale, B, each, base, BK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): `feedback_scores` of B sequences without a past. each: `tiles_of` a sequence; base: column tiles of 256 before row0, which is a
    multiple of 256."""
    if tl.program_id(0) == 0:
        clear(sync, n_sync)
    d_q, d_k = tl.make_tensor_descriptor(q, [B * T, D], [D, 1], [BLOCK, BK]), tl.make_tensor_descriptor(k, [B * T, D], [D, 1], [WIDE, BK])
    d_e = tl.make_tensor_descriptor(e, [B * R, C], [C, 1], [BLOCK, BLOCK])
    _walk(
        tl.program_id(0), each * B, 0, each, base, d_q, d_k, d_e, lse, bad, peak, total, T, T, D, R, NT, row0, scale, T, 0, BK, BACKWARD, False
    )  # fmt: skip


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_scores_past"))
def feedback_scores_past(
    q, k, past_k, past_length, lse, e, peak, total, sync, T, P, D, C, R, NP, NT, row0, n_sync, scale, B, each, base, BK: tl.constexpr,
):  # fmt: skip
    """The same behind a past of capacity P, of which the tiles are walked that there are: first those of new columns, then each sequence's past."""
    if tl.program_id(0) == 0:
        clear(sync, n_sync)
    program, programs = tl.program_id(0), tl.num_programs(0)
    d_q, d_k = tl.make_tensor_descriptor(q, [B * T, D], [D, 1], [BLOCK, BK]), tl.make_tensor_descriptor(k, [B * T, D], [D, 1], [WIDE, BK])
    d_p, d_e = tl.make_tensor_descriptor(past_k, [B * P, D], [D, 1], [WIDE, BK]), tl.make_tensor_descriptor(e, [B * R, C], [C, 1], [BLOCK, BLOCK])
    _walk(program, each * B, 0, each, base, d_q, d_k, d_e, lse, lse, peak, total, T, T, D, R, NT, row0, scale, T, NP, BK, False, False)
    before, blocks = each * B, tl.cdiv(tl.minimum(R, T - row0), BLOCK)
    for i_b in range(B):
        length = tl.minimum(tl.load(past_length + i_b), P)
        count = blocks * tl.cdiv(length, WIDE)
        begin = (program + programs - before % programs) % programs
        _walk(begin, count, program * 0 + i_b, blocks, base, d_q, d_p, d_e, lse, lse, peak, total, T, P, D, R, NT, row0, scale, length, 0, BK, False, True)
        before += count


class ManyScores:
    """Launches one of them as `feedback_scores` is launched, but for the grid: (rows of each sequence, sequences)."""

    def __init__(self, run: Launcher, past: bool = False) -> None:
        self._run, self._past = run, past

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        q, k, past_k, past_length, lse, bad, e, peak, total, sync, tokens, capacity, width, columns, all_rows, before, all_tiles, *last = arguments
        (rows, batch), base = grid, last[0] // SCORE_COLUMNS
        blocks = -(-rows // 128)
        each = tiles_of(blocks, base)
        most = each + (blocks * -(-capacity // SCORE_COLUMNS) if self._past else 0)
        programs = min(most * batch, self._run.resident, MANY_PROGRAMS)
        if self._past:
            sizes = (tokens, capacity, width, columns, all_rows, before, all_tiles, *last, batch, each, base)
            self._run((programs,), q, k, past_k, past_length, lse, e, peak, total, sync, *sizes)
        else:
            self._run((programs,), q, k, lse, bad, e, peak, total, sync, tokens, width, columns, all_rows, all_tiles, *last, batch, each, base)

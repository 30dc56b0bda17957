"""What a decode step does besides the engine: append the new rows to the caches, pick the most likely token, advance the lengths.

A copy recorded in a CUDA graph cannot follow a row that moves from step to step; these kernels read the lengths on the device instead.
Rows are copied as 32-bit words, whatever they hold. No float atomics: the same logits give the same token.

A short step's are all done by `decode_end`, one kernel: each launch behind the engine costs a step of one token some two microseconds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.device import begin
from sessa_deploy.kernels.launch import table


@triton.jit
def _places(table, i_entry, i_b, i_t, tokens, at, capacity):
    """(address of new row i_t of `tokens` of sequence i_b, that of row `at` of its cache, their 32-bit words)."""
    p_new = tl.multiple_of(tl.load(table + i_entry * 3).to(tl.pointer_type(tl.int32)), 16)
    p_cache = tl.multiple_of(tl.load(table + i_entry * 3 + 1).to(tl.pointer_type(tl.int32)), 16)
    words = tl.multiple_of(tl.load(table + i_entry * 3 + 2).to(tl.int32), 4)
    return p_new + (i_b * tokens + i_t).to(tl.int64) * words, p_cache + (i_b.to(tl.int64) * capacity + at) * words, words


@triton.jit
def _copy(p_new, p_cache, words, BLOCK: tl.constexpr):
    for start in range(0, words, BLOCK):
        o_w = start + tl.arange(0, BLOCK)
        tl.store(p_cache + o_w, tl.load(p_new + o_w, mask=o_w < words), mask=o_w < words)


@triton.jit(do_not_specialize=table.do_not_specialize("decode_append"))
def decode_append(table, past_length, new_length, tokens, capacity, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (T, B, entries): row t < new_length[b] of every entry goes to row past_length[b] + t of its cache, if the capacity holds it.

    table: (entries, 3) int64, each the address of the new rows (B,T,W), that of the cache (B,P,W), and W in 32-bit words.
    Both addresses are multiples of 16 bytes and W is a multiple of 4.
    """
    begin(PDL)
    i_t, i_b = tl.program_id(0), tl.program_id(1)
    at = tl.load(past_length + i_b) + i_t
    if (i_t < tl.load(new_length + i_b)) & (at >= 0) & (at < capacity):
        p_new, p_cache, words = _places(table, tl.program_id(2), i_b, i_t, tokens, at, capacity)
        _copy(p_new, p_cache, words, BLOCK)


@triton.jit
def _top(logits, i_split, vocabulary, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """(largest of the logits (V,) in tiles i_split, i_split + SPLITS, ..., the lowest id that has it; -1 where one is NaN or +Inf)."""
    b_best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_where = tl.full([BLOCK], 2147483647, dtype=tl.int32)
    b_bad = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(i_split * BLOCK, vocabulary, SPLITS * BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_x = tl.load(logits + o_v, mask=o_v < vocabulary, other=float("-inf"))
        b_bad += tl.where((b_x != b_x) | (b_x == float("inf")), 1, 0)
        better = b_x > b_best  # ids ascend, so an equal value later on does not replace
        b_best = tl.where(better, b_x, b_best)
        b_where = tl.where(better, o_v, b_where)
    top = tl.max(b_best, 0)
    first = tl.min(tl.where(b_best == top, b_where, 2147483647), 0)
    return top, tl.where(tl.sum(b_bad, 0) > 0, -1, first)


@triton.jit(do_not_specialize=table.do_not_specialize("decode_end"))
def decode_end(
    table, logits, best, where, ended, past_length, new_length, ids, next_ids, words, entries, capacity, vocabulary,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (entries + SPLITS, T, B): what `decode_append` does; ids[b,t] (int32; may be page-locked memory of the host) is the most likely token behind
    logits (B,T,V) float32, the lowest id of equals, or -1 if a logit is NaN, +Inf or all are -Inf; past_length[b] advances by new_length[b].

    entries 0: nothing is appended, and T may be fewer than the step's rows. table: of `decode_append`.
    next_ids: where the next step takes its ids from, (B,T) integers of `words` (1 or 2) 32-bit words each: the same tokens, 0 in the place of -1, so that a
    step that is launched before anybody has seen them reads within the embedding.
    best, where: (B,T,SPLITS) float32 and int32, each split's largest logit and its id. ended: (B,) int32, zeros before and after: how many programs of a
    sequence are done. The last one picks, whichever it is: the same tokens, and nobody reads a length that has advanced.

    Before the wait the lengths are read, which no kernel of an engine writes, and where rows come from and go.
    """
    i_part, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = tl.num_programs(1)
    o_row = (i_b * tokens + i_t).to(tl.int64)
    if i_part < entries:
        at = tl.load(past_length + i_b) + i_t
        held = (i_t < tl.load(new_length + i_b)) & (at >= 0) & (at < capacity)
        p_new, p_cache, row = _places(table, i_part, i_b, i_t, tokens, at, capacity)
        begin(PDL)
        if held:
            _copy(p_new, p_cache, row, BLOCK)
    else:
        begin(PDL)
        top, first = _top(logits + o_row * vocabulary, i_part - entries, vocabulary, SPLITS, BLOCK)
        tl.store(best + o_row * SPLITS + i_part - entries, top)
        tl.store(where + o_row * SPLITS + i_part - entries, first)
    tl.debug_barrier()  # all threads have read the lengths and written what they write
    if tl.atomic_add(ended + i_b, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) * tokens - 1:
        for t in range(tokens):
            o_pick = (i_b * tokens + t).to(tl.int64)
            o_s = o_pick * SPLITS + tl.arange(0, SPLITS)
            b_best = tl.load(best + o_s, cache_modifier=".cg")
            b_where = tl.load(where + o_s, cache_modifier=".cg")
            top = tl.max(b_best, 0)
            first = tl.min(tl.where(b_best == top, b_where, 2147483647), 0)
            broken = (tl.min(b_where, 0) < 0) | (top == float("-inf"))
            tl.store(ids + o_pick, tl.where(broken, -1, first))
            tl.store(next_ids + o_pick * words, tl.where(broken, 0, first))
            tl.store(next_ids + o_pick * words + 1, 0, mask=words == 2)
        tl.store(past_length + i_b, tl.load(past_length + i_b) + tl.load(new_length + i_b))
        tl.store(ended + i_b, 0)

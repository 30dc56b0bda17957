"""What a captured decode step does besides the engine: append the new rows to the caches, pick the most likely token, advance the lengths.

A copy recorded in a CUDA graph cannot follow a row that moves from step to step; these kernels read the lengths on the device instead.
Rows are copied as 32-bit words, whatever they hold. No float atomics: the same logits give the same token.

Where the GPU knows early starts, each is in place when the kernel before it ends, and `decode_argmax` runs beside `decode_append`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.device import admit, begin
from sessa_deploy.kernels.launch import table


@triton.jit(do_not_specialize=table.do_not_specialize("decode_append"))
def decode_append(table, past_length, new_length, tokens, capacity, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (T, B, entries): row t < new_length[b] of every entry goes to row past_length[b] + t of its cache, if the capacity holds it.

    table: (entries, 3) int64, each the address of the new rows (B,T,W), that of the cache (B,P,W), and W in 32-bit words.
    Both addresses are multiples of 16 bytes and W is a multiple of 4.
    """
    begin(PDL)
    i_t = tl.program_id(0)
    i_b = tl.program_id(1)
    i_entry = tl.program_id(2)
    at = tl.load(past_length + i_b) + i_t
    if (i_t < tl.load(new_length + i_b)) & (at >= 0) & (at < capacity):
        p_new = tl.multiple_of(tl.load(table + i_entry * 3).to(tl.pointer_type(tl.int32)), 16)
        p_cache = tl.multiple_of(tl.load(table + i_entry * 3 + 1).to(tl.pointer_type(tl.int32)), 16)
        words = tl.multiple_of(tl.load(table + i_entry * 3 + 2).to(tl.int32), 4)
        p_new += (i_b * tokens + i_t).to(tl.int64) * words
        p_cache += (i_b.to(tl.int64) * capacity + at) * words
        for start in range(0, words, BLOCK):
            o_w = start + tl.arange(0, BLOCK)
            tl.store(p_cache + o_w, tl.load(p_new + o_w, mask=o_w < words), mask=o_w < words)


@triton.jit(do_not_specialize=table.do_not_specialize("decode_argmax"))
def decode_argmax(logits, best, where, vocabulary, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (B, SPLITS): the largest of the logits (B,V) float32 that a split sees, and the lowest id that has it.

    best: (B,SPLITS) float32, where: (B,SPLITS) int32; -1 where the split saw a NaN or an infinity at its top. Split i reads tiles i, i + SPLITS, ...

    An early start is for the stream's next kernel behind `decode_append`, which writes no logits: all before that one has ended where it lets this one in.
    They are read before the wait, and past the caches that a kernel's own start clears.
    """
    admit(PDL)
    i_b = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    b_best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_where = tl.full([BLOCK], 2147483647, dtype=tl.int32)
    b_bad = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(i_split * BLOCK, vocabulary, SPLITS * BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_x = tl.load(logits + i_b * vocabulary + o_v, mask=o_v < vocabulary, other=float("-inf"), cache_modifier=".cg")
        b_bad += tl.where((b_x != b_x) | (b_x == float("inf")), 1, 0)
        better = b_x > b_best  # ids ascend, so an equal value later on does not replace
        b_best = tl.where(better, b_x, b_best)
        b_where = tl.where(better, o_v, b_where)
    top = tl.max(b_best, 0)
    first = tl.min(tl.where(b_best == top, b_where, 2147483647), 0)
    o_out = i_b * SPLITS + i_split
    tl.store(best + o_out, top)
    tl.store(where + o_out, tl.where(tl.sum(b_bad, 0) > 0, -1, first))
    begin(PDL)


@triton.jit(do_not_specialize=table.do_not_specialize("decode_finish"))
def decode_finish(best, where, past_length, new_length, ids, next_ids, words, SPLITS: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (B,): ids[b] (int32; may be page-locked memory of the host) is the most likely token, the lowest id of equals, or -1 if a logit is NaN, +Inf or
    all are -Inf; past_length[b] advances by new_length[b].

    next_ids: where the next step takes its ids from, B integers of `words` (1 or 2) 32-bit words each: the same tokens, 0 in the place of -1, so that a
    step that is launched before anybody has seen them reads within the embedding.
    """
    begin(PDL)
    i_b = tl.program_id(0)
    o_s = i_b * SPLITS + tl.arange(0, SPLITS)
    b_best = tl.load(best + o_s)
    b_where = tl.load(where + o_s)
    top = tl.max(b_best, 0)
    first = tl.min(tl.where(b_best == top, b_where, 2147483647), 0)
    broken = (tl.min(b_where, 0) < 0) | (top == float("-inf"))
    tl.store(ids + i_b, tl.where(broken, -1, first))
    tl.store(next_ids + i_b * words, tl.where(broken, 0, first))
    tl.store(next_ids + i_b * words + 1, 0, mask=words == 2)
    tl.store(past_length + i_b, tl.load(past_length + i_b) + tl.load(new_length + i_b))

"""What stands before a decode step whose draft is made on the device: how much of the step before was right, and what followed the last tokens before.

The host need know neither to launch the step, and so it launches it while the one before runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.contract import PLACE_BITS, STEP_ROWS
from sessa_deploy.kernels.launch import table

MOST = tl.constexpr(STEP_ROWS)
_DEEP = 16  # tokens agreeing beyond which more mean nothing
DEEP, TOGETHER = tl.constexpr(_DEEP), tl.constexpr(4)  # looked at together
_PLACE, _PLACES = tl.constexpr(PLACE_BITS), tl.constexpr((1 << PLACE_BITS) - 1)
FULL = tl.constexpr(_DEEP << PLACE_BITS)  # no place agrees better


@triton.jit
def _best_place(text, count, BLOCK: tl.constexpr):
    """Of all places p in text (count,): how many tokens before p agree with the last ones (DEEP at most), shifted by _PLACE, and the latest p of the most;
    0 where none agrees. From the end on, and no further than to a place where DEEP agree."""
    best = 0
    first = tl.where(count > 1, (count - 2) // BLOCK * BLOCK + 1, 0)
    while (first > 0) & (best < FULL):
        o_p = first + tl.arange(0, BLOCK)
        b_same = o_p < count
        b_run = tl.zeros([BLOCK], dtype=tl.int32)
        back = 1
        going = 1
        while going > 0:
            p_from = text + (o_p - back)
            for i in tl.static_range(TOGETHER):  # loads that do not wait for one another
                last = tl.load(text + tl.maximum(count - back - i, 0))
                b_there = (o_p >= back + i) & (o_p < count)
                b_same = b_same & (tl.load(p_from - i, mask=b_there, other=-1) == last)
                b_run += b_same.to(tl.int32)
            back += TOGETHER
            going = tl.max(b_same.to(tl.int32), 0) * (back <= DEEP).to(tl.int32)
        best = tl.maximum(best, tl.max(tl.where(b_run > 0, (b_run << _PLACE) | o_p, 0), 0))
        first -= BLOCK
    return best


@triton.jit(do_not_specialize=table.do_not_specialize("decode_draft"))
def decode_draft(text, drafted, told, past_length, new_length, ids, words, rows, BLOCK: tl.constexpr):
    """Grid (1,), one sequence: settle what the step before found, and lay out a step of `rows` rows (MOST at most) behind it.

    The step before fed new_length[0] rows behind the past, the first its token and the others `drafted`[1:], and past_length[0] has advanced by them all.
    ids (MOST,), integers of `words` (1 or 2) 32-bit words: what it picked behind each. Tokens are settled as far as the draft agreed with them, one at least:
    past_length[0] becomes the rows of those, and the tokens go into text (int32: the conversation, of which all before them is there).
    Then ids become the next step's: the last settled token, and behind it what followed the latest of those places in the conversation where the most
    tokens agree with its end; a text that would run out there goes round. new_length[0]: rows, or 1 where no place agrees. `drafted` (MOST,) int32 is that
    draft, from its second element on; `told` (MOST,) int32, page-locked memory of the host, likewise, with new_length in its first.
    The caller sees to it that the cache and text (one longer) have room.
    """
    o_r = tl.arange(0, MOST)
    fed = tl.load(new_length)
    start = tl.load(past_length) - fed
    behind = (o_r > 0) & (o_r < fed)
    b_pick = tl.load(ids + o_r * words, mask=o_r < fed, other=0)
    b_right = tl.load(ids + (o_r - 1) * words, mask=behind, other=-1) == tl.load(drafted + o_r, mask=behind, other=-2)
    settled = tl.min(tl.where((o_r > 0) & (b_right == 0), o_r, MOST), 0)
    token = tl.sum(tl.where(o_r == settled - 1, b_pick, 0), 0)
    tl.store(text + start + 1 + o_r, b_pick, mask=o_r < settled)
    tl.debug_barrier()  # every thread has read what is written below, and sees the whole text
    length = start + settled
    count = length + 1
    best = _best_place(text, tl.where(rows > 1, count, 0), BLOCK)
    place = best & _PLACES
    new = tl.where(best > 0, rows, 1)
    drafts = (o_r > 0) & (o_r < new)
    b_draft = tl.load(text + place + (o_r - 1) % (count - place), mask=drafts, other=0)
    b_draft = tl.where(o_r == 0, token, b_draft)
    tl.store(ids + o_r * words, b_draft, mask=o_r < rows)
    tl.store(ids + o_r * words + 1, 0, mask=(o_r < rows) & (words == 2))
    tl.store(drafted + o_r, b_draft, mask=o_r < rows)
    tl.store(told + o_r, tl.where(o_r == 0, new, b_draft), mask=o_r < rows)
    tl.store(past_length, length)
    tl.debug_barrier()
    tl.atomic_xchg(new_length, new, sem="release", scope="gpu")  # with all that is written above: kernels that start early read lengths ahead of their wait

"""What kernels of several families inline: an early start, who takes which split of a past (launch/splits.py is the host's side), how splits are added."""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.launch import spec
from sessa_deploy.kernels.launch.jit import triton_version

triton_version()  # another Triton may lack what comes next, and is refused first
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # noqa: E402

OPENS = tl.constexpr(spec.OPENS)
SPREAD = tl.constexpr(16)
_SEQUENCES = tl.constexpr(32)  # lengths looked at together


@triton.jit
def begin(PDL: tl.constexpr):
    """Waits for the kernel before this one, then lets the next one start. PDL: 0, or `spec.WAITS` or `spec.OPENS` where `limits.DEPENDENT_ARCH` allows.

    Earlier, nothing may be written and nothing read but weights, which no kernel writes.
    Launched with CUDA's programmatic dependent launch (programming guide, "Programmatic Dependent Launch and Synchronization"), a kernel's programs are
    in place when its predecessor ends; launched without, this does nothing. Every program waits, so where this has ended all before it has.
    The next one is let in only after the wait: in a chain of short kernels those that come much too early take the place of those that are due, and what
    has ended by then it may read ahead of its own wait. With OPENS it is let in at once: short kernels, the next of which reads nothing but weights, and
    pasts, which no kernel of a layer writes.
    """
    if PDL:
        if PDL == OPENS:
            gdc_launch_dependents()
        gdc_wait()
        if PDL != OPENS:
            gdc_launch_dependents()


@triton.jit
def open_early(PDL: tl.constexpr):
    """What `begin` does at once with OPENS, for a kernel that has something to do before that."""
    if PDL:  # noqa: SIM102
        if PDL == OPENS:
            gdc_launch_dependents()


@triton.jit
def wait_early(PDL: tl.constexpr):
    """What `begin` waits for, for a kernel that reads much before that which the one before it does not write."""
    if PDL:
        gdc_wait()


@triton.jit
def rows_each(length, splits, rows, UNIT: tl.constexpr = 1):
    """Rows a split takes of a sequence: `rows` at least, so that a short one has few splits, and else an even share in whole UNITs, which divide `rows`."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, splits), UNIT) * UNIT, rows)


@triton.jit
def splits_used(length, splits, rows, UNIT: tl.constexpr = 1):
    """How many splits of a sequence have rows."""
    return tl.cdiv(length, rows_each(length, splits, rows, UNIT))


@triton.jit
def _pieces(past_length, start, batch, capacity, splits, rows, LEAST: tl.constexpr, UNIT: tl.constexpr):
    """(for each of _SEQUENCES sequences from `start` on how many splits of these come before its own, how many it has with work, LEAST at least; 0 from
    `batch` on). Splits longer than `rows` come first."""
    o_b = start + tl.arange(0, _SEQUENCES)
    b_length = tl.minimum(tl.load(past_length + o_b, mask=o_b < batch, other=0), capacity)
    b_each = rows_each(b_length, splits, rows, UNIT)
    b_n = tl.where(o_b < batch, tl.maximum(tl.cdiv(b_length, b_each), LEAST), 0)
    b_long = tl.where(b_each > rows, b_n, 0)
    b_first = tl.where(b_each > rows, tl.cumsum(b_long, 0), tl.sum(b_long, 0) + tl.cumsum(b_n - b_long, 0)) - b_n
    return b_first, b_n


@triton.jit
def pieces(every, past_length, batch, capacity, splits, rows, LEAST: tl.constexpr, UNIT: tl.constexpr = 1):
    """(how many splits of the batch the programs share, for the first sequences how many of these come before, and how many each has).

    With `every`, where each split has a program of its own, all of them, and zeros; else those that have work.
    """
    total = batch * splits
    b_first, b_n = tl.zeros([_SEQUENCES], dtype=tl.int32), tl.zeros([_SEQUENCES], dtype=tl.int32)
    if not every:
        b_first, b_n = _pieces(past_length, 0, batch, capacity, splits, rows, LEAST, UNIT)
        total = tl.sum(b_n, 0)
        for start in range(_SEQUENCES, batch, _SEQUENCES):
            _, b_more = _pieces(past_length, start, batch, capacity, splits, rows, LEAST, UNIT)
            total += tl.sum(b_more, 0)
    return total, b_first, b_n


@triton.jit
def locate(item, b_first, b_n, every, past_length, batch, capacity, splits, rows, LEAST: tl.constexpr, UNIT: tl.constexpr = 1):
    """(sequence, split) of the item-th split that `pieces` counts. b_first, b_n: its other results.

    Of splits that have a program each, neighbours are SPREAD programs apart: those of a short sequence that have work would else share a multiprocessor.
    """
    if every:
        i_b, i_split = item // splits, item % splits
        if splits % SPREAD == 0:
            i_split = i_split % SPREAD * (splits // SPREAD) + i_split // SPREAD
    else:
        its = (b_first <= item) & (item < b_first + b_n)
        i_b = tl.sum(tl.where(its, tl.arange(0, _SEQUENCES), 0), 0)
        i_split = item - tl.sum(tl.where(its, b_first, 0), 0)
        before = tl.sum(b_n, 0)
        start = _SEQUENCES  # on a line of its own: in a tuple, Triton 3.7's interpreter leaves it a constant, which cannot be added to a block
        while (start < batch) & (before <= item):
            b_begun, b_more = _pieces(past_length, start, batch, capacity, splits, rows, LEAST, UNIT)
            its = (before + b_begun <= item) & (item < before + b_begun + b_more)
            i_b = tl.sum(tl.where(its, start + tl.arange(0, _SEQUENCES), 0), 0)
            i_split = item - tl.sum(tl.where(its, before + b_begun, 0), 0)
            before += tl.sum(b_more, 0)
            start += _SEQUENCES
    return i_b, i_split


@triton.jit
def seat(program, programs, start):
    """Which of the next `programs` splits, from the start-th on, a program takes: its own place the first time, and the place from the end ever after.

    The long splits come first: who had one takes the next as the last, and where there are not enough for all he is the one who goes without.
    """
    return tl.where(start == 0, program, programs - 1 - program)


@triton.jit
def _sum(part, stat, o_first, used, width, o_d, m_d, BLOCK_S: tl.constexpr):
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < used
    o_part = o_first + o_s
    b_part = tl.load(part + o_part[:, None] * width + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
    b_max = tl.load(stat + o_part * 2, mask=m_s, other=float("-inf"))
    b_sum = tl.load(stat + o_part * 2 + 1, mask=m_s, other=0.0)
    b_w = tl.where(m_s, tl.exp2(b_max - tl.max(b_max, 0)), 0.0)
    return tl.sum(b_part * b_w[:, None], 0) / tl.sum(b_w * b_sum, 0)


@triton.jit
def _sum_of(part, stat, o_first, used, width, o_d, m_d, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """`_sum` of CHUNK splits at a time, each place among them with a maximum and sums of its own until the end."""
    b_max = tl.full([CHUNK], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([CHUNK], dtype=tl.float32)
    b_acc = tl.zeros([CHUNK, BLOCK_D], dtype=tl.float32)
    for start in tl.range(0, used, CHUNK, num_stages=1):
        o_s = start + tl.arange(0, CHUNK)
        m_s = o_s < used
        o_part = o_first + o_s
        b_part = tl.load(part + o_part[:, None] * width + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
        b_top = tl.load(stat + o_part * 2, mask=m_s, other=float("-inf"))
        b_its = tl.load(stat + o_part * 2 + 1, mask=m_s, other=0.0)
        b_new = tl.maximum(b_max, b_top)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # a place that has seen no split yet
        b_w, b_fade = tl.exp2(b_top - b_base), tl.exp2(b_max - b_base)
        b_sum = b_sum * b_fade + b_its * b_w
        b_acc = b_acc * b_fade[:, None] + b_part * b_w[:, None]
        b_max = b_new
    b_last = tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - tl.max(b_max, 0)))
    return tl.sum(b_acc * b_last[:, None], 0) / tl.sum(b_sum * b_last, 0)


@triton.jit
def add_splits(part, stat, o_first, used, width, o_d, m_d, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr = 0, CHUNK: tl.constexpr = 0):
    """Columns o_d of the softmax-weighted sum over `used` splits from o_first on, at most BLOCK_S, in an order that `used` alone decides.

    part (.., width), stat (.., 2) = (maximum in log2 units, sum of weights), float32. CHUNK: splits that a program of BLOCK_D columns reads at a time;
    0 for all at once, which is soonest done and holds so many registers that few programs run side by side.
    """
    FEW: tl.constexpr = BLOCK_S // 8
    if used <= FEW:  # a short sequence in a large cache
        b_acc = _sum(part, stat, o_first, used, width, o_d, m_d, FEW)
    elif CHUNK > 0:
        b_acc = _sum_of(part, stat, o_first, used, width, o_d, m_d, BLOCK_D, CHUNK)
    else:
        b_acc = _sum(part, stat, o_first, used, width, o_d, m_d, BLOCK_S)
    return b_acc


@triton.jit
def turn(b_x, b_cos, b_sin, BT: tl.constexpr, BD: tl.constexpr):
    """Rotate the interleaved pairs of b_x (BT,BD) float32; b_cos, b_sin (BT, BD / 2)."""
    b_even, b_odd = tl.split(tl.reshape(b_x, [BT, BD // 2, 2]))
    return tl.reshape(tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos), [BT, BD])


@triton.jit
def tanh(x):
    # from the decaying exponential: no overflow, and NaN stays NaN
    b_e = tl.exp(-2.0 * tl.abs(x))
    b_t = (1.0 - b_e) / (1.0 + b_e)
    return tl.where(x < 0, -b_t, b_t)

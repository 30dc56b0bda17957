"""What kernels of several families inline: an early start, who takes which split of a past (launch/splits.py is the host's side), how splits are added."""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.launch import spec
from sessa_deploy.kernels.launch.jit import triton_version

triton_version()  # another Triton may lack what comes next, and is refused first
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # noqa: E402

OPENS = tl.constexpr(spec.OPENS)
_SEQUENCES = tl.constexpr(32)  # lengths looked at together


@triton.jit
def begin(PDL: tl.constexpr):
    """Waits for the kernel before this one, then lets the next one start. PDL: 0, or `spec.WAITS` or `spec.OPENS` where `limits.DEPENDENT_ARCH` allows.

    Earlier, nothing may be written and nothing read but weights, which no kernel writes.
    Launched with CUDA's programmatic dependent launch (programming guide, "Programmatic Dependent Launch and Synchronization"), a kernel's programs are
    in place when its predecessor ends; launched without, this does nothing. Every program waits, so a kernel that ended means that all before it did.
    The next one is let in only after the wait: in a chain of short kernels those that come much too early take the place of those that are due, and what
    has ended by then it may read ahead of its own wait. With OPENS it is let in at once: short kernels, the next of which reads nothing but weights.
    """
    if PDL:
        if PDL == OPENS:
            gdc_launch_dependents()
        gdc_wait()
        if PDL != OPENS:
            gdc_launch_dependents()


@triton.jit
def admit(PDL: tl.constexpr):
    """Lets the next kernel in, for one that waits only at its end."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def rows_each(length, splits, rows):
    """Rows a split takes of a sequence: `rows` at least, so that a short one has few splits, and no more than an even share."""
    return tl.maximum(tl.cdiv(length, splits), rows)


@triton.jit
def splits_used(length, splits, rows):
    """How many splits of a sequence have rows."""
    return tl.cdiv(length, rows_each(length, splits, rows))


@triton.jit
def _pieces(past_length, o_b, batch, capacity, splits, rows, LEAST: tl.constexpr):
    """Splits of sequences o_b that have work, LEAST at least; 0 from `batch` on."""
    b_length = tl.minimum(tl.load(past_length + o_b, mask=o_b < batch, other=0), capacity)
    b_n = tl.maximum(splits_used(b_length, splits, rows), LEAST)
    return tl.where(o_b < batch, b_n, 0)


@triton.jit
def pieces(every, past_length, batch, capacity, splits, rows, LEAST: tl.constexpr):
    """(how many splits of the batch the programs share, for each of the first sequences how many of these end with it).

    With `every`, where each split has a program of its own, all of them, and zeros; else those that have work.
    """
    total = batch * splits
    b_end = tl.zeros([_SEQUENCES], dtype=tl.int32)
    if not every:
        b_end = tl.cumsum(_pieces(past_length, tl.arange(0, _SEQUENCES), batch, capacity, splits, rows, LEAST), 0)
        total = tl.max(b_end, 0)
        for start in range(_SEQUENCES, batch, _SEQUENCES):
            total += tl.sum(_pieces(past_length, start + tl.arange(0, _SEQUENCES), batch, capacity, splits, rows, LEAST), 0)
    return total, b_end


@triton.jit
def locate(item, b_end, every, past_length, batch, capacity, splits, rows, LEAST: tl.constexpr):
    """(sequence, split) of the item-th split that `pieces` counts, sequence by sequence. b_end: its second result."""
    if every:
        i_b, i_split = item // splits, item % splits
    else:
        i_b = tl.sum((b_end <= item).to(tl.int32), 0)
        first = tl.max(tl.where(b_end <= item, b_end, 0), 0)
        end = tl.max(b_end, 0)
        start = _SEQUENCES  # on a line of its own: in a tuple, Triton 3.7's interpreter leaves it a constant, which cannot be added to a block
        while (start < batch) & (end <= item):
            b_more = end + tl.cumsum(_pieces(past_length, start + tl.arange(0, _SEQUENCES), batch, capacity, splits, rows, LEAST), 0)
            i_b += tl.sum((b_more <= item).to(tl.int32), 0)
            first = tl.maximum(first, tl.max(tl.where(b_more <= item, b_more, 0), 0))
            end = tl.max(b_more, 0)
            start += _SEQUENCES
        i_split = item - first
    return i_b, i_split


@triton.jit
def seat(program, programs, turn):
    """Which of the next `programs` splits a program takes: its own place, and on every other turn (1) the place from the end.

    Where the long sequences come first, the same low-numbered programs would else get the longer split on every turn.
    """
    return program + turn * (programs - 1 - 2 * program)


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
def add_splits(part, stat, o_first, used, width, o_d, m_d, BLOCK_S: tl.constexpr):
    """Columns o_d of the softmax-weighted sum over `used` splits from o_first on, at most BLOCK_S, in an order that `used` alone decides.

    part (.., width), stat (.., 2) = (maximum in log2 units, sum of weights), float32.
    """
    FEW: tl.constexpr = BLOCK_S // 8
    if used <= FEW:  # a short sequence in a large cache
        b_acc = _sum(part, stat, o_first, used, width, o_d, m_d, FEW)
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

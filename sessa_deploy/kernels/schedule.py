"""What the kernels of a decode step share: an early start on the GPU, and the list of splits that have rows to read."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_SEQUENCES = tl.constexpr(32)  # lengths looked at together


@triton.jit
def begin(PDL: tl.constexpr):
    """Waits for the kernel before this one and lets the next one start; nothing may be read or written before. PDL: `launch.DEPENDENT_ARCH`.

    With programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch and Synchronization") a kernel's programs are resident,
    their parameters read, when its predecessor ends. Every program waits, so a kernel that has ended means that all before it have.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _pieces(past_length, o_b, batch, capacity, splits, rows, LEAST: tl.constexpr):
    """Splits of sequences o_b that have work: one a tile of rows, `splits` at most, LEAST at least; 0 from `batch` on."""
    b_length = tl.minimum(tl.load(past_length + o_b, mask=o_b < batch, other=0), capacity)
    b_n = tl.maximum(tl.minimum(tl.cdiv(b_length, rows), splits), LEAST)
    return tl.where(o_b < batch, b_n, 0)


@triton.jit
def pieces(past_length, batch, capacity, splits, rows, LEAST: tl.constexpr):
    """How many splits of the batch have work."""
    total = 0
    for start in range(0, batch, _SEQUENCES):
        total += tl.sum(_pieces(past_length, start + tl.arange(0, _SEQUENCES), batch, capacity, splits, rows, LEAST), 0)
    return total


@triton.jit
def locate(item, past_length, batch, capacity, splits, rows, LEAST: tl.constexpr):
    """(sequence, split) of the item-th split that has work, sequence by sequence."""
    i_b, first, end, start = 0, 0, 0, 0
    while (start < batch) & (end <= item):
        b_end = end + tl.cumsum(_pieces(past_length, start + tl.arange(0, _SEQUENCES), batch, capacity, splits, rows, LEAST), 0)
        b_before = b_end <= item
        i_b += tl.sum(b_before.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(b_before, b_end, 0), 0))
        end = tl.max(b_end, 0)
        start += _SEQUENCES
    return i_b, item - first

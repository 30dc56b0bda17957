"""Who takes which split of a batch's pasts: kernels/device.py."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from sessa_deploy.kernels.device import locate, pieces, seat  # noqa: E402
from sessa_deploy.kernels.launch.jit import interpreted  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")


@triton.jit
def _deal(past_length, taker, times, batch, capacity, splits, rows, LEAST: tl.constexpr):
    """taker, times (B,splits): the last program that took a split, and how many did."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    every = programs >= batch * splits
    total, b_first, b_n = pieces(every, past_length, batch, capacity, splits, rows, LEAST)
    for start in range(0, total, programs):
        item = start + seat(program, programs, start)
        if item < total:
            i_b, i_split = locate(item, b_first, b_n, every, past_length, batch, capacity, splits, rows, LEAST)
            tl.store(taker + i_b * splits + i_split, program)
            tl.atomic_add(times + i_b * splits + i_split, 1)


def deal(lengths: list[int], splits: int, rows: int, programs: int, least: int) -> list[list[int]]:
    """For each program the rows of the splits that it takes; every split with work is taken once."""
    batch, capacity = len(lengths), max(lengths)
    length = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    taker = torch.full((batch, splits), -1, dtype=torch.int32, device=DEVICE)
    times = torch.zeros_like(taker)
    _deal[(programs,)](length, taker, times, batch, capacity, splits, rows, LEAST=least)
    loads: list[list[int]] = [[] for _ in range(programs)]
    for b, n in enumerate(lengths):
        each = max(-(-n // splits), rows)
        work = max(-(-n // each), least)
        assert programs >= batch * splits or times[b].tolist() == [1] * work + [0] * (splits - work)
        for i in range(work):
            loads[taker[b, i]].append(max(0, min(each, n - i * each)))
    return loads


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("lengths", [[40, 0, 7], [3] * 33, [0] * 35 + [64, 1], [64, *[5] * 40, 40]], ids=lambda lengths: str(len(lengths)))
def test_every_split_with_work_is_taken_once(lengths: list[int], least: int) -> None:
    for programs in (7,) if len(lengths) > 3 else (1, 2, 100):
        deal(lengths, 8, 8, programs, least)


@pytest.mark.parametrize("place", [0, 31])
def test_a_long_sequence_among_short_ones_leaves_no_program_waiting(place: int) -> None:
    """Long splits of 17 rows and short ones of 8, in any order of the sequences: who has a long one gets no more short ones than there is room for."""
    lengths = [40] * 32
    lengths[place] = 1032
    loads = deal(lengths, 61, 8, 96, 0)
    rows = [sum(load) for load in loads]
    assert sum(rows) == sum(lengths) and max(rows) <= 1.1 * sum(rows) / len(rows)

"""Scores by tensor descriptors: when they stand in, and that their bits are those of `feedback_scores`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from feedback_cases import DEVICE, make

from sessa_deploy.kernels.feedback import forward as fwd
from sessa_deploy.kernels.feedback.many import ManyScores, _place, tiles_of
from sessa_deploy.kernels.feedback.spec import MANY, MANY_WORK, scores_many
from sessa_deploy.kernels.launch.jit import Launcher, address, pinned

WIDTH = 40  # not a multiple of the columns that are summed at a time


def scores(tokens: int, row0: int, side: str, many: bool) -> tuple[Tensor, ...]:
    """(e, sums, maxima, lse) of rows row0 .. of two sequences, in memory of zeros; row 7 of the first holds an infinity."""
    q, k, *_ = make("random", 2, tokens, 0, WIDTH, torch.bfloat16)
    q[0, 7] = torch.inf
    rows = tiles = -(-tokens // 128)
    device, shape = q.device, fwd.Shape(2, tokens, 0, WIDTH, 128, 1, 128 * rows)
    e, (peak, total) = torch.zeros(2, shape.rows, shape.columns, dtype=torch.float16, device=device), torch.zeros(2, 2, tiles, shape.rows, device=device)
    lse, bad = torch.full((2, tokens), 2.5, device=device), torch.tensor([0, 9], dtype=torch.int32, device=device)
    none = torch.zeros_like(bad)
    options = pinned((MANY, "feedback_scores"), device, q.dtype, side)
    run, by_descriptors = fwd.score_launches(device, q.dtype, options if many else {"feedback_scores": options["feedback_scores"]}, shape)
    assert by_descriptors == many
    grid = (tokens - row0, 2) if many else fwd.score_grid(tokens - row0, row0 // 128, 2, options["feedback_scores"])
    sizes = (tokens, 0, WIDTH, shape.columns, shape.rows, 0, tiles, row0, 0, 1 / math.sqrt(WIDTH))
    run(grid, *map(address, (q, k, k, none, lse, bad, e, peak, total, none)), *sizes)
    return e, total, peak, lse


@pytest.mark.parametrize("tokens, row0, side", [(300, 0, "fwd"), (300, 0, "bwd"), (400, 256, "fwd")])
def test_bits_are_those_of_single_tiles(tokens: int, row0: int, side: str) -> None:
    found, wanted = (scores(tokens, row0, side, many) for many in (True, False))
    assert wanted[1].any() and wanted[0].isfinite().any()
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


def test_each_tile_under_the_diagonal_is_one_program_s() -> None:
    for base in (0, 1, 5):
        for blocks in (1, 2, 3, 8):
            assert tiles_of(blocks, base) == sum(2 * (base + pair + 1) for pair in range(-(-blocks // 2)))


@triton.jit
def places(to, first, each, base):
    """(sequence, row tile, column tile) of tile `first` and those behind it, a program each."""
    i = tl.program_id(0)
    i_b, i_m, i_t = _place(first + i, each, base)
    tl.store(to + 3 * i, i_b)
    tl.store(to + 3 * i + 1, i_m)
    tl.store(to + 3 * i + 2, i_t)


@pytest.mark.parametrize(("base", "pair"), [(0, 0), (0, 7), (3, 2), (0, 5001), (9000, 3), (9000, 4998)])
def test_tiles_are_numbered_pair_by_pair(base: int, pair: int) -> None:
    """Also where a float32 no longer tells the numbers of two pairs apart, in sequences of a million rows."""
    first, width = pair * (pair + 1) + 2 * base * pair, base + pair + 1
    each, up, down = first + 4 * width + 2, 2 * pair, 2 * pair + 1
    assert each == tiles_of(2 * pair + 4, base)
    for begin, wanted in ((first, [(0, up, 0), (0, down, 0)]), (first + 2 * width - 1, [(0, down, width - 1), (0, up + 2, 0)]),
                          (each - 1, [(0, down + 2, width), (1, 0, 0)])):
        found = torch.empty(len(wanted), 3, dtype=torch.int32, device=DEVICE)
        places[(len(wanted),)](found, begin, each, base)
        assert [tuple(x) for x in found.tolist()] == wanted


def test_they_stand_in_where_there_is_work_for_large_tiles() -> None:
    for side in ("fwd", "bwd"):
        assert [scores_many(*of, side, 2, 5000) for of in ((90, "bf16"), (90, "fp16"), (80, "bf16"), (100, "bf16"))] == [True, False, False, False]
    assert not scores_many(90, "bf16", "fwd", 1, math.isqrt(MANY_WORK) - 1)
    device = torch.empty(0, device=DEVICE).device
    rows_past_batch = ((10000, 0, 2), (10000, 128, 2), (0, 0, 1), (2048, 0, 1))
    assert [MANY in fwd.tiles(device, torch.bfloat16, 64, *of) for of in rows_past_batch] == [True, False, False, False]
    plans = [fwd.Plan(device, torch.bfloat16, 2, tokens, 0, 64, None, 2**30) for tokens in (5000, 1024)]
    assert [type(plan.run_scores) for plan in plans] == [ManyScores, Launcher]

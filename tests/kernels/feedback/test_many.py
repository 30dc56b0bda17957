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
from sessa_deploy.kernels.feedback import many as many_scores
from sessa_deploy.kernels.feedback.many import ManyScores, _place, tiles_of
from sessa_deploy.kernels.feedback.spec import MANY, MANY_PAST, MANY_WORK, scores_many, scores_past
from sessa_deploy.kernels.launch.jit import Launcher, address, pinned
from sessa_deploy.kernels.launch.limits import PAST_ROWS, PAST_WORK

WIDTH = 40  # not a multiple of the columns that are summed at a time


def scores(
    tokens: int, row0: int, side: str, many: bool, past: int = 0, lengths: tuple[int, int] = (0, 0), dtype: torch.dtype = torch.bfloat16, rows: int = 0
) -> tuple[Tensor, ...]:
    """(e, sums, maxima, lse, counters) of rows row0 .. of two sequences, in memory of zeros; row 7 of the first holds an infinity, past rows beyond their
    lengths NaN. Of numbers whose sums are exact: where there is no GPU, the order of a sum is the library's."""
    q, k, _, _, past_k, _, _ = make("random", 2, tokens, past, WIDTH, dtype)
    q, k, past_k = ((8 * x).round() / 8 for x in (q, k, past_k))
    q[0, 7] = torch.inf
    for of, length in zip(past_k, lengths, strict=True):
        of[length:] = torch.nan
    device, shape = q.device, fwd.Shape(2, tokens, past, WIDTH, 128, 1, rows or 128 * -(-tokens // 128))
    rows = shape.rows
    e, (peak, total) = torch.zeros(2, rows, shape.columns, dtype=torch.float16, device=device), torch.zeros(2, 2, shape.tiles, rows, device=device)
    lse, bad = torch.full((2, tokens), 2.5, device=device), torch.tensor([0, 9], dtype=torch.int32, device=device)
    sync, length = torch.full_like(bad, 3), torch.tensor(lengths, dtype=torch.int32, device=device)
    single = pinned(("feedback_scores",), device, q.dtype, "past" if past else side)
    more = pinned((MANY_PAST if past else MANY,), device, q.dtype, side)
    run, by_descriptors = fwd.score_launches(device, q.dtype, {**single, **more} if many else single, shape)
    assert by_descriptors == many
    here, past_tiles = min(rows, tokens - row0), shape.past_tiles
    grid = (here, 2) if many else fwd.live_grid(here, past_tiles, row0 // 128, 2, single["feedback_scores"])
    sizes = (tokens, past, WIDTH, shape.columns, rows, past_tiles, shape.tiles, row0, 2, 1 / math.sqrt(WIDTH))
    run(grid, *map(address, (q, k, past_k if past else k, length, lse, bad, e, peak, total, sync)), *sizes)
    return e, total, peak, lse, sync


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert wanted[1].any() and wanted[0].isfinite().any()
    assert not wanted[4].any()
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


@pytest.mark.parametrize("tokens, row0, side", [(300, 0, "fwd"), (300, 0, "bwd"), (400, 256, "fwd")])
def test_bits_are_those_of_single_tiles(tokens: int, row0: int, side: str) -> None:
    same(*(scores(tokens, row0, side, many) for many in (True, False)))


@pytest.mark.parametrize(
    "tokens, row0, rows, past, lengths, dtype",
    [(300, 0, 0, 300, (130, 300), torch.float16), (500, 256, 256, 130, (0, 1), torch.float16), (130, 0, 0, 1, (1, 0), torch.float16),
     (129, 0, 0, 520, (520, 257), torch.bfloat16)],
)  # fmt: skip
def test_so_they_are_behind_a_past(tokens: int, row0: int, rows: int, past: int, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """Of ragged lengths, none too, in a tile's first half and in its second; of a later panel."""
    same(*(scores(tokens, row0, "fwd", many, past, lengths, dtype, rows) for many in (True, False)))


@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("past", [0, 300])
def test_so_they_are_where_programs_have_many_tiles(programs: int, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = scores(600, 0, "fwd", False, past, (130, past) if past else (0, 0), torch.bfloat16)
    monkeypatch.setattr(many_scores, "MANY_PROGRAMS", programs)
    same(scores(600, 0, "fwd", True, past, (130, past) if past else (0, 0), torch.bfloat16), wanted)


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


def test_behind_a_past_they_do_for_many_rows_whatever_it_holds() -> None:
    known = ((90, "fp16"), (90, "bf16"), (90, "fp32"), (80, "fp16"), (100, "bf16"))
    assert [scores_past(*of, 1, 8192) for of in known] == [True, True, False, False, False]
    assert scores_past(90, "fp16", PAST_WORK // PAST_ROWS, PAST_ROWS) and not scores_past(90, "fp16", 64, PAST_ROWS - 1)
    assert not scores_past(90, "fp16", 1, PAST_WORK - 1)
    device = torch.empty(0, device=DEVICE).device
    assert [MANY_PAST in fwd.tiles(device, torch.float16, 64, 8192, past) for past in (1, 0)] == [True, False]
    assert MANY_PAST not in fwd.tiles(device, torch.float16, 1024, 2048, 32768), "a chunk behind a long past, whatever may be cached"
    panels = (2**30, 2 * 4608 * 256 * 2, 2 * 4608 * 384 * 2)  # the last of 384 rows, which are no whole tiles of columns
    plans = [fwd.Plan(device, torch.float16, 2, 4096, 512, 64, None, panel_bytes) for panel_bytes in panels]
    assert [(type(p.run_scores), p.shape.rows) for p in plans] == [(ManyScores, 4096), (ManyScores, 256), (Launcher, 384)]

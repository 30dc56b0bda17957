"""When kernels stand in for others, and which width a solve takes. Their numbers: test_feedback_kernels.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from feedback_cases import DEVICE, make, side, small_options, with_stand_ins

from sessa_deploy.cuda_arch import ARCHS
from sessa_deploy.kernels.feedback import backward as bwd
from sessa_deploy.kernels.feedback import forward as fwd
from sessa_deploy.kernels.feedback import inverse, parts
from sessa_deploy.kernels.feedback.spec import FEW_WORK, all_pinned, pack_variant, solve_variant, solver, together_variant
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import EARLY, address, launcher

EAGER: dict[str, int] = {} if DEVICE == "cpu" else {"PDL": 0}  # which the interpreter does not know
INVERSE = {"CHUNK": 4, "BACKWARD": False, "num_warps": 8, "num_stages": 1}


def test_a_bad_row_spoils_no_earlier_one() -> None:
    tokens, first_bad = 400, 300
    x = make("random", 1, tokens, 0, 16, torch.bfloat16)
    small = with_stand_ins(small_options(torch.bfloat16, 128, 128))
    clean = fwd.forward(*x, options=side(small, False))[0]
    x[0][:, first_bad] = torch.nan
    s, lse, low = fwd.forward(*x, options=side(small, False))
    assert torch.equal(s[:, :first_bad], clean[:, :first_bad]) and torch.isnan(s[:, first_bad]).all()
    ds = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, s.dtype)
    q, k, gamma, f, *behind = x
    for name, grad in zip(("dq", "dk", "dgamma", "df"), bwd.backward(ds, q, k, gamma, f, s, lse, low, *behind, options=side(small, True)), strict=False):
        assert torch.isfinite(grad).all() and grad[:, : first_bad - 1].any() and not grad[:, first_bad:].any(), name


def test_every_form_of_the_solve_in_halves_has_the_same_bits() -> None:
    x = make("random", 1, 400, 40, 24, torch.bfloat16)
    q, k, gamma, f, *behind = x
    f.copy_(torch.where(torch.arange(24, device=f.device) == 5, f.abs(), -1000 * f.abs()))  # the largest magnitude is no maximum
    small, device = with_stand_ins(small_options(torch.bfloat16, 128, 128)), torch.device(DEVICE)
    ahead, back = side(small, False) or fwd.tiles(device, x[0].dtype, 24, 400, 40), side(small, True) or bwd.tiles(device, x[0].dtype, 24, 400)
    found = []
    for two, early in ((True, False), (False, False), (False, True)):
        forms = ((ahead, fwd.SOLVES[0].__name__, {"TWO": two, "ALONE": early}), (back, bwd.SOLVES[0].__name__, {"TWO": two}))
        options, transposed = ({**o, name: {**o[name], **form}} for o, name, form in forms)
        s, lse, low = fwd.forward(*x, options=options)
        assert torch.equal(fwd.forward(*x, need_lse=False, options=options)[0], s)
        found.append((s, low, *bwd.backward(f, q, k, gamma, f, s, lse, low, *behind, options=transposed)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_both_gradients_go_together_without_a_past_in_one_panel() -> None:
    options = side(with_stand_ins(small_options(torch.bfloat16, 128, 128)), True) or bwd.tiles(torch.device(DEVICE), torch.bfloat16, 16)
    cases = ((0, 2**30), (9, 2**30), (0, 128 * 384 * 4))  # nothing, a past, room for a block of rows
    plans = [bwd.Plan(make("random", 1, 1, 0, 16, torch.bfloat16)[0].device, torch.bfloat16, 1, 300, past, 16, options, room) for past, room in cases]
    assert [plan.run_together is not None for plan in plans] == [True, False, False]


def test_kernels_are_compiled_only_where_they_run() -> None:
    for stand_ins in (True, False):
        small = small_options(torch.bfloat16, 128, 128)
        options = side(with_stand_ins(small) if stand_ins else small, True) or bwd.tiles(torch.device(DEVICE), torch.bfloat16, 16)
        plan = bwd.Plan(make("random", 1, 1, 0, 16, torch.bfloat16)[0].device, torch.bfloat16, 1, 300, 0, 16, options, 2**30)
        joint = bwd.TOGETHER in options
        assert (plan.run_together is not None, "feedback_grad_q" in plan.run, "feedback_grad_k" in plan.run) == (joint, not joint, not joint)
        assert [run.kernel.__name__ for _, run in plan.combination] == (list(fwd.APART) if fwd.APART[0] in options else ["feedback_combine"])


@pytest.mark.parametrize("backward", [False, True])
def test_inverses_keep_sixteen_bits_without_a_bias(backward: bool) -> None:
    """A chain of gain 0.999: a product that loses something of one sign every time is off by ten times as much as this allows."""
    device = torch.empty(0, device=DEVICE).device
    one, e = torch.ones(128, device=device), torch.diag(torch.ones(127, device=device), -1).half()
    length = torch.zeros(1, dtype=torch.int32, device=device)
    out, (high, low) = [torch.empty_like(one) for _ in range(3)], (torch.full_like(e, torch.nan, dtype=torch.bfloat16) for _ in range(2))
    near, scale = torch.empty(3, 128, 128, dtype=e.dtype, device=device), torch.empty(3, 128, device=device)
    run = launcher(inverse.feedback_inverse, device, torch.bfloat16, {**INVERSE, "BACKWARD": backward})
    run((1, 1, 1), *map(address, (e, 0 * one, one, 0.999 * one, length, *out, one, high, low, near, e, scale)), 128, 128, 128, 0, 1, 0, 1, 1)
    exact = torch.linalg.inv(torch.eye(128).double() - 0.999 * e.double().cpu())
    assert float((near[2].double() * scale[2].double()[:, None]).cpu().sub(exact).abs().max()) < 2**-11  # what the solves in halves read
    if backward:  # the other solve reads a pair, forward there is none
        assert float((high.double() + low.double()).cpu().sub(exact).abs().max()) < 2**-13
    else:
        assert bool(high.isnan().all()) and bool(low.isnan().all())


def test_no_solve_reads_a_pair_that_the_forward_does_not_make() -> None:
    """`feedback_inverse` makes the pair backward alone, where wide rows have the other solve."""
    for arch in ARCHS:
        assert not all_pinned(fwd.APART, arch, "bf16", "fwd") or solver(arch, "bf16", "fwd") == "feedback_solve_halves"


@pytest.mark.parametrize("backward", [False, True])
def test_near_tiles_are_products_of_inverses_and_routing_tiles(backward: bool) -> None:
    """Of three blocks, with gains far beyond 1, weights far below the row's largest, and a bad row, which counts for nothing whatever it holds.

    The inverse is the float16 in near forward, a bfloat16 pair backward; the other one is not read."""
    device, g = torch.empty(0, device=DEVICE).device, torch.Generator().manual_seed(0)
    rows, blocks = 384, 3
    e = torch.rand(rows, rows, generator=g).half()
    exact = torch.tril(torch.rand(blocks, 128, 128, generator=g) - 0.5, -1) + torch.eye(128)
    near, scale = torch.full((3, rows, 128), torch.nan).half(), torch.full((3, rows), torch.nan)
    high = torch.full((rows, 128), torch.nan).bfloat16()
    low = high.clone()
    if backward:
        high = exact.reshape(rows, 128).bfloat16()
        low = (exact.reshape(rows, 128) - high.float()).bfloat16()
        held = exact.double()
    else:
        near[2], scale[2] = (exact * 2.0**14).reshape(rows, 128).half(), 2.0**-14
        held = near[2].double().reshape(blocks, 128, 128) * 2.0**-14
    factor, row_peak = torch.rand(rows, generator=g) - 0.5, torch.rand(rows, generator=g)
    peak = row_peak - 4 * torch.rand(blocks, rows, generator=g)
    factor[200], factor[256:320] = 40.0, factor[256:320] * 1e-6
    if not backward:
        factor[300], e[300] = torch.nan, torch.nan
    keep = [x.to(device) for x in (e, peak, factor, row_peak, near, scale, torch.zeros(1, dtype=torch.int32), high, low)]
    a_e, a_peak, a_factor, a_top, a_near, a_scale, a_length, a_high, a_low = map(address, keep)
    run = launcher(inverse.feedback_near, device, torch.bfloat16, {"BACKWARD": backward, "num_warps": 4, "num_stages": 1} | EAGER)
    first = (a_e, a_peak, a_peak, a_factor, a_length, a_top, a_factor, a_top, a_top, a_high, a_low, a_near, a_e, a_scale)
    run((blocks, 1, 4), *first, rows, rows, rows, 0, blocks, 0, 1, blocks)
    got, units = keep[4].double().cpu().reshape(3, blocks, 128, 128), keep[5].double().cpu().reshape(3, blocks, 128)
    own = (factor * torch.exp(peak - row_peak)).double().reshape(blocks, blocks, 128)  # (tile, block, row)
    for d in range(2):
        for i in range(blocks):
            j = i + 1 + d if backward else i - 1 - d
            if not 0 <= j < blocks:
                assert bool(got[d, i].isnan().all()), "nothing is stored where there is no tile"
                continue
            row, column = (j, i) if backward else (i, j)
            tile = e[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128].double()
            want = tile @ held[i] if backward else held[i] @ torch.where(own[j, i].isnan()[:, None], 0.0, tile * own[j, i][:, None])
            value = got[d, i] * (units[d, i] if backward else units[d, i][:, None])
            size = want.abs().amax(0 if backward else 1, keepdim=True)
            assert float(((value - want).abs() / size).max()) < 2**-10, (d, i)


def test_a_combination_without_low_halves_serves_solves_that_read_none() -> None:
    for way, solve in (("fwd", "feedback_solve"), ("bwd", "feedback_solve_transposed")):
        halves = solve.replace("solve", "solve_halves")
        assert [solver(*of, way) for of in ((90, "bf16"), (90, "fp16"), (80, "bf16"), (100, "bf16"))] == [halves, solve, solve, solve]
        assert [all_pinned(fwd.APART, *of, way) for of in ((90, "bf16"), (90, "fp16"), (80, "bf16"), (100, "bf16"))] == [True, False, False, False]
        for variant in (way, "wide"):
            tiles = table.tiles(solve, 90, "bf16", variant)
            assert tiles["BT"] == 128 and not tiles["FULL"] and not tiles["LOW"]


def test_float16_has_a_combination_in_two_kernels_forward_alone() -> None:
    assert [all_pinned(fwd.APART_HALF, *of, "fwd") for of in ((90, "fp16"), (90, "bf16"), (80, "fp16"), (100, "fp16"))] == [True, False, False, False]
    assert all(table.tiles("feedback_solve", 90, "fp16", variant)["BT"] == 128 for variant in ("fwd", "wide"))
    options = fwd.tiles(torch.device(DEVICE), torch.float16, 64)
    assert [run.kernel.__name__ for _, run in fwd.combination(torch.empty(0, device=DEVICE).device, torch.float16, options)] == list(fwd.APART_HALF)


def test_what_was_not_timed_stands_in_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    few = FEW_WORK - 1
    assert together_variant(90, "bf16", few) == "few" and together_variant(90, "bf16") == together_variant(90, "bf16", FEW_WORK) == "bwd"
    assert together_variant(90, "fp16") is together_variant(80, "bf16") is None
    monkeypatch.setattr(table, "tuned", lambda *_: False)
    assert together_variant(90, "bf16", few) is None


def test_wide_tiles_follow_the_work_where_both_were_timed() -> None:
    few, many = 2048, 16 * 1024
    assert [solve_variant(90, "fp16", 1024, "fwd", rows) for rows in (0, few, many)] == ["wide", "fwd", "wide"]
    assert solve_variant(80, "bf16", 4096, "fwd", many) == "fwd"  # which has one width


def test_tiles_of_the_solve_in_halves_follow_its_chains() -> None:
    for way in ("fwd", "bwd"):
        cases = ((768, 2048, 1), (512, 8192, 4), (1024, 10000, 2), (1024, 32768, 4), (768, 16384, 16), (1024, 16384, 1), (1536, 8192, 2))
        found = [solve_variant(90, "bf16", width, way, rows, batch) for width, rows, batch in cases]
        assert found == ["few", way, way, "wide", "wide", *["wide" if way == "fwd" else way] * 2]
    assert [solver(90, "bf16", "bwd", width) for width in (1536, 2048)] == ["feedback_solve_halves_transposed", "feedback_solve_transposed"]
    assert solve_variant(90, "bf16", 2048, "bwd", 8192) == "wide"
    for variant in ("fwd", "few", "wide"):
        assert table.tiles("feedback_solve_halves", 90, "bf16", variant)["BN"] == table.tiles("feedback_pack", 90, "bf16", pack_variant(variant))["BN"]


def test_a_solve_looks_for_a_past_only_where_there_is_one() -> None:
    """The same bits; behind none a program knows what is far without having read a length."""
    device = torch.device(DEVICE)
    for past in (0, 64):
        found = fwd.tiles(device, torch.bfloat16, 1024, 8192, past)
        if fwd.SOLVES[0].__name__ in found:
            assert found[fwd.SOLVES[0].__name__] is fwd.tiles(device, torch.bfloat16, 1024, 8192, past)[fwd.SOLVES[0].__name__]
            assert found[fwd.SOLVES[0].__name__]["PAST"] == (past > 0)
    x, small = make("random", 1, 400, 0, 24, torch.bfloat16), with_stand_ins(small_options(torch.bfloat16, 128, 128))
    options, name = side(small, False) or fwd.tiles(device, torch.bfloat16, 24, 400), fwd.SOLVES[0].__name__
    found = [fwd.forward(*x, options={**options, name: {**options[name], "PAST": past}}) for past in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


def test_the_first_solve_begins_with_near_tiles_where_nothing_else_wants_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where programs are few, or all scores are made; further scores are launched early, the first part's are not: who is before them is not known."""
    early = list[tuple[str, bool]]()
    launched = fwd.launcher
    monkeypatch.setattr(fwd, "launcher", lambda kernel, device, dtype, o: early.append((kernel.__name__, EARLY in o)) or launched(kernel, device, dtype, {
        name: value for name, value in o.items() if DEVICE == "cuda" or name != EARLY}))
    monkeypatch.setattr(fwd, "varied", lambda o, **changes: {**o, **changes})
    monkeypatch.setattr(parts, "LEAST", 256)
    small = side(with_stand_ins(small_options(torch.bfloat16, 128, 128)), False) or fwd.tiles(torch.device(DEVICE), torch.bfloat16, 24, 300)
    device, solve = make("random", 1, 1, 0, 24, torch.bfloat16)[0].device, fwd.SOLVES[0].__name__
    for alone, whole, waits in ((False, False, 1), (True, False, 1), (False, True, 1), (True, True, 0)):  # waits: whether the binary would
        monkeypatch.setattr(parts, "scores_whole", lambda *_, whole=whole: whole)
        monkeypatch.setattr(parts, "LONG_FIRST", 256)
        early.clear()
        options = {**small, solve: {**small[solve], "ALONE": alone, "TWO": False, "PDL": waits}}
        plan = fwd.Plan(device, torch.bfloat16, 1, 300, 0, 24, options, 2**30)
        assert len(plan.parts) == 2 and plan.early == ((alone or whole) and waits == 1)
        assert [x for name, x in early if name == solve][-1] == plan.early and (plan.run_first is plan.run_solve) == (not plan.early)
        assert (plan.in_parts["feedback_scores"].get("num_stages") == parts.FEW_STAGES) == alone
        assert whole or [x for name, x in early if name == "feedback_scores"][-2:] == [False, True]
        assert not any(x for name, x in early if name in fwd.APART)


@pytest.mark.parametrize("scores", ["whole", "in parts"])
def test_a_forward_in_parts_has_the_bits_of_one(scores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter one after the other; on a GPU as a graph captures them."""
    monkeypatch.setattr(parts, "LEAST", 256)
    monkeypatch.setattr(parts, "LONG_FIRST", 256)
    monkeypatch.setattr(parts, "scores_whole", lambda *_: scores == "whole")
    monkeypatch.setattr(parts, "JOINT", 299 if scores == "whole" else 300)
    x = make("random", 1, 300, 0, 24, torch.bfloat16)
    plan = fwd.Plan(x[0].device, torch.bfloat16, 1, 300, 0, 24, side(with_stand_ins(small_options(torch.bfloat16, 128, 128)), False), 2**30)
    assert plan.parts == [(0, 256), (256, 300)]
    whole, queued, cleared, solved = fwd.forward(*x, made=plan), [], [], list[str]()
    if scores != "whole":
        runs, counters = plan.run_parts, plan.workspace.buffers["sync"][0]
        monkeypatch.setattr(plan, "run_parts", [lambda *launch, i=i, run=run: (cleared.append((i, launch[-2])), run(*launch)) for i, run in enumerate(runs)])
    for name, solve in (("run_first", plan.run_first), ("run_solve", plan.run_solve)):
        monkeypatch.setattr(plan, name, lambda *launch, name=name, run=solve: (solved.append(name), run(*launch)))

    def queue(every: list[tuple[int, int]], first: Callable[..., None] | None, *steps: Callable[..., None], joint: bool, early: bool) -> None:
        assert (first is None) == (scores == "whole") == joint and early == plan.early
        for part in every:
            queued.append(part)
            for step in steps if first is None else (first, *steps):
                step(part)

    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = fwd.forward(*x, made=plan)
        graph.replay()
    else:
        monkeypatch.setattr(parts, "capturing", lambda _: True)
        monkeypatch.setattr(parts, "queue", queue)
        found = fwd.forward(*x, made=plan)
        assert queued == plan.parts
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True) if a is not None and b is not None)
    assert scores == "whole" or cleared == [(0, counters), (1, 0)], "the first part's scores clear the solve's counters"
    assert solved == ["run_first", "run_solve"]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(1500, 64), (6500, 64), (8192, 512)])
def test_forwards_of_one_graph_have_the_bits_of_calls(tokens: int, width: int) -> None:
    """Three in a row, with streams in common, of few programs and of scores in one launch: what starts early in one waits for nothing of another's."""
    x = make("random", 1, tokens, 0, width, torch.bfloat16)
    calls = [(*x[:3], x[3] * scale, *x[4:]) for scale in (1, 0.5, 2)]
    expected = [fwd.forward(*call, need_lse=False)[0] for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [fwd.forward(*call, need_lse=False)[0] for call in calls]
    for _ in range(20):
        for s in found:
            s.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_rows_go_in_parts_by_their_number() -> None:
    """Of a long sequence whose scores large tiles make, the inverses alone."""
    small, large, many = (0, 256, 768), (0, 512, 1536), (0, 512, 1024)
    assert [parts.cuts(1, tokens, False) for tokens in (512, 513, 1024, 2048, 2049)] == [(), (0, 256), small, (*small, 1792), large]
    assert [parts.cuts(*of, False) for of in ((4, 2048), (8, 2048), (16, 1024), (16, 2100))] == [large, many, small, large]
    assert [parts.cuts(*of, False) for of in ((2, 4096), (1, 6144))] == [(*large, 3584), (*large, 3584)]
    assert parts.cuts(2, 4096, True) == (*large, 3584) and parts.cuts(2, 4097, True) == parts.cuts(1, 16384, True) == (0, 2048)
    assert all(row % (128 * parts.GROUP) == 0 for many in (False, True) for tokens in range(513, 8297, 97) for row in parts.cuts(2, tokens, many))

"""The Triton forward and backward of feedback attention against float64 and `plain`: small through the interpreter, the full set on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from feedback_cases import DEVICE, NAMES, ROUTINGS, TINY, Inputs, gradients, make, poison, side, small_options, underflow, with_stand_ins
from rule import STORAGE, check

from sessa_deploy.cuda_arch import ARCHS
from sessa_deploy.kernels.feedback import backward as bwd
from sessa_deploy.kernels.feedback import forward as fwd
from sessa_deploy.kernels.feedback import shape
from sessa_deploy.kernels.feedback.spec import solve_variant
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.limits import PANEL_BYTES


def run(x: Inputs, ds: torch.Tensor | None = None, panel_bytes: int = PANEL_BYTES, tile: int = 16, stand_ins: bool = False) -> tuple[torch.Tensor, ...]:
    """s, and with ds the six gradients; tile: rows of a block under the interpreter; stand_ins: with the kernels that stand in for others."""
    options = small_options(x[0].dtype, tile, max(tile, 32))
    if stand_ins and options is not None:
        half = x[0].dtype == torch.float16
        options = {**options, "feedback_inverse_half": dict(CHUNK=4), "feedback_near_half": dict(BT=128)} if half else with_stand_ins(options)
    s, lse, low = fwd.forward(*x, need_lse=True, options=side(options, False), panel_bytes=panel_bytes)
    assert lse is not None
    if ds is None:
        return (s,)
    q, k, gamma, f, past_k, past_s, length = x
    grads = bwd.backward(ds, q, k, gamma, f, s, lse, low, past_k, past_s, length, options=side(options, True), panel_bytes=panel_bytes)
    return (s, *grads)


def verify(x: Inputs, backward: bool, panel_bytes: int = PANEL_BYTES, seed: int = 1, tile: int = 16, stand_ins: bool = False) -> None:
    """s, and with `backward` the six gradients, within design.md's rule."""
    storage = x[0].dtype
    ds = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(seed)).to(x[0])
    exact, plain = gradients(x, ds, torch.float64), gradients(x, ds, storage)
    got = run(poison(x), ds if backward else None, panel_bytes, tile, stand_ins)
    lost = underflow(x, exact) if backward and storage != torch.float32 else {}
    for name, a, b, c in zip(("s", *NAMES), got, exact, plain, strict=False):
        check(a, b, c, storage, name, lost=lost.get(name, 0.0) + TINY)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing: str, dtype: str) -> None:
    verify(make(routing, 1, 50, 0, 16, STORAGE[dtype], sign=-1.0 if routing == "alternating" else 1.0), backward=True)


@pytest.mark.parametrize("routing", ["chain", "alternating"])
def test_bfloat16_blocks_of_128_rows_hand_on_one_half(routing: str) -> None:
    """As pinned on sm_90: rounding at every block's edge must not add up beyond the rule."""
    verify(make(routing, 1, 520, 0, 16, torch.bfloat16), backward=True, tile=128)


@pytest.mark.parametrize("routing", ["random", "chain", "large"])
def test_kernels_that_stand_in_for_others(routing: str) -> None:
    verify(make(routing, 1, 400, 0, 16, torch.bfloat16), backward=True, tile=128, stand_ins=True)


@pytest.mark.parametrize("routing, gain", [("chain", 0.999), ("alternating", -0.999), ("random", 2.5)])
def test_float16_has_its_own_forward_of_them(routing: str, gain: float) -> None:
    """Where gains are above 1, float16 could not hold every inverse, and its kernel takes bfloat16 pairs."""
    x = make(routing, 1, 400, 0, 16, torch.float16, sign=gain / 0.999)
    if routing == "random":
        x[2].mul_(gain)
    verify(x, backward=False, tile=128, stand_ins=True)


@pytest.mark.parametrize("past, panel_bytes", [(100, PANEL_BYTES), (0, 4 * 384 * 128)], ids=("past", "panels"))
def test_they_take_a_past_and_panels(past: int, panel_bytes: int) -> None:
    verify(make("chain", 1, 260, past, 16, torch.bfloat16), backward=True, panel_bytes=panel_bytes, tile=128, stand_ins=True)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("tokens", [1, 2, 17, 33])
def test_past_and_lengths(tokens: int, dtype: str) -> None:
    verify(make("chain", 3, tokens, 20, 48, STORAGE[dtype]), backward=tokens == 17)


@pytest.mark.skipif(DEVICE == "cuda", reason="a plan is kept with the numbers that it was made with")
def test_few_programs_walk_a_past_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    x = poison(make("random", 2, 20, 100, 16, torch.float16))
    wanted = run(x)[0]
    monkeypatch.setattr(fwd, "PACK_PROGRAMS", 1)
    monkeypatch.setattr(shape, "SCORE_PROGRAMS", 1)
    assert torch.equal(run(x)[0], wanted)


def test_wide_tiles_follow_the_width_alone() -> None:
    assert [solve_variant(90, "fp16", width, "fwd") for width in (768, 1024, 4096)] == ["fwd", "wide", "wide"]
    assert solve_variant(86, "bf16", 4096, "fwd") == solve_variant(90, "fp32", 4096, "fwd") == "fwd"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_kernels_that_share_tiles_agree(dtype: str, arch: int) -> None:
    """One call's kernels have the same rows and columns of a routing tile, and the solve reads what the pack kernel wrote."""
    for names, way in ((fwd.FORWARD, "fwd"), (bwd.BACKWARD, "bwd")):
        for width in (64, 4096):
            variant = "wide" if width > 64 and table.has("feedback_solve", arch, dtype, "wide") else way
            wide = ("feedback_pack", "feedback_solve", "feedback_solve_transposed")
            alone = ("feedback_grad_pack",)
            tiles = {n: table.tiles(n, arch, dtype, variant if n in wide else way) for n in names if n not in alone}
            for shared in ("BT", "BM", "NB", "SPLIT"):
                assert len({t[shared] for t in tiles.values() if shared in t}) == 1, (shared, tiles)
            if way == "fwd":
                assert tiles["feedback_pack"]["BN"] == tiles["feedback_solve"]["BN"]
            else:
                assert tiles["feedback_grad_products"]["FULL"] == tiles["feedback_grad_scores"]["SCALED"] == (dtype == "fp16")
            solve = tiles["feedback_solve" if way == "fwd" else "feedback_solve_transposed"]
            assert solve["LOW"] or not (solve["FULL"] or (solve["SPLIT"] and solve["BT"] < 128))


def test_gamma_zero_is_identity() -> None:
    x = make("random", 1, 33, 5, 16, torch.float16)
    s, *_ = run((x[0], x[1], torch.zeros_like(x[2]), *x[3:]))
    assert torch.equal(s, x[3])


def test_panels_change_no_bit() -> None:
    x = make("random", 1, 70, 20, 16, torch.float16)
    ds = torch.ones_like(x[0])
    whole, cut = run(x, ds), run(x, ds, panel_bytes=1 << 10)
    assert torch.equal(whole[0], cut[0])
    exact, plain = gradients(x, ds, torch.float64), gradients(x, ds, torch.float16)
    for name, a, b, c in zip(("s", *NAMES), cut, exact, plain, strict=True):
        check(a, b, c, torch.float16, name, lost=TINY)


def test_bits_do_not_depend_on_the_batch() -> None:
    x = make("random", 2, 33, 10, 16, torch.bfloat16)
    ds = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(3)).to(x[0])
    together = run(x, ds)
    alone = run(tuple(t[1:2].contiguous() for t in x), ds[1:2].contiguous())  # type: ignore[arg-type]
    again = run(x, ds)
    for a, b, c in zip(together, alone, again, strict=True):
        assert torch.equal(a[1:2], b)
        assert torch.equal(a, c)


@pytest.mark.parametrize(
    ("which", "value"), [(0, "nan"), (1, "nan"), (1, "inf"), (2, "nan"), (3, "inf")], ids=["q-nan", "k-nan", "k-inf", "gamma-nan", "f-inf"]
)
def test_a_bad_row_stays_where_it_is(which: int, value: str) -> None:
    """Earlier rows and other sequences keep their bits, in s and in the gradients; the bad row itself turns non-finite (a bad k: the next ones)."""
    row, x = 21, make("random", 2, 33, 10, 16, torch.float16)
    ds = torch.ones_like(x[0])
    ds[0, row:] = 0  # so that the clean run's gradients of earlier rows do not depend on rows from the bad one on
    bad = [t.clone() for t in x]
    bad[which][0, row] = float(value)
    clean, got = run(x, ds), run(tuple(bad), ds)  # type: ignore[arg-type]
    assert torch.equal(clean[0][0, :row], got[0][0, :row])
    if which != 1:
        assert not torch.isfinite(got[0][0, row]).any()
    for a, b in zip(clean, got, strict=True):
        assert torch.equal(a[1], b[1])
    for name, b in zip(NAMES, got[1:], strict=True):
        assert torch.isfinite(b[0]).all(), name


def test_past_length_may_be_int64_and_inputs_may_be_views() -> None:
    x = make("random", 1, 20, 6, 16, torch.float16)
    wide = torch.cat([x[0], x[1]], dim=-1)
    q, k = wide.chunk(2, dim=-1)
    (a,) = run(x)
    (b,) = run((q, k, *x[2:6], x[6].long()))
    assert torch.equal(a, b)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 2), tokens=st.integers(1, 50), past=st.integers(0, 40), width=st.sampled_from([16, 48]), routing=st.sampled_from(ROUTINGS),
    dtype=st.sampled_from(list(STORAGE)), sign=st.sampled_from([1.0, -1.0]), cut=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch: int, tokens: int, past: int, width: int, routing: str, dtype: str, sign: float, cut: bool, seed: int) -> None:
    verify(make(routing, batch, tokens, past, width, STORAGE[dtype], sign, seed), backward=True, panel_bytes=1 << 10 if cut else PANEL_BYTES)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("width", [16, 48, 256, 768, 1024])
def test_full_set(width: int, dtype: str) -> None:
    for tokens in (1, 2, 63, 64, 65, 100, 257, 1000):
        for routing in ROUTINGS:
            for sign in (1.0, -1.0):
                batch = 16 if tokens <= 2 else 2  # with a few numbers in all, dgamma's largest and plain's error would be accidents
                x = make(routing, batch, tokens, 130 if tokens % 2 else 0, width, STORAGE[dtype], sign)
                verify(x, backward=sign > 0 or routing == "alternating")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_long(routing: str, dtype: str) -> None:
    verify(make(routing, 1, 4097, 0, 64, STORAGE[dtype]), backward=True)
    verify(make(routing, 2, 700, 1000, 4096, STORAGE[dtype]), backward=True, panel_bytes=1 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_memory_of_a_long_sequence() -> None:
    """B=1, T=65536, D=1024 in bfloat16, forward and backward: under 8 GiB above inputs and outputs."""
    tokens, width = 65536, 1024
    x = make("random", 1, tokens, 0, width, torch.bfloat16)
    ds = torch.ones_like(x[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run(x, ds)
    peak = torch.cuda.max_memory_allocated() - before - sum(t.numel() * t.itemsize for t in out)
    assert peak < 8 * 2**30, f"{peak / 2**30:.2f} GiB"
    assert all(torch.isfinite(t).all() for t in out)

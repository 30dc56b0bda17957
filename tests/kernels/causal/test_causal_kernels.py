"""The Triton kernels of causal attention with a cache against float64 and `plain_causal`: on the GPU, or at small sizes through the interpreter."""

from __future__ import annotations

import pytest
import torch
from rule import STORAGE
from rule import check as check_rule
from torch import Tensor

from sessa_deploy.kernels import reference, route
from sessa_deploy.kernels.causal import spec
from sessa_deploy.kernels.causal.prefill import _place
from sessa_deploy.kernels.launch import table

pytest.importorskip("triton")

import triton
import triton.language as tl

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def run(*inputs: Tensor) -> Tensor:
    moved = [x.to(DEVICE) for x in inputs]
    assert route.causal_kernels_take(moved[0])
    return route.causal_kernels(*moved).cpu()


def case(
    tokens: int, capacity: int, lengths: list[int], heads: tuple[int, int], width: int, dtype: torch.dtype, seed: int = 0, logit: float = 1.0
) -> list[Tensor]:
    """q, k, v, past_k, past_v, past_length with NaN or Inf in every row of the past that is not valid. heads: (Hq, Hkv)."""
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(len(lengths), tokens, heads[0], width, generator=make).to(dtype) * logit
    k, v = (torch.randn(len(lengths), tokens, heads[1], width, generator=make).to(dtype) for _ in range(2))
    past_k, past_v = (torch.randn(len(lengths), capacity, heads[1], width, generator=make).to(dtype) for _ in range(2))
    for b, n in enumerate(lengths):
        past_k[b, n:], past_v[b, n:] = torch.nan, torch.inf
    return [q, k, v, past_k, past_v, torch.tensor(lengths, dtype=torch.int32)]


def check(inputs: list[Tensor], valid: Tensor | None = None) -> Tensor:
    """o, within the rule over the valid rows (B,T), poison in the others."""
    o = run(*inputs) if valid is None else run(*(torch.where(valid[..., None, None], x, torch.nan) if i < 3 else x for i, x in enumerate(inputs)))
    truth, plain = reference.plain_causal(*(x.double() if x.is_floating_point() else x for x in inputs)), reference.plain_causal(*inputs)
    assert o.shape == truth.shape and o.dtype == inputs[0].dtype
    check_rule(*((o, truth, plain) if valid is None else (o[valid], truth[valid], plain[valid])))
    return o


@pytest.mark.parametrize("dtype", STORAGE.values(), ids=STORAGE)
@pytest.mark.parametrize(("heads", "width"), [((2, 2), 64), ((4, 2), 16), ((5, 1), 48)])
def test_decode_ragged_poisoned(heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    lengths, capacity = ([0, 1, 63, 64, 65, 1000, 2049, 4000], 4096) if ON_GPU else ([0, 1, 33, 69], 70)
    inputs = case(1, capacity, lengths, heads, width, dtype)
    o = check(inputs)
    assert torch.equal(o[0], inputs[2][0].repeat_interleave(heads[0] // heads[1], 1))  # nothing but itself: its own value, bit for bit


@pytest.mark.parametrize("dtype", STORAGE.values(), ids=STORAGE)
@pytest.mark.parametrize(("heads", "width"), [((2, 2), 64), ((4, 2), 16), ((3, 1), 48)])
@pytest.mark.parametrize("tokens", [2, 63, 65] if not ON_GPU else [2, 63, 64, 65, 127, 128, 129, 257, 1000])
def test_prefill_ragged_poisoned(tokens: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    check(case(tokens, 100, [100, 0, 64, 1] if ON_GPU else [100, 0, 33], heads, width, dtype))


def test_a_past_longer_than_all_splits_have_at_least() -> None:
    """128 splits of 8 rows are 1024: of 1100 each takes 9."""
    check(case(1, 1100, [1100], (2, 1), 64, torch.float16))


def test_programs_that_share_out_the_splits_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch has fewer programs than splits; its empty splits are passed over, but for the first of each sequence."""
    from sessa_deploy.kernels.causal import step

    inputs = case(1, 30, [0, 30, 3, 0, 16, 5] + [1, 0] * (14 if ON_GPU else 4) + [30, 0], (3, 1), 16, torch.float16)
    monkeypatch.setattr(step, "step_programs", lambda pieces, blocks, resident: pieces)
    alone = run(*inputs)
    for programs in (1, 3, 40):
        monkeypatch.setattr(step, "step_programs", lambda pieces, blocks, resident, most=programs: min(pieces, most))
        assert torch.equal(run(*inputs), alone), programs


@pytest.mark.parametrize("tokens", [1, 2, 63, 65])
@pytest.mark.parametrize("capacity", [0, 1, 64])
def test_small_pasts(tokens: int, capacity: int) -> None:
    check(case(tokens, capacity, [capacity, 0], (2, 1), 64, torch.float16))


@pytest.mark.parametrize("width", [8, 24, 96, 128, 200, 256])
@pytest.mark.parametrize("tokens", [1, 20])
def test_any_head_width(width: int, tokens: int) -> None:
    check(case(tokens, 20, [20, 7], (3, 3), width, torch.float16))
    check(case(tokens, 20, [20, 7], (3, 1), width, torch.float32))


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("dtype", STORAGE.values(), ids=STORAGE)
def test_large_logits_and_one_row_takes_all(tokens: int, dtype: torch.dtype) -> None:
    check(case(tokens, 40, [40, 17], (2, 2), 64, dtype, logit=100.0))
    inputs = case(tokens, 40, [40, 20], (2, 2), 64, dtype)
    inputs[3][0, 39], inputs[3][1, 0] = inputs[0][0, 0] * 20, inputs[0][1, 0] * 20
    check(inputs)


def test_many_small_weights_beside_a_large_one() -> None:
    """In float16 a weight below 2^-24 of the largest would vanish; together they count."""
    rows = 20000 if ON_GPU else 600
    inputs = case(2, rows, [rows], (1, 1), 16, torch.float16)
    inputs[0][:], inputs[3][:], inputs[4][:] = 1, 0, 1
    inputs[3][0, 0], inputs[4][0, 0], inputs[1][:], inputs[2][:] = 2.2, 0, 0, 1
    check(inputs)


@pytest.mark.parametrize("tokens", [1, 20])
def test_same_bits_in_any_batch_and_in_place(tokens: int) -> None:
    q, k, v, past_k, past_v, length = case(tokens, 200 if ON_GPU else 40, [40, 7, 23, 0], (4, 2), 16, torch.bfloat16)
    together = run(q, k, v, past_k, past_v, length)
    for b in range(4):
        assert torch.equal(run(*(x[b : b + 1] for x in (q, k, v, past_k, past_v, length))), together[b : b + 1])
    both = torch.stack([past_k, past_v], dim=2).to(DEVICE)  # (B,P,2,Hkv,d): rows of k_f and v_f interleaved, read in place
    assert torch.equal(run(q, k, v, both[:, :, 0], both[:, :, 1], length), together)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", [0, 1, 2], ids=["q", "k", "v"])
def test_a_bad_new_row_reaches_itself_and_later_rows_only(field: int, bad: float) -> None:
    inputs = case(40, 24, [24, 24, 9], (2, 2), 16, torch.float32)
    clean = run(*inputs)
    inputs[field][1, 21, 0, 3] = bad
    dirty = run(*inputs)
    assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[2], clean[2])
    assert torch.equal(dirty[1, :21], clean[1, :21]) and not torch.isfinite(dirty[1, 21]).all()
    if field == 0:
        assert torch.equal(dirty[1, 22:], clean[1, 22:])


def test_padded_new_rows_may_hold_anything() -> None:
    inputs = case(70, 10, [10, 3], (2, 1), 64, torch.float16)
    valid = torch.arange(70) < torch.tensor([70, 5])[:, None]
    o = check(inputs, valid)
    assert torch.isnan(o[1, 5:]).all()


@pytest.mark.parametrize("tokens", [1, 17])
def test_a_length_beyond_the_capacity_reads_nothing_beyond_it(tokens: int) -> None:
    inputs = case(tokens, 16, [16], (2, 2), 16, torch.float32)
    expected = run(*inputs)
    inputs[-1] = torch.tensor([1000], dtype=torch.int32)
    assert torch.equal(run(*inputs), expected)


@triton.jit
def places(to):
    """(row tile, head) of each program, in the order in which they begin."""
    i_m, i_h = _place()
    to += 2 * (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    tl.store(to, i_m)
    tl.store(to + 1, i_h)


@pytest.mark.parametrize(("tiles", "heads", "sets"), [(1, 3, 1), (128, 16, 2), (40, 6, 1), (301, 12, 3), (1100, 2, 2)])
def test_each_tile_of_each_head_is_one_program_s_the_longest_of_a_set_of_heads_first(tiles: int, heads: int, sets: int) -> None:
    to = torch.full((tiles * heads, 2), -1, dtype=torch.int32, device=DEVICE)
    places[(tiles, heads)](to)
    found = [tuple(x) for x in to.tolist()]
    assert len(set(found)) == tiles * heads and {i_m for i_m, _ in found} == set(range(tiles)) and {i_h for _, i_h in found} == set(range(heads))
    for i in range(sets):
        begin, end = (j * heads // sets * tiles for j in (i, i + 1))
        lengths = [i_m for i_m, _ in found[begin:end]]
        assert lengths == sorted(lengths, reverse=True)
        assert {i_h for _, i_h in found[begin:end]} == set(range(i * heads // sets, (i + 1) * heads // sets))


def test_what_the_kernels_take() -> None:
    from sessa_deploy.kernels.causal import step

    assert not route.causal_kernels_take(torch.empty(1, 1, 2, 20)) and not route.causal_kernels_take(torch.empty(1, 1, 2, 264))
    assert not route.causal_kernels_take(torch.empty(1, 1, 2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="T = 1"):
        step.step(*case(2, 4, [4], (2, 2), 16, torch.float32))
    with pytest.raises(ValueError, match="no kernel for heads of width 264"):
        spec.head_variant(264)
    assert set(table.kernels()) >= set(spec.KERNELS)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "width"), [((16, 16), 64), ((8, 2), 128), ((12, 2), 64), ((4, 4), 256), ((6, 6), 96)])
def test_large_on_the_gpu(heads: tuple[int, int], width: int) -> None:
    for dtype in STORAGE.values():
        check(case(1, 9000, [9000, 4096, 1, 1025], heads, width, dtype, seed=width))
        check(case(300, 1300, [1300, 0, 129], heads, width, dtype, seed=width))


@pytest.mark.gpu
def test_the_op_takes_the_kernels_and_matches_its_own_cpu_path() -> None:
    from sessa_deploy.kernels.ops import causal_attention  # noqa: F401 (registers torch.ops.sessa)

    for tokens in (1, 100):
        inputs = case(tokens, 128, [128, 5], (4, 2), 64, torch.float16)
        op = torch.ops.sessa.causal_attention(*(x.cuda() for x in inputs)).cpu()
        assert torch.equal(op, run(*inputs))
        assert torch.allclose(op.float(), torch.ops.sessa.causal_attention(*inputs).float(), atol=4e-3)

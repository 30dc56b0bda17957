"""The decode step kernel against the float64 recurrence and `plain`: on the GPU, or at small sizes through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from rule import STORAGE
from rule import check as check_rule
from torch import Tensor

from sessa_deploy.kernels import reference
from sessa_deploy.kernels.launch import table

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def run(*inputs: Tensor) -> Tensor:
    from sessa_deploy.kernels.feedback.step import step

    return step(*(x.to(DEVICE) for x in inputs)).cpu()


def case(width: int, capacity: int, lengths: list[int], dtype: torch.dtype, seed: int = 0, logit: float = 1.0) -> list[Tensor]:
    """q, k, gamma, f, past_k, past_s, past_length with NaN in every row of the past that is not valid."""
    make = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    q, k, f = (torch.randn(batch, 1, width, generator=make).to(dtype) for _ in range(3))
    gamma = 1.998 * torch.rand(batch, 1, generator=make) - 0.999
    past_k, past_s = (torch.randn(batch, capacity, width, generator=make).to(dtype) for _ in range(2))
    past_k *= logit
    for b, n in enumerate(lengths):
        past_k[b, n:] = past_s[b, n:] = torch.nan
    return [q, k, gamma, f, past_k, past_s, torch.tensor(lengths, dtype=torch.int32)]


def check(inputs: list[Tensor]) -> Tensor:
    """s, within the rule and in the storage type."""
    s = run(*inputs)
    assert s.dtype == inputs[0].dtype
    check_rule(s, reference.recurrence(*inputs), reference.plain(*inputs))
    return s


@pytest.mark.parametrize("dtype", STORAGE.values(), ids=STORAGE)
@pytest.mark.parametrize("width", [16, 48, 768, 1040] if ON_GPU else [16, 48, 768])
def test_ragged_poisoned(width: int, dtype: torch.dtype) -> None:
    lengths, capacity = ([0, 1, 63, 64, 65, 1000, 2049, 4000], 4096) if ON_GPU else ([0, 1, 33, 69], 70)
    inputs = case(width, capacity, lengths, dtype)
    s = check(inputs)
    assert torch.equal(s[0], inputs[3][0])  # nothing to attend to: s is f, bit for bit


def test_both_ways_to_add_splits() -> None:
    """Capacity 600 at this width is 75 splits: 75 and 33 take the sum over BLOCK_S of them, 32 (BLOCK_S // 8) and 1 the small one."""
    check(case(528, 600, [600, 264, 256, 5], torch.float16))


def test_a_past_longer_than_all_splits_have_at_least() -> None:
    """256 splits of 8 rows are 2048: of 2100 each takes 9, and 234 have any."""
    check(case(528, 2100, [2100], torch.float16))


@pytest.mark.parametrize("logit", [30.0, 1000.0])
def test_large_logits(logit: float) -> None:
    check(case(64, 40, [40, 17, 3], torch.float32, logit=logit))


def test_one_row_takes_all_weight() -> None:
    inputs = case(64, 300 if ON_GPU else 40, [40, 20], torch.float16)
    inputs[4][0, 39], inputs[4][1, 0] = inputs[0][0, 0] * 20, inputs[0][1, 0] * 20
    inputs[2][:, 0] = torch.tensor([0.999, -0.999])
    check(inputs)


def test_same_bits_in_any_batch_and_in_place() -> None:
    q, k, gamma, f, past_k, past_s, length = case(48, 200 if ON_GPU else 40, [40, 7, 23, 0], torch.bfloat16)
    together = run(q, k, gamma, f, past_k, past_s, length)
    for b in range(4):
        alone = [x[b : b + 1] for x in (q, k, gamma, f, past_k, past_s, length)]
        assert torch.equal(run(*alone), together[b : b + 1])
    both = torch.stack([past_k, past_s], dim=2)  # (B,P,2,D): rows of k_b and s interleaved, read in place
    assert torch.equal(run(q, k, gamma, f, both[:, :, 0], both[:, :, 1], length), together)


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_programs_that_share_out_the_splits_change_no_bit(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch has fewer programs than splits; its empty splits, and sequences without any, are passed over."""
    lengths = [0, 70, 3, 0, 16, 17, 33, 0] + [1, 0] * 14 + [70, 0]  # more sequences than are looked at together
    from sessa_deploy.kernels.feedback import step

    inputs = case(48, 70, lengths, torch.float16)
    monkeypatch.setattr(step, "step_programs", lambda pieces, blocks, resident: pieces)
    alone = run(*inputs)
    monkeypatch.setattr(step, "step_programs", lambda pieces, blocks, resident: min(pieces, programs))
    assert torch.equal(run(*inputs), alone)


def test_bad_sequence_stays_alone() -> None:
    inputs = case(32, 24, [24, 24, 9], torch.float32)
    clean = run(*inputs)
    inputs[0][1, 0, 3], inputs[3][1, 0, 5] = torch.nan, torch.inf
    dirty = run(*inputs)
    assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[2], clean[2]) and not torch.isfinite(dirty[1]).all()


def test_a_length_beyond_the_capacity_reads_nothing_beyond_it() -> None:
    inputs = case(32, 16, [16], torch.float32)
    expected = run(*inputs)
    inputs[-1] = torch.tensor([1000], dtype=torch.int32)
    assert torch.equal(run(*inputs), expected)


def test_empty_capacity_and_refusals() -> None:
    inputs = case(32, 0, [0, 0], torch.float32)
    assert torch.equal(run(*inputs), inputs[3])
    with pytest.raises(ValueError, match="T = 1"):
        run(*(x.repeat(1, 2, 1) if x.dim() == 3 else x for x in inputs))
    with pytest.raises(ValueError, match="multiple of 16"):
        run(*case(24, 4, [4], torch.float32))
    with pytest.raises(ValueError, match="no variant"):
        table.width_variant("feedback_step_partial", 4112)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 1024, 2048, 4096])
def test_large_on_the_gpu(width: int) -> None:
    for dtype in STORAGE.values():
        check(case(width, 9000, [9000, 4096, 1, 128 * 8 + 1], dtype, seed=width))

"""A step of several rows of each attention alone against float64 and the yardstick: on the GPU, or at small sizes through Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feedback_cases import DEVICE, ROUTINGS, Inputs, make, poison
from rule import check
from torch import Tensor

from sessa_deploy.kernels import reference

pytest.importorskip("triton")
# Under the interpreter, whose time is the tiles': heads up to 64 and widths up to 256.
SMALL: dict[str, Any] | None = {
    "feedback_rows_partial": dict(BLOCK_R=16, BLOCK_C=2, BLOCK_L=128, STAGES=1), "feedback_rows_combine": dict(BLOCK_S=4, BLOCK_N=16, BLOCK_D=256),
    "feedback_rows_finish": dict(BLOCK_D=256),
    "causal_rows_partial": dict(BLOCK_R=16, BLOCK_H=2, BLOCK_D=64, STAGES=1),
    "causal_rows_combine": dict(BLOCK_S=4, BLOCK_N=64, BLOCK_D=64),
} if DEVICE == "cpu" else None  # fmt: skip


def feedback(*inputs: Tensor) -> Tensor:
    from sessa_deploy.kernels.feedback.step_rows import step

    return step(*inputs, tiles=SMALL)


def causal(*inputs: Tensor) -> Tensor:
    from sessa_deploy.kernels.causal.step_rows import step

    return step(*inputs, tiles=SMALL)


def check_feedback(inputs: Inputs) -> None:
    s = feedback(*poison(inputs))
    assert s.dtype == inputs[0].dtype
    check(s, reference.recurrence(*inputs), reference.plain(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_feedback_of_several_rows(routing: str, dtype: torch.dtype) -> None:
    check_feedback(make(routing, 2, 16, 40, 48, dtype))
    if routing in ("random", "chain"):
        check_feedback(make(routing, 1, 5, 150, 208, dtype, sign=-1.0, seed=1))  # more tiles than splits


def test_feedback_without_a_past_is_f_in_its_first_row() -> None:
    inputs = make("random", 2, 2, 1, 32, torch.float16)
    inputs[6][:] = 0
    assert torch.equal(feedback(*poison(inputs))[:, 0], inputs[3][:, 0])


def causal_case(tokens: int, capacity: int, lengths: list[int], heads: tuple[int, int], width: int, dtype: torch.dtype, logit: float = 1.0) -> list[Tensor]:
    """q, k, v, past_k, past_v, past_length; rows of the past beyond each length are NaN."""
    random = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads[0]), *2 * [(tokens, heads[1])], *2 * [(capacity, heads[1])]]
    q, k, v, past_k, past_v = (torch.randn(len(lengths), *shape, width, generator=random).to(dtype) for shape in shapes)
    for b, n in enumerate(lengths):
        past_k[b, n:] = past_v[b, n:] = torch.nan
    return [x.to(DEVICE) for x in (q * logit, k, v, past_k, past_v, torch.tensor(lengths, dtype=torch.int32))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [((3, 3), 64), ((4, 2), 24), ((3, 1), 48)])
def test_causal_of_several_rows(heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    for tokens, lengths, logit in ((16, [40, 0], 1.0), (3, [150], 30.0)):
        inputs = causal_case(tokens, max(lengths), lengths, heads, width, dtype, logit)
        exact = reference.plain_causal(*(x.double() if x.is_floating_point() else x for x in inputs))
        check(causal(*inputs), exact, reference.plain_causal(*inputs))


def test_in_place_in_any_batch_with_any_rows_behind() -> None:
    inputs = make("random", 3, 16, 40, 48, torch.bfloat16)
    whole = feedback(*inputs)
    both = torch.stack([inputs[4], inputs[5]], dim=2)  # (B,P,2,D): rows of k_b and s interleaved
    bad = [x.clone() for x in inputs[:4]]
    for x in bad:
        x[:, 6:] = torch.nan
    assert torch.equal(feedback(*bad, both[:, :, 0], both[:, :, 1], inputs[6])[:, :6], whole[:, :6])
    assert torch.equal(feedback(*(x[1:2, :5] if i < 4 else x[1:2] for i, x in enumerate(inputs))), whole[1:2, :5])
    q, k, v, past_k, past_v, length = causal_case(16, 40, [40, 7, 0], (4, 2), 16, torch.float16)
    whole, both = causal(q, k, v, past_k, past_v, length), torch.stack([past_k, past_v], dim=2)
    bad = [x.clone() for x in (q, k, v)]
    for x in bad:
        x[:, 6:] = torch.nan
    assert torch.equal(causal(*bad, both[:, :, 0], both[:, :, 1], length)[:, :6], whole[:, :6])
    assert torch.equal(causal(*(x[1:2, :5] for x in (q, k, v)), past_k[1:2], past_v[1:2], length[1:2]), whole[1:2, :5])


@pytest.mark.parametrize("gain", [1e30, -3e38])
def test_gains_whose_products_pass_float32_do_not_reach_the_rows_before_them(gain: float) -> None:
    """Rows that a ragged batch pads with hold any bits, gamma's among them."""
    for tokens in (6, 12):
        inputs = make("random", 2, tokens, 20, 48, torch.float16)
        whole, gamma = feedback(*inputs), inputs[2].clone()
        gamma[:, 3:] = gain
        assert torch.equal(feedback(*inputs[:2], gamma, *inputs[3:])[:, :3], whole[:, :3])


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_value_that_is_no_number_does_not_reach_the_rows_before_it_in_bfloat16(bad: float) -> None:
    inputs = causal_case(3, 4, [4, 0], (2, 2), 64, torch.bfloat16)
    whole = causal(*inputs)
    for x in inputs[1:3]:
        x[:, 2] = bad
    found = causal(*inputs)
    assert torch.equal(found[:, :2], whole[:, :2]) and not torch.isfinite(found[:, 2]).any()


@pytest.mark.parametrize("tokens", [1, 17])
def test_other_numbers_of_rows_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match="T = 2 to 16"):
        feedback(*make("random", 1, tokens, 4, 32, torch.float16))
    with pytest.raises(ValueError, match="T = 2 to 16"):
        causal(*causal_case(tokens, 4, [4], (1, 1), 16, torch.float16))


def test_rows_too_far_apart_for_a_tile_are_copied() -> None:
    """Their places in a tile are 32-bit integers. Nothing is read here, so the memory need not be there."""
    from sessa_deploy.kernels import device_rows

    far, close = (torch.empty_strided((1, 2, 16), (2 * row, row, 1), device="meta") for row in (device_rows.FAR + 16, 4096))
    assert device_rows.near(far).stride(1) == 16 and device_rows.near(close) is close and 32 * device_rows.FAR < 2**31

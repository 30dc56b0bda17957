"""When kernels stand in for others, and which width a solve takes. Their numbers: test_feedback_kernels.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from feedback_cases import DEVICE, make, side, small_options, with_stand_ins

from sessa_deploy.kernels.feedback import backward as bwd
from sessa_deploy.kernels.feedback import forward as fwd
from sessa_deploy.kernels.feedback.spec import FEW_WORK, solve_variant, together_variant
from sessa_deploy.kernels.launch import table


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


def test_both_gradients_go_together_without_a_past_in_one_panel() -> None:
    options = side(with_stand_ins(small_options(torch.bfloat16, 128, 128)), True) or bwd.tiles(torch.device(DEVICE), torch.bfloat16, 16)
    cases = ((0, 2**30), (9, 2**30), (0, 128 * 384 * 4))  # nothing, a past, room for a block of rows
    plans = [bwd.Plan(make("random", 1, 1, 0, 16, torch.bfloat16)[0].device, torch.bfloat16, 1, 300, past, 16, options, room) for past, room in cases]
    assert [plan.run_together is not None for plan in plans] == [True, False, False]


def test_what_was_not_timed_stands_in_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    few = FEW_WORK - 1
    assert together_variant(90, "bf16", few) == "few" and together_variant(90, "bf16") == together_variant(90, "bf16", FEW_WORK) == "bwd"
    assert together_variant(90, "fp16") is together_variant(80, "bf16") is None
    monkeypatch.setattr(table, "tuned", lambda *_: False)
    assert together_variant(90, "bf16", few) is None


def test_wide_tiles_follow_the_work_where_both_were_timed() -> None:
    few, many = 2048, 16 * 1024
    assert [solve_variant(90, "bf16", 768, "fwd", rows) for rows in (few, many)] == ["fwd", "wide"]
    assert [solve_variant(90, "bf16", 1024, "bwd", rows) for rows in (few, many)] == ["bwd", "wide"]
    assert [solve_variant(90, "fp16", 1024, "fwd", rows) for rows in (0, few, many)] == ["wide", "fwd", "wide"]
    assert solve_variant(80, "bf16", 4096, "fwd", many) == "fwd"  # which has one width

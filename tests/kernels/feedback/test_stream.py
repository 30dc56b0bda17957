"""The kernels that stand in for others in bfloat16: rows that are not finite, and when they are taken. Their numbers: test_feedback_kernels.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from feedback_cases import DEVICE, make, side, small_options, streamed

from sessa_deploy.kernels.feedback import backward as bwd
from sessa_deploy.kernels.feedback import forward as fwd
from sessa_deploy.kernels.feedback.spec import solve_variant, stand_ins
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import Options


def options(backward: bool, stream: bool = True) -> Options:
    """Options with blocks of 128 rows; on a GPU the pinned ones."""
    small = small_options(torch.bfloat16, 128, 128)
    found = side(streamed(small) if stream else small, backward)
    if found is None:
        found = (bwd if backward else fwd).tiles(torch.device(DEVICE), torch.bfloat16, 32)
        pair = (bwd if backward else fwd).STREAM
        found = {name: o for name, o in found.items() if name != pair}
        if stream:
            found |= {pair: {"BT": 128, "BN": 64, "STAGES": 3, "num_warps": 8, "num_stages": 1},
                      fwd.DIRECT: {"CHUNK": 32, "BACKWARD": backward, "num_warps": 8, "num_stages": 1}}  # fmt: skip
    return found


def test_a_bad_row_spoils_no_earlier_one() -> None:
    tokens, first_bad = 400, 300
    x = make("random", 1, tokens, 0, 16, torch.bfloat16)
    clean = fwd.forward(*x, options=options(False))[0]
    x[0][:, first_bad] = torch.nan
    s, lse, low = fwd.forward(*x, options=options(False))
    assert torch.equal(s[:, :first_bad], clean[:, :first_bad]) and torch.isnan(s[:, first_bad]).all()
    ds = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, s.dtype)
    q, k, gamma, f, *behind = x
    got, want = (bwd.backward(ds, q, k, gamma, f, s, lse, low, *behind, options=options(True, stream)) for stream in (True, False))
    for name, a, b in zip(("dq", "dk", "dgamma", "df"), got, want, strict=False):
        assert torch.isfinite(a).all() and not a[:, first_bad:].any(), name
        assert float((a.float() - b.float()).norm()) <= 1e-2 * float(b.float().norm()), name


def test_a_past_and_panels_take_the_other_kernels() -> None:
    device = make("random", 1, 1, 0, 16, torch.bfloat16)[0].device
    for which, itemsize in ((fwd, 2), (bwd, 4)):
        cases = ((0, 2**30), (9, 2**30), (0, 128 * 384 * itemsize))  # nothing, a past, room for a block of rows
        plans = [which.Plan(device, torch.bfloat16, 1, 300, past, 16, options(which is bwd), room) for past, room in cases]
        assert [plan.stream for plan in plans] == [True, False, False]


def test_what_was_not_timed_stands_in_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (fwd.DIRECT, fwd.STREAM)
    monkeypatch.setattr(table, "tuned", lambda *_: False)
    assert stand_ins(names, 90, "bf16", ("wide", "fwd")) == {}
    monkeypatch.setattr(table, "tuned", lambda *_: True)
    assert stand_ins(names, 90, "bf16", ("wide", "fwd")) == {fwd.DIRECT: "fwd", fwd.STREAM: "wide"}
    assert stand_ins(names, 90, "fp16", ("wide", "fwd")) == stand_ins(names, 80, "bf16", ("fwd",)) == {}


def test_wide_tiles_follow_the_work_where_both_were_timed() -> None:
    few, many = 2048, 16 * 1024
    assert [solve_variant(90, "bf16", 768, "fwd", rows) for rows in (few, many)] == ["fwd", "wide"]
    assert [solve_variant(90, "bf16", 1024, "bwd", rows) for rows in (few, many)] == ["bwd", "wide"]
    assert solve_variant(90, "fp16", 1024, "fwd", few) == "wide"  # by D alone: not timed
    assert solve_variant(80, "bf16", 4096, "fwd", many) == "fwd"  # which has one width

"""The solves whose far sums stay in the tensor cores, block inverses in registers, and both gradients in one launch: the error rule, and bad rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from feedback_cases import DEVICE, make, side, small_options
from rule import check

from sessa_deploy.kernels import reference
from sessa_deploy.kernels.feedback import backward as bwd
from sessa_deploy.kernels.feedback import forward as fwd
from sessa_deploy.kernels.launch.jit import Options

NEW = (fwd.DIRECT, fwd.STREAM, bwd.STREAM, bwd.TOGETHER)


def options(new: bool, backward: bool) -> Options:
    """Options with blocks of 128 rows; on a GPU the pinned ones."""
    small = side(small_options(torch.bfloat16, 128, 128), backward)
    if small is None:
        pinned = bwd.tiles(torch.device(DEVICE), torch.bfloat16, 32) if backward else fwd.tiles(torch.device(DEVICE), torch.bfloat16, 32)
        small = {name: o for name, o in pinned.items() if name not in NEW}
    solve = {k: v for k, v in small["feedback_solve_transposed" if backward else "feedback_solve"].items() if k not in ("SPLIT", "FULL", "LOW")}
    direct = {k: v for k, v in small["feedback_combine"].items() if k not in ("BT", "SPLIT")}
    more = {fwd.DIRECT: direct, (bwd if backward else fwd).STREAM: solve} | ({bwd.TOGETHER: small["feedback_grad_q"]} if backward else {})
    return {**small, **more} if new else small


@pytest.mark.parametrize("routing", ["random", "chain", "bad row"])
def test_the_error_rule_holds(routing: str) -> None:
    """Also where s grows and shrinks by more than its scale follows, where a row takes all its weight from one tile, and up to a row that is not finite."""
    batch, tokens, width, first_bad = 1, 400, 32, 300
    x = make("chain" if routing == "chain" else "random", batch, tokens, 0, width, torch.bfloat16)
    exact = reference.plain(*(y.double() if y.is_floating_point() else y for y in x))
    if routing == "random":
        x[3][:, 130:260] *= 1e4
        exact = reference.plain(*(y.double() if y.is_floating_point() else y for y in x))
    plain = reference.plain(*x)
    good = slice(0, tokens)
    if routing == "bad row":
        x[0][:, first_bad] = torch.nan
        good = slice(0, first_bad)
    s, lse, low = fwd.forward(*x, need_lse=True, options=options(True, False))
    check(s[:, good], exact[:, good], plain[:, good], torch.bfloat16, "s")
    assert good.stop == tokens or torch.isnan(s[:, first_bad]).all()
    ds = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, s.dtype)
    q, k, gamma, f, *behind = x
    got, want = (bwd.backward(ds, q, k, gamma, f, s, lse, low, *behind, options=options(new, True)) for new in (True, False))
    for name, a, b in zip(("dq", "dk", "dgamma", "df"), got, want, strict=False):
        assert torch.isfinite(a).all() and not a[:, good.stop :].any(), name
        assert float((a.float() - b.float()).norm()) <= 1e-2 * float(b.float().norm()), name


def test_a_past_and_panels_take_the_other_kernels() -> None:
    x = make("random", 1, 20, 9, 32, torch.bfloat16)
    plans = [fwd.Plan(x[0].device, x[0].dtype, 1, 300, past, 32, options(True, False), room) for past, room in ((0, 2**30), (9, 2**30), (0, 128 * 384 * 2))]
    assert [plan.stream for plan in plans] == [True, False, False]
    plans = [bwd.Plan(x[0].device, x[0].dtype, 1, 300, past, 32, options(True, True), room) for past, room in ((0, 2**30), (9, 2**30), (0, 128 * 384 * 4))]
    assert [plan.stream for plan in plans] == [True, False, False]
    assert [plan.run_together is not None for plan in plans] == [True, False, False]

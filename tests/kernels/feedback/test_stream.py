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


@pytest.mark.parametrize("routing", ["random", "chain", "large"])
def test_the_error_rule_holds(routing: str) -> None:
    batch, tokens, width = 1, 600, 32
    x = make(routing, batch, tokens, 0, width, torch.bfloat16)
    if routing == "random":
        x[3][:, 130:260] *= 1e4  # s grows and shrinks again: its scale must follow
    s, lse, low = fwd.forward(*x, need_lse=True, options=options(True, False))
    old = fwd.forward(*x, need_lse=True, options=options(False, False))
    ds = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, s.dtype)
    q, k, gamma, f, *behind = x
    got = bwd.backward(ds, q, k, gamma, f, s, lse, low, *behind, options=options(True, True))
    want = bwd.backward(ds, q, k, gamma, f, s, lse, low, *behind, options=options(False, True))
    exact = reference.plain(*(y.double() if y.is_floating_point() else y for y in x))
    plain = reference.plain(*x)
    check(s, exact, plain, torch.bfloat16, "s")
    assert float((s.float() - old[0].float()).norm() / old[0].float().norm()) < 4e-3
    for name, a, b in zip(("dq", "dk", "dgamma", "df"), got, want, strict=False):
        assert float((a.float() - b.float()).norm()) <= 1e-2 * float(b.float().norm()), name

"""The solves that take row blocks in twos give the bits of those that take one at a time; so do both gradients in one launch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from feedback_cases import DEVICE, make, side, small_options

from sessa_deploy.kernels.feedback import backward as bwd
from sessa_deploy.kernels.feedback import forward as fwd
from sessa_deploy.kernels.launch.jit import Options


def options(paired: bool, backward: bool) -> Options:
    """Options of bfloat16 whose solve reads the high half of s alone; on a GPU the pinned ones."""
    small = side(small_options(torch.bfloat16), backward)
    if small is None:
        pinned = bwd.tiles(torch.device(DEVICE), torch.bfloat16, 32) if backward else fwd.tiles(torch.device(DEVICE), torch.bfloat16, 32)
        small = {name: o for name, o in pinned.items() if name not in (fwd.PAIR, bwd.PAIR, bwd.TOGETHER)}
        solve = small["feedback_solve_transposed" if backward else "feedback_solve"]
    else:
        solve = {**small["feedback_solve"], "LOW": False}
        small |= {"feedback_solve": solve, "feedback_solve_transposed": solve}
    pair = {k: v for k, v in solve.items() if k not in ("SPLIT", "FULL", "LOW")}
    more = {bwd.PAIR: pair, bwd.TOGETHER: small["feedback_grad_q"]} if backward else {fwd.PAIR: pair}
    return {**small, **more} if paired else small


@pytest.mark.parametrize("batch, tokens, past, rows, bad", [(2, 64, 0, None, False), (1, 45, 0, None, True), (1, 16, 20, None, False), (1, 70, 0, 48, False)],
                         ids=("twos", "odd, a bad row", "a past", "panels"))  # fmt: skip
def test_pairs_change_no_bit(batch: int, tokens: int, past: int, rows: int | None, bad: bool) -> None:
    tile = 16 if DEVICE == "cpu" else 128
    tokens, past = tokens * tile // 16, past * tile // 16
    x = make("random", batch, tokens, past, 32, torch.bfloat16)
    if bad:
        x[3][0, tokens // 2] = torch.nan
    bytes_ = 2**30 if rows is None else 2 * batch * rows * tile // 16 * (-(-tokens // (2 * tile)) * 2 * tile)
    one, two = (fwd.forward(*x, need_lse=True, options=options(paired, False), panel_bytes=bytes_) for paired in (False, True))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b) if not bad else torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    s, lse, low = one
    ds = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, s.dtype)
    q, k, gamma, f, *behind = x
    grads = [bwd.backward(ds, q, k, gamma, f, s, lse, low, *behind, options=options(paired, True), panel_bytes=2 * bytes_) for paired in (False, True)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)

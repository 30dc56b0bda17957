"""Block inverses in registers against those of the error rule's oracle: the whole forward and backward with blocks of 128 rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from feedback_cases import DEVICE, make, side, small_options

from sessa_deploy.kernels.feedback import backward as bwd
from sessa_deploy.kernels.feedback import forward as fwd
from sessa_deploy.kernels.launch.jit import Options


def options(direct: bool, backward: bool) -> Options:
    """Options with blocks of 128 rows; on a GPU the pinned ones."""
    small = side(small_options(torch.bfloat16, 128, 128), backward)
    if small is None:
        pinned = bwd.tiles(torch.device(DEVICE), torch.bfloat16, 32) if backward else fwd.tiles(torch.device(DEVICE), torch.bfloat16, 32)
        small = {name: o for name, o in pinned.items() if name not in (fwd.PAIR, bwd.PAIR, fwd.DIRECT)}
    combine = small["feedback_combine"]
    return {**small, fwd.DIRECT: {k: v for k, v in combine.items() if k not in ("BT", "SPLIT")}} if direct else small


@pytest.mark.parametrize("routing, past, bad", [("random", 0, False), ("chain", 130, False), ("random", 0, True)], ids=str)
def test_both_combinations_agree(routing: str, past: int, bad: bool) -> None:
    batch, tokens, width = 1, 333, 32
    x = make(routing, batch, tokens, past, width, torch.bfloat16)
    if bad:
        x[0][0, 200] = torch.nan
    first, second = (fwd.forward(*x, need_lse=True, options=options(direct, False)) for direct in (False, True))
    good = slice(0, 200 if bad else tokens)
    for a, b in zip(first[:2], second[:2], strict=True):
        assert torch.equal(torch.isfinite(a), torch.isfinite(b))
        torch.testing.assert_close(a[:, good], b[:, good], rtol=1e-2, atol=1e-3 * float(a[:, good].float().abs().max()))
    s, lse, low = first
    ds = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, s.dtype)
    q, k, gamma, f, *behind = x
    grads = [bwd.backward(ds, q, k, gamma, f, s, lse, low, *behind, options=options(direct, True)) for direct in (False, True)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3 * float(a.float().abs().max()) if a.numel() else 0.0)

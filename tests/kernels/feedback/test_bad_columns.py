"""Columns of D are systems of their own: what is not finite in one moves no bit of another, forward and backward, whichever kernel solves."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from feedback_cases import DEVICE, make, side, small_options, with_stand_ins

from sessa_deploy.kernels.feedback import backward as bwd
from sessa_deploy.kernels.feedback import forward as fwd
from sessa_deploy.kernels.feedback.spec import solve_variant
from sessa_deploy.kernels.launch.jit import Options, arch_of

TOKENS, ROW, COLUMN = 520, 130, 3  # more blocks behind the bad row than the nearest two
WIDTH, WIDE = 24, 4096  # columns that share a tile; on a GPU those of the solve in two halves
KINDS = [(torch.float32, ""), (torch.float16, ""), (torch.bfloat16, ""), (torch.bfloat16, "one"), (torch.bfloat16, "two"), (torch.bfloat16, "alone")]


def options_of(dtype: torch.dtype, form: str, backward: bool) -> Options | None:
    """form: of the solve in halves; "": other kernels solve."""
    stand_ins, changes = form != "", {"TWO": form == "two", "ALONE": form == "alone"}
    small = small_options(dtype, 128, 128) if stand_ins else small_options(dtype, 64, 64)
    found = side(with_stand_ins(small) if stand_ins else small, backward)
    return found and {name: {**o, **{n: value for n, value in changes.items() if n in o}} for name, o in found.items()}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype, form", KINDS)
def test_a_bad_value_stays_in_its_column(dtype: torch.dtype, form: str, value: float) -> None:
    width = WIDE if form == "two" and DEVICE == "cuda" else WIDTH
    if width == WIDE:
        assert solve_variant(arch_of(0), "bf16", width, "fwd", TOKENS) == ("wide" if arch_of(0) == 90 else "fwd")
    q, k, gamma, f, *behind = make("random", 1, TOKENS, 0, width, dtype)
    f[..., (COLUMN + 16) % width] *= 64  # the largest of its tile, in the other half of it where there are two
    others = torch.arange(width, device=DEVICE) != COLUMN

    def whole(f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return fwd.forward(q, k, gamma, f, *behind, options=options_of(dtype, form, False))

    def df(ds: torch.Tensor) -> torch.Tensor:
        return bwd.backward(ds, q, k, gamma, f, s, lse, low, *behind, options=options_of(dtype, form, True))[3]

    s, lse, low = whole(f)
    bad = f.clone()
    bad[0, ROW, COLUMN] = value
    found = whole(bad)[0]
    assert not found[0, ROW:, COLUMN].isfinite().any() and torch.equal(found[0, :ROW], s[0, :ROW])
    assert torch.equal(found[..., others], s[..., others])

    ds = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(s)
    ds[..., (COLUMN + 16) % width] *= 64
    clean, bad = df(ds), ds.clone()
    bad[0, -ROW, COLUMN] = value
    found = df(bad)
    assert not found[0, -ROW, COLUMN].isfinite()
    assert torch.equal(found[..., others], clean[..., others])

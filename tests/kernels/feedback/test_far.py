"""Rows that attend to rows far before them alone: what rounding takes from s must not add up on the way from block to block."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from feedback_cases import DEVICE, Inputs, side, small_options
from rule import check

from sessa_deploy.kernels import reference
from sessa_deploy.kernels.feedback import forward as fwd

WIDTH = 32


def distant(tokens: int, gap: int, kinds: int, turns: bool) -> Inputs:
    """Every row attends to those that are of its kind, t % kinds, or with kinds = 0 to the one `gap` rows ahead of it alone. turns: f changes its sign."""
    make = torch.Generator().manual_seed(4)
    keys = torch.nn.functional.normalize(torch.randn(kinds or tokens, WIDTH, generator=make), dim=-1) * (300.0 * math.sqrt(WIDTH)) ** 0.5
    at = torch.arange(tokens)
    k = keys[at % kinds] if kinds else keys
    q = k if kinds else keys[(at - gap).clamp(min=0)]
    f = (0.9 + 0.2 * torch.rand(tokens, WIDTH, generator=make)) * (1 - 2 * (at // gap % 2))[:, None].pow(int(turns))
    none = torch.zeros(1, 0, WIDTH, dtype=torch.float16, device=DEVICE)
    q, k, f = (x[None].half().to(DEVICE) for x in (q, k, f))
    return q, k, torch.full((1, tokens), 0.999, device=DEVICE), f, none, none, torch.zeros(1, dtype=torch.int32, device=DEVICE)


def solve(x: Inputs) -> torch.Tensor:
    return fwd.forward(*x, need_lse=False, options=side(small_options(torch.float16), False))[0]


@pytest.mark.parametrize("gap, kinds, turns", [(40, 0, True), (35, 3, False)], ids=["one", "a third"])
def test_rows_at_a_distance(gap: int, kinds: int, turns: bool) -> None:
    """To one row alone, or to all of a kind alike."""
    scale = 8 if DEVICE == "cuda" else 1
    x = distant(150 * scale, gap * scale, kinds, turns)
    exact, plain = reference.plain(*(t.double() if t.is_floating_point() else t for t in x)), reference.plain(*x)
    check(solve(x), exact, plain)

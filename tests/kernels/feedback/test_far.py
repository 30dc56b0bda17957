"""What a row takes of s from far blocks in float16: its low half too where a weight is heavy, a float16 where all are light."""

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


@pytest.mark.parametrize("gap, kinds, turns", [(40, 0, True), (40, 0, False), (35, 3, True)], ids=["one, f turns", "one", "a third"])
def test_rows_at_a_distance(gap: int, kinds: int, turns: bool) -> None:
    """One weight of 1, and weights that come to 1/64 from above as a row has more of its kind before it."""
    scale = 8 if DEVICE == "cuda" else 1
    x = distant(200 * scale, gap * scale, kinds, turns)
    exact, plain = reference.plain(*(t.double() if t.is_floating_point() else t for t in x)), reference.plain(*x)
    check(solve(x), exact, plain)


def test_a_heavy_row_changes_no_bit_of_the_light_ones_beside_it() -> None:
    scale = 8 if DEVICE == "cuda" else 1
    x = distant(120 * scale, 40 * scale, 1, True)
    light = solve(x)
    q = x[0].clone()
    q[:, -1] = 0  # still light: every weight alike
    assert torch.equal(solve((q, *x[1:]))[:, :-1], light[:, :-1])
    k = x[1].clone()
    k[:, 3] *= -1  # then no row but the last, whose query is turned too, has a weight for it
    still, q = solve((x[0], k, *x[2:])), x[0].clone()
    q[:, -1] *= -1
    heavy = solve((q, k, *x[2:]))
    assert torch.equal(heavy[:, :-1], still[:, :-1])
    assert (heavy[:, -1] - still[:, -1]).abs().max() > 0.1

"""Rotary tables stay exact at far positions in float32."""

from __future__ import annotations

import pytest
import torch

from sessa_deploy.rope import MAX_POSITION, rope_tables, rotate


@pytest.mark.parametrize("head_dim", [2, 16, 64, 256])
def test_float32_tables_match_float64_far_out(head_dim: int) -> None:
    at = torch.tensor([[0, 1, 2, 1000, 4097, 32768, 100_003, MAX_POSITION - 1]])
    exact, ours = rope_tables(at, head_dim, torch.float64), rope_tables(at, head_dim, torch.float32)
    for a, b in zip(exact, ours, strict=True):
        assert b.dtype == torch.float32 and b.shape == (1, at.shape[1], 1, head_dim // 2)
        assert float((a - b).abs().max()) < 1e-6


def test_rotation_turns_interleaved_pairs() -> None:
    x = torch.arange(8.0, dtype=torch.float64).reshape(1, 1, 1, 8)
    cos, sin = rope_tables(torch.tensor([[3]]), 8, torch.float64)
    want = torch.view_as_real(torch.view_as_complex(x.reshape(4, 2)) * torch.complex(cos, sin).reshape(4)).reshape(8)
    torch.testing.assert_close(rotate(x, cos, sin).reshape(8), want)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    def score(i: int, j: int) -> float:
        a, b = (rotate(x, *rope_tables(torch.tensor([[t]]), 32, torch.float64)) for x, t in ((q, i), (k, j)))
        return float((a * b).sum())
    assert score(7, 3) == pytest.approx(score(1007, 1003), rel=1e-9)

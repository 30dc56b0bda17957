"""A mixer's step of several rows, both attentions at a time, against plain torch in float64: on a GPU, or through Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from rule import check  # noqa: E402

from sessa_deploy.kernels import reference  # noqa: E402
from sessa_deploy.kernels.engine import mixer_rows  # noqa: E402
from sessa_deploy.kernels.engine.spec import rows_variant  # noqa: E402
from sessa_deploy.kernels.launch.jit import Workspace, interpreted  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")
SHARED = ("weight", "bias")
PASTS = ("past_k", "past_v", "past_kb", "past_s")


def case(heads: int, kv_heads: int, d: int, capacity: int, lengths: list[int], tokens: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    """Arguments of `mixer_rows.step`; rows beyond each length are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    batch, width = len(lengths), heads * d
    made = {"q": random(batch, 16, heads, d), "k": random(batch, 16, kv_heads, d), "v": random(batch, 16, kv_heads, d),
            "past_k": random(batch, capacity, kv_heads, d), "past_v": random(batch, capacity, kv_heads, d), "weight": random(width, width, scale=width**-0.5),
            "bias": random(width), "q_b": random(batch, 16, width), "k_b": random(batch, 16, width), "gamma": 2 * torch.rand(batch, 16, generator=generator) - 1,
            "past_kb": random(batch, capacity, width), "past_s": random(batch, capacity, width),
            "past_length": torch.tensor(lengths, dtype=torch.int32)}  # fmt: skip
    for name in PASTS:
        for b, n in enumerate(lengths):
            made[name][b, n:] = torch.nan
    return first({name: x.to(DEVICE) for name, x in made.items()}, tokens)


def first(a: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The same arguments with that many of their new rows."""
    return {name: x if name in (*PASTS, *SHARED, "past_length") else x[:, :tokens].contiguous() for name, x in a.items()}


def mixed(a: dict[str, Any], work: torch.dtype) -> torch.Tensor:
    """s (B,T,D) of the textbook computation in `work`, o and f rounded as the kernels round them, s as `reference.plain` does."""
    rows, storage = [], a["q"].dtype
    for b, n in enumerate(a["past_length"].tolist()):
        q, k, v, past_k, past_v = (a[x][b].to(work) for x in ("q", "k", "v", "past_k", "past_v"))
        tokens, group = q.shape[0], q.shape[1] // k.shape[1]
        keys, values = (torch.cat(x).repeat_interleave(group, 1) for x in ((past_k[:n], k), (past_v[:n], v)))
        seen = torch.arange(n + tokens, device=q.device)[None] <= n + torch.arange(tokens, device=q.device)[:, None]
        weight = (torch.einsum("thd,jhd->htj", q, keys) * q.shape[2] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        o = torch.einsum("htj,jhd->thd", weight, values).to(storage).to(work).flatten(1)
        rows.append((o @ a["weight"].to(work).T + a["bias"].to(work)).to(storage))
    f = torch.stack(rows)
    names = ("q_b", "k_b", "gamma", "past_kb", "past_s")
    q_b, k_b, gamma, past_kb, past_s = (torch.nan_to_num(a[x]) for x in names)
    inputs = (q_b, k_b, gamma, f, past_kb, past_s, a["past_length"])
    return reference.recurrence(*inputs) if work == torch.float64 else reference.plain(*inputs)


SHAPES = [
    (4, 4, 64, 40, [40, 0, 7], 5),  # a full, an empty and a short sequence
    (8, 2, 64, 70, [70, 13], 16),  # four query heads a key
    (2, 1, 128, 20, [20, 3], 2),  # two query heads a key
    (3, 3, 24, 33, [33, 1], 11),  # narrower than any tile
    (4, 4, 64, 700, [700, 400], 3),  # many splits
    (1, 1, 16, 2100, [2100], 9),  # longer than all splits together have at least: each takes more
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_of_several_rows(shape: tuple[Any, ...]) -> None:
    a = case(*shape)
    check(mixer_rows.step(**a), mixed(a, torch.float64), mixed(a, torch.float32), scale=None)

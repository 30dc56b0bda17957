"""Cases of a step of several rows and their truth (a support module, no tests)."""

from __future__ import annotations

from typing import Any

import torch

from sessa_deploy.kernels import reference

SHARED = ("weight", "bias")
PASTS = ("past_k", "past_v", "past_kb", "past_s")


def case(heads: int, kv_heads: int, d: int, capacity: int, lengths: list[int], tokens: int, device: str, seed: int = 0,
         dtype: torch.dtype = torch.float16) -> dict[str, Any]:  # fmt: skip
    """Arguments of `mixer_rows.step`; rows beyond each length are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    batch, width = len(lengths), heads * d
    made = {"q": random(batch, 16, heads, d), "k": random(batch, 16, kv_heads, d), "v": random(batch, 16, kv_heads, d),
            "past_k": random(batch, capacity, kv_heads, d), "past_v": random(batch, capacity, kv_heads, d), "weight": random(width, width, scale=width**-0.5),
            "bias": random(width), "q_b": random(batch, 16, width), "k_b": random(batch, 16, width),
            "gamma": 2 * torch.rand(batch, 16, generator=generator) - 1,
            "past_kb": random(batch, capacity, width), "past_s": random(batch, capacity, width),
            "past_length": torch.tensor(lengths, dtype=torch.int32)}  # fmt: skip
    for name in PASTS:
        for b, n in enumerate(lengths):
            made[name][b, n:] = torch.nan
    return first({name: x.to(device) for name, x in made.items()}, tokens)


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

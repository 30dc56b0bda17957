"""The slow truth: the recurrence token by token in float64, and `plain`, the yardstick of rounding error."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor) -> Tensor:
    """Feedback attention one token at a time, in float64.

    s_t = f_t + gamma_t * sum_j alpha[t,j] s_j, alpha the softmax of q_t . k_j * D^-1/2 over past rows j < past_length[b] and
    new rows j < t; alpha = 0 for a row with no predecessor (arXiv 2604.18580, section 3).

    q, k, f: (B,T,D). gamma: (B,T). past_k, past_s: (B,P,D). past_length: (B,) integers <= P. Returns s (B,T,D), float64.
    """
    q, k, gamma, f, past_k, past_s = (x.double() for x in (q, k, gamma, f, past_k, past_s))
    batch, tokens, width = q.shape
    s = torch.empty_like(f)
    for b in range(batch):
        past = int(past_length[b])
        keys, values = past_k[b, :past], past_s[b, :past]
        for t in range(tokens):
            s[b, t] = f[b, t]
            if len(keys):
                alpha = torch.softmax(keys @ q[b, t] * width**-0.5, dim=0)
                s[b, t] += gamma[b, t] * (alpha @ values)
            keys, values = torch.cat([keys, k[b, t : t + 1]]), torch.cat([values, s[b, t : t + 1]])
    return s


def routing(q: Tensor, k: Tensor, past_k: Tensor, past_length: Tensor) -> Tensor:
    """alpha (B,T,P+T) of feedback attention in q's dtype: rows are new tokens, columns past rows and then new rows.

    Zero where there is nothing to attend to: past j >= past_length[b], new j >= t. Poisoned past keys never reach it.
    """
    batch, tokens, width = q.shape
    capacity = past_k.shape[1]
    live = torch.arange(capacity, device=q.device) < past_length.to(q.device)[:, None]  # (B,P)
    keys = torch.cat([torch.where(live[..., None], past_k, 0.0), k], dim=1)
    row = torch.arange(tokens, device=q.device)
    mask = torch.cat([live[:, None].expand(batch, tokens, capacity), (row < row[:, None]).expand(batch, tokens, tokens)], dim=2)
    scores = torch.einsum("btd,bjd->btj", q, keys) * width**-0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    peak = scores.amax(-1, keepdim=True) if mask.shape[-1] else scores.new_zeros(batch, tokens, 1)
    weight = torch.exp(scores - peak.masked_fill(peak == -torch.inf, 0.0)).masked_fill(~mask, 0.0)
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0 * total)


def plain(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor) -> Tensor:
    """The textbook computation: einsum, softmax, gamma, triangular solve in float32 (float64 for float64), s rounded once.

    The yardstick of error: a fast path passes when its error against float64 is at most twice this one's plus a floor.
    Differentiable. Shapes as in `recurrence`; s comes back in q's dtype.
    """
    storage = q.dtype
    work = torch.float64 if storage == torch.float64 else torch.float32
    q, k, gamma, f, past_k, past_s = (x.to(work) for x in (q, k, gamma, f, past_k, past_s))
    capacity, tokens = past_k.shape[1], q.shape[1]
    weight = gamma[..., None] * routing(q, k, past_k, past_length)  # (B,T,P+T)
    live = torch.arange(capacity, device=q.device) < past_length.to(q.device)[:, None]
    rhs = f + weight[..., :capacity] @ torch.where(live[..., None], past_s, 0.0)
    eye = torch.eye(tokens, dtype=work, device=q.device)
    return torch.linalg.solve_triangular(eye - weight[..., capacity:], rhs, upper=False, unitriangular=True).to(storage)


def plain_causal(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> Tensor:
    """Causal attention with a cache, textbook form, in float32 (float64 for float64), rounded once. Differentiable.

    q: (B,T,Hq,d). k, v: (B,T,Hkv,d). past_k, past_v: (B,P,Hkv,d). past_length: (B,). Returns o (B,T,Hq,d) in q's dtype.
    """
    storage = q.dtype
    work = torch.float64 if storage == torch.float64 else torch.float32
    batch, tokens, heads, width = q.shape
    capacity, kv_heads = past_k.shape[1], k.shape[2]
    live = torch.arange(capacity, device=q.device) < past_length.to(q.device)[:, None]
    select = live[..., None, None]
    keys = torch.cat([torch.where(select, past_k.to(work), 0.0), k.to(work)], dim=1)
    values = torch.cat([torch.where(select, past_v.to(work), 0.0), v.to(work)], dim=1)
    row = torch.arange(tokens, device=q.device)
    mask = torch.cat([live[:, None].expand(batch, tokens, capacity), (row <= row[:, None]).expand(batch, tokens, tokens)], dim=2)
    grouped = q.to(work).unflatten(2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("bthgd,bjhd->bhgtj", grouped, keys) * width**-0.5
    alpha = torch.softmax(scores.masked_fill(~mask[:, None, None], -torch.inf), dim=-1)
    return torch.einsum("bhgtj,bjhd->bthgd", alpha, values).flatten(2, 3).to(storage)

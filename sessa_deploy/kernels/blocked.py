"""Blocked feedback and causal attention whose work is matrix products: the CPU path, and the fallback on other devices.

A block of rows at a time: its routing weights (rows x columns seen so far), one product with the solved rows before it, one small
triangular solve. Workspace is block x (P+T), never T x T. Everything is float32 (float64 for float64); s is rounded once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def work_dtype(storage: torch.dtype) -> torch.dtype:
    """The dtype of every accumulation for a storage dtype: float64 for float64, else float32."""
    return torch.float64 if storage == torch.float64 else torch.float32


def first_bad_row(*tensors: Tensor) -> Tensor | None:
    """Index (B,) of the first row of each sequence that holds NaN or Inf in any of the (B,T,...) tensors, T where none; None if all are finite."""
    # The sum is finite if every element is, so the common case costs one cheap reduction; overflow only costs the exact look.
    if all(bool(torch.isfinite(x.sum(dtype=work_dtype(x.dtype)))) for x in tensors):
        return None
    batch, tokens = tensors[0].shape[:2]
    bad = torch.zeros(batch, tokens, dtype=torch.bool, device=tensors[0].device)
    for x in tensors:
        bad |= ~torch.isfinite(x).reshape(batch, tokens, -1).all(-1)
    index = torch.where(bad, torch.arange(tokens, device=bad.device), tokens)
    return index.amin(-1) if tokens else None


def _rows(x: Tensor, keep: Tensor | None) -> Tensor:
    """x with the rows that are not kept (B,T) replaced by zeros, by selection."""
    return x if keep is None else torch.where(keep.view(*keep.shape, *(1,) * (x.dim() - 2)), x, 0.0)


def _live_past(past_length: Tensor, capacity: int) -> tuple[Tensor | None, int]:
    """Mask (B,P) of live past rows, None if all rows up to the returned common extent are live."""
    if capacity == 0:
        return None, 0
    if past_length.device.type == "cpu":
        longest = min(int(past_length.max()), capacity)
        if int(past_length.min()) >= longest:
            return None, longest
        capacity = longest
    live = torch.arange(capacity, device=past_length.device) < past_length[:, None]
    return live, capacity


def _weights(scores: Tensor, live: Tensor | None, past: int, start: int, strict: bool) -> tuple[Tensor, Tensor]:
    """Softmax in place of scores (..., rows, past + columns) under the past mask and the causal one; returns (alpha, lse).

    Rows are new tokens start..; a column past + j is seen by row t when j < t (strict) or j <= t. alpha is 0 and lse -inf where nothing is seen.
    """
    rows, columns = scores.shape[-2], scores.shape[-1] - past
    if live is not None:
        shape = (live.shape[0], *(1,) * (scores.dim() - 2), past)
        scores[..., :past].masked_fill_(~live.view(shape), -torch.inf)
    row = torch.arange(start, start + rows, device=scores.device)[:, None]
    column = torch.arange(start, columns, device=scores.device)
    scores[..., past + start :].masked_fill_(column >= row if strict else column > row, -torch.inf)
    # Subtracting the log-sum-exp instead of the maximum would cost eps * |score|: relative error that large logits amplify.
    peak = scores.amax(-1, keepdim=True)
    scores -= torch.where(peak == -torch.inf, 0.0, peak)
    total = scores.exp_().sum(-1, keepdim=True)
    scores /= torch.where(total == 0, 1.0, total)
    return scores, (peak + torch.log(total)).squeeze(-1)


def feedback_forward(
    q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """s (B,T,D) in q's dtype and lse (B,T) in the work dtype. Shapes and meaning as in `ops.feedback_attention`."""
    batch, tokens, width = q.shape
    work, scale = work_dtype(q.dtype), width**-0.5
    first_bad = first_bad_row(q, k, gamma, f)
    keep = None if first_bad is None else torch.arange(tokens, device=q.device) < first_bad[:, None]
    live, past = _live_past(past_length, past_k.shape[1])
    old_k, old_s = (_rows(x[:, :past], live).to(work) for x in (past_k, past_s))
    query, key, gain, rhs = (_rows(x, keep).to(work) for x in (q, k, gamma, f))
    s = torch.empty(batch, tokens, width, dtype=work, device=q.device)
    lse = torch.empty(batch, tokens, dtype=work, device=q.device)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        rows = query[:, start:stop] * scale
        scores = rows.new_empty(batch, stop - start, past + stop)
        if past:
            torch.matmul(rows, old_k.mT, out=scores[..., :past]) if batch == 1 else scores[..., :past].copy_(rows @ old_k.mT)
        torch.matmul(rows, key[:, :stop].mT, out=scores[..., past:]) if batch == 1 else scores[..., past:].copy_(rows @ key[:, :stop].mT)
        alpha, lse[:, start:stop] = _weights(scores, live, past, start, strict=True)
        alpha *= gain[:, start:stop, None]
        total = rhs[:, start:stop] + (alpha[..., :past] @ old_s if past else 0.0)
        if start:
            total = torch.baddbmm(total, alpha[..., past : past + start], s[:, :start])
        diagonal = alpha[..., past + start :].neg_()  # only its strict lower half is read
        s[:, start:stop] = torch.linalg.solve_triangular(diagonal, total, upper=False, unitriangular=True)
    if keep is not None:
        s = torch.where(keep[..., None], s, torch.nan)
    return s.to(q.dtype), lse


def feedback_backward(
    ds: Tensor, q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, s: Tensor, lse: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dgamma, df, dpast_k, dpast_s) of `feedback_forward`, recomputing the routing from lse.

    u = (I - B)^-T ds is df; with r[t,j] = u_t . s_j: dgamma_t = sum_j alpha r, and the score's gradient is gamma alpha (r - dgamma_t).
    Rows from a sequence's first non-finite one on get gradient 0 and contribute none.
    """
    tokens, width = q.shape[1:]
    work, scale = work_dtype(q.dtype), width**-0.5
    first_bad = first_bad_row(q, k, gamma, f, s)
    keep = None if first_bad is None else torch.arange(tokens, device=q.device) < first_bad[:, None]
    live, past = _live_past(past_length, past_k.shape[1])
    old_k, old_s = (_rows(x[:, :past], live).to(work) for x in (past_k, past_s))
    query, key, gain, value, u = (_rows(x, keep).to(work) for x in (q, k, gamma, s, ds))
    u = u.clone()
    dq, dk, dgamma = torch.empty_like(query), torch.zeros_like(key), torch.empty_like(gain)
    dpast_k, dpast_s = (torch.zeros(x.shape, dtype=work, device=q.device) for x in (past_k, past_s))
    starts = range(0, tokens, block)
    for start in reversed(starts):
        stop = min(start + block, tokens)
        rows = query[:, start:stop] * scale
        scores = rows @ torch.cat([old_k, key[:, :stop]], dim=1).mT
        alpha, _ = _weights(scores, live, past, start, strict=True)
        gain_rows = gain[:, start:stop, None]
        diagonal = -(gain_rows * alpha[..., past + start :]).mT
        u[:, start:stop] = torch.linalg.solve_triangular(diagonal, u[:, start:stop], upper=True, unitriangular=True)
        u_rows = u[:, start:stop]
        weighted = (gain_rows * alpha).mT  # (B, past + stop, rows)
        if start:
            u[:, :start] += weighted[:, past : past + start] @ u_rows
        dpast_s[:, :past] += weighted[:, :past] @ u_rows
        r = u_rows @ torch.cat([old_s, value[:, :stop]], dim=1).mT
        dgain = (alpha * r).sum(-1)
        dgamma[:, start:stop] = dgain
        dscore = alpha.mul_(r.sub_(dgain[..., None])).mul_(gain_rows * scale)
        dq[:, start:stop] = dscore[..., :past] @ old_k + dscore[..., past:] @ key[:, :stop]
        dpast_k[:, :past] += dscore[..., :past].mT @ query[:, start:stop]
        dk[:, :stop] += dscore[..., past:].mT @ query[:, start:stop]
    dq, dk, u, dgamma = (_rows(x, keep) for x in (dq, dk, u, dgamma))
    return dq.to(q.dtype), dk.to(k.dtype), dgamma.to(gamma.dtype), u.to(f.dtype), dpast_k.to(past_k.dtype), dpast_s.to(past_s.dtype)


def causal_forward(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor, block: int = BLOCK) -> Tensor:
    """o (B,T,Hq,d) in q's dtype. Shapes and meaning as in `ops.causal_attention`."""
    tokens, heads, width = q.shape[1:]
    kv_heads = k.shape[2]
    first_bad = first_bad_row(k, v)
    keep = None if first_bad is None else torch.arange(tokens, device=q.device) < first_bad[:, None]
    live, past = _live_past(past_length, past_k.shape[1])
    work, scale = work_dtype(q.dtype), width**-0.5
    # (B,Hkv,1,rows,d): query heads of a group share their key/value head by broadcasting.
    old_k, old_v = (_rows(x[:, :past], live).to(work).transpose(1, 2)[:, :, None] for x in (past_k, past_v))
    key, value = (_rows(x, keep).to(work).transpose(1, 2)[:, :, None] for x in (k, v))
    query = q.to(work).unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)  # (B,Hkv,g,T,d)
    out = torch.empty(query.shape, dtype=work, device=q.device)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        rows = query[..., start:stop, :] * scale
        new = rows @ key[..., :stop, :].mT
        scores = torch.cat([rows @ old_k.mT, new], dim=-1) if past else new
        alpha, _ = _weights(scores, live, past, start, strict=False)
        product = alpha[..., past:] @ value[..., :stop, :]
        out[..., start:stop, :] = product + alpha[..., :past] @ old_v if past else product
    result = out.permute(0, 3, 1, 2, 4).flatten(2, 3)
    if keep is not None:
        result = torch.where(keep[..., None, None], result, torch.nan)
    return result.to(q.dtype).contiguous()


def causal_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor, block: int = BLOCK
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dpast_k, dpast_v) of `causal_forward`, recomputing the weights block by block."""
    tokens, width = q.shape[1], q.shape[3]
    kv_heads = k.shape[2]
    first_bad = first_bad_row(q, k, v)
    keep = None if first_bad is None else torch.arange(tokens, device=q.device) < first_bad[:, None]
    live, past = _live_past(past_length, past_k.shape[1])
    work, scale = work_dtype(q.dtype), width**-0.5

    def split(x: Tensor) -> Tensor:  # (B,T,H,d) -> (B,Hkv,g,T,d)
        return x.to(work).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)

    def merge(x: Tensor, like: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2, 4).flatten(2, 3).to(like.dtype).contiguous()

    old_k, old_v = (split(_rows(x[:, :past], live)) for x in (past_k, past_v))
    query, key, value, grad = (split(_rows(x, keep)) for x in (q, k, v, do))
    dq = torch.empty_like(query)
    dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
    dold_k, dold_v = (torch.zeros_like(split(x)) for x in (past_k, past_v))
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        rows, g = query[..., start:stop, :], grad[..., start:stop, :]
        keys = torch.cat([old_k, key[..., :stop, :]], dim=-2)
        values = torch.cat([old_v, value[..., :stop, :]], dim=-2)
        alpha, _ = _weights(rows @ keys.mT * scale, live, past, start, strict=False)
        dvalues = (alpha.mT @ g).sum(2, keepdim=True)
        dalpha = g @ values.mT
        dscore = alpha * (dalpha - (alpha * dalpha).sum(-1, keepdim=True)) * scale
        dq[..., start:stop, :] = dscore @ keys
        dkeys = (dscore.mT @ rows).sum(2, keepdim=True)
        dold_k[..., :past, :] += dkeys[..., :past, :]
        dold_v[..., :past, :] += dvalues[..., :past, :]
        dkey[..., :stop, :] += dkeys[..., past:, :]
        dvalue[..., :stop, :] += dvalues[..., past:, :]
    return merge(dq, q), _rows(merge(dkey, k), keep), _rows(merge(dvalue, v), keep), merge(dold_k, past_k), merge(dold_v, past_v)

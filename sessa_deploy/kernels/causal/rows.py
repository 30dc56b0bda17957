"""Rows of keys and values that are not finite, one pass each on a GPU: selected away before PyTorch's own attention, made NaN behind it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.launch.jit import aligned, launch, spaced
from sessa_deploy.kernels.launch.passes import cdiv, tiles


@triton.jit(do_not_specialize=["N", "T", "d8", "k8", "v8"])
def fused_clean(k, v, k_out, v_out, first_bad, N, T, d8, k8, v8, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (row tiles,), BD >= D: rows of k and v (B T, D), 8 k8 and 8 v8 elements apart, copied; a row with NaN or Inf in either as zeros in both.

    first_bad (B,) int32 becomes the least t of such a row, if there is one.
    """
    D = d8 * 8
    o_r, o_d = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BD)
    m_r = o_r < N
    m_x = m_r[:, None] & (o_d < D)[None, :]
    b_k = tl.load(k + o_r[:, None] * (k8 * 8) + o_d[None, :], mask=m_x, other=0.0)
    b_v = tl.load(v + o_r[:, None] * (v8 * 8) + o_d[None, :], mask=m_x, other=0.0)
    m_fine = (tl.abs(b_k.to(tl.float32)) < float("inf")) & (tl.abs(b_v.to(tl.float32)) < float("inf"))
    m_bad = tl.max(tl.where(m_fine, 0, 1), axis=1) > 0
    tl.store(k_out + o_r[:, None] * D + o_d[None, :], tl.where(m_bad[:, None], 0.0, b_k), mask=m_x)
    tl.store(v_out + o_r[:, None] * D + o_d[None, :], tl.where(m_bad[:, None], 0.0, b_v), mask=m_x)
    tl.atomic_min(first_bad + o_r // T, (o_r % T).to(tl.int32), mask=m_bad & m_r)


@triton.jit(do_not_specialize=["N", "T", "d8"])
def fused_poison(x, first_bad, N, T, d8, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (row tiles,): rows t >= first_bad[b] of x (B T, D) become NaN; others are not touched."""
    D = d8 * 8
    o_r = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    m_r = o_r < N
    m_bad = m_r & ((o_r % T) >= tl.load(first_bad + o_r // T, mask=m_r, other=0))
    if tl.max(m_bad.to(tl.int32), axis=0) > 0:
        for start in range(0, D, BD):
            o_d = start + tl.arange(0, BD)
            b_nan = tl.full([BT, BD], float("nan"), dtype=tl.float32).to(x.dtype.element_ty)
            tl.store(x + o_r[:, None] * D + o_d[None, :], b_nan, mask=m_bad[:, None] & (o_d < D)[None, :])


def clean_rows(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of k and v (B,T,H,d) whose non-finite rows are zeros in both, and (B,) int32: the first such row, T where there is none."""
    batch, tokens = k.shape[:2]
    (k_rows, k_row), (v_rows, v_row) = spaced(k.flatten(2)), spaced(v.flatten(2))
    width, n = k.shape[2] * k.shape[3], batch * tokens
    k_out, v_out = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    first_bad = torch.full((batch,), tokens, dtype=torch.int32, device=k.device)
    row = tiles("row", width)
    launch(fused_clean, (cdiv(n, row["BT"]),), (k_rows, v_rows, k_out, v_out, first_bad, n, tokens, width // 8, k_row // 8, v_row // 8), row)
    return k_out, v_out, first_bad


def poison_rows(x: Tensor, first_bad: Tensor) -> Tensor:
    """x (B,T,H,d) with NaN from each sequence's first_bad row on; in place where x is contiguous."""
    batch, tokens = x.shape[:2]
    rows, flat = aligned(x), tiles("flat")
    launch(fused_poison, (cdiv(batch * tokens, flat["BT"]),), (rows, first_bad, batch * tokens, tokens, x.shape[2] * x.shape[3] // 8), flat)
    return rows

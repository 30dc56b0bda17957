"""Rows of keys, values and caches on a GPU in one pass each: bad ones selected away or made NaN, new ones appended to a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sessa_deploy.kernels import ops
from sessa_deploy.kernels.fused import cdiv, rows_of, spaced


def clean_rows(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of k and v (B,T,H,d) whose non-finite rows are zeros in both, and (B,) int32: the first such row, T where there is none."""
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, tiles

    batch, tokens = k.shape[:2]
    (k_rows, k_row), (v_rows, v_row) = spaced(k.flatten(2)), spaced(v.flatten(2))
    width, n = k.shape[2] * k.shape[3], batch * tokens
    k_out, v_out = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    first_bad = torch.full((batch,), tokens, dtype=torch.int32, device=k.device)
    row = tiles("row", width)
    launch(fk.fused_clean, (cdiv(n, row["BT"]),), (k_rows, v_rows, k_out, v_out, first_bad, n, tokens, width // 8, k_row // 8, v_row // 8), row)
    return k_out, v_out, first_bad


def poison_rows(x: Tensor, first_bad: Tensor) -> Tensor:
    """x (B,T,H,d) with NaN from each sequence's first_bad row on; in place where x is contiguous."""
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, tiles

    batch, tokens = x.shape[:2]
    rows, flat = rows_of(x, x.dtype), tiles("flat")
    launch(fk.fused_poison, (cdiv(batch * tokens, flat["BT"]),), (rows, first_bad, batch * tokens, tokens, x.shape[2] * x.shape[3] // 8), flat)
    return rows


def appends(rows: Sequence[Tensor]) -> bool:
    """Whether `append_rows` takes these new rows (B,T,*)."""
    return ops.is_eager(*rows) and ops.uses_triton(rows[-1]) and all(x.shape[2:].numel() % 8 == 0 for x in rows)


def append_rows(rows: Sequence[Tensor], stores: Sequence[Tensor], length: Tensor, new_length: Tensor | None) -> None:
    """Write row t < new_length[b] (every row where None) of k_f, v_f (B,T,Hkv,d), k_b and s (B,T,D) to row length[b] + t of their stores (B,capacity,*)."""
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, more

    batch, tokens = rows[0].shape[:2]
    new, apart = zip(*(spaced(x.flatten(2)) for x in rows), strict=True)
    widths = (new[0].shape[-1] // 8, new[-1].shape[-1] // 8)
    launch(fk.fused_append, (tokens, batch, len(new)),
           (*new, *stores, length, length if new_length is None else new_length, tokens, stores[0].shape[1], *widths, *(r // 8 for r in apart)),
           more("append", ALL=new_length is None))  # fmt: skip

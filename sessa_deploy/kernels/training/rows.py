"""New rows of a cache on a GPU, all four tensors in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sessa_deploy.kernels import route
from sessa_deploy.kernels.launch.jit import launch, spaced
from sessa_deploy.kernels.launch.passes import more


def appends(rows: Sequence[Tensor]) -> bool:
    """Whether `append_rows` takes these new rows (B,T,*)."""
    return route.is_eager(*rows) and route.uses_triton(rows[-1]) and all(x.shape[2:].numel() % 8 == 0 for x in rows)


def append_rows(rows: Sequence[Tensor], stores: Sequence[Tensor], length: Tensor, new_length: Tensor | None) -> None:
    """Write row t < new_length[b] (every row where None) of k_f, v_f (B,T,Hkv,d), k_b and s (B,T,D) to row length[b] + t of their stores (B,capacity,*)."""
    from sessa_deploy.kernels.training import elementwise

    batch, tokens = rows[0].shape[:2]
    new, apart = zip(*(spaced(x.flatten(2)) for x in rows), strict=True)
    widths = (new[0].shape[-1] // 8, new[-1].shape[-1] // 8)
    launch(elementwise.fused_append, (tokens, batch, len(new)),
           (*new, *stores, length, length if new_length is None else new_length, tokens, stores[0].shape[1], *widths, *(r // 8 for r in apart)),
           more("append", ALL=new_length is None))  # fmt: skip

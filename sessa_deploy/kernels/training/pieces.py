"""The memory of a layer's forward and backward as one node (whole.py): what is kept from one to the other, and what goes no further."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sessa_deploy.kernels import route
from sessa_deploy.kernels.training.regions import Entered

if TYPE_CHECKING:
    from sessa_deploy.kernels.training.plan import Plan


class Kept(NamedTuple):
    """What the backward needs of the forward: of `enter`, then s and rest (B,T,D; what rounding took from s, None where nothing is kept), lse (B,T) float32,
    and the rows gated = s g (N,D). Of the forward attention where it is fused: o (B,T,H,d), its float32 sums (B H T,) and a seed that nobody reads."""

    entered: Entered
    s: Tensor
    lse: Tensor
    gated: Tensor
    rest: Tensor | None
    o: Tensor | None
    o_lse: Tensor | None
    seed: Tensor | None


class Early(NamedTuple):
    """What the backward up to the forward attention's needs for itself: rows of the gradients of y and of s g (N,D), ds and df (B,T,D)."""

    rows: Tensor
    gated: Tensor
    s: Tensor
    f: Tensor
    workspace: Tensor
    sync: Tensor


class Between(NamedTuple):
    """What goes on from there: dh (N,2D), the partial sums, the gradients of o, q_b and k_b (B,T,D) and gamma (B,T)."""

    h: Tensor
    partial: Tensor
    o: Tensor
    q_b: Tensor
    k_b: Tensor
    gamma: Tensor


class Pieces:
    """The memory of a plan's calls. projects: whether there is an out_proj; fused: whether the forward attention is one operator, `ops.fuses`."""

    def __init__(self, p: Plan, projects: bool, fused: bool) -> None:
        from sessa_deploy.kernels.training.plan import Memory

        f32, i32, i64, byte, rows, shape, dtype = torch.float32, torch.int32, torch.int64, torch.uint8, (p.rows, p.width), p.shape, p.dtype
        self.plan, self.fused = p, fused
        self.forward: Any = None
        self.backward: Any = None
        forward_bytes = backward_bytes = sync = 0
        if _kernels(p):
            self.forward, self.backward = route.feedback_plans(p.device, dtype, shape)
            forward_bytes, backward_bytes, sync = self.forward.workspace.bytes, self.backward.workspace.bytes, self.backward.sync
        wide, projected = ((p.rows, 2 * p.width), dtype), (shape if projects else (0,), dtype)
        by_rows, cast = (rows, dtype), (rows if p.y_dtype != dtype else (0, p.width), dtype)
        # not qkv where a graph keeps it: PyTorch looks whether that was written to since, and does not tell views of one allocation apart
        kept = {name: part for name, part in p.entered.items() if fused or name != "qkv"}
        kept |= {"s": (shape, dtype), "lse": (shape[:2], f32), "gated": by_rows}
        kept |= {"rest": (shape, dtype)} if self.forward is not None and self.forward.low else {}
        kept |= {"o": (p.q_shape, dtype), "o_lse": ((p.rows * p.q_shape[2],), f32), "seed": ((1,), i64)} if fused else {}
        self.kept = Memory(kept)
        self.passing = Memory({"f": projected, "sums": cast, "workspace": ((forward_bytes,), byte)})
        self.early = Memory({"rows": cast, "gated": by_rows, "s": (shape, dtype), "f": projected, "workspace": ((backward_bytes,), byte),
                             "sync": ((sync,), i32)})  # fmt: skip
        self.between = Memory({"h": wide, "partial": ((p.chunks, p.total), f32), "o": (shape, dtype), "q_b": (shape, dtype), "k_b": (shape, dtype),
                               "gamma": (shape[:2], f32)})  # fmt: skip
        self.late = Memory({"joined": ((p.rows, p.joined), dtype), "da": by_rows, "dy": by_rows})
        self.sums = Memory({"exact": ((p.total,), f32), "rounded": ((p.total,), dtype)})
        self.weights = [*p.split, 2 * p.width, p.width, p.width][: 6 + projects]  # rows of the gradients of q, k, v, fb, W_in, W_out, out_proj
        self.lse_shape: tuple[int, ...] = ()  # of the forward attention's float32 sums, which the first forward sees

    def views(self, kept: Tensor, qkv: Tensor | None) -> Kept:
        """Of the memory that the backward needs. qkv: where it is no part of that."""
        found = dict(zip(self.kept.names, self.kept.views(kept), strict=True))
        entered = Entered(*[found.get(name, qkv) for name in Entered._fields])  # type: ignore[arg-type]
        return Kept(entered, *[found.get(name) for name in Kept._fields[1:]])  # type: ignore[arg-type]

    def heads(self, kept: Tensor, qkv: Tensor | None) -> tuple[Tensor, ...]:
        """q (B,T,Hq,d), k, v (B,T,Hkv,d) of the same."""
        return Entered.heads(self.kept.view(kept, "qkv") if qkv is None else qkv, self.plan)

    def allocate_early(self, device: torch.device) -> Tensor:
        """Memory for `early`, and then for `late`, which is written when nothing of the other is read any more."""
        return torch.empty(max(self.early.bytes, self.late.bytes), dtype=torch.uint8, device=device)


def _kernels(p: Plan) -> bool:
    """Whether feedback attention's kernels run; elsewhere the blocked path of PyTorch stands in for them."""
    return p.device.type == "cuda"


pieces_of = functools.lru_cache(maxsize=256)(Pieces)

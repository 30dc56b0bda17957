"""The loss of a language model: mean nats of its targets. On a GPU one pass over 16-bit logits forward and one backward, none of them kept in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_deploy.kernels import ops, route
from sessa_deploy.kernels.launch.jit import aligned, launch
from sessa_deploy.kernels.launch.passes import tiles


def mean_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] over all tokens, a float32 scalar (float64 for float64). logits: (B,T,V); targets: (B,T) int64 in 0..V-1."""
    rows, at = logits.flatten(0, -2), targets.flatten()
    if _fits(rows, at):
        loss: Tensor = _MeanNats.apply(rows, at)
        return loss
    return F.cross_entropy(rows if rows.dtype == torch.float64 else rows.float(), at)


def _fits(rows: Tensor, at: Tensor) -> bool:
    """Whether the kernels take rows (N,V) of logits and targets (N,): 16 bits on a GPU, eager, V a multiple of 8."""
    if not (rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16) and at.dtype == torch.int64 and rows.numel()):
        return False
    return rows.shape[1] % 8 == 0 and route.is_eager(rows, at) and route.may_use_triton()


class _MeanNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, at):  # type: ignore[no-untyped-def]
        from sessa_deploy.kernels.training import elementwise

        rows, at = aligned(rows), aligned(at)
        count, width = rows.shape
        lse, nats = (torch.empty(count, dtype=torch.float32, device=rows.device) for _ in range(2))
        launch(elementwise.fused_nats, (count,), (rows, at, lse, nats, width // 8), tiles("logits"))
        ctx.save_for_backward(rows, at, lse)
        return nats.mean()

    @staticmethod
    @ops.once
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        from sessa_deploy.kernels.training import elementwise

        rows, at, lse = ctx.saved_tensors
        out = torch.empty_like(rows)
        each = (grad.float() / rows.shape[0]).reshape(1)
        launch(elementwise.fused_nats_grad, (rows.shape[0],), (rows, at, lse, aligned(each), out, rows.shape[1] // 8), tiles("logits"))
        return out, None

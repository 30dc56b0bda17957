"""Who takes which path: the Triton kernels on a GPU, PyTorch's own attention, or the blocked PyTorch path. Kernels are imported where they are taken."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from sessa_deploy.contract import STEP_ROWS
from sessa_deploy.kernels import blocked
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.limits import FEEDBACK_MAX_WIDTH, FEEDBACK_MULTIPLE, HEAD_MAX_WIDTH, HEAD_MULTIPLE, MAX_GRID, ROWS_HEADS, ROWS_WIDTHS
from sessa_deploy.kernels.replay import queue

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # storage types that have kernels
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # not asked in a call: torch.compile cannot trace the question


def may_use_triton() -> bool:
    """Whether Triton is there and SESSA_TRITON=0 does not turn it off."""
    return _HAS_TRITON and os.environ.get("SESSA_TRITON") != "0"


def uses_triton(q: Tensor) -> bool:
    """Whether feedback attention on q (B,T,D) runs the Triton kernels: CUDA, at most 32 bits, D a multiple of 16 up to 4096.

    SESSA_TRITON=0 in the environment turns them off: the blocked PyTorch path then runs on the GPU, slower, to compare with.
    """
    width = q.shape[-1]
    return q.is_cuda and q.dtype != torch.float64 and width % FEEDBACK_MULTIPLE == 0 and width <= FEEDBACK_MAX_WIDTH and may_use_triton()


def keeps_rest(q: Tensor) -> bool:
    """Whether the forward keeps for the backward what rounding to 16 bits took from s (the PyTorch path works without)."""
    return q.dtype in (torch.float16, torch.bfloat16) and uses_triton(q)


def steps_rows(q: Tensor, capacity: int) -> bool:
    """Whether new rows q (B,T,..) over a past of `capacity` rows are a step of several rows for their number and storage."""
    return 2 <= q.shape[1] <= STEP_ROWS and capacity > 0 and q.dtype in (torch.float16, torch.bfloat16)


def feedback_steps_rows(q: Tensor, capacity: int) -> bool:
    """Whether feedback attention on q (B,T,D) takes the kernels of a step of several rows: where they are wide enough and the GPU has the memory they need."""
    if not steps_rows(q, capacity) or q.shape[2] > ROWS_WIDTHS[-1]:
        return False
    from sessa_deploy.kernels.launch.jit import available

    return available("feedback_rows_partial", q.device, q.dtype, table.width_variant("feedback_rows_partial", q.shape[2]))


def is_eager(*tensors: Tensor) -> bool:
    """Whether nothing looks on that needs the registered operators: no tracing, no dispatch or functorch mode, no forward-mode derivatives, no subclass."""
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and is_plain(*tensors)
    )


def is_exporting() -> bool:
    """Whether a graph is exported, and not compiled. Up to torch 2.11 Dynamo answers PyTorch's own question with yes in every graph that it traces; the flag
    behind it is right."""
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def has_tangents(*tensors: Tensor) -> bool:
    """Whether a forward-mode derivative is taken through one of them. Kernels and registered operators would drop it without a word."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_plain(*tensors: Tensor) -> bool:
    """Whether none of them is of a subclass."""
    return _PLAIN.issuperset([type(x) for x in tensors])


def feedback_forward(
    q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor, need_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """s (B,T,D); lse (B,T) and the rest of s (B,T,D), see `keeps_rest`, where a backward will want them. Inputs within the contract of `ops`."""
    if q.numel() == 0:
        return torch.empty_like(f), gamma.new_empty(gamma.shape), torch.empty_like(f) if keeps_rest(q) else None
    if not uses_triton(q):
        return *blocked.feedback_forward(q, k, gamma, f, past_k, past_s, past_length), None
    if q.shape[1] == 1 and not need_lse:
        from sessa_deploy.kernels.feedback import step

        return step.step(q, k, gamma, f, past_k, past_s, past_length), None, None
    if not need_lse and feedback_steps_rows(q, past_k.shape[1]):
        from sessa_deploy.kernels.feedback import step_rows

        return step_rows.step(q, k, gamma, f, past_k, past_s, past_length), None, None
    from sessa_deploy.kernels.feedback import forward

    return forward.forward(q, k, gamma, f, past_k, past_s, past_length, need_lse, replay=queue)


def feedback_backward(
    ds: Tensor, q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, s: Tensor, lse: Tensor, rest: Tensor | None,
    past_k: Tensor, past_s: Tensor, past_length: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, gamma, f, past_k and past_s, of what `feedback_forward` took and gave."""
    ds = ds.contiguous()
    if q.numel() == 0:
        return q.clone(), k.clone(), gamma.clone(), f.clone(), torch.zeros_like(past_k), torch.zeros_like(past_s)
    if uses_triton(q):
        from sessa_deploy.kernels.feedback import backward

        return backward.backward(ds, q, k, gamma, f, s, lse, rest, past_k, past_s, past_length, replay=queue)
    return blocked.feedback_backward(ds, q, k, gamma, f, s, lse, past_k, past_s, past_length)


def feedback_plans(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The plans of the kernels' forward and backward for q (B,T,D) of this shape without a past, for callers that own the memory."""
    from sessa_deploy.kernels.feedback import backward, forward

    return forward.plan_of(device, dtype, shape), backward.plan_of(device, dtype, shape)


def feedback_call(*arguments: Any) -> Any:
    """`feedback.forward.Call`."""
    from sessa_deploy.kernels.feedback import forward

    return forward.Call(*arguments)


def feedback_queue_backward(*arguments: Any) -> None:
    """`feedback.backward.queue`."""
    from sessa_deploy.kernels.feedback import backward

    backward.queue(*arguments)


def causal_kernels_take(q: Tensor) -> bool:
    """Whether the kernels with a cache take q (B,T,Hq,d): at most 32 bits, d a multiple of 8 up to 256, batch and heads within the grid's limits."""
    batch, _, heads, width = q.shape
    return q.dtype in FLOATS and width % HEAD_MULTIPLE == 0 and 0 < width <= HEAD_MAX_WIDTH and batch <= MAX_GRID and heads <= MAX_GRID


def causal_kernels(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> Tensor:
    """o (B,T,Hq,d) by the Triton kernels, for inputs that `causal_kernels_take` accepts: the decode step for one new row, that of several for a few,
    tiles for more."""
    if q.shape[1] == 1:
        from sessa_deploy.kernels.causal import step

        return step.step(q, k, v, past_k, past_v, past_length)
    if steps_rows(q, past_k.shape[1]) and q.shape[3] <= ROWS_HEADS[-1]:
        from sessa_deploy.kernels.causal import step_rows

        return step_rows.step(q, k, v, past_k, past_v, past_length)
    from sessa_deploy.kernels.causal import prefill

    return prefill.prefill(q, k, v, past_k, past_v, past_length)


def causal_forward(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> Tensor:
    """o (B,T,Hq,d). Inputs within the contract of `ops`."""
    if q.numel() == 0:
        return torch.empty_like(q)
    if q.is_cuda and past_k.shape[1] == 0:
        return _causal_sdpa(q, k, v)
    if q.is_cuda and may_use_triton() and causal_kernels_take(q):
        return causal_kernels(q, k, v, past_k, past_v, past_length)
    return blocked.causal_forward(q, k, v, past_k, past_v, past_length)


def _causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Bad rows are selected away without asking the device: a fused kernel multiplies masked rows by zero, and 0 * NaN is NaN.
    width = k.shape[2] * k.shape[3]
    quick = k.dtype != torch.float64 and width % 8 == q.shape[3] % 8 == 0 and width <= FEEDBACK_MAX_WIDTH and may_use_triton()
    if quick:
        from sessa_deploy.kernels.causal import rows

        k, v, first_bad = rows.clean_rows(k, v)
    else:
        bad = ~(torch.isfinite(k) & torch.isfinite(v)).all(-1).all(-1)  # (B,T)
        k, v = (torch.where(bad[..., None, None], 0.0, x) for x in (k, v))
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.shape[2] != k.shape[2])
    if quick:
        return rows.poison_rows(o.transpose(1, 2), first_bad)
    return torch.where(bad.cumsum(-1)[..., None, None] > 0, torch.nan, o.transpose(1, 2)).contiguous()

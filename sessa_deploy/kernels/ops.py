"""The two ops as torch.library operators: one contract for prefill, decode, chunked prefill and ragged batches.

`torch.ops.sessa.feedback_attention` and `torch.ops.sessa.causal_attention` are what the exported graph holds. The functions of the same names
here fill in an empty past and, when a gradient is wanted, call the training twin that also keeps the log-sum-exp for the backward.
A non-finite new row makes itself and at most the later rows of its own sequence non-finite; earlier rows and other sequences stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sessa_deploy.kernels import blocked, route
from sessa_deploy.kernels.route import has_tangents, is_eager, is_exporting

STORAGE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TRAINING_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _require(ok: bool, what: str, got: object) -> None:
    if not ok:
        raise ValueError(f"sessa: {what}, got {got}")


def _check_devices(q: Tensor, **others: Tensor) -> None:
    for name, x in others.items():
        _require(x.device == q.device, f"{name} must be on q's device {q.device}", x.device)


def _check_past(like: Tensor, row: tuple[int, ...], past_length: Tensor, **past: Tensor) -> None:
    batch, capacity = like.shape[0], next(iter(past.values())).shape[1]
    for name, x in past.items():
        _require(tuple(x.shape) == (batch, capacity, *row), f"{name} must have shape {(batch, 'P', *row)}", tuple(x.shape))
        _require(x.dtype == like.dtype, f"{name} must have the storage dtype {like.dtype}", x.dtype)
    _require(tuple(past_length.shape) == (batch,), f"past_length must have shape ({batch},)", tuple(past_length.shape))
    _require(past_length.dtype in (torch.int32, torch.int64), "past_length must be int32", past_length.dtype)


def _fits(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor) -> bool:
    """Whether plain inputs are within the contract, in few microseconds: messages are made only where this says no."""
    shape, dtype = q.shape, q.dtype
    past = past_k.shape
    return (
        dtype in STORAGE and dtype == k.dtype == f.dtype == past_k.dtype == past_s.dtype and gamma.dtype == torch.float32
        and len(shape) == 3 and shape == k.shape == f.shape and gamma.shape == shape[:2] and past == past_s.shape and len(past) == 3
        and past[0] == shape[0] and past[2] == shape[2] and past_length.shape == shape[:1] and past_length.dtype == torch.int32
        and q.device == k.device == gamma.device == f.device == past_k.device == past_s.device == past_length.device
    )  # fmt: skip


def _check_feedback(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor) -> None:
    if _fits(q, k, gamma, f, past_k, past_s, past_length):
        return
    _require(q.dim() == 3, "q must be (B,T,D)", tuple(q.shape))
    _require(q.dtype in STORAGE, "q must be float64, float32, float16 or bfloat16", q.dtype)
    for name, x in (("k", k), ("f", f)):
        _require(x.shape == q.shape and x.dtype == q.dtype, f"{name} must match q {tuple(q.shape)} {q.dtype}", f"{tuple(x.shape)} {x.dtype}")
    _require(gamma.shape == q.shape[:2], f"gamma must have shape {tuple(q.shape[:2])}", tuple(gamma.shape))
    allowed = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    _require(gamma.dtype in allowed, "gamma must be float32, whatever the storage dtype (float64 is accepted beside float64 storage)", gamma.dtype)
    _check_past(q, (q.shape[2],), past_length, past_k=past_k, past_s=past_s)
    _check_devices(q, k=k, gamma=gamma, f=f, past_k=past_k, past_s=past_s, past_length=past_length)


def _check_causal(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> None:
    _require(q.dim() == 4 and k.dim() == 4, "q must be (B,T,Hq,d) and k (B,T,Hkv,d)", f"{tuple(q.shape)}, {tuple(k.shape)}")
    _require(q.dtype in STORAGE and k.dtype == q.dtype and v.dtype == q.dtype, "q, k and v must share a storage dtype", (q.dtype, k.dtype, v.dtype))
    _require(v.shape == k.shape, "v must have k's shape", tuple(v.shape))
    fits = k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3] and q.shape[2] % k.shape[2] == 0
    _require(fits, "k must be (B,T,Hkv,d) with Hq a multiple of Hkv", f"q {tuple(q.shape)}, k {tuple(k.shape)}")
    _check_past(k, tuple(k.shape[2:]), past_length, past_k=past_k, past_v=past_v)
    _check_devices(q, k=k, v=v, past_k=past_k, past_v=past_v, past_length=past_length)


def run_forward(
    q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor, need_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`route.feedback_forward` of inputs that were looked at. Raises ValueError outside the contract of `feedback_attention`."""
    _check_feedback(q, k, gamma, f, past_k, past_s, past_length)
    return route.feedback_forward(q, k, gamma, f, past_k, past_s, past_length, need_lse)


@torch.library.custom_op("sessa::feedback_attention", mutates_args=())
def _feedback_attention(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor) -> Tensor:
    return run_forward(q, k, gamma, f, past_k, past_s, past_length, need_lse=False)[0]


@torch.library.custom_op("sessa::feedback_attention_fwd", mutates_args=())
def _feedback_attention_fwd(
    q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    s, lse, rest = run_forward(q, k, gamma, f, past_k, past_s, past_length, need_lse=True)
    if lse is None:
        raise RuntimeError("sessa: the forward kernel returned no log-sum-exp")
    return s, lse, q.new_empty(0) if rest is None else rest


@torch.library.custom_op("sessa::feedback_attention_bwd", mutates_args=())
def _feedback_attention_bwd(
    ds: Tensor, q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, s: Tensor, lse: Tensor, rest: Tensor,
    past_k: Tensor, past_s: Tensor, past_length: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = route.feedback_backward(ds, q, k, gamma, f, s, lse, rest if rest.numel() else None, past_k, past_s, past_length)
    dpast_k, dpast_s = (x if x.numel() else torch.empty_like(x) for x in found[4:])  # an operator gives back nothing that it was given
    return *found[:4], dpast_k, dpast_s


@_feedback_attention.register_fake
def _(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_feedback_attention_fwd.register_fake
def _(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=blocked.work_dtype(q.dtype)), q.new_empty(q.shape if route.keeps_rest(q) else 0)


@_feedback_attention_bwd.register_fake
def _(
    ds: Tensor, q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, s: Tensor, lse: Tensor, rest: Tensor,
    past_k: Tensor, past_s: Tensor, past_length: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    new = [x.new_empty(x.shape) for x in (q, k, gamma, f, past_k, past_s)]
    return new[0], new[1], new[2], new[3], new[4], new[5]


def _save_feedback(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, gamma, f, past_k, past_s, past_length = inputs
    if isinstance(output, tuple):
        s, lse, rest = output
        ctx.mark_non_differentiable(lse, rest)
        ctx.save_for_backward(q, k, gamma, f, past_k, past_s, past_length, s, lse, rest)
    else:
        ctx.save_for_backward(q, k, gamma, f, past_k, past_s, past_length, output)


def _feedback_grad(ctx, ds: Tensor, *_: Tensor | None):  # type: ignore[no-untyped-def]
    q, k, gamma, f, past_k, past_s, past_length, s, *saved = ctx.saved_tensors
    lse, rest = saved or torch.ops.sessa.feedback_attention_fwd(q, k, gamma, f, past_k, past_s, past_length)[1:]
    return *torch.ops.sessa.feedback_attention_bwd(ds, q, k, gamma, f, s, lse, rest, past_k, past_s, past_length), None


_feedback_attention.register_autograd(_feedback_grad, setup_context=_save_feedback)
_feedback_attention_fwd.register_autograd(_feedback_grad, setup_context=_save_feedback)


def _causal_forward(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> Tensor:
    _check_causal(q, k, v, past_k, past_v, past_length)
    return route.causal_forward(q, k, v, past_k, past_v, past_length)


@torch.library.custom_op("sessa::causal_attention", mutates_args=())
def _causal_attention(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> Tensor:
    return _causal_forward(q, k, v, past_k, past_v, past_length)


@torch.library.custom_op("sessa::causal_attention_bwd", mutates_args=())
def _causal_attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if q.numel() == 0:
        return q.clone(), k.clone(), v.clone(), torch.zeros_like(past_k), torch.zeros_like(past_v)
    return blocked.causal_backward(do, q, k, v, past_k, past_v, past_length)


@_causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_causal_attention_bwd.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    new = [x.new_empty(x.shape) for x in (q, k, v, past_k, past_v)]
    return new[0], new[1], new[2], new[3], new[4]


def _save_causal(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _causal_grad(ctx, do: Tensor):  # type: ignore[no-untyped-def]
    return *torch.ops.sessa.causal_attention_bwd(do, *ctx.saved_tensors), None


_causal_attention.register_autograd(_causal_grad, setup_context=_save_causal)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A function's backward without a derivative of its own: to take one raises RuntimeError.

    As PyTorch's `once_differentiable`, but also where the gradient that comes in is a constant: the second derivative would be zero there without a word.
    """

    @functools.wraps(backward)
    def first(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        refuse = torch._C._functions.DelayedError(b"sessa: trying to differentiate twice what has a first derivative alone", len(found))
        ends: list[Any] = [None if x is None else x.detach().requires_grad_() for x in found]
        return refuse(*ends)

    return first


def _refuse_tangents(*tensors: Tensor) -> None:
    if has_tangents(*tensors):
        raise NotImplementedError("sessa: the attentions have no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use backward or vjp")


class _Direct(torch.autograd.Function):
    """Feedback attention without the dispatcher: custom operators cost hundreds of microseconds of host time a training step.

    made: what `run_forward` gave, before the node, which costs the host as much as several launches; past: where there is one, with its lengths.
    """

    @staticmethod
    def forward(ctx, made, q, k, gamma, f, *past):  # type: ignore[no-untyped-def]
        s, lse, rest = made
        ctx.save_for_backward(q, k, gamma, s, lse, rest, *past)
        return s

    @staticmethod
    @once
    def backward(ctx, ds):  # type: ignore[no-untyped-def]
        q, k, gamma, s, lse, rest, *past = ctx.saved_tensors
        # s stands for f: where f is not finite, s is not
        found = route.feedback_backward(ds, q, k, gamma, s, s, lse, rest, *(past or no_past(q, True)))
        return None, *found[:4], *((*found[4:], None) if past else ())


_NOTHING: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}


def no_past(q: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """An empty past_k and past_s (B,0,D) and past_length (B,) of zeros. keep: make them once a shape; calls only read them."""
    key = (q.device, q.dtype, q.shape[0], q.shape[-1])
    if keep and key in _NOTHING:
        return _NOTHING[key]
    captured = keep and q.is_cuda and torch.cuda.is_current_stream_capturing()  # zeros made now would appear in the graph's replays only
    with torch.inference_mode(False) if keep else nullcontext():
        past_k, past_s = (torch.empty(q.shape[0], 0, q.shape[-1], dtype=q.dtype, device=q.device) for _ in range(2))
        made = (past_k, past_s, torch.zeros(q.shape[0], dtype=torch.int32, device=q.device))
    if keep and not captured:
        if q.is_cuda:
            torch.cuda.current_stream(q.device).synchronize()  # another stream may be the next to read them
        _NOTHING[key] = made
    return made


def _wants_other_backend(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> bool:
    """Whether SDPA left to itself would not take cuDNN on a GPU; asking costs less than setting an order that is there already."""
    if not q.is_cuda or is_exporting():
        return False
    if torch.compiler.is_compiling():  # which cannot trace the question, and sets the order while it traces alone
        return True
    return torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=grouped) != SDPBackend.CUDNN_ATTENTION.value


def fuses(known: dict[Any, bool], heads: Callable[[], tuple[Tensor, ...]]) -> bool:
    """Whether causal attention without a past inside an autograd function is `attention_forward`, else a graph of its own: where `causal_attention` would
    take cuDNN too. known: answers of before, of the same shapes, type and device; heads: gives q (B,T,Hq,d) and k, v (B,T,Hkv,d), should it be asked again."""
    c = torch._C
    key = (_wants_other_backend, c._get_cudnn_enabled(), c._get_cudnn_sdp_enabled(), c._get_flash_sdp_enabled(), c._get_mem_efficient_sdp_enabled(),
           c._get_math_sdp_enabled(), tuple(c._get_sdp_priority_order()), c._get_deterministic_algorithms())  # fmt: skip
    found = known.get(key)
    if found is None:
        q, k, v = heads()
        other = not q.is_cuda or q.shape != k.shape or torch.are_deterministic_algorithms_enabled()
        found = known[key] = not (other or _wants_other_backend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), False))
    return found


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply` of eager calls, without its look for functorch's wrappers, which costs as much as a launch."""
    return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


def without_grad(call: Callable[..., Any], *inputs: Any) -> Any:
    """What `call` gives without gradients, where they are enabled: `torch.no_grad` for half of what that costs."""
    torch._C._set_grad_enabled(False)
    try:
        return call(*inputs)
    finally:
        torch._C._set_grad_enabled(True)


def attention_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o (B,T,H,d) of q, k, v (B,T,H,d), and the float32 sums that its backward takes. cuDNN's operator, called without what stands around it."""
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(*(x.transpose(1, 2) for x in (q, k, v)), None, True, 0.0, True, False)
    return o.transpose(1, 2), lse


def attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of what `attention_forward` took and gave. seed: any int64, for a dropout that there is not."""
    turned, tokens = [x.transpose(1, 2) for x in (do, q, k, v, o)], q.shape[1]
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
        *turned, lse, seed, seed, None, None, None, tokens, tokens, 0.0, True)  # fmt: skip
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    return dq, dk, dv


def _cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def feedback_attention(
    q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor | None = None, past_s: Tensor | None = None, past_length: Tensor | None = None
) -> Tensor:
    """s_t = f_t + gamma_t * sum_j alpha[t,j] s_j over past rows j < past_length[b] and new rows j < t (arXiv 2604.18580, section 3).

    q, k, f: (B,T,D) in a storage dtype (float64, float32, float16, bfloat16). gamma: (B,T) float32. past_k, past_s: (B,P,D) in the storage
    dtype, whose rows from past_length[b] on may hold any bits; past_length: (B,) int32. Without a past: prefill. alpha is the softmax with
    scale D^-0.5, zero for a row with no predecessor. Returns s (B,T,D) in the storage dtype; differentiable in everything but past_length.
    Under autocast the storage dtype is autocast's. Raises ValueError on shapes or dtypes outside this contract, and NotImplementedError where a
    forward-mode derivative is taken.
    """
    behind = past_k is not None
    if past_k is None or past_s is None or past_length is None:
        _require(past_k is None and past_s is None and past_length is None, "past_k, past_s and past_length go together", "only some of them")
        eager = is_eager(q, k, gamma, f)
        q, k, f = _cast_for_autocast(q, k, f)
        past_k, past_s, past_length = no_past(q, eager)
    else:
        eager = is_eager(q, k, gamma, f, past_k, past_s, past_length)
        q, k, f, past_k, past_s = _cast_for_autocast(q, k, f, past_k, past_s)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, gamma, f, past_k, past_s))
    if eager:
        if wants_grad:
            made = without_grad(run_forward, q, k, gamma, f, past_k, past_s, past_length, True)
            return applied(_Direct, made, q, k, gamma, f, *((past_k, past_s, past_length) if behind else ()))
        return run_forward(q, k, gamma, f, past_k, past_s, past_length, need_lse=False)[0]
    _refuse_tangents(q, k, gamma, f, past_k, past_s)
    if wants_grad:
        return torch.ops.sessa.feedback_attention_fwd(q, k, gamma, f, past_k, past_s, past_length)[0]
    return torch.ops.sessa.feedback_attention(q, k, gamma, f, past_k, past_s, past_length)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None = None, past_v: Tensor | None = None, past_length: Tensor | None = None
) -> Tensor:
    """Causal softmax attention with a cache: new row t sees past rows j < past_length[b] and new rows j <= t, scale d^-0.5.

    q: (B,T,Hq,d). k, v: (B,T,Hkv,d), Hq a multiple of Hkv; q and k already rotated. past_k, past_v: (B,P,Hkv,d), whose rows from
    past_length[b] on may hold any bits; past_length: (B,) int32. Returns o (B,T,Hq,d) in the storage dtype. Differentiable.
    Training without a past goes through PyTorch's scaled_dot_product_attention. Raises ValueError on shapes or dtypes outside this contract, and
    NotImplementedError where a forward-mode derivative is taken behind a past.
    """
    q, k, v = _cast_for_autocast(q, k, v)
    if past_k is None or past_v is None or past_length is None:
        _require(past_k is None and past_v is None and past_length is None, "past_k, past_v and past_length go together", "only some of them")
        if (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))) or has_tangents(q, k, v):
            q_t, k_t, v_t = (x.transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[2] != k.shape[2]
            # cuDNN's kernels are the fastest on Hopper; they plan once a shape, which suits training. Where one does not apply the next is taken.
            with sdpa_kernel(_TRAINING_BACKENDS, set_priority=True) if _wants_other_backend(q_t, k_t, v_t, grouped) else nullcontext():
                o = F.scaled_dot_product_attention(q_t, k_t, v_t, is_causal=True, enable_gqa=grouped)
            return o.transpose(1, 2)
        past_k, past_v = (k.new_empty(k.shape[0], 0, *k.shape[2:]) for _ in range(2))
        past_length = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
    past_k, past_v = _cast_for_autocast(past_k, past_v)
    if is_eager(q, k, v, past_k, past_v, past_length) and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, past_k, past_v))):
        return _causal_forward(q, k, v, past_k, past_v, past_length)
    _refuse_tangents(q, k, v, past_k, past_v)
    return torch.ops.sessa.causal_attention(q, k, v, past_k, past_v, past_length)

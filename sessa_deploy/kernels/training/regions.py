"""A layer on a GPU as regions around its attentions, and the whole of it as one autograd node: fewer passes over the activations, fewer launches.

`head` goes from x to everything the attentions need (norm, W_in, GELU, gamma, the projections, rotary positions), `tail` from s to y (gate, W_out,
residual); `whole` is both and what stands between them, for training. Same parameters, same equations as the plain modules; the matrix products stay the
library's.
Projections of the same activations are joined, so that the backward is one product for the activations' gradient and one for the weights'.
Inside, activations are rows (N,*), N = B T, and what a shape decides is in its `Plan`: a view, a look-up or a key costs the host as much as a short kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_deploy.kernels import ops, route
from sessa_deploy.kernels.launch.jit import aligned
from sessa_deploy.kernels.training.beside import Beside
from sessa_deploy.kernels.training.form import Form, HeadWeights, Sums, Weights

if TYPE_CHECKING:
    from sessa_deploy.kernels.training.plan import Plan


class Head(NamedTuple):
    """q (B,T,Hq,d), k, v (B,T,Hkv,d), q and k rotated; q_b, k_b (B,T,D); gamma (B,T) float32; the rows h (N,2D), g in their right half; x as it came."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_b: Tensor
    k_b: Tensor
    gamma: Tensor
    h: Tensor
    x: Tensor


class Kept(NamedTuple):
    """What the backward needs of the forward up to the attentions, rows of x, y, a (N,D) and h (N,2D), the norm's stats (2,N) and gamma float32, in_weight
    (2D,D) and w (columns of q, k, v and the feedback branch's q and k, D) in the type of activations."""

    x: Tensor
    y: Tensor
    stats: Tensor
    h: Tensor
    a: Tensor
    gamma: Tensor
    in_weight: Tensor
    w: Tensor
    norm_weight: Tensor
    gamma_weight: Tensor
    cos: Tensor | None
    sin: Tensor | None


def storage_type(x: Tensor) -> torch.dtype:
    """The type activations are stored in: autocast's, or that of x."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def head(form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: HeadWeights) -> Head:
    """From x (B,T,D) to the attentions' inputs, without a backward. cos, sin: contiguous float32 tables (B or 1,T,1,d/2), or None."""
    p = _plan(form, cos, x, weights)
    kept, biases, _ = _enter_forward(p, cos, sin, x, weights)
    # the feedback branch's products are separate because feedback attention wants rows of its own
    (w_qkv, *w), (b_qkv, *b) = torch.split_with_sizes(kept.w, p.parts), torch.split_with_sizes(biases, p.parts)
    q, k, v = _qkv_forward(p, kept.a, w_qkv, b_qkv, cos, sin)
    q_b, k_b = (F.linear(kept.a, *pair).view(*p.shape) for pair in zip(w, b, strict=True))
    return Head(q, k, v, q_b, k_b, kept.gamma, kept.h, x)


def tail(form: Form, cos: Tensor | None, s: Tensor, head: Head, weights: Weights) -> Tensor:
    """x + (s g) W_out^T + b_out for s (B,T,D), without a backward. form, cos, weights: those of `head`."""
    bias = weights.head.out_bias
    bias = bias if bias.dtype == s.dtype else bias.to(s.dtype)
    return _tail_forward(_plan(form, cos, head.x, weights.head), aligned(head.x), aligned(s), head.h, aligned(weights.out, s.dtype), bias)[0]


def _plan(form: Form, cos: Tensor | None, x: Tensor, weights: HeadWeights) -> Plan:
    from sessa_deploy.kernels.training.plan import planned

    types = (storage_type(x), x.dtype, weights.norm_weight.dtype, weights.norm_bias.dtype)
    return planned(form, x.shape, 0 if cos is None else cos.shape[0] * x.shape[1], x.device, types)


def _enter_forward(
    p: Plan, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: HeadWeights, others: tuple[Tensor, ...] = ()
) -> tuple[Kept, Tensor, tuple[Tensor, ...]]:
    """From x to a and gamma: (what the backward needs, the projections' biases, `others` in the type of activations)."""
    dtype, device, n, width = p.dtype, x.device, p.rows, p.width
    rows, norm_weight = aligned(x), aligned(weights.norm_weight)
    y, stats = torch.empty((n, width), dtype=dtype, device=device), torch.empty((2, n), dtype=torch.float32, device=device)
    p.norm(rows, norm_weight, aligned(weights.norm_bias), y, stats)
    if any([x.dtype != dtype for x in (weights.in_weight, *others)]):  # all of one type, see `fused_layer.applies`
        in_weight, in_bias, w, b, *others = _cast(weights, others, dtype)  # type: ignore[assignment]  # the device has begun meanwhile
        h = F.linear(y, in_weight, in_bias)
    else:
        in_weight = aligned(weights.in_weight)
        h = F.linear(y, in_weight, weights.in_bias)
        w = torch.cat((weights.q_weight, weights.k_weight, weights.v_weight, weights.fb_weight))
        b = torch.cat((weights.q_bias, weights.k_bias, weights.v_bias, weights.fb_bias))
    gamma_weight, gamma_bias = aligned(weights.gamma_weight, torch.float32), aligned(weights.gamma_bias, torch.float32)
    a, gamma = torch.empty_like(y), torch.empty(p.shape[:2], dtype=torch.float32, device=device)
    p.gelu_gain(h, gamma_weight, gamma_bias, a, gamma)
    return Kept(rows, y, stats, h, a, gamma, in_weight, w, norm_weight, gamma_weight, cos, sin), b, tuple(others)


def _qkv_forward(p: Plan, a: Tensor, weight: Tensor, bias: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, ...]:
    """q (B,T,Hq,d), k, v (B,T,Hkv,d), q and k rotated."""
    qkv = F.linear(a, weight, bias)
    if p.rotate is not None:
        p.rotate(qkv, cos, sin)
    return torch.split_with_sizes(qkv.view(*p.heads_shape), p.heads, 2)  # type: ignore[no-any-return]


def _cast(weights: HeadWeights, others: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(W_in's weight, its bias, one copy of the projections' weights in the order q, k, v and the feedback branch's q and k, of their biases, others...), all
    in `dtype`."""
    w = (weights.q_weight, weights.k_weight, weights.v_weight, weights.fb_weight)
    b = (weights.q_bias, weights.k_bias, weights.v_bias, weights.fb_bias)
    parts = (weights.in_weight, weights.in_bias, *w, *b, *others)
    counts = [p.numel() for p in parts]
    memory = torch.empty(sum(counts), dtype=dtype, device=weights.in_weight.device)
    torch._foreach_copy_([x.view(p.shape) for x, p in zip(memory.split(counts), parts, strict=True)], parts)  # one launch, whatever the types
    in_weight, in_bias, joined, biases, *rest = memory.split([*counts[:2], sum(counts[2:6]), sum(counts[6:10]), *counts[10:]])
    width = weights.in_weight.shape[1]
    return in_weight.view(-1, width), in_bias, joined.view(-1, width), biases, *(x.view(p.shape) for x, p in zip(rest, others, strict=True))


def _head_backward(
    p: Plan, types: Any, needs: HeadWeights, kept: Kept, dh: Tensor, partial: Tensor, grads: tuple[Tensor, ...], dx: Tensor, weight_grad: Any
) -> tuple[Any, ...]:
    """Gradients of x and of the weights that need one. types: the weights', a HeadWeights; dh, partial: the tail's; grads: of q, k, v, q_b, k_b and gamma."""
    x, y, stats, h, a, gamma, in_weight, w, norm_weight, gamma_weight, cos, sin = kept
    dtype, device, width = p.dtype, h.device, p.width
    *parts, dgamma = grads
    joined = torch.empty((p.rows, p.joined), dtype=dtype, device=device)
    turns = (norm_weight, norm_weight) if cos is None else (cos, sin)  # not read where nothing turns
    p.gather(*[aligned(g, dtype) for g in parts], joined, *turns, partial)
    da = torch.mm(joined, w)
    projected = needs.q_weight or needs.k_weight or needs.v_weight or needs.fb_weight
    dw: Any = torch.split_with_sizes(weight_grad("joined", joined, a, types.q_weight), p.split) if projected else (None,) * 4
    p.gelu_gain_grad(h, da, gamma, aligned(dgamma, torch.float32), gamma_weight, dh, partial)
    dy = torch.mm(dh, in_weight)
    dw_in = weight_grad("in", dh, y, types.in_weight) if needs.in_weight else None
    dx_rows = torch.empty(p.shape, dtype=x.dtype, device=device)
    p.norm_grad(x, norm_weight, stats, dy, dx, dx_rows, partial)
    exact, rounded = torch.empty(p.total, dtype=torch.float32, device=device), torch.empty(p.total, dtype=dtype, device=device)
    p.add(partial, exact, rounded)

    # each in the type of its parameter, as far as that is one of the two
    pairs = zip(Sums._fields, torch.split_with_sizes(exact, p.sizes), torch.split_with_sizes(rounded, p.sizes), strict=True)
    sums = Sums(*[r if getattr(types, name) == dtype else e for name, e, r in pairs])
    out = (
        sums.norm_weight, sums.norm_bias, dw_in, sums.in_bias, sums.gamma_weight.view(1, width), sums.gamma_bias[0], dw[0], sums.q_bias, dw[1], sums.k_bias,
        dw[2], sums.v_bias, dw[3], sums.fb_bias, sums.out_bias,
    )  # fmt: skip
    return dx_rows, *(out if all(needs) else [g if need else None for g, need in zip(out, needs, strict=True)])


def _tail_forward(p: Plan, x: Tensor, s: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(y (B,T,D), the rows s g (N,D))."""
    gated = torch.empty((p.rows, p.width), dtype=s.dtype, device=s.device)
    p.gate(s, h[:, p.width :], gated)
    y = F.linear(gated, weight, bias).view(*p.shape)
    if y.dtype == x.dtype:
        return y.add_(x), gated
    out = torch.empty(p.shape, dtype=torch.promote_types(x.dtype, y.dtype), device=x.device)
    p.residual(x, y, out)  # PyTorch's is half as fast
    return out, gated


def _tail_backward(p: Plan, s: Tensor, h: Tensor, weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ds (B,T,D), dh (N,2D), partial of the rows (N,D) of y's gradient: g's gradient is the right half of dh, whose left half `_head_backward` fills, and its
    sums are in their columns of partial."""
    dgated, ds, dh = torch.mm(rows, weight), torch.empty_like(s), torch.empty_like(h)
    partial = torch.empty((p.chunks, p.total), dtype=torch.float32, device=s.device)
    p.gate_grad(dgated, s, h[:, p.width :], ds, dh, partial)
    return ds, dh, partial


BESIDE = frozenset(("routing", "pairs", "out", "project", "joined", "in"))


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, cos, sin, rows, x, out_proj, *weights):  # type: ignore[no-untyped-def]
        first, out = HeadWeights(*weights[:-1]), weights[-1]
        p = _plan(form, cos, x, first)
        others = (out, first.out_bias) if out_proj is None else (out, first.out_bias, out_proj)
        kept, biases, (out, bias, *projects) = _enter_forward(p, cos, sin, x, first, others)
        out, project, a = aligned(out), projects[0] if projects else None, kept.a
        beside = Beside(x.device) if "routing" in BESIDE else None
        (w_qkv, w_q, w_k), (b_qkv, b_q, b_k) = torch.split_with_sizes(kept.w, p.parts), torch.split_with_sizes(biases, p.parts)
        if beside is None:
            q_b, k_b = F.linear(a, w_q, b_q).view(*p.shape), F.linear(a, w_k, b_k).view(*p.shape)
        else:
            q_b, k_b = torch.empty(p.shape, dtype=p.dtype, device=x.device), torch.empty(p.shape, dtype=p.dtype, device=x.device)
            with beside:
                torch.addmm(b_q, a, w_q.t(), out=q_b.view(a.shape))
                torch.addmm(b_k, a, w_k.t(), out=k_b.view(a.shape))
        made = []

        def attend():  # type: ignore[no-untyped-def]  # the forward branch's f, beside the feedback branch's routing
            q, k, v = _qkv_forward(p, a, w_qkv, b_qkv, cos, sin)
            o, attention = ops.attention_forward(q, k, v)
            o = aligned(o, p.dtype).view(p.rows, p.width)
            made.append((q, k, v, o, attention))
            return (o if project is None else F.linear(o, project)).view(*p.shape)

        s, lse, rest = route.feedback_forward(q_b, k_b, kept.gamma, attend, *ops.no_past(q_b, True), need_lse=True, beside=beside)
        ((q, k, v, o, attention),) = made
        y, gated = _tail_forward(p, kept.x, s, kept.h, out, bias)
        ctx.save_for_backward(*kept, q, k, v, q_b, k_b, o, project, s, lse, rest, out, gated, *attention.tensors)
        ctx.plan, ctx.attention, ctx.types = p, attention.without(), [None if p is None else p.dtype for p in (out_proj, *weights)]
        ctx.set_materialize_grads(False)
        return (y, k, v, k_b, s) if rows else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *more):  # type: ignore[no-untyped-def]
        p, types, needs, saved = ctx.plan, ctx.types, ctx.needs_input_grad[5:], ctx.saved_tensors
        dk_more, dv_more, dk_b_more, ds_more = more or (None,) * 4
        kept = Kept(*saved[:12])
        q, k, v, q_b, k_b, o, project, s, lse, rest, out, gated, *attention = saved[12:]
        dy = torch.zeros_like(kept.x, dtype=torch.promote_types(kept.x.dtype, p.dtype)) if dy is None else aligned(dy)
        rows = aligned(dy, p.dtype).view(p.rows, p.width)
        beside = Beside(dy.device) if BESIDE else None

        def weights(name, dy, x, dtype):  # type: ignore[no-untyped-def]
            return weight_grad(dy, x, dtype, beside if name in BESIDE else None)

        ds, dh, partial = _tail_backward(p, s, kept.h, out, rows)
        dout = weights("out", rows, gated, types[-1]) if needs[-1] else None
        ds = ds if ds_more is None else ds + ds_more
        # s stands for f: where f is not finite, s is not
        feedback = (ds, q_b, k_b, kept.gamma, s, s, lse, rest, *ops.no_past(q_b, True))
        dq_b, dk_b, dgamma, df, *_ = route.feedback_backward(*feedback, beside=beside if "pairs" in BESIDE else None)
        df = df.view(p.rows, p.width)
        do = (df if project is None else torch.mm(df, project)).view(*p.q_shape)
        dproject = weights("project", df, o, types[0]) if needs[0] else None
        dq, dk, dv = ops.attention_backward(do, q, k, v, ctx.attention, attention)
        if "pairs" in BESIDE:
            beside.join()
        dk, dv, dk_b = (g if more is None else g + more for g, more in ((dk, dk_more), (dv, dv_more), (dk_b, dk_b_more)))
        grads = (dq, dk, dv, dq_b, dk_b, dgamma)
        dx, *first = _head_backward(p, HeadWeights(*types[1:-1]), HeadWeights(*needs[1:-1]), kept, dh, partial, grads, dy, weights)
        if beside is not None:
            beside.join()
        return None, None, None, None, dx, dproject, *first, dout


def whole(
    form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: Weights, out_proj: Tensor | None, rows: bool = True
) -> tuple[Tensor, ...]:
    """A layer without a past, for a backward: its y (B,T,D) and, with `rows`, its rows k, v (B,T,Hkv,d), k_b, s (B,T,D). cos, sin, x, weights: as `head` takes
    them; out_proj: its weight, None where it is the identity.

    W_out's bias is added to the same rows as x, so its gradient is that of x's residual summed over them.
    """
    found = _Whole.apply(form, cos, sin, rows, x, out_proj, *weights.head, weights.out)
    return found if rows else (found,)


def weight_grad(dy: Tensor, x: Tensor, dtype: torch.dtype, beside: Beside | None = None) -> Tensor:
    """dy^T x (columns, depth) for dy (N,columns), x (N,depth), as a parameter of `dtype` takes it: float32 beside 16-bit activations as it was summed.

    beside: the stream it is queued on, joined before dy or x are given up.
    """
    wider = dtype == torch.float32 and dy.dtype != dtype
    if beside is None:
        if wider:
            return torch.mm(dy.t(), x, out_dtype=dtype) if dy.is_cuda else torch.mm(dy.t().float(), x.float())
        return torch.mm(dy.t(), x)
    out = torch.empty((dy.shape[1], x.shape[1]), dtype=dtype if wider else x.dtype, device=x.device)
    with beside:
        if wider and dy.is_cuda:
            torch.mm(dy.t(), x, out_dtype=dtype, out=out)
        else:
            torch.mm(dy.t().to(out.dtype), x.to(out.dtype), out=out)
    beside.keep(dy, x)
    return out

"""A layer on a GPU as regions around its attentions, and the whole of it as one autograd node: fewer passes over the activations, fewer launches.

`head` goes from x to everything the attentions need (norm, W_in, GELU, gamma, the projections, rotary positions), `tail` from s to y (gate, W_out,
residual); `whole` is both and what stands between them, for training. Same parameters, same equations as the plain modules; the matrix products stay the
library's.
Projections of the same activations are joined, so that the backward is one product for the activations' gradient and one for the weights'.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_deploy.kernels import ops, route
from sessa_deploy.kernels.launch.jit import aligned, launch, spaced
from sessa_deploy.kernels.launch.passes import ROWS, cdiv, more, tiles
from sessa_deploy.kernels.training.form import Form, HeadWeights, Layout, Sums, Weights, layout


class Head(NamedTuple):
    """q (B,T,Hq,d), k, v (B,T,Hkv,d), q and k rotated; q_b, k_b, g (B,T,D); gamma (B,T) float32; x as it came, for the residual."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_b: Tensor
    k_b: Tensor
    gamma: Tensor
    g: Tensor
    x: Tensor


def storage_type(x: Tensor) -> torch.dtype:
    """The type activations are stored in: autocast's, or that of x."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def head(form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: HeadWeights) -> Head:
    """From x (B,T,D) to the attentions' inputs, without a backward. cos, sin: contiguous float32 tables (B or 1,T,1,d/2), or None."""
    return _head_forward(form, cos, sin, x, weights)[0]


def tail(x: Tensor, s: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x + (s g) weight^T + bias for x, s, g (B,T,D), x and g from `head`, without a backward."""
    return _tail_forward(x, s, g, weight, bias)[0]


def _head_forward(
    form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: HeadWeights, others: tuple[Tensor, ...] = ()
) -> tuple[Head, tuple[Any, ...], tuple[Tensor, ...]]:
    """(the result, what the backward needs, `others` in the type of activations)."""
    from sessa_deploy.kernels.training import elementwise

    batch, tokens, width = x.shape
    n, d8, dtype, device = batch * tokens, width // 8, storage_type(x), x.device
    inner = weights.q_weight.shape[0] + 2 * weights.k_weight.shape[0]  # columns of q, k and v
    heads = (form.heads, form.kv_heads, form.kv_heads)
    rows, norm_weight, norm_bias = aligned(x), aligned(weights.norm_weight), aligned(weights.norm_bias)
    y, a = (torch.empty((batch, tokens, width), dtype=dtype, device=device) for _ in range(2))
    mean, rstd, gamma = (torch.empty((batch, tokens), dtype=torch.float32, device=device) for _ in range(3))
    norm, flat = tiles("row", width), tiles("flat")
    launch(elementwise.fused_norm, (cdiv(n, norm["BT"]),), (rows, norm_weight, norm_bias, y, mean, rstd, n, d8, form.eps), norm)
    in_weight, in_bias, w, b, *others = _products(weights, others, dtype)  # type: ignore[assignment]  # the device has begun meanwhile
    gamma_weight, gamma_bias = aligned(weights.gamma_weight, torch.float32), aligned(weights.gamma_bias, torch.float32)
    h = F.linear(y, in_weight, in_bias)
    launch(elementwise.fused_gelu_gain, (cdiv(n, flat["BT"]),), (h, gamma_weight, gamma_bias, a, gamma, n, d8, form.gamma_max), flat)
    parts = [inner, width, width]  # the feedback branch's products are separate because feedback attention wants rows of its own
    qkv, q_b, k_b = (F.linear(a, *pair) for pair in zip(w.split(parts), b.split(parts), strict=True))
    if cos is not None:
        turn, turned = tiles("turn"), inner - weights.v_weight.shape[0]
        launch(elementwise.fused_rotate, (cdiv(n, turn["BT"]), cdiv(turned, turn["BD"])),
               (qkv, cos, sin, n, cos.shape[0] * tokens, form.head_dim // 8, turned // 8, inner // 8), turn)  # fmt: skip
    q, k, v = qkv.view(batch, tokens, -1, form.head_dim).split(heads, dim=2)
    saved = (rows, y, mean, rstd, h, a, gamma, in_weight, w, norm_weight, gamma_weight, cos, sin)
    return Head(q, k, v, q_b, k_b, gamma, h[..., width:], x), saved, tuple(others)


def _products(weights: HeadWeights, others: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(W_in's weight, its bias, one copy of the projections' weights in the order q, k, v and the feedback branch's q and k, of their biases, others...), all
    in `dtype`."""
    w = (weights.q_weight, weights.k_weight, weights.v_weight, weights.fb_weight)
    b = (weights.q_bias, weights.k_bias, weights.v_bias, weights.fb_bias)
    parts = (weights.in_weight, weights.in_bias, *w, *b, *others)
    if all(p.dtype == dtype for p in parts):
        return aligned(weights.in_weight), aligned(weights.in_bias), torch.cat(w), torch.cat(b), *others
    counts = [p.numel() for p in parts]
    memory = torch.empty(sum(counts), dtype=dtype, device=weights.in_weight.device)
    torch._foreach_copy_([x.view(p.shape) for x, p in zip(memory.split(counts), parts, strict=True)], parts)  # one launch, whatever the types
    in_weight, in_bias, joined, biases, *rest = memory.split([*counts[:2], sum(counts[2:6]), sum(counts[6:10]), *counts[10:]])
    width = weights.in_weight.shape[1]
    return in_weight.view(-1, width), in_bias, joined.view(-1, width), biases, *(x.view(p.shape) for x, p in zip(rest, others, strict=True))


def _head_backward(
    form: Form, types: Any, needs: HeadWeights, saved: Sequence[Any], dh: Tensor, partial: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dq_b: Tensor,
    dk_b: Tensor, dgamma: Tensor, dx: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of x and of the weights that need one. types: the weights', a HeadWeights; saved: `_head_forward`'s; dh, partial: `_gate_backward`'s."""
    from sessa_deploy.kernels.training import elementwise

    x, y, mean, rstd, h, a, gamma, in_weight, w, norm_weight, gamma_weight, cos, sin = saved
    batch, tokens, width = x.shape
    n, dtype, device = batch * tokens, h.dtype, h.device
    kv, joined = form.kv_heads * form.head_dim, w.shape[0]
    first, sizes, total = layout(width, kv)
    chunks, d8, total8 = cdiv(n, ROWS), width // 8, total // 8
    grads = torch.empty((n, joined), dtype=dtype, device=device)
    dq, dk, dv, dq_b, dk_b = (aligned(g, dtype) for g in (dq, dk, dv, dq_b, dk_b))
    gather = more("gather", TURN=cos is not None, ROWS=ROWS)
    cos, sin = (norm_weight, norm_weight) if cos is None else (cos, sin)  # not read where nothing turns
    launch(elementwise.fused_gather, (chunks, 3 * cdiv(width, gather["BD"]) + 2 * cdiv(kv, gather["BD"])),
           (dq, dk, dv, dq_b, dk_b, grads, cos, sin, partial, n, cos.shape[0] * tokens, form.head_dim // 8, d8, kv // 8, total8), gather)  # fmt: skip
    da = torch.mm(grads, w)
    projected = needs.q_weight or needs.k_weight or needs.v_weight or needs.fb_weight
    dw: Any = weight_grad(grads, a.view(n, width), types.q_weight).split([width, kv, kv, 2 * width]) if projected else (None,) * 4
    flat = more("flat sums", ROWS=ROWS)
    launch(elementwise.fused_gelu_gain_grad, (chunks, cdiv(width, flat["BD"])),
           (h, da, gamma, aligned(dgamma, torch.float32), gamma_weight, dh, partial, n, d8, total8, first.in_bias // 8, form.gamma_max),
           flat)  # fmt: skip
    dy = torch.mm(dh, in_weight)
    dw_in: Any = weight_grad(dh, y.view(n, width), types.in_weight) if needs.in_weight else None
    dx_rows = torch.empty_like(x)
    launch(elementwise.fused_norm_grad, (chunks,),
           (x, norm_weight, mean, rstd, dy, aligned(dx), dx_rows, partial, n, d8, total8, first.norm_weight // 8),
           more("row sums", width, ROWS=ROWS))  # fmt: skip
    exact, rounded = (torch.empty(total, dtype=t, device=device) for t in (torch.float32, dtype))
    options = tiles("total")
    launch(elementwise.fused_total, (cdiv(total, options["BD"]),), (partial, exact, rounded, chunks, total8), options)

    # each in the type of its parameter, as far as that is one of the two
    sums = Sums(*(r if getattr(types, name) == dtype else e for name, e, r in zip(Sums._fields, exact.split(sizes), rounded.split(sizes), strict=True)))
    out = HeadWeights(
        norm_weight=sums.norm_weight, norm_bias=sums.norm_bias,
        in_weight=dw_in, in_bias=sums.in_bias,
        gamma_weight=sums.gamma_weight.view(1, width), gamma_bias=sums.gamma_bias[0],
        q_weight=dw[0], q_bias=sums.q_bias, k_weight=dw[1], k_bias=sums.k_bias, v_weight=dw[2], v_bias=sums.v_bias, fb_weight=dw[3], fb_bias=sums.fb_bias,
        out_bias=sums.out_bias,
    )  # fmt: skip
    return dx_rows, *(g if need else None for g, need in zip(out, needs, strict=True))


def _solve_forward(o: Tensor, weight: Tensor | None, q_b: Tensor, k_b: Tensor, gamma: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    o, past = aligned(o, q_b.dtype), ops.no_past(q_b, True)
    f = o.view(q_b.shape) if weight is None else F.linear(o.view(q_b.shape), weight)
    s, *kept = ops.run_forward(q_b, k_b, gamma, f, *past, need_lse=True)
    return s, (o, weight, q_b, k_b, gamma, f, s, *kept, *past)


def _solve_backward(saved: Sequence[Any], ds: Tensor, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Gradients of o, weight (of `dtype`; None: none is wanted), q_b, k_b and gamma."""
    o, weight, *saved = saved
    dq, dk, dgamma, df, *_ = route.feedback_backward(ds, *saved)
    rows = df.view(-1, df.shape[-1])
    do = (rows if weight is None else torch.mm(rows, weight)).view(o.shape)
    return do, weight_grad(rows, o.view(rows.shape), dtype) if dtype else None, dq, dk, dgamma


def _tail_forward(x: Tensor, s: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    from sessa_deploy.kernels.training import elementwise

    width, dtype = x.shape[-1], s.dtype
    s, (g, row), weight = aligned(s), spaced(g), aligned(weight, dtype)
    gated = torch.empty_like(s)
    n, flat = s.numel() // width, tiles("flat")
    launch(elementwise.fused_gate, (cdiv(n, flat["BT"]), cdiv(width, flat["BD"])), (s, g, gated, n, width // 8, row // 8), flat)
    y = F.linear(gated, weight, bias if bias.dtype == dtype else bias.to(dtype))
    if y.dtype == x.dtype:
        return y.add_(x), (s, g, gated, weight)
    out, options = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, dtype), device=x.device), tiles("residual")  # PyTorch's is half as fast
    launch(elementwise.fused_residual, (cdiv(out.numel(), options["BT"]),), (aligned(x), y, out, out.numel() // 8), options)
    return out, (s, g, gated, weight)


def _gate_backward(dgated: Tensor, s: Tensor, g: Tensor, columns: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """ds (B,T,D), dh (N,2D), partial of the gradient dgated of s g (B,T,D), where g's rows may lie apart: g's gradient is the right half of dh, whose left
    half `_head_backward` fills, and its sums are in their columns of partial."""
    from sessa_deploy.kernels.training import elementwise

    width = s.shape[-1]
    n, (first, _, total), sums = s.numel() // width, columns, more("gate sums", ROWS=ROWS)
    chunks = cdiv(n, ROWS)
    ds, dh = torch.empty_like(s), torch.empty((n, 2 * width), dtype=s.dtype, device=s.device)
    partial = torch.empty((chunks, total), dtype=torch.float32, device=s.device)
    g, row = spaced(g)
    launch(elementwise.fused_gate_grad, (chunks, cdiv(width, sums["BD"])),
           (dgated, s, g, ds, dh, partial, n, width // 8, row // 8, total // 8, (first.in_bias + width) // 8), sums)  # fmt: skip
    return ds, dh, partial


def _tail_backward(saved: Sequence[Any], dy: Tensor, dtype: torch.dtype | None, columns: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(ds, dh, partial, the gradient of W_out's weight (of `dtype`; None: none is wanted))."""
    s, g, gated, weight = saved
    rows = aligned(dy, s.dtype).view(-1, s.shape[-1])
    return *_gate_backward(torch.mm(rows, weight), s, g, columns), weight_grad(rows, gated.view(rows.shape), dtype) if dtype else None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, cos, sin, x, out_proj, *weights):  # type: ignore[no-untyped-def]
        *first, out = weights
        others = (out, weights[_BIAS]) if out_proj is None else (out, weights[_BIAS], out_proj)
        head, of_head, (out, bias, *projects) = _head_forward(form, cos, sin, x, HeadWeights(*first), others)
        o, attention = ops.attention_forward(head.q, head.k, head.v)
        s, of_solve = _solve_forward(o, projects[0] if projects else None, head.q_b, head.k_b, head.gamma)
        y, of_tail = _tail_forward(x, s, head.g, out, bias)
        ctx.save_for_backward(*of_head, *of_solve, *of_tail, head.q, head.k, head.v, *attention.tensors)
        ctx.cuts = tuple(itertools.accumulate(map(len, (of_head, of_solve, of_tail))))
        ctx.form, ctx.attention, ctx.types = form, attention.without(), [None if p is None else p.dtype for p in (out_proj, *weights)]
        ctx.set_materialize_grads(False)
        return y, head.k, head.v, head.k_b, s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dk_more, dv_more, dk_b_more, ds_more):  # type: ignore[no-untyped-def]
        form, types, saved, (a, b, c) = ctx.form, ctx.types, ctx.saved_tensors, ctx.cuts
        needs, columns = ctx.needs_input_grad[4:], layout(saved[0].shape[-1], form.kv_heads * form.head_dim)
        q, k, v = saved[c : c + 3]
        dy = torch.zeros_like(saved[0]) if dy is None else dy  # y has the type of x, or a wider one
        ds, dh, partial, dout = _tail_backward(saved[b:c], dy, types[-1] if needs[-1] else None, columns)
        ds = ds if ds_more is None else ds + ds_more
        do, dproj, dq_b, dk_b, dgamma = _solve_backward(saved[a:b], ds, types[0] if needs[0] else None)
        dq, dk, dv = ops.attention_backward(do, q, k, v, ctx.attention, saved[c + 3 :])
        dk, dv, dk_b = (g if more is None else g + more for g, more in ((dk, dk_more), (dv, dv_more), (dk_b, dk_b_more)))
        first = _head_backward(form, HeadWeights(*types[1:-1]), HeadWeights(*needs[1:-1]), saved[:a], dh, partial, dq, dk, dv, dq_b, dk_b, dgamma, dy)
        dx, *others = first
        return None, None, None, dx, dproj, *others, dout


_BIAS = HeadWeights._fields.index("out_bias")


def whole(
    form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: Weights, out_proj: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer without a past, for a backward: its y (B,T,D), and its rows k, v (B,T,Hkv,d), k_b, s (B,T,D). cos, sin, x, weights: as `head` takes them;
    out_proj: its weight, None where it is the identity.

    W_out's bias is added to the same rows as x, so its gradient is that of x's residual summed over them.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _Whole.apply(form, cos, sin, x, out_proj, *weights.head, weights.out)
    return found


def weight_grad(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x (columns, depth) for dy (N,columns), x (N,depth), as a parameter of `dtype` takes it: float32 beside 16-bit activations as it was summed."""
    if dtype == torch.float32 and dy.dtype != dtype:
        return torch.mm(dy.t(), x, out_dtype=dtype) if dy.is_cuda else torch.mm(dy.t().float(), x.float())
    return torch.mm(dy.t(), x)

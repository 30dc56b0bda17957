"""A layer on a GPU as regions around its attentions, and the whole of it as one autograd node: fewer passes over the activations, fewer launches.

`head` goes from x to everything the attentions need (norm, W_in, GELU, gamma, the projections, rotary positions), `tail` from s to y (gate, W_out,
residual); whole.py is both and what stands between them, for training. Same parameters, same equations as the plain modules; the matrix products stay the
library's.
Projections of the same activations are joined, so that the backward is one product for the activations' gradient and one for the weights'.
Inside, activations are rows (N,*), N = B T, and what a shape decides is in its `Plan`: a view, a look-up or a key costs the host as much as a short kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sessa_deploy.kernels.beside import Beside
from sessa_deploy.kernels.launch.jit import aligned
from sessa_deploy.kernels.training.form import Form, HeadWeights, Weights

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


def storage_type(x: Tensor) -> torch.dtype:
    """The type activations are stored in: autocast's, or that of x."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def head(form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: HeadWeights) -> Head:
    """From x (B,T,D) to the attentions' inputs, without a backward. cos, sin: contiguous float32 tables (B or 1,T,1,d/2), or None."""
    p = plan(form, cos, x, weights)
    made = Entered(*(torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in p.entered.values()))
    beside = Beside(x.device)
    enter(p, made, aligned(x), norms(weights), cos, sin, weights, (), beside)
    beside.join()
    q, k, v = Entered.heads(made.qkv, p)
    return Head(q, k, v, made.q_b, made.k_b, made.gamma, made.h, x)


def tail(form: Form, cos: Tensor | None, s: Tensor, head: Head, weights: Weights) -> Tensor:
    """x + (s g) W_out^T + b_out for s (B,T,D), without a backward. form, cos, weights: those of `head`."""
    p, s = plan(form, cos, head.x, weights.head), aligned(s)
    gated, rows = (torch.empty((p.rows, p.width), dtype=s.dtype, device=s.device) for _ in range(2))
    y = rows.view(*p.shape) if p.x_dtype == p.dtype else torch.empty(p.shape, dtype=p.y_dtype, device=s.device)
    leave(p, aligned(head.x), s, head.h, aligned(weights.out, s.dtype), aligned(weights.head.out_bias, s.dtype), gated, rows, y)
    return y


def plan(form: Form, cos: Tensor | None, x: Tensor, weights: HeadWeights, others: int = 0) -> Plan:
    """The plan of calls with x (B,T,D); others: as `Plan` has it."""
    from sessa_deploy.kernels.training.plan import planned

    types = (storage_type(x), x.dtype, weights.norm_weight.dtype, weights.norm_bias.dtype, weights.in_weight.dtype)
    return planned(form, x.shape, 0 if cos is None else cos.shape[0] * x.shape[1], x.device, types, others)


class Norms(NamedTuple):
    """Parameters of the norm and of gamma as the kernels take them."""

    weight: Tensor
    bias: Tensor
    gamma_weight: Tensor
    gamma_bias: Tensor


def norms(weights: HeadWeights) -> Norms:
    """Those of a layer."""
    f32 = torch.float32
    return Norms(aligned(weights.norm_weight), aligned(weights.norm_bias), aligned(weights.gamma_weight, f32), aligned(weights.gamma_bias, f32))


class Entered(NamedTuple):
    """What `enter` writes: rows y, a (N,D), h (N,2D) and qkv (N, all heads' columns), the norm's stats (2,N) and gamma (B,T) float32, q_b, k_b (B,T,D), and
    the copy of weights, see `products`."""

    y: Tensor
    stats: Tensor
    h: Tensor
    a: Tensor
    gamma: Tensor
    qkv: Tensor
    q_b: Tensor
    k_b: Tensor
    copy: Tensor

    @staticmethod
    def heads(qkv: Tensor, p: Plan) -> tuple[Tensor, ...]:
        """q (B,T,Hq,d), k, v (B,T,Hkv,d)."""
        return torch.split_with_sizes(qkv.view(*p.heads_shape), p.heads, 2)  # type: ignore[no-any-return]


def direct(p: Plan, *parameters: Tensor) -> tuple[Tensor | None, ...]:
    """Those that products take as they are; None for each that is in a layer's copy of weights, see `products`."""
    return (None,) * len(parameters) if p.casts else parameters


def products(p: Plan, copy: Tensor, direct: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A layer's weights in the type of activations: those of q, k, v and the feedback branch's q and k in one, their biases, and W_in's weight and bias, then
    others. The first two are views of `copy`, where the others follow if they are not taken as they are."""
    joined = [p.joined * p.width, p.joined]
    if not p.casts:
        w, b = torch.split_with_sizes(copy, joined)
        return w.view(p.joined, p.width), b, [aligned(x) for x in direct if x is not None]
    w, b, *rest = torch.split_with_sizes(copy, [*joined, *p.sizes_of])
    return w.view(p.joined, p.width), b, [x.view(*shape) for x, shape in zip(rest, p.shapes, strict=True)]


def enter(
    p: Plan, to: Entered, x: Tensor, norms: Norms, cos: Tensor | None, sin: Tensor | None, weights: HeadWeights, others: tuple[Tensor, ...],
    beside: Beside, route: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """From aligned x (B,T,D) to the attentions' inputs, into `to`. others: further parameters of products; route: queues what q_b and k_b are for, and they, on
    the stream `beside`, which the caller joins."""
    p.norm(x, norms.weight, norms.bias, to.y, to.stats)
    parameters = (weights.in_weight, weights.in_bias, *others)
    joined, biases, made = products(p, to.copy, direct(p, *parameters))
    w = (weights.q_weight, weights.k_weight, weights.v_weight, weights.fb_weight)
    b = (weights.q_bias, weights.k_bias, weights.v_bias, weights.fb_bias)
    if p.casts:
        apart = (*torch.split_with_sizes(joined, p.split), *torch.split_with_sizes(biases, p.split), *made)
        torch._foreach_copy_(apart, (*w, *b, *parameters))  # one launch, whatever the types
    torch.addmm(made[1], to.y, made[0].t(), out=to.h)
    if not p.casts:
        torch.cat(w, out=joined)
        torch.cat(b, out=biases)
    p.gelu_gain(to.h, norms.gamma_weight, norms.gamma_bias, to.a, to.gamma)
    (w_qkv, w_q, w_k), (b_qkv, b_q, b_k) = torch.split_with_sizes(joined, p.parts), torch.split_with_sizes(biases, p.parts)
    with beside:
        # products of their own, because feedback attention wants rows of its own
        torch.addmm(b_q, to.a, w_q.t(), out=to.q_b.view(p.rows, p.width))
        torch.addmm(b_k, to.a, w_k.t(), out=to.k_b.view(p.rows, p.width))
        if route is not None:
            route()
    torch.addmm(b_qkv, to.a, w_qkv.t(), out=to.qkv)
    if p.rotate is not None:
        assert cos is not None and sin is not None
        p.rotate(to.qkv, cos, sin)


def leave(p: Plan, x: Tensor, s: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gated: Tensor, rows: Tensor, y: Tensor) -> None:
    """y (B,T,D) = x + (s g) weight^T + bias, g in the right half of h; gated (N,D) gets s g, and rows (N,D), which are y's where it has their type, the sum
    without x."""
    p.gate(s, h[:, p.width :], gated)
    torch.addmm(bias, gated, weight.t(), out=rows)
    if y.dtype == x.dtype == rows.dtype:
        y.add_(x)
    else:
        p.residual(x, rows, y)  # PyTorch's is half as fast

"""A layer without a past as one autograd node, for training: its forward and its backward are one piece of launches each.

What a piece writes is allocated before, few allocations for all of it, so that it can be replayed where the same addresses come again (replay.py). Beside
the chain of the layer's own stream, what nothing waits for yet is queued on a second one (beside.py): the routing of feedback attention beside the forward
attention, the gradients of weights and those of q_b and k_b beside the backward. Where the forward attention is no single operator of PyTorch's but a graph,
it stands between two pieces, and so does its backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sessa_deploy.kernels import ops, route
from sessa_deploy.kernels.beside import Beside
from sessa_deploy.kernels.launch.jit import aligned
from sessa_deploy.kernels.replay import flags, queue
from sessa_deploy.kernels.training import attention
from sessa_deploy.kernels.training.form import Form, HeadWeights, Sums, Weights
from sessa_deploy.kernels.training.pieces import Between, Early, Pieces, pieces_of
from sessa_deploy.kernels.training.regions import Entered, Norms, direct, enter, leave, norms, plan, products

Parameters = tuple[Tensor | None, ...]  # those that products take as they are, see `direct`


class _In(NamedTuple):
    """What a forward reads."""

    x: Tensor
    norm: Norms
    cos: Tensor | None
    sin: Tensor | None
    first: HeadWeights
    others: tuple[Tensor, ...]
    parameters: Parameters


class _Forward:
    """The launches of one forward; what they write is kept, qkv, passing and y."""

    def __init__(self, pieces: Pieces, given: _In, kept: Tensor, qkv: Tensor | None, passing: Tensor, y: Tensor) -> None:
        self.p, self.pieces, self.given, self.y = pieces.plan, pieces, given, y
        self.made = made = pieces.views(kept, qkv)
        self.projected, self.sums, workspace = pieces.passing.views(passing)
        self.solving: Any = None
        if pieces.forward is not None:
            e, self.past = made.entered, ops.no_past(made.entered.q_b, True)  # held as long as launches are queued, which know addresses alone
            self.solving = route.feedback_call(pieces.forward, e.q_b, e.k_b, e.gamma, *self.past, made.s, made.lse, made.rest, workspace)

    def start(self, beside: Beside) -> None:
        """Queue what stands before the forward attention; the caller joins `beside`, on which the routing is."""
        x, norm, cos, sin, first, others, _ = self.given
        enter(self.p, self.made.entered, x, norm, cos, sin, first, others, beside, None if self.solving is None else self.solving.route)

    def end(self, attended: tuple[Tensor, ...]) -> None:
        """Queue what stands behind it, for its o (B,T,Hq,d)."""
        (o,) = attended
        p, made = self.p, self.made
        _, _, (_, _, weight, bias, *project) = products(p, made.entered.copy, self.given.parameters)
        f = o.view(*p.shape)
        if project:
            f = self.projected
            torch.mm(o.view(p.rows, p.width), project[0].t(), out=f.view(p.rows, p.width))
        if self.solving is not None:
            self.solving.solve(f)
        else:
            e = made.entered
            for to, value in zip((made.s, made.lse), route.feedback_forward(e.q_b, e.k_b, e.gamma, f, *ops.no_past(f, True), need_lse=True), strict=False):
                to.copy_(value)  # type: ignore[arg-type]
        rows = self.sums if self.sums.numel() else self.y.view(p.rows, p.width)
        leave(p, self.given.x, made.s, made.entered.h, weight, bias, made.gated, rows, self.y)

    def whole(self) -> None:
        """Queue all of it, where the forward attention is one operator: what that allocates is copied into `kept` beside the solve."""
        p, made, beside = self.p, self.made, Beside(self.p.device)
        assert made.o is not None and made.o_lse is not None
        self.start(beside)
        o, lse = ops.attention_forward(*Entered.heads(made.entered.qkv, p))
        o = aligned(o, p.dtype)
        self.pieces.lse_shape = lse.shape
        beside.join()
        with beside:
            made.o.copy_(o)
            made.o_lse.view(lse.shape).copy_(lse)
        self.end((o,))
        beside.join()


class _Given(NamedTuple):
    """What a backward reads: the gradient of y, what the forward kept, its o where that was not kept, gradients of k, v, k_b and s themselves, the norm's
    weights and tables, and parameters."""

    x: Tensor
    dy: Tensor
    kept: Tensor
    qkv: Tensor | None
    o: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dk_b: Tensor | None
    ds: Tensor | None
    norm_weight: Tensor
    gamma_weight: Tensor
    cos: Tensor | None
    sin: Tensor | None
    parameters: Parameters


class _Backward:
    """The launches of one backward; what they write is between, early, dw, dx, sums, and what `end` is given.

    dw: memory of the weights' gradients, None where none is wanted; wanted: which of the projections, W_in, W_out and out_proj."""

    def __init__(
        self, pieces: Pieces, given: _Given, between: Tensor, early: Tensor, dw: Tensor | None, wanted: tuple[bool, ...], dx: Tensor, sums: Tensor
    ) -> None:  # fmt: skip
        p = self.p = pieces.plan
        self.pieces, self.given, self.dx, self.sums = pieces, given, dx, pieces.sums.views(sums)
        self.made, self.to, self.early = pieces.views(given.kept, given.qkv), Between(*pieces.between.views(between)), early
        found = () if dw is None else torch.split_with_sizes(dw, [p.joined, *pieces.weights[4:]])
        grads = [x if want else None for x, want in zip(found, wanted, strict=False)]
        self.dprojected, self.din, self.dout, self.dproject = (*grads, None, None, None, None)[:4]
        self.products = products(p, self.made.entered.copy, given.parameters)

    def start(self, beside: Beside) -> None:
        """Queue all up to the gradients of the forward attention's o and of feedback attention's inputs; the caller joins `beside`, and holds memory until."""
        p, given, made, to = self.p, self.given, self.made, self.to
        mine, o = Early(*self.pieces.early.views(self.early)), made.o if given.o is None else given.o
        _, _, (_, _, weight, _, *project) = self.products
        n, width = p.rows, p.width
        rows = given.dy.view(n, width)
        if rows.dtype != p.dtype:
            mine.rows.copy_(rows)
            rows = mine.rows
        torch.mm(rows, weight, out=mine.gated)
        p.gate_grad(mine.gated, made.s, made.entered.h[:, width:], mine.s, to.h, to.partial)
        if self.dout is not None:
            weight_grad(self.dout, rows, made.gated, beside)
        if given.ds is not None:
            mine.s.add_(given.ds)
        df = mine.f if project else to.o
        self._solve(mine, df, beside)
        df = df.view(n, width)
        if project:
            assert o is not None
            torch.mm(df, project[0], out=to.o.view(n, width))
            if self.dproject is not None:
                weight_grad(self.dproject, df, o.view(n, width), beside)

    def _solve(self, mine: Early, df: Tensor, beside: Beside) -> None:
        """Feedback attention backward: gradients of q_b, k_b and gamma, that of f into df."""
        made, to, e, backward = self.made, self.to, self.made.entered, self.pieces.backward
        inputs, s, past = (mine.s, e.q_b, e.k_b, e.gamma), made.s, ops.no_past(e.q_b, True)
        self.past = past  # held until all is queued: launches know addresses alone
        into = (to.q_b, to.k_b, to.gamma, df, *past[:2])  # gradients of the past have no rows
        if backward is None:  # s stands for f: where f is not finite, s is not
            for out, grad in zip(into, route.feedback_backward(*inputs, s, s, made.lse, made.rest, *past), strict=True):
                out.copy_(grad)
            return
        mine.sync.zero_()
        route.feedback_queue_backward(backward, *inputs, s, made.lse, made.rest, *past, into, mine.workspace, mine.sync, beside)

    def attention(self) -> tuple[Tensor, ...]:
        """Queue the backward of the forward attention where that is one operator."""
        made, (q, k, v) = self.made, Entered.heads(self.made.entered.qkv, self.p)
        assert made.o is not None and made.o_lse is not None and made.seed is not None
        return ops.attention_backward(self.do, q, k, v, made.o, made.o_lse.view(self.pieces.lse_shape), made.seed)

    @property
    def do(self) -> Tensor:
        """The gradient of o (B,T,Hq,d)."""
        return self.to.o.view(*self.p.q_shape)

    def end(self, grads: tuple[Tensor, ...]) -> None:
        """Queue the rest, for the gradients of q, k and v that the forward attention gave. It writes where `start` did, whose `beside` was joined."""
        p, given, made, to, (exact, rounded) = self.p, self.given, self.made.entered, self.to, self.sums
        dq, dk, dv = [aligned(g if more is None else g + more, p.dtype) for g, more in zip(grads, (None, given.dk, given.dv), strict=True)]
        joined, da, dnorm = self.pieces.late.views(self.early)
        w, _, (in_weight, *_) = self.products
        beside = Beside(p.device)
        if given.dk_b is not None:
            to.k_b.add_(given.dk_b)
        cos, sin = (given.norm_weight,) * 2 if given.cos is None or given.sin is None else (given.cos, given.sin)  # not read where nothing turns
        p.gather(dq, dk, dv, to.q_b, to.k_b, joined, cos, sin, to.partial)
        if self.dprojected is not None:
            weight_grad(self.dprojected, joined, made.a, beside)
        torch.mm(joined, w, out=da)
        p.gelu_gain_grad(made.h, da, made.gamma, to.gamma, given.gamma_weight, to.h, to.partial)
        if self.din is not None:
            weight_grad(self.din, to.h, made.y, beside)
        torch.mm(to.h, in_weight, out=dnorm)
        p.norm_grad(given.x, given.norm_weight, made.stats, dnorm, given.dy, self.dx, to.partial)
        p.add(to.partial, exact, rounded)
        beside.join()

    def whole(self) -> None:
        """Queue all of it, where the forward attention is one operator."""
        beside = Beside(self.p.device)
        self.start(beside)
        grads = self.attention()
        beside.join()
        self.end(grads)


def weight_grad(out: Tensor, dy: Tensor, x: Tensor, beside: Beside) -> None:
    """out = dy^T x (columns, depth) for dy (N,columns), x (N,depth), as it was summed where out is float32; beside: the stream it is queued on."""
    with beside:
        if out.dtype == dy.dtype:
            torch.mm(dy.t(), x, out=out)
        elif dy.is_cuda:
            torch.mm(dy.t(), x, out_dtype=out.dtype, out=out)
        else:
            torch.mm(dy.t().to(out.dtype), x.to(out.dtype), out=out)


class _Made(NamedTuple):
    """What a forward hands to its node: memory, o where the forward attention stood between two pieces, with what that has saved and its graph, y, and whether
    rows are wanted."""

    pieces: Pieces
    given: _In
    kept: Tensor
    qkv: Tensor | None
    o: Tensor | None
    held: tuple[Tensor, ...]
    graph: attention.Graph | None
    y: Tensor
    rows: bool


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, made, x, out_proj, *weights):  # type: ignore[no-untyped-def]
        pieces, given, kept, qkv, o, held, graph, y, rows = made
        ctx.save_for_backward(*held, given.x, given.norm.weight, given.norm.gamma_weight, given.cos, given.sin, kept, qkv, o, *given.parameters)
        ctx.pieces, ctx.held, ctx.graph = pieces, len(held), graph
        ctx.types = [None if w is None else w.dtype for w in (out_proj, *weights)]
        ctx.set_materialize_grads(False)
        if not rows:
            return y
        _, k, v = pieces.heads(kept, qkv)
        return y, k, v, pieces.kept.view(kept, "k_b"), pieces.kept.view(kept, "s")

    @staticmethod
    @ops.once
    def backward(ctx, dy, *more):  # type: ignore[no-untyped-def]
        pieces, needs = ctx.pieces, ctx.needs_input_grad[2:]
        p = pieces.plan
        every: list[Any] = list(ctx.saved_tensors)  # once: a checkpoint computes them
        # aligned: hooks that keep what is saved somewhere else give it back as they like
        saved: list[Any] = [None if x is None else aligned(x) for x in every[ctx.held :]]
        x, norm_weight, gamma_weight, cos, sin, kept, qkv, o, *parameters = saved
        dk, dv, dk_b, ds = more or (None,) * 4
        device, width = p.device, p.width
        dy = torch.zeros(p.shape, dtype=p.y_dtype, device=device) if dy is None else aligned(dy)
        types = ctx.types[1:]
        wants, kinds = HeadWeights(*needs[1:-1]), HeadWeights(*types[:-1])
        projected = wants.q_weight or wants.k_weight or wants.v_weight or wants.fb_weight
        # all weights' gradients, rows of D each, in one
        dw = None
        if projected or wants.in_weight or needs[0] or needs[-1]:
            dw = torch.empty((sum(pieces.weights), width), dtype=types[-1] if types[-1] == torch.float32 else p.dtype, device=device)
        wanted = tuple([bool(x) for x in (projected, wants.in_weight, needs[-1], needs[0])])
        between, early, sums = pieces.between.allocate(device), pieces.allocate_early(device), pieces.sums.allocate(device)
        dx, what = torch.empty(p.shape, dtype=x.dtype, device=device), (pieces, wanted, flags())
        given = _Given(x, dy, kept, qkv, o, dk, dv, dk_b, ds, norm_weight, gamma_weight, cos, sin, tuple(parameters))

        def launches() -> _Backward:
            return _Backward(pieces, given, between, early, dw, wanted, dx, sums)

        memory = (*given[:-1], *parameters, between, early, dw, dx, sums)
        if pieces.fused:
            queue(("backward", what), device, memory, lambda: launches().whole())
        else:

            def attend() -> tuple[Tensor, ...]:
                return ctx.graph.backward(pieces.between.view(between, "o").view(*p.q_shape), every[: ctx.held])  # type: ignore[no-any-return]

            _around(attend, ("backward", what), device, memory, launches)
        # each in the type of its parameter, as far as that is one of the two
        exact, rounded = [torch.split_with_sizes(x, p.sizes) for x in pieces.sums.views(sums)]
        by_name = zip(Sums._fields, exact, rounded, strict=True)
        to = Sums(*[r if getattr(kinds, name) == p.dtype else e for name, e, r in by_name])
        of_q, of_k, of_v, of_fb, of_in, of_out, *of_project = (None,) * 7 if dw is None else torch.split_with_sizes(dw, pieces.weights)
        grads = (
            to.norm_weight, to.norm_bias, of_in, to.in_bias, to.gamma_weight.view(1, width), to.gamma_bias[0], of_q, to.q_bias, of_k, to.k_bias,
            of_v, to.v_bias, of_fb, to.fb_bias, to.out_bias, of_out,
        )  # fmt: skip
        found = grads if all(needs[1:]) else [g if wanted else None for g, wanted in zip(grads, needs[1:], strict=True)]
        return None, dx, of_project[0] if needs[0] else None, *found


def _around(
    attend: Callable[[], tuple[Tensor, ...]], what: Hashable, device: torch.device, memory: Sequence[Tensor | None], launches: Callable[[], Any]
) -> tuple[Tensor, ...]:  # fmt: skip
    """Queue `start` of the launches, then what `attend` does, which is PyTorch's, and their `end` of what that gave, which is returned. memory: all that the
    launches read and write beside it."""
    launches, begun = functools.cache(launches), list[Beside]()

    def first() -> None:
        beside = Beside(device)
        launches().start(beside)
        beside.rest()
        begun.append(beside)

    def second() -> None:
        for beside in begun:
            beside.join()
        launches().end(found)

    queue((what, "start"), device, memory, first)
    found = attend()
    queue((what, "end"), device, (*memory, *found), second)
    return found


def whole(
    form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: Weights, out_proj: Tensor | None, rows: bool = True
) -> tuple[Tensor, ...]:
    """A layer without a past, for a backward: its y (B,T,D) and, with `rows`, its rows k, v (B,T,Hkv,d), k_b, s (B,T,D). cos, sin, x, weights: as `head` takes
    them; out_proj: its weight, None where it is the identity.

    W_out's bias is added to the same rows as x, so its gradient is that of x's residual summed over them.
    """
    made = ops.without_grad(_forward, form, cos, sin, x, weights, out_proj, rows)
    # the node is made when the launches are queued: it costs the host as much as several of them
    found = ops.applied(_Whole, made, x, out_proj, *weights.head, weights.out)
    return found if rows else (found,)


def _forward(form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: Weights, out_proj: Tensor | None, rows: bool) -> _Made:
    """`whole` but for the node."""
    first, out = weights
    others = (out, first.out_bias) if out_proj is None else (out, first.out_bias, out_proj)
    p = plan(form, cos, x, first, len(others))
    device = p.device

    def new_qkv() -> Tensor:
        return torch.empty(p.qkv_shape, dtype=p.dtype, device=device)

    pieces = pieces_of(p, out_proj is not None, ops.fuses(p.fuses, lambda: Entered.heads(new_qkv(), p)))
    x, norm, what = aligned(x), norms(first), (pieces, flags())
    given = _In(x, norm, cos, sin, first, others, direct(p, first.in_weight, first.in_bias, *others))
    kept, qkv, passing = pieces.kept.allocate(device), None if pieces.fused else new_qkv(), pieces.passing.allocate(device)
    y = torch.empty(p.shape, dtype=p.y_dtype, device=device)

    def launches() -> _Forward:
        return _Forward(pieces, given, kept, qkv, passing, y)

    memory = (x, *norm, cos, sin, *first[2:4], *first[6:], out, out_proj, kept, qkv, passing, y)
    if pieces.fused:
        queue(("forward", what), device, memory, lambda: launches().whole())
        return _Made(pieces, given, kept, qkv, None, (), None, y, rows)
    held: tuple[Tensor, ...] = ()
    graph: attention.Graph | None = None

    def attend() -> tuple[Tensor, ...]:
        nonlocal held, graph
        o, held, graph = attention.attention_graph(*pieces.heads(kept, qkv))
        return (aligned(o, p.dtype),)

    (o,) = _around(attend, ("forward", what), device, memory, launches)
    return _Made(pieces, given, kept, qkv, o, held, graph, y, rows)

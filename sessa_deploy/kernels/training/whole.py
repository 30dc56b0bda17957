"""A layer without a past as one autograd node, for training: four pieces of launches, before and behind the forward attention and its backward.

What a piece writes is allocated before, few allocations for all of it, so that it can be replayed where the same addresses come again (replay.py). Beside
the chain of the layer's own stream, what nothing waits for yet is queued on a second one (beside.py): the routing of feedback attention beside the projections
of the forward attention, the gradients of weights and those of q_b and k_b beside the backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sessa_deploy.kernels import ops, route
from sessa_deploy.kernels.launch.jit import aligned
from sessa_deploy.kernels.training.beside import Beside
from sessa_deploy.kernels.training.form import Form, HeadWeights, Sums, Weights
from sessa_deploy.kernels.training.regions import Entered, direct, enter, leave, norms, plan, products
from sessa_deploy.kernels.training.replay import flags, places, replays

if TYPE_CHECKING:
    from sessa_deploy.kernels.training.plan import Plan


class Kept(NamedTuple):
    """What the backward needs of the forward: of `enter`, then s and rest (B,T,D; what rounding took from s, () where nothing is kept), lse (B,T) float32, and
    the rows gated = s g (N,D)."""

    entered: Entered
    s: Tensor
    lse: Tensor
    gated: Tensor
    rest: Tensor | None


class Early(NamedTuple):
    """What the first piece of the backward needs for itself: rows of the gradients of y and of s g (N,D), ds and df (B,T,D)."""

    rows: Tensor
    gated: Tensor
    s: Tensor
    f: Tensor
    workspace: Tensor
    sync: Tensor


class Between(NamedTuple):
    """What goes from the first piece of the backward to the second: dh (N,2D), the partial sums, the gradients of o, q_b and k_b (B,T,D) and gamma (B,T)."""

    h: Tensor
    partial: Tensor
    o: Tensor
    q_b: Tensor
    k_b: Tensor
    gamma: Tensor


class Pieces:
    """The memory of a plan's calls. projects: whether there is an out_proj."""

    def __init__(self, p: Plan, projects: bool) -> None:
        from sessa_deploy.kernels.training.plan import Memory

        f32, i32, byte, rows, shape, dtype = torch.float32, torch.int32, torch.uint8, (p.rows, p.width), p.shape, p.dtype
        self.forward: Any = None
        self.backward: Any = None
        forward_bytes = backward_bytes = sync = 0
        if _kernels(p):
            self.forward, self.backward = route.feedback_plans(p.device, dtype, shape)
            forward_bytes, backward_bytes, sync = self.forward.workspace.bytes, self.backward.workspace.bytes, self.backward.sync
        self.rest = self.forward is not None and bool(self.forward.low)
        wide, projected = ((p.rows, 2 * p.width), dtype), (shape if projects else (0,), dtype)
        by_rows, cast = (rows, dtype), (rows if p.y_dtype != dtype else (0, p.width), dtype)
        # not qkv: PyTorch looks whether what its attention keeps was written to since, and does not tell views of one allocation apart
        kept = {name: part for name, part in p.entered.items() if name != "qkv"}
        kept |= {"s": (shape, dtype), "lse": (shape[:2], f32), "gated": by_rows} | ({"rest": (shape, dtype)} if self.rest else {})
        self.kept = Memory(kept)
        self.passing = Memory({"f": projected, "sums": cast, "workspace": ((forward_bytes,), byte)})
        self.early = Memory({"rows": cast, "gated": by_rows, "s": (shape, dtype), "f": projected, "workspace": ((backward_bytes,), byte),
                             "sync": ((sync,), i32)})  # fmt: skip
        self.between = Memory({"h": wide, "partial": ((p.chunks, p.total), f32), "o": (shape, dtype), "q_b": (shape, dtype), "k_b": (shape, dtype),
                               "gamma": (shape[:2], f32)})  # fmt: skip
        self.late = Memory({"joined": ((p.rows, p.joined), dtype), "da": by_rows, "dy": by_rows})
        self.weights = [*p.split, 2 * p.width, p.width, p.width][: 6 + projects]  # rows of the gradients of q, k, v, fb, W_in, W_out, out_proj

    def views(self, kept: Tensor, qkv: Tensor) -> Kept:
        """Of the memory that the backward needs."""
        found = self.kept.views(kept)
        y, stats, h, a, gamma, q_b, k_b, copy, s, lse, gated = found[:11]
        return Kept(Entered(y, stats, h, a, gamma, qkv, q_b, k_b, copy), s, lse, gated, found[11] if self.rest else None)


def _kernels(p: Plan) -> bool:
    """Whether feedback attention's kernels run; elsewhere the blocked path of PyTorch stands in for them."""
    return p.device.type == "cuda"


_pieces = functools.lru_cache(maxsize=256)(Pieces)


def _queue(name: str, p: Plan, settings: tuple[Any, ...], tensors: tuple[Tensor | None, ...], work: Callable[[], None]) -> None:
    """Queue a piece: what it does is decided by its name, the plan, settings, and the places of the tensors."""
    kept = replays(p.device)
    if kept is None:
        work()
    else:
        kept.run((name, p, settings, places(tensors)), work)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, cos, sin, rows, x, out_proj, *weights):  # type: ignore[no-untyped-def]
        first, out = HeadWeights(*weights[:-1]), weights[-1]
        others = (out, first.out_bias) if out_proj is None else (out, first.out_bias, out_proj)
        p = plan(form, cos, x, first, len(others))
        pieces, device, settings = _pieces(p, out_proj is not None), p.device, flags()
        x, norm = aligned(x), norms(first)
        parameters = direct(p, first.in_weight, first.in_bias, *others)
        kept, passing = pieces.kept.allocate(device), pieces.passing.allocate(device)
        qkv = torch.empty((p.rows, p.parts[0]), dtype=p.dtype, device=device)

        @functools.cache
        def made() -> Kept:
            return pieces.views(kept, qkv)

        @functools.cache
        def passed() -> list[Tensor]:
            return pieces.passing.views(passing)

        @functools.cache
        def solving() -> Any:
            if pieces.forward is None:
                return None
            m, e = made(), made().entered
            return route.feedback_call(pieces.forward, e.q_b, e.k_b, e.gamma, *ops.no_past(e.q_b, True), m.s, m.lse, m.rest, passed()[2])

        pending: list[Beside] = []

        def start() -> None:
            beside = Beside(device)
            enter(p, made().entered, x, norm, cos, sin, first, others, beside, None if solving() is None else solving().route)
            beside.rest()
            pending.append(beside)

        _queue("start", p, settings, (x, *norm, cos, sin, kept, qkv, passing, *first[2:4], *first[6:], out, out_proj), start)
        q, k, v = Entered.heads(qkv, p)
        o, attention = ops.attention_forward(q, k, v)
        o = aligned(o, p.dtype)
        y = torch.empty(p.shape, dtype=p.y_dtype, device=device)

        def end() -> None:
            m, (projected, sums, _) = made(), passed()
            _, _, (_, _, weight, bias, *project) = products(p, m.entered.copy, parameters)
            f = o.view(*p.shape)
            if project:
                f = projected
                torch.mm(o.view(p.rows, p.width), project[0].t(), out=f.view(p.rows, p.width))
            for beside in pending:
                beside.join()
            if solving() is not None:
                solving().solve(f)
            else:
                e = m.entered
                for to, value in zip((m.s, m.lse), route.feedback_forward(e.q_b, e.k_b, e.gamma, f, *ops.no_past(f, True), need_lse=True), strict=False):
                    to.copy_(value)  # type: ignore[arg-type]
            leave(p, x, m.s, m.entered.h, weight, bias, m.gated, sums if sums.numel() else y.view(p.rows, p.width), y)

        _queue("end", p, settings, (x, kept, qkv, passing, o, y, *parameters), end)
        ctx.save_for_backward(x, norm.weight, norm.gamma_weight, cos, sin, kept, qkv, o, *parameters, *attention.tensors)
        ctx.plan, ctx.pieces, ctx.attention = p, pieces, attention.without()
        ctx.types = [None if w is None else w.dtype for w in (out_proj, *weights)]
        ctx.set_materialize_grads(False)
        return (y, k, v, pieces.kept.view(kept, "k_b"), pieces.kept.view(kept, "s")) if rows else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *more):  # type: ignore[no-untyped-def]
        p, pieces, needs, saved = ctx.plan, ctx.pieces, ctx.needs_input_grad[5:], ctx.saved_tensors
        x, norm_weight, gamma_weight, cos, sin, kept, qkv, o = saved[:8]
        cut = 8 + len(p.shapes)
        parameters, attention = saved[8:cut], saved[cut:]
        dk_more, dv_more, dk_b_more, ds_more = more or (None,) * 4
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
        between, settings = pieces.between.allocate(device), (wanted, *flags())

        @functools.cache
        def views() -> tuple[Kept, Between]:
            return pieces.views(kept, qkv), Between(*pieces.between.views(between))

        def gradients() -> tuple[Tensor | None, ...]:
            """Of the projections, W_in, W_out and out_proj, as far as they are wanted."""
            found = () if dw is None else torch.split_with_sizes(dw, [p.joined, *pieces.weights[4:]])
            return tuple([x if want else None for x, want in zip(found, wanted, strict=False)]) if found else (None,) * 4

        pending = _first_piece(p, pieces, (dy, kept, qkv, o, ds_more, *parameters), (between, dw), views, gradients, settings)
        to = pieces.between
        do = to.view(between, "o").view(*p.q_shape)
        q, k, v = Entered.heads(qkv, p)
        dq, dk, dv = ops.attention_backward(do, q, k, v, ctx.attention, attention)
        if more:
            dk, dv = (g if extra is None else g + extra for g, extra in ((dk, dk_more), (dv, dv_more)))
        dq, dk, dv = aligned(dq, p.dtype), aligned(dk, p.dtype), aligned(dv, p.dtype)
        late, dx = pieces.late.allocate(device), torch.empty(p.shape, dtype=x.dtype, device=device)
        exact, rounded = torch.empty(p.total, dtype=torch.float32, device=device), torch.empty(p.total, dtype=p.dtype, device=device)

        def end() -> None:
            (kept_views, to), (joined, da, dnorm) = views(), pieces.late.views(late)
            made = kept_views.entered
            w, _, (in_weight, *_) = products(p, made.copy, parameters)
            dprojected, din, *_ = gradients()
            beside = Beside(device)
            for before, _ in pending:
                before.join()
            if dk_b_more is not None:
                to.k_b.add_(dk_b_more)
            turns = (norm_weight, norm_weight) if cos is None else (cos, sin)  # not read where nothing turns
            p.gather(dq, dk, dv, to.q_b, to.k_b, joined, *turns, to.partial)
            if dprojected is not None:
                weight_grad(dprojected, joined, made.a, beside)
            torch.mm(joined, w, out=da)
            p.gelu_gain_grad(made.h, da, made.gamma, to.gamma, gamma_weight, to.h, to.partial)
            if din is not None:
                weight_grad(din, to.h, made.y, beside)
            torch.mm(to.h, in_weight, out=dnorm)
            p.norm_grad(x, norm_weight, made.stats, dnorm, dy, dx, to.partial)
            p.add(to.partial, exact, rounded)
            beside.join()

        _queue("end of the backward", p, settings, (x, dy, dq, dk, dv, kept, qkv, between, late, dw, dx, exact, rounded, gamma_weight, norm_weight, cos, sin,
                                                    dk_b_more, *parameters), end)  # fmt: skip
        # each in the type of its parameter, as far as that is one of the two
        pairs = zip(Sums._fields, torch.split_with_sizes(exact, p.sizes), torch.split_with_sizes(rounded, p.sizes), strict=True)
        sums = Sums(*[r if getattr(kinds, name) == p.dtype else e for name, e, r in pairs])
        of_q, of_k, of_v, of_fb, of_in, of_out, *of_project = (None,) * 7 if dw is None else torch.split_with_sizes(dw, pieces.weights)
        grads = (
            sums.norm_weight, sums.norm_bias, of_in, sums.in_bias, sums.gamma_weight.view(1, width), sums.gamma_bias[0], of_q, sums.q_bias, of_k, sums.k_bias,
            of_v, sums.v_bias, of_fb, sums.fb_bias, sums.out_bias, of_out,
        )  # fmt: skip
        found = grads if all(needs[1:]) else [g if wanted else None for g, wanted in zip(grads, needs[1:], strict=True)]
        return None, None, None, None, dx, of_project[0] if needs[0] else None, *found


def _first_piece(
    p: Plan, pieces: Pieces, inputs: tuple[Any, ...], outputs: tuple[Any, ...], views: Callable[[], tuple[Kept, Between]],
    gradients: Callable[[], tuple[Any, ...]], settings: tuple[Any, ...],
) -> list[tuple[Beside, Tensor]]:  # fmt: skip
    """Queue the backward up to the gradients of the forward attention's o and of feedback attention's inputs.

    inputs: the gradient of y, what the forward kept, o, the gradient of s itself, and parameters; outputs: memory of what goes to the next piece and of the
    weights' gradients, which `views` and `gradients` show, as far as they are wanted. Returns what is to be joined before the next piece, and the memory that
    it uses.
    """
    dy, _, _, o, ds_more, *parameters = inputs
    n, width, early = p.rows, p.width, pieces.early.allocate(p.device)
    pending: list[tuple[Beside, Tensor]] = []

    def start() -> None:
        (made, to), mine = views(), Early(*pieces.early.views(early))
        _, _, (_, _, weight, _, *project) = products(p, made.entered.copy, parameters)
        _, _, dout, *dproject = gradients()
        beside = Beside(p.device)
        rows = dy.view(n, width)
        if rows.dtype != p.dtype:
            mine.rows.copy_(rows)
            rows = mine.rows
        torch.mm(rows, weight, out=mine.gated)
        p.gate_grad(mine.gated, made.s, made.entered.h[:, width:], mine.s, to.h, to.partial)
        if dout is not None:
            weight_grad(dout, rows, made.gated, beside)
        if ds_more is not None:
            mine.s.add_(ds_more)
        df = mine.f if project else to.o
        _solve_backward(pieces, made, mine, to, df, beside)
        df = df.view(n, width)
        if project:
            torch.mm(df, project[0], out=to.o.view(n, width))
            if dproject[0] is not None:
                weight_grad(dproject[0], df, o.view(n, width), beside)
        beside.rest()
        if beside.pending:
            pending.append((beside, early))

    _queue("start of the backward", p, settings, (*inputs, early, *outputs), start)
    return pending


def _solve_backward(pieces: Pieces, made: Kept, mine: Early, to: Between, df: Tensor, beside: Beside) -> None:
    """Feedback attention backward: gradients of q_b, k_b and gamma into `to`, that of f into df."""
    e = made.entered
    inputs, s, past = (mine.s, e.q_b, e.k_b, e.gamma), made.s, ops.no_past(e.q_b, True)
    into = (to.q_b, to.k_b, to.gamma, df, *past[:2])  # gradients of the past have no rows
    if pieces.backward is None:  # s stands for f: where f is not finite, s is not
        for out, grad in zip(into, route.feedback_backward(*inputs, s, s, made.lse, made.rest, *past), strict=True):
            out.copy_(grad)
        return
    mine.sync.zero_()
    route.feedback_queue_backward(pieces.backward, *inputs, s, made.lse, made.rest, *past, into, mine.workspace, mine.sync, beside)


def weight_grad(out: Tensor, dy: Tensor, x: Tensor, beside: Beside) -> None:
    """out = dy^T x (columns, depth) for dy (N,columns), x (N,depth), as it was summed where out is float32; beside: the stream it is queued on."""
    with beside:
        if out.dtype == dy.dtype:
            torch.mm(dy.t(), x, out=out)
        elif dy.is_cuda:
            torch.mm(dy.t(), x, out_dtype=out.dtype, out=out)
        else:
            torch.mm(dy.t().to(out.dtype), x.to(out.dtype), out=out)


def whole(
    form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: Weights, out_proj: Tensor | None, rows: bool = True
) -> tuple[Tensor, ...]:
    """A layer without a past, for a backward: its y (B,T,D) and, with `rows`, its rows k, v (B,T,Hkv,d), k_b, s (B,T,D). cos, sin, x, weights: as `head` takes
    them; out_proj: its weight, None where it is the identity.

    W_out's bias is added to the same rows as x, so its gradient is that of x's residual summed over them.
    """
    found = _Whole.apply(form, cos, sin, rows, x, out_proj, *weights.head, weights.out)
    return found if rows else (found,)

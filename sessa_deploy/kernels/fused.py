"""A layer on a GPU as two regions around its attentions, each one autograd node: fewer passes over the activations, fewer launches.

`head` goes from x to everything the attentions need (norm, W_in, GELU, gain, the projections, rotary positions), `tail` from s to y (gate,
W_out, residual). Same parameters, same equations as the plain modules; the matrix products stay the library's. Projections of the same
activations are joined, so that the backward is one product for the activations' gradient and one for the weights'.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sessa_deploy.kernels import ops

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Form(NamedTuple):
    """What a layer's regions need beside tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    gamma_max: float


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


def _unhooked(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says and nothing else."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def parameters(layer: Any) -> tuple[Tensor, ...]:
    """The layer's parameters as `head` and `tail` take them: norm, W_in, gain, q, k, v and feedback projections, bias and weight of W_out."""
    # straight from the modules' dictionaries: attribute look-ups on modules would cost as much as a launch
    modules = layer._modules
    mixer = modules["mixer"]
    inner = mixer._modules
    linear = [inner[name]._parameters for name in ("q_proj", "k_proj", "v_proj", "proj_fb")]
    ends = [modules[name]._parameters for name in ("ln", "W_in")]
    gain = (inner["gamma_ctx"]._parameters["weight"], mixer._parameters["gamma_bias"])
    pairs = [p[name] for p in ends for name in ("weight", "bias")]
    last = modules["W_out"]._parameters
    return (*pairs, *gain, *[p[name] for p in linear for name in ("weight", "bias")], last["bias"], last["weight"])


def applies(layer: Any, x: Tensor) -> tuple[Tensor, ...] | None:
    """`parameters` if a SessaLayer may take this road for x (B,T,D): a CUDA tensor that the feedback kernels take too, eager, plain modules, one dtype.

    None otherwise; SESSA_TRITON=0 turns the road off.
    """
    if not (x.is_cuda and x.dim() == 3 and x.numel() and x.dtype in _FLOATS and ops.uses_triton(x)):
        return None
    mixer = layer._modules["mixer"]
    inner = mixer._modules
    linear = (*(layer._modules[name] for name in ("W_in", "W_out")), *(inner[name] for name in ("q_proj", "k_proj", "v_proj", "proj_fb", "gamma_ctx")))
    if mixer.head_dim % 8 or mixer.head_dim > 1024 or not (_unhooked(layer._modules["ln"], nn.LayerNorm) and all(_unhooked(m, nn.Linear) for m in linear)):
        return None
    weights = parameters(layer)
    autocast = torch.is_autocast_enabled("cuda")
    dtype = storage_type(x)
    if any(p is None or p.dtype not in _FLOATS for p in weights) or dtype not in _FLOATS or not ops.is_eager(x, *weights):
        return None
    # without autocast the norm's and the gain's parameters may be float32 beside 16-bit activations, those of the projections not
    same = x.dtype in (torch.float32, dtype) if autocast else all(p.dtype == dtype for p in (*weights[2:4], *weights[6:]))
    return weights if same else None


def head(layer: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None, weights: tuple[Tensor, ...]) -> Head:
    """The layer from x (B,T,D) to its attentions' inputs. rope: float32 tables (B or 1,T,1,d/2), or None; weights: from `applies`."""
    mixer = layer._modules["mixer"]
    form = Form(mixer.n_heads, mixer.n_kv_heads, mixer.head_dim, layer._modules["ln"].eps, mixer.gamma_max)
    cos, sin = (None, None) if rope is None else (rope[0].contiguous(), rope[1].contiguous())
    weights = weights[:-1]
    if torch.is_grad_enabled() and any(p.requires_grad for p in (x, *weights)):
        return Head(*_Head.apply(form, cos, sin, x, *weights))
    return Head(*_head_forward(form, cos, sin, x, weights)[0])


def solve(layer: Any, o: Tensor, head: Head) -> Tensor | None:
    """s (B,T,D) without a past, of the forward attention's o (B,T,Hq,d): out_proj and feedback attention as one autograd node.

    None where there is nothing to join: no gradient is wanted, or out_proj is not a plain linear map.
    """
    out_proj = layer._modules["mixer"]._modules["out_proj"]
    weight = out_proj._parameters.get("weight")
    if weight is None or not (torch.is_grad_enabled() and _unhooked(out_proj, nn.Linear) and ops.is_eager(o, weight)):
        return None
    if weight.dtype != o.dtype and not torch.is_autocast_enabled("cuda"):
        return None  # the plain map says what is wrong
    return _Solve.apply(o, weight, head.q_b, head.k_b, head.gamma)


def tail(x: Tensor, s: Tensor, g: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """x + (s g) weight^T + bias for x, s, g (B,T,D); bias and weight are the last of `weights`, x and g from `head`.

    x and bias are added to the same rows, so the bias's gradient is that of x summed over them: `head`, which reads it anyway, returns it.
    """
    bias, weight = weights[-2].detach(), weights[-1]
    if torch.is_grad_enabled() and any(p.requires_grad for p in (x, s, g, weight)):
        return _Tail.apply(x, s, g, weight, bias)
    return _tail_forward(x, s, g, weight, bias)[0]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, contiguous and aligned; a copy only where it has to be. (What is there already costs no call: launches are short.)"""
    x = x if x.dtype == dtype else x.to(dtype)
    x = x if x.is_contiguous() else x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _head_forward(form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """(the fields of Head, what the backward needs)."""
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, more, tiles

    batch, tokens, width = x.shape
    n, d8, dtype, device = batch * tokens, width // 8, storage_type(x), x.device
    ln_w, ln_b, w_in, b_in, w_gain, b_gain, wq, bq, wk, bk, wv, bv, wfb, bfb, _ = weights
    inner = wq.shape[0] + 2 * wk.shape[0]  # columns of q, k and v
    heads = (form.heads, form.kv_heads, form.kv_heads)
    rows = rows_of(x, x.dtype)
    ln_w, ln_b = rows_of(ln_w, ln_w.dtype), rows_of(ln_b, ln_b.dtype)
    w_in, b_in = rows_of(w_in, dtype), rows_of(b_in, dtype)
    w_gain, b_gain = rows_of(w_gain, torch.float32), rows_of(b_gain, torch.float32)

    y, a = (torch.empty((batch, tokens, width), dtype=dtype, device=device) for _ in range(2))
    mean, rstd, gamma = (torch.empty((batch, tokens), dtype=torch.float32, device=device) for _ in range(3))
    norm, flat = tiles("row", width), tiles("flat")
    launch(fk.fused_norm, (cdiv(n, norm["BT"]),), (rows, ln_w, ln_b, y, mean, rstd, n, d8, form.eps), norm)
    h = F.linear(y, w_in, b_in)
    launch(fk.fused_gelu_gain, (cdiv(n, flat["BT"]),), (h, w_gain, b_gain, a, gamma, n, d8, form.gamma_max), flat)
    # one copy of the projections, in the order q, k, v and the feedback branch's q and k, whose products are
    # separate because feedback attention wants rows of its own
    w, b = torch.cat((wq, wk, wv, wfb)), torch.cat((bq, bk, bv, bfb))
    if w.dtype != dtype or b.dtype != dtype:
        w, b = w.to(dtype), b.to(dtype)
    parts = [inner, width, width]
    qkv, q_b, k_b = (F.linear(a, *pair) for pair in zip(w.split(parts), b.split(parts), strict=True))
    if cos is not None:
        turn = more("turn", form.head_dim, HEADS=4)
        turned = form.heads + form.kv_heads
        launch(fk.fused_rotate, (cdiv(n, turn["BT"]), cdiv(turned, turn["HEADS"])),
               (qkv, cos, sin, n, cos.shape[0] * tokens, turned, form.head_dim // 8, inner // 8), turn)  # fmt: skip
    q, k, v = qkv.view(batch, tokens, -1, form.head_dim).split(heads, dim=2)
    return (q, k, v, q_b, k_b, gamma, h[..., width:], x), (rows, y, mean, rstd, h, a, gamma, w_in, w, ln_w, w_gain, cos, sin)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, cos, sin, x, *weights):  # type: ignore[no-untyped-def]
        out, saved = _head_forward(form, cos, sin, x, weights)
        ctx.save_for_backward(*saved)
        ctx.form, ctx.types = form, [p.dtype for p in weights]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv, dq_b, dk_b, dgamma, dg, dx):  # type: ignore[no-untyped-def]
        from sessa_deploy.kernels import fused_kernels as fk
        from sessa_deploy.kernels.fused_launch import ROWS, launch, more, tiles

        form: Form = ctx.form
        x, y, mean, rstd, h, a, gamma, w_in, w, ln_w, w_gain, cos, sin = ctx.saved_tensors
        batch, tokens, width = x.shape
        n, dtype, device = batch * tokens, h.dtype, h.device
        kv, joined = form.kv_heads * form.head_dim, w.shape[0]
        chunks, d8, j8 = cdiv(n, ROWS), width // 8, joined // 8
        # sums over rows: biases of q, k, v, feedback, W_in, then the gain's weight and bias, the norm's, W_out's bias
        sizes = [width, kv, kv, 2 * width, 2 * width, width, 8, width, width, width]
        total = sum(sizes)
        partial = torch.empty((chunks, total), dtype=torch.float32, device=device)
        grads = torch.empty((n, joined), dtype=dtype, device=device)
        dq, dk, dv, dq_b, dk_b, dg = (rows_of(g, dtype) for g in (dq, dk, dv, dq_b, dk_b, dg))
        collect = more("collect", COPY=True, ROWS=ROWS)
        if cos is None:
            launch(fk.fused_collect, (chunks, cdiv(width, collect["BD"]), 2),
                   (dq, dk, dk, grads, partial, n, d8, kv // 8, kv // 8, 0, j8, total // 8), collect)  # fmt: skip
        else:
            launch(fk.fused_rotate_grad, (chunks, form.heads + form.kv_heads),
                   (dq, dk, grads, cos, sin, partial, n, cos.shape[0] * tokens, form.heads, form.kv_heads, form.head_dim // 8, j8, total // 8),
                   more("turn sums", form.head_dim, ROWS=ROWS))  # fmt: skip
        launch(fk.fused_collect, (chunks, cdiv(width, collect["BD"]), 3),
               (dv, dq_b, dk_b, grads, partial, n, kv // 8, d8, d8, (width + kv) // 8, j8, total // 8), collect)  # fmt: skip
        da = torch.mm(grads, w)
        needs = ctx.needs_input_grad[4:]
        dw = torch.mm(grads.t(), a.view(n, width)).split([width, kv, kv, 2 * width]) if any(needs[6:14:2]) else (None,) * 4
        dh = torch.empty((n, 2 * width), dtype=dtype, device=device)
        flat = more("flat sums", ROWS=ROWS)
        launch(fk.fused_gelu_gain_grad, (chunks, cdiv(width, flat["BD"])),
               (h, da, gamma, rows_of(dgamma, torch.float32), w_gain, dg, dh, partial, n, d8, total // 8, j8, form.gamma_max), flat)  # fmt: skip
        dy = torch.mm(dh, w_in)
        dw_in = torch.mm(dh.t(), y.view(n, width)) if needs[2] else None
        dx_rows = torch.empty_like(x)
        launch(fk.fused_norm_grad, (chunks,),
               (x, ln_w, mean, rstd, dy, rows_of(dx, dx.dtype), dx_rows, partial, n, d8, total // 8, (total - 3 * width) // 8),
               more("row sums", width, ROWS=ROWS))  # fmt: skip
        exact, rounded = (torch.empty(total, dtype=t, device=device) for t in (torch.float32, dtype))
        options = tiles("total")
        launch(fk.fused_total, (cdiv(total, options["BD"]),), (partial, exact, rounded, chunks, total // 8), options)
        # each in the type of its parameter, as far as that is one of the two
        types = ctx.types
        sums = [(rounded if t == dtype else exact)[at : at + size] for t, at, size in zip(
            [types[i] for i in (7, 9, 11, 13, 3, 4, 5, 0, 1, 14)], itertools.accumulate(sizes, initial=0), sizes, strict=False)]  # fmt: skip
        bq, bk, bv, bfb, b_in, dw_gain, db_gain, dln_w, dln_b, b_out = sums
        out = (dln_w, dln_b, dw_in, b_in, dw_gain.view(1, width), db_gain[0], dw[0], bq, dw[1], bk, dw[2], bv, dw[3], bfb, b_out)
        return None, None, None, dx_rows, *(g if need else None for g, need in zip(out, needs, strict=True))


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, weight, q_b, k_b, gamma):  # type: ignore[no-untyped-def]
        o, weight = rows_of(o, q_b.dtype), rows_of(weight, q_b.dtype)
        past = ops.no_past(q_b, True)
        f = F.linear(o.view(q_b.shape), weight)
        s, *kept = ops.run_forward(q_b, k_b, gamma, f, *past, need_lse=True)
        ctx.save_for_backward(o, weight, q_b, k_b, gamma, f, s, *kept, *past)
        return s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ds):  # type: ignore[no-untyped-def]
        o, weight, *saved = ctx.saved_tensors
        dq, dk, dgamma, df, *_ = ops.run_backward(ds, *saved)
        rows = df.view(-1, df.shape[-1])
        do = torch.mm(rows, weight).view(o.shape)
        dweight = torch.mm(rows.t(), o.view(rows.shape)) if ctx.needs_input_grad[1] else None
        return do, dweight, dq, dk, dgamma


def spaced(g: Tensor) -> tuple[Tensor, int]:
    """g (B,T,D) with evenly spaced, aligned rows, and their distance in elements; a copy only where it has to be."""
    batch, tokens, width = g.shape
    across, row, one = g.stride()
    even = one == 1 and row % 8 == 0 and row >= width and (batch == 1 or across == tokens * row) and g.data_ptr() % 16 == 0
    return (g, row) if even else (rows_of(g, g.dtype), width)


def _tail_forward(x: Tensor, s: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, tiles

    width, dtype = x.shape[-1], s.dtype
    s, (g, row), weight = rows_of(s, dtype), spaced(g), rows_of(weight, dtype)
    gated = torch.empty_like(s)
    n, flat = s.numel() // width, tiles("flat")
    launch(fk.fused_gate, (cdiv(n, flat["BT"]), cdiv(width, flat["BD"])), (s, g, gated, n, width // 8, row // 8), flat)
    y = F.linear(gated, weight, bias if bias.dtype == dtype else bias.to(dtype))
    return y.add_(x) if y.dtype == x.dtype else y + x, (s, g, gated, weight)


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s, g, weight, bias):  # type: ignore[no-untyped-def]
        y, saved = _tail_forward(x, s, g, weight, bias)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        from sessa_deploy.kernels import fused_kernels as fk
        from sessa_deploy.kernels.fused_launch import launch, tiles

        s, g, gated, weight = ctx.saved_tensors
        width = s.shape[-1]
        n, flat = s.numel() // width, tiles("flat")
        rows = rows_of(dy, s.dtype).view(n, width)
        dgated = torch.mm(rows, weight)
        ds, dg = torch.empty_like(s), torch.empty_like(s)
        g, row = spaced(g)
        launch(fk.fused_gate_grad, (cdiv(n, flat["BT"]), cdiv(width, flat["BD"])), (dgated, s, g, ds, dg, n, width // 8, row // 8), flat)
        dweight = torch.mm(rows.t(), gated.view(n, width)) if ctx.needs_input_grad[3] else None
        return dy, ds, dg, dweight, None

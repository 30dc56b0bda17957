"""A layer on a GPU as two regions around its attentions, each one autograd node: fewer passes over the activations, fewer launches.

`head` goes from x to everything the attentions need (norm, W_in, GELU, gain, the projections, rotary positions), `tail` from s to y (gate,
W_out, residual). Same parameters, same equations as the plain modules; the matrix products stay the library's. Projections of the same
activations are joined, so that the backward is one product for the activations' gradient and one for the weights'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sessa_deploy.kernels.ops import is_eager, uses_triton

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
    """The layer's parameters as `head` and `tail` take them: norm, W_in, gain, q, k, v and feedback projections, W_out."""
    # straight from the modules' dictionaries: attribute look-ups on modules would cost as much as a launch
    modules = layer._modules
    mixer = modules["mixer"]
    inner = mixer._modules
    linear = [inner[name]._parameters for name in ("q_proj", "k_proj", "v_proj", "proj_fb")]
    ends = [modules[name]._parameters for name in ("ln", "W_in")]
    gain = (inner["gamma_ctx"]._parameters["weight"], mixer._parameters["gamma_bias"])
    pairs = [p[name] for p in ends for name in ("weight", "bias")]
    last = modules["W_out"]._parameters
    return (*pairs, *gain, *[p[name] for p in linear for name in ("weight", "bias")], last["weight"], last["bias"])


def applies(layer: Any, x: Tensor) -> tuple[Tensor, ...] | None:
    """`parameters` if a SessaLayer may take this road for x (B,T,D): a CUDA tensor that the feedback kernels take too, eager, plain modules, one dtype.

    None otherwise; SESSA_TRITON=0 turns the road off.
    """
    if not (x.is_cuda and x.dim() == 3 and x.numel() and x.dtype in _FLOATS and uses_triton(x)):
        return None
    mixer = layer._modules["mixer"]
    inner = mixer._modules
    linear = (*(layer._modules[name] for name in ("W_in", "W_out")), *(inner[name] for name in ("q_proj", "k_proj", "v_proj", "proj_fb", "gamma_ctx")))
    if mixer.head_dim % 8 or mixer.head_dim > 1024 or not (_unhooked(layer._modules["ln"], nn.LayerNorm) and all(_unhooked(m, nn.Linear) for m in linear)):
        return None
    weights = parameters(layer)
    autocast = torch.is_autocast_enabled("cuda")
    dtype = storage_type(x)
    if any(p is None or p.dtype not in _FLOATS for p in weights) or dtype not in _FLOATS or not is_eager(x, *weights):
        return None
    # without autocast the norm's and the gain's parameters may be float32 beside 16-bit activations, those of the projections not
    same = x.dtype in (torch.float32, dtype) if autocast else all(p.dtype == dtype for p in (*weights[2:4], *weights[6:]))
    return weights if same else None


def head(layer: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None, weights: tuple[Tensor, ...]) -> Head:
    """The layer from x (B,T,D) to its attentions' inputs. rope: float32 tables (B or 1,T,1,d/2), or None; weights: from `applies`."""
    mixer = layer._modules["mixer"]
    form = Form(mixer.n_heads, mixer.n_kv_heads, mixer.head_dim, layer._modules["ln"].eps, mixer.gamma_max)
    cos, sin = (None, None) if rope is None else (rope[0].contiguous(), rope[1].contiguous())
    weights = weights[:-2]
    if torch.is_grad_enabled() and any(p.requires_grad for p in (x, *weights)):
        return Head(*_Head.apply(form, cos, sin, x, *weights))
    return Head(*_head_forward(form, cos, sin, x, weights)[0])


def tail(x: Tensor, s: Tensor, g: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """x + (s g) weight^T + bias for x, s, g (B,T,D); weight and bias are the last of `weights`."""
    weight, bias = weights[-2:]
    if torch.is_grad_enabled() and any(p.requires_grad for p in (x, s, g, weight, bias)):
        return _Tail.apply(x, s, g, weight, bias)
    return _tail_forward(x, s, g, weight, bias)[0]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _rows(x: Tensor, width: int) -> Tensor:
    """x as contiguous, aligned rows (N,width); a copy only where it has to be."""
    x = x.reshape(-1, width)
    x = x if x.is_contiguous() else x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _rows(x.to(dtype), x.numel()).view(-1)


def _head_forward(form: Form, cos: Tensor | None, sin: Tensor | None, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """(the fields of Head, what the backward needs)."""
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, more, tiles

    batch, tokens, width = x.shape
    n, dtype, device = batch * tokens, storage_type(x), x.device
    ln_w, ln_b, w_in, b_in, w_gain, b_gain, *projections = weights
    kv = form.kv_heads * form.head_dim
    inner = width + 2 * kv  # columns of q, k and v
    x_rows = _rows(x, width)
    # joined: q, k, v, then the feedback branch's q and k
    w, b = (torch.cat(projections[i::2]).to(dtype) for i in (0, 1))
    w_in, b_in = w_in.to(dtype), b_in.to(dtype)
    ln_w, ln_b = _rows(ln_w, width), _rows(ln_b, width)
    w_gain, b_gain = _flat(w_gain, torch.float32), _flat(b_gain, torch.float32)

    y, a = (torch.empty(n, width, dtype=dtype, device=device) for _ in range(2))
    mean, rstd, gamma = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(3))
    norm, flat = tiles("row", width), tiles("flat")
    launch(fk.fused_norm, (_cdiv(n, norm["BT"]),), (x_rows, ln_w, ln_b, y, mean, rstd, n, width // 8, form.eps), norm)
    h = torch.addmm(b_in, y, w_in.t())
    launch(fk.fused_gelu_gain, (_cdiv(n, flat["BT"]),), (h, w_gain, b_gain, a, gamma, n, width // 8, form.gamma_max), flat)
    qkv = torch.addmm(b[:inner], a, w[:inner].t())
    # separate products: feedback attention wants rows of its own
    q_b, k_b = (torch.addmm(b[at : at + width], a, w[at : at + width].t()) for at in (inner, inner + width))
    if cos is not None:
        turn = more("turn", form.head_dim, HEADS=4)
        heads, period = form.heads + form.kv_heads, cos.shape[0] * tokens
        grid = (_cdiv(n, turn["BT"]), _cdiv(heads, turn["HEADS"]))
        launch(fk.fused_rotate, grid, (qkv, cos, sin, n, period, heads, form.head_dim // 8, inner // 8), turn)
    q, k, v = (part.view(batch, tokens, -1, form.head_dim) for part in qkv.view(batch, tokens, inner).split([width, kv, kv], dim=-1))
    g = h.view(batch, tokens, 2 * width)[..., width:]
    out = (q, k, v, q_b.view(batch, tokens, width), k_b.view(batch, tokens, width), gamma.view(batch, tokens), g, x)
    return out, (x_rows, y, mean, rstd, h, a, gamma, w_in, w, ln_w, w_gain, cos, sin)


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
        from sessa_deploy.kernels.fused_launch import ROWS, launch, more

        form: Form = ctx.form
        x, y, mean, rstd, h, a, gamma, w_in, w, ln_w, w_gain, cos, sin = ctx.saved_tensors
        shape = dx.shape
        n, width = x.shape
        kv = form.kv_heads * form.head_dim
        joined, inner = w.shape[0], width + 2 * kv
        chunks = _cdiv(n, ROWS)
        sums = _Sums(n, joined + 5 * width + 8, h)
        grads = torch.empty(n, joined, dtype=h.dtype, device=h.device)
        dq, dk, dv = _rows(dq, width), _rows(dk, kv), _rows(dv, kv)
        if cos is None:
            sums.collect(0, dq, dk, out=grads)
        else:
            turn = more("turn", form.head_dim, ROWS=ROWS)
            period = cos.shape[0] * shape[1]
            launch(fk.fused_rotate_grad, (chunks, form.heads + form.kv_heads),
                   (dq, dk, grads, cos, sin, sums.partial, n, period, form.heads, form.kv_heads, form.head_dim // 8, joined // 8, sums.width // 8), turn)
        sums.collect(width + kv, dv, _rows(dq_b, width), _rows(dk_b, width), out=grads)
        da = torch.mm(grads, w)
        needs = ctx.needs_input_grad[4:]
        dw = torch.mm(grads.t(), a) if any(needs[6::2]) else None
        dh = torch.empty_like(h)
        flat = more("flat sums", ROWS=ROWS)
        launch(fk.fused_gelu_gain_grad, (chunks, _cdiv(width, flat["BD"])),
               (h, da, gamma, _flat(dgamma, torch.float32), w_gain, _rows(dg, width), dh, sums.partial, n, width // 8, sums.width // 8, joined // 8,
                form.gamma_max), flat)  # fmt: skip
        dy = torch.mm(dh, w_in)
        dw_in = torch.mm(dh.t(), y) if needs[2] else None
        dx_rows = torch.empty_like(x)
        launch(fk.fused_norm_grad, (chunks,),
               (x, ln_w, mean, rstd, dy, _rows(dx, width), dx_rows, sums.partial, n, width // 8, sums.width // 8, (joined + 3 * width + 8) // 8),
               more("row sums", width, ROWS=ROWS))  # fmt: skip
        sums.total()
        at = (joined + 3 * width + 8, joined + 4 * width + 8, None, joined, joined + 2 * width, joined + 3 * width)
        starts = (*at, None, 0, None, width, None, width + kv, None, inner)
        sizes = (width, width, 0, 2 * width, width, 1, 0, width, 0, kv, 0, kv, 0, 2 * width)
        out = [None if i is None or not need else sums.part(i, size, t) for i, size, t, need in zip(starts, sizes, ctx.types, needs, strict=True)]
        if out[4] is not None:
            out[4] = out[4].view(1, width)
        if out[5] is not None:
            out[5] = out[5].view(())
        out[2] = dw_in
        if dw is not None:
            out[6], out[8], out[10], out[12] = dw.split([width, kv, kv, 2 * width])
        return None, None, None, dx_rows.view(shape) if ctx.needs_input_grad[3] else None, *out


class _Sums:
    """Column sums of a backward: partial (chunks, width) float32 that the kernels fill, then their totals in float32 and in the storage type."""

    def __init__(self, n: int, width: int, like: Tensor) -> None:
        from sessa_deploy.kernels.fused_launch import ROWS

        self.n, self.width, self.chunks = n, width, _cdiv(n, ROWS)
        self.partial = torch.empty(self.chunks, width, dtype=torch.float32, device=like.device)
        self.exact = torch.empty(width, dtype=torch.float32, device=like.device)
        self.rounded = torch.empty(width, dtype=like.dtype, device=like.device)

    def collect(self, at: int, *parts: Tensor, out: Tensor | None = None) -> None:
        """Sum the columns of up to three (N,*) tensors into columns `at` on; `out`: copy them there as well, side by side."""
        from sessa_deploy.kernels import fused_kernels as fk
        from sessa_deploy.kernels.fused_launch import ROWS, launch, more

        options = more("flat", COPY=out is not None, ROWS=ROWS)
        a, b, c = (*parts, *parts[:1] * (3 - len(parts)))
        target = a if out is None else out
        grid = (self.chunks, _cdiv(max(x.shape[1] for x in parts), options["BD"]), len(parts))
        widths = (a.shape[1] // 8, b.shape[1] // 8, c.shape[1] // 8)
        launch(fk.fused_collect, grid, (a, b, c, target, self.partial, self.n, *widths, at // 8, target.shape[1] // 8, self.width // 8), options)

    def total(self) -> None:
        """Add the chunks up."""
        from sessa_deploy.kernels import fused_kernels as fk
        from sessa_deploy.kernels.fused_launch import launch, tiles

        options = tiles("total")
        launch(fk.fused_total, (_cdiv(self.width, options["BD"]),), (self.partial, self.exact, self.rounded, self.chunks, self.width // 8), options)

    def part(self, at: int, size: int, dtype: torch.dtype) -> Tensor:
        """The sums of columns at : at + size in the type of their parameter."""
        return (self.rounded if dtype == self.rounded.dtype else self.exact)[at : at + size].to(dtype)


def _spaced(g: Tensor) -> tuple[Tensor, int]:
    """g (B,T,D) with evenly spaced, aligned rows, and their distance in elements; a copy only where it has to be."""
    batch, tokens, width = g.shape
    row = g.stride(1)
    even = g.stride(2) == 1 and row % 8 == 0 and row >= width and (batch == 1 or g.stride(0) == tokens * row) and g.data_ptr() % 16 == 0
    return (g, row) if even else (_rows(g, width), width)


def _tail_forward(x: Tensor, s: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, tiles

    width, dtype = x.shape[-1], s.dtype
    s = _rows(s, width)
    g, row = _spaced(g)
    gated = torch.empty_like(s)
    n, flat = s.shape[0], tiles("flat")
    launch(fk.fused_gate, (_cdiv(n, flat["BT"]), _cdiv(width, flat["BD"])), (s, g, gated, n, width // 8, row // 8), flat)
    weight = weight.to(dtype)
    y = torch.addmm(bias.to(dtype), gated, weight.t()).view(x.shape)
    y = y.add_(x) if y.dtype == x.dtype else y + x
    return y, (s, g, gated, weight)


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s, g, weight, bias):  # type: ignore[no-untyped-def]
        y, saved = _tail_forward(x, s, g, weight, bias)
        ctx.save_for_backward(*saved)
        ctx.shape, ctx.bias_type = s.shape, bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        from sessa_deploy.kernels import fused_kernels as fk
        from sessa_deploy.kernels.fused_launch import launch, tiles

        s, g, gated, weight = ctx.saved_tensors
        n, width = s.shape
        rows = _rows(dy.to(s.dtype), width)
        dgated = torch.mm(rows, weight)
        ds, dg = torch.empty_like(s), torch.empty_like(s)
        g, row = _spaced(g.view(ctx.shape) if g.dim() == 2 else g)
        flat = tiles("flat")
        launch(fk.fused_gate_grad, (_cdiv(n, flat["BT"]), _cdiv(width, flat["BD"])), (dgated, s, g, ds, dg, n, width // 8, row // 8), flat)
        dweight = torch.mm(rows.t(), gated) if ctx.needs_input_grad[3] else None
        dbias = None
        if ctx.needs_input_grad[4]:
            sums = _Sums(n, width, s)
            sums.collect(0, rows)
            sums.total()
            dbias = sums.part(0, width, ctx.bias_type)
        return dy, ds.view(ctx.shape), dg.view(ctx.shape), dweight, dbias


def clean_rows(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of k and v (B,T,H,d) whose non-finite rows are zeros in both, and (B,) int32: the first such row, T where there is none."""
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, tiles

    batch, tokens = k.shape[:2]
    (k_rows, k_row), (v_rows, v_row) = _spaced(k.flatten(2)), _spaced(v.flatten(2))
    width, n = k.shape[2] * k.shape[3], batch * tokens
    k_out, v_out = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    first_bad = torch.full((batch,), tokens, dtype=torch.int32, device=k.device)
    row = tiles("row", width)
    launch(fk.fused_clean, (_cdiv(n, row["BT"]),), (k_rows, v_rows, k_out, v_out, first_bad, n, tokens, width // 8, k_row // 8, v_row // 8), row)
    return k_out, v_out, first_bad


def poison_rows(x: Tensor, first_bad: Tensor) -> Tensor:
    """x (B,T,H,d) with NaN from each sequence's first_bad row on; in place where x is contiguous."""
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, tiles

    batch, tokens = x.shape[:2]
    rows, flat = _rows(x, x.shape[2] * x.shape[3]), tiles("flat")
    launch(fk.fused_poison, (_cdiv(batch * tokens, flat["BT"]),), (rows, first_bad, batch * tokens, tokens, rows.shape[1] // 8), flat)
    return rows.view(x.shape)


def appends(rows: Sequence[Tensor]) -> bool:
    """Whether `append_rows` takes these new rows (B,T,*)."""
    return is_eager(*rows) and uses_triton(rows[-1]) and all(x.shape[2:].numel() % 8 == 0 for x in rows)


def append_rows(rows: Sequence[Tensor], stores: Sequence[Tensor], length: Tensor, new_length: Tensor | None) -> None:
    """Write row t < new_length[b] (every row where None) of k_f, v_f (B,T,Hkv,d), k_b and s (B,T,D) to row length[b] + t of their stores (B,capacity,*)."""
    from sessa_deploy.kernels import fused_kernels as fk
    from sessa_deploy.kernels.fused_launch import launch, more

    batch, tokens = rows[0].shape[:2]
    new, apart = zip(*(_spaced(x.flatten(2)) for x in rows), strict=True)
    widths = (new[0].shape[-1] // 8, new[-1].shape[-1] // 8)
    launch(fk.fused_append, (tokens, batch, len(new)),
           (*new, *stores, length, length if new_length is None else new_length, tokens, stores[0].shape[1], *widths, *(r // 8 for r in apart)),
           more("append", ALL=new_length is None))  # fmt: skip

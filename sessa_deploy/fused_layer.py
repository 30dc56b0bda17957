"""Which of a SessaLayer's modules the fused regions of kernels/training stand in for, and when: the same parameters, the same equations, fewer launches.

On a GPU, in eager calls, a layer takes `whole` in training, else `head` and `tail`, in place of its plain modules. The plain ones run on a CPU, in float64,
under torch.compile, export, functorch or tensor subclasses, when a submodule carries hooks, has a forward of its own or is not the plain one, while PyTorch
has hooks for all modules, for gradients behind a past, and with SESSA_TRITON=0. Where a parameter is not on the GPU of x they say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sessa_deploy.kernels import route
from sessa_deploy.kernels.training import regions
from sessa_deploy.kernels.training import whole as training
from sessa_deploy.kernels.training.form import Form, HeadWeights, Weights
from sessa_deploy.kernels.training.regions import Head

_FLOATS = frozenset(route.FLOATS)
_PROJECTED = [i for i, name in enumerate((*HeadWeights._fields, "out")) if not name.startswith(("norm", "gamma"))]


def _unhooked(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says and nothing else."""
    have = module.__dict__
    if type(module) is not kind or "forward" in have:  # an instance's own, as libraries that move parameters set it
        return False
    return not (have["_forward_hooks"] or have["_forward_pre_hooks"] or have["_backward_hooks"] or have["_backward_pre_hooks"])


def parameters(layer: Any) -> Weights:
    """The layer's parameters as the regions take them, None for each that is not there."""
    # straight from the modules' dictionaries: attribute look-ups on modules would cost as much as a launch; replicas of a layer have nothing there
    modules = layer._modules
    mixer = modules["mixer"]
    inner = mixer._modules
    norm, enter, last, q, k, v, fb, gain = [m._parameters.get for m in (
        modules["ln"], modules["W_in"], modules["W_out"], inner["q_proj"], inner["k_proj"], inner["v_proj"], inner["proj_fb"], inner["gamma_ctx"])]  # fmt: skip
    w, b = "weight", "bias"
    head = HeadWeights(norm(w), norm(b), enter(w), enter(b), gain(w), mixer._parameters.get("gamma_bias"), q(w), q(b), k(w), k(b), v(w), v(b), fb(w), fb(b),
                       last(b))  # fmt: skip
    return Weights(head, last(w))


def applies(layer: Any, x: Tensor) -> Weights | None:
    """`parameters` if a SessaLayer may take this road for x (B,T,D): a CUDA tensor that the feedback kernels take too, eager, plain modules, one dtype.

    None otherwise; SESSA_TRITON=0 turns the road off.
    """
    return _of_plain_modules(layer, x) if x.is_cuda and x.dim() == 3 and x.numel() and x.dtype in route.FLOATS and route.uses_triton(x) else None


def _of_plain_modules(layer: Any, x: Tensor) -> Weights | None:
    """The rest of `applies`, for an x that the kernels take."""
    modules, mixer = layer._modules, layer._modules["mixer"]
    inner, own = mixer._modules, mixer.__dict__
    # loops in lists and no generators: every layer of every step comes by here before its first kernel
    linear = [modules["W_in"], modules["W_out"], inner["q_proj"], inner["k_proj"], inner["v_proj"], inner["proj_fb"], inner["gamma_ctx"]]
    if mixer.head_dim % 8 or mixer.head_dim > 1024 or "step" in own or "gain" in own or _has_any_global_hook():
        return None
    if not _unhooked(modules["ln"], nn.LayerNorm):
        return None
    for module in linear:
        if not _unhooked(module, nn.Linear):
            return None
    weights = parameters(layer)
    every = [*weights.head, weights.out]
    autocast = torch.is_autocast_enabled("cuda")
    dtype = regions.storage_type(x)
    if any([p is None for p in every]) or dtype not in route.FLOATS or not route.is_eager(x, *every):
        return None
    types, device = [p.dtype for p in every], x.device
    if not _FLOATS.issuperset(types) or any([p.device != device for p in every]):
        return None
    # without autocast the parameters of the norm and of gamma may be float32 beside 16-bit activations, those of the projections not
    one = types[_PROJECTED[0]]
    if not all([types[i] == one for i in _PROJECTED]) or not (x.dtype in (torch.float32, dtype) if autocast else one == dtype):
        return None
    return weights


def trains(layer: Any, x: Tensor, weights: Weights, past: Sequence[Tensor] | None) -> bool:
    """Whether a gradient will be wanted of what the layer gives for x behind this past."""
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    out_proj = layer._modules["mixer"]._modules["out_proj"].parameters()
    return any(p.requires_grad for p in (*weights.head, weights.out, *out_proj, *(past or ())))


def whole(layer: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None, weights: Weights, rows: bool = True) -> tuple[Tensor, ...] | None:
    """y (B,T,D) and, with `rows`, the rows k, v, k_b, s of a layer without a past, as one autograd node; None where out_proj is not a plain map without a
    bias. x, rope, weights: as `head` takes them."""
    out_proj = layer._modules["mixer"]._modules["out_proj"]
    weight = out_proj._parameters.get("weight")
    if not (_unhooked(out_proj, nn.Identity) if weight is None else _unhooked(out_proj, nn.Linear) and weight.dtype == weights.out.dtype):
        return None
    if weight is not None and not (out_proj._parameters.get("bias") is None and weight.device == x.device and route.is_plain(weight)):
        return None
    return training.whole(_form(layer), *_tables(rope), x, weights, weight, rows)


def _form(layer: Any) -> Form:
    mixer = layer._modules["mixer"]
    return Form(mixer.n_heads, mixer.n_kv_heads, mixer.head_dim, layer._modules["ln"].eps, mixer.gamma_max)


def _tables(rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    cos, sin = rope or (None, None)
    return (cos, sin) if cos is None or sin is None or (cos.is_contiguous() and sin.is_contiguous()) else (cos.contiguous(), sin.contiguous())


def head(layer: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None, weights: Weights) -> Head:
    """The layer from x (B,T,D) to its attentions' inputs. rope: float32 tables (B or 1,T,1,d/2), or None; weights: from `applies`."""
    return regions.head(_form(layer), *_tables(rope), x, weights.head)


def tail(layer: Any, s: Tensor, head: Head, rope: tuple[Tensor, Tensor] | None, weights: Weights) -> Tensor:
    """The layer's y (B,T,D) of the feedback branch's s (B,T,D). rope, weights: those of `head`."""
    return regions.tail(_form(layer), None if rope is None else rope[0], s, head, weights)

"""Routings that stress feedback attention, small launch options for the interpreter (a support module, no tests)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sessa_deploy.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTINGS = ("random", "chain", "alternating", "uniform", "key0", "large")
SIDED = ("feedback_scores", "feedback_combine", "feedback_inverse", "feedback_near")  # which way they go is a constexpr
TINY = 1e-25  # weights under float32's normal range may count as zero
NAMES = ("dq", "dk", "dgamma", "df", "dpast_k", "dpast_s")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def small_options(dtype: torch.dtype, tile: int = 16, rows: int = 32) -> dict[str, dict[str, Any]] | None:
    """Launch options with small tiles under the interpreter (a few rows then span several blocks); None, the pinned ones, on a GPU."""
    if DEVICE == "cuda":
        return None
    split, scaled = dtype != torch.float32, dtype == torch.float16
    solve = dict(BT=tile, BN=32, STAGES=1, SPLIT=split, FULL=scaled, LOW=split and (scaled or tile < 128))
    gemm = dict(BT=tile, BN=32, BK=tile, STAGES=1, SCALED=scaled)
    return {
        "feedback_pack": dict(BT=tile, BN=32, SPLIT=split),
        "feedback_solve": solve,
        "feedback_solve_transposed": solve,
        "feedback_grad_pack": dict(BT=16, BN=32, SPLIT=split, FULL=scaled),
        "feedback_grad_products": dict(BM=rows, BT=tile, BK=16, NB=2, GROUP=2, SPLIT=split, FULL=scaled),
        "feedback_grad_scores": dict(BM=rows, BT=tile, CHUNK=4, SPLIT=split, SCALED=scaled),
        "feedback_grad_q": gemm,
        "feedback_grad_k": gemm,
        "feedback_scores": dict(BM=rows, BT=tile, BK=16, NB=2, GROUP=2),
        "feedback_combine": dict(BT=tile, CHUNK=4, SPLIT=split),
    }


def with_stand_ins(options: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
    """`options` of bfloat16 and blocks of 128 rows with the kernels that stand in for others; None, the pinned ones, on a GPU."""
    if options is None:
        return None
    solve = dict(BT=128, BN=32, BK=64, STAGES=1)
    solves = {"feedback_solve_halves": {**solve, "TWO": True, "ALONE": False}, "feedback_solve_halves_transposed": {**solve, "TWO": False}}
    return {**options, **solves, "feedback_inverse": dict(CHUNK=4), "feedback_near": {}, "feedback_grad_qk": options["feedback_grad_q"]}


def side(options: dict[str, dict[str, Any]] | None, backward: bool) -> dict[str, dict[str, Any]] | None:
    """`options` with the constexpr that tells the forward's scores and combination from the backward's."""
    if options is None:
        return None
    found = {name: {**o, "BACKWARD": backward} if name in SIDED else o for name, o in options.items()}
    found["feedback_scores"]["PAST"] = not backward
    return found


def make(routing: str, batch: int, tokens: int, past: int, width: int, dtype: torch.dtype, sign: float = 1.0, seed: int = 0) -> Inputs:
    """q, k, gamma, f, past_k, past_s, past_length on DEVICE. past_length is ragged from 0 to `past`; gamma is sign * 0.999 but for "random"."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    q, k, f = (normal(batch, tokens, width) for _ in range(3))
    past_k, past_s = normal(batch, past, width), normal(batch, past, width)
    gamma = torch.full((batch, tokens), sign * 0.999)
    length = torch.linspace(0, past, batch).round().int() if batch > 1 else torch.tensor([past], dtype=torch.int32)
    if routing == "random":
        gamma = torch.rand(batch, tokens, generator=g) * 2 - 1
    elif routing in ("chain", "alternating"):
        # Keys are unit directions; a row's query is its predecessor's key, long enough that the softmax is one-hot. The past's last row is the
        # predecessor of the first new one.
        keys = torch.nn.functional.normalize(normal(batch, tokens + 1, width), dim=-1) * (400.0 * math.sqrt(width)) ** 0.5
        k, q = keys[:, 1:].clone(), keys[:, :tokens].clone()
        past_k = torch.nn.functional.normalize(normal(batch, past, width), dim=-1) if past else past_k
        for b in range(batch):
            if length[b]:
                past_k[b, length[b] - 1] = keys[b, 0]
        f = 0.9 + 0.2 * torch.rand(batch, tokens, width, generator=g)
        if routing == "alternating":
            f *= (1 - 2 * (torch.arange(tokens) % 2))[:, None]
    elif routing == "uniform":
        q = torch.zeros_like(q)
    elif routing == "key0":
        direction = normal(width)
        k = 0.01 * k
        k[:, 0] = direction * 20
        q = direction.expand_as(q).clone()
        past_k = 0.01 * past_k
    elif routing == "large":
        q, k = 12 * q, 12 * k
    tensors = [q.to(dtype), k.to(dtype), gamma, f.to(dtype), past_k.to(dtype), past_s.to(dtype), length]
    return tuple(x.to(DEVICE) for x in tensors)  # type: ignore[return-value]


def poison(x: Inputs) -> Inputs:
    """The same inputs with NaN and Inf in past rows from past_length on."""
    past_k, past_s = x[4].clone(), x[5].clone()
    for b, length in enumerate(x[6].tolist()):
        past_k[b, length:], past_s[b, length:] = float("nan"), float("inf")
    return (*x[:4], past_k, past_s, x[6])


def gradients(x: Inputs, ds: Tensor, work: torch.dtype) -> tuple[Tensor, ...]:
    """s and the six gradients of `reference.plain` on inputs taken to `work` (gamma to float64 only beside float64)."""
    leaves = [t.to(work if i != 2 or work == torch.float64 else torch.float32).detach().clone().requires_grad_() for i, t in enumerate(x[:6])]
    s = reference.plain(*leaves, x[6])
    s.backward(ds.to(s.dtype))
    return (s.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves))


def underflow(x: Inputs, exact: tuple[Tensor, ...]) -> dict[str, float]:
    """The most that float16's smallest step of a routing weight, 2^-40 of its row's sum, can move an element of dq, dk and dpast_k (16-bit storage).

    It matters where a softmax is so saturated that all of its gradient comes from weights below 2^-29. exact: `gradients` in float64.
    """
    q, k, gamma, _, past_k, past_s, length = (t.double() for t in x)
    s, u = exact[0], exact[1 + NAMES.index("df")]
    capacity = past_k.shape[1]
    live = (torch.arange(capacity, device=q.device) < length[:, None])[..., None]
    keys, values = torch.cat([torch.where(live, past_k, 0.0), k], 1), torch.cat([torch.where(live, past_s, 0.0), s], 1)
    alpha = reference.routing(q, k, past_k, length)
    r = u @ values.mT
    slope = (r - (alpha * r).sum(-1, keepdim=True)).abs() * gamma.abs()[..., None] / math.sqrt(q.shape[-1])
    lost = torch.where(alpha < 2.0**-29, alpha.clamp(max=2.0**-40), 0.0) * slope
    if lost.shape[-1]:
        lost = lost.scatter_add(-1, alpha.argmax(-1, keepdim=True), lost.sum(-1, keepdim=True))  # the largest weight's gradient balances the others'
    dk = (lost.mT @ q.abs()).amax(-1).amax(0) if lost.numel() else lost.new_zeros(lost.shape[-1])
    ends = {"dq": lost @ keys.abs(), "dk": dk[capacity:], "dpast_k": dk[:capacity]}
    return {name: float(t.max()) if t.numel() else 0.0 for name, t in ends.items()}

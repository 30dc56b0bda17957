"""Rotary positions that stay exact far out: the angle is reduced in turns before it is rounded."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from sessa_deploy import contract
from sessa_deploy.kernels.route import is_exporting

BASE = 10000.0
# A position's product with a limb below is exact in float32: 18 bits times at most 6.
MAX_POSITION = contract.MAX_POSITION


def _limbs(head_dim: int) -> list[list[float]]:
    """1 / (2 pi BASE^(2i/d)) turns a token, i < d/2, as three fixed-point limbs of at most 6 bits and a remainder."""
    turns = [BASE ** (-2.0 * i / head_dim) / (2.0 * math.pi) for i in range(head_dim // 2)]
    limbs = []
    for bits in (8, 14, 20):
        limb = [math.floor(x * 2.0**bits + 0.5) / 2.0**bits for x in turns]
        turns = [x - y for x, y in zip(turns, limb, strict=True)]
        limbs.append(limb)
    return [*limbs, turns]


@lru_cache(maxsize=16)
def _kept_limbs(head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(torch.tensor(x, dtype=torch.float32, device=device) for x in _limbs(head_dim))


def _limbs_on(head_dim: int, like: Tensor) -> tuple[Tensor, ...]:
    # Kept on a GPU: a copy from the host waits for the device at every decode step, and cannot be captured in a CUDA graph.
    if like.is_cuda and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        return _kept_limbs(head_dim, like.device)
    return tuple(torch.tensor(x, dtype=torch.float32, device=like.device) for x in _limbs(head_dim))


def rope_tables(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B,T,1,d/2) of t * 10000^(-2i/d) at integer positions t (B,T) < 2^18; float64 for float64, else float32.

    In float32 the product t * frequency alone would be wrong by 1e-3 rad at t = 32768. Here each limb's product is exact, whole turns
    are dropped from it, and the error stays near 3e-7 rad at any position.
    """
    if dtype == torch.float64:
        steps = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device)
        angle = positions.to(torch.float64)[..., None, None] * BASE ** (-2.0 * steps / head_dim)
        return torch.cos(angle), torch.sin(angle)
    if torch.compiler.is_compiling() and not is_exporting():
        # numbers of the host inside a compiled graph would keep it from being captured as a CUDA graph
        compiled: tuple[Tensor, Tensor] = _tables(positions, head_dim)
        return compiled
    return _exact_tables(positions, head_dim)


def _exact_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    at = positions.to(torch.float32)[..., None, None]
    *coarse, fine = _limbs_on(head_dim, positions)
    turn = at * coarse[0]
    turn = turn - torch.floor(turn)
    for limb in coarse[1:]:
        product = at * limb
        turn = turn + (product - torch.floor(product))
    turn = turn - torch.floor(turn) + at * fine
    angle = turn * (2.0 * math.pi)
    return torch.cos(angle), torch.sin(angle)


@torch.library.custom_op("sessa::rope_tables", mutates_args=())
def _tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    return _exact_tables(positions, head_dim)


@_tables.register_fake
def _(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    cos, sin = (positions.new_empty((*positions.shape, 1, head_dim // 2), dtype=torch.float32) for _ in range(2))
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (even, odd) of x (B,T,H,d) by the tables of `rope_tables`, computed in the tables' dtype, rounded once."""
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


_FIRST_ROWS = 256
_TABLES: dict[tuple[int, torch.device], list[tuple[Tensor, Tensor]]] = {}


def tables_from_zero(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The float32 tables (1,T,1,d/2) of positions 0..T-1 on a GPU, made once for each (d, device) and longest T so far, and kept for good.

    Kept even when longer ones replace them, because a captured CUDA graph remembers their addresses; lengths are powers of two, so all of them
    take at most twice the longest. Only for eager calls; what is made while a CUDA graph is captured belongs to the graph and is not kept.
    """
    kept = _TABLES.setdefault((head_dim, device), [])
    if kept and kept[-1][0].shape[1] >= tokens:
        cos, sin = kept[-1]
        return (cos, sin) if cos.shape[1] == tokens else (cos[:, :tokens], sin[:, :tokens])
    rows = max(_FIRST_ROWS, 1 << (tokens - 1).bit_length())
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a backward
        cos, sin = rope_tables(torch.arange(rows, device=device)[None], head_dim, torch.float32)
    if device.type != "cuda":
        kept.append((cos, sin))
    elif not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()  # other streams will read them too
        kept.append((cos, sin))
    return cos[:, :tokens], sin[:, :tokens]


def tables_at(positions: Tensor, limit: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The float32 tables (B,T,1,d/2) of positions (B,T), all below `limit`, out of the kept ones; as `tables_from_zero`, only for eager calls."""
    rows = positions.flatten()
    cos, sin = (x[0].index_select(0, rows).view(*positions.shape, 1, -1) for x in tables_from_zero(limit, head_dim, positions.device))
    return cos, sin

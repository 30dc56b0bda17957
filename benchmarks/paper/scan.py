"""Mamba-2's scan and convolution for `transformers`, by batched matrix products: the functions of its PyTorch path without what makes them slow on a GPU.

That path of transformers multiplies out tensors of (chunk, chunk, heads, state) before it sums (until 5.23), and its depthwise convolution's gradient takes a
kernel of PyTorch's that is slow for many short rows. Here scores C B^T are formed once a group, not once a head, and the convolution is four shifted products.
Everything is computed in float32, as the CUDA kernels of mamba_ssm do with decays and states. The algorithm: arXiv 2405.21060, section 6.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None, dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False, **rest: Any,
) -> Any:
    """y (B,T,H,P) float32 of hidden_states (B,T,H,P), dt (B,T,H), A (H,), B and C (B,T,G,N), D (H,): transformers' `mamba2_chunk_scan`, its arguments and
    results; with return_final_states also the state (B,H,P,N)."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        rows, length, heads, width = hidden_states.shape
        groups, state = B.shape[2], B.shape[3]
        dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
        dt = torch.clamp(F.softplus(dt) if dt_softplus else dt, min=dt_limit[0], max=dt_limit[1])
        x = hidden_states.float()
        room, each = -length % chunk_size, heads // groups

        def chunks(part: Tensor) -> Tensor:
            """(B,T,K,...) as (B,c,K,l,...)."""
            padded = F.pad(part, (0, 0) * (part.dim() - 2) + (0, room)) if room else part
            return padded.unflatten(1, (-1, chunk_size)).transpose(2, 3)

        fed = chunks(x * dt[..., None]).unflatten(2, (groups, each))  # (B,c,G,h,l,P)
        decay = chunks(dt * A.float()).cumsum(-1).unflatten(2, (groups, each))  # (B,c,G,h,l)
        left, right = chunks(C.float()), chunks(B.float())  # (B,c,G,l,N)
        causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
        within = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        y = ((left @ right.transpose(-1, -2))[:, :, :, None] * within) @ fed  # (B,c,G,h,l,P)

        last = decay[..., -1]  # (B,c,G,h)
        grown = (fed * (last[..., None] - decay).exp()[..., None]).transpose(-1, -2) @ right[:, :, :, None]  # (B,c,G,h,P,N): what a chunk adds
        held = torch.zeros_like(grown[:, 0]) if initial_states is None else initial_states.float().reshape(grown[:, 0].shape)
        before = []
        for i in range(grown.shape[1]):
            before.append(held)
            held = held * last[:, i].exp()[..., None, None] + grown[:, i]
        y = y + (left[:, :, :, None] @ torch.stack(before, 1).transpose(-1, -2)) * decay.exp()[..., None]
        out = y.flatten(2, 3).transpose(2, 3).reshape(rows, -1, heads, width)[:, :length]
        if D is not None:
            out = out + D.float()[:, None] * x
        return (out, held.reshape(rows, heads, width, state)) if return_final_states else out


def causal_conv(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **rest: Any) -> Tensor:
    """(B,C,T) of (B,C,T) by weight (C,k), one filter a channel, nothing seen of the future: transformers' `causal_conv1d_fn`."""
    taps, length = weight.shape[-1], hidden_states.shape[-1]
    x = F.pad(hidden_states.transpose(1, 2).float(), (0, 0, taps - 1, 0))  # (B,T,C): as the projection wrote it
    out = sum((x[:, i : i + length] * weight[:, i].float() for i in range(taps)), torch.zeros((), device=x.device))
    if bias is not None:
        out = out + bias.float()
    if activation is not None:
        out = {"silu": F.silu, "swish": F.silu}[activation](out)
    return out.to(hidden_states.dtype).transpose(1, 2)


def install() -> None:
    """Let Mamba-2 of transformers compute with these two, unless the CUDA kernels of mamba_ssm are there: then with those."""
    from transformers.models.mamba2 import modeling_mamba2 as library

    if importlib.util.find_spec("mamba_ssm") is None:
        functions: dict[str, Any] = {"mamba2_chunk_scan": chunk_scan, "causal_conv1d_fn": causal_conv}
        for name, ours in functions.items():
            if not hasattr(library, name):
                raise ImportError(f"transformers has no {name} in its Mamba-2")
            if getattr(library, name) is not ours:
                ours.theirs = getattr(library, name)
                setattr(library, name, ours)

"""What a layer's regions are told beside activations: its form, its parameters, and the columns of what a backward sums over rows."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor


class Form(NamedTuple):
    """What a layer's regions need beside tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    gamma_max: float


class HeadWeights(NamedTuple):
    """A layer's parameters up to its attentions, weights (columns, depth) as in a state dict, and W_out's bias, whose gradient `head` returns (see `tail`)."""

    norm_weight: Tensor
    norm_bias: Tensor
    in_weight: Tensor
    in_bias: Tensor
    gamma_weight: Tensor
    gamma_bias: Tensor
    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    fb_weight: Tensor
    fb_bias: Tensor
    out_bias: Tensor


class Weights(NamedTuple):
    """What the regions of a layer need: `head` and W_out's weight (D,D)."""

    head: HeadWeights
    out: Tensor


class Sums(NamedTuple):
    """What the backward of `head` sums over rows, in the order of its columns; each is the gradient of the parameter of that name."""

    q_bias: Any
    k_bias: Any
    v_bias: Any
    fb_bias: Any
    in_bias: Any
    gamma_weight: Any
    gamma_bias: Any
    norm_weight: Any
    norm_bias: Any
    out_bias: Any


class Layout(NamedTuple):
    """Where the columns of `Sums` begin and how many they are, each a multiple of 8, and all of them."""

    first: Sums
    sizes: Sums
    total: int


@lru_cache(maxsize=64)
def layout(width: int, kv: int) -> Layout:
    """The layout of a layer with D = width whose keys are kv wide."""
    sizes = Sums(q_bias=width, k_bias=kv, v_bias=kv, fb_bias=2 * width, in_bias=2 * width, gamma_weight=width, gamma_bias=8, norm_weight=width,
                 norm_bias=width, out_bias=width)  # fmt: skip
    return Layout(Sums(*itertools.accumulate(sizes[:-1], initial=0)), sizes, sum(sizes))

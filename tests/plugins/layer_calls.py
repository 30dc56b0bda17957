"""The operations around a layer's attentions, each as one call: what the harness takes, and the same through PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from plugin_harness import At, sizes


class Call(NamedTuple):
    """value: of its attribute, if it has one; inputs: in the order of its operands; compute: its outputs from the kernels' Python side."""

    op: int
    value: float | None
    shape: Any
    inputs: list[Any]
    compute: Callable[[], Any]


def layer_calls(make: Callable[..., Any], batch: int, tokens: int, heads: int, kv_heads: int, d: int) -> list[Call]:
    """One call of every operation. make(*shape): a tensor of the storage type; with wide=True float32, with scale=x times x."""
    import torch

    from sessa_deploy.kernels.engine import layer

    n, width, kv = batch * tokens, heads * d, kv_heads * d
    columns, projected = width + 48, 3 * width + 2 * kv
    x, s, h = make(n, width), make(n, width), make(n, 2 * width)
    row, row2, square = make(width), make(width), make(width, width, scale=0.1)
    wide, double, everything = make(columns, width, scale=0.1), make(2 * width, width, scale=0.1), make(projected, width, scale=0.1)
    biases = (make(width), make(kv), make(kv), make(2 * width))
    gain, one, limbs = make(width, wide=True, scale=0.1), make(1, wide=True), make(4, d // 2, wide=True, scale=1 / 64).abs()
    length = torch.arange(batch, device=x.device, dtype=torch.int32)
    tables = layer.rotary(length, limbs, tokens)
    flat = [t.view(n, d // 2) for t in tables]
    plain = sizes(batch, tokens, 1, width)
    return [
        Call(At.Rotary, None, sizes(batch, tokens, 1, width, 1, 1, d), [x, length, limbs], lambda: layer.rotary(length, limbs, tokens)),
        Call(At.Norm, 1e-5, plain, [x, row, row2], lambda: layer.norm(x, row, row2, 1e-5)),
        Call(At.LinearHeads, None, sizes(batch, tokens, 1, width, heads, 1, d, width), [x, square, row], lambda: layer.linear(x, square, row)),
        Call(At.Logits, None, sizes(batch, tokens, 1, width, columns=columns), [x, wide], lambda: layer.linear(x, wide, None)),
        Call(At.Tail, None, plain, [x, s, h, square, row], lambda: layer.tail(s, h, square, row, x)),
        Call(At.NormEnter, 1e-5, plain, [x, row, row2, double, biases[3]], lambda: layer.norm_enter(x, row, row2, 1e-5, double, biases[3])),
        Call(At.ProjectGain, 0.999, sizes(batch, tokens, 1, width, heads, kv_heads, d, projected), [h, everything, *biases, *tables, gain, one],
             lambda: layer.project_gain(h, everything, biases, *flat, gain, one, 0.999)),
    ]  # fmt: skip

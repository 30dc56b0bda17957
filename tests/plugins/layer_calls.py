"""The operations around a layer's attentions, each as one call: what the harness takes, and the same through PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from plugin_harness import At, sizes

from sessa_deploy.contract import WEIGHT_FORMATS


class Call(NamedTuple):
    """value: of its float attribute, if it has one; inputs: in the order of its operands; compute: its outputs from the Python side."""

    op: int
    value: float | None
    shape: Any
    inputs: list[Any]
    compute: Callable[[], Any]


class Matrix(NamedTuple):
    """Weights as the kernels take them, as an operand, and the operands behind all others."""

    weight: Any
    scale: Any
    operand: Any
    last: list[Any]


def matrix(plain: Any, weights: int) -> Matrix:
    """plain (N,D) as it is (weights 0) or in 8 bits with a scale for each row; weights: ONNX type number."""
    import torch

    if not weights:
        return Matrix(plain, None, plain, [])
    form = next(f for f in WEIGHT_FORMATS.values() if f.onnx == weights)
    scale = plain.float().abs().amax(1) / form.largest + 1e-8
    steps = plain.float() / scale[:, None]
    values = (steps.round() if weights == 3 else steps).to(getattr(torch, form.torch))
    return Matrix(values, scale, values.view(plain.dtype), [scale])


def layer_calls(make: Callable[..., Any], batch: int, tokens: int, heads: int, kv_heads: int, d: int, weights: int = 0) -> list[Call]:
    """One call of every operation. make(*shape): a tensor of the storage type; with wide=True float32, with scale=x times x. weights: of `matrix`."""
    import torch

    from sessa_deploy.kernels.engine import last, layer

    n, width, kv = batch * tokens, heads * d, kv_heads * d
    columns, projected = width + 48, 3 * width + 2 * kv
    x, s, h = make(n, width), make(n, width), make(n, 2 * width)
    row, row2, square = make(width), make(width), matrix(make(width, width, scale=0.1), weights)
    wide, double, everything = (matrix(make(size, width, scale=0.1), weights) for size in (columns, 2 * width, projected))
    biases = (make(width), make(kv), make(kv), make(2 * width))
    gain, one, limbs = make(width, wide=True, scale=0.1), make(1, wide=True), make(4, d // 2, wide=True, scale=1 / 64).abs()
    length = torch.arange(batch, device=x.device, dtype=torch.int32)
    new = torch.clamp(tokens - length, min=0)
    tables = layer.rotary(length, limbs, tokens)
    flat = [t.view(n, d // 2) for t in tables]
    plain = sizes(batch, tokens, 1, width)
    around = [
        Call(At.Rotary, None, sizes(batch, tokens, 1, width, 1, 1, d), [x, length, limbs], lambda: layer.rotary(length, limbs, tokens)),
        Call(At.Norm, 1e-5, plain, [x, row, row2], lambda: layer.norm(x, row, row2, 1e-5)),
    ]
    products = [
        Call(At.LinearHeads, None, sizes(batch, tokens, 1, width, heads, 1, d, width), [x, square.operand, row, *square.last],
             lambda: layer.linear(x, square.weight, row, scale=square.scale)),
        Call(At.Logits, None, sizes(batch, tokens, 1, width, columns=columns), [x, wide.operand, *wide.last],
             lambda: layer.linear(x, wide.weight, None, scale=wide.scale)),
        Call(At.LastLogits, 1e-5, sizes(batch, tokens, 1, width, columns=columns), [x, new, row, row2, wide.operand, *wide.last],
             lambda: last.last_logits(x.view(batch, tokens, width), new, row, row2, 1e-5, wide.weight, scale=wide.scale)),
        Call(At.Tail, None, plain, [x, s, h, square.operand, row, *square.last],
             lambda: layer.tail(s, h, square.weight, row, x, scale=square.scale)),
        Call(At.NormEnter, 1e-5, plain, [x, row, row2, double.operand, biases[3], *double.last],
             lambda: layer.norm_enter(x, row, row2, 1e-5, double.weight, biases[3], scale=double.scale)),
        Call(At.ProjectGain, 0.999, sizes(batch, tokens, 1, width, heads, kv_heads, d, projected),
             [h, everything.operand, *biases, *tables, gain, one, *everything.last],
             lambda: layer.project_gain(h, everything.weight, biases, *flat, gain, one, 0.999, scale=everything.scale)),
    ]  # fmt: skip
    return products if weights else around + products

"""Calls of every operation on a GPU with what the kernels give for them from PyTorch: the measure of bits for each way into the library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import plugin_harness as ph
from layer_calls import layer_calls, matrix
from plugin_harness import BFLOAT, FLOAT, HALF, headed, sizes

from sessa_deploy.contract import STEP_ROWS

TYPES = {"float32": FLOAT, "float16": HALF, "bfloat16": BFLOAT}


class Case(NamedTuple):
    """One call: op, value of its float attribute (None: it has none, or its own default), sizes, inputs in order, and the outputs it must give to the bit;
    weights: the attribute."""

    op: int
    value: float | None
    shape: Any
    inputs: list[Any]
    expected: tuple[Any, ...]
    weights: int = 0


def lengths_and_poison(capacity: int, *pasts: Any) -> Any:
    """Random lengths for pasts (2,B,P,...) on the GPU, whose rows beyond them become NaN."""
    import torch

    length = torch.randint(0, capacity + 1, pasts[0].shape[1:2], device="cuda", dtype=torch.int32)
    for past in pasts:
        for i, n in enumerate(length.tolist()):
            past[:, i, n:] = torch.nan
    return length


def feedback(storage: str) -> Iterator[Case]:
    """Decode steps and prefill, ragged, with poisoned rows beyond each length."""
    import torch

    from sessa_deploy.kernels import route

    dtype = getattr(torch, storage)
    torch.manual_seed(0)
    several = ((2, 5, 300, 768), (1, 16, 4096, 2048), (1, 2, 70, 4096))
    for b, t, p, d in (*several, (3, 1, 300, 768), (2, 1, 1, 48), (1, 1, 4096, 4096), (1, 257, 0, 256), (3, 100, 130, 768), (1, 1000, 64, 1024)):
        q, k, f = torch.randn(3, b, t, d, device="cuda").to(dtype)
        past = torch.randn(2, b, p, d, device="cuda").to(dtype)
        length = lengths_and_poison(p, past)
        gamma = 1.998 * torch.rand(b, t, device="cuda") - 0.999
        inputs = [q, k, gamma, f, past[0], past[1], length]
        yield Case(ph.FEEDBACK, None, sizes(b, t, p, d), inputs, (route.feedback_forward(*inputs, need_lse=False)[0],))


def causal(storage: str) -> Iterator[Case]:
    """Steps of one and of several rows, and chunks, ragged, grouped heads of several widths, with poisoned rows beyond each length."""
    import torch

    from sessa_deploy.kernels import route

    dtype = getattr(torch, storage)
    torch.manual_seed(0)
    shapes = [(3, 1, 300, 64, 16, 16), (2, 1, 1, 48, 6, 2), (1, 1, 5000, 128, 9, 1), (2, 1, 70, 256, 4, 4), (1, 1, 33, 24, 5, 5),
              (3, 7, 300, 64, 16, 16), (1, 16, 5000, 128, 9, 1), (2, 2, 70, 40, 4, 2),
              (3, 100, 130, 64, 4, 2), (1, 257, 64, 128, 2, 2), (2, 130, 1, 40, 3, 3), (1, 40, 300, 256, 2, 1)]  # fmt: skip
    for b, t, p, d, heads, kv_heads in shapes:
        q = torch.randn(b, t, heads, d, device="cuda").to(dtype)
        k, v = torch.randn(2, b, t, kv_heads, d, device="cuda").to(dtype)
        past = torch.randn(2, b, p, kv_heads, d, device="cuda").to(dtype)
        inputs = [q, k, v, past[0], past[1], lengths_and_poison(p, past)]
        yield Case(ph.CAUSAL, None, headed(b, t, p, d, heads, kv_heads), inputs, (route.causal_kernels(*inputs),))


def layers(storage: str, rows: tuple[int, int], heads: tuple[int, int, int], weights: int = 0) -> Iterator[Case]:
    """Everything around the attentions of a layer; for rows (batch, tokens) and heads (query heads, key/value heads, width). weights: products alone."""
    import torch

    dtype = getattr(torch, storage)
    torch.manual_seed(0)

    def random(*shape: int, wide: bool = False, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device="cuda")).to(torch.float32 if wide else dtype)

    for op, value, shape, inputs, compute in layer_calls(random, *rows, *heads, weights):
        found = compute()
        yield Case(op, value, shape, inputs, tuple(found) if isinstance(found, (tuple, list)) else (found,), weights)


def mixer(storage: str, weights: int = 0) -> Iterator[Case]:
    """Steps as engine/mixer.py and mixer_rows.py compute them, chunks as three operations one by one; ragged, with poisoned rows beyond each length."""
    import torch

    from sessa_deploy.kernels import route
    from sessa_deploy.kernels.engine import layer, mixer_rows
    from sessa_deploy.kernels.engine import mixer as kernels
    from sessa_deploy.kernels.feedback import forward

    dtype = getattr(torch, storage)
    torch.manual_seed(0)
    shapes = [(1, 1, 4096, 16, 16, 64), (3, 1, 300, 12, 4, 64), (40, 1, 70, 4, 4, 128), (70, 1, 33, 2, 1, 24), (3, 99, 130, 8, 8, 64), (1, 257, 1, 4, 2, 128)]
    shapes += [(1, 8, 4096, 16, 16, 64), (3, 16, 300, 12, 4, 64), (2, 3, 70, 16, 16, 128), (1, 2, 1, 16, 4, 128)]  # several rows
    for b, t, p, heads, kv_heads, d in shapes:
        width = heads * d
        q = torch.randn(b, t, heads, d, device="cuda").to(dtype)
        k, v = torch.randn(2, b, t, kv_heads, d, device="cuda").to(dtype)
        q_b, k_b = torch.randn(2, b, t, width, device="cuda").to(dtype)
        square, bias = matrix((0.1 * torch.randn(width, width, device="cuda")).to(dtype), weights), torch.randn(width, device="cuda").to(dtype)
        gamma = 1.998 * torch.rand(b, t, device="cuda") - 0.999
        past, past_b = torch.randn(2, b, p, kv_heads, d, device="cuda").to(dtype), torch.randn(2, b, p, width, device="cuda").to(dtype)
        length = lengths_and_poison(p, past, past_b)
        if t == 1:
            new = [x[:, 0] for x in (q, k, v)]
            s = kernels.step(*new, *past, square.weight, bias, q_b[:, 0], gamma[:, 0], *past_b, length, scale=square.scale).view(b, 1, width)
        elif t <= STEP_ROWS:
            s = mixer_rows.step(q, k, v, *past, square.weight, bias, q_b, k_b, gamma, *past_b, length, scale=square.scale)
        else:
            o = route.causal_kernels(q, k, v, past[0], past[1], length)
            f = layer.linear(o.view(b * t, width), square.weight, bias, scale=square.scale).view(b, t, width)
            s = forward.forward(q_b, k_b, gamma, f, past_b[0], past_b[1], length, need_lse=False)[0]
        inputs = [q, k, v, past[0], past[1], square.operand, bias, q_b, k_b, gamma, past_b[0], past_b[1], length, *square.last]
        yield Case(ph.At.Mixer, None, sizes(b, t, p, width, heads, kv_heads, d), inputs, (s,), weights)

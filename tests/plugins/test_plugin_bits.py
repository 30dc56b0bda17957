"""What the plugins compute, reached through TensorRT's own interfaces, is bit for bit what the kernels give from PyTorch; on a GPU.

Built and found as test_plugin.py says; no TensorRT is needed to run, only its headers to build.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import plugin_harness as ph
import pytest
from layer_calls import layer_calls
from plugin_harness import BFLOAT, CAUSAL, FEEDBACK, FLOAT, HALF, NAMES, Built, Pointers, create, headed, sizes

from sessa_deploy.plugins import ops


def enqueue_and_compare(
    harness: ctypes.CDLL, plugin: int, op: int, onnx: int, shape: Any, inputs: list[Any], expected: tuple[Any, ...], err: Callable[[], str]
) -> None:
    """The plugin's outputs equal `expected` bit for bit, from a captured graph (the first call of all) and eagerly; a misaligned pointer is refused."""
    import torch

    size = harness.harness_workspace(plugin, op, onnx, shape)
    assert size >= 0 and harness.harness_shape(plugin, op, onnx, shape) == 0, err()
    work = torch.full((max(size, 16) + 4096,), 255, dtype=torch.uint8, device="cuda")  # what lies behind must stay
    outs = [torch.full_like(x, torch.nan) for x in expected]
    pointers = Pointers(*(x.data_ptr() for x in (*inputs, *outs, work)))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        assert harness.harness_enqueue(plugin, op, onnx, shape, pointers, side.cuda_stream) == 0, err()
    for replay in (True, False):
        for out in outs:
            out.fill_(torch.nan)
        if replay:
            graph.replay()
        else:
            assert harness.harness_enqueue(plugin, op, onnx, shape, pointers, torch.cuda.current_stream().cuda_stream) == 0, err()
        torch.cuda.synchronize()
        for i, (out, wanted) in enumerate(zip(outs, expected, strict=True)):
            assert torch.equal(out, wanted), (NAMES[op], list(shape), replay, i)
        assert bool((work[max(size, 16) :] == 255).all()), (NAMES[op], list(shape))
    last = len(inputs) + len(outs) - 1
    pointers[last] = outs[-1].data_ptr() + 2
    assert harness.harness_enqueue(plugin, op, onnx, shape, pointers, None) != 0 and "is null or not 16-byte aligned" in err()


def lengths_and_poison(capacity: int, *pasts: Any) -> Any:
    """Random lengths for pasts (2,B,P,...) on the GPU, whose rows beyond them become NaN."""
    import torch

    length = torch.randint(0, capacity + 1, pasts[0].shape[1:2], device="cuda", dtype=torch.int32)
    for past in pasts:
        for i, n in enumerate(length.tolist()):
            past[:, i, n:] = torch.nan
    return length


TYPES = {"float32": FLOAT, "float16": HALF, "bfloat16": BFLOAT}


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("storage", TYPES)
def test_feedback_gives_the_bits_of_the_torch_op(built: Built, storage: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Decode steps and prefill, ragged, with poisoned rows beyond each length."""
    import torch

    from sessa_deploy.kernels.feedback import forward, step

    major, _, harness = built
    onnx, dtype = TYPES[storage], getattr(torch, storage)
    torch.manual_seed(0)
    plugin = create(built, FEEDBACK, storage=onnx)
    if plugin is None:
        assert (major, onnx) == (8, BFLOAT)
        return
    for b, t, p, d in ((3, 1, 300, 768), (2, 1, 1, 48), (1, 1, 4096, 4096), (1, 257, 0, 256), (3, 100, 130, 768), (1, 1000, 64, 1024)):
        q, k, f = torch.randn(3, b, t, d, device="cuda").to(dtype)
        past = torch.randn(2, b, p, d, device="cuda").to(dtype)
        length = lengths_and_poison(p, past)
        gamma = 1.998 * torch.rand(b, t, device="cuda") - 0.999
        op: Callable[..., torch.Tensor] = step.step if t == 1 else lambda *a: forward.forward(*a, need_lse=False)[0]
        inputs = [q, k, gamma, f, past[0], past[1], length]
        enqueue_and_compare(harness, plugin, FEEDBACK, onnx, sizes(b, t, p, d), inputs, (op(*inputs),), lambda: capfd.readouterr().err)
    harness.harness_destroy(plugin)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("storage", TYPES)
def test_causal_gives_the_bits_of_the_torch_op(built: Built, storage: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Decode steps and chunks, ragged, grouped heads of several widths, with poisoned rows beyond each length."""
    import torch

    from sessa_deploy.kernels import route

    major, _, harness = built
    onnx, dtype = TYPES[storage], getattr(torch, storage)
    torch.manual_seed(0)
    plugin = create(built, CAUSAL, storage=onnx)
    if plugin is None:
        assert (major, onnx) == (8, BFLOAT)
        return
    shapes = [(3, 1, 300, 64, 16, 16), (2, 1, 1, 48, 6, 2), (1, 1, 5000, 128, 9, 1), (2, 1, 70, 256, 4, 4), (1, 1, 33, 24, 5, 5),
              (3, 100, 130, 64, 4, 2), (1, 257, 64, 128, 2, 2), (2, 130, 1, 40, 3, 3), (1, 40, 300, 256, 2, 1)]  # fmt: skip
    for b, t, p, d, heads, kv_heads in shapes:
        q = torch.randn(b, t, heads, d, device="cuda").to(dtype)
        k, v = torch.randn(2, b, t, kv_heads, d, device="cuda").to(dtype)
        past = torch.randn(2, b, p, kv_heads, d, device="cuda").to(dtype)
        inputs = [q, k, v, past[0], past[1], lengths_and_poison(p, past)]
        expected = route.causal_kernels(*inputs)
        enqueue_and_compare(harness, plugin, CAUSAL, onnx, headed(b, t, p, d, heads, kv_heads), inputs, (expected,), lambda: capfd.readouterr().err)
    harness.harness_destroy(plugin)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("rows", [(1, 1), (32, 1), (2, 150)], ids=["1", "32", "300"])
@pytest.mark.parametrize("heads", [(16, 16, 64), (4, 2, 64)], ids=["1024", "256"])
def test_layers_give_the_bits_of_the_kernels(
    built: Built, heads: tuple[int, int, int], rows: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Everything around the attentions of a layer, float16, for a step, a batch of steps and a chunk."""
    import torch

    torch.manual_seed(0)

    def random(*shape: int, wide: bool = False, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device="cuda")).to(torch.float32 if wide else torch.float16)

    harness = built[2]
    for op, value, shape, inputs, compute in layer_calls(random, *rows, *heads):
        found = compute()
        expected = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        plugin = create(built, op, HALF, ops.OPS[op].attributes[0].name if value is not None else None, value or 0.0)
        assert plugin is not None, NAMES[op]
        enqueue_and_compare(harness, plugin, op, HALF, shape, inputs, expected, lambda: capfd.readouterr().err)
        harness.harness_destroy(plugin)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_the_mixer_gives_the_bits_of_its_kernels(built: Built, storage: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Decode steps as engine/mixer.py computes them, chunks as the three operations one after the other; ragged, with poisoned rows beyond each length."""
    import torch

    from sessa_deploy.kernels import route
    from sessa_deploy.kernels.engine import layer, mixer
    from sessa_deploy.kernels.feedback import forward

    major, _, harness = built
    onnx, dtype = TYPES[storage], getattr(torch, storage)
    torch.manual_seed(0)
    plugin = create(built, ph.At.Mixer, storage=onnx)
    if plugin is None:
        assert (major, onnx) == (8, BFLOAT)
        return
    shapes = [(1, 1, 4096, 16, 16, 64), (3, 1, 300, 12, 4, 64), (40, 1, 70, 4, 4, 128), (70, 1, 33, 2, 1, 24), (3, 99, 130, 8, 8, 64), (1, 257, 1, 4, 2, 128)]
    for b, t, p, heads, kv_heads, d in shapes:
        width = heads * d
        q = torch.randn(b, t, heads, d, device="cuda").to(dtype)
        k, v = torch.randn(2, b, t, kv_heads, d, device="cuda").to(dtype)
        q_b, k_b = torch.randn(2, b, t, width, device="cuda").to(dtype)
        weight, bias = (0.1 * torch.randn(width, width, device="cuda")).to(dtype), torch.randn(width, device="cuda").to(dtype)
        gamma = 1.998 * torch.rand(b, t, device="cuda") - 0.999
        past, past_b = torch.randn(2, b, p, kv_heads, d, device="cuda").to(dtype), torch.randn(2, b, p, width, device="cuda").to(dtype)
        length = lengths_and_poison(p, past, past_b)
        if t == 1:
            new = [x[:, 0] for x in (q, k, v)]
            s = mixer.step(*new, *past, weight, bias, q_b[:, 0], gamma[:, 0], *past_b, length).view(b, 1, width)
        else:
            o = route.causal_kernels(q, k, v, past[0], past[1], length)
            f = layer.linear(o.view(b * t, width), weight, bias).view(b, t, width)
            s = forward.forward(q_b, k_b, gamma, f, past_b[0], past_b[1], length, need_lse=False)[0]
        inputs = [q, k, v, past[0], past[1], weight, bias, q_b, k_b, gamma, past_b[0], past_b[1], length]
        enqueue_and_compare(harness, plugin, ph.At.Mixer, onnx, sizes(b, t, p, width, heads, kv_heads, d), inputs, (s,), lambda: capfd.readouterr().err)
    harness.harness_destroy(plugin)

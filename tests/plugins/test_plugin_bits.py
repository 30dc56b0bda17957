"""What the libraries compute, reached through TensorRT's own interfaces or ONNX Runtime's, is bit for bit what the kernels give from PyTorch; on a GPU.

Built and found as test_plugin.py says; neither TensorRT nor ONNX Runtime is needed to run, only their headers to build. Through the real ONNX Runtime:
test_ort_bits.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import gpu_calls
import pytest
from gpu_calls import TYPES, Case
from plugin_harness import BFLOAT, NAMES, ORT, Built, Pointers, at, create

from sessa_deploy.plugins import ops


def enqueue_and_compare(shell: Built, plugin: int, onnx: int, case: Case, err: Callable[[], str]) -> None:
    """The plugin's outputs equal the expected ones bit for bit, from a captured graph (the first call of all, where the shell is told shapes before it) and
    eagerly; a misaligned pointer is refused."""
    import torch

    major, _, harness = shell
    op, shape, expected = at(case.op, case.weights), case.shape, case.expected
    size = harness.harness_workspace(plugin, op, onnx, shape)
    assert size >= 0 and harness.harness_shape(plugin, op, onnx, shape) == 0, err()
    work = torch.full((max(size, 16) + 4096,), 255, dtype=torch.uint8, device="cuda")  # what lies behind must stay
    outs = [torch.full_like(x, torch.nan) for x in expected]
    pointers = Pointers(*(x.data_ptr() for x in (*case.inputs, *outs, work)))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    if major == ORT:
        assert harness.harness_enqueue(plugin, op, onnx, shape, pointers, side.cuda_stream) == 0, err()
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
            assert torch.equal(out, wanted), (NAMES[case.op], list(shape), replay, i)
        assert bool((work[max(size, 16) :] == 255).all()), (NAMES[case.op], list(shape))
    last = len(case.inputs) + len(outs) - 1
    pointers[last] = outs[-1].data_ptr() + 2
    assert harness.harness_enqueue(plugin, op, onnx, shape, pointers, None) != 0 and "is null or not 16-byte aligned" in err()


def compare_all(shell: Built, storage: str, cases: Iterable[Case], err: Callable[[], str]) -> None:
    """Every case through one plugin each."""
    onnx = TYPES[storage]
    for case in cases:
        attribute = ops.OPS[case.op].attributes[0].name if case.value is not None else None
        plugin = create(shell, case.op, onnx, attribute, case.value or 0.0, case.weights)
        if plugin is None:
            assert (shell[0], onnx) == (8, BFLOAT)
            return
        enqueue_and_compare(shell, plugin, onnx, case, err)
        shell[2].harness_destroy(plugin)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("storage", TYPES)
@pytest.mark.parametrize("family", [gpu_calls.feedback, gpu_calls.causal], ids=["feedback", "causal"])
def test_an_attention_gives_the_bits_of_the_torch_op(
    shell: Built, family: Callable[[str], Iterable[Case]], storage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    compare_all(shell, storage, family(storage), lambda: capfd.readouterr().err)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("rows", [(1, 1), (32, 1), (2, 150)], ids=["1", "32", "300"])
@pytest.mark.parametrize("heads", [(16, 16, 64), (4, 2, 64)], ids=["1024", "256"])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_layers_give_the_bits_of_the_kernels(
    shell: Built, storage: str, heads: tuple[int, int, int], rows: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Everything around the attentions of a layer, for a step, a batch of steps and a chunk."""
    compare_all(shell, storage, gpu_calls.layers(storage, rows, heads), lambda: capfd.readouterr().err)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_the_mixer_gives_the_bits_of_its_kernels(shell: Built, storage: str, capfd: pytest.CaptureFixture[str]) -> None:
    compare_all(shell, storage, gpu_calls.mixer(storage), lambda: capfd.readouterr().err)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize(("storage", "weights", "rows"), [("float16", 3, (1, 1)), ("bfloat16", 17, (1, 1)), ("float16", 17, (32, 1)), ("bfloat16", 3, (32, 1)),
                                                          ("float16", 3, (2, 150)), ("bfloat16", 17, (2, 150))])  # fmt: skip
def test_weights_of_8_bits_give_the_bits_of_the_kernels(
    shell: Built, storage: str, weights: int, rows: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    cases = [*gpu_calls.layers(storage, rows, (16, 4, 64), weights), *(gpu_calls.mixer(storage, weights) if rows == (1, 1) else ())]
    compare_all(shell, storage, cases, lambda: capfd.readouterr().err)

"""What libsessa_ort.so computes inside the real ONNX Runtime on CUDA is bit for bit what the kernels give from PyTorch: onnxruntime-gpu, IOBinding.

Plain runs, runs that ONNX Runtime captures into CUDA graphs, and several threads in one session. Built as test_plugin.py says, with SESSA_ORT_INCLUDE.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_calls
import pytest
from gpu_calls import TYPES, Case
from node_models import node_model, type_of
from plugin_harness import NAMES, Built

from sessa_deploy.plugins import library, ops
from sessa_deploy.runtime.ort import session as ort_session

pytestmark = pytest.mark.gpu
CUDA = "CUDAExecutionProvider"
FREE = dict.fromkeys(ops.SIZES)  # a graph that knows no size: one session for every shape


def open_session(path: Path, op: ops.Op, storage: int, value: float | None = None, weights: int = 0, **options: str) -> Any:
    """A session of one node on the GPU."""
    runtime = pytest.importorskip("onnxruntime")
    if CUDA not in runtime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    ort_session.preload(runtime)
    settings = runtime.SessionOptions()
    library.register(settings, path)
    attributes = op.node_attributes(storage, weights, **({} if value is None else {op.attributes[0].name: value}))
    session = runtime.InferenceSession(node_model(op, storage, FREE, attributes, weights=weights), settings, providers=[(CUDA, {"device_id": "0", **options})])
    assert session.get_providers()[0] == CUDA, "the CUDA provider did not start"
    return session


class Bound:
    """A case's tensors bound to a session: inputs where they lie, outputs of our own."""

    def __init__(self, session: Any, case: Case, storage: int) -> None:
        import torch

        self.case, op = case, ops.OPS[case.op].form(case.weights)
        sizes = dict(zip(ops.SIZES, case.shape, strict=True))
        self.outs = [torch.full_like(x, torch.nan) for x in case.expected]
        self.binding = session.io_binding()
        somewhere = case.inputs[0].data_ptr()  # for a tensor without elements
        for tensors, operands, bind in ((case.inputs, op.inputs, self.binding.bind_input), (self.outs, op.outputs, self.binding.bind_output)):
            for tensor, operand in zip(tensors, operands, strict=True):
                shape = [sizes[c] for c in operand.shape]
                assert tensor.is_contiguous() and tensor.numel() == torch.Size(shape).numel()
                bind(operand.name, "cuda", 0, type_of(operand, storage), shape, tensor.data_ptr() or somewhere)
        torch.cuda.synchronize()

    def run(self, session: Any, options: Any = None) -> None:
        import torch

        for out in self.outs:
            out.fill_(torch.nan)
        torch.cuda.synchronize()
        session.run_with_iobinding(self.binding, options)
        torch.cuda.synchronize()

    def compare(self, how: str) -> None:
        import torch

        for i, (out, wanted) in enumerate(zip(self.outs, self.case.expected, strict=True)):
            assert torch.equal(out, wanted), (NAMES[self.case.op], list(self.case.shape), how, i)


def compare_all(path: Path, storage: str, cases: Iterable[Case]) -> None:
    """Every case twice in a plain session, then four times in one that captures: a warm run, a capture, replays."""
    import onnxruntime

    onnx, sessions = TYPES[storage], dict[int, tuple[Any, Any]]()
    for number, case in enumerate(cases, 1):
        if case.op not in sessions:
            op = ops.OPS[case.op]
            plain = open_session(path, op, onnx, case.value, case.weights)
            sessions[case.op] = (plain, open_session(path, op, onnx, case.value, case.weights, enable_cuda_graph="1"))
        plain, capturing = sessions[case.op]
        bound = Bound(plain, case, onnx)
        for _ in range(2):
            bound.run(plain)
            bound.compare("plain")
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        bound = Bound(capturing, case, onnx)
        for _ in range(4):
            bound.run(capturing, options)
            bound.compare("captured")


@pytest.mark.parametrize("storage", TYPES)
@pytest.mark.parametrize("calls", [gpu_calls.feedback, gpu_calls.causal], ids=["feedback", "causal"])
def test_attentions_give_the_bits_of_the_torch_op(ort_built: Built, calls: Any, storage: str) -> None:
    compare_all(ort_built[1], storage, calls(storage))


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_the_mixer_gives_the_bits_of_its_kernels(ort_built: Built, storage: str) -> None:
    compare_all(ort_built[1], storage, gpu_calls.mixer(storage))


@pytest.mark.parametrize("rows", [(1, 1), (32, 1), (2, 150)], ids=["1", "32", "300"])
@pytest.mark.parametrize("heads", [(16, 16, 64), (4, 2, 64)], ids=["1024", "256"])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_layers_give_the_bits_of_the_kernels(ort_built: Built, storage: str, heads: tuple[int, int, int], rows: tuple[int, int]) -> None:
    compare_all(ort_built[1], storage, gpu_calls.layers(storage, rows, heads))


@pytest.mark.parametrize(("storage", "weights"), [("float16", 3), ("bfloat16", 17)])
def test_weights_of_8_bits_give_the_bits_of_the_kernels(ort_built: Built, storage: str, weights: int) -> None:
    for rows in ((1, 1), (32, 1), (2, 150)):
        compare_all(ort_built[1], storage, gpu_calls.layers(storage, rows, (16, 4, 64), weights))
    compare_all(ort_built[1], storage, gpu_calls.mixer(storage, weights))


def test_rotary_tables_of_a_float32_graph(ort_built: Built) -> None:
    """The one operation around the attentions that a float32 graph has."""
    import torch
    from layer_calls import layer_calls

    def random(*shape: int, wide: bool = False, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, device="cuda")

    call = layer_calls(random, 2, 5, 4, 2, 64)[0]
    compare_all(ort_built[1], "float32", [Case(call.op, call.value, call.shape, call.inputs, tuple(call.compute()))])


def test_threads_share_a_session(ort_built: Built) -> None:
    """Runs at once on one session: each has its workspace."""
    cases = [c for c in gpu_calls.feedback("float16") if c.shape[1] > 1] + [c for c in gpu_calls.feedback("float16") if c.shape[1] == 1]
    session = open_session(ort_built[1], ops.OPS[cases[0].op], TYPES["float16"])
    failures: list[BaseException] = []

    def work(case: Case) -> None:
        try:
            bound = Bound(session, case, TYPES["float16"])
            for _ in range(30):
                session.run_with_iobinding(bound.binding)
                bound.compare("threads")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_memory_stays_flat(ort_built: Built) -> None:
    """After the first call of each shape nothing is allocated: neither by calls, nor by sessions that come and go."""
    import torch

    cases = list(gpu_calls.mixer("float16"))
    session = open_session(ort_built[1], ops.OPS[cases[0].op], TYPES["float16"])
    bound = [Bound(session, case, TYPES["float16"]) for case in cases]
    for one in bound * 2:
        one.run(session)
    grown = []  # the driver counts the whole GPU's memory: another process may change it in some rounds, a leak shows in all
    for _ in range(5):
        before = torch.cuda.mem_get_info()[0]
        for one in bound * 10:
            one.run(session)
        grown.append(before - torch.cuda.mem_get_info()[0])
    assert 0 in grown, grown
    del one, bound, session
    left = []
    for _ in range(6):
        session = open_session(ort_built[1], ops.OPS[cases[0].op], TYPES["float16"])
        Bound(session, cases[0], TYPES["float16"]).run(session)
        del session
        left.append(torch.cuda.mem_get_info()[0])
    assert max(left[2:]) >= left[1] - (4 << 20), left


def test_a_wrong_call_is_an_error_in_words(ort_built: Built) -> None:
    """Shapes that only the call shows, and a storage type without kernels."""
    import torch

    case = next(gpu_calls.feedback("float16"))
    session = open_session(ort_built[1], ops.OPS[case.op], TYPES["float16"])
    bound = Bound(session, case, TYPES["float16"])
    bound.binding.bind_input("past_length", "cuda", 0, 6, [2], case.inputs[6].data_ptr())
    with pytest.raises(Exception, match=r"SessaFeedbackAttention: past_length: got shape \(2\); allowed: \(3\) to match q"):
        bound.run(session)
    norm = ops.op("SessaNorm")
    session = open_session(ort_built[1], norm, TYPES["float32"])
    x, row = torch.randn(1, 1, 64, device="cuda"), torch.ones(64, device="cuda")
    case = Case(next(i for i, n in NAMES.items() if n == norm.name), None, [1, 1, 0, 64, *[1] * 8], [x, row, row], (x,))
    with pytest.raises(Exception, match="SessaNorm: no kernel for fp32; allowed: fp16, bf16"):
        Bound(session, case, TYPES["float32"]).run(session)

"""The ops inside PyTorch's machinery: compile without graph breaks, activation checkpointing, autocast, DDP; on the CPU and, marked, on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sessa_deploy import SessaConfig, SessaLM
from sessa_deploy.kernels import route

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def small(device: str, dtype: torch.dtype = torch.float32) -> tuple[SessaLM, Tensor]:
    torch.manual_seed(0)
    model = SessaLM(SessaConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40)).to(device, dtype)
    return model, torch.randint(40, (2, 33), device=device)


def loss_and_grads(model: SessaLM, call: object, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(call(ids).flatten(0, 1), ids.flatten())  # type: ignore[operator]
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("device", DEVICES)
def test_compile_has_no_graph_break_and_the_same_gradients(device: str) -> None:
    model, ids = small(device)
    want, grads = loss_and_grads(model, model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    got, compiled_grads = loss_and_grads(model, compiled, ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(compiled_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(params=["own", "older"])
def dynamo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo as it is, and as it is up to torch 2.11: it takes every graph for an exported one."""
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    if request.param == "older":
        answers = TorchInGraphFunctionVariable._get_handlers()  # type: ignore[no-untyped-call]
        monkeypatch.setitem(answers, torch.compiler.is_exporting, lambda *_: ConstantVariable.create(True))
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_graph_is_no_exported_one() -> None:
    def asks(x: Tensor) -> Tensor:
        return x + 1 if route.is_exporting() else x - 1

    class Asks(torch.nn.Module):
        forward = staticmethod(asks)

    x = torch.zeros(3)
    assert not route.is_exporting() and torch.equal(torch.compile(asks, fullgraph=True, backend="eager")(x), x - 1)
    for strict in (False, True):
        assert torch.equal(torch.export.export(Asks(), (x,), strict=strict).module()(x), x + 1)


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_graph_takes_no_numbers_from_the_host() -> None:
    """They would keep it from being captured as a CUDA graph."""
    model, ids = small("cpu")
    calls: list[object] = []

    def look(graph: torch.fx.GraphModule, example: object) -> object:
        calls.extend(node.target for node in graph.graph.nodes if node.op in ("call_function", "get_attr"))
        return graph.forward

    torch.compile(model, fullgraph=True, backend=look)(ids, ids)
    assert torch.ops.sessa.rope_tables.default in calls and torch.tensor not in calls
    assert not any("constant" in str(call) for call in calls)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reduce_overhead_captures_every_graph() -> None:
    from torch._dynamo.utils import counters

    model, ids = small("cuda")
    want = loss_and_grads(model, model, ids)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss, grads = loss_and_grads(model, compiled, ids)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.testing.assert_close(loss, want[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(grads, want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(device: str, reentrant: bool) -> None:
    model, _ = small(device)
    layer = model.layers[0]
    x = torch.randn(2, 50, 32, device=device)
    results = []
    for use in (False, True):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = checkpoint(layer, inputs, use_reentrant=reentrant) if use else layer(inputs)
        y.square().sum().backward()
        results.append([inputs.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_trains_close_to_float32(device: str) -> None:
    model, ids = small(device)
    want, _ = loss_and_grads(model, model, ids)
    with torch.autocast(device, torch.bfloat16):
        got, grads = loss_and_grads(model, model, ids)
    assert abs(float(got - want)) < 2e-2
    assert len(grads) == len(list(model.parameters())) and all(torch.isfinite(g).all() for g in grads)


@pytest.fixture
def one_process_group(tmp_path: object) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("device", DEVICES)
def test_distributed_data_parallel(device: str, one_process_group: None) -> None:
    model, ids = small(device)
    want, grads = loss_and_grads(model, model, ids)
    twin = copy.deepcopy(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(twin)
    got, wrapped_grads = loss_and_grads(twin, wrapped, ids)
    assert torch.equal(got, want)
    for a, b in zip(wrapped_grads, grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_on_the_gpu(dtype: torch.dtype, grad: bool) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda").to(dtype).requires_grad_(grad)
    gamma = (0.9 * torch.rand(2, 70, generator=g, device="cuda")).requires_grad_(grad)
    args = (normal(2, 70, 32), normal(2, 70, 32), gamma, normal(2, 70, 32), normal(2, 9, 32), normal(2, 9, 32), torch.tensor([9, 4], dtype=torch.int32).cuda())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sessa.feedback_attention.default, args, test_utils=checks, rtol=1e-2, atol=1e-2)
    assert route.uses_triton(args[0])

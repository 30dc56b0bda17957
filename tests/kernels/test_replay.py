"""Pieces of a training step that are replayed where they come again: which those are, and that nothing they depend on is left out of what they are known by."""

from __future__ import annotations

import functools
import itertools
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

pytest.importorskip("triton")

from feedback_cases import DEVICE, side, small_options

from sessa_deploy import SessaLayer, fused_layer
from sessa_deploy.kernels import ops, replay, route
from sessa_deploy.kernels.feedback import backward, forward
from sessa_deploy.kernels.training import regions, whole
from sessa_deploy.kernels.training.plan import Memory
from sessa_deploy.rope import rope_tables


class Graph:
    """A CUDA graph whose capture runs nothing, and whose replay says so."""

    current: Any = None
    refuses = False

    def __init__(self) -> None:
        self.replays = 0

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local" and pool == "pool"
        Graph.current = self

    def capture_end(self) -> None:
        Graph.current = None
        if Graph.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self) -> None:
        assert Graph.current is None
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The GPU as `Replays` sees it: `capturing` is whether somebody captures the current stream."""
    seen = SimpleNamespace(capturing=False, streams=itertools.count(100))
    monkeypatch.setattr(Graph, "refuses", False)
    monkeypatch.setattr(replay, "new_stream", lambda: next(seen.streams))
    monkeypatch.setattr(replay.Replays, "_warm_up", lambda self: None)
    for name, value in {"CUDAGraph": Graph, "graph_pool_handle": lambda: "pool", "stream": lambda s: nullcontext(),
                        "ExternalStream": lambda number, device: SimpleNamespace(cuda_stream=number, device_index=device.index)}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: seen.capturing, raising=False)
    return seen


def test_what_comes_again_is_captured_and_replayed(graphs: SimpleNamespace) -> None:
    kept, ran = replay.Replays(torch.device("cuda", 0)), list[str]()
    for _ in range(replay.SEEN):
        kept.run(("a", 1), lambda: ran.append("a"))
        kept.run(("b", len(ran)), lambda: ran.append("b"))  # never the same again
    assert ran == ["a", "b"] * replay.SEEN and not kept._graphs
    for _ in range(4):
        kept.run(("a", 1), lambda: ran.append("captured"))
    assert ran[2 * replay.SEEN :] == ["captured"] and [g.replays for g in kept._graphs.values()] == [4]
    graphs.capturing = True  # a graph of somebody else's: what it holds is queued into it
    kept.run(("a", 1), lambda: ran.append("theirs"))
    assert ran[-1] == "theirs" and kept._graphs["a", 1].replays == 4


def test_what_cannot_be_captured_is_queued_as_ever(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, ran = replay.Replays(torch.device("cuda", 0)), list[int]()
    monkeypatch.setattr(Graph, "refuses", True)
    for i in range(replay.SEEN + 3):
        kept.run("a", functools.partial(ran.append, i))
    # the one that was tried ran twice: in the capture, which does nothing on a GPU, and behind it
    assert ran == [0, 1, 2, 3, 3, 4, 5] and not kept._graphs
    monkeypatch.setattr(Graph, "refuses", False)
    monkeypatch.setenv("SESSA_REPLAY", "0")
    off = replay.Replays(torch.device("cuda", 0))
    for _ in range(9):
        off.run("a", lambda: ran.append(9))
    assert ran[-9:] == [9] * 9 and not off._graphs


def test_graphs_and_keys_are_bounded(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 2)
    monkeypatch.setattr(replay, "_REMEMBERED", 5)
    kept = replay.Replays(torch.device("cuda", 0))
    for key in range(3):
        for _ in range(replay.SEEN + 1):
            kept.run(key, lambda: None)
    assert len(kept._graphs) == 2
    more = replay.Replays(torch.device("cuda", 0))
    for key in range(100):
        more.run(key, lambda: None)
    assert len(more._seen) <= 5


def test_one_piece_that_cannot_be_captured_leaves_the_others(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = replay.Replays(torch.device("cuda", 0))
    for i in range(4 * replay.SEEN):
        monkeypatch.setattr(Graph, "refuses", True)
        kept.run("bad", lambda: None)
        monkeypatch.setattr(Graph, "refuses", False)
        kept.run(("good", i // 4), lambda: None)  # each comes just often enough
    assert kept._on and ("good", 0) in kept._graphs and "bad" not in kept._graphs and kept._captures == 1 + len(kept._graphs)
    monkeypatch.setattr(Graph, "refuses", True)
    for key in range(replay.TRIES):
        for _ in range(replay.SEEN + 1):
            kept.run(("worse", key), lambda: None)
    assert not kept._on


def test_graphs_of_memory_that_lies_elsewhere_by_now_make_room(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 4)
    monkeypatch.setattr(replay, "STALE", 12)
    kept = replay.Replays(torch.device("cuda", 0))

    def steps(places: range, count: int) -> None:
        for _ in range(count):
            for key in places:
                kept.run(key, lambda: None)

    steps(range(4), 8)
    assert set(kept._graphs) == set(range(4))
    steps(range(2, 6), 16)  # two where they were, two elsewhere
    assert set(kept._graphs) == set(kept._used) == {2, 3, 4, 5}


def test_captures_that_are_not_worth_it_end(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "FREE", 3)
    kept = replay.Replays(torch.device("cuda", 0))
    for key in range(20):  # each place comes just often enough to be captured, and never again
        for _ in range(replay.SEEN + 1):
            kept.run(key, lambda: None)
    assert len(kept._graphs) == 3
    for _ in range(3 * replay.WORTH + 1):
        kept.run(0, lambda: None)
    for _ in range(replay.SEEN + 1):
        kept.run("again", lambda: None)
    assert "again" in kept._graphs


def test_what_another_thread_queued_counts_for_that_thread(graphs: SimpleNamespace) -> None:
    """Libraries keep their plans for each thread: a capture must not be what makes one."""
    kept = replay.Replays(torch.device("cuda", 0))
    for _ in range(replay.SEEN):
        kept.run("a", lambda: None)
    other = threading.Thread(target=lambda: kept.run("a", lambda: None))
    other.start()
    other.join()
    assert not kept._graphs
    kept.run("a", lambda: None)
    assert "a" in kept._graphs


def test_places_tell_views_apart() -> None:
    x = torch.zeros(4, 4)
    assert replay.places([x, None, x[1:]]) == (x.data_ptr(), 0, x[1:].data_ptr())
    assert len({replay.places([y]) for y in (x, x.t(), x[:, ::2], x[:1].expand(4, 4))}) == 4


def test_settings_of_either_kind_are_seen() -> None:
    """PyTorch refuses to answer for its older settings where one of the newer was set."""
    before, seen = torch.backends.cuda.matmul.fp32_precision, {replay.flags()}
    try:
        for kind in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = kind
            seen.add(replay.flags())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(seen) == 3 and replay.flags() in seen


class Again:
    """Stands in for `Replays`: what is known by a key that was there before is the work of the first time, with the tensors of the first time."""

    def __init__(self) -> None:
        self.first: dict[Any, Any] = {}
        self.hits = 0

    def run(self, key: Any, work: Any) -> None:
        self.hits += key in self.first
        self.first.setdefault(key, work)()


class Places:
    """Memory that is given out in the same order in every step, as an allocator does in a training loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[Any, Tensor] = {}
        self.count = itertools.count()
        plain, graph, grad = torch.empty, ops.attention_graph, torch.autograd.grad

        def empty(*size: Any, **kind: Any) -> Tensor:
            key = (next(self.count), str(size), str(kind))
            if key not in self.given:
                self.given[key] = plain(*size, **kind)
            return self.given[key]

        def placed(x: Tensor) -> Tensor:
            return empty(tuple(x.shape), dtype=x.dtype, device=x.device).copy_(x)

        def attend(*inputs: Tensor) -> tuple[Tensor, ...]:
            o, *leaves = graph(*inputs)
            with torch.enable_grad():
                return Placed.apply(o), *leaves

        class Placed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, o: Tensor) -> Tensor:
                return placed(o)

            @staticmethod
            def backward(ctx: Any, do: Tensor) -> Tensor:
                return do

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(ops, "attention_graph", attend)
        monkeypatch.setattr(torch.autograd, "grad", lambda *inputs, **kind: tuple(placed(g) for g in grad(*inputs, **kind)))

    def again(self) -> None:
        """A new step: what was given out holds NaN."""
        self.count = itertools.count()
        for x in self.given.values():
            x.view(torch.uint8).fill_(0xFF)


def operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention of plain PyTorch in the place of cuDNN's operator, whose results lie somewhere else in every call."""
    lost: list[Tensor] = []

    def scores(q: Tensor, k: Tensor) -> Tensor:
        future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
        return (torch.einsum("bthd,bshd->bhts", q, k).float() * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lost.append(torch.full_like(v, torch.nan))
        lse = scores(q, k).logsumexp(-1)
        return torch.einsum("bhts,bshd->bthd", (scores(q, k) - lse[..., None]).exp().to(v.dtype), v).contiguous(), lse

    def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        assert seed.dtype == torch.int64 and (q.is_cuda or torch.allclose(forward(q, k, v)[0].float(), o.float(), atol=1e-2))
        alpha = (scores(q, k) - lse[..., None]).exp()
        r = torch.einsum("bthd,bshd->bhts", do, v).float() - (do * o).float().sum(-1).transpose(1, 2)[..., None]
        ds = (alpha * r * q.shape[-1] ** -0.5).to(q.dtype)
        return torch.einsum("bhts,bshd->bthd", ds, k), torch.einsum("bhts,bthd->bshd", ds, q), torch.einsum("bhts,bthd->bshd", alpha.to(do.dtype), do)

    monkeypatch.setattr(ops, "fuses", lambda *_: True)
    monkeypatch.setattr(ops, "attention_forward", forward)
    monkeypatch.setattr(ops, "attention_backward", backward)


def test_an_attention_that_is_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's gradients are those of the layer whose attention keeps a graph, in one piece each way."""
    torch.manual_seed(0)
    layer, (x, dy) = SessaLayer(32, 2).to(DEVICE), torch.randn(2, 2, 9, 32, device=DEVICE)
    names = list[str]()
    plain = replay.queue
    monkeypatch.setattr(fused_layer, "applies", lambda layer, x: fused_layer.parameters(layer))
    monkeypatch.setattr(whole, "queue", lambda what, *rest: (names.append(str(what[0])), plain(what, *rest)))

    def step() -> list[Tensor]:
        layer.zero_grad()
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        return [y.detach(), *(p.grad.clone() for p in (leaf, *layer.parameters()) if p.grad is not None)]

    want = step()
    assert len(names) == 4
    operator(monkeypatch)
    for got, w in zip(step(), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-5)
    assert names[4:] == ["forward", "backward"]


@pytest.mark.parametrize("fused", [False, True], ids=["attention with a graph", "attention as an operator"])
def test_no_step_is_taken_for_another(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one layer at the same addresses, changed in turns in everything that decides what is queued: each gives its own gradients."""
    torch.manual_seed(0)
    if fused:
        operator(monkeypatch)
    layer, others = (SessaLayer(32, 2, 2 if fused else 1).to(DEVICE) for _ in range(2))
    x, dy, ds, dk_b = torch.randn(4, 1, 5, 32, device=DEVICE)
    tables, dk = rope_tables(torch.arange(5, device=DEVICE)[None], 16, torch.float32), torch.randn(1, 5, 2 if fused else 1, 16, device=DEVICE)
    monkeypatch.setattr(fused_layer, "applies", lambda layer, x: fused_layer.parameters(layer))
    monkeypatch.setattr(regions, "storage_type", lambda x: torch.bfloat16 if torch.is_autocast_enabled(DEVICE) else x.dtype)
    monkeypatch.setattr(ops, "_TRAINING_BACKENDS", [SDPBackend.MATH])
    monkeypatch.setattr(ops, "_wants_other_backend", lambda *_: True)
    known, places = Again(), Places(monkeypatch)

    def step(frozen: str, cast: bool, rope: bool, rows: bool, of: SessaLayer) -> dict[str, Tensor]:
        places.again()
        of.zero_grad()
        for name, p in of.named_parameters():
            p.requires_grad_(frozen not in name.split("."))
        leaf = x.detach().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=cast):
            y, new = of.step(leaf, None, None, tables if rope else None, rows)
        if rows:
            torch.autograd.backward([y, new.s, new.k_b, new.k_f], [dy, ds, dk_b, dk])
        else:
            y.backward(dy)
        assert leaf.grad is not None
        return {"y": y.detach().clone(), "x": leaf.grad.clone()} | {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}

    kinds = [("W_in", False, True, False, layer), ("out_proj", False, True, False, layer), ("none", False, True, False, layer),
             ("none", True, True, False, layer), ("none", False, False, False, layer), ("none", False, True, True, layer),
             ("none", False, True, False, others)]  # fmt: skip
    kinds = [kinds[i] for i in (0, 2, 3, 5)] if fused else kinds
    want = []
    for kind in kinds:
        monkeypatch.setattr(replay, "replays", lambda device: None)
        want.append(step(*kind))
    monkeypatch.setattr(replay, "replays", lambda device: known)
    for _ in range(2):
        for kind, expected in zip(kinds, want, strict=True):
            got = step(*kind)
            assert got.keys() == expected.keys()
            for name, g in expected.items():
                assert torch.equal(got[name], g), f"{name} of {kind[:4]}"
    assert known.hits >= (2 if fused else 4) * len(kinds)  # in the second round all pieces were there before


def test_views_of_one_allocation() -> None:
    memory = Memory({"a": ((3, 5), torch.bfloat16), "nothing": ((0, 4), torch.float32), "b": ((2,), torch.float32)})
    held = memory.allocate(torch.device("cpu"))
    a, nothing, b = memory.views(held)
    assert a.shape == (3, 5) and nothing.shape == (0, 4) and b.dtype == torch.float32 and b.data_ptr() % 256 == held.data_ptr() % 256
    a.fill_(1.0)
    b.fill_(2.0)
    assert torch.equal(memory.view(held, "a"), a) and bool((a == 1).all()) and bool((memory.view(held, "b") == 2).all())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("fused", [False, True], ids=["attention with a graph", "attention as an operator"])
def test_replays_change_no_bit(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x, dy = SessaLayer(256, 4).cuda().bfloat16(), *torch.randn(2, 2, 300, 256, device="cuda").bfloat16()
    monkeypatch.setattr(ops, "_TRAINING_BACKENDS", [SDPBackend.MATH])
    monkeypatch.setattr(ops, "_wants_other_backend", lambda *_: True)
    if fused:
        operator(monkeypatch)

    def step() -> list[Tensor]:
        layer.zero_grad()
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        return [y.detach().clone(), *(x.grad.clone() for x in (leaf, *layer.parameters()) if x.grad is not None)]

    with monkeypatch.context() as patch:
        patch.setattr(replay, "replays", lambda device: None)
        want = step()
    held = []
    for i in range(40):
        if i > 15:  # elsewhere from now on
            held.append(torch.full((1 << 16 + i % 5,), torch.nan, device="cuda"))
            held = held[-3:]
        assert all(torch.equal(got, w) for got, w in zip(step(), want, strict=True)), f"step {i}"
    graphs = [len(kept._graphs) for kept in replay._KEPT.values()]
    assert any(graphs) and all(kept._on for kept in replay._KEPT.values())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_replays_of_feedback_attention_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forwards before their backwards, with memory that moves."""
    torch.manual_seed(0)
    x = [torch.randn(2, 300, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    gamma, ds = (torch.rand(2, 300, device="cuda") * 2 - 1).requires_grad_(), torch.randn(2, 300, 64, device="cuda").bfloat16()
    leaves = (x[0], x[1], gamma, x[2])

    def step(turn: int) -> list[Tensor]:
        first, other = ops.feedback_attention(*leaves), ops.feedback_attention(x[turn % 2], x[1], gamma, x[2])
        with torch.no_grad():
            plain = ops.feedback_attention(*leaves)
        return [first, other, plain, *torch.autograd.grad(other, leaves, ds, allow_unused=True), *torch.autograd.grad(first, leaves, ds)]

    with monkeypatch.context() as patch:
        patch.setattr(replay, "replays", lambda device: None)
        want = [step(turn) for turn in range(2)]
    held, kept = list[Tensor](), replay.replays(ds.device)
    assert kept is not None
    before = kept._replayed
    for i in range(40):
        if i > 15:
            held = [*held[-2:], torch.full((1 << 16 + i % 5,), torch.nan, device="cuda")]
        for got, w in zip(step(i), want[i % 2], strict=True):
            assert (got is None) == (w is None) and (got is None or torch.equal(got, w)), f"step {i}"
    assert kept._on and kept._replayed - before > 60


def test_no_call_of_feedback_attention_is_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls at the same addresses that differ in what decides their launches: each gives its own numbers, forward and backward."""
    torch.manual_seed(0)
    known, options = Again(), {module: side(small_options(torch.float32), module is backward) for module in (forward, backward)}
    q, k, f, ds = torch.randn(4, 1, 18, 32, device=DEVICE)
    gamma, past, length = torch.rand(1, 18, device=DEVICE), torch.randn(2, 1, 5, 32, device=DEVICE), torch.tensor([[0, 3]], dtype=torch.int32, device=DEVICE)
    given, count, plain = dict[Any, Tensor](), itertools.count(), torch.empty
    plans: dict[Any, Any] = {}

    def empty(*size: Any, **kind: Any) -> Tensor:
        return given.setdefault((next(count), str(size), str(kind)), plain(*size, **kind))

    def made(module: Any, x: Tensor, capacity: int) -> Any:
        key = (module, x.dtype, x.shape, capacity)
        if key not in plans:
            plans[key] = module.plan_of(x.device, x.dtype, x.shape, capacity, options[module])
        return plans[key]

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(tuple(x.shape), dtype=x.dtype, device=x.device))

    def run(capacity: int, lse: bool, again: Any) -> list[Tensor]:
        nonlocal count
        count = itertools.count()
        x = (q, k, gamma, f)
        behind = [*past[:, :, :capacity], length[:, int(capacity > 0)]]
        s, sums, low = forward.forward(*x, *behind, lse, made=made(forward, x[0], capacity), replay=again)
        if sums is None:
            return [s.clone()]
        return [y.clone() for y in (s, *backward.backward(ds, *x, s, sums, low, *behind, made=made(backward, x[0], capacity), replay=again))]

    kinds = [(0, True), (0, False), (5, True)]
    want = [run(*kind, forward.at_once) for kind in kinds]
    for _ in range(2):
        for kind, expected in zip(kinds, want, strict=True):
            got = run(*kind, lambda what, device, tensors, work: known.run((what, replay.places(tensors)), work))
            for i, (g, w) in enumerate(zip(got, expected, strict=True)):
                assert torch.equal(g, w), f"{i} of {kind}"
    assert known.hits == 5


def test_feedback_attention_is_queued_in_one_piece_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the public function, and by the registered operators, which a compiled model calls."""
    names, (q, k, f) = list[str](), torch.randn(3, 1, 20, 32, device=DEVICE)
    gamma, options = torch.rand(1, 20, device=DEVICE), small_options(torch.float32)
    plain = {module: module.plan_of for module in (forward, backward)}
    for module, plan_of in plain.items():
        monkeypatch.setattr(module, "plan_of", lambda *at, plan_of=plan_of, way=module: plan_of(*at[:4], side(options, way is backward)))
    monkeypatch.setattr(route, "uses_triton", lambda q: True)
    monkeypatch.setattr(route, "queue", lambda what, device, tensors, work: (names.append(what[0]), work()))
    leaves = [x.requires_grad_() for x in (q, k, gamma, f)]
    first = torch.autograd.grad(ops.feedback_attention(*leaves).sum(), leaves)
    assert names == ["feedback attention", "feedback attention backward"]
    s, _, _ = torch.ops.sessa.feedback_attention_fwd(*leaves, *ops.no_past(q, True))
    for g, w in zip(torch.autograd.grad(s.sum(), leaves), first, strict=True):
        torch.testing.assert_close(g, w)
    assert names[2:] == names[:2]

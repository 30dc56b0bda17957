"""A layer's pieces that are replayed where they come again: which those are, and that nothing they depend on is left out of what they are known by."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

pytest.importorskip("triton")

from feedback_cases import DEVICE
from replayed import Again

from sessa_deploy import SessaLayer, fused_layer
from sessa_deploy.kernels import ops, replay
from sessa_deploy.kernels.training import attention, regions, whole
from sessa_deploy.kernels.training.plan import Memory
from sessa_deploy.rope import rope_tables


class Places:
    """Memory that is given out in the same order in every step, as an allocator does in a training loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[Any, Tensor] = {}
        self.count, self.used = itertools.count(), set[Any]()
        plain, graph, grad = torch.empty, attention.attention_graph, torch.autograd.grad

        def empty(*size: Any, **kind: Any) -> Tensor:
            key = (next(self.count), str(size), str(kind))
            self.used.add(key)
            if key not in self.given:
                self.given[key] = plain(*size, **kind)
            return self.given[key]

        def placed(x: Tensor) -> Tensor:
            return empty(tuple(x.shape), dtype=x.dtype, device=x.device).copy_(x)

        def attend(*inputs: Tensor) -> tuple[Any, ...]:
            o, *rest = graph(*inputs)
            return placed(o), *rest

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(attention, "attention_graph", attend)
        monkeypatch.setattr(torch.autograd, "grad", lambda *inputs, **kind: tuple(placed(g) for g in grad(*inputs, **kind)))

    def again(self) -> None:
        """A new step: what was given out holds NaN."""
        self.count, self.used = itertools.count(), set()
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
    kinds = [kinds[i] for i in (0, 3, 5)] if fused else kinds
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
    hits = known.hits
    with monkeypatch.context() as patch:
        patch.setattr(whole, "flags", lambda: ("another",))
        step(*kinds[0])
    assert known.hits == hits  # a setting that decides which products are queued
    step(*kinds[0])
    for moved in sorted(places.used) if fused else ():
        places.given[moved] = places.given[moved].clone()
        for name, g in step(*kinds[0]).items():
            assert torch.equal(g, want[0][name]), f"{name} with {moved} somewhere else"


class Watched:
    """A second stream that knows whether something on it was not waited for."""

    every: list[Watched]

    def __init__(self, device: torch.device) -> None:
        self.pending = False
        self.every.append(self)

    def __enter__(self) -> Watched:
        self.pending = True
        return self

    def __exit__(self, *_: object) -> None: ...

    def rest(self) -> None: ...

    def join(self) -> None:
        self.pending = False


@pytest.mark.parametrize("fused", [False, True], ids=["attention with a graph", "attention as an operator"])
def test_memory_is_written_again_when_the_second_stream_is_through(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward's last part writes where its first part, and what stands beside that, reads; nothing is left pending behind a step."""
    layer, x, ends = SessaLayer(32, 2).to(DEVICE), torch.randn(1, 5, 32, device=DEVICE), list[str]()
    monkeypatch.setattr(fused_layer, "applies", lambda layer, x: fused_layer.parameters(layer))
    monkeypatch.setattr(whole, "Beside", Watched)
    monkeypatch.setattr(Watched, "every", [], raising=False)
    if fused:
        operator(monkeypatch)
    plain = whole._Backward.end

    def end(self: Any, grads: tuple[Tensor, ...]) -> None:
        assert len(Watched.every) == 2 and not any(side.pending for side in Watched.every)
        ends.append("backward")
        plain(self, grads)

    monkeypatch.setattr(whole._Backward, "end", end)
    layer(x.requires_grad_()).sum().backward()
    assert ends == ["backward"] and len(Watched.every) == 3 and not any(side.pending for side in Watched.every)


def test_views_of_one_allocation() -> None:
    memory = Memory({"a": ((3, 5), torch.bfloat16), "nothing": ((0, 4), torch.float32), "b": ((2,), torch.float32)})
    held = memory.allocate(torch.device("cpu"))
    a, nothing, b = memory.views(held)
    assert a.shape == (3, 5) and nothing.shape == (0, 4) and b.dtype == torch.float32 and b.data_ptr() % 256 == held.data_ptr() % 256
    a.fill_(1.0)
    b.fill_(2.0)
    assert torch.equal(memory.view(held, "a"), a) and bool((a == 1).all()) and bool((memory.view(held, "b") == 2).all())
    elsewhere = torch.cat([torch.full((256,), 0xFF, dtype=torch.uint8), held])[256:]  # as hooks may give back what was saved
    assert all(torch.equal(x, y) for x, y in zip(memory.views(elsewhere), (a, nothing, b), strict=True)) and torch.equal(memory.view(elsewhere, "b"), b)


@pytest.mark.parametrize("fused", [False, True], ids=["attention with a graph", "attention as an operator"])
def test_what_is_saved_may_come_back_from_somewhere_else(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks that offload activations give back views of memory of theirs, on any boundary; on a GPU on one that PyTorch's own attention takes too."""
    torch.manual_seed(0)
    layer, (x, dy) = SessaLayer(32, 2).to(DEVICE), torch.randn(2, 1, 5, 32, device=DEVICE)
    monkeypatch.setattr(fused_layer, "applies", lambda layer, x: fused_layer.parameters(layer))
    if fused:
        operator(monkeypatch)

    def step() -> list[Tensor]:
        layer.zero_grad()
        leaf = x.detach().requires_grad_()
        layer(leaf).backward(dy)
        return [p.grad.clone() for p in (leaf, *layer.parameters()) if p.grad is not None]

    def found(boundary: int) -> list[Tensor]:
        def moved(x: Tensor) -> Tensor:
            first = max(boundary // x.itemsize, 1)
            return torch.cat([x.new_zeros(first), x.flatten()])[first:].view(x.shape)

        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, moved):
            return step()

    want = step()
    assert all(torch.equal(g, w) for g, w in zip(found(16 if DEVICE == "cuda" else 64), want, strict=True))
    for g, w in zip(found(4) if DEVICE == "cpu" else [], want, strict=DEVICE == "cpu"):  # where a CPU's library may add in another order
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_replicas_of_a_layer_have_no_parameters_of_their_own() -> None:
    """nn.DataParallel's copies hold plain tensors as attributes, and nothing where parameters are."""
    replica = SessaLayer(32, 2)._replicate_for_data_parallel()
    replica._modules = {name: m._replicate_for_data_parallel() for name, m in replica._modules.items() if m is not None}
    mixer = replica._modules["mixer"]
    mixer._modules = {name: m._replicate_for_data_parallel() for name, m in mixer._modules.items() if m is not None}
    assert all(p is None for p in fused_layer.parameters(replica).head)


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

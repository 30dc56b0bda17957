"""A layer whose attention keeps a graph of its own, in a user's hands: the graph holds nothing, and nothing is computed more often than it has to be."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from feedback_cases import DEVICE

from sessa_deploy import SessaLayer, fused_layer
from sessa_deploy.kernels import ops
from sessa_deploy.kernels.training import attention, whole


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> SessaLayer:
    torch.manual_seed(0)
    monkeypatch.setattr(fused_layer, "applies", lambda layer, x: fused_layer.parameters(layer))
    monkeypatch.setattr(ops, "fuses", lambda *_: False)
    monkeypatch.setattr(ops, "_TRAINING_BACKENDS", [SDPBackend.MATH])
    monkeypatch.setattr(ops, "_wants_other_backend", lambda *_: True)
    return SessaLayer(16, 2, 1).to(DEVICE)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """Of each forward attention the memory of q, k, v and o."""
    seen, plain = list[StorageWeakRef](), attention.attention_graph

    def graph(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        o, *rest = plain(q, k, v)
        seen.extend(StorageWeakRef(x.untyped_storage()) for x in (q, o))
        return o, *rest

    monkeypatch.setattr(attention, "attention_graph", graph)
    return seen


def step(layer: SessaLayer, x: Tensor, dy: Tensor, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    call(leaf).backward(dy)
    return [p.grad.clone() for p in (leaf, *layer.parameters()) if p.grad is not None]


@pytest.mark.parametrize("kind", ["once more", "recomputed", "recomputed by an inner backward", "offloaded"])
def test_gradients_are_those_of_a_plain_step(kind: str, layer: SessaLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = torch.randn(2, 1, 5, 16, device=DEVICE)
    want = step(layer, x, dy, layer)
    forwards, plain = itertools.count(), whole._forward
    monkeypatch.setattr(whole, "_forward", lambda *given: (next(forwards), plain(*given))[1])
    if kind == "once more":
        y = layer(leaf := x.detach().requires_grad_())
        first, again = (torch.autograd.grad(y, [leaf, *layer.parameters()], dy, retain_graph=keep) for keep in (True, False))
        assert all(torch.equal(a, b) and torch.equal(a, w) for a, b, w in zip(first, again, want, strict=True))
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(y, leaf, dy)
        return
    if kind == "offloaded":
        with torch.autograd.graph.save_on_cpu():
            got = step(layer, x, dy, layer)
    else:
        reentrant = kind == "recomputed by an inner backward"
        got = step(layer, x, dy, lambda leaf: checkpoint(layer, leaf, use_reentrant=reentrant))  # type: ignore[no-any-return]
        assert next(forwards) == (1 if reentrant else 2), "the first of a reentrant one has no node, and nothing is recomputed twice"
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["behind a backward", "under a checkpoint", "offloaded"])
def test_what_the_attention_read_and_gave_is_given_back(kind: str, layer: SessaLayer, watched: list[StorageWeakRef]) -> None:
    x, dy = torch.randn(2, 1, 5, 16, device=DEVICE)
    leaf = x.detach().requires_grad_()
    if kind == "under a checkpoint":
        y = checkpoint(layer, leaf, use_reentrant=False)
    elif kind == "offloaded":
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            y = layer(leaf)
    else:
        y = layer(leaf)
        assert not watched[0].expired()
        y.backward(dy)
    gc.collect()  # what the interpreter leaves
    assert y.grad_fn is not None and len(watched) == 2 and all(ref.expired() for ref in watched)


def test_rows_that_were_written_to_are_refused(layer: SessaLayer) -> None:
    """A gradient of numbers that are gone would be wrong without a word."""
    x = torch.randn(1, 5, 16, device=DEVICE).requires_grad_()
    y, rows = layer.step(x, None, None, layer.mixer.rope(x, None))
    with torch.no_grad():
        rows.k_f.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

"""Feedback attention's launches, replayed: the same bits, no call taken for another, one piece each way."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from feedback_cases import DEVICE, side, small_options
from replayed import Again

from sessa_deploy.kernels import ops, replay, route
from sessa_deploy.kernels.feedback import backward, forward


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
    for i in range(100):
        if i > 75:  # until then memory comes again, in a few patterns
            held = [*held[-2:], torch.full((1 << 16 + i % 5,), torch.nan, device="cuda")]
        for got, w in zip(step(i), want[i % 2], strict=True):
            assert (got is None) == (w is None) and (got is None or torch.equal(got, w)), f"step {i}"
    assert kept._on and kept._replayed - before > 20


def test_no_call_of_feedback_attention_is_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls at the same addresses that differ in what decides their launches: each gives its own numbers, forward and backward."""
    torch.manual_seed(0)
    known, options = Again(), {module: side(small_options(torch.float32), module is backward) for module in (forward, backward)}
    q, k, f, ds = torch.randn(4, 1, 8, 16, device=DEVICE)
    gamma, past, length = torch.rand(1, 8, device=DEVICE), torch.randn(2, 1, 5, 16, device=DEVICE), torch.tensor([[0, 3]], dtype=torch.int32, device=DEVICE)
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
    names, (q, k, f) = list[str](), torch.randn(3, 1, 8, 16, device=DEVICE)
    gamma, options = torch.rand(1, 8, device=DEVICE), small_options(torch.float32)
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

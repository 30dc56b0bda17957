"""Drafts made on the device, where they might go wrong: near the capacity, in another thread, out of memory, cut short anywhere. Over fakes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_lookup_ahead
from fake_cuda import HostCuda, LateCuda, view

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime import session as session_module
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.device import backend as device_backend
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.engine import OrtCudaBackend
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.session import Session

Build = Callable[..., tuple[OrtCudaBackend, HostCuda, Any]]
ONE = np.ones(1, np.int32)
pytestmark = pytest.mark.usefixtures("itself")


def recite(backend: OrtCudaBackend, text: list[int]) -> list[Any]:
    """Have the engine say text[n] behind n tokens, whatever it is fed. What comes back: steps that were fed what is no token, or what drafts were made of where
    the device's conversation was not the text."""
    buffers, vocabulary, wrong = backend._own(), backend.config.vocab_size, list[Any]()

    def work(tokens: int) -> None:
        at = int(view(buffers.length, np.int32, 1)[0])
        ids = view(buffers.ids, np.int64, tokens)
        if (ids < 0).any() or (ids >= vocabulary).any():
            wrong.append((at, ids.tolist()))
        if tokens > 1 and backend._drafts is not None and at > 40:
            known = view(backend._drafts._text, np.int32, at + 1).tolist()
            if known != text[: at + 1]:
                wrong.append((at, known))
        logits = view(buffers.logits, np.float32, tokens * vocabulary).reshape(tokens, vocabulary)
        logits[:] = 0
        for row in range(tokens):
            logits[row, text[at + row + 1] if at + row + 1 < len(text) else 0] = 1

    backend._run = lambda step: backend._cuda.do(lambda: work(step.tokens))  # type: ignore[method-assign]
    return wrong


@pytest.mark.parametrize("cuda", [HostCuda, LateCuda])
@pytest.mark.parametrize("capacity", range(80, 140, 3))
def test_the_device_knows_the_whole_conversation_up_to_a_full_cache(build: Build, all_logits_bundle: Bundle, capacity: int, cuda: type[HostCuda]) -> None:
    """Where a step of many rows is the last that there is room for, it is settled by nobody, and those behind it are told of what it brought."""
    rng = np.random.default_rng(capacity)
    for loop in (list(range(1, 13)), rng.integers(1, 257, 12).tolist()):
        text = [*(loop * 20)[: capacity - 10], *rng.integers(100, 199, 4).tolist(), *loop * 3][: capacity + 1]
        text[capacity - 9] = text[capacity - 16]
        backend, _, _ = build(all_logits=True, batch=1, capacity=capacity, chunk=16, cuda=cuda())
        wrong = recite(backend, text)
        session = Session(all_logits_bundle, backend, lookup=15)
        found = session.generate([text[:30]], stop_tokens=())[0]
        assert found.tokens == text[30:] and found.finish == "context" and session.drafts.accepted > 20
        assert not wrong


def test_a_text_that_stops_repeating_itself_takes_plain_steps_again(build: Build, all_logits_bundle: Bundle) -> None:
    """Which nothing stands before, once what came last is settled."""
    loop = list(range(1, 13))
    text = [*loop * 4, *np.random.default_rng(1).permutation(np.arange(20, 257)).tolist()]
    backend, _, _ = build(all_logits=True, batch=1, capacity=400, chunk=16, graph=False)
    assert not recite(backend, text)
    session = Session(all_logits_bundle, backend, lookup=7)
    made, rows = backend._drafts.make, list[int]()  # type: ignore[union-attr]
    backend._drafts.make = lambda count, slot: (rows.append(count), made(count, slot))[1]  # type: ignore[union-attr, method-assign]
    assert session.generate([text[:30]], len(text) - 31, stop_tokens=())[0].tokens == text[30:-1]
    assert 2 < sum(count > 1 for count in rows) < 40 and sum(count == 1 for count in rows) <= 2


class Entered(HostCuda):
    """Wants `enter` of the thread that calls, and of each call of the backend where a test clears `current`, as each may be another thread's."""

    current: int | None = None

    def enter(self) -> None:
        self.current = threading.get_ident()


def _where_entered(name: str) -> Callable[..., Any]:
    """That method of HostCuda, where the thread has a context."""

    def call(self: Entered, *given: Any) -> Any:
        assert self.current == threading.get_ident(), "no context in this thread"
        return getattr(HostCuda, name)(self, *given)

    return call


for _name in ("allocate", "launch", "replay", "to_device", "wait_event"):
    setattr(Entered, _name, _where_entered(_name))


def test_another_thread_may_make_the_session(build: Build, all_logits_bundle: Bundle) -> None:
    backend, _, _ = build(all_logits=True, batch=1, capacity=60, chunk=16, cuda=Entered())
    found = list[tuple[int, ...]]()
    thread = threading.Thread(target=lambda: found.append(Session(all_logits_bundle, backend, lookup=7).backend.draft_rows))
    thread.start()
    thread.join()
    assert found == [(8,)]


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "plain"])
def test_each_call_may_be_another_threads(build: Build, graph: bool) -> None:
    backend, cuda, _ = build(all_logits=True, batch=1, capacity=60, chunk=16, cuda=Entered(), graph=graph)
    backend.expect_rows(4)
    backend.step(np.array([[1, 2, 3]]), np.array([3]))

    def call(what: Callable[..., Any], *given: Any) -> Any:
        cuda.current = None  # type: ignore[attr-defined]
        return what(*given)

    call(backend.begin_greedy, np.array([[1]]), ONE)
    call(backend.tell, [1, 2, 3, 1], 0)
    for step in range(8):
        assert call(backend.begin_drafted, 4) if step % 3 else call(backend.begin_next, ONE)
        call(backend.end_drafted)
    call(backend.end_drafted)


@pytest.mark.parametrize("capacity", [59, 60])
def test_a_conversation_longer_than_the_kernel_tells_apart(build: Build, monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    monkeypatch.setattr(device_backend, "MOST_PLACES", 60)
    backend, _, _ = build(all_logits=True, batch=1, capacity=capacity, chunk=16)
    backend.expect_rows(8)
    assert backend.draft_rows == ((8,) if capacity < 60 else ())
    assert backend._drafts is None or not view(backend._drafts._text, np.int32, capacity + 1).any(), "a place that nobody told of holds a token"


def test_no_memory_for_drafts_closes_what_was_opened(build: Build, all_logits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for mine in (True, False):
        backend, cuda, _ = build(all_logits=True, batch=1, capacity=60, chunk=16)

        def full(size: int) -> int:
            raise SessaError("out of memory")

        monkeypatch.setattr(cuda, "allocate", full)
        monkeypatch.setattr(session_module, "open_backend", lambda *given, made=backend: made)
        with pytest.raises(SessaError, match="out of memory"):
            Session(all_logits_bundle, "ort-cuda" if mine else backend, lookup=7)
        assert cuda.closed == mine


def test_rows_moved_are_counted_and_a_closed_backend_is_told_nothing(build: Build, all_logits_bundle: Bundle) -> None:
    backend, _, _ = build(all_logits=True, batch=1, capacity=60, chunk=16)
    backend.expect_rows(4)
    backend.step(np.array([[1, 2, 3]]), np.array([3]))
    backend.begin_greedy(np.array([[1]]), ONE)
    backend.tell([1, 2, 3, 1], 0)
    drafted = 0
    for step in range(8):
        assert backend.begin_drafted(4) if step % 3 else backend.begin_next(ONE)
        if step == 0:
            backend.tell([1, 2, 3, 1, *backend.end_drafted()[0]], 0)
        else:
            tokens, count = backend.end_drafted()
            drafted += count + 1 - len(tokens)
    tokens, count = backend.end_drafted()
    drafted += count + 1 - len(tokens)
    assert not backend.under_way and backend.bytes_moved == backend._own().row_bytes * (int(backend.length[0]) + drafted)
    backend.close()
    with pytest.raises(UserError, match="the session is closed"):
        backend.tell([1, 2], 0)


def test_greedy_and_drawn_turns_with_lookup_on_and_off(build: Build, all_logits_bundle: Bundle, tiny_bundle: Bundle, eager: None) -> None:
    backend, _, _ = build(all_logits=True, batch=1, capacity=64, chunk=16, cuda=LateCuda())
    session, plain = Session(all_logits_bundle, backend, lookup=15), Session(tiny_bundle, OrtBackend(tiny_bundle, capacity=64, threads=1))
    rng, drafted = np.random.default_rng(3), 0
    for _ in range(25):
        session.reset()
        plain.reset()
        while True:
            prompt, new = rng.integers(0, 5, int(rng.integers(1, 6))).tolist(), int(rng.integers(1, 14))
            if len(session.tokens()) + len(prompt) + new > 63:
                break
            session.lookup, taken = int(rng.choice([0, 15, 3])), int(rng.integers(1, new + 1))
            params = SamplingParams() if rng.random() < 0.7 else SamplingParams(0.8, seed=int(rng.integers(9)))
            stream = session.stream([prompt], new, params, stop_tokens=())
            found = [next(stream).token for _ in range(taken)]
            stream.close()
            assert found == plain.generate([prompt], taken, params, stop_tokens=())[0].tokens and session.tokens() == plain.tokens()
            drafted += session.drafts.drafted
            assert session.lookup != 3 or session.drafts.drafted <= 3 * session.drafts.steps
    assert drafted > 20


class Interrupt(test_lookup_ahead.Interrupt):
    FILES = tuple(f"/runtime/{name}.py" for name in ("session", "drafted", "begun", "device/backend", "device/drafts", "device/buffers"))


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "plain"])
def test_ctrl_c_at_many_lines_leaves_a_text_that_goes_on(build: Build, all_logits_bundle: Bundle, tiny_bundle: Bundle, eager: None, graph: bool) -> None:
    backend, _, _ = build(all_logits=True, batch=1, capacity=64, chunk=16, cuda=LateCuda(), graph=graph)
    session, plain = Session(all_logits_bundle, backend, lookup=7), Session(tiny_bundle, OrtBackend(tiny_bundle, capacity=64, threads=1))
    interrupted, tracing = 0, sys.gettrace()
    for lines in range(30, 4000, 13):
        session.reset()
        stream, over = session.stream([[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]], 20, stop_tokens=()), False
        try:
            sys.settrace(Interrupt(lines))
            list(stream)
            over = True
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(tracing)
        for _ in range(2):
            found = session.generate([[7, 1]], 7, stop_tokens=())[0].tokens
            plain.reset()
            assert found == plain.generate([session.tokens()[:-7]], 7, stop_tokens=())[0].tokens, lines
            assert backend.length[0] == len(session.tokens()) - 1 and backend._flying in (0, 1), lines
        if over:
            break
    assert interrupted > 50 and over

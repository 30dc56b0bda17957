"""What goes wrong beside a request is not its business: steps that fail, clients that go away, queues that are full."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from batching import Plan, Played, Toy, alone, check_alike, play

from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.requests import Event, NotAccepting, QueueFull, Request
from sessa_deploy.runtime.sampling import NotFinite, SamplingParams
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer
from sessa_deploy.runtime.turns import Task

TOY = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257, max_context=64)
TOKENIZER = Tokenizer.from_json(byte_level_tokenizer())
SHARED = tuple(range(12))
PLANS = [
    Plan(Request(SHARED, max_new_tokens=6)), Plan(Request((*SHARED, 7, 8), SamplingParams(1.0, seed=1), 5), 1), Plan(Request((9, 8), max_new_tokens=4), 2),
    Plan(Request((5,) * 9, max_new_tokens=5, prompt_logprobs=1), 2), Plan(Request((*SHARED, 3), max_new_tokens=3), 6), Plan(Request((4,), max_new_tokens=8), 9),
    Plan(Request((*SHARED, 99, 98), max_new_tokens=3), 14),
]


def toy(batch=2, chunk=4, capacity=64, faults=None, **options) -> Batcher:
    return Batcher(Toy(TOY, batch, capacity, faults), TOKENIZER, chunk, **options)


EXPECTED = [alone(toy, plan.request) for plan in PLANS]


def calls_in(plans) -> int:
    batcher = toy()
    play(batcher, plans)
    return batcher.backend.entered


@pytest.mark.parametrize("error", [SessaError("the engine refused"), RuntimeError("CUDA error:\nout of memory"), MemoryError(), NotFinite()],
                         ids=lambda error: type(error).__name__)
def test_a_call_into_the_backend_that_fails_ends_its_own_requests_and_no_other(error):
    """At every one of them: a chunk, a step, a copy, a reset."""
    total, hit, spoilt = calls_in(PLANS), 0, set()
    for at in range(1, total):  # the first resets the backend when the batcher is made
        batcher = toy(faults={at: error})
        for number, (plan, found, expected) in enumerate(zip(PLANS, play(batcher, PLANS), EXPECTED, strict=True)):
            if found.finish == "error":
                assert found.tokens == expected.tokens[: len(found.tokens)] and len(found.tokens) < len(expected.tokens)
                reason = found.events[-1].error
                assert reason == (" ".join(str(error).split()) or type(error).__name__), reason
                hit += 1
                spoilt.add((number, bool(found.tokens)))
            else:
                check_alike(found, expected, plan)
        assert batcher.ready and batcher.stats().failures <= 1
        again = Played()
        batcher.submit(PLANS[1].request, again.events.append)
        while batcher.turn():
            pass
        assert again.tokens == EXPECTED[1].tokens and batcher.stats().failures_in_row == 0
    assert hit >= total // 4 and {n for n, _ in spoilt} == set(range(len(PLANS))), "each of them is hit once"
    assert isinstance(error, NotFinite) or len(spoilt) > len(PLANS), "before the first token and behind it"


def test_three_failures_in_a_row_turn_readiness_red_and_one_step_green():
    batcher = toy()
    assert batcher.ready
    for number in range(3):
        batcher.backend.faults = {batcher.backend.entered + n: RuntimeError("lost") for n in range(1, 9)}
        found = Played()
        batcher.submit(Request((1, 2)), found.events.append)
        while batcher.turn():
            pass
        assert found.finish == "error" and "lost" in found.events[-1].error and batcher.ready == (number < 2)
    batcher.backend.faults = {}
    found = Played()
    batcher.submit(PLANS[0].request, found.events.append)
    batcher.turn()
    assert batcher.ready and batcher.stats().failures == 3
    while batcher.turn():
        pass
    assert found.tokens == EXPECTED[0].tokens


def test_readiness_that_is_red_turns_green_without_a_request(monkeypatch):
    from sessa_deploy.runtime import batcher as module

    monkeypatch.setattr(module, "_PROBE_SECONDS", 0.01)
    batcher = toy()
    batcher.start()
    forward = batcher.backend._forward_row
    batcher.backend._forward_row = lambda row, ids: 1 / 0
    for _ in range(3):
        assert list(batcher.submit(Request((1, 2))).events())[-1].error == "division by zero"
    until(lambda: not batcher.ready)
    time.sleep(0.05)
    assert not batcher.ready, "it tries, and fails"
    batcher.backend._forward_row = forward
    until(lambda: batcher.ready)
    batcher.close()


def until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stage", ["prompt", "greedy", "sampled", "greedy beside sampled", "sampled beside greedy"])
def test_logits_that_are_not_finite_end_that_request_alone(stage):
    batcher = toy(3)
    feed = batcher.backend._feed
    bad = (77,) if stage == "prompt" else (78,)

    def spoilt(row, ids):
        logits = feed(row, ids)
        tokens = batcher.backend.rows[row]
        return np.full_like(logits, np.nan) if tokens[0] == bad[0] and (stage == "prompt" or len(tokens) > 3) else logits

    batcher.backend._feed = spoilt
    own, params = (SamplingParams(1.0, seed=1) if word == "sampled" else SamplingParams() for word in (stage.split()[0], stage.split()[-1]))
    requests = [Plan(Request(bad, own, 8)), *(Plan(Request((n, n), params, 8)) for n in range(2))]
    found = play(batcher, requests)
    assert found[0].finish == "error" and "finite" in found[0].events[-1].error and len(found[0].tokens) == (0 if stage == "prompt" else 3)
    for one, plan in zip(found[1:], requests[1:], strict=True):
        check_alike(one, alone(toy, plan.request), plan)
    assert batcher.ready
    batcher.backend._feed = lambda row, ids: np.full_like(feed(row, ids), np.nan)
    play_more = [batcher.submit(Request((5,))) for _ in range(3)]
    while batcher.turn():
        pass
    assert all(list(h.events())[-1].error for h in play_more) and not batcher.ready, "all of them bad is a fault of the model"


def test_a_tokenizer_that_fails_ends_one_request(monkeypatch):
    batcher = toy()
    found = [Played(), Played()]
    for number, one in enumerate(found):
        batcher.submit(Request((number,), max_new_tokens=6), one.events.append)
    batcher.turn()
    batcher.turn()
    row = next(task.row for task in batcher._turns.running if task.request.prompt == (0,))
    monkeypatch.setattr(row._decoder, "push", lambda token: 1 / 0)
    while batcher.turn():
        pass
    assert found[0].finish == "error" and found[1].tokens == alone(toy, Request((1,), max_new_tokens=6)).tokens and batcher.ready


def test_cancelled_at_every_stage():
    """Queued, between chunks, while it draws, when it is over: its slot is free for the next, and nobody else notices."""
    ends = set()
    for number in range(len(PLANS)):
        for after in range(24):
            plans = [Plan(p.request, p.at, after if n == number else None) for n, p in enumerate(PLANS)]
            batcher = toy()
            for n, (plan, found, expected) in enumerate(zip(plans, play(batcher, plans), EXPECTED, strict=True)):
                check_alike(found, expected, plan)
                if n == number:
                    ends.add((found.finish, bool(found.tokens), bool(batcher.stats().cached_tokens)))
    assert {("cancelled", False), ("cancelled", True), ("length", True)} == {end[:2] for end in ends}


def test_a_cancelled_request_takes_no_further_step():
    batcher, found = toy(1), Played()
    handle = batcher.submit(Request(tuple(range(40)), max_new_tokens=8), found.events.append)
    batcher.turn()
    handle.cancel()
    calls = len(batcher.backend.calls)
    assert not batcher.turn() and len(batcher.backend.calls) == calls and found.events[-1][:1] == (None,) and found.finish == "cancelled"
    handle.cancel()
    assert not batcher.turn() and len(found.events) == 1


def test_a_client_that_vanishes_in_its_callback_is_cancelled():
    batcher, found = toy(2), Played()

    def gone(event):
        found.events.append(event)
        raise RuntimeError("Event loop is closed")

    other = Played()
    batcher.submit(Request((1,), max_new_tokens=20), gone)
    batcher.submit(Request((2,), max_new_tokens=6), other.events.append)
    while batcher.turn():
        pass
    assert len(found.tokens) <= 2 and found.finish == "cancelled" and other.tokens == alone(toy, Request((2,), max_new_tokens=6)).tokens


def test_two_hundred_clients_of_which_a_third_vanish():
    """On the batcher's thread: no slot is lost, everyone else gets what is theirs, and memory stays where it was."""
    batcher = toy(8, 16, queue=500, queue_timeout=None)
    wanted = {n: alone(lambda: toy(8, 16), Request((n, n, n + 1), SamplingParams(1.0, seed=n), 12)).tokens for n in range(20)}
    batcher.start()

    def client(number: int) -> None:
        kind = number % 20
        handle = batcher.submit(Request((kind, kind, kind + 1), SamplingParams(1.0, seed=kind), 12))
        if number % 3 == 0:
            for seen, _ in enumerate(handle.events()):
                if seen >= number % 5:
                    handle.cancel()
                    return  # and never looks again
        else:
            tokens = [event.token for event in handle.events()]
            if tokens != wanted[kind]:
                wrong.append((number, tokens))

    def tasks() -> int:
        return sum(type(found) is Task for found in gc.get_objects())

    wrong, sizes, before = [], [], tasks()
    for _ in range(3):
        threads = [threading.Thread(target=client, args=(n,)) for n in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: batcher.stats().running + batcher.stats().queued + batcher.stats().reading == 0)
        del threads, thread
        batcher.backend.calls.clear()
        gc.collect()
        sizes.append(sys.getallocatedblocks())
        assert tasks() <= before, "a request that is over is forgotten"
    batcher.close()
    assert not wrong and batcher._slots.free == 8
    stats = batcher.stats()
    assert sum(stats.finished.values()) == 600 and stats.finished["length"] >= 396 and stats.finished["error"] == 0
    assert sizes[2] - sizes[1] < 600, f"blocks of memory in use after each 200 requests: {sizes}"


def test_a_full_queue_is_refused_at_once():
    batcher = toy(2, queue=1)
    handles = [batcher.submit(Request((n,), max_new_tokens=2)) for n in range(3)]
    with pytest.raises(QueueFull) as caught:
        batcher.submit(Request((4,)))
    assert isinstance(caught.value, UserError) and "--queue" in str(caught.value) and batcher.stats().rejected == 1
    while batcher.turn():
        pass
    assert [len(list(h.events())) for h in handles] == [2, 2, 2]
    batcher.submit(Request((4,)))
    none = toy(1, queue=0)
    none.submit(Request((1,)))
    with pytest.raises(QueueFull):
        none.submit(Request((2,)))


def test_whoever_hears_a_last_event_may_send_the_next_request():
    batcher, heard = toy(1, queue=0), []

    def deliver(event: Event) -> None:
        if event.finish is not None:
            heard.append(event.finish)
            if len(heard) < 3:
                batcher.submit(Request((2,), max_new_tokens=1), deliver)

    batcher.submit(Request((1,), max_new_tokens=1), deliver)
    while batcher.turn():
        pass
    assert heard == ["length"] * 3 and batcher.stats().rejected == 0


def test_waiting_too_long_is_said():
    now = [0.0]
    batcher = toy(1, queue_timeout=5.0, clock=lambda: now[0])
    first, second, third = Played(), Played(), Played()
    batcher.submit(Request((1,), max_new_tokens=9), first.events.append)
    batcher.turn()
    now[0] = 1.0
    batcher.submit(Request((2,), max_new_tokens=9), second.events.append)
    now[0] = 5.5
    batcher.submit(Request((3,), max_new_tokens=9), third.events.append)
    now[0] = 6.1
    batcher.turn()
    assert second.finish == "error" and second.events[-1].expired and "5 s" in second.events[-1].error and third.finish is None
    while batcher.turn():
        pass
    assert first.finish == third.finish == "length" and batcher.stats().expired == 1 and batcher.stats().waiting.total == pytest.approx(0.6)
    assert sum(batcher.stats().waiting.counts) == 2


@pytest.mark.parametrize("threaded", [False, True])
def test_draining_ends_what_runs_and_takes_nothing_new(threaded):
    batcher = toy(2)
    handles = [batcher.submit(Request((n,), max_new_tokens=10)) for n in range(5)]
    if threaded:
        batcher.start()
    batcher.drain(30.0)
    assert [list(h.events())[-1].finish for h in handles] == ["length"] * 5 and not batcher.ready
    with pytest.raises(NotAccepting):
        batcher.submit(Request((1,)))
    batcher.close()
    batcher.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_what_does_not_end_in_time_is_cancelled(threaded):
    batcher = toy(2, capacity=4096)
    if threaded:
        forward = batcher.backend._forward
        batcher.backend._forward = lambda *given: (time.sleep(0.002), forward(*given))[1]
        batcher.start()
    handles = [batcher.submit(Request((n,), max_new_tokens=4000, ignore_eos=True)) for n in range(5)]
    batcher.drain(0.05)
    last = [list(h.events())[-1] for h in handles]
    assert [event.finish for event in last] == ["cancelled"] * 5 and all("shutting down" in event.error for event in last)
    batcher.close()
    assert batcher._slots.free == 2


def test_a_process_that_ends_waits_for_the_step_that_runs():
    """A thread inside an engine's library asks for the interpreter when it comes back from there, and aborts a process that has none any more."""
    code = f"""
import sys, time, threading
sys.path[:0] = {sys.path!r}
import test_batcher_faults as faults
batcher, inside = faults.toy(1), threading.Event()
forward = batcher.backend._forward
def native(*given):
    inside.set()
    time.sleep(0.3)
    print("back", flush=True)
    return forward(*given)
batcher.backend._forward = native
batcher.start()
batcher.submit(faults.Request((1,), max_new_tokens=60))
inside.wait()
print("leaves", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=250)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("leaves\nback\n")


def test_closing_ends_all_events():
    batcher = toy(1)
    batcher.start()
    with pytest.raises(UserError, match="started"):
        batcher.start()
    handles = [batcher.submit(Request((n,), max_new_tokens=60)) for n in range(3)]
    batcher.close()
    assert all(list(h.events())[-1].finish in ("cancelled", "length") for h in handles)
    with pytest.raises(NotAccepting):
        batcher.submit(Request((1,)))
    with pytest.raises(UserError, match="started"):
        batcher.start()
    with pytest.raises(UserError, match="on_event"):
        next(iter(toy().submit(Request((1,)), print).events()))

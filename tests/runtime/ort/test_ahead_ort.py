"""The next greedy step launched on the GPU before the host has read the ids of the one before, over fakes: a GPU that runs everything at once, so that a step
is over before the one before it was read, and one that runs nothing before somebody waits for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import fake_cuda
import numpy as np
import pytest
from ahead import conversations
from batching import Plan, alone, check_alike, examples, plans, play
from fake_cuda import HostCuda, LateCuda
from fake_onnxruntime import BATCH, CAPACITY
from hypothesis import HealthCheck, given, settings

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime import bench
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.device.kernels import images
from sessa_deploy.runtime.ort.engine import OrtCudaBackend
from sessa_deploy.runtime.requests import Request
from sessa_deploy.runtime.sampling import NotFinite
from sessa_deploy.runtime.session import Session

Build = Callable[..., tuple[OrtCudaBackend, HostCuda, Any]]
ONE = np.ones(BATCH, np.int32)
PROMPTS = [[1, 2, 3], [7], list(range(40, 53))]


def plain(build: Build, **options: Any) -> OrtCudaBackend:
    backend = build(**options)[0]
    backend.looks_ahead = False
    return backend


@pytest.mark.parametrize("cuda", [HostCuda, LateCuda])
@pytest.mark.parametrize("options", [{}, {"graph": False}, {"batch": 1}, {"all_logits": True}], ids=["graph", "plain", "one", "all"])
def test_conversations_are_the_same(build: Build, tiny_bundle: Bundle, cuda: Any, options: dict[str, Any]) -> None:
    ahead, _, _ = build(cuda=cuda(), **options)
    sessions = [Session(tiny_bundle, backend, chunk=4) for backend in (ahead, plain(build, **options))]
    assert ahead.looks_ahead
    finishes = set()
    for seed in range(5):
        found, wanted = (conversations(session, seed) for session in sessions)
        assert found == wanted
        finishes |= {one.finish for made, _, _ in found for one in made}
    assert {"stop", "length"} <= finishes and len(ahead._graphs) >= (options.get("graph", True))


@pytest.mark.parametrize("cuda", [HostCuda, LateCuda])
def test_every_request_gets_what_it_gets_alone(build: Build, cuda: Any) -> None:
    """Over caches that are poisoned before every turn, steps under way or not."""
    backend, other = build(cuda=cuda())[0], plain(build)

    @settings(max_examples=examples(5), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(plans(257, CAPACITY, most=5, tokens=8))
    def property(requests):
        for plan, found in zip(requests, play(Batcher(backend, None, 8, queue=99), requests), strict=True):
            check_alike(found, alone(lambda: Batcher(other, None, 8), plan.request), plan, 1e-4)

    property()


def test_the_next_step_is_launched_before_the_ids_are_waited_for(build: Build, tiny_bundle: Bundle) -> None:
    backend, cuda, _ = build()
    session = Session(tiny_bundle, backend)
    session.generate(PROMPTS, 8, stop_tokens=())
    cuda.log.clear()
    sent, launches = cuda.sent, cuda.launches
    stream = session.stream([[5], [6], [7]], 8, stop_tokens=())
    next(stream)
    fed, replays = cuda.sent, cuda.replays
    assert len(list(stream)) == BATCH * 8 - 1
    one, two = ["replay", "record 1"], ["replay", "record 2"]  # fed by the host; then by turns
    assert cuda.log[-21:] == [*one, *two, "wait 1", *one, "wait 2", *two, "wait 1", *one, "wait 2", *two, "wait 1", *one, "wait 2", "wait 1"]
    assert cuda.replays == replays + 7 and cuda.sent <= fed + 1 and sent < fed, "nothing is sent to the GPU but the lengths, once"
    assert len(cuda.graphs) == 3 and cuda.launches > launches  # of the prompt alone
    cuda.log.clear()
    bench.measure(session, bench.BenchOptions(4, 6, steps=12, seconds=0, warmup=0, prefills=1))
    assert cuda.log[:6] == ["replay", "record 1", "replay", "record 2", "wait 1", "replay"], "bench measures what a user gets"


def test_a_sequence_that_ends_is_left_out_of_the_next_step(build: Build, tiny_bundle: Bundle) -> None:
    """One that could not be foreseen was fed a token too many, whose row lies beyond its length."""
    wanted = Session(tiny_bundle, plain(build)).generate(PROMPTS, 12, stop_tokens=())
    backend, cuda, _ = build(cuda=LateCuda())
    session = Session(tiny_bundle, backend)
    drawn = wanted[0].tokens
    at = next(i for i, token in enumerate(drawn) if i > 2 and token not in {*drawn[:i], *wanted[1].tokens, *wanted[2].tokens})
    made = session.generate(PROMPTS, 12, stop_tokens=(stop := drawn[at]))
    assert [one.tokens for one in made] == [drawn[: at + 1], wanted[1].tokens, wanted[2].tokens]
    assert backend.length.tolist() == [3 + at, 1 + 11, 13 + 11]
    on_device = fake_cuda.view(backend._buffers.length, np.int32, BATCH)
    cuda.wait()
    assert on_device.tolist() == [3 + at + 1, 1 + 11, 13 + 11], "one too many, and none more"
    poisoned = session.generate([[9], None, None], 6, stop_tokens=())[0].tokens
    other = Session(tiny_bundle, plain(build))
    other.generate(PROMPTS, 12, stop_tokens=stop)
    assert other.generate([[9], None, None], 6, stop_tokens=())[0].tokens == poisoned


@pytest.mark.parametrize("cuda", [HostCuda, LateCuda])
@pytest.mark.parametrize("at", range(2, 7))
def test_ctrl_c_between_a_launch_and_its_ids(build: Build, tiny_bundle: Bundle, cuda: Any, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told stays told, what was not is drawn by the next call, and nothing on the host is written while a step may read it."""
    whole = Session(tiny_bundle, plain(build)).generate(PROMPTS, 12, stop_tokens=())
    backend, driver, _ = build(cuda=cuda())
    session = Session(tiny_bundle, backend)
    told: list[list[int]] = [[] for _ in PROMPTS]
    waited = driver.wait_event

    def wait(event: int) -> None:
        if len(told[0]) == at:
            raise KeyboardInterrupt
        waited(event)

    monkeypatch.setattr(driver, "wait_event", wait)
    with pytest.raises(KeyboardInterrupt):
        for chunk in session.stream(PROMPTS, 12, stop_tokens=()):
            told[chunk.row].append(chunk.token)
    monkeypatch.undo()
    assert [len(one) for one in told] == [at] * 3 and backend.length.tolist() == [len(p) + at - 1 for p in PROMPTS]
    for row, one in enumerate(session.generate([[], [], []], 12 - at, stop_tokens=())):
        assert told[row] + one.tokens == whole[row].tokens


@pytest.mark.parametrize("cuda", [HostCuda, LateCuda])
def test_logits_that_are_not_finite_are_told_of_with_their_token(build: Build, tiny_bundle: Bundle, cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the step behind it has been fed by then, with a token that exists."""
    backend, driver, _ = build(cuda=cuda(), graph=False)
    session, fed, run = Session(tiny_bundle, backend), [], backend._run
    steps = 0

    def broken(step: Any) -> None:
        nonlocal steps
        ids = fake_cuda.view(backend._buffers.ids, np.int64, BATCH)
        driver.do(lambda: fed.append(ids.tolist()))
        run(step)
        steps += step.tokens == 1
        if step.tokens == 1 and steps == 4:
            driver.fill(backend._buffers.logits + 4 * 257, 0x7FC00000, 257)  # of the second sequence

    monkeypatch.setattr(backend, "_run", broken)
    told: list[list[int]] = [[] for _ in PROMPTS]
    with pytest.raises(NotFinite):
        for chunk in session.stream(PROMPTS, 12, stop_tokens=()):
            told[chunk.row].append(chunk.token)
    assert [len(one) for one in told] == [4, 4, 4] and backend.length.tolist() == [len(p) + 3 for p in PROMPTS] and backend.under_way == 0
    driver.wait()
    assert fed[-1][1] == 0 and np.min(fed) >= 0 and np.max(fed) < 257
    whole = Session(tiny_bundle, plain(build)).generate(PROMPTS, 12, stop_tokens=())
    for row, one in enumerate(session.generate([[], [], []], 8, stop_tokens=())):
        assert told[row] + one.tokens == whole[row].tokens


def test_of_many_requests_one_that_breaks_ends_and_the_others_go_on(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [alone(lambda: Batcher(plain(build), None, 8), Request(tuple(p), max_new_tokens=9)) for p in PROMPTS]
    backend, driver, _ = build(cuda=LateCuda(), graph=False)
    run, row = backend._run, backend._buffers.entries[0].row

    def broken(step: Any) -> None:
        run(step)
        if backend.length[1] == 4:  # from then on
            driver.fill(backend._buffers.entries[0].cache + CAPACITY * row, 0x7FC00000, 16)

    monkeypatch.setattr(backend, "_run", broken)
    found = play(Batcher(backend, None, 8), [Plan(Request(tuple(p), max_new_tokens=9)) for p in PROMPTS], poison=False)
    assert [one.finish for one in found] == ["length", "error", "length"] and "not finite" in str(found[1].events[-1].error)
    assert [found[b].tokens for b in (0, 2)] == [expected[b].tokens for b in (0, 2)]
    assert 3 <= len(found[1].tokens) < 9 and found[1].tokens == expected[1].tokens[: len(found[1].tokens)]


def test_a_session_may_be_closed_and_a_stream_dropped_with_a_step_under_way(build: Build, tiny_bundle: Bundle) -> None:
    backend, cuda, _ = build(cuda=LateCuda())
    session = Session(tiny_bundle, backend)
    stream = session.stream(PROMPTS, 12, stop_tokens=())
    for _ in range(3 * 5):
        next(stream)
    assert backend.under_way == 1
    del stream
    first = session.tokens(0)
    assert len(first) == 3 + 5 and backend.length.tolist() == [7, 5, 17]
    stream = session.stream([[4], [5], [6]], 12, stop_tokens=())
    for _ in range(3 * 5):
        next(stream)
    session.close()
    assert cuda.closed and cuda.graphs == {} and backend.under_way == 0 and not cuda.queue
    with pytest.raises(UserError, match="the session is closed"):
        next(stream)


def test_a_launch_that_fails_is_one_line_and_the_session_goes_on(build: Build, tiny_bundle: Bundle) -> None:
    backend, _, fake = build(graph=False)
    session = Session(tiny_bundle, backend)
    whole = Session(tiny_bundle, plain(build)).generate(PROMPTS, 12, stop_tokens=())
    told: list[list[int]] = [[] for _ in PROMPTS]
    with pytest.raises(SessaError, match="refused a step"):
        for chunk in session.stream(PROMPTS, 12, stop_tokens=()):
            told[chunk.row].append(chunk.token)
            fake.failing = "no" if len(told[2]) == 5 else None
    fake.failing = None
    assert backend.under_way == 0
    for row, one in enumerate(session.generate([[], [], []], 12 - len(told[0]), stop_tokens=())):
        assert told[row] + one.tokens == whole[row].tokens


def test_steps_that_come_between_leave_what_was_picked(build: Build) -> None:
    """A prompt's chunk beside two sequences that decode, by a step of its own or of all."""
    for alignment in (16, 4096):
        backend, cuda, _ = build(cuda=LateCuda())
        other = plain(build)
        for each in (backend, other):
            each.row_alignment = alignment
        ids, two = np.array([[3], [4], [0]]), np.array([1, 1, 0], np.int32)
        for turn in range(3):
            want = [other.step_greedy(ids, two)]
            want.append(other.step_greedy(want[0][:, None], two))
            backend.begin_greedy(ids, two)
            assert backend.begin_next(two)
            logits = [each.step_row(2, np.arange(turn + 1)) for each in (backend, other)]
            np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
            assert not cuda.queue and not backend.begin_next(two), "its ids are not on the device any more"
            for tokens in want:
                np.testing.assert_array_equal(backend.end_greedy()[:2], tokens[:2])
            np.testing.assert_array_equal(backend.length, other.length)
            ids = want[1][:, None]


def test_a_prompt_may_be_begun_too(build: Build) -> None:
    backend, other = build()[0], plain(build)
    ids, new = np.random.default_rng(2).integers(0, 257, (BATCH, 19)), np.array([3, 19, 0], np.int32)
    backend.begin_greedy(ids, new)
    assert not backend.begin_next([1, 1, 0])
    np.testing.assert_array_equal(backend.end_greedy()[:2], other.step_greedy(ids, new)[:2])
    np.testing.assert_array_equal(backend.length, other.length)


def test_kernels_of_another_version_are_refused(tmp_path: Any) -> None:
    folder = fake_cuda.fake_cubins(tmp_path)
    table = folder / "cubins.json"
    text = table.read_text()
    table.write_text(text.replace(json.dumps([{}] * 15), json.dumps([{}] * 7)))
    with pytest.raises(UserError, match=r"decode_end is of another version: got \+0 parameters against decode_append .*; fix: sessa-deploy plugin build"):
        images(folder, 90)
    table.write_text(text.replace('"kernel": "decode_end"', '"kernel": "decode_argmax"'))  # as libraries had it before
    with pytest.raises(UserError, match=r"the decode kernels are of another version: got no decode_end in .*; fix: sessa-deploy plugin build$"):
        images(folder, 90)
    table.write_text(text.replace(json.dumps([{}] * 10), json.dumps([{}] * 11)))
    with pytest.raises(UserError, match=r"decode_draft is of another version: got \+4 parameters against decode_append .*; allowed: \+3; fix: "):
        images(folder, 90)
    table.write_text(text.replace('"kernel": "decode_draft"', '"kernel": "decode_guess"'))
    with pytest.raises(UserError, match=r"the decode kernels are of another version: got no decode_draft in .*; fix: sessa-deploy plugin build$"):
        images(folder, 90)

"""Prompt lookup in ONNX Runtime's CUDA sessions, ours and the plain graph's, over fakes: what verifies a draft, and that the host reads ids alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drafting import PROMPTS, close_to_plain
from fake_cuda import HostCuda, LateCuda

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.device.backend import DeviceBackend
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.device_cache import DeviceCache
from sessa_deploy.runtime.ort.engine import OrtCudaBackend
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.session import Session


@pytest.mark.parametrize("chunk", [3, 16])
def test_texts_are_those_of_plain_decoding(build: Callable[..., Any], all_logits_bundle: Bundle, tiny_bundle: Bundle, chunk: int, eager: None) -> None:
    """Of drafts longer than what a step takes, too."""
    backend, cuda, _ = build(all_logits=True, batch=1, capacity=64, chunk=chunk)
    drafting, plain = Session(all_logits_bundle, backend, lookup=5), Session(tiny_bundle, OrtBackend(tiny_bundle, threads=1))
    assert close_to_plain(drafting, plain, PROMPTS, 32) == 0
    assert drafting.drafts.drafted > 0
    params = SamplingParams(0.8, seed=3)
    for s in (drafting, plain):
        s.reset()
    assert drafting.generate([PROMPTS[3]], 40, params)[0].tokens == plain.generate([PROMPTS[3]], 40, params)[0].tokens
    assert cuda.replays > 20


def test_verifying_is_one_graph_of_each_number_of_rows_and_reads_no_logits(build: Callable[..., Any], all_logits_bundle: Bundle) -> None:
    backend, cuda, _ = build(all_logits=True, batch=1, capacity=40, chunk=16)
    reference = OrtBackend(all_logits_bundle, 1, 40, threads=1)
    rng, read = np.random.default_rng(0), cuda.read_back
    for turn in range(5):
        for tokens in (2, 5, 16):
            for each in (backend, reference):
                each.rewind(0, min(turn, int(each.length[0])))
            ids = rng.integers(0, 257, tokens)
            expected = reference.step_row_all(0, ids).argmax(axis=-1)
            np.testing.assert_array_equal(backend.step_row_picks(0, ids), expected)
            assert backend.length[0] == reference.length[0]
    assert cuda.read_back == read and len(cuda.graphs) == 3
    logits = backend.step_row_all(0, ids[:4])
    np.testing.assert_allclose(logits, reference.step_row_all(0, ids[:4]), rtol=1e-4, atol=1e-4)
    backend.rewind(0, 3)
    reference.rewind(0, 3)  # the device's own lengths follow
    assert backend.step_greedy(ids[None, :1], np.ones(1, np.int32)) == reference.step_greedy(ids[None, :1], np.ones(1, np.int32))


@pytest.mark.parametrize("cuda", [HostCuda, LateCuda])
@pytest.mark.parametrize("lookup", [1, 5, 7, 15])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "plain"])
def test_drafts_made_on_the_device_leave_texts_as_they_are(build: Callable[..., Any], all_logits_bundle: Bundle, tiny_bundle: Bundle, eager: None, itself: None,
                                                           cuda: type[HostCuda], lookup: int, graph: bool) -> None:
    backend, driver, _ = build(all_logits=True, batch=1, capacity=64, chunk=16, cuda=cuda(), graph=graph)
    drafting, plain = Session(all_logits_bundle, backend, lookup=lookup), Session(tiny_bundle, OrtBackend(tiny_bundle, threads=1))
    assert backend.draft_rows == tuple(sorted({min(lookup + 1, 8), lookup + 1}))
    steps = 0
    for new in (20, 48):
        assert close_to_plain(drafting, plain, PROMPTS, new) == 0
        steps += drafting.drafts.steps
    made = [(step.tokens, slot) for step, slot, feed in backend._graphs if feed == "drafted"]
    assert drafting.drafts.accepted > 0 and len(made) == len(set(made)) and {rows for rows, _ in made} <= {1, *backend.draft_rows} and bool(made) == graph
    for prompt in PROMPTS[:3]:
        for each in (drafting, plain):
            each.reset()
        for turn in range(3):
            params = SamplingParams(0.8, seed=3) if turn == 1 else SamplingParams()
            assert drafting.generate([prompt], 7, params)[0].tokens == plain.generate([prompt], 7, params)[0].tokens
    read = driver.read_back
    drafting.generate([[5]], 2)
    assert driver.read_back - read <= 2 * 4 * 257, "the host reads a prompt's logits and no others"


def drafting_steps(backend: OrtCudaBackend, text: list[int], steps: int, plain: int = 0) -> list[int]:
    """A text, after so many steps behind all but its last token, each begun before the one before it has ended; every `plain`-th has no draft."""
    one = np.ones(1, np.int32)
    backend.begin_greedy(np.array([text[-1:]]), one)
    backend.tell(text, 0)
    found = list(text)
    for step in range(steps):
        begun = backend.begin_next(one) if plain and step % plain == 0 else backend.begin_drafted(backend.draft_rows[0])
        found += backend.end_drafted()[0]
        if not begun:
            return found
    return found


@pytest.mark.parametrize("cuda", [HostCuda, LateCuda])
@pytest.mark.parametrize("plain", [0, 1, 2, 3])
def test_steps_of_either_kind_stand_behind_either(build: Callable[..., Any], all_logits_bundle: Bundle, itself: None, cuda: type[HostCuda], plain: int) -> None:
    backend, driver, _ = build(all_logits=True, batch=1, capacity=60, chunk=16, cuda=cuda())
    reference = OrtBackend(all_logits_bundle, 1, 60, threads=1)
    backend.expect_rows(4)
    for start in (1, 5, 12):
        backend.reset()
        reference.reset()
        text = (PROMPTS[3] * 2)[:start]
        if start > 1:
            backend.step(np.array([text[:-1]]), np.array([start - 1]))
        sent = driver.sent
        found = drafting_steps(backend, text, 12, plain)
        assert driver.sent - sent <= 12, "ids and lengths, the conversation, and new_length where it changes"
        for at in range(len(found) - 1):
            expected = int(reference.step_greedy(np.array([found[at : at + 1]]), np.ones(1, np.int32))[0])
            assert at + 1 < start or expected == found[at + 1], at
        assert backend.length[0] == len(found) - 1
        cached, wanted = backend.cached(0), reference.cached(0)
        for name in cached:
            np.testing.assert_allclose(cached[name], wanted[name][: len(found) - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cuda", [HostCuda, LateCuda])
def test_poison_spares_the_rows_of_steps_that_were_begun(build: Callable[..., Any], all_logits_bundle: Bundle, itself: None, cuda: type[HostCuda]) -> None:
    found = []
    for poisoned in (False, True):
        backend, _, _ = build(all_logits=True, batch=1, capacity=60, chunk=16, cuda=cuda())
        backend.expect_rows(4)
        text = [1, 2, 3, 1, 2, 3, 1, 2, 3]
        backend.step(np.array([text[:-1]]), np.array([len(text) - 1]))
        backend.begin_greedy(np.array([text[-1:]]), np.ones(1, np.int32))
        backend.tell(text, 0)
        for _ in range(8):
            backend.begin_drafted(4)
            if poisoned:
                backend.poison()
            text += backend.end_drafted()[0]
        found.append(text)
    assert found[0] == found[1]


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize("plain", [0, 1, 2])
def test_the_next_step_waits_for_those_that_nobody_waited_for(build: Callable[..., Any], all_logits_bundle: Bundle, itself: None, interrupted: bool,
                                                             plain: int) -> None:
    cuda = LateCuda()
    backend, _, _ = build(all_logits=True, batch=1, capacity=60, chunk=16, cuda=cuda)
    reference = OrtBackend(all_logits_bundle, 1, 60, threads=1)
    backend.expect_rows(4)
    text = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    backend.step(np.array([text[:-1]]), np.array([len(text) - 1]))
    found = drafting_steps(backend, text, 5, plain)
    assert cuda.queue and backend.under_way, "not run yet"
    if interrupted:
        cuda.interrupts = 1
        with pytest.raises(KeyboardInterrupt):
            backend.end_drafted()
    else:
        backend.call_off()
    assert not backend.under_way
    put, backend._buffers.put = backend._buffers.put, lambda *given: put(*given) if not cuda.queue else pytest.fail("it reads the host's memory still")
    reference.step(np.array([found[:-1]]), np.array([len(found) - 1]))
    other = np.array([9, 8, 7])
    np.testing.assert_array_equal(backend.step_row_picks(0, other), reference.step_row_picks(0, other))
    np.testing.assert_allclose(backend.cached(0)["past.0.k_f"], reference.cached(0)["past.0.k_f"], rtol=1e-4, atol=1e-4)
    assert backend._flying == 0


def test_a_launch_that_fails_leaves_nothing_behind(build: Callable[..., Any], all_logits_bundle: Bundle, itself: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _, _ = build(all_logits=True, batch=1, capacity=60, chunk=16)
    backend.expect_rows(4)
    expected = drafting_steps(backend, [1, 2, 1, 2, 1], 3)
    backend.reset()
    launch = backend._launch

    def fails(step: Any, slot: int, feed: str) -> None:
        if feed == "drafted":
            raise KeyboardInterrupt
        launch(step, slot, feed)

    monkeypatch.setattr(backend, "_launch", fails)
    with pytest.raises(KeyboardInterrupt):
        drafting_steps(backend, [1, 2, 1, 2, 1], 3)
    assert not backend.begin_next(np.ones(1, np.int32)), "what the device holds is not known"
    monkeypatch.undo()
    monkeypatch.setattr(DeviceBackend, "drafting_precisions", ("fp32",))
    backend.reset()
    assert drafting_steps(backend, [1, 2, 1, 2, 1], 3) == expected


@pytest.mark.parametrize("given", [{"precision": "fp32"}, {"batch": 2}, {"all_logits": False}], ids=["fp32", "batch", "last"])
def test_the_device_makes_no_drafts_where_they_cannot_be_worth_it(build: Callable[..., Any], given: dict[str, Any]) -> None:
    backend, _, _ = build(**{"all_logits": True, "batch": 1, **given})
    cost = backend.draft_cost
    backend.expect_rows(8)
    assert backend.draft_rows == () and backend.draft_cost == cost
    fp16, _, _ = build("fp16", all_logits=True, batch=1)
    fp16.expect_rows(8)
    assert fp16.draft_rows == (8,) and sum(fp16.draft_cost) < sum(cost)


@pytest.mark.parametrize("precisions", [(), ("fp32",)], ids=["host", "device"])
def test_a_session_that_is_closed_in_the_middle_says_so(build: Callable[..., Any], all_logits_bundle: Bundle, eager: None, precisions: tuple[str, ...],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceBackend, "drafting_precisions", precisions)
    said = set()
    for shown in range(1, 12):
        backend, _, _ = build(all_logits=True, batch=1, capacity=64, chunk=16)
        backend.draft_cost = (-0.5, -0.02)
        session = Session(all_logits_bundle, backend, lookup=5)
        stream = session.stream([PROMPTS[3]], 40, stop_tokens=())
        for _ in range(shown):
            next(stream)
        session.close()
        with pytest.raises(UserError) as caught:
            list(stream)
        said.add(str(caught.value))
    assert all("the session is closed" in text for text in said)


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_a_token_behind_logits_that_are_not_finite(build: Callable[..., Any], all_logits_bundle: Bundle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "ours":
        backend, cuda, _ = build(all_logits=True, batch=1, capacity=40, chunk=16, graph=False)
        run = backend._run

        def broken(step: Any) -> None:
            run(step)
            cuda.fill(backend._buffers.logits + 4 * 257, 0x7FC00000, 257)  # behind the second of them

        monkeypatch.setattr(backend, "_run", broken)
    else:
        backend = OrtBackend(all_logits_bundle, 1, 40, threads=1)
        backend._host, backend._device = None, DeviceCache(backend.config, 1, 40, "fp32", backend.session, "cpu")
        every = backend._forward_all
        monkeypatch.setattr(backend, "_forward_all", lambda ids, new: np.where(np.arange(ids.shape[1])[None, :, None] == 1, np.nan, every(ids, new)))
    assert [token < 0 for token in backend.step_row_picks(0, np.array([1, 2, 3, 4]))] == [False, True, False, False] and backend.length[0] == 4

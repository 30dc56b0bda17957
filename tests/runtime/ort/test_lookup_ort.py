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
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.device_cache import DeviceCache
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


def test_a_step_that_is_begun_runs_at_once_and_one_that_is_called_off_spoils_nothing(build: Callable[..., Any], all_logits_bundle: Bundle) -> None:
    backend, cuda, _ = build(all_logits=True, batch=1, capacity=40, chunk=16)
    reference = OrtBackend(all_logits_bundle, 1, 40, threads=1)
    ids, other = np.array([5, 6, 7]), np.array([9, 8, 7])
    for _ in range(3):  # until it is replayed
        backend.step_row_picks(0, ids)
        backend.rewind(0, 0)
    replays, read = cuda.replays, cuda.read_back
    backend.begin_row_picks(0, ids)
    assert cuda.replays == replays + 1 and backend.length[0] == 0
    np.testing.assert_array_equal(backend.end_row_picks(), reference.step_row_picks(0, ids))
    assert (cuda.replays, cuda.read_back, backend.length[0]) == (replays + 1, read, 3)
    for follows in (backend.step_row_picks, lambda row, fed: backend.step_row_all(row, fed).argmax(axis=-1)):
        backend.begin_row_picks(0, ids)
        backend.call_off()
        np.testing.assert_array_equal(follows(0, other), reference.step_row_picks(0, other))
    one, new = np.array([[4]]), np.ones(1, np.int32)
    for called_off in (False, True):
        backend.begin_greedy(one, new)
        assert backend.begin_next(new)
        if called_off:
            backend.begin_row_picks(0, ids)  # behind two steps that ran for nothing
            np.testing.assert_array_equal(backend.end_row_picks(), reference.step_row_picks(0, ids))
        else:
            first = reference.step_greedy(one, new)
            assert (backend.end_greedy(), backend.end_greedy()) == (first, reference.step_greedy(first[None], new))
    assert backend.length[0] == reference.length[0]


@pytest.mark.parametrize("cuda", [HostCuda, LateCuda])
def test_poison_spares_the_rows_of_a_step_that_was_begun(build: Callable[..., Any], all_logits_bundle: Bundle, cuda: type[HostCuda]) -> None:
    backend, _, _ = build(all_logits=True, batch=1, capacity=40, chunk=16, cuda=cuda())
    reference = OrtBackend(all_logits_bundle, 1, 40, threads=1)
    ids, one, new = np.array([5, 6, 7]), np.array([[4]]), np.ones(1, np.int32)
    backend.begin_row_picks(0, ids)
    backend.poison()
    np.testing.assert_array_equal(backend.end_row_picks(), reference.step_row_picks(0, ids))
    np.testing.assert_array_equal(backend.step_greedy(one, new), reference.step_greedy(one, new))


@pytest.mark.parametrize("interrupted", [True, False])
def test_the_next_step_waits_for_one_that_nobody_waited_for(build: Callable[..., Any], all_logits_bundle: Bundle, interrupted: bool) -> None:
    cuda = LateCuda()
    backend, _, _ = build(all_logits=True, batch=1, capacity=40, chunk=16, cuda=cuda)
    reference = OrtBackend(all_logits_bundle, 1, 40, threads=1)
    backend.begin_row_picks(0, np.array([5, 6, 7]))
    assert cuda.queue, "not run yet"
    if interrupted:
        cuda.interrupts = 1
        with pytest.raises(KeyboardInterrupt):
            backend.end_row_picks()
    else:
        backend.call_off()
    put, backend._buffers.put = backend._buffers.put, lambda *given: put(*given) if not cuda.queue else pytest.fail("it reads the host's memory still")
    other = np.array([9, 8, 7])
    np.testing.assert_array_equal(backend.step_row_picks(0, other), reference.step_row_picks(0, other))
    np.testing.assert_allclose(backend.cached(0)["past.0.k_f"], reference.cached(0)["past.0.k_f"], rtol=1e-4, atol=1e-4)
    assert backend._flying == 0


def test_a_session_that_is_closed_in_the_middle_says_so(build: Callable[..., Any], all_logits_bundle: Bundle, eager: None) -> None:
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

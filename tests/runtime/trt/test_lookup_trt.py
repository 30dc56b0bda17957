"""Prompt lookup on the TensorRT backend, over fakes of tensorrt and the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_trt
from drafting import PROMPTS, close_to_plain
from test_trt import build  # noqa: F401 - a fixture

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.device.backend import DeviceBackend
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.trt import api as trt_api

VERSIONS = pytest.mark.parametrize("build", ["8.6.0", "10.9.0"], indirect=True)


@VERSIONS
@pytest.mark.parametrize("itself", [True, False], ids=["device", "host"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "refused"])
def test_texts_are_those_of_plain_decoding(build: Callable[..., Any], tiny_bundle: Bundle, eager: None, itself: bool, given: bool,  # noqa: F811
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of few rows are CUDA graphs, each size of a context of its own where TensorRT lets contexts share a profile; 8.6 has one size, for all of them."""
    monkeypatch.setattr(DeviceBackend, "drafting_precisions", ("fp32",) if itself else ())
    backend, cuda, bundle = build(all_logits=True, batch=1)
    if not given:

        def refuse(*given: Any) -> None:
            raise SessaError("TensorRT refused optimisation profile 2")

        monkeypatch.setattr(trt_api, "context", refuse)
    old = backend._trt.__version__ == "8.6.0"
    drafting, plain = Session(bundle, backend, lookup=5), Session(tiny_bundle, OrtBackend(tiny_bundle, threads=1))
    assert backend.draft_rows == ((6,) if itself and given else ())
    assert close_to_plain(drafting, plain, PROMPTS[:5], 28) == 0
    assert (drafting.drafts.drafted > 0) == given, "a step that is not recorded takes many times as long"
    for each in (drafting, plain):
        each.reset()
    params = SamplingParams(0.8, seed=3)
    assert drafting.generate([PROMPTS[3]], 30, params)[0].tokens == plain.generate([PROMPTS[3]], 30, params)[0].tokens
    recorded = {step.tokens for step, *_ in backend._graphs}
    assert recorded == {1} if not given else recorded == {1, 6} if old else recorded > {1}
    made = {rows for rows, context in backend._few_rows.items() if context is not None}
    assert made >= recorded - {1} and (not old or made == recorded - {1}) and bool(made) == given
    read = cuda.read_back
    found = backend.step_row_picks(0, np.array([1, 2, 3]))
    assert cuda.read_back == read and len(found) == 3
    backend.close()
    assert cuda.closed and cuda.graphs == {}


@pytest.mark.parametrize("build", ["8.6.0"], indirect=True)
@pytest.mark.parametrize("lookup", [1, 5, 15])
def test_steps_of_fewer_rows_are_computed_over_as_many_as_are_recorded(build: Callable[..., Any], all_logits_bundle: Bundle, lookup: int) -> None:  # noqa: F811
    """Which changes neither what comes of them nor the cache; and drafts are never longer."""
    backend, _, bundle = build(all_logits=True, batch=1)
    session = Session(bundle, backend, lookup=lookup)
    assert backend.padded_rows == backend.most_rows == min(lookup + 1, 8)
    drafter = session._drafter(session._slots[0])
    assert drafter.most == min(lookup, 7)
    reference, rng = OrtBackend(all_logits_bundle, 1, threads=1), np.random.default_rng(0)
    for tokens in (1, 2, 5, 8, 3):
        ids = rng.integers(0, 257, tokens)
        np.testing.assert_array_equal(backend.step_row_picks(0, ids), reference.step_row_picks(0, ids))
        np.testing.assert_allclose(backend.step_row_all(0, ids), reference.step_row_all(0, ids), rtol=1e-4, atol=1e-4)
        assert backend.length[0] == reference.length[0]
    cached, expected = backend.cached(0), reference.cached(0)
    for name in cached:
        np.testing.assert_allclose(cached[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", ["8.6.0"], indirect=True)
def test_an_engine_of_before_has_no_profile_for_them_and_drafts_nothing(build: Callable[..., Any], eager: None,  # noqa: F811
                                                                         capfd: pytest.CaptureFixture[str]) -> None:
    backend, _, bundle = build(all_logits=True, batch=1)
    backend.info.profiles.pop("rows")
    ahead, begin = [], backend.begin_next
    backend.begin_next = lambda new: (ahead.append(begin(new)), ahead[-1])[1]
    counts = []
    for lookup in (0, 5):
        session = Session(bundle, backend, lookup=lookup)
        session.reset()
        session.generate([PROMPTS[3]], 30, stop_tokens=())
        counts.append(sum(ahead))
        ahead.clear()
    assert session.drafts.drafted == 0 and session.drafts.steps == 29 and backend.draft_rows == ()
    assert counts[0] == counts[1] > 20, "and looks ahead as it does without"
    assert "drafts nothing" in capfd.readouterr().err


@pytest.mark.parametrize("build", ["8.6.0"], indirect=True)
@pytest.mark.parametrize("lookups", [(3, 7), (7, 3), (15, 1, 15)])
def test_one_session_after_another_on_one_backend(build: Callable[..., Any], tiny_bundle: Bundle, eager: None, itself: None,  # noqa: F811
                                                  lookups: tuple[int, ...]) -> None:
    """The first decides how many rows are recorded; none asks 8.6 for a second context, or drafts more than it may."""
    backend, _, bundle = build(all_logits=True, batch=1)
    plain = Session(tiny_bundle, OrtBackend(tiny_bundle, threads=1))
    for lookup in lookups:
        session = Session(bundle, backend, lookup=lookup)
        assert close_to_plain(session, plain, PROMPTS[:4], 24) == 0
        assert session.drafts.drafted <= lookup * session.drafts.steps
        assert backend.padded_rows == min(lookups[0] + 1, 8) and set(backend._few_rows) == {backend.padded_rows}


@VERSIONS
@pytest.mark.parametrize("chunk", [4, 8])
def test_steps_have_no_more_rows_than_a_prompt_may(build: Callable[..., Any], itself: None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(test_trt, "CHUNK", chunk)
    backend, _, bundle = build(all_logits=True, batch=1)
    session = Session(bundle, backend, lookup=15)
    assert backend.draft_rows == (chunk,) and session.generate([PROMPTS[3]], 20, stop_tokens=())[0].finish == "length"


@pytest.mark.parametrize(("build", "rows"), [("8.6.0", (8,)), ("10.9.0", (8, 16))], indirect=["build"])
def test_each_size_is_asked_for_before_the_first_step(build: Callable[..., Any], itself: None, rows: tuple[int, ...],  # noqa: F811
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_trt, "CHUNK", 16)
    backend, _, bundle = build(all_logits=True, batch=1)
    Session(bundle, backend, lookup=15)
    assert backend.draft_rows == rows and set(backend._few_rows) == set(rows) and backend.padded_rows == (8 if rows == (8,) else 0)
    run, seen = backend._run, []
    monkeypatch.setattr(backend, "_run", lambda step: (seen.append(step.tokens), run(step)))
    backend.step_greedy(np.array([[5]]), np.ones(1, np.int32))
    assert seen == [1], "a plain step has one row still"


@VERSIONS
@pytest.mark.parametrize("precisions", [(), ("fp32",)], ids=["host", "device"])
def test_another_thread_may_make_the_session(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, precisions: tuple[str, ...]) -> None:  # noqa: F811
    monkeypatch.setattr(DeviceBackend, "drafting_precisions", precisions)
    backend, cuda, bundle = build(all_logits=True, batch=1)
    inside, wait = [], cuda.wait

    def entered() -> None:
        assert inside, "no context in this thread"
        wait()

    monkeypatch.setattr(cuda, "enter", lambda: inside.append(1))
    monkeypatch.setattr(cuda, "wait", entered)
    Session(bundle, backend, lookup=5)


@pytest.mark.parametrize("build", ["8.6.0"], indirect=True)
@pytest.mark.parametrize("left", range(1, 9))
def test_padded_rows_at_the_end_of_the_cache(build: Callable[..., Any], all_logits_bundle: Bundle, left: int) -> None:  # noqa: F811
    backend, _, bundle = build(all_logits=True, batch=1)
    reference, rng = OrtBackend(all_logits_bundle, 1, backend.capacity, threads=1), np.random.default_rng(left)
    Session(bundle, backend, lookup=7)
    first, ids = rng.integers(0, 257, backend.capacity - left), rng.integers(0, 257, left)
    for each in (backend, reference):
        each.step(first[None], np.array([len(first)]))
    np.testing.assert_array_equal(backend.step_row_picks(0, ids), reference.step_row_picks(0, ids))
    cached, expected = backend.cached(0), reference.cached(0)
    for name in cached:
        np.testing.assert_allclose(cached[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", ["10.9.0"], indirect=True)
def test_an_engine_without_all_logits_is_refused(build: Callable[..., Any]) -> None:  # noqa: F811
    backend, _, bundle = build(batch=1)
    with pytest.raises(UserError, match=r"--all-logits.*build its engine again"):
        Session(bundle, backend, lookup=4)

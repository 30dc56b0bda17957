"""One sequence alone (`step_row`, `step_row_all`), and a cache copied to another (`copy_row`), over poisoned caches."""

from __future__ import annotations

import numpy as np
import pytest
from numpy_model import NumpyBackend

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.device_cache import DeviceCache

BEFORE = [[1, 2, 3], [7], list(range(40, 53)), [200, 100]]


@pytest.fixture(params=["numpy", "views", "bound", "engine", "views-all", "bound-all", "engine-all"])
def backend(request, bundles, tiny, build):
    """Four sequences that hold BEFORE."""
    kind, _, every = request.param.partition("-")
    if kind == "numpy":
        made = NumpyBackend(tiny, 4, 40)
    elif kind == "engine":
        made = build(all_logits=bool(every), batch=4, capacity=40)[0]
    else:
        bundle = bundles("fp32", bool(every))
        made = OrtBackend(bundle, 4, 40, threads=1)
        if kind == "bound":  # as on a GPU, in host memory
            made._host, made._device = None, DeviceCache(bundle.config, 4, 40, "fp32", made.session, "cpu")
    ids, new = np.zeros((4, 13), np.int64), np.array([len(p) for p in BEFORE])
    for row, prompt in enumerate(BEFORE):
        ids[row, : len(prompt)] = prompt
    made.step(ids, new)
    made.poison()
    return made


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_one_sequence_steps_alone(backend, tiny):
    held = [backend.cached(row) for row in (0, 1, 3)]
    logits = backend.step_row(2, np.array([9, 8, 7], np.int32))
    assert logits.shape == (257,) and logits.dtype == np.float32 and backend.length.tolist() == [3, 1, 16, 2]
    close(logits, tiny.logits([*BEFORE[2], 9, 8, 7])[-1])
    backend.poison()
    close(backend.step_row_all(2, np.array([6, 5])), tiny.logits([*BEFORE[2], 9, 8, 7, 6, 5])[-2:])
    assert backend.length.tolist() == [3, 1, 18, 2]
    for before, row in zip(held, (0, 1, 3), strict=True):
        for name, values in backend.cached(row).items():
            np.testing.assert_array_equal(values, before[name])


def test_a_host_cache_moves_the_rows_of_that_sequence_alone(tiny_bundle):
    made = OrtBackend(tiny_bundle, 4, 40, threads=1)
    made.step(np.ones((4, 3), int), np.full(4, 3))
    before = made.bytes_moved
    made.step_row(1, np.ones(5, int))
    assert made.bytes_moved - before == 5 * made._host.row_bytes
    made.copy_row(1, 3, 6)
    assert made.bytes_moved - before == 11 * made._host.row_bytes


@pytest.mark.parametrize("all_logits", [False, True])
def test_on_a_device_one_sequence_is_computed_and_appended_where_it_lies(build, tiny, all_logits):
    """Batch 1, that sequence's own cache addresses, more tokens a step than of all together; the captured decode step goes on around it."""
    made, cuda, fake = build(all_logits=all_logits, batch=4, capacity=40, chunk=2)
    (session,), ids, new = fake.sessions, np.arange(4)[:, None], np.ones(4, np.int64)
    for _ in range(3):
        made.step_greedy(ids, new)
    before = made.bytes_moved
    made.poison()
    prompt = np.arange(20, 40)
    logits = made.step_row(2, prompt)
    close(logits, tiny.logits([2, 2, 2, *prompt])[-1])
    assert [run["input_ids"][1] for run in session.runs[-3:]] == [[1, 8], [1, 8], [1, 4]]
    for entry in made._buffers.entries:
        assert session.runs[-1][entry.past] == (entry.cache + 2 * 40 * entry.row, [1, 40, *entry.shape])
    assert made.bytes_moved - before == 20 * made._buffers.row_bytes and made.length.tolist() == [3, 3, 23, 3]
    close(made.step_row_all(2, prompt[:3]), tiny.logits([2, 2, 2, *prompt, *prompt[:3]])[-3:])
    picked, runs = made.step_greedy(ids, new), len(session.runs)
    for row, tokens in enumerate([[0] * 4, [1] * 4, [2, 2, 2, *prompt, *prompt[:3], 2], [3] * 4]):
        assert picked[row] == tiny.logits(tokens)[-1].argmax()
    assert cuda.replays == 2 and len(session.runs) == runs, "replayed, not run again"


def test_a_copied_sequence_goes_on_by_itself(backend, tiny):
    backend.copy_row(2, 1, 9)
    backend.poison()
    assert backend.length.tolist() == [3, 9, 13, 2]
    for name, values in backend.cached(1).items():
        np.testing.assert_array_equal(values, backend.cached(2)[name][:9])
    close(backend.step_row(1, np.array([5, 6])), tiny.logits([*BEFORE[2][:9], 5, 6])[-1])
    close(backend.step_row(2, np.array([5])), tiny.logits([*BEFORE[2], 5])[-1])  # the source is as it was
    backend.copy_row(2, 2, 4)
    backend.copy_row(2, 0, 0)
    assert backend.length.tolist() == [0, 11, 4, 2] and backend.copies_rows
    close(backend.step_row(2, np.array([5])), tiny.logits([*BEFORE[2][:4], 5])[-1])
    close(backend.step_row(0, np.array([5])), tiny.logits([5])[-1])


def test_a_sequence_that_rests_outlives_what_is_poisoned(backend, tiny):
    """It costs a step nothing, for its length is 0 there, and its rows count all the same."""
    moved = backend.bytes_moved
    backend.copy_row(2, 1, 9)
    if not isinstance(backend, NumpyBackend):  # which counts nothing
        assert backend.bytes_moved - moved == 9 * sum(x.nbytes for x in backend.cached(2).values()) // 13
    backend.rest(2)
    backend.poison()
    backend.step_row(0, np.array([5]))
    backend.poison()
    backend.wake(2, 13)
    close(backend.step_row(2, np.array([5])), tiny.logits([*BEFORE[2], 5])[-1])


@pytest.mark.parametrize("call", [
    lambda b: b.step_row(4, np.ones(1, int)), lambda b: b.step_row(True, np.ones(1, int)), lambda b: b.step_row(0, np.ones((1, 1), int)),
    lambda b: b.step_row(0, np.ones(0, int)), lambda b: b.step_row(0, np.ones(1)), lambda b: b.step_row(0, np.array([257])),
    lambda b: b.step_row_all(0, np.array([3, -1])), lambda b: b.step_row(2, np.ones(28, int)), lambda b: b.step_row_all(2, np.ones(28, int)),
    lambda b: b.copy_row(0, 1, 4), lambda b: b.copy_row(0, 1, -1), lambda b: b.copy_row(0, 4, 1), lambda b: b.copy_row(-1, 0, 1),
    lambda b: b.copy_row(0, 1, 1.0),
])
def test_what_is_wrong_is_refused_and_changes_nothing(tiny, call):
    made = NumpyBackend(tiny, 4, 40)
    for row, prompt in enumerate(BEFORE):
        made.step_row(row, np.array(prompt))
    made.calls.clear()
    with pytest.raises(UserError) as caught:
        call(made)
    assert "\n" not in str(caught.value) and made.length.tolist() == [3, 1, 13, 2] and made.calls == []


def test_a_step_over_every_token_that_fails_changes_nothing(tiny, monkeypatch):
    made = NumpyBackend(tiny, 2)
    made.step_row(1, np.ones(3, int))
    run, calls = made._forward_row, []
    monkeypatch.setattr(made, "_forward_row", lambda *a: run(*a) if calls.append(1) or len(calls) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.step_row_all(1, np.ones(5, int))
    assert made.length.tolist() == [0, 3]

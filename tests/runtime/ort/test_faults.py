"""A session of ONNX Runtime with our kernels when something goes wrong at a bad moment: while it opens, in a step, in a capture, while it closes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_cuda import HostCuda, LateCuda
from fake_onnxruntime import BATCH, CAPACITY

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.ort import engine
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.engine import OrtCudaBackend

Build = Callable[..., tuple[OrtCudaBackend, HostCuda, Any]]
ONE = np.ones(BATCH, np.int32)


def fed(*tokens: int) -> np.ndarray:
    return np.array([[t + b for t in tokens] for b in range(BATCH)], np.int64)


class Full(HostCuda):
    """A GPU with memory for `left` allocations more; `error` for the next."""

    def __init__(self, left: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = left, error

    def allocate(self, size: int) -> int:
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().allocate(size)


@pytest.mark.parametrize("error", [SessaError("the CUDA driver refused cuMemAlloc_v2: out of memory"), KeyboardInterrupt()], ids=["full", "stop"])
@pytest.mark.parametrize("left", [0, 1, 9, 20])
def test_a_gpu_without_room_gets_back_what_was_taken(build: Build, left: int, error: BaseException) -> None:
    cuda = Full(left, error)
    with pytest.raises(type(error)) as caught:
        build(cuda=cuda)
    assert caught.value is error and cuda.closed


def test_whatever_fails_while_opening_gives_the_gpu_back(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise UserError("no binary of decode_append for this GPU")

    for change in ({"images": fail}, {"start": fail}, {"has_all_logits": fail}, {"Buffers": fail}):
        cuda = HostCuda()
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(engine, name, value)
            with pytest.raises(UserError, match="no binary"):
                build(cuda=cuda)
        assert cuda.closed, change


@pytest.mark.parametrize("graph", [True, False])
def test_nothing_on_the_host_is_overwritten_before_the_gpu_has_read_it(build: Build, bundles: Callable[..., Bundle], graph: bool) -> None:
    """Prompts in chunks, steps, sequences alone, a copy, a reset; and Ctrl-C while a step is under way, which may then still run."""
    cuda = LateCuda()
    late, _, _ = build(cuda=cuda, graph=graph)
    plain = OrtBackend(bundles("fp32"), batch=BATCH, capacity=CAPACITY, threads=1)

    def both(call: Callable[[Any], Any]) -> None:
        mine, theirs = call(late), call(plain)
        if theirs is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(late.length, plain.length)

    both(lambda b: b.step(np.arange(19 * BATCH).reshape(BATCH, 19), np.array([19, 12, 5], np.int32))[[0, 1, 2]])
    for token in range(5):

        def one(b: Any, token: int = token) -> Any:
            return b.step_greedy(fed(token), ONE)

        both(one)
    cuts: list[Callable[[Any], Any]] = [
        lambda b: b.step_greedy(fed(9), ONE), lambda b: b.step(fed(1, 2, 3, 4, 5, 6, 7, 8, 9), 9 * ONE), lambda b: b.step_row(1, np.arange(30, 39)),
    ]
    for cut in cuts:
        cuda.interrupts = 1
        before = late.length.copy()
        with pytest.raises(KeyboardInterrupt):
            cut(late)
        np.testing.assert_array_equal(late.length, before)
        both(lambda b: b.step_greedy(fed(200), ONE))
        both(lambda b: b.step_row(2, np.array([7, 8])))
    cuda.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        late.step_greedy(fed(11), ONE)
    for call in (lambda b: b.copy_row(0, 1, 9), lambda b: b.reset([2]), lambda b: b.step_greedy(fed(3), ONE), lambda b: b.step_greedy(fed(4), ONE)):
        both(call)
    for row in range(BATCH):
        for (name, mine), theirs in zip(late.cached(row).items(), plain.cached(row).values(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
    assert (cuda.replays > 0) == graph


def test_after_a_step_that_failed_the_gpu_is_told_the_lengths(build: Build, bundles: Callable[..., Bundle]) -> None:
    """Also where they are those again that the last good step left."""
    backend, _, fake = build()
    plain = OrtBackend(bundles("fp32"), batch=BATCH, capacity=CAPACITY, threads=1)
    for one in (backend, plain):
        one.step(np.ones((BATCH, 2), np.int64), 2 * ONE)
        one.rewind(0, 1)
    fake.failing = "no"
    with pytest.raises(SessaError):
        backend.step_greedy(fed(5), ONE)
    fake.failing = None
    for one in (backend, plain):
        one.copy_row(1, 0, 2)
    np.testing.assert_allclose(backend.step(fed(6), ONE), plain.step(fed(6), ONE), rtol=1e-5, atol=1e-5)


def test_ctrl_c_in_a_capture_leaves_no_half_graph(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cuda, _ = build()
    plain, _, _ = build(graph=False)
    for token in (1, 2):
        backend.step_greedy(fed(token), ONE)
        plain.step_greedy(fed(token), ONE)
    run, stops = backend._run, [KeyboardInterrupt()]

    def stop(step: Any) -> None:
        run(step)
        if stops:
            raise stops.pop()

    monkeypatch.setattr(backend, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        backend.step_greedy(fed(3), ONE)
    assert cuda.recording is None and cuda.graphs == {} and backend._graphs == {} and backend.length.tolist() == [2] * BATCH
    for token in (3, 4, 5):
        np.testing.assert_array_equal(backend.step_greedy(fed(token), ONE), plain.step_greedy(fed(token), ONE))
    assert len(cuda.graphs) == 1 and cuda.replays == 3


def test_a_session_is_closed_once_whatever_the_driver_says(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cuda, _ = build()

    def dead() -> None:
        raise SessaError("the CUDA driver refused cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (700)")

    monkeypatch.setattr(cuda, "wait", dead)
    with pytest.raises(SessaError, match="700"):
        backend.close()
    assert cuda.closed and backend.session is None
    backend.close()
    with pytest.raises(UserError, match="the session is closed"):
        backend.step_greedy(fed(1), ONE)


@pytest.mark.parametrize(("batch", "capacity", "chunk"), [(1, 1, 8), (3, 1, 1), (1, 5, 8), (2, 9, 1)])
def test_the_smallest_sizes(build: Build, bundles: Callable[..., Bundle], batch: int, capacity: int, chunk: int) -> None:
    """Room for one token; chunks larger than the capacity and of one token."""
    backend, _, _ = build(batch=batch, capacity=capacity, chunk=chunk)
    plain = OrtBackend(bundles("fp32"), batch=batch, capacity=capacity, threads=1)
    assert 1 <= backend.best_chunk <= min(capacity, chunk)
    for prompt in (capacity, max(1, capacity - 3)):
        ids = np.arange(batch * prompt).reshape(batch, prompt)
        for one in (backend, plain):
            one.reset()
        np.testing.assert_allclose(backend.step(ids, np.full(batch, prompt)), plain.step(ids, np.full(batch, prompt)), rtol=1e-5, atol=1e-5)
        for _ in range(capacity - prompt):
            np.testing.assert_array_equal(backend.step_greedy(ids[:, :1], np.ones(batch, int)), plain.step_greedy(ids[:, :1], np.ones(batch, int)))
        for one in (backend, plain):
            with pytest.raises(UserError, match="the context is full"):
                one.step_greedy(ids[:, :1], np.ones(batch, int))
        backend.poison()
        np.testing.assert_array_equal(backend.length, plain.length)

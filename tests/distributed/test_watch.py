"""The watch over a training's processes: it hears of failures, sees who has gone, and ends a process that waits for another one in vain."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from sessa_deploy.distributed import group, watch
from sessa_deploy.distributed.group import ALONE, Group, OtherFailed, joined
from sessa_deploy.distributed.watch import Failure, Watch
from sessa_deploy.errors import UserError


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setattr(watch, "_LOOK", 0.02)
    monkeypatch.setattr(watch, "_LAST_WORDS", 0.02)
    monkeypatch.setattr(watch, "GRACE", 0.05)
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    return store


@pytest.fixture
def watched(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watch]]:
    """Makes watches, which are closed before the test's end: one that lives on would end the tests."""
    made: list[Watch] = []

    def make(rank: int, peers: dict[int, int] | None = None) -> Watch:
        made.append(Watch(store, rank, peers or {}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which the watch would have ended this process."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def ended(codes: list[int], count: int = 1, seconds: float = 30.0) -> list[int]:
    """`codes` once there are so many, or after that long."""
    end = time.monotonic() + seconds
    while len(codes) < count and time.monotonic() < end:
        time.sleep(0.01)
    return codes


def test_the_first_failure_counts_and_ends_who_waits(
    watched: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, chief = ends(monkeypatch), watched(0)
    chief.post(Failure(3, 2, "out of memory"))
    chief.post(Failure(1, 1, "later"))
    assert chief.failure() == Failure(3, 2, "out of memory") == chief.await_failure(1.0)
    assert ended(codes) == [2] and capsys.readouterr().err == "error: out of memory\n"
    watched(1)
    assert ended(codes, 2) == [2, 2] and capsys.readouterr().err == ""  # process 0 alone speaks


def test_a_process_that_ends_by_itself_is_left_to_it(
    watched: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, chief = ends(monkeypatch), watched(0)
    chief.stand_back()
    chief.post(Failure(1, 2, "full disk"))
    assert ended(codes, seconds=0.3) == [] and capsys.readouterr().err == ""
    chief.leave()
    began = time.monotonic()
    watched(1).await_leaving(0, 60.0)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("gone", "here"), [(1, 0), (0, 1)])
def test_a_process_that_is_killed_is_missed(
    watched: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gone: int, here: int
) -> None:
    codes, child = ends(monkeypatch), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watched(here, {gone: child.pid})
    assert ended(codes, seconds=0.3) == []
    child.kill()  # not waited for: a zombie is gone too
    assert ended(codes) == [2]
    error = capsys.readouterr().err
    assert error.startswith(f"error: process {gone} of the run has gone") and error.count("\n") == 1 and "--resume" in error
    child.wait()


def test_a_group_of_one_does_everything_itself() -> None:
    assert ALONE.chief and not ALONE.many and ALONE.agree(15, 2.5) == (15, 2.5) and ALONE.on_chief(lambda: 7) == 7
    with joined() as found:
        assert found is ALONE
    assert group._told(UserError("bad", fix="mend it"), 2) == Failure(2, 2, "process 2: bad; fix: mend it")
    assert group._told(ValueError("a\nb"), 1) == Failure(1, 1, "process 1 failed: ValueError: a b")
    assert group._told(KeyboardInterrupt(), 0).code == 130 and OtherFailed(Failure(0, 3, "x")).exit_code == 3 and Group(1, 2).chief is False


def test_a_process_that_hangs_is_told_of_in_one_line(watched: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a collective has given up waiting and no process says what went wrong; where one does, that is told."""
    monkeypatch.setattr(group, "_OTHERS_SAY", 0.05)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    ends(monkeypatch)
    broken = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 7200000ms for recv operation to complete\nat 3")
    chief = watched(0)
    found = group._ended(chief, 0, broken)
    assert isinstance(found, UserError) and "waited for one another in vain" in str(found) and "--resume" in str(found) and "\n" not in str(found)
    assert chief.failure() == Failure(0, 2, str(found))
    other = watched(1)
    assert isinstance(group._ended(other, 1, broken), OtherFailed)


@pytest.mark.parametrize(("name", "value"), [("RANK", None), ("RANK", "x"), ("LOCAL_WORLD_SIZE", "-1")])
def test_an_environment_that_is_not_whole_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    for key, text in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", name: value}.items():
        monkeypatch.delenv(key, raising=False) if text is None else monkeypatch.setenv(key, text)
    with pytest.raises(UserError, match=rf"the environment's {name}.*torchrun"), joined():
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_still_waits_for_the_interpreter_when_a_process_leaves(
    watched: Callable[..., Watch], store: dist.Store, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Gloo's threads let go of tensors after a collective has ended, and the watch asks its store; with the interpreter gone either aborts the process."""
    for key, text in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, text)
    woken, wake = os.pipe()
    let_go: list[bytes] = []

    def carries() -> None:
        last = os.read(woken, 1)
        time.sleep(0.02)  # of a processor with other work
        let_go.append(last)

    carrier = threading.Thread(target=carries)
    made = watched(0)

    def rests(seconds: float) -> None:
        assert seconds >= 0.1
        carrier.join(60)  # on however slow a machine

    def ends_a_collective(*_: object) -> None:
        carrier.start()
        time.sleep(0.1)  # it waits in the read now
        sys.setswitchinterval(100)  # as one that the scheduler forgot: it has the lock only where the main thread waits
        os.write(wake, b"x")
        if fails:
            raise RuntimeError("the connection was closed")

    monkeypatch.setattr(group, "time", SimpleNamespace(sleep=rests))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", ends_a_collective)
    monkeypatch.setattr(group, "_watch", lambda *_: made)
    monkeypatch.setattr(group, "_ended", lambda watch, rank, error: error)
    monkeypatch.setattr(Watch, "close", closes := Mock(wraps=lambda: None))
    before = sys.getswitchinterval()
    try:
        with contextlib.suppress(RuntimeError), joined():
            pass
        assert let_go == [b"x"] and closes.call_count == 1
    finally:
        sys.setswitchinterval(before)
        monkeypatch.undo()
        carrier.join()
    made.close()
    assert not made._thread.is_alive()


def test_a_watch_whose_store_does_not_answer_is_left_behind(watched: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_STORE_ANSWERS", 0.05)
    made, asked, answer = watched(0), threading.Event(), threading.Event()
    monkeypatch.setattr(made, "failure", lambda: asked.set() or (answer.wait(60) and None))
    assert asked.wait(60)
    made.close()
    assert made._thread.is_alive()
    answer.set()
    made._thread.join(60)
    assert not made._thread.is_alive()

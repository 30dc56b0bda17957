"""Threads: no more than the cores this process may use, on every way in; fewer by default where a control group grants less time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sessa_deploy.errors import UserError
from sessa_deploy.runtime import environment
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.engines import open_backend
from sessa_deploy.runtime.environment import check_threads, cores, default_threads
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.session import open_session
from sessa_deploy.runtime.session import Session

WRONG: list[Any] = [0, -1, cores() + 1, 100_000, 10**30, 1.0, "1", True, float("nan"), np.float64(1)]


@pytest.mark.parametrize("threads", WRONG, ids=repr)
def test_too_many_and_too_few_are_refused(tiny_bundle: Bundle, threads: Any) -> None:
    for opened in (lambda: check_threads(threads), lambda: open_session(tiny_bundle, threads=threads), lambda: OrtBackend(tiny_bundle, threads=threads),
                   lambda: Session(tiny_bundle, "ort", threads=threads), *(lambda n=n: open_backend(tiny_bundle, n, threads=threads) for n in ("ort", "trt"))):
        with pytest.raises(UserError, match=rf"threads is out of range: got .*; allowed: an integer in 1\.\.{cores()}, the cores this process may use"):
            opened()


def test_what_is_allowed_follows_the_process_s_affinity(tiny_bundle: Bundle) -> None:
    assert cores() == len(os.sched_getaffinity(0)) and check_threads(None) is None and check_threads(np.int64(cores())) == cores()
    with Session(tiny_bundle, "ort", threads=cores()) as session:
        assert session.generate("x", 2)[0].tokens
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == default_threads() == 1
        with pytest.raises(UserError, match=r"allowed: an integer in 1\.\.1"):
            check_threads(2)
    finally:
        os.sched_setaffinity(0, before)


def test_a_control_group_s_quota_sets_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    (root / "a/b").mkdir(parents=True)
    own.write_text("12:cpu:/old\n0::/a/b\n")
    granted = environment._granted
    assert granted(root, own) is None and granted(root, tmp_path / "absent") is None
    (root / "a/b/cpu.max").write_text("max 100000\n")
    assert granted(root, own) is None
    (root / "a/cpu.max").write_text("150000 100000\n")  # the parent's holds for all below
    assert granted(root, own) == 2
    (root / "a/b/cpu.max").write_text("50000 100000\n")
    assert granted(root, own) == 1
    (root / "a/b/cpu.max").write_text("nonsense\n")
    assert granted(root, own) == 2
    (root / "cpu").mkdir()
    for quota, expected in (("-1", 2), ("100000", 1)):  # version 1
        (root / "cpu/cpu.cfs_quota_us").write_text(quota)
        (root / "cpu/cpu.cfs_period_us").write_text("100000")
        assert granted(root, own) == expected
    monkeypatch.setattr(environment, "_granted", lambda: 1)
    assert default_threads() == 1
    monkeypatch.setattr(environment, "_granted", lambda: None)
    assert default_threads() == cores()

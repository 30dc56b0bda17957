"""The script that checks an engine on a GPU, rehearsed on fakes: each step that one process can take says what a healthy engine gets, and what a sick one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_cuda import HostCuda

from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.engine import OrtCudaBackend

SCRIPTS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/engine_steps.py."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import engine_steps

    for name, value in (("FEW", (1, 2)), ("CAPACITY", 310), ("WARM", 3), ("TIMED", 12)):
        monkeypatch.setattr(engine_steps, name, value)
    yield engine_steps
    del sys.modules["engine_steps"]


def test_every_step_passes_on_a_healthy_engine(
    steps: ModuleType, build: Callable[..., Any], bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reference = OrtBackend(bundles("fp32"), batch=steps.BATCH, capacity=steps.CAPACITY, threads=1)
    np.savez(tmp_path / "fp32.npz", **steps.drive(reference))
    prompts = [[256, 5], [1], [9, 8, 7]]
    (tmp_path / "fp32.json").write_text(json.dumps({"prompts": prompts, "tokens": steps.greedy(reference, prompts, 12)}))
    opened: list[HostCuda] = []

    def start(args: argparse.Namespace, precision: str, **options: Any) -> OrtCudaBackend:
        backend, cuda, _ = build(precision, chunk=60, **{"batch": steps.BATCH, "capacity": steps.CAPACITY, **options})
        opened.append(cuda)
        return backend  # type: ignore[no-any-return]

    monkeypatch.setattr(steps.ENGINES["ort"], "open", start)
    args = argparse.Namespace(engine="ort", work=tmp_path, out=tmp_path, tokens=12, soak=30, began=0.0)
    for name in ("numbers", "rows", "behind", "text", "begin", "speed", "soak"):
        found = steps.WORK[name](args, "fp32")
        assert found["ok"], (name, found)
        json.dumps(found)
    assert all(cuda.closed for cuda in opened) and sum(cuda.replays for cuda in opened) > 50
    for name in steps.ENGINES["ort"].limits:
        kind, _, form = name.partition("-")
        assert kind in steps.WORK and (kind == "load" or form in steps.FORMS)

    numbers = dict(np.load(tmp_path / "fp32.npz"))
    assert steps.compared(args, "fp32", numbers)["error_over_allowed"] == 0.0
    numbers["1.past.1.s"][3] *= 1.001
    sick = steps.compared(args, "fp32", numbers)
    assert sick["error_over_allowed"] > 1 and sick["worst"].startswith("1.past.1.s")

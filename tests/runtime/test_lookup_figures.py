"""What `bench --lookup` says of drafts, on a clock that only a backend's steps move."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_lookup import SOURCE, WORDS, Context

from sessa_deploy.contract import Weights
from sessa_deploy.runtime import bench
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.session import Session


class Clocked(Context):
    """A second a step, of however many rows."""

    now = 0.0

    def _forward_all(self, ids: Any, new: Any) -> Any:
        self.now += 1.0
        return super()._forward_all(ids, new)


def test_tokens_a_second_with_drafts_and_without(tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "b", {"model.onnx": b"unused"}, WORDS, "fp32", {}, weights=Weights("int8"))
    backend = Clocked(WORDS, seed=2)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: backend.now))
    options = bench.BenchOptions(len(SOURCE), 40, steps=1, seconds=100.0, max_seconds=100.0, warmup=0.0, prefills=1)
    found = bench.measure(Session(bundle, backend, lookup=8), options, text=SOURCE)
    assert found["bundle"]["weights"] == {"format": "int8", "kept": []} and found["weight_bytes"]["ratio"] is None, "this backend makes them wide"
    found = found["lookup"]
    assert found["most"] == 8 and found["tokens"] % 40 == 0 and found["accepted"] > 0
    assert found["acceptance"] == found["accepted"] / found["drafted"] and found["tokens_per_step"] == found["tokens"] / found["steps"] > 1
    assert found["plain_tokens_per_second"] == pytest.approx(1.0)
    assert found["tokens_per_second"] == pytest.approx(found["tokens_per_step"]) and found["ratio"] == pytest.approx(found["tokens_per_step"])

"""The script that takes random models down the whole road, rehearsed on a CPU with one layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "trt_models.py"


def rehearse(folder: Path, *options: str) -> tuple[int, str, dict[str, dict[str, object]]]:
    """(exit code, what it printed, steps of the fp32 model)."""
    small = ["--sizes", "125M", "--precisions", "fp32", "--layers", "1", "--vocabulary", "64", "--max-context", "512", "--steps", "5", "--seconds", "0"]
    command = [sys.executable, str(SCRIPT), "--work", str(folder / "work"), "--out", str(folder), *small, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    return done.returncode, done.stdout + done.stderr, json.loads((folder / "125M-fp32.json").read_text())["steps"]


@pytest.mark.slow
def test_every_step_is_taken_and_told(tmp_path: Path) -> None:
    code, said, steps = rehearse(tmp_path, "--backend", "ort")
    assert code == 0, said
    assert list(steps) == ["export", "validate", "bench"] and all(s["code"] == 0 for s in steps.values())
    assert json.loads((tmp_path / "125M-fp32.parity.json").read_text())["passed"] is True
    assert json.loads((tmp_path / "125M-fp32.bench.json").read_text())


def test_a_step_that_fails_ends_its_model(tmp_path: Path) -> None:
    code, said, steps = rehearse(tmp_path, "--trt-python", "/nowhere/python")
    assert code == 1 and "FAILED" in said
    assert list(steps) == ["export", "build"] and steps["build"]["code"] == 127 and "/nowhere/python" in str(steps["build"]["said"])

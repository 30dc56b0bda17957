"""The comparison script, rehearsed on a CPU with a tiny model: peers that work have figures, peers that cannot have a row that says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPT = "import random_bundle; random_bundle.SIZES['1.1B'] = (32, 1, 2); import compare; compare.main()"
POINTS = ["decode", "short", "small", "batch", "ragged", "prefill", "large"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses a machine without a GPU")
def test_every_peer_has_a_row_whatever_is_missing(tmp_path):
    sizes = {"d-model": 16, "n-layers": 2, "n-heads": 2, "vocabulary": 40, "capacity": 64, "context": 24, "short": 8, "batch": 3, "batch-capacity": 40,
             "prompt": 20}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-c", SCRIPT, "--points", *POINTS, "--device", "cpu", "--precision", "fp32", "--peers", "eager", "graph", "trt", "ort",
               "ort-cuda", *options, "--warmup", "0", "--seconds", "0", "--steps", "3", "--prefills", "2", "--bandwidth", "10", "--limit", "100",
               "--ort-python", "/nowhere/python", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "compare.json").read_text())
    assert set(found["points"]) == set(POINTS)
    for name, rows in found["points"].items():
        assert rows["eager"]["p50_ms"] > 0 and rows["eager"]["count"] == (2 if name == "prefill" else 3)
        for peer, reason in (("graph", "a CUDA graph needs a GPU"), ("trt", "no bundle has an engine"), ("ort", "/nowhere/python"),
                             ("ort-cuda", "/nowhere/python")):
            assert reason in rows[peer]["error"]
    layer = 2 * 16 + (2 + 3 + 2 + 1) * 16 * 17 + 16 * 16 + 17
    weights, row = 2 * layer + 2 * 16 + 40 * 16 + 3 * 16, 2 * 4 * 16
    steps = found["points"]["ragged"]["eager"]["bytes_per_step"] / 4
    # every weight once, of the embedding a row a sequence, and every valid row, over a window of 16 steps
    assert steps == weights + row * (24 + 8 + 8 + 3 * 7.5)
    large = found["points"]["large"]["eager"]  # another model
    layer, row = 2 * 32 + (2 + 3 + 2 + 1) * 32 * 33 + 32 * 32 + 33, 4 * 32
    assert large["bytes_per_step"] / 4 == layer + 2 * 32 + 50304 * 32 + 32 + row * (24 + 19.5)
    assert (tmp_path / "compare.png").stat().st_size > 10_000

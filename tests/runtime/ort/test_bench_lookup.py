"""The script that times prompt lookup: what it draws texts from, and a rehearsal on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"


def test_every_module_is_in_this_python_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_lookup

    library = Path(sysconfig.get_paths()["stdlib"])
    assert min(len(bench_lookup.source(name, library)) for name in bench_lookup.FILES) > 2000, "a package's first file may hold next to nothing"


def test_a_module_may_be_a_file_or_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_lookup

    (tmp_path / "one.py").write_text("file")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "__init__.py").write_text("package")
    assert [bench_lookup.source(name, tmp_path) for name in ("one", "two")] == ["file", "package"]
    with pytest.raises(FileNotFoundError, match="three"):
        bench_lookup.source("three", tmp_path)


def test_it_says_what_drafts_bring_on_the_demo(tmp_path: Path) -> None:
    bundle, out = tmp_path / "demo", tmp_path / "found.json"
    command = [sys.executable, "-m", "sessa_deploy", "export", str(ROOT / "checkpoints" / "demo"), "--out", str(bundle), "--precision", "fp32", "--all-logits"]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    command = [sys.executable, str(BENCHMARKS / "bench_lookup.py"), str(bundle), "--backend", "ort", "--seconds", "0.01", "--new", "60",
               "--prompt-tokens", "100", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    [found] = json.loads(out.read_text())
    assert set(found["kinds"]) == {"code, greedy", "code, temperature 1", "noise"} and found["backend"] == "ort"
    for name, kind in found["kinds"].items():
        assert kind["texts"] == 1 and kind["wrong"] == 0 and kind["tokens"] == 59, name
    assert (done.returncode == 0) == ("WRONG" not in done.stdout), done.stdout
    assert "tokens a step" in done.stdout

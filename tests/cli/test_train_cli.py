"""`sessa-deploy train` as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import call

SMALL = ["--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--context", "16", "--batch-size", "2", "--device", "cpu", "--held-out", "0.3"]


@pytest.fixture
def text(text: Path) -> Path:
    (text / "x.log").write_text("noise " * 50)
    return text


def test_train_stop_and_resume(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert call("train", "--data", text, "--out", out, "--steps", 6, "--stop-at", 3, "--extensions", "txt", *SMALL) == 0
    first = capsys.readouterr()
    assert "bits per byte" in first.out and "xz -9" in first.out
    assert first.out.rstrip().splitlines()[-1] == f"next: sessa-deploy export {out / 'checkpoint'} --out {out / 'bundle'}"
    assert call("train", "--resume", "--out", out) == 0
    assert len((out / "log.csv").read_text().splitlines()) == 7
    assert call("inspect", out / "checkpoint") == 0


@pytest.mark.parametrize(("args", "words"), [
    (["--steps", "5"], "no --data"),
    (["--data", "NOWHERE"], "no such data"),
    (["--resume"], "no run to resume"),
    (["--resume", "--lr", "1", "--d-model", "8"], "a resumed run keeps its settings: got --d-model, --lr"),
    (["--data", "TEXT", "--n-heads", "3"], "a multiple of n_heads; fix: change --d-model or --n-heads"),
    (["--data", "TEXT", "--gamma-max", "1"], "gamma_max is out of range"),
    (["--data", "TEXT", "--tokenizer", "none.json"], "no tokenizer"),
    (["--data", "TEXT", "--device", "tpu9"], "no such device"),
])
def test_bad_input_is_one_line_and_exit_two(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    assert call("train", "--out", tmp_path / "run", *[str(text) if a == "TEXT" else a for a in args]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


@pytest.mark.parametrize("package", ["matplotlib", "torch"])
def test_a_package_that_is_missing_is_named_before_the_work(text: Path, tmp_path: Path, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None\nfrom sessa_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "--data", str(text), "--out", str(tmp_path / "run"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    assert f"needs the package {package}" in done.stderr and "pip install 'sessa-deploy[train]'" in done.stderr


def test_a_killed_run_leaves_a_whole_checkpoint(text: Path, tmp_path: Path) -> None:
    """SIGKILL while it saves after every step: what lies there loads, and the run resumes."""
    out = tmp_path / "run"
    command = [sys.executable, "-c", "from sessa_deploy.cli import main; main()", "train", "--data", str(text), "--out", str(out), "--steps", "100000",
               "--save-every", "1", *SMALL]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(1500):
            if (out / "checkpoint" / "config.json").exists() and (out / "log.csv").exists() and (out / "log.csv").read_text().count("\n") > 15:
                break
            try:
                child.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        assert child.poll() is None, "it ended by itself"
    finally:
        child.kill()
        child.wait()
    assert call("inspect", out / "checkpoint") == 0
    assert call("train", "--resume", "--out", out, "--stop-at", "1") == 0

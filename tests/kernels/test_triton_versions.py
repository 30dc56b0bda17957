"""Triton 3.6 and 3.7 are supported, each with its own launch; any other is refused in one line before something of it is used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sessa_deploy.errors import UserError
from sessa_deploy.kernels import launch
from sessa_deploy.plugins import lower

triton = pytest.importorskip("triton")
FIX = "pip install 'triton>=3.6,<3.8'"


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    launch.triton_version.cache_clear()
    yield
    launch.triton_version.cache_clear()


@pytest.mark.parametrize(("version", "found"), [("3.6.0", (3, 6)), ("3.7.1", (3, 7)), ("3.7.0+git4bf8d2ae", (3, 7))])
def test_supported_versions(version: str, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert launch.triton_version() == found


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.8.0", "3.60.0", "4.6.0", "unknown"])
def test_another_version_is_refused_in_one_line(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(UserError) as error:
        launch.triton_version()
    assert f"got {version}; allowed: 3.6 and 3.7; fix: {FIX}" in str(error.value) and "\n" not in str(error.value)
    assert lower.main(["--arch", "90", "--out", str(tmp_path / "cubins")]) == 2
    assert capsys.readouterr().err == f"error: {error.value}\n" and not list(tmp_path.iterdir())


def test_no_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="got none installed"):
        launch.triton_version()


@pytest.mark.parametrize("module", ["feedback_step", "feedback_fwd", "feedback_bwd", "causal_launch", "causal_step", "mixer_step", "layer", "fused_launch"])
def test_no_kernel_is_reached_with_another_version(module: str) -> None:
    code = f"import triton; triton.__version__ = '3.8.0'\nimport sessa_deploy.kernels.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"UserError: the kernels cannot use this Triton: got 3.8.0; allowed: 3.6 and 3.7; fix: {FIX}" in done.stderr


def test_a_launch_passes_what_tritons_own_launcher_passes() -> None:
    """`bind` calls the private function below Triton's launcher: argument by argument what that one gives it, for the installed version."""
    from triton.backends.nvidia.driver import CudaLauncher

    from sessa_deploy.kernels import feedback_launch

    calls: list[tuple[Any, ...]] = []
    run = SimpleNamespace(
        launch=lambda *args: calls.append(args), launch_cooperative_grid=False, launch_pdl=True, arg_annotations=["annotations"], kernel_signature=b"signature",
        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1, num_ctas=1,
    )  # fmt: skip
    metadata = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0)
    binary = SimpleNamespace(run=run, function=77, metadata=metadata, packed_metadata=(4, 1, 1024))
    feedback_launch.bind(SimpleNamespace(__name__="kernel"), binary, [128, True])(9, 3, 2, 1, 4096, 8192, 0.5)
    CudaLauncher.__call__(run, 3, 2, 1, 9, 77, binary.packed_metadata, None, None, None, 4096, 8192, 0.5, 128, True)
    assert len(calls) == 2 and calls[0] == calls[1]
    metadata.global_scratch_size = 64
    with pytest.raises(ValueError, match="scratch"):
        feedback_launch.bind(SimpleNamespace(__name__="kernel"), binary, [])

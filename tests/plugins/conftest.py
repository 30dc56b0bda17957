"""The libraries and their harnesses, built once: for each TensorRT and for the ONNX Runtime whose headers are given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import stub_cubins
from plugin_harness import ORT, Built, build, missing


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "SESSA_CUBIN_DIR" in os.environ:
        return Path(os.environ["SESSA_CUBIN_DIR"])
    pytest.importorskip("triton")
    import torch

    out = tmp_path_factory.mktemp("cubins")
    whole = torch.cuda.is_available()  # else nothing is launched: those for weights of 8 bits are as many again, and stand-ins do
    command = [sys.executable, "-m", "sessa_deploy.plugins.lower", "--arch", "90", "--out", str(out)]
    done = subprocess.run([*command, *([] if whole else ["--weights", "storage"])], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out if whole else stub_cubins.write([90], out, ["int8", "fp8"])


@pytest.fixture(scope="session")
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """The library and harness for a TensorRT major or ORT, made when they are first asked for; the test is skipped where their headers are not given.

    stub: with kernels that nobody may launch, in place of lowered ones.
    """

    @cache
    def made(major: int, stub: bool) -> Built:
        folder = tmp_path_factory.mktemp(f"trt{major}" if major != ORT else "ort")
        if not stub:
            return build(major, lambda: request.getfixturevalue("cubins"), folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CMAKE_BUILD_TYPE", "Debug")  # half the time to compile, which is most of what those tests take
            return build(major, lambda: stub_cubins.write([90], folder / "stub"), folder)

    def ask(major: int, stub: bool = False) -> Built:
        if (reason := missing(major)) is not None:
            pytest.skip(reason)
        return made(major, stub)

    return ask


@pytest.fixture(scope="session", params=[8, 10, 11], ids=lambda m: f"trt{m}")
def built(request: pytest.FixtureRequest, builds: Callable[..., Built]) -> Built:
    """(TensorRT major, plugin library, harness) for each TensorRT whose headers are given."""
    return builds(request.param)


@pytest.fixture(scope="session", params=[8, 10, 11, ORT], ids=lambda m: f"trt{m}" if m != ORT else "ort")
def shell(request: pytest.FixtureRequest, builds: Callable[..., Built]) -> Built:
    """The same, and for ONNX Runtime, whose major is ORT: every shell launches the same kernels."""
    return builds(request.param)


@pytest.fixture(scope="session", params=[8, 10, 11, ORT], ids=lambda m: f"trt{m}" if m != ORT else "ort")
def launching(request: pytest.FixtureRequest, builds: Callable[..., Built]) -> Built:
    """The same for those who only look at launches: for ONNX Runtime without the minutes that lowering takes."""
    return builds(request.param, stub=request.param == ORT)


@pytest.fixture(scope="session")
def ort_stub(builds: Callable[..., Built]) -> Built:
    """(ORT, library, harness) for ONNX Runtime, with kernels that nobody may launch."""
    return builds(ORT, stub=True)


@pytest.fixture(scope="session")
def ort_built(builds: Callable[..., Built]) -> Built:
    """(ORT, library, harness) for ONNX Runtime."""
    return builds(ORT)

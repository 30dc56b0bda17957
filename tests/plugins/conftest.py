"""The plugin library and harness.cpp, built once for each TensorRT whose headers are given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_harness import HERE, INCLUDES, PREBUILT, SOURCES, Built, include_flags, load_harness, missing

from sessa_deploy.plugins import library


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "SESSA_CUBIN_DIR" in os.environ:
        return Path(os.environ["SESSA_CUBIN_DIR"])
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("cubins")
    done = subprocess.run([sys.executable, "-m", "sessa_deploy.plugins.lower", "--arch", "90", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session", params=[8, 10, 11], ids=lambda m: f"trt{m}")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """(TensorRT major, plugin library, harness) for each TensorRT whose headers are given."""
    major: int = request.param
    if (reason := missing(major)) is not None:
        pytest.skip(reason)
    if PREBUILT is not None:
        folder = PREBUILT / f"trt{major}"
    else:
        folder = tmp_path_factory.mktemp(f"trt{major}")
        library.build(INCLUDES[major], SOURCES / "src/cuda", request.getfixturevalue("cubins"), out=folder)
        flags = ["-std=c++17", "-fPIC", "-shared", "-Wno-deprecated-declarations", "-isystem", str(INCLUDES[major]), f"-I{SOURCES / 'src/cuda'}"]
        flags += include_flags(tmp_path_factory.mktemp("tables"))
        subprocess.run(["g++", *flags, str(HERE / "harness.cpp"), "-o", str(folder / "harness.so"), "-ldl"], check=True)
    return major, folder / library.LIBRARY, load_harness(folder / "harness.so")

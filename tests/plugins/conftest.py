"""The plugin library and harness.cpp, built once for each TensorRT whose headers are given."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_harness import HERE, INCLUDES, PREBUILT, SOURCES, Built, Pointers, Shape, missing

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
        subprocess.run(["g++", *flags, str(HERE / "harness.cpp"), "-o", str(folder / "harness.so"), "-ldl"], check=True)
    harness = ctypes.CDLL(str(folder / "harness.so"))
    harness.harness_create.restype = ctypes.c_void_p
    harness.harness_create.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_float]
    harness.harness_workspace.restype = ctypes.c_int64
    for name in ("harness_workspace", "harness_shape"):
        getattr(harness, name).argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape]
    harness.harness_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape, Pointers, ctypes.c_void_p]
    harness.harness_formats.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    harness.harness_destroy.argtypes = [ctypes.c_void_p]
    return major, folder / library.LIBRARY, harness

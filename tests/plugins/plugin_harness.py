"""What the tests of the libraries share: where headers are, libraries and harnesses built, sizes as a harness takes them, a plugin made through it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

from sessa_deploy.kernels.launch.limits import ROTARY_LIMBS
from sessa_deploy.plugins import library, ops

HERE = Path(__file__).parent
SOURCES = Path(library.__file__).parent
INCLUDES = {library.include_major(Path(p)): Path(p) for p in os.environ.get("SESSA_TRT_INCLUDE", "").split(os.pathsep) if p}
ORT = 0  # stands for ONNX Runtime where a TensorRT has its major
_ORT_INCLUDE = os.environ.get("SESSA_ORT_INCLUDE", "")
ORT_INCLUDE = None if _ORT_INCLUDE in ("", "fetch") else Path(_ORT_INCLUDE)
PREBUILT = Path(os.environ["SESSA_PLUGIN_PREBUILT"]) if "SESSA_PLUGIN_PREBUILT" in os.environ else None
FLOAT, HALF, BFLOAT = 1, 10, 16
NAMES = dict(enumerate(library.OPS))
At = IntEnum("At", [op.identifier for op in ops.OPS], start=0)  # type: ignore[misc]  # positions in the harness's table: At.Norm, ...
FEEDBACK, CAUSAL = At.Feedback, At.Causal
OPERANDS = {i: len(ops.OPS[i].inputs) + len(ops.OPS[i].outputs) for i in NAMES}
Built = tuple[int, Path, ctypes.CDLL]  # TensorRT's major version or ORT, library, harness
Shape = ctypes.c_int64 * len(ops.SIZES)
Pointers = ctypes.c_void_p * 20


def sizes(batch: int, tokens: int, capacity: int, width: int, heads: int = 1, kv_heads: int = 1, head_width: int = 1, columns: int = 1) -> Any:
    """The sizes of a problem as the harness takes them."""
    return Shape(batch, tokens, capacity, width, heads, kv_heads, head_width, columns, 2 * width, head_width // 2, 1, ROTARY_LIMBS)


def headed(batch: int, tokens: int, capacity: int, head_width: int, heads: int = 1, kv_heads: int = 1) -> Any:
    """The same for causal attention, by the width of a head."""
    return sizes(batch, tokens, capacity, heads * head_width, heads, kv_heads, head_width)


def missing(major: int) -> str | None:
    """Why the library for this TensorRT, or for ONNX Runtime, cannot be tested here, or None."""
    if PREBUILT is not None:
        folder, name = ("ort", library.ORT_LIBRARY) if major == ORT else (f"trt{major}", library.LIBRARY)
        return None if (PREBUILT / folder / name).is_file() else f"no {folder} in SESSA_PLUGIN_PREBUILT"
    if major == ORT and not _ORT_INCLUDE:
        return "no header of ONNX Runtime: name the folder of onnxruntime_c_api.h in SESSA_ORT_INCLUDE, or say fetch there"
    if major != ORT and major not in INCLUDES:
        return f"no headers of TensorRT {major}: name their folder in SESSA_TRT_INCLUDE"
    return None if shutil.which("cmake") and shutil.which("g++") else "no cmake or no g++"


def build(major: int, cubins: Callable[[], Path], folder: Path) -> Built:
    """Both, built into `folder` for what `missing` does not miss. cubins: gives the folder of the kernels, if they are needed."""
    if PREBUILT is not None:
        folder = PREBUILT / ("ort" if major == ORT else f"trt{major}")
    elif major == ORT:
        include = ORT_INCLUDE or _fetched(folder)
        library.build(cubins=cubins(), out=folder, product="ort", onnxruntime_include=include)
        _compile("harness_ort.cpp", folder, ["-isystem", str(include)])
    else:
        library.build(INCLUDES[major], SOURCES / "src/cuda", cubins(), out=folder)
        _compile("harness.cpp", folder, ["-Wno-deprecated-declarations", "-isystem", str(INCLUDES[major]), f"-I{SOURCES / 'src/cuda'}"])
    return major, folder / (library.ORT_LIBRARY if major == ORT else library.LIBRARY), load_harness(folder / "harness.so")


def _fetched(folder: Path) -> Path:
    """The folder of ONNX Runtime's header, fetched as a build fetches it."""
    work = folder / "fetched"
    work.mkdir()
    (work / "cubins.inc").write_text("")
    options = ["-DSESSA_TARGETS=ort", f"-DSESSA_CUBIN_DIR={work}", f"-DSESSA_PYTHON={sys.executable}"]
    subprocess.run(["cmake", "-S", str(SOURCES), "-B", str(work), *options], check=True)
    return work / "onnxruntime/include/onnxruntime/core/session"


def _compile(source: str, folder: Path, flags: list[str]) -> None:
    command = ["g++", "-std=c++17", "-fPIC", "-shared", *flags, *include_flags(folder / "tables"), str(HERE / source), "-o", str(folder / "harness.so"), "-ldl"]
    subprocess.run(command, check=True)


def operand(i: int) -> int:
    """An address for an operand of a call that nobody makes, inputs before outputs."""
    return (i + 1) << 36


def create(built: Built, op: int, storage: int = -1, attribute: str | None = None, value: float = 0.0, weights: int = 0) -> int | None:
    """A plugin with these attributes, through its serialised form; None where the library refuses them."""
    return built[2].harness_create(str(built[1]).encode(), at(op, weights), storage, weights, attribute.encode() if attribute else None, value)


def at(op: int, weights: int = 0) -> int:
    """Where a harness has the operation in the form that attribute `weights` gives it."""
    return len(ops.OPS) + [one for one in NAMES if ops.OPS[one].quantised is not None].index(op) if weights else op


def include_flags(folder: Path) -> list[str]:
    """Compiler options for the library's own headers; what ops.py generates goes into `folder`."""
    ops.write(folder)
    return [f"-I{SOURCES / 'src'}", f"-I{folder}"]


def load_harness(path: Path) -> ctypes.CDLL:
    """harness.cpp or harness_ort.cpp, built, with the types of their functions."""
    harness = ctypes.CDLL(str(path))
    harness.harness_create.restype = ctypes.c_void_p
    harness.harness_create.argtypes = [ctypes.c_char_p, *[ctypes.c_int32] * 3, ctypes.c_char_p, ctypes.c_float]
    harness.harness_workspace.restype = ctypes.c_int64
    for name in ("harness_workspace", "harness_shape"):
        getattr(harness, name).argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape]
    harness.harness_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape, Pointers, ctypes.c_void_p]
    harness.harness_formats.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    harness.harness_destroy.argtypes = [ctypes.c_void_p]
    if hasattr(harness, "harness_register"):
        harness.harness_register.argtypes = [ctypes.c_char_p, ctypes.c_uint32, ctypes.c_char_p]
        harness.harness_sessions.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_int64)]
        harness.harness_session.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, *[ctypes.POINTER(ctypes.c_int64)] * 3]
    return harness

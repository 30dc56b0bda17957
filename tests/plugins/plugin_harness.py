"""What the tests of the plugin library share: where TensorRT's headers are, sizes as harness.cpp takes them, a plugin made through it."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

from sessa_deploy.plugins import library

HERE = Path(__file__).parent
SOURCES = Path(library.__file__).parent
INCLUDES = {library.include_major(Path(p)): Path(p) for p in os.environ.get("SESSA_TRT_INCLUDE", "").split(os.pathsep) if p}
PREBUILT = Path(os.environ["SESSA_PLUGIN_PREBUILT"]) if "SESSA_PLUGIN_PREBUILT" in os.environ else None
FLOAT, HALF, BFLOAT = 1, 10, 16
FEEDBACK, CAUSAL, ROTARY, NORM, LINEAR_HEADS, LOGITS, TAIL, ENTER, PROJECT_GAIN, MIXER = range(10)  # positions in the harness's table
NAMES = dict(enumerate(library.OPS))
OPERANDS = dict(enumerate((8, 7, 5, 4, 4, 3, 6, 6, 16, 14)))  # inputs and outputs
Built = tuple[int, Path, ctypes.CDLL]  # TensorRT's major version, plugin library, harness
Shape = ctypes.c_int64 * 12
Pointers = ctypes.c_void_p * 20


def sizes(batch: int, tokens: int, capacity: int, width: int, heads: int = 1, kv_heads: int = 1, head_width: int = 1, columns: int = 1) -> Any:
    """The sizes of a problem as the harness takes them; width: D, or that of one head of causal attention."""
    return Shape(batch, tokens, capacity, width, heads, kv_heads, head_width, columns, 2 * width, head_width // 2, 1, 4)


def missing(major: int) -> str | None:
    """Why the library for this TensorRT cannot be tested here, or None."""
    if PREBUILT is not None:
        return None if (PREBUILT / f"trt{major}" / library.LIBRARY).is_file() else f"no trt{major} in SESSA_PLUGIN_PREBUILT"
    if major not in INCLUDES:
        return f"no headers of TensorRT {major}: name their folder in SESSA_TRT_INCLUDE"
    return None if shutil.which("cmake") and shutil.which("g++") else "no cmake or no g++"


def create(built: Built, op: int, storage: int = -1, scale: float = -1.0) -> int | None:
    return built[2].harness_create(str(built[1]).encode(), op, storage, scale)


def load_harness(path: Path) -> ctypes.CDLL:
    """harness.cpp, built, with the types of its functions."""
    harness = ctypes.CDLL(str(path))
    harness.harness_create.restype = ctypes.c_void_p
    harness.harness_create.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_float]
    harness.harness_workspace.restype = ctypes.c_int64
    for name in ("harness_workspace", "harness_shape"):
        getattr(harness, name).argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape]
    harness.harness_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape, Pointers, ctypes.c_void_p]
    harness.harness_formats.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    harness.harness_destroy.argtypes = [ctypes.c_void_p]
    return harness

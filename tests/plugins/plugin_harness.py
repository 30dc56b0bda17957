"""What the tests of the plugin library share: where TensorRT's headers are, sizes as harness.cpp takes them, a plugin made through it."""

from __future__ import annotations

import ctypes
import os
import shutil
from enum import IntEnum
from pathlib import Path
from typing import Any

from sessa_deploy.kernels.launch.limits import ROTARY_LIMBS
from sessa_deploy.plugins import library, ops

HERE = Path(__file__).parent
SOURCES = Path(library.__file__).parent
INCLUDES = {library.include_major(Path(p)): Path(p) for p in os.environ.get("SESSA_TRT_INCLUDE", "").split(os.pathsep) if p}
PREBUILT = Path(os.environ["SESSA_PLUGIN_PREBUILT"]) if "SESSA_PLUGIN_PREBUILT" in os.environ else None
FLOAT, HALF, BFLOAT = 1, 10, 16
NAMES = dict(enumerate(library.OPS))
At = IntEnum("At", [op.identifier for op in ops.OPS], start=0)  # type: ignore[misc]  # positions in the harness's table: At.Norm, ...
FEEDBACK, CAUSAL = At.Feedback, At.Causal
OPERANDS = {i: len(ops.OPS[i].inputs) + len(ops.OPS[i].outputs) for i in NAMES}
Built = tuple[int, Path, ctypes.CDLL]  # TensorRT's major version, plugin library, harness
Shape = ctypes.c_int64 * len(ops.SIZES)
Pointers = ctypes.c_void_p * 20


def sizes(batch: int, tokens: int, capacity: int, width: int, heads: int = 1, kv_heads: int = 1, head_width: int = 1, columns: int = 1) -> Any:
    """The sizes of a problem as the harness takes them."""
    return Shape(batch, tokens, capacity, width, heads, kv_heads, head_width, columns, 2 * width, head_width // 2, 1, ROTARY_LIMBS)


def headed(batch: int, tokens: int, capacity: int, head_width: int, heads: int = 1, kv_heads: int = 1) -> Any:
    """The same for causal attention, by the width of a head."""
    return sizes(batch, tokens, capacity, heads * head_width, heads, kv_heads, head_width)


def missing(major: int) -> str | None:
    """Why the library for this TensorRT cannot be tested here, or None."""
    if PREBUILT is not None:
        return None if (PREBUILT / f"trt{major}" / library.LIBRARY).is_file() else f"no trt{major} in SESSA_PLUGIN_PREBUILT"
    if major not in INCLUDES:
        return f"no headers of TensorRT {major}: name their folder in SESSA_TRT_INCLUDE"
    return None if shutil.which("cmake") and shutil.which("g++") else "no cmake or no g++"


def create(built: Built, op: int, storage: int = -1, attribute: str | None = None, value: float = 0.0) -> int | None:
    """A plugin with these attributes, through its serialised form; None where the library refuses them."""
    return built[2].harness_create(str(built[1]).encode(), op, storage, attribute.encode() if attribute else None, value)


def include_flags(folder: Path) -> list[str]:
    """Compiler options for the library's own headers; what ops.py generates goes into `folder`."""
    ops.write(folder)
    return [f"-I{SOURCES / 'src'}", f"-I{folder}"]


def load_harness(path: Path) -> ctypes.CDLL:
    """harness.cpp, built, with the types of its functions."""
    harness = ctypes.CDLL(str(path))
    harness.harness_create.restype = ctypes.c_void_p
    harness.harness_create.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_char_p, ctypes.c_float]
    harness.harness_workspace.restype = ctypes.c_int64
    for name in ("harness_workspace", "harness_shape"):
        getattr(harness, name).argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape]
    harness.harness_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape, Pointers, ctypes.c_void_p]
    harness.harness_formats.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    harness.harness_destroy.argtypes = [ctypes.c_void_p]
    return harness

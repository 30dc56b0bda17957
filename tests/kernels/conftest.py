"""On a machine without a GPU the Triton kernels run through Triton's interpreter; it is chosen before a kernel module is imported."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch


def _use_interpreter() -> None:
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 writes int(array of one element) for loop bounds, which NumPy 2.4 no longer takes.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    _as_on_a_gpu(interpreter)
    _give_bfloat16(interpreter)
    _patch_once_a_launch(interpreter)


def _as_on_a_gpu(interpreter: Any) -> None:
    """NumPy's library sums in an order of its own, by a product's shape and by the processor. In float64 and rounded once, tiles of any rows and columns give
    the same bits, as they do on a GPU; so that errors within a product are for a GPU to judge. And a maximum drops NaN, as a GPU's does."""
    import numpy as np

    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if d.data.dtype != np.float32 or not {a.data.dtype, b.data.dtype} <= {np.dtype(np.float16), np.dtype(np.float32)}:
            return dot(self, a, b, d, precision, imprecise)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
            return interpreter.TensorHandle(sums.astype(np.float32), d.dtype.scalar)

    def create_maxnumf(self: Any, a: Any, b: Any) -> Any:
        return self.binary_op(a, b, np.fmax)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.create_maxnumf = create_maxnumf


def _give_bfloat16(interpreter: Any) -> None:
    """Triton's interpreter (3.6 and 3.7) keeps bfloat16 as bits: it cuts where a GPU rounds to nearest, multiplies and adds the bits as integers, and takes
    integers for bits."""
    import numpy as np
    import triton.language as tl

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def widen(x: Any) -> Any:
        return (x.astype(np.uint32) << 16).view(np.float32)

    def convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(x).view(np.uint32)
            rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
            return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
        return widen(x.view(np.uint16)).view(np.uint32) if source == tl.bfloat16 and target == tl.float32 else convert(x, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widen(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, precision, imprecise)

    from_integer = interpreter.InterpreterBuilder.create_si_to_fp

    def create_si_to_fp(self: Any, src: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return from_integer(self, src, target)
        return interpreter.TensorHandle(convert_float(src.data.astype(np.float32), tl.float32, tl.bfloat16, None), tl.bfloat16)

    multiply, add_up = interpreter.InterpreterBuilder.create_fmul, interpreter.ReduceOps.sum

    def create_fmul(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return multiply(self, a, b)
        return interpreter.TensorHandle(convert_float(widen(a.data) * widen(b.data), tl.float32, tl.bfloat16, None), tl.bfloat16)

    def reduce_sum(self: Any, x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return add_up(self, x)
        total = np.asarray(np.sum(widen(x.handle.data), axis=self.axis, keepdims=self.keep_dims), np.float32)
        return self.to_tensor(convert_float(total, tl.float32, tl.bfloat16, None).reshape(total.shape), x.dtype)

    interpreter.InterpreterBuilder.create_fmul = create_fmul
    interpreter.ReduceOps.sum = reduce_sum
    interpreter.InterpreterBuilder.create_si_to_fp = create_si_to_fp
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def _patch_once_a_launch(interpreter: Any) -> None:
    """At each call of a device function Triton's interpreter (3.6 and 3.7) patches triton.language again: half of what a kernel took, and the same patches."""
    import triton.language as tl

    patch_lang, patched = interpreter._patch_lang, set()

    class Launch(interpreter._LangPatchScope):  # type: ignore[name-defined,misc]
        """What the launch puts back at its end."""

        def restore(self) -> None:
            patched.clear()
            super().restore()

    @functools.cache
    def modules(fn: Any) -> frozenset[str]:
        return frozenset(x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core)

    def once(fn: Any) -> Any:
        scope = Launch()
        if not modules(fn) <= patched:
            scope._changes += patch_lang(fn)._changes
            patched.update(modules(fn))
        return scope

    interpreter._patch_lang = once


_use_interpreter()

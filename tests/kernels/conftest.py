"""On a machine without a GPU the Triton kernels run through Triton's interpreter; it is chosen before a kernel module is imported."""

from __future__ import annotations

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


_use_interpreter()

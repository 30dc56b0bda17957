"""Launching the fused elementwise kernels with little host time: a binary per types and tiles, compiled once, then called with addresses."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sessa_deploy.kernels.feedback_launch import INTERPRETED, bind

ROWS = 32  # rows that one row of partial sums stands for
Tiles = dict[str, Any]

_BINARIES: dict[tuple[Any, ...], tuple[Callable[..., None], Tiles]] = {}  # with the tiles, whose id is in the key


def _power(x: int) -> int:
    return 1 << max(4, (x - 1).bit_length())


@lru_cache(maxsize=256)
def tiles(kind: str, width: int = 0) -> Tiles:
    """Tile sizes and warps: "row" holds a row of `width` whole, "turn" a head of `width`, the others have no such need.

    The "sums" hold sums over rows in as many registers again. Timed on an H200 at (16384,768) and (8192,1024), see benchmarks/README.md.
    """
    if kind in ("row", "row sums"):
        return {"BT": max(1, min(ROWS, (4096 if kind == "row" else 2048) // _power(width))), "BD": _power(width), "num_warps": 8 if width > 2048 else 4}
    if kind in ("turn", "turn sums"):
        return {"BT": max(1, min(ROWS, 2048 // _power(width))), "BD": _power(width), "num_warps": 4 if kind == "turn" else 2}
    return {
        "append": {"BD": 1024, "num_warps": 4},
        "collect": {"BT": 16, "BD": 128, "num_warps": 4},
        "flat": {"BT": 8, "BD": 256, "num_warps": 4},
        "flat sums": {"BT": 4, "BD": 128, "num_warps": 4},
        "total": {"BT": 32, "BD": 32, "num_warps": 4},
    }[kind]


@lru_cache(maxsize=256)
def more(kind: str, width: int = 0, **constants: Any) -> Tiles:
    """`tiles` with further compile-time constants."""
    return {**tiles(kind, width), **constants}


def _compiled(kernel: Any, arguments: tuple[Any, ...], options: Tiles) -> Callable[..., None]:
    # Examples carry the types; no integer selects a binary (do_not_specialize), and every pointer is promised 16-byte alignment.
    examples = [x.dtype if isinstance(x, Tensor) else 1.0 if isinstance(x, float) else 16 for x in arguments]
    binary = kernel.warmup(*examples, grid=(1,), **options)
    binary = binary.result() if hasattr(binary, "result") else binary
    return bind(kernel, binary, [options[name] for name in kernel.arg_names[len(arguments) :]])


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Tiles) -> None:
    """Launch `kernel` on the current stream of its first argument's device. Tensors: contiguous rows, 16-byte aligned. options: from `tiles` or `more`."""
    if INTERPRETED:
        kernel[grid](*arguments, **options)
        return
    index = arguments[0].device.index
    key: list[Any] = [kernel.__name__, index, id(options)]
    values = []
    for value in arguments:
        if isinstance(value, Tensor):
            values.append(value.data_ptr())
            key.append(value.dtype)
        else:
            values.append(value)
    entry = _BINARIES.get(tuple(key))
    if entry is None:
        with torch.cuda.device(index):
            entry = _BINARIES[tuple(key)] = (_compiled(kernel, arguments, options), options)
    stream = torch._C._cuda_getCurrentRawStream(index)
    x, y, z = (*grid, 1, 1)[:3]
    if torch._C._cuda_getDevice() == index:
        entry[0](stream, x, y, z, *values)
    else:
        with torch.cuda.device(index):
            entry[0](stream, x, y, z, *values)

"""Tiles of the kernels that make one pass over rows and are in no table. Standard library only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

ROWS = 32  # rows that one row of partial sums stands for
Tiles = dict[str, Any]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(x: int) -> int:
    return 1 << max(4, (x - 1).bit_length())


@lru_cache(maxsize=256)
def tiles(kind: str, width: int = 0) -> Tiles:
    """Tile sizes and warps: "row" holds a row of `width` whole, the others have no such need.

    The "sums" hold sums over rows in as many registers again. Timed on an H200 at (16384,768) and (8192,1024), see benchmarks/README.md.
    """
    if kind in ("row", "row sums"):
        return {"BT": max(1, min(ROWS, (4096 if kind == "row" else 2048) // _power(width))), "BD": _power(width), "num_warps": 8 if width > 2048 else 4}
    return {
        "append": {"BD": 1024, "num_warps": 4},
        "gather": {"BT": 8, "BD": 128, "num_warps": 2},
        "flat": {"BT": 8, "BD": 256, "num_warps": 4},
        "logits": {"BD": 4096, "num_warps": 8},
        "flat sums": {"BT": 8, "BD": 128, "num_warps": 4},
        "turn": {"BT": 16, "BD": 128, "num_warps": 4},
        "gate sums": {"BT": 8, "BD": 128, "num_warps": 4},
        "residual": {"BT": 1024, "num_warps": 4},
        "total": {"BT": 32, "BD": 32, "num_warps": 4},
    }[kind]


@lru_cache(maxsize=256)
def more(kind: str, width: int = 0, **constants: Any) -> Tiles:
    """`tiles` with further compile-time constants."""
    return {**tiles(kind, width), **constants}

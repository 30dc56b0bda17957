"""What tune_row.py tries: tiles of kernels that multiply one row by 8-bit weights, as sets and each in the best set's place."""

from __future__ import annotations

from typing import Any

Tiles = dict[str, Any]
Choice = dict[str, Tiles]  # kernel -> tiles; beside them "opens": whether the next kernel is let in before the wait
ENTER, PROJECT, OUT, TAIL, LOGITS = KERNELS = "layer_norm_enter", "layer_project_gain", "layer_out", "layer_tail", "layer_logits"


def matrix(columns: int, depth: int, warps: int, **more: Any) -> Tiles:
    return {"BM": 1, "BN": columns, "BK": depth, "KS": warps, "AHEAD": 1, "FORM": 0, "num_warps": warps, "num_stages": 1, **more}


def single(columns: int, depth: int, ahead: int, warps: int) -> Tiles:
    return {**matrix(columns, depth, warps), "KS": 1, "AHEAD": ahead}


OLD = {PROJECT: single(4, 1024, 1, 1), TAIL: single(8, 1024, 2, 4), OUT: single(8, 1024, 2, 4), LOGITS: single(4, 1024, 1, 2)}
BASE = {PROJECT: matrix(16, 2048, 4, maxnreg=96), ENTER: matrix(16, 2048, 8), TAIL: matrix(16, 2048, 8), OUT: matrix(16, 2048, 8),
        LOGITS: matrix(16, 2048, 4, maxnreg=96)}  # fmt: skip
SMALL = {PROJECT: matrix(16, 1024, 4), ENTER: matrix(32, 1024, 8), TAIL: matrix(16, 1024, 4), OUT: matrix(16, 1024, 8), LOGITS: matrix(32, 1024, 4)}
# width -> name -> choices raced as a whole. Programs of out, tail, entrance and projections have room beside one another, or not: what one kernel gains depends
# on the others' registers
SETS: dict[int, dict[str, Choice]] = {
    2048: {
        "base": BASE,
        "old projections": {**BASE, PROJECT: OLD[PROJECT]},
        "old but entrance": {**BASE, **OLD},
        "old out, tail": {**BASE, TAIL: OLD[TAIL], OUT: OLD[OUT]},
        "32/4": {**BASE, PROJECT: matrix(32, 2048, 4, maxnreg=168)},
        "8/2": {**BASE, PROJECT: matrix(8, 2048, 2, maxnreg=104)},
        "16/8 opens": {**BASE, PROJECT: matrix(16, 2048, 8, opens=True)},
    },
    1024: {"base": SMALL},
}  # fmt: skip
_SQUARE = [
    matrix(16, 2048, 8), matrix(16, 2048, 4, maxnreg=96), matrix(16, 2048, 4), matrix(16, 2048, 16), matrix(8, 2048, 8), matrix(8, 2048, 4),
    matrix(8, 2048, 2, maxnreg=104), matrix(32, 2048, 16), single(8, 1024, 2, 4), single(4, 1024, 2, 4), single(4, 1024, 2, 2),
]  # fmt: skip
# width -> kernel -> what is tried in the best set's place
TRIALS: dict[int, dict[str, list[Tiles]]] = {
    2048: {
        PROJECT: [
            matrix(16, 2048, 4, maxnreg=96), matrix(16, 2048, 4, maxnreg=96, opens=True), matrix(16, 2048, 4, maxnreg=104), matrix(16, 2048, 4),
            matrix(8, 2048, 2, maxnreg=104), matrix(8, 2048, 4, maxnreg=72), matrix(8, 2048, 4), matrix(32, 2048, 4, maxnreg=168),
            matrix(32, 2048, 4), matrix(16, 2048, 2, maxnreg=168), matrix(32, 2048, 8, maxnreg=96), matrix(16, 2048, 8, opens=True),
            matrix(16, 2048, 8, opens=True, maxnreg=96), matrix(16, 2048, 8, maxnreg=64), single(4, 1024, 1, 2), single(4, 1024, 2, 4),
            single(4, 1024, 2, 2), single(8, 1024, 1, 4), single(4, 1024, 1, 1), single(4, 512, 2, 1), single(4, 512, 1, 1), single(2, 1024, 1, 1),
            single(8, 512, 1, 4), single(8, 512, 2, 4),
        ],
        ENTER: [
            matrix(16, 2048, 8), matrix(16, 2048, 8, maxnreg=96), matrix(32, 2048, 16), matrix(32, 2048, 16, maxnreg=96), matrix(16, 2048, 16),
            matrix(16, 2048, 4), matrix(16, 2048, 4, maxnreg=96), matrix(8, 2048, 8), matrix(8, 2048, 4), single(8, 2048, 1, 2),
            single(8, 2048, 1, 4),
        ],
        TAIL: _SQUARE,
        OUT: _SQUARE,
        LOGITS: [
            matrix(16, 2048, 4, maxnreg=96), matrix(16, 2048, 4, maxnreg=104), matrix(32, 2048, 8, maxnreg=96), matrix(32, 2048, 4, maxnreg=168),
            matrix(64, 2048, 16), matrix(64, 2048, 8, maxnreg=168), matrix(8, 2048, 2, maxnreg=104), single(4, 1024, 1, 2), single(8, 1024, 2, 4),
        ],
    },
    1024: {},
}  # fmt: skip

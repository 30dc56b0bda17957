"""The kernels of causal attention with a cache as data. Standard library only."""

from __future__ import annotations

from sessa_deploy.kernels.launch.limits import GROUP, HEAD_WIDTHS, ROWS_HEADS
from sessa_deploy.kernels.launch.spec import Kernel, Param, by_name, integers, pointers

_PACKAGE = "sessa_deploy.kernels.causal"
_STEPS = tuple(f"{w}{g}" for w in HEAD_WIDTHS for g in ("", f"x{GROUP}"))
_ROWS_STEPS = tuple(map(str, ROWS_HEADS))
_STRIDES = (Param("stride_kb", "i64"), Param("stride_kr", "i32"), Param("stride_vb", "i64"), Param("stride_vr", "i32"))
_HALF = ("fp16", "bf16")  # storage that matrix instructions take
_SCALE = Param("scale", "fp32")

# Widths and strides of a past are passed in units of HEAD_MULTIPLE, which the compiler then knows; a promise of 16 would exclude heads of 8, 24, 40, ...
KERNELS = by_name((
    Kernel(
        "causal_step_partial",
        f"{_PACKAGE}.step",
        (
            *pointers("q", "k", "v", "past_k", "past_v"),
            Param("past_length", "*i32"),
            *pointers("part", "stat", type="*fp32"),
            *_STRIDES,
            *integers("batch", "splits", "capacity", "heads", "group", "units"),
            _SCALE,
        ),
        ("BLOCK_R", "BLOCK_H", "BLOCK_G", "BLOCK_D", "STAGES", "TILES", "PDL"),
        _STEPS,
        scalar_loads=10,
        early=_STEPS,
    ),
    Kernel(
        "causal_step_combine",
        f"{_PACKAGE}.step",
        (*pointers("part", "stat", type="*fp32"), Param("past_length", "*i32"), *pointers("out"), *integers("capacity", "splits", "rows", "units")),
        ("BLOCK_S", "BLOCK_D", "PDL"),
        ("any",),
        scalar_loads=8,
        early=("any",),
    ),
    Kernel(
        "causal_rows_partial",
        f"{_PACKAGE}.step_rows",
        (
            *pointers("q", "k", "v", "past_k", "past_v"),
            Param("past_length", "*i32"),
            *pointers("part", "stat", type="*fp32"),
            *_STRIDES,
            *integers("tokens", "splits", "capacity", "heads", "group", "units"),
            _SCALE,
        ),
        ("BLOCK_R", "BLOCK_H", "BLOCK_D", "STAGES", "PDL"),
        _ROWS_STEPS,
        dtypes=_HALF,
        scalar_loads=10,
        early=_ROWS_STEPS,
    ),
    Kernel(
        "causal_rows_combine",
        f"{_PACKAGE}.step_rows",
        (
            *pointers("part", "stat", type="*fp32"),
            Param("past_length", "*i32"),
            *pointers("out"),
            *integers("tokens", "capacity", "splits", "rows", "heads", "units"),
        ),
        ("BLOCK_S", "BLOCK_N", "BLOCK_D", "PDL"),
        ("any",),
        dtypes=_HALF,
        scalar_loads=16,
        early=("any",),
    ),
    Kernel(
        "causal_prefill",
        f"{_PACKAGE}.prefill",
        (
            *pointers("q", "k", "v", "past_k", "past_v"),
            Param("past_length", "*i32"),
            *pointers("out"),
            *_STRIDES,
            *integers("tokens", "capacity", "group", "units"),
            _SCALE,
        ),
        ("BM", "BN", "BE", "BD"),
        tuple(str(w) for w in HEAD_WIDTHS),
        scalar_loads=1,
    ),
))  # fmt: skip


def head_variant(width: int, group: int = 1) -> str:
    """The variant of a kernel for heads of `width`; group: query heads of one key/value head, for the decode step. Raises ValueError beyond 256."""
    for padded in HEAD_WIDTHS:
        if width <= padded:
            return str(padded) if group == 1 else f"{padded}x{GROUP}"
    raise ValueError(f"causal attention has no kernel for heads of width {width}; the widest is {HEAD_WIDTHS[-1]}")

"""Feedback attention's kernels as data, and which of their tiles a width takes. Standard library only."""

from __future__ import annotations

from sessa_deploy.cuda_arch import ARCHS
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.limits import FEEDBACK_WIDTHS, FEW_WORK, LONG_WORK, PAST_ROWS, PAST_WORK, ROWS_WIDTHS, WIDE, WIDE_COLUMNS, WIDE_WORK
from sessa_deploy.kernels.launch.spec import Kernel, Param, by_name, integers, pointers

_PACKAGE = "sessa_deploy.kernels.feedback"
_WIDTHS = tuple(map(str, FEEDBACK_WIDTHS))
_ROWS_STEPS = tuple(map(str, ROWS_WIDTHS))
HALVES = ("feedback_solve_halves", "feedback_solve_halves_transposed")  # which stand in for the solves
MANY = "feedback_scores_many"  # which stands in for feedback_scores in training
MANY_PAST = "feedback_scores_past"  # the same behind a past
_HALF = ("fp16", "bf16")  # storage that matrix instructions take

_STRIDES = (Param("stride_kb", "i64", True), Param("stride_kr", "i32", True), Param("stride_sb", "i64", True), Param("stride_sr", "i32", True))

_COMBINE = (
    *pointers("e", type="*work"),
    *pointers("peak", "total", type="*fp32"),
    Param("gamma", "*fp32"),
    Param("past_length", "*i32"),
    *pointers("row_peak", "factor", type="*fp32"),
    Param("lse", "*fp32"),
    *pointers("x", type="*fp32"),
    *pointers("inverse", "inverse_low", type="*half_pair"),
    *pointers("near", "near_low", type="*work"),
    *pointers("near_scale", type="*fp32"),
    *integers("T"),
    *(Param(n, "i32", True) for n in ("C", "R")),
    *integers("NP", "NT", "row0", "B", "blocks"),
)

_SOLVE = (
    *pointers("e", type="*work"),
    *pointers("peak", "row_peak", "factor", type="*fp32"),
    *pointers("inverse", "inverse_low", type="*half_pair"),
    *pointers("near", "near_low", type="*work"),
    *pointers("near_scale", type="*fp32"),
    *pointers("f", "s", "s_low"),
    *pointers("w", "w_low", type="*work"),
    Param("scales", "*fp32"),
    Param("past_length", "*i32"),
    Param("sync", "*i32"),
    *integers("T"),
    *(Param(n, "i32", True) for n in ("D", "C", "R")),
    *integers("NP", "NT", "row0", "B", "panel", "panels", "keep"),
)

_TRANSPOSED = (
    *pointers("e", type="*work"),
    *pointers("factor", type="*fp32"),
    *pointers("inverse", "inverse_low", type="*half_pair"),
    *pointers("near", "near_low", type="*work"),
    *pointers("near_scale", type="*fp32"),
    *pointers("ds", "u", "u_low"),
    *pointers("w", "w_low", type="*work"),
    Param("scales", "*fp32"),
    *pointers("carry", type="*fp32"),
    *pointers("dpast_s"),
    Param("past_length", "*i32"),
    Param("bad", "*i32"),
    Param("sync", "*i32"),
    *integers("T", "P"),
    *(Param(n, "i32", True) for n in ("D", "C", "R")),
    *integers("NP", "row0", "blocks", "B", "panel", "panels", "add"),
)

KERNELS = by_name((
    Kernel(
        "feedback_step_partial",
        f"{_PACKAGE}.step",
        (
            *pointers("q", "past_k", "past_s"),
            Param("past_length", "*i32"),
            *pointers("part", "stat", type="*fp32"),
            *_STRIDES,
            *integers("batch", "splits", "capacity"),
            Param("width", "i32", True),
            Param("scale", "fp32"),
        ),
        ("BLOCK_R", "BLOCK_C", "BLOCK_L", "STAGES", "TILES", "OWN", "PDL"),
        _WIDTHS,
        scalar_loads=6,
        early=_WIDTHS,
    ),
    Kernel(
        "feedback_step_combine",
        f"{_PACKAGE}.step",
        (
            *pointers("part", "stat", type="*fp32"),
            Param("past_length", "*i32"),
            Param("gamma", "*fp32"),
            *pointers("f", "out"),
            Param("capacity", "i32"),
            Param("splits", "i32"),
            Param("rows", "i32"),
            Param("width", "i32", True),
        ),
        ("BLOCK_S", "BLOCK_D", "PDL"),
        ("128",),
        scalar_loads=12,
        early=("128",),
    ),
    Kernel(
        "feedback_rows_partial",
        f"{_PACKAGE}.step_rows",
        (
            *pointers("q", "k", "past_k", "past_s"),
            Param("past_length", "*i32"),
            *pointers("part", "stat", "scores", type="*fp32"),
            *_STRIDES,
            *integers("tokens", "splits", "capacity"),
            Param("width", "i32", True),
            Param("scale", "fp32"),
        ),
        ("BLOCK_R", "BLOCK_C", "BLOCK_L", "STAGES", "PDL"),
        _ROWS_STEPS,
        dtypes=_HALF,
        scalar_loads=6,
        early=_ROWS_STEPS,
        optional=_ROWS_STEPS[1:],
    ),
    Kernel(
        "feedback_rows_combine",
        f"{_PACKAGE}.step_rows",
        (
            *pointers("part", "stat", "scores", type="*fp32"),
            Param("past_length", "*i32"),
            Param("gamma", "*fp32"),
            *pointers("add", "inverse", type="*fp32"),
            *integers("tokens", "capacity", "splits", "rows"),
            Param("width", "i32", True),
        ),
        ("BLOCK_S", "BLOCK_N", "BLOCK_D", "PDL"),
        ("any",),
        dtypes=("fp32",),
        scalar_loads=64,
        early=("any",),
    ),
    Kernel(
        "feedback_rows_finish",
        f"{_PACKAGE}.step_rows",
        (*pointers("f"), *pointers("add", "inverse", type="*fp32"), *pointers("out"), *integers("tokens"), Param("width", "i32", True)),
        ("BLOCK_D", "PDL"),
        ("any",),
        dtypes=_HALF,
        scalar_loads=16,
        early=("any",),
    ),
    Kernel(
        "feedback_pack",
        f"{_PACKAGE}.pack",
        (*pointers("past_s"), Param("past_length", "*i32"), *pointers("w", "w_low", type="*work"), Param("scales", "*fp32"), *integers("P"),
         Param("D", "i32", True), Param("C", "i32", True)),
        ("BT", "BN", "SPLIT"), ("fwd", "wide"), scalar_loads=2, optional=("wide",),
    ),
    Kernel(
        "feedback_scores",
        f"{_PACKAGE}.tiles",
        (
            *pointers("q", "k", "past_k"),
            Param("past_length", "*i32"),
            Param("lse", "*fp32"),
            Param("bad", "*i32"),
            *pointers("e", type="*work"),
            *pointers("peak", "total", type="*fp32"),
            Param("sync", "*i32"),
            *integers("T", "P"),
            *(Param(n, "i32", True) for n in ("D", "C", "R")),
            *integers("NP", "NT", "row0", "n_sync"),
            Param("scale", "fp32"),
        ),
        ("BM", "BT", "BK", "NB", "GROUP", "BACKWARD", "PAST", "PDL"),
        ("fwd", "past", "bwd"),
        scalar_loads=8,
        opens=("fwd",),
    ),
    Kernel(
        MANY,
        f"{_PACKAGE}.many",
        (
            *pointers("q", "k"), *pointers("lse", type="*fp32"), Param("bad", "*i32"), *pointers("e", type="*work"), *pointers("peak", "total", type="*fp32"),
            Param("sync", "*i32"), *integers("T"), *(Param(n, "i32", True) for n in ("D", "C", "R")), *integers("NT", "row0", "n_sync"), Param("scale", "fp32"),
            *integers("B", "each", "base"),
        ),
        ("BK", "BACKWARD"), ("fwd", "bwd"), lowered=False, dtypes=("bf16",), optional=("fwd", "bwd"), scratch=384,
    ),
    Kernel(
        MANY_PAST,
        f"{_PACKAGE}.many",
        (
            *pointers("q", "k", "past_k"), Param("past_length", "*i32"), *pointers("lse", type="*fp32"), *pointers("e", type="*work"),
            *pointers("peak", "total", type="*fp32"), Param("sync", "*i32"), *integers("T", "P"), *(Param(n, "i32", True) for n in ("D", "C", "R")),
            *integers("NP", "NT", "row0", "n_sync"), Param("scale", "fp32"), *integers("B", "each", "base"),
        ),
        ("BK",), ("fwd",), dtypes=_HALF, optional=("fwd",), scratch=512, scalar_loads=2,
    ),
    Kernel("feedback_combine", f"{_PACKAGE}.tiles", _COMBINE, ("BT", "CHUNK", "BACKWARD", "SPLIT"), ("fwd", "bwd"), scalar_loads=128),
    Kernel(
        "feedback_solve", f"{_PACKAGE}.forward", _SOLVE, ("BT", "BN", "STAGES", "SPLIT", "FULL", "LOW"), ("fwd", "wide"), scalar_loads=64, optional=("wide",)
    ),
    Kernel(
        "feedback_solve_transposed",
        f"{_PACKAGE}.backward",
        _TRANSPOSED,
        ("BT", "BN", "STAGES", "SPLIT", "FULL", "LOW"), ("bwd", "wide"), lowered=False, optional=("wide",),
    ),
    Kernel(
        HALVES[0], f"{_PACKAGE}.halves", _SOLVE, ("BT", "BN", "BK", "STAGES", "TWO", "ALONE", "PAST", "PDL"), ("fwd", "few", "wide"), dtypes=("bf16",),
        scalar_loads=64, optional=("fwd", "few", "wide"), early=("fwd", "few", "wide"), early_rows=0,
    ),
    Kernel(
        HALVES[1], f"{_PACKAGE}.halves", _TRANSPOSED, ("BT", "BN", "BK", "STAGES", "TWO"), ("bwd", "few", "wide"), lowered=False, dtypes=("bf16",),
        optional=("bwd", "few", "wide"),
    ),
    Kernel(
        "feedback_inverse", f"{_PACKAGE}.inverse", _COMBINE, ("CHUNK", "BACKWARD"), ("fwd", "bwd"), dtypes=("bf16",), scalar_loads=128, optional=("fwd", "bwd")
    ),
    Kernel("feedback_near", f"{_PACKAGE}.inverse", _COMBINE, ("BACKWARD", "PDL"), ("fwd", "bwd"), dtypes=("bf16",), scalar_loads=128, optional=("fwd", "bwd"),
           opens=("fwd",)),
    Kernel("feedback_inverse_half", f"{_PACKAGE}.inverse_half", _COMBINE, ("CHUNK",), ("fwd",), dtypes=("fp16",), scalar_loads=128, optional=("fwd",)),
    Kernel("feedback_near_half", f"{_PACKAGE}.inverse_half", _COMBINE, ("BT",), ("fwd",), dtypes=("fp16",), scalar_loads=128, optional=("fwd",)),
    Kernel(
        "feedback_grad_pack",
        f"{_PACKAGE}.gradients",
        (
            *pointers("x", "x_low", "past"),
            Param("past_length", "*i32"),
            *pointers("q", "k"),
            Param("lse", "*fp32"),
            Param("bad", "*i32"),
            *pointers("y", "y_low", type="*work"),
            Param("y_scale", "*fp32"),
            *integers("T", "P"),
            *(Param(n, "i32", True) for n in ("D", "C")),
            *integers("first", "row0", "look"),
        ),
        ("BT", "BN", "SPLIT", "FULL"), ("bwd",), lowered=False,
    ),
    Kernel(
        "feedback_grad_products",
        f"{_PACKAGE}.gradients",
        (
            *pointers("u", "u_low", type="*work"),
            Param("u_scale", "*fp32"),
            *pointers("s", "s_low", type="*work"),
            *pointers("s_scale", type="*fp32"),
            Param("past_length", "*i32"),
            Param("bad", "*i32"),
            *pointers("e", type="*work"),
            *pointers("r", type="*product"),
            Param("r_scales", "*fp32"),
            *pointers("r_sums", type="*fp32"),
            *integers("T"),
            *(Param(n, "i32", True) for n in ("D", "C", "R")),
            *integers("NP", "NT", "row0"),
        ),
        ("BM", "BT", "BK", "NB", "GROUP", "SPLIT", "FULL"), ("bwd",), lowered=False,
    ),
    Kernel(
        "feedback_grad_scores",
        f"{_PACKAGE}.gradients",
        (
            *pointers("e", type="*work"),
            *pointers("r", type="*product"),
            Param("r_scales", "*fp32"),
            *pointers("r_sums", "factor", "inverse_sum", type="*fp32"),
            *pointers("grad"),
            Param("grad_scales", "*fp32"),
            Param("dgamma", "*fp32"),
            Param("past_length", "*i32"),
            Param("bad", "*i32"),
            *integers("T"),
            *(Param(n, "i32", True) for n in ("C", "R")),
            *integers("NP", "NT", "row0", "each"),
        ),
        ("BM", "BT", "CHUNK", "SPLIT", "SCALED"), ("bwd",), lowered=False,
    ),
    Kernel(
        "feedback_grad_q",
        f"{_PACKAGE}.gradients",
        (
            *pointers("grad"),
            Param("grad_scales", "*fp32"),
            *pointers("k", "past_k"),
            Param("past_length", "*i32"),
            Param("bad", "*i32"),
            *pointers("dq"),
            *integers("T", "P"),
            *(Param(n, "i32", True) for n in ("D", "C", "R")),
            *integers("NP", "NT", "row0"),
            Param("scale", "fp32"),
        ),
        ("BT", "BN", "BK", "STAGES", "SCALED"), ("bwd",), lowered=False,
    ),
    Kernel(
        "feedback_grad_k",
        f"{_PACKAGE}.gradients",
        (
            *pointers("grad"),
            Param("grad_scales", "*fp32"),
            *pointers("q"),
            Param("past_length", "*i32"),
            Param("bad", "*i32"),
            *pointers("carry", type="*fp32"),
            *pointers("dk", "dpast_k"),
            *integers("T", "P"),
            *(Param(n, "i32", True) for n in ("D", "C", "R")),
            *integers("NP", "NT", "row0", "blocks", "add"),
            Param("scale", "fp32"),
        ),
        ("BT", "BN", "BK", "STAGES", "SCALED"), ("bwd",), lowered=False,
    ),
    Kernel(
        "feedback_grad_qk",
        f"{_PACKAGE}.gradients",
        (
            *pointers("grad"),
            Param("grad_scales", "*fp32"),
            *pointers("q", "k"),
            Param("past_length", "*i32"),
            Param("bad", "*i32"),
            *pointers("dq", "dk"),
            *integers("T"),
            *(Param(n, "i32", True) for n in ("D", "C", "R")),
            *integers("NT", "blocks"),
            Param("scale", "fp32"),
        ),
        ("BT", "BN", "BK", "STAGES", "SCALED"), ("bwd", "few"), lowered=False,
    ),
))  # fmt: skip


MANY_WORK = 40 << 20  # B T^2 from which there are tiles of 128 x 256 enough (measured on an H200)
WIDE_BACKWARD = 2048  # D from which the backward's solve is not the one in halves (measured on an H200)


def solver(arch: int, dtype: str, side: str, width: int = 0) -> str:
    """The kernel that solves at D = width, of a side ("fwd" or "bwd"): the one in halves where its tiles are pinned for exactly this architecture.

    Not in the backward of wide rows, where the other is 7% faster (1, 8192, 2048). The bits differ: it never depends on B or T.
    """
    plain, halves = ("feedback_solve", HALVES[0]) if side == "fwd" else ("feedback_solve_transposed", HALVES[1])
    return halves if all_pinned((halves,), arch, dtype, side) and (side == "fwd" or width < WIDE_BACKWARD) else plain


def solve_variant(arch: int, dtype: str, width: int, side: str, rows: int = 0, batch: int = 1) -> str:
    """"wide", "few" or `side` ("fwd" or "bwd"): wide tiles read less for a product, narrow ones make a shorter chain, which few columns of D expose; few are
    those of a chain that leaves multiprocessors idle. rows: B T; 0: it depends on D alone.

    A tile's width changes nothing in a row's sums but the power of two that s has between blocks, and that no bit unless a value is 2^29 times smaller than
    the largest of its tile.
    """
    name = solver(arch, dtype, side, width)
    resolved = max((a for a in ARCHS if a <= arch and table.has(name, a, dtype, side)), default=arch)
    if name in HALVES:
        many = batch * width >= WIDE_COLUMNS or (side == "fwd" and rows * width >= LONG_WORK)
        chosen = "few" if 0 < rows * width < FEW_WORK else "wide" if many else side
    else:
        chosen = "wide" if (rows * width >= WIDE_WORK if rows else width >= WIDE) else side
    return chosen if table.has(name, resolved, dtype, chosen) else side


def scores_many(arch: int, dtype: str, side: str, batch: int, tokens: int) -> bool:
    """Whether MANY makes the scores of so many rows without a past, of a side ("fwd" or "bwd"): the same bits, so B and T may decide."""
    return batch * tokens * tokens >= MANY_WORK and all_pinned((MANY,), arch, dtype, side)


def scores_past(arch: int, dtype: str, batch: int, tokens: int) -> bool:
    """Whether MANY_PAST makes the scores of so many rows behind a past: likewise."""
    return tokens >= PAST_ROWS and batch * tokens >= PAST_WORK and all_pinned((MANY_PAST,), arch, dtype, "fwd")


def pack_variant(solve: str) -> str:
    """The variant of feedback_pack that goes with one of the forward's solve: of as many columns."""
    return solve if solve == "wide" else "fwd"


def all_pinned(names: tuple[str, ...], arch: int, dtype: str, variant: str) -> bool:
    """Whether this architecture has tiles of all these kernels, which then stand in for another: in the plugin too, and never by B or T, since bits differ."""
    return all(table.has(name, arch, dtype, variant) for name in names)


def together_variant(arch: int, dtype: str, work: int = 0) -> str | None:
    """The variant of feedback_grad_qk for B T D = work (0: as much as may be); None where it was not timed, and stands in for nothing."""
    name, variants = "feedback_grad_qk", ("few", "bwd") if 0 < work < FEW_WORK else ("bwd",)
    variant = next((v for v in variants if table.has(name, arch, dtype, v)), None)
    return variant if variant is not None and table.tuned(name, arch, dtype, variant) else None

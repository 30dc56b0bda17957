"""The Triton kernels as data: parameters in order with types and alignment promises, constexprs, variants. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("fp32", "fp16", "bf16")
SCALARS = ("i32", "i64", "fp32")


@dataclass(frozen=True)
class Param:
    """One run-time parameter. type: a pointer "*fp32", "*i32", ... or a scalar "i32", "i64", "fp32"; "*storage" points to the storage dtype, and
    DERIVED names the others that follow it.

    divisible: promised to be a multiple of 16 (a pointer in bytes, an integer as it is). Integers without the promise are not specialised.
    """

    name: str
    type: str
    divisible: bool = False


@dataclass(frozen=True)
class Kernel:
    """A @triton.jit function: where it lives, its run-time parameters in order, then its constexpr names.

    variants: the keys of its pinned tiles, one binary for each (a number stands for a width, "bwd" for the backward). early: those whose binary may start
    before its predecessor ends, by the constexpr "PDL", which is no tile; early_rows: up to how many rows (B T) the plugin has it do so. lowered: whether
    the plugin runs it; it never runs a "bwd" variant.
    dtypes: the storage dtypes it is compiled for; a kernel that sees no storage type has ("fp32",). scalar_loads: how many global loads
    narrower than 16 bytes its PTX may hold (a length, a gain, a statistic); lowering refuses more. wide: it must hold 16-byte loads too;
    not so where nobody promises that a row begins aligned.
    """

    name: str
    module: str
    params: tuple[Param, ...]
    constexprs: tuple[str, ...]
    variants: tuple[str, ...]
    lowered: bool = True
    dtypes: tuple[str, ...] = DTYPES
    scalar_loads: int = 0
    wide: bool = True
    early: tuple[str, ...] = ()
    early_rows: int = 16  # kernels of more rows are longer, and hold places that their predecessors need (measured on an H200)

    def __post_init__(self) -> None:
        for p in self.params:
            if not p.type.startswith("*") and p.type not in SCALARS:
                raise ValueError(f"{self.name}.{p.name}: type {p.type!r} is neither a pointer nor one of {SCALARS}")


STEP_WIDTHS = ("256", "512", "1024", "2048", "4096")  # rows of the decode step, padded to the next of these


def pointers(*names: str, type: str = "*storage") -> tuple[Param, ...]:
    """Aligned pointer parameters."""
    return tuple(Param(n, type, True) for n in names)


def integers(*names: str) -> tuple[Param, ...]:
    """32-bit integers that select no binary."""
    return tuple(Param(n, "i32") for n in names)


# Types that follow the storage dtype: "work" of routing tiles and of s between blocks, "half_pair" of a block inverse's two halves,
# "product" of u . s in the backward.
DERIVED = {
    "fp32": {"storage": "fp32", "work": "fp32", "half_pair": "fp32", "product": "fp32"},
    "fp16": {"storage": "fp16", "work": "fp16", "half_pair": "bf16", "product": "fp32"},
    "bf16": {"storage": "bf16", "work": "fp16", "half_pair": "bf16", "product": "fp16"},
}


def resolve(type: str, dtype: str) -> str:
    """Triton's name of a parameter type for a storage dtype, e.g. "*work" and "bf16" -> "*fp16"."""
    return "*" + DERIVED[dtype].get(type[1:], type[1:]) if type.startswith("*") else type


KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (
        Kernel(
            "feedback_step_partial",
            "sessa_deploy.kernels.feedback_step",
            (
                *pointers("q", "past_k", "past_s"),
                Param("past_length", "*i32"),
                *pointers("part", "stat", type="*fp32"),
                Param("stride_kb", "i64", True),
                Param("stride_kr", "i32", True),
                Param("stride_sb", "i64", True),
                Param("stride_sr", "i32", True),
                *integers("batch", "splits", "capacity"),
                Param("width", "i32", True),
                Param("scale", "fp32"),
            ),
            ("BLOCK_R", "BLOCK_C", "BLOCK_L", "STAGES", "TILES", "OWN", "PDL"),
            STEP_WIDTHS,
            scalar_loads=6,
            early=STEP_WIDTHS,
        ),
        Kernel(
            "feedback_step_combine",
            "sessa_deploy.kernels.feedback_step",
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
            "feedback_pack",
            "sessa_deploy.kernels.feedback_fwd",
            (
                *pointers("past_s"),
                Param("past_length", "*i32"),
                *pointers("w", "w_low", type="*work"),
                Param("scales", "*fp32"),
                Param("P", "i32"),
                Param("D", "i32", True),
                Param("C", "i32", True),
            ),
            ("BT", "BN", "SPLIT"),
            ("fwd", "wide"),
            scalar_loads=2,
        ),
        Kernel(
            "feedback_scores",
            "sessa_deploy.kernels.feedback_tiles",
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
            ("BM", "BT", "BK", "NB", "GROUP", "BACKWARD"),
            ("fwd", "bwd"),
            scalar_loads=8,
        ),
        Kernel(
            "feedback_combine",
            "sessa_deploy.kernels.feedback_tiles",
            (
                *pointers("e", type="*work"),
                *pointers("peak", "total", type="*fp32"),
                Param("gamma", "*fp32"),
                Param("past_length", "*i32"),
                *pointers("row_peak", "gain", type="*fp32"),
                Param("lse", "*fp32"),
                *pointers("x", type="*fp32"),
                *pointers("inverse", "inverse_low", type="*half_pair"),
                *pointers("near", "near_low", type="*work"),
                *pointers("near_scale", type="*fp32"),
                *integers("T"),
                *(Param(n, "i32", True) for n in ("C", "R")),
                *integers("NP", "NT", "row0", "B", "blocks"),
            ),
            ("BT", "CHUNK", "BACKWARD", "SPLIT"),
            ("fwd", "bwd"),
            scalar_loads=128,
        ),
        Kernel(
            "feedback_solve",
            "sessa_deploy.kernels.feedback_fwd",
            (
                *pointers("e", type="*work"),
                *pointers("peak", "row_peak", "gain", type="*fp32"),
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
            ),
            ("BT", "BN", "STAGES", "SPLIT", "FULL", "LOW"),
            ("fwd", "wide"),
            scalar_loads=64,
        ),
        Kernel(
            "feedback_solve_transposed",
            "sessa_deploy.kernels.feedback_bwd",
            (
                *pointers("e", type="*work"),
                *pointers("gain", type="*fp32"),
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
            ),
            ("BT", "BN", "STAGES", "SPLIT", "FULL", "LOW"),
            ("bwd", "wide"),
            lowered=False,
        ),
        Kernel(
            "feedback_first_bad",
            "sessa_deploy.kernels.feedback_grad",
            (*pointers("q", "k", "s"), Param("bad", "*i32"), *integers("T"), Param("D", "i32", True)),
            ("BT", "BN"),
            ("bwd",),
            lowered=False,
        ),
        Kernel(
            "feedback_grad_pack",
            "sessa_deploy.kernels.feedback_grad",
            (
                *pointers("x", "x_low", "past"),
                Param("past_length", "*i32"),
                Param("bad", "*i32"),
                *pointers("y", "y_low", type="*work"),
                Param("y_scale", "*fp32"),
                *integers("T", "P"),
                *(Param(n, "i32", True) for n in ("D", "C")),
                *integers("first", "row0"),
            ),
            ("BT", "BN", "SPLIT", "FULL"),
            ("bwd",),
            lowered=False,
        ),
        Kernel(
            "feedback_grad_products",
            "sessa_deploy.kernels.feedback_grad",
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
            ("BM", "BT", "BK", "NB", "GROUP", "SPLIT", "FULL"),
            ("bwd",),
            lowered=False,
        ),
        Kernel(
            "feedback_grad_scores",
            "sessa_deploy.kernels.feedback_grad",
            (
                *pointers("e", type="*work"),
                *pointers("r", type="*product"),
                Param("r_scales", "*fp32"),
                *pointers("r_sums", "gain", "inverse_sum", type="*fp32"),
                *pointers("grad"),
                Param("grad_scales", "*fp32"),
                Param("dgamma", "*fp32"),
                Param("past_length", "*i32"),
                Param("bad", "*i32"),
                *integers("T"),
                *(Param(n, "i32", True) for n in ("C", "R")),
                *integers("NP", "NT", "row0"),
            ),
            ("BM", "BT", "CHUNK", "TILES", "SPLIT", "SCALED"),
            ("bwd",),
            lowered=False,
        ),
        Kernel(
            "feedback_grad_q",
            "sessa_deploy.kernels.feedback_grad",
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
            ("BT", "BN", "BK", "STAGES", "SCALED"),
            ("bwd",),
            lowered=False,
        ),
        Kernel(
            "feedback_grad_k",
            "sessa_deploy.kernels.feedback_grad",
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
            ("BT", "BN", "BK", "STAGES", "SCALED"),
            ("bwd",),
            lowered=False,
        ),
    )
}

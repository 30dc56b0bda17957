"""A Triton kernel as data: its run-time parameters in order with types and alignment promises, constexprs, variants. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sessa_deploy.kernels.launch.limits import PRODUCT_ROWS

DTYPES = ("fp32", "fp16", "bf16")
QUANTISED = {".i8": "i8", ".f8": "fp8e4nv"}  # what a storage dtype's name ends in where weights are 8 bits -> their type: "fp16.i8"
SCALARS = ("i32", "i64", "fp32")
WAITS, OPENS = 1, 2  # the constexpr "PDL" of a kernel that may start early: it lets the next one in behind its own wait, or before


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
    before its predecessor ends, by the constexpr "PDL", which is no tile; opens: those that let the next kernel in at once (OPENS), which must read nothing
    but weights and pasts before its own wait, or what neither they nor those before them write; shares: those of them that wish for `limits.SHARED_SHARE` of
    shared memory, fills: that wish for `limits.WIDE_SHARE` on the architecture that it is for; early_rows, early_rows_8: up to how many rows (B T) the plugin
    has it do so. lowered: whether the plugin runs it; it never runs a "bwd" variant.
    dtypes: the storage dtypes it is compiled for, those of QUANTISED weights too; a kernel that sees no storage type has ("fp32",). scalar_loads: how many
    global loads narrower than 16 bytes its PTX may hold (a length, a bias, a statistic); lowering refuses more. wide: it must hold 16-byte loads too;
    not so where nobody promises that a row begins aligned. optional: variants that an architecture has only where its own tiles are pinned, since the shared
    memory of others is too small; who launches them asks (`jit.available`) and has another way. scratch: bytes of global memory that each program is given for
    the tensor descriptors it makes, of which Triton says how many (128 each).
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
    always_early: tuple[str, ...] = ()  # those of them that the plugin has do so whatever their rows
    opens: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    fills: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    scratch: int = 0
    early_rows: int = 16  # kernels of more rows are longer, and hold places that their predecessors need (measured on an H200)
    early_rows_8: int = 0  # the same where weights are of 8 bits; 0: no other number

    def __post_init__(self) -> None:
        for p in self.params:
            if not p.type.startswith("*") and p.type not in SCALARS:
                raise ValueError(f"{self.name}.{p.name}: type {p.type!r} is neither a pointer nor one of {SCALARS}")

    def rows_of(self, variant: str) -> int:
        """`early_rows` of a variant that may start early."""
        return PRODUCT_ROWS[-1] if variant in self.always_early else self.early_rows


def pointers(*names: str, type: str = "*storage") -> tuple[Param, ...]:
    """Aligned pointer parameters."""
    return tuple(Param(n, type, True) for n in names)


def integers(*names: str) -> tuple[Param, ...]:
    """32-bit integers that select no binary."""
    return tuple(Param(n, "i32") for n in names)


def by_name(kernels: Iterable[Kernel]) -> dict[str, Kernel]:
    """What a family's spec calls KERNELS."""
    return {k.name: k for k in kernels}


# Types that follow the storage dtype: "weight" of a matrix of weights, "work" of routing tiles and of s between blocks, "half_pair" of a block inverse's
# two halves, "product" of u . s in the backward.
DERIVED = {
    "fp32": {"storage": "fp32", "weight": "fp32", "work": "fp32", "half_pair": "fp32", "product": "fp32"},
    "fp16": {"storage": "fp16", "weight": "fp16", "work": "fp16", "half_pair": "bf16", "product": "fp32"},
    "bf16": {"storage": "bf16", "weight": "bf16", "work": "fp16", "half_pair": "bf16", "product": "fp16"},
}
DERIVED |= {dtype + kind: {**DERIVED[dtype], "weight": weight} for dtype in ("fp16", "bf16") for kind, weight in QUANTISED.items()}


def resolve(type: str, dtype: str) -> str:
    """Triton's name of a parameter type for a storage dtype, e.g. "*work" and "bf16" -> "*fp16", "*weight" and "bf16.i8" -> "*i8"."""
    return "*" + DERIVED[dtype].get(type[1:], type[1:]) if type.startswith("*") else type

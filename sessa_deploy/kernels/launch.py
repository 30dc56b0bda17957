"""How every Triton kernel is launched: parameters, alignment promises and pinned tiles, for the JIT and for lowering alike.

Both sides read this file, so that what the JIT launches is the binary that `sessa_deploy.plugins.lower` wrote: the decorator takes
`do_not_specialize(kernel)`, the call takes `options(kernel, arch, dtype, variant)`, and lowering takes `signature`, `divisible` and the
same options. A parameter promised divisible by 16 must be so at every launch (pointers too), or Triton emits scalar loads and no cp.async.
The tiles live in launch_table.json, which benchmarks/tune.py rewrites. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

TABLE_FILE = Path(__file__).with_name("launch_table.json")
ARCHS = (80, 86, 87, 89, 90, 100, 120)
DTYPES = ("fp32", "fp16", "bf16")
ALIGNMENT = 16  # bytes for a pointer, elements for a width or stride
# Largest dynamic shared memory one block may ask for, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
SCALARS = ("i32", "i64", "fp32")
NOT_TILES = ("arch", "dtype", "variant", "tuned", "num_warps", "num_stages", "maxnreg", "spills")


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

    variants: the keys of its pinned tiles, one binary for each (a number stands for a width, "bwd" for the backward).
    lowered: whether the plugin runs it; it never runs a "bwd" variant.
    dtypes: the storage dtypes it is compiled for; a kernel that sees no storage type has ("fp32",). scalar_loads: how many global loads
    narrower than 16 bytes its PTX may hold (a length, a gain, a statistic); lowering refuses more.
    """

    name: str
    module: str
    params: tuple[Param, ...]
    constexprs: tuple[str, ...]
    variants: tuple[str, ...]
    lowered: bool = True
    dtypes: tuple[str, ...] = DTYPES
    scalar_loads: int = 0

    def __post_init__(self) -> None:
        for p in self.params:
            if not p.type.startswith("*") and p.type not in SCALARS:
                raise ValueError(f"{self.name}.{p.name}: type {p.type!r} is neither a pointer nor one of {SCALARS}")


def pointers(*names: str, type: str = "*storage") -> tuple[Param, ...]:
    """Aligned pointer parameters."""
    return tuple(Param(n, type, True) for n in names)


def integers(*names: str) -> tuple[Param, ...]:
    """32-bit integers that select no binary."""
    return tuple(Param(n, "i32") for n in names)


# Types that follow the storage dtype: "work" of routing tiles and of s between blocks, "half_pair" of a block inverse's two halves.
DERIVED = {
    "fp32": {"storage": "fp32", "work": "fp32", "half_pair": "fp32"},
    "fp16": {"storage": "fp16", "work": "fp16", "half_pair": "bf16"},
    "bf16": {"storage": "bf16", "work": "fp16", "half_pair": "bf16"},
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
                Param("capacity", "i32"),
                Param("width", "i32", True),
                Param("scale", "fp32"),
            ),
            ("BLOCK_R", "BLOCK_C", "BLOCK_L", "STAGES"),
            ("256", "512", "1024", "2048", "4096"),
            scalar_loads=2,
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
            ("BLOCK_S", "BLOCK_D"),
            ("128",),
            scalar_loads=8,
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
            ("fwd",),
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
            ("BM", "BT", "BK", "GROUP", "BACKWARD"),
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
                *integers("T"),
                *(Param(n, "i32", True) for n in ("C", "R")),
                *integers("NP", "NT", "row0"),
            ),
            ("BT", "CHUNK", "BACKWARD", "SPLIT", "PRECISION"),
            ("fwd", "bwd"),
            scalar_loads=64,
        ),
        Kernel(
            "feedback_solve",
            "sessa_deploy.kernels.feedback_fwd",
            (
                *pointers("e", type="*work"),
                *pointers("peak", "row_peak", "gain", type="*fp32"),
                *pointers("inverse", "inverse_low", type="*half_pair"),
                *pointers("f", "s"),
                *pointers("w", "w_low", type="*work"),
                Param("scales", "*fp32"),
                Param("past_length", "*i32"),
                Param("sync", "*i32"),
                *integers("T"),
                *(Param(n, "i32", True) for n in ("D", "C", "R")),
                *integers("NP", "NT", "row0", "B", "panel", "panels", "near"),
            ),
            ("BT", "BN", "STAGES", "SPLIT"),
            ("fwd",),
            scalar_loads=64,
        ),
    )
}


def kernel(name: str) -> Kernel:
    """The description of one kernel; KeyError names the known ones."""
    if name not in KERNELS:
        raise KeyError(f"no kernel {name!r}; known: {', '.join(KERNELS)}")
    return KERNELS[name]


def do_not_specialize(name: str) -> list[str]:
    """Parameters whose values must not select a binary: all that carry no promise, pointers included."""
    return [p.name for p in kernel(name).params if not p.divisible]


def signature(name: str, dtype: str) -> dict[str, str]:
    """Triton's types of the parameters in order, constexprs last, for storage dtype "fp32", "fp16" or "bf16"."""
    k = kernel(name)
    types = {p.name: resolve(p.type, dtype) for p in k.params}
    return {**types, **dict.fromkeys(k.constexprs, "constexpr")}


def divisible(name: str) -> list[int]:
    """Positions of the parameters that carry Triton's tt.divisibility = 16."""
    return [i for i, p in enumerate(kernel(name).params) if p.divisible]


@lru_cache(maxsize=1)
def _table() -> dict[tuple[str, int, str, str], dict[str, Any]]:
    rows: dict[tuple[str, int, str, str], dict[str, Any]] = {}
    for name, entries in json.loads(TABLE_FILE.read_text(encoding="utf-8"))["kernels"].items():
        for entry in entries:
            for arch in entry["arch"]:
                for dtype in entry["dtype"]:
                    key = (name, arch, dtype, entry["variant"])
                    if key in rows:
                        raise ValueError(f"{TABLE_FILE.name} pins {key} twice")
                    rows[key] = entry
    return rows


def pinned(name: str, arch: int, dtype: str, variant: str) -> dict[str, Any]:
    """The table's entry. An architecture that has none takes the next lower one's that fits its family (103 -> 100, 121 -> 120).

    Raises KeyError where no architecture at or below `arch` is pinned.
    """
    table = _table()
    for candidate in sorted((a for a in ARCHS if a <= arch), reverse=True):
        entry = table.get((name, candidate, dtype, variant))
        if entry is not None:
            return entry
    raise KeyError(f"{TABLE_FILE.name} pins no tiles for {name}, sm_{arch}, {dtype}, variant {variant}")


def options(name: str, arch: int, dtype: str, variant: str) -> dict[str, Any]:
    """Keyword arguments of a launch: the constexpr tiles, num_warps and num_stages (and maxnreg where pinned)."""
    entry = pinned(name, arch, dtype, variant)
    extra = {"maxnreg": entry["maxnreg"]} if entry.get("maxnreg") else {}
    return {**tiles(name, arch, dtype, variant), "num_warps": entry["num_warps"], "num_stages": entry["num_stages"], **extra}


def tiles(name: str, arch: int, dtype: str, variant: str) -> dict[str, Any]:
    """The constexprs alone, in the kernel's order."""
    entry = pinned(name, arch, dtype, variant)
    values = {k: v for k, v in entry.items() if k not in NOT_TILES}
    if set(values) != set(kernel(name).constexprs):
        raise ValueError(f"{TABLE_FILE.name}: {name} takes {kernel(name).constexprs}, the table gives {tuple(values)}")
    return {k: values[k] for k in kernel(name).constexprs}


def tuned(name: str, arch: int, dtype: str, variant: str) -> bool:
    """Whether the tiles were measured on that architecture, as against being the largest that fit."""
    return bool(pinned(name, arch, dtype, variant)["tuned"])


def width_variant(name: str, width: int) -> str:
    """The smallest variant, read as an integer, that covers `width`. Raises ValueError beyond the largest."""
    for v in sorted(kernel(name).variants, key=int):
        if int(v) >= width:
            return v
    raise ValueError(f"{name} has no variant that covers width {width}; the largest is {max(kernel(name).variants, key=int)}")


# --- decode step: how the past is split. Depends on capacity and tiles only, never on the batch, the lengths or the number of SMs.
STEP_MAX_SPLITS = 128


def step_splits(capacity: int, rows: int) -> int:
    """Splits of a past of `capacity` rows, in tiles of `rows`; split i reads tiles i, i + splits, i + 2 * splits, ..."""
    return max(1, min(STEP_MAX_SPLITS, -(-capacity // rows)))


def pin(name: str, arch: int, dtypes: list[str], variant: str, entry: dict[str, Any], tuned: bool = True) -> None:
    """Rewrite launch_table.json so that (arch, dtypes, variant) of a kernel has these tiles, warps and stages; other entries stay."""
    table = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    kept = []
    for row in table["kernels"].setdefault(name, []):
        if row["variant"] == variant and arch in row["arch"] and set(dtypes) & set(row["dtype"]):
            others = [a for a in row["arch"] if a != arch]
            rest = [d for d in row["dtype"] if d not in dtypes]
            kept += [{**row, "arch": others}] if others else []
            kept += [{**row, "arch": [arch], "dtype": rest}] if rest else []
        else:
            kept.append(row)
    kept.append({"arch": [arch], "dtype": dtypes, "variant": variant, **entry, "tuned": tuned})
    table["kernels"][name] = sorted(kept, key=lambda r: (len(r["variant"]), r["variant"], r["dtype"], r["arch"]))
    body = ",\n".join(f' {json.dumps(k)}: [\n' + ",\n".join(f"  {json.dumps(r)}" for r in rows) + "\n ]" for k, rows in table["kernels"].items())
    TABLE_FILE.write_text(f'{{"kernels": {{\n{body}\n}}}}\n', encoding="utf-8")
    _table.cache_clear()

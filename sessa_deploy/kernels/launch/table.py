"""How every Triton kernel is launched: parameters, alignment promises and pinned tiles, for the JIT and for lowering alike.

Both sides read this file, so that what the JIT launches is the binary that `sessa_deploy.plugins.lower` wrote: the decorator takes
`do_not_specialize(kernel)`, the call takes `options(kernel, arch, dtype, variant)`, and lowering takes `signature`, `divisible` and the
same options. A parameter promised divisible by 16 must be so at every launch (pointers too), or Triton emits scalar loads and no cp.async.
A family is a folder beside this one with a spec.py (its KERNELS) and a tiles.json, which benchmarks/tune*.py rewrite. Standard library only.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from sessa_deploy.cuda_arch import ARCHS
from sessa_deploy.kernels.launch.limits import DEPENDENT_ARCH, SHARED_SHARE, WIDE_ARCH, WIDE_SHARE
from sessa_deploy.kernels.launch.spec import DTYPES, OPENS, WAITS, Kernel, resolve

TUNED_WITH = (3, 6)  # the Triton that tiles were measured with
NOT_TILES = ("arch", "dtype", "variant", "tuned", "num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "spills")
_HOUSE = Path(__file__).resolve().parents[1]
_PACKAGE = __name__.rpartition(".launch.")[0]


def _tiles_file(family: str) -> Path:
    return _HOUSE / family / "tiles.json"


@lru_cache(maxsize=1)
def families() -> dict[str, dict[str, Kernel]]:
    """Folder name -> its kernels, of every folder that has a spec."""
    names = sorted(p.parent.name for p in _HOUSE.glob("*/spec.py") if _tiles_file(p.parent.name).is_file())
    return {name: import_module(f"{_PACKAGE}.{name}.spec").KERNELS for name in names}


@lru_cache(maxsize=1)
def kernels() -> dict[str, Kernel]:
    """Every kernel that has pinned tiles, by name."""
    return {name: k for family in families().values() for name, k in family.items()}


def kernel(name: str) -> Kernel:
    """The description of one kernel; KeyError names the known ones."""
    if name not in kernels():
        raise KeyError(f"no kernel {name!r}; known: {', '.join(kernels())}")
    return kernels()[name]


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
def _entries() -> dict[tuple[str, int, str, str], dict[str, Any]]:
    rows: dict[tuple[str, int, str, str], dict[str, Any]] = {}
    tables = [json.loads(_tiles_file(family).read_text(encoding="utf-8"))["kernels"] for family in families()]
    for name, entries in (item for table in tables for item in table.items()):
        for entry in entries:
            for arch in entry["arch"]:
                for dtype in entry["dtype"]:
                    key = (name, arch, dtype, entry["variant"])
                    if key in rows:
                        raise ValueError(f"the launch tables pin {key} twice")
                    rows[key] = entry
    return rows


def pinned(name: str, arch: int, dtype: str, variant: str) -> dict[str, Any]:
    """The table's entry. An architecture that has none takes the next lower one's that has (103 -> 100, 121 -> 120).

    Raises KeyError where no architecture at or below `arch` is pinned.
    """
    for candidate in sorted((a for a in ARCHS if a <= arch), reverse=True):
        entry = _entries().get((name, candidate, dtype, variant))
        if entry is not None:
            return entry
    raise KeyError(f"the launch tables pin no tiles for {name}, sm_{arch}, {dtype}, variant {variant}")


def options(name: str, arch: int, dtype: str, variant: str) -> dict[str, Any]:
    """Keyword arguments of a launch: the constexpr tiles, num_warps and num_stages (maxnreg and enable_fp_fusion where pinned)."""
    entry = pinned(name, arch, dtype, variant)
    extra = {k: entry[k] for k in ("maxnreg", "enable_fp_fusion") if entry.get(k) is not None}
    return {**tiles(name, arch, dtype, variant), "num_warps": entry["num_warps"], "num_stages": entry["num_stages"], **extra}


def tiles(name: str, arch: int, dtype: str, variant: str) -> dict[str, Any]:
    """The constexprs alone, in the kernel's order."""
    entry = pinned(name, arch, dtype, variant)
    values = {k: v for k, v in entry.items() if k not in NOT_TILES}
    if kernel(name).early or kernel(name).opens:
        how = OPENS if variant in kernel(name).opens else WAITS if variant in kernel(name).early else 0
        values["PDL"] = how if arch >= DEPENDENT_ARCH else 0
    if set(values) != set(kernel(name).constexprs):
        raise ValueError(f"{name} takes {kernel(name).constexprs}, the table gives {tuple(values)}")
    return {k: values[k] for k in kernel(name).constexprs}


def early(name: str, arch: int, dtype: str, variant: str) -> int:
    """Rows (B T) up to which the plugin lets this binary start before its predecessor has ended; 0 where it cannot."""
    k = kernel(name)
    rows = (dtype not in DTYPES and k.early_rows_8) or k.rows_of(variant)
    return rows if k.early and tiles(name, arch, dtype, variant)["PDL"] else 0


def shared_share(name: str, arch: int, dtype: str, variant: str) -> int:
    """Percent of shared memory that a binary wishes for, see `limits.SHARED_SHARE`; 0: all of it where it needs more than 48 KiB."""
    fills = variant in kernel(name).fills and arch == WIDE_ARCH
    share = WIDE_SHARE if fills else SHARED_SHARE if variant in kernel(name).shares else 0
    return share if early(name, arch, dtype, variant) else 0


def tuned(name: str, arch: int, dtype: str, variant: str) -> bool:
    """Whether the tiles were measured on that architecture (with Triton TUNED_WITH), as against being the largest that fit."""
    return bool(pinned(name, arch, dtype, variant)["tuned"])


def spills(name: str, arch: int, dtype: str, variant: str, version: tuple[int, int]) -> int:
    """Bytes that the binary may spill to local memory when this Triton compiles it. An entry states one number, or one for each version where they differ.

    Every version takes the same tiles; their compilers do not give the same registers.
    """
    stated = pinned(name, arch, dtype, variant).get("spills", 0)
    return int(stated.get(f"{version[0]}.{version[1]}", 0) if isinstance(stated, dict) else stated)


def has(name: str, arch: int, dtype: str, variant: str) -> bool:
    """Whether the tables pin this variant for exactly this architecture."""
    return (name, arch, dtype, variant) in _entries()


def width_variant(name: str, width: int) -> str:
    """The smallest variant, read as an integer, that covers `width`. Raises ValueError beyond the largest."""
    for v in sorted(kernel(name).variants, key=int):
        if int(v) >= width:
            return v
    raise ValueError(f"{name} has no variant that covers width {width}; the largest is {max(kernel(name).variants, key=int)}")


def pin(name: str, arch: int, dtypes: list[str], variant: str, entry: dict[str, Any], tuned: bool = True) -> None:
    """Rewrite the family's tiles so that (arch, dtypes, variant) of a kernel has these tiles, warps and stages; other entries stay."""
    file = _tiles_file(next(family for family, its in families().items() if name in its))
    table = json.loads(file.read_text(encoding="utf-8"))
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
    _write(file, table)
    _entries.cache_clear()


def _write(file: Path, table: dict[str, Any]) -> None:
    """Write tiles, an entry a line."""
    body = ",\n".join(f" {json.dumps(k)}: [\n" + ",\n".join(f"  {json.dumps(r)}" for r in rows) + "\n ]" for k, rows in table["kernels"].items())
    file.write_text(f'{{"kernels": {{\n{body}\n}}}}\n', encoding="utf-8")

"""How every Triton kernel is launched: parameters, alignment promises and pinned tiles, for the JIT and for lowering alike.

Both sides read this file, so that what the JIT launches is the binary that `sessa_deploy.plugins.lower` wrote: the decorator takes
`do_not_specialize(kernel)`, the call takes `options(kernel, arch, dtype, variant)`, and lowering takes `signature`, `divisible` and the
same options. A parameter promised divisible by 16 must be so at every launch (pointers too), or Triton emits scalar loads and no cp.async.
The tiles live in TABLE_FILES, which benchmarks/tune.py rewrites. Standard library only; `triton_version` alone imports Triton.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from sessa_deploy.errors import UserError
from sessa_deploy.kernels.launch_causal import CAUSAL_KERNELS
from sessa_deploy.kernels.launch_decode import DECODE_KERNELS
from sessa_deploy.kernels.launch_kernels import DTYPES, Kernel, Param, resolve  # noqa: F401 (the one place to look a launch up)
from sessa_deploy.kernels.launch_kernels import KERNELS as FEEDBACK_KERNELS
from sessa_deploy.kernels.launch_layer import LAYER_KERNELS
from sessa_deploy.kernels.launch_mixer import MIXER_KERNELS

KERNELS: dict[str, Kernel] = {**FEEDBACK_KERNELS, **CAUSAL_KERNELS, **LAYER_KERNELS, **MIXER_KERNELS, **DECODE_KERNELS}

# of the decode step, of the rest of feedback attention, of causal attention with a cache, of the runtime's own kernels, of the layer around them, of a mixer
TABLE_FILES = tuple(Path(__file__).with_name(f"launch_table{n}.json") for n in ("", "_feedback", "_causal", "_decode", "_layer", "_mixer"))
TRITON_VERSIONS = ((3, 6), (3, 7))  # each one's launch is known to feedback_launch.py, each one's hidden parameters and spills to lowering
TUNED_WITH = (3, 6)  # the Triton that the tiles were measured with
ARCHS = (80, 86, 87, 89, 90, 100, 120)
ALIGNMENT = 16  # bytes for a pointer, elements for a width or stride
# Largest dynamic shared memory one block may ask for, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
DEPENDENT_ARCH = 90  # first compute capability with programmatic dependent launch, which the variants that may start early are made for
NOT_TILES = ("arch", "dtype", "variant", "tuned", "num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "spills")


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton, one of TRITON_VERSIONS: what is asked before a kernel is compiled, launched or lowered.

    Binaries, and the private call that launches them, differ from minor to minor. Raises UserError for any other version, and without Triton.
    """
    from importlib import import_module

    try:
        version = str(import_module("triton").__version__)
    except ModuleNotFoundError as error:
        version = "none installed" if error.name == "triton" else f"one that needs {error.name}"
    except ImportError as error:
        version = f"one that does not load ({error})"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if found not in TRITON_VERSIONS:
        allowed = " and ".join(f"{major}.{minor}" for major, minor in TRITON_VERSIONS)
        first, (major, minor) = TRITON_VERSIONS[0], TRITON_VERSIONS[-1]
        raise UserError("the kernels cannot use this Triton", got=version, allowed=allowed,
                        fix=f"pip install 'triton>={first[0]}.{first[1]},<{major}.{minor + 1}'")  # fmt: skip
    return found


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
    tables = [json.loads(file.read_text(encoding="utf-8"))["kernels"] for file in TABLE_FILES]
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
    """The table's entry. An architecture that has none takes the next lower one's that fits its family (103 -> 100, 121 -> 120).

    Raises KeyError where no architecture at or below `arch` is pinned.
    """
    table = _table()
    for candidate in sorted((a for a in ARCHS if a <= arch), reverse=True):
        entry = table.get((name, candidate, dtype, variant))
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
    if kernel(name).early:
        values["PDL"] = arch >= DEPENDENT_ARCH and variant in kernel(name).early
    if set(values) != set(kernel(name).constexprs):
        raise ValueError(f"{name} takes {kernel(name).constexprs}, the table gives {tuple(values)}")
    return {k: values[k] for k in kernel(name).constexprs}


def early(name: str, arch: int, dtype: str, variant: str) -> int:
    """Rows (B T) up to which the plugin lets this binary start before its predecessor has ended; 0 where it cannot."""
    return kernel(name).early_rows if kernel(name).early and tiles(name, arch, dtype, variant)["PDL"] else 0


def tuned(name: str, arch: int, dtype: str, variant: str) -> bool:
    """Whether the tiles were measured on that architecture, as against being the largest that fit."""
    return bool(pinned(name, arch, dtype, variant)["tuned"])


def spills(name: str, arch: int, dtype: str, variant: str, version: tuple[int, int]) -> int:
    """Bytes that the binary may spill to local memory when this Triton compiles it. An entry states one number, or one for each version where they differ.

    Both versions take the same tiles; their compilers do not give the same registers.
    """
    stated = pinned(name, arch, dtype, variant).get("spills", 0)
    return int(stated.get(f"{version[0]}.{version[1]}", 0) if isinstance(stated, dict) else stated)


def has(name: str, arch: int, dtype: str, variant: str) -> bool:
    """Whether the tables pin this variant for exactly this architecture."""
    return (name, arch, dtype, variant) in _table()


WIDE = 1024  # D from which the solve takes the tiles of variant "wide", where an architecture has them


def solve_variant(arch: int, dtype: str, width: int, side: str) -> str:
    """"wide" or `side` ("fwd" or "bwd"): wide tiles read less for a product, narrow ones make a shorter chain, which few columns of D expose.

    Depends on D alone, so that a sequence's bits do not depend on its batch.
    """
    name = "feedback_solve" if side == "fwd" else "feedback_solve_transposed"
    resolved = max((a for a in ARCHS if a <= arch and has(name, a, dtype, side)), default=arch)
    return "wide" if width >= WIDE and has(name, resolved, dtype, "wide") else side


def width_variant(name: str, width: int) -> str:
    """The smallest variant, read as an integer, that covers `width`. Raises ValueError beyond the largest."""
    for v in sorted(kernel(name).variants, key=int):
        if int(v) >= width:
            return v
    raise ValueError(f"{name} has no variant that covers width {width}; the largest is {max(kernel(name).variants, key=int)}")


# --- decode step: how the past is split. Depends on capacity and tiles only, never on the batch, the lengths or the number of SMs.
STEP_MAX_SPLITS = 256


def step_splits(capacity: int, rows: int, most: int = STEP_MAX_SPLITS) -> int:
    """Splits that a past of `capacity` rows may have, of `rows` at least."""
    return max(1, min(most, -(-capacity // rows)))


STEP_PROGRAMS = 2112  # where the device does not say how many programs it holds


def step_programs(pieces: int, blocks: int, resident: int) -> int:
    """Programs that share `pieces` = B * splits splits of the batch, in each of `blocks` blocks of heads, on a device that holds `resident` at once.

    No more than it holds (but one for each block): a program that finds nothing to read costs a place behind those that work. Decides who computes a split,
    never its bits.
    """
    return min(pieces, max(1, resident // blocks))


def pin(name: str, arch: int, dtypes: list[str], variant: str, entry: dict[str, Any], tuned: bool = True) -> None:
    """Rewrite the kernel's launch table so that (arch, dtypes, variant) of a kernel has these tiles, warps and stages; other entries stay."""
    prefixes = {"feedback_step": 0, "causal_": 2, "decode_": 3, "layer_": 4, "mixer_": 5}
    file = TABLE_FILES[next((i for prefix, i in prefixes.items() if name.startswith(prefix)), 1)]
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
    body = ",\n".join(f' {json.dumps(k)}: [\n' + ",\n".join(f"  {json.dumps(r)}" for r in rows) + "\n ]" for k, rows in table["kernels"].items())
    file.write_text(f'{{"kernels": {{\n{body}\n}}}}\n', encoding="utf-8")
    _table.cache_clear()

"""Compile the plugin's kernels ahead of time: the training kernels' Triton source to one cubin for each arch, storage dtype and tile.

    python -m sessa_deploy.plugins.lower --out DIR

needs torch and Triton 3.6 or 3.7 (`jit.TRITON_VERSIONS`), and no GPU. DIR receives `<kernel>.sm<arch>.<dtype>.<variant>.cubin`,
`cubins.json` (every parameter in order, Triton's two hidden scratch pointers last, tiles, shared memory, warps, registers, spills) and
`cubins.inc`, the same table for the plugin's C++.
Exit code 1: a cubin needs more shared memory than its architecture has, spills more than its pinned entry states, or loads scalars where
vectors belong. Line information is left out, so that no path of the building machine is in a cubin.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sessa_deploy.cuda_arch import ARCHS, nearest
from sessa_deploy.errors import SessaError
from sessa_deploy.files import scratch, write_whole
from sessa_deploy.kernels.launch import jit, table
from sessa_deploy.kernels.launch.limits import ALIGNMENT, SHARED_LIMIT
from sessa_deploy.kernels.launch.spec import Kernel, resolve
from sessa_deploy.process import ending_cleanly

SCHEMA = 1
MANIFEST = "cubins.json"
TABLE = "cubins.inc"
HIDDEN = (("global_scratch", "*i8"), ("profile_scratch", "*i8"))  # what Triton 3.6 and 3.7 append to every kernel's parameters
LOAD = re.compile(r"\bld(?:\.volatile)?\.global(?:\.[A-Za-z0-9_:]+)*?(?:\.(v[248]))?\.([a-z]+)(\d+)\s")
KINDS = {"storage": "", "int8": ".i8", "fp8": ".f8"}  # of weights, on the command line -> what a dtype's name ends in (spec.QUANTISED)
ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\b[^;]*?,\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")


@dataclass(frozen=True, order=True)
class Unit:
    """One binary to make: a kernel for an architecture, a storage dtype (with the kind of its weights, as "fp16.i8") and a pinned variant."""

    kernel: str
    arch: int
    dtype: str
    variant: str

    @property
    def stem(self) -> str:
        return f"{self.kernel}.sm{self.arch}.{self.dtype}.{self.variant}"


@dataclass
class Cubin:
    """What cubins.json says of one binary. shared, spill_bytes in bytes; loads count the PTX's global loads by width."""

    kernel: str
    arch: int
    dtype: str
    variant: str
    file: str
    sha256: str
    size: int
    entry: str
    params: list[dict[str, Any]]
    tiles: dict[str, int | str]
    num_warps: int
    num_stages: int
    shared: int
    registers: int
    spill_bytes: int
    global_scratch: int
    vector_loads: int
    scalar_loads: int
    tuned: bool
    early_rows: int = 0
    shared_share: int = 0
    problems: list[str] = field(default_factory=list)


def units(archs: Sequence[int], kernels: Sequence[str] | None = None, weights: Sequence[str] | None = None) -> list[Unit]:
    """Every binary the plugin needs on these architectures, or those of the named kernels and of these KINDS of weights; without what an earlier
    architecture's binary serves."""
    chosen = [k for k in table.kernels().values() if k.lowered and (kernels is None or k.name in kernels)]
    kinds = {KINDS[name] for name in KINDS if weights is None or name in weights}
    found = [Unit(k.name, arch, dtype, v) for k in chosen for arch in archs for dtype in k.dtypes for v in k.variants if v != "bwd"]
    return [u for u in found if _kind(u) in kinds and _made(u) and served_by(u, archs) is None]


def _kind(unit: Unit) -> str:
    return "".join(unit.dtype.partition(".")[1:])


def _made(unit: Unit) -> bool:
    """Whether there is such a binary: weights of 8 bits, and optional variants, only where the architecture's own table has them."""
    always = not _kind(unit) and unit.variant not in table.kernel(unit.kernel).optional
    return always or table.has(unit.kernel, unit.arch, unit.dtype, unit.variant)


def served_by(unit: Unit, archs: Sequence[int]) -> int | None:
    """The one of `archs` whose binary the unit's architecture runs, as the very launch options are pinned for both; None: it needs its own.

    The plugin's C++ takes the nearest one by the same rule (cuda_arch.serves).
    """
    before = nearest([a for a in archs if a != unit.arch], unit.arch)
    if before is None:
        return None
    earlier = Unit(unit.kernel, before, unit.dtype, unit.variant)
    if not _made(earlier) or _options(earlier) != _options(unit):
        return None
    return served_by(earlier, archs) or before


def _options(unit: Unit) -> dict[str, Any]:
    return table.options(unit.kernel, unit.arch, unit.dtype, unit.variant)


def shared_limit(unit: Unit) -> int:
    """Bytes of shared memory that every architecture which this binary may serve has."""
    serves = [a for a in ARCHS if served_by(Unit(unit.kernel, a, unit.dtype, unit.variant), [unit.arch]) is not None]
    return min(SHARED_LIMIT[a] for a in (unit.arch, *serves))


def count_loads(ptx: str) -> tuple[int, int]:
    """(16-byte or wider, narrower) loads from global memory in PTX; bulk copies count as wide."""
    widths = [int(m[1][1:] if m[1] else 1) * int(m[3]) // 8 for m in LOAD.finditer(ptx)]
    widths += [int(m[1], 0) for m in ASYNC.finditer(ptx)]
    wide = sum(w >= 16 for w in widths) + len(re.findall(r"\bcp\.async\.bulk\b", ptx))
    return wide, sum(w < 16 for w in widths)


def ptxas_report(log: str) -> tuple[int, int]:
    """(registers, bytes of spill stores) from what `ptxas -v` printed. Raises ValueError if it says nothing."""
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise ValueError("ptxas reported no register count")
    return int(registers[1]), sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))


def source(unit: Unit) -> tuple[Any, dict[str, Any]]:
    """(Triton's ASTSource, launch options) of a unit, exactly what the JIT would compile. Imports triton and the kernel's module."""
    import importlib

    from triton.compiler import ASTSource

    description = table.kernel(unit.kernel)
    fn = getattr(importlib.import_module(description.module), unit.kernel)
    names = [*(p.name for p in description.params), *description.constexprs]
    if list(fn.arg_names) != names:
        raise ValueError(f"{unit.kernel} takes {fn.arg_names}, its spec describes {names}")
    tiles = table.tiles(unit.kernel, unit.arch, unit.dtype, unit.variant)
    options = {k: v for k, v in table.options(unit.kernel, unit.arch, unit.dtype, unit.variant).items() if k not in tiles}
    attrs = {(i,): [["tt.divisibility", ALIGNMENT]] for i in table.divisible(unit.kernel)}
    return ASTSource(fn, table.signature(unit.kernel, unit.dtype), constexprs=tiles, attrs=attrs), options


def compile_unit(unit: Unit, out: Path) -> Cubin:
    """Compile one unit into `out`. Runs in a process whose environment `_prepare` has set before triton was imported."""
    import contextlib
    import io

    import triton
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    src, options = source(unit)
    with contextlib.redirect_stdout(log), triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(src, target=GPUTarget("cuda", unit.arch, 32), options=options)
    registers, spill = ptxas_report(log.getvalue())
    vector, scalar = count_loads(kernel.asm["ptx"])
    binary, meta, description = kernel.asm["cubin"], kernel.metadata, table.kernel(unit.kernel)
    path = out / f"{unit.stem}.cubin"
    write_whole(path, binary, "--out", "the binary", sync=False)
    params = [{"name": p.name, "type": resolve(p.type, unit.dtype), "divisible": ALIGNMENT if p.divisible else 1} for p in description.params]
    params += [{"name": n, "type": t, "divisible": 1} for n, t in HIDDEN]
    declared = len(re.findall(r"^\s*\.param\b", kernel.asm["ptx"].split(".visible .entry", 1)[1].split(")", 1)[0], re.MULTILINE))
    cubin = Cubin(
        **asdict(unit), file=path.name, sha256=hashlib.sha256(binary).hexdigest(), size=len(binary), entry=meta.name, params=params,
        tiles=table.tiles(unit.kernel, unit.arch, unit.dtype, unit.variant), num_warps=meta.num_warps, num_stages=options["num_stages"], shared=meta.shared,
        registers=registers, spill_bytes=spill, global_scratch=meta.global_scratch_size or 0, vector_loads=vector, scalar_loads=scalar,
        tuned=table.tuned(unit.kernel, unit.arch, unit.dtype, unit.variant), early_rows=table.early(unit.kernel, unit.arch, unit.dtype, unit.variant),
        shared_share=table.shared_share(unit.kernel, unit.arch, unit.dtype, unit.variant),
    )  # fmt: skip
    allowed = table.spills(unit.kernel, unit.arch, unit.dtype, unit.variant, jit.triton_version())
    cubin.problems = problems(cubin, declared, allowed, description)
    return cubin


def problems(cubin: Cubin, declared: int, spills: int, kernel: Kernel) -> list[str]:
    """What is wrong with a binary of a kernel, each as one line: shared memory, spills, scalar loads, parameters, scratch."""
    limit = shared_limit(Unit(cubin.kernel, cubin.arch, cubin.dtype, cubin.variant))
    found = []
    if cubin.shared > limit:
        found.append(f"needs {cubin.shared} bytes of shared memory, sm_{cubin.arch} or one it serves has {limit}: pin a smaller tile or fewer stages")
    if cubin.spill_bytes > spills:
        found.append(f"spills {cubin.spill_bytes} bytes, its entry states {spills}: pin a smaller tile or more warps")
    if cubin.scalar_loads > kernel.scalar_loads:
        found.append(f"has {cubin.scalar_loads} loads narrower than 16 bytes, at most {kernel.scalar_loads} are expected: an alignment promise is missing")
    if kernel.wide and cubin.vector_loads == 0:
        found.append("has no 16-byte load at all")
    if declared != len(cubin.params):
        found.append(f"declares {declared} parameters, the metadata lists {len(cubin.params)}: another Triton version appends others")
    if cubin.global_scratch != kernel.scratch:
        found.append(f"wants {cubin.global_scratch} bytes of Triton's global scratch a program, its kernel's description says {kernel.scratch}")
    return found


def _prepare(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # two dtypes may share a binary; a cached one prints no ptxas report
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def lower(
    archs: Sequence[int], out: Path, kernels: Sequence[str] | None = None, jobs: int | None = None, weights: Sequence[str] | None = None
) -> list[Cubin]:
    """Compile every unit (see `units`) into `out` (made if absent) and write cubins.json and cubins.inc; returns the entries, problems included.

    Raises UserError where the installed Triton is none of `jit.TRITON_VERSIONS`.
    """
    jit.triton_version()
    import triton

    out.mkdir(parents=True, exist_ok=True)
    wanted = units(archs, kernels, weights)
    with scratch("sessa-lower-") as cache:
        workers = max(1, min(jobs or os.cpu_count() or 1, len(wanted)))
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(str(cache),))
        with pool:
            cubins = list(pool.map(compile_unit, wanted, [out] * len(wanted)))
    names = {c.file for c in cubins}
    for stale in out.glob("*.cubin"):
        if stale.name not in names:
            stale.unlink()
    write_whole(out / TABLE, "".join(_rows(cubins)), "--out", "the table")
    manifest = {"schema": SCHEMA, "triton": triton.__version__, "cubins": [asdict(c) for c in cubins]}
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1) + "\n", "--out", "the table")
    return cubins


def _rows(cubins: Sequence[Cubin]) -> Iterator[str]:
    """SESSA_CUBIN(index, file, kernel, arch, dtype, variant, entry, warps, shared, scratch, params, early rows, shared share, tiles...), for C++."""
    yield "// Written by sessa_deploy.plugins.lower: the binaries beside this file. Tiles are name, value pairs.\n"
    for i, c in enumerate(cubins):
        tiles = ", ".join(f'{{"{k}", {int(v)}}}' for k, v in c.tiles.items() if isinstance(v, int))
        what = f'"{c.file}", "{c.kernel}", {c.arch}, "{c.dtype}", "{c.variant}", "{c.entry}"'
        yield f"SESSA_CUBIN({i}, {what}, {c.num_warps}, {c.shared}, {c.global_scratch}, {len(c.params)}, {c.early_rows}, {c.shared_share}, {tiles})\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 good, 1 a binary has a problem, 2 bad input)."""
    parser = argparse.ArgumentParser(prog="python -m sessa_deploy.plugins.lower", description="Compile the plugin's Triton kernels to cubins, without a GPU.")
    parser.add_argument("--arch", default=",".join(map(str, ARCHS)), help="compute capabilities, e.g. 80,90 (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the cubins and their metadata")
    parser.add_argument("--kernel", action="append", choices=sorted(table.kernels()), help="only this kernel (repeatable; default: all the plugin needs)")
    parser.add_argument("--weights", action="append", choices=list(KINDS), help="only kernels that read weights of this kind (repeatable; default: all)")
    parser.add_argument("--jobs", type=int, default=None, help="processes (default: one a core)")
    args = parser.parse_args(argv)
    try:
        archs = [int(a) for a in args.arch.split(",")]
    except ValueError:
        archs = []
    if not archs or not set(archs) <= set(ARCHS):
        print(f"error: --arch: got {args.arch}; allowed: some of {','.join(map(str, ARCHS))}", file=sys.stderr)
        return 2
    begun = time.monotonic()
    try:
        cubins = lower(archs, args.out, args.kernel, args.jobs, args.weights)
    except SessaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for arch in archs:
        mine = [c for c in cubins if c.arch == arch]
        untuned = [c for c in mine if not c.tuned]
        note = f"  untuned {len(untuned)}: {', '.join(sorted({c.kernel for c in untuned}))}" if untuned else ""
        largest = max((c.shared for c in mine), default=0)
        print(f"sm_{arch}: {len(mine)} cubins, {sum(c.size for c in mine) / 2**20:.1f} MiB, shared up to {largest} bytes{note}")
    bad = [(c, p) for c in cubins for p in c.problems]
    for c, p in bad:
        print(f"error: {c.file} {p}", file=sys.stderr)
    if jit.triton_version() != table.TUNED_WITH:
        tuned, here = (".".join(map(str, version)) for version in (table.TUNED_WITH, jit.triton_version()))
        print(f"tiles were measured with Triton {tuned}; these binaries are of Triton {here}")
    print(f"{len(cubins)} cubins, {sum(c.size for c in cubins) / 2**20:.1f} MiB, {time.monotonic() - begun:.0f} s, in {args.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    with ending_cleanly():
        sys.exit(main())

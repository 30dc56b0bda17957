"""Kernels of a decode step tried within the chain of bench_chain.py: early starts, splits, stages, tiles, shared memory.

    python benchmarks/tune_chain.py [--seconds 85] [--skip one ragged]

A kernel alone tells little here: what counts is what it hides behind its neighbours. Prints a line a trial: milliseconds at 4128 and 160 of 32768 for one
sequence, then of the ragged batch and the batch of 32; a trial that gains is kept, and the next ones build on it (marked *). What wins is checked: with
inputs that change from replay to replay, the bits of a chain with early starts are those of a chain without.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from bench_chain import Chain, kernels
from gpu import capture, copy_bandwidth, event_ms

from sessa_deploy.config import SessaConfig
from sessa_deploy.kernels.engine import layer, mixer
from sessa_deploy.kernels.launch import jit, table
from sessa_deploy.kernels.launch.spec import OPENS, QUANTISED, WAITS
from sessa_deploy.runtime import traffic

BEGUN = time.perf_counter()
# "kernel:variant" -> tiles, "kernel:variant.i8" those of 8-bit weights (spec.QUANTISED); "rows:kernel" -> early_rows;
# "share:kernel" -> percent of shared memory, -1: as the driver likes ("share:": of every other kernel); "opens:kernel" -> whether it lets the next kernel
# in before it waits
Change = dict[str, Any]
STEP, ALONE = "mixer_step_partial:1024.64", "mixer_step_partial:1024.64.1"
COMBINE, COMBINE_ANY, COMBINE_WIDE = "mixer_step_combine:1", "mixer_batch_combine:64", "mixer_step_combine:wide"  # of one sequence, of several, of wide rows
_early, _share, _tiles = table.early, table.shared_share, table.tiles
_rows: dict[str, int] = {}
_shares: dict[str, int] = {}
_opens: dict[str, bool] = {}
_original: dict[Any, Any] = {}


def _changed_early(name: str, arch: int, dtype: str, variant: str) -> int:
    return _rows.get(name, _early(name, arch, dtype, variant))


def of_weights(name: str) -> tuple[str, str]:
    """(dtype, variant) of the tables for a change's variant, which says what kind of weights it is for."""
    kind = next((k for k in QUANTISED if name.endswith(k)), "")
    return "fp16" + kind, name.removesuffix(kind)


def _changed_share(name: str, arch: int, dtype: str, variant: str) -> int:
    """Where the tables have none it is said too: another trial may have told the driver of a binary that it left loaded."""
    return _shares.get(name, _shares.get("", _share(name, arch, dtype, variant) or -1))


def _changed_tiles(name: str, arch: int, dtype: str, variant: str) -> dict[str, Any]:
    found = _tiles(name, arch, dtype, variant)
    return {**found, "PDL": OPENS if _opens[name] else WAITS} if found.get("PDL") and name in _opens else found


def apply(change: Change) -> None:
    """Make the tables say so."""
    table.early, table.shared_share, table.tiles = _changed_early, _changed_share, _changed_tiles
    entries = table._entries()
    if not _original:
        _original.update(entries)
    entries.update(_original)
    kinds: dict[str, dict[str, Any]] = {"rows": _rows, "share": _shares, "opens": _opens}
    for kept in kinds.values():
        kept.clear()
    for key, value in change.items():
        kind, _, name = key.partition(":")
        if kind in kinds:
            kinds[kind][name] = value
        else:
            at = (kind, 90, *of_weights(name))
            entries[at] = {**entries[at], **value}
    jit.pinned.cache_clear()


def merged(base: Change, change: Change) -> Change:
    """Both; a kernel's tiles are those of `change`, but for the combination, whose splits belong to another kernel's."""
    return {**base, **{k: {**base.get(k, {}), **v} if k in (COMBINE, COMBINE_ANY, COMBINE_WIDE) else v for k, v in change.items()}}


def compile_one(job: tuple[Change, str, str]) -> str:
    """In a worker: compile a kernel, so that the cache on disk holds it."""
    change, name, variant = job
    try:
        apply(change)
        device = torch.device("cuda", 0)
        fn = next(getattr(m, name) for m in (layer, mixer) if hasattr(m, name))
        dtype, variant = of_weights(variant)
        weights = dtype.removeprefix("fp16")
        options = jit.pinned((name,), device, torch.float16, variant, _changed_early(name, 90, dtype, variant), weights)[name]
        jit.launcher(fn, device, torch.float16, options, weights)
    except Exception as error:
        return f"{name} {change}: {str(error)[-300:]}"
    return ""


def compile_all(changes: list[Change]) -> None:
    """One job a binary that a trial alone makes."""
    jobs: dict[str, tuple[Change, str, str]] = {}
    for change in changes:
        for key, value in change.items():
            kind, _, name = key.partition(":")
            if kind == "opens":
                jobs[str((key, value))] = ({key: value}, name, VARIANTS[name])
            elif kind not in ("rows", "share"):
                jobs[str((key, value))] = ({key: value}, kind, name)
    with ProcessPoolExecutor(min(15, len(jobs)), mp_context=multiprocessing.get_context("spawn")) as pool:
        for complaint in pool.map(compile_one, sorted(jobs.values(), key=lambda job: job[1] != "mixer_step_partial")):
            if complaint:
                print(f"not compiled: {complaint}", flush=True)
    print(f"{len(jobs)} binaries in [{time.perf_counter() - BEGUN:.0f} s]", flush=True)


class Bench:
    """A chain with caches, and the lengths it is timed at."""

    def __init__(self, chain: Chain, capacity: int, points: list[list[int]], repeats: list[int], until: float) -> None:
        self.chain, self.points, self.batch, self.repeats, self.until = chain, points, len(points[0]), repeats, until
        self.caches = chain.caches(capacity, [max(p[b] for p in points) for b in range(self.batch)])
        self.x = chain.random(self.batch, chain.config.d_model)
        self.length = torch.tensor(points[0], dtype=torch.int32, device="cuda")
        self.best: Change = {}
        self.best_score = 9e9

    def graph(self, early: int | None = None) -> torch.cuda.CUDAGraph:
        self.out: list[Any] = [None]

        def call() -> None:
            self.out[0] = self.chain.step(self.x, self.length, self.caches, self.batch if early is None else early)

        return capture([call])

    def times(self, change: Change) -> list[float]:
        apply(change)
        graph = self.graph()
        found = []
        for lengths, repeats in zip(self.points, self.repeats, strict=True):
            self.length.copy_(torch.tensor(lengths, dtype=torch.int32))
            found.append(statistics.median(event_ms(graph.replay, repeats)[3:]))
        return found

    def try_out(self, name: str, change: Change, keep: bool = True) -> None:
        """Time best + change, and keep it where the sum of the ratios falls by 0.4% of what it is."""
        if time.perf_counter() - BEGUN > self.until:
            return
        try:
            times = self.times(merged(self.best, change))
        except Exception:
            print(f"{name}: {traceback.format_exc().splitlines()[-1][:300]}", flush=True)
            return
        if self.best_score > 8e9:
            self.first = times
        score = sum(t / f for t, f in zip(times, self.first, strict=True))
        gains = keep and score < 0.996 * self.best_score
        print(f"{name:66} " + "  ".join(f"{t:.3f}" for t in times) + f"   [{time.perf_counter() - BEGUN:.0f} s]" + (" *" if gains else ""), flush=True)
        if gains:
            self.best, self.best_score = merged(self.best, change), score

    def same_bits(self, name: str, change: Change) -> None:
        """Inputs and lengths change from replay to replay: bits with early starts and without, values against those of the tables' tiles."""
        apply(change)
        graph = self.graph()
        out = self.out[0]
        generator = torch.Generator("cuda").manual_seed(7)
        xs = [torch.randn(self.x.shape, device="cuda", generator=generator).half() for _ in range(6)]
        lengths = [self.points[i % len(self.points)] for i in range(6)]
        early = []
        for x, n in zip(xs, lengths, strict=True):
            self.x.copy_(x)
            self.length.copy_(torch.tensor(n, dtype=torch.int32))
            graph.replay()
            early.append(out.clone())
        plain = [self.chain.step(x, torch.tensor(n, dtype=torch.int32, device="cuda"), self.caches, 0) for x, n in zip(xs, lengths, strict=True)]
        wrong = sum(not torch.equal(a, b) for a, b in zip(plain, early, strict=True))
        apply({})
        tables = [self.chain.step(x, torch.tensor(n, dtype=torch.int32, device="cuda"), self.caches, 0) for x, n in zip(xs, lengths, strict=True)]
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(early, tables, strict=True))
        finite = all(bool(torch.isfinite(y).all()) for y in early)
        print(f"{name}: early against plain: {wrong} of 6 differ in bits; against the tables' tiles: {worst:.2e} at most; finite {finite}", flush=True)


PROJECT, ENTER, OUT, TAIL = "layer_project_gain:1.1024", "layer_norm_enter:1024", "layer_out:1", "layer_tail:1"
VARIANTS = {"mixer_step_partial": "1024.64", "mixer_step_combine": "1"} | dict([at.split(":") for at in (PROJECT, ENTER, OUT, TAIL)])
NOT_EARLY = {"rows:mixer_step_partial": 0}
FREE = {"share:": -1}


def opens(*names: str, yes: bool = True) -> tuple[str, Change]:
    return f"let{'' if yes else ' not'} the next in first: " + ", ".join(names), {f"opens:{name}": yes for name in names}


def shares(percents: dict[str, int]) -> tuple[str, Change]:
    said = ", ".join(f"{k or 'all others'} {v}%" for k, v in percents.items())
    return "shared memory: " + said, {f"share:{k}": v for k, v in percents.items()}


HALF = {COMBINE: {"BLOCK_F": 64, "BLOCK_B": 128}}
ATTENTIONS = [  # what is asked for before the wait, places for them, fewer splits, shorter ones
    ("stages 8, 3", {ALONE: {"STAGES_F": 8, "STAGES_B": 3}}),
    ("2 rows of s, stages 4, 2", {ALONE: {"STAGES_F": 4, "ROWS_B": 2, "TILES_B": 4, "STAGES_B": 2}}),
    ("128 registers", {ALONE: {"maxnreg": 128}}),
    ("112 registers", {ALONE: {"maxnreg": 112}}),
    ("splits of 8 rows", {ALONE: {"TILES_F": 4}}),
    ("splits 64, 128, stages 12, 4", merged(HALF, {ALONE: {"TILES_F": 16, "TILES_B": 4, "STAGES_F": 12, "STAGES_B": 4}})),
]  # fmt: skip
SMALL: list[tuple[str, Change]] = [
    opens("layer_norm_enter", "mixer_step_combine", "layer_out", "layer_tail", yes=False), opens("layer_project_gain", yes=False),
    opens("layer_norm_enter", yes=False), opens("mixer_step_combine", yes=False),
    ("shared memory: as the driver likes", FREE), *(shares({"": n, "mixer_step_partial": -1}) for n in (20, 30, 40, 50)), shares({"": 30}),
    *((f"{name}: {columns} columns, {warps} warps", {at: {"BN": columns, "num_warps": warps}}) for name, at, tiles in (
        ("enter", ENTER, ((8, 2), (4, 2), (4, 1))), ("out", OUT, ((4, 1), (4, 2), (2, 1))), ("tail", TAIL, ((4, 1), (4, 2), (2, 1))),
        ("project", PROJECT, ((8, 4), (16, 8), (8, 2), (4, 2)))) for columns, warps in tiles),
    *((f"combine: {d} columns, {w} warps", {COMBINE: {"BLOCK_D": d, "num_warps": w}}) for d, w in ((32, 2), (16, 4), (16, 2), (8, 2))),
]  # fmt: skip


def one_sequence(config: SessaConfig, copy: float, until: float) -> None:
    bench = Bench(Chain(config), 32768, [[4128], [160]], [45, 45], until)
    floors = [traffic.step_bytes(config, "fp16", [float(p[0])]) / copy / 1e6 for p in bench.points]
    print("one sequence: ms at 4128, at 160 of 32768; floors " + ", ".join(f"{f:.3f}" for f in floors), flush=True)
    bench.times({})  # warm
    bench.same_bits("attentions early", {})
    bench.try_out("tables", {})
    bench.try_out("attentions not early", NOT_EARLY)
    for trial in (*SMALL, *ATTENTIONS, *SMALL):  # twice: what one gains may hang on another
        bench.try_out(*trial)
    print(f"best: {bench.best}", flush=True)
    bench.try_out("best without the attentions early", NOT_EARLY, keep=False)
    bench.same_bits("best", bench.best)
    apply(bench.best)
    bench.length.copy_(torch.tensor([4128], dtype=torch.int32))
    for early in (0, 1):
        print(f"kernels at 4128, early {early}: " + "; ".join(f"{k} {us:.1f} x{n}" for k, (us, n) in kernels(bench.graph(early)).items()), flush=True)


E32, P32, O32, T32 = "layer_enter:64", "layer_project_gain:64.1024", "layer_out:64", "layer_tail:64.1024"
THIRTY_TWO: list[tuple[str, Change]] = [
    ("8 columns, 4 parts", {}), ("16 columns, 4 parts", {"BN": 16}), ("8 columns, 8 parts", {"BK": 512, "KS": 8, "num_warps": 8, "num_stages": 3}),
]  # fmt: skip
RAGGED: list[tuple[str, Change]] = [
    ("early out, 64 rows", {"rows:layer_out": 64}),
    ("early tail, 64 rows", {"rows:layer_tail": 64}),
    *((f"{n}: 32 rows of a tile, {t}", {at: {"BM": 32, **tiles}}) for n, at in (("out", O32), ("tail", T32)) for t, tiles in THIRTY_TWO),
    ("enter: 8 columns, 4 parts", {E32: {"BN": 8, "KS": 4, "num_stages": 4}}),
    ("enter: 16 columns, 4 parts", {E32: {"BN": 16, "KS": 4}}),
    ("enter: 16 columns, 2 parts, 4 stages", {E32: {"BN": 16, "KS": 2, "num_stages": 4}}),
    ("enter: 16 rows, 16 columns, 4 parts", {E32: {"BM": 16, "BN": 16, "KS": 4}}),
    ("project: 16 columns, 256 deep", {P32: {"BN": 16, "BK": 256, "num_stages": 3}}),
    ("project: 16 columns, 256 deep, 4 parts", {P32: {"BN": 16, "BK": 256, "KS": 4, "num_stages": 3}}),
    ("project: 32 columns, 256 deep, 4 parts", {P32: {"BK": 256, "KS": 4, "num_stages": 3}}),
    ("project: 32 columns, 256 deep, 2 parts", {P32: {"BK": 256, "KS": 2, "num_stages": 3}}),
    ("project: 64 columns, 4 stages", {P32: {"BN": 64}}),
    ("112 registers", {STEP: {"maxnreg": 112}}),
    ("splits of 32 and 16 rows", {STEP: {"TILES_F": 16, "TILES_B": 4}}),
    ("splits of 32 and 16 rows, 112 registers", {STEP: {"TILES_F": 16, "TILES_B": 4, "maxnreg": 112}}),
    ("splits of 40 and 20 rows", {STEP: {"TILES_F": 20, "TILES_B": 5}}),
    ("splits of 10 and 8 rows", {STEP: {"TILES_F": 5}}),
    ("splits of 32 and 16 rows, stages 5, 3", {STEP: {"TILES_F": 16, "TILES_B": 4, "STAGES_B": 3}}),
    ("stages 5, 3", {STEP: {"STAGES_B": 3}}),
    ("stages 8, 2", {STEP: {"STAGES_F": 8}}),
    *((f"combine: {d} columns, {c} splits, {w} warps", {COMBINE_ANY: {"BLOCK_D": d, "CHUNK": c, "num_warps": w}})
      for d, c, w in ((32, 0, 4), (32, 32, 4), (64, 64, 4), (32, 64, 8))),
    ("128 registers", {STEP: {"maxnreg": 128}}),
    *(shares({"": n}) for n in (30, 50)),
]  # fmt: skip


def ragged(config: SessaConfig, copy: float, until: float) -> None:
    bench = Bench(Chain(config), 8192, [[4128] + [160] * 31, [4128] * 32], [23, 13], until)
    floors = [traffic.step_bytes(config, "fp16", [float(n) for n in p]) / copy / 1e6 for p in bench.points]
    print("ragged, batch of 32: ms; floors " + ", ".join(f"{f:.3f}" for f in floors), flush=True)
    bench.times({})
    bench.try_out("tables", {})
    bench.try_out("attentions not early", NOT_EARLY)
    for trial in RAGGED:
        bench.try_out(*trial)
    print(f"best: {bench.best}", flush=True)
    bench.same_bits("best", bench.best)
    apply(bench.best)
    bench.length.copy_(torch.tensor(bench.points[0], dtype=torch.int32))
    for early in (0, 32):
        print(f"kernels, ragged, early {early}: " + "; ".join(f"{k} {us:.1f} x{n}" for k, (us, n) in kernels(bench.graph(early)).items()), flush=True)
    best, chain = bench.best, bench.chain
    del bench
    torch.cuda.empty_cache()
    for rows in (64, 17):  # the tiles of 17 to 64 rows serve these too
        other = Bench(chain, 256, [[160] * rows], [23], until + 5)
        other.try_out(f"{rows} rows at 160, tables", {}, keep=False)
        other.try_out(f"{rows} rows at 160, best", best, keep=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=85.0)
    parser.add_argument("--skip", nargs="*", choices=("one", "ragged"), default=[])
    args = parser.parse_args()
    one = [{}, *(c for _, c in (*SMALL, *ATTENTIONS))]
    compile_all([*(one if "one" not in args.skip else ()), *((c for _, c in RAGGED) if "ragged" not in args.skip else ())])
    config = SessaConfig(d_model=1024, n_layers=24, n_heads=16, vocab_size=50304)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy bandwidth {copy:.0f} GB/s", flush=True)
    for name, part, share in (("one", one_sequence, 0.6), ("ragged", ragged, 0.93)):
        if name in args.skip:
            continue
        try:
            part(config, copy, share * args.seconds)
        except Exception:
            print(f"{name} failed: " + " | ".join(traceback.format_exc().splitlines()[-6:]), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

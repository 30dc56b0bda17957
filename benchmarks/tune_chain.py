"""Kernels of a decode step tried within the chain of bench_chain.py: early starts, splits, stages, tiles, shared memory.

    python benchmarks/tune_chain.py [--seconds 85] [--skip one ragged]

A kernel alone tells little here: what counts is what it hides behind its neighbours. Prints a line a trial: milliseconds at 4128 and 160 of 32768 for one
sequence, then of the ragged batch and the batch of 32; a trial that gains is kept, and the next ones build on it (marked *). What wins is checked: with
inputs that change from replay to replay, the bits of a chain with early starts are those of a chain without.
"""

from __future__ import annotations

import argparse
import ctypes
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
from sessa_deploy.kernels.launch.spec import QUANTISED
from sessa_deploy.runtime import traffic

BEGUN = time.perf_counter()
# "kernel:variant" -> tiles, "kernel:variant.i8" those of 8-bit weights (spec.QUANTISED); "rows:kernel" -> early_rows; "carve:kernel" -> percent
Change = dict[str, Any]
STEP = "mixer_step_partial:1024.64"
COMBINE, COMBINE_ANY, COMBINE_WIDE = (f"mixer_step_combine:{variant}" for variant in ("1", "any", "wide"))
_early = table.early
_rows: dict[str, int] = {}
_original: dict[Any, Any] = {}


def _changed_early(name: str, arch: int, dtype: str, variant: str) -> int:
    return _rows.get(name, _early(name, arch, dtype, variant))


def of_weights(name: str) -> tuple[str, str]:
    """(dtype, variant) of the tables for a change's variant, which says what kind of weights it is for."""
    kind = next((k for k in QUANTISED if name.endswith(k)), "")
    return "fp16" + kind, name.removesuffix(kind)


def apply(change: Change) -> None:
    """Make the tables say so."""
    table.early = _changed_early
    entries = table._entries()
    if not _original:
        _original.update(entries)
    entries.update(_original)
    _rows.clear()
    for key, value in change.items():
        kind, _, name = key.partition(":")
        if kind == "rows":
            _rows[name] = value
        elif kind != "carve":
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
            if kind not in ("rows", "carve"):
                jobs[str((key, value))] = ({key: value}, kind, name)
    with ProcessPoolExecutor(min(15, len(jobs)), mp_context=multiprocessing.get_context("spawn")) as pool:
        for complaint in pool.map(compile_one, sorted(jobs.values(), key=lambda job: job[1] != "mixer_step_partial")):
            if complaint:
                print(f"not compiled: {complaint}", flush=True)
    print(f"{len(jobs)} binaries in [{time.perf_counter() - BEGUN:.0f} s]", flush=True)


def carve(percents: dict[str, int]) -> None:
    """Shared memory that kernels loaded so far prefer, of what a multiprocessor has ("": of the others); -1: the driver chooses."""
    driver = ctypes.CDLL("libcuda.so.1")
    for run in jit._LAUNCHERS.values():
        percent = percents.get(run.kernel.__name__, percents.get("", -1))
        driver.cuFuncSetAttribute(ctypes.c_void_p(run._binary.function), 9, ctypes.c_int(percent))


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
        percents = {key[6:]: value for key, value in change.items() if key.startswith("carve:")}
        if percents:
            self.graph()
            carve(percents)
        graph = self.graph()
        found = []
        for lengths, repeats in zip(self.points, self.repeats, strict=True):
            self.length.copy_(torch.tensor(lengths, dtype=torch.int32))
            found.append(statistics.median(event_ms(graph.replay, repeats)[3:]))
        if percents:
            carve({})
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


PROJECT, ENTER, OUT, TAIL = "layer_project_gain:1", "layer_norm_enter:1024", "layer_out:1", "layer_tail:1"
NOT_EARLY, EARLY = {"rows:mixer_step_partial": 0}, {"rows:mixer_step_partial": 64}
DEEP = [  # stages of the attentions: what is asked for before the wait
    ("stages 5, 3", {STEP: {"STAGES_B": 3}}),
    ("stages 8, 3", {STEP: {"STAGES_F": 8, "STAGES_B": 3}}),
    ("stages 12, 4", {STEP: {"STAGES_F": 12, "STAGES_B": 4}}),
    ("stages 12, 5", {STEP: {"STAGES_F": 12, "STAGES_B": 5}}),
    ("stages 8, 2", {STEP: {"STAGES_F": 8}}),
    ("8 heads by 4 rows, stages 4, 3", {STEP: {"ROWS_F": 4, "TILES_F": 4, "STAGES_F": 4, "STAGES_B": 3}}),
    ("2 rows of s, stages 8, 5", {STEP: {"STAGES_F": 8, "ROWS_B": 2, "TILES_B": 4, "STAGES_B": 5}}),
    ("2 rows of s, stages 12, 8", {STEP: {"STAGES_F": 12, "ROWS_B": 2, "TILES_B": 4, "STAGES_B": 8}}),
    ("128 registers", {STEP: {"maxnreg": 128}}),
    ("112 registers", {STEP: {"maxnreg": 112}}),
    ("128 registers, stages 8, 3", {STEP: {"maxnreg": 128, "STAGES_F": 8, "STAGES_B": 3}}),
    ("112 registers, stages 8, 3", {STEP: {"maxnreg": 112, "STAGES_F": 8, "STAGES_B": 3}}),
]  # fmt: skip
HALF = {COMBINE: {"BLOCK_F": 64, "BLOCK_B": 128}}
FEWER = [  # half as many splits
    ("splits 64, 128, stages 12, 4", merged(HALF, {STEP: {"TILES_F": 16, "TILES_B": 4, "STAGES_F": 12, "STAGES_B": 4}})),
    ("splits 64, 128, stages 24, 7", merged(HALF, {STEP: {"TILES_F": 16, "TILES_B": 4, "STAGES_F": 24, "STAGES_B": 7}})),
    ("splits 64, 128, 4 heads, stages 12, 7", merged(HALF, {STEP: {"HEADS_F": 4, "ROWS_F": 4, "STAGES_F": 12, "TILES_B": 4, "STAGES_B": 7}})),
    ("splits 64, 256, 4 heads, stages 8, 3", {COMBINE: {"BLOCK_F": 64}, STEP: {"HEADS_F": 4, "ROWS_F": 4, "STAGES_F": 8, "STAGES_B": 3}}),
    ("splits 128, 128, stages 8, 5", {COMBINE: {"BLOCK_B": 128}, STEP: {"TILES_B": 4, "STAGES_F": 8, "STAGES_B": 5}}),
]  # fmt: skip
COMBINES = [(f"combine: {d} columns, {w} warps", {COMBINE: {"BLOCK_D": d, "num_warps": w}}) for d, w in ((32, 2), (32, 8), (16, 4), (16, 2), (64, 8), (8, 2))]
PROJECTS = [("project: 4 warps", {PROJECT: {"num_warps": 4}}), ("project: 4 columns, 4 warps", {PROJECT: {"BN": 4, "num_warps": 4}}),
            ("project: 4 columns, 2 warps", {PROJECT: {"BN": 4, "num_warps": 2}}),
            ("project: 16 columns, 8 warps", {PROJECT: {"BN": 16, "num_warps": 8}})]  # fmt: skip
SMALL = [("enter: 4 columns", {ENTER: {"BN": 4}}), ("enter: 4 warps", {ENTER: {"num_warps": 4}}),
         ("enter: 16 columns, 8 warps", {ENTER: {"BN": 16, "num_warps": 8}}), ("out: 8 columns, 512 deep", {OUT: {"BN": 8, "BK": 512, "AHEAD": 2}}),
         ("out: 2 warps", {OUT: {"num_warps": 2}}), ("out: 8 columns", {OUT: {"BN": 8}}),
         ("tail: 2 warps", {TAIL: {"num_warps": 2}}), ("tail: 8 columns", {TAIL: {"BN": 8}}), ("tail: 8 columns, 8 warps", {TAIL: {"BN": 8, "num_warps": 8}}),
         ("tail: 2 columns, 2 warps", {TAIL: {"BN": 2, "num_warps": 2}})]  # fmt: skip
CARVES = [{"layer_project_gain": 100}, {"layer_project_gain": 50}, {"layer_project_gain": 100, "mixer_step_partial": 100},
          {"layer_project_gain": 100, "mixer_step_partial": 100, "mixer_step_combine": 100}, {"layer_norm_enter": 100, "layer_project_gain": 100},
          {"": 100}, {"": 50}, {"": 30}]  # fmt: skip


def carves(percents: dict[str, int]) -> tuple[str, Change]:
    said = ", ".join(f"{k or 'all others'} {v}%" for k, v in percents.items())
    return "shared memory: " + said, {f"carve:{k}": v for k, v in percents.items()}


def one_sequence(config: SessaConfig, copy: float, until: float) -> None:
    bench = Bench(Chain(config), 32768, [[4128], [160]], [45, 45], until)
    floors = [traffic.step_bytes(config, "fp16", [float(p[0])]) / copy / 1e6 for p in bench.points]
    print("one sequence: ms at 4128, at 160 of 32768; floors " + ", ".join(f"{f:.3f}" for f in floors), flush=True)
    bench.times({})  # warm
    bench.same_bits("attentions early", {})
    bench.try_out("tables", {})
    bench.try_out("attentions not early", NOT_EARLY)
    for trial in map(carves, CARVES):  # of use with attentions that start early, even where that alone is of none
        bench.try_out(trial[0], {**EARLY, **trial[1]})
    for trial in SMALL:
        bench.try_out(*trial)
    for name, change in (*DEEP, *FEWER):
        bench.try_out(name, {**EARLY, **change})
    for trial in (*PROJECTS, *COMBINES, *map(carves, CARVES)):  # shared memory once more, upon what the others gave
        bench.try_out(*trial)
    print(f"best: {bench.best}", flush=True)
    bench.try_out("best without the attentions early", NOT_EARLY, keep=False)
    bench.same_bits("best", bench.best)
    apply(bench.best)
    bench.length.copy_(torch.tensor([4128], dtype=torch.int32))
    for early in (0, 1):
        print(f"kernels at 4128, early {early}: " + "; ".join(f"{k} {us:.1f} x{n}" for k, (us, n) in kernels(bench.graph(early)).items()), flush=True)


E32, P32, O32, T32 = (f"layer_{n}:64" for n in ("enter", "project_gain", "out", "tail"))
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
    carves({"layer_project_gain": 100}),
    carves({"layer_project_gain": 100, "mixer_step_partial": 100}),
    carves({"": 100}),
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
    one = [{}, *(c for _, c in (*PROJECTS, *DEEP, *FEWER, *COMBINES, *SMALL))]
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

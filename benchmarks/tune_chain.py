"""Kernels of a decode step tried within the chain of bench_chain.py: splits, tiles, who lets its successor in first, shared memory.

    python benchmarks/tune_chain.py [--seconds 140] [--skip one ragged]

A kernel alone tells little here: what counts is what it hides behind its neighbours. Prints a line a trial: milliseconds at 4128 and 160 of 32768 for one
sequence, then the ragged batch and the batch of 32. Checks first that nothing is read too early: with inputs that change from replay to replay, the bits of
a chain with early starts are those of a chain without.
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
from sessa_deploy.kernels.engine import layer, mixer, mixer_one
from sessa_deploy.kernels.launch import jit, table
from sessa_deploy.runtime import traffic

BEGUN = time.perf_counter()
Change = dict[str, Any]  # "kernel:variant" -> tiles; "pdl:kernel" -> 1, 2 (lets the next in first) or 3 (waits inside); "rows:kernel" -> early_rows; "carve"
PARTIAL, OUT, PROJECT, ENTER, TAIL = "mixer_one_partial:1024.64", "mixer_one_out:1024", "layer_project_gain:1", "layer_norm_enter:1024", "layer_tail:1"
MODULES = (layer, mixer, mixer_one)
_tiles, _early = table.tiles, table.early
_pdl: dict[str, int] = {}
_rows: dict[str, int] = {}
_original: dict[Any, Any] = {}


def _changed_tiles(name: str, arch: int, dtype: str, variant: str) -> dict[str, Any]:
    values = _tiles(name, arch, dtype, variant)
    if values.get("PDL") and name in _pdl:
        values["PDL"] = _pdl[name]
    return values


def _changed_early(name: str, arch: int, dtype: str, variant: str) -> int:
    return _rows.get(name, _early(name, arch, dtype, variant))


def apply(change: Change) -> None:
    """Make the tables say so."""
    table.tiles, table.early = _changed_tiles, _changed_early
    entries = table._entries()
    if not _original:
        _original.update(entries)
    entries.update(_original)
    _pdl.clear()
    _rows.clear()
    for key, value in change.items():
        kind, _, name = key.partition(":")
        if kind == "pdl":
            _pdl[name] = value
        elif kind == "rows":
            _rows[name] = value
        elif kind != "carve":
            at = (kind, 90, "fp16", name)
            entries[at] = {**entries[at], **value}
    jit.pinned.cache_clear()


def compile_one(job: tuple[Change, str, str]) -> str:
    """In a worker: compile a kernel, so that the cache on disk holds it."""
    change, name, variant = job
    try:
        apply(change)
        device = torch.device("cuda", 0)
        fn = next(getattr(m, name) for m in MODULES if hasattr(m, name))
        options = jit.pinned((name,), device, torch.float16, variant, _changed_early(name, 90, "fp16", variant))[name]
        jit.launcher(fn, device, torch.float16, options)
    except Exception as error:
        return f"{name} {change}: {str(error)[-300:]}"
    return ""


def jobs_of(change: Change) -> list[tuple[Change, str, str]]:
    found = []
    variants = {"layer_project_gain": ["1"], "layer_norm_enter": ["1024"], "layer_tail": ["1"], "mixer_one_out": ["1024"], "mixer_one_partial": ["1024.64"],
                "mixer_step_partial": ["1024.64"], "mixer_step_combine": ["any"]}  # fmt: skip
    for key, value in change.items():
        kind, _, name = key.partition(":")
        if kind == "pdl":
            more = {k: v for k, v in change.items() if k.startswith((name + ":", "rows:"))}
            found += [({key: value, **more}, name, v) for v in variants.get(name, ["64"])]
        elif kind not in ("rows", "carve"):
            more = {k: v for k, v in change.items() if k == f"pdl:{kind}" or k.startswith("rows:")}
            found.append(({key: value, **more}, kind, name))
    return found


def carve(percent: int) -> None:
    """Shared memory that every kernel loaded so far prefers, of what a multiprocessor has; -1: the driver chooses."""
    driver = ctypes.CDLL("libcuda.so.1")
    for run in jit._LAUNCHERS.values():
        driver.cuFuncSetAttribute(ctypes.c_void_p(run._binary.function), 9, ctypes.c_int(percent))


class Bench:
    """A chain with caches, and the lengths it is timed at."""

    def __init__(self, chain: Chain, capacity: int, points: list[list[int]]) -> None:
        self.chain, self.points, self.batch = chain, points, len(points[0])
        self.caches = chain.caches(capacity, [max(p[b] for p in points) for b in range(self.batch)])
        self.x = chain.random(self.batch, chain.config.d_model)
        self.length = torch.tensor(points[0], dtype=torch.int32, device="cuda")

    def graph(self, early: int | None = None) -> torch.cuda.CUDAGraph:
        self.out: list[Any] = [None]

        def call() -> None:
            self.out[0] = self.chain.step(self.x, self.length, self.caches, self.batch if early is None else early)

        return capture([call])

    def times(self, change: Change, repeats: int = 50) -> list[float]:
        apply(change)
        if "carve" in change:
            self.graph()
            carve(change["carve"])
        graph = self.graph()
        found = []
        for lengths in self.points:
            self.length.copy_(torch.tensor(lengths, dtype=torch.int32))
            found.append(statistics.median(event_ms(graph.replay, repeats)[5:]))
        if "carve" in change:
            carve(-1)
        return found

    def try_out(self, name: str, change: Change, note: str = "") -> float:
        try:
            times = self.times(change)
        except Exception:
            print(f"{name}: {traceback.format_exc().splitlines()[-1][:300]}", flush=True)
            return 9e9
        print(f"{name:58} " + "  ".join(f"{t:.3f}" for t in times) + f"   [{time.perf_counter() - BEGUN:.0f} s] {note}", flush=True)
        return sum(times)

    def same_bits(self, name: str, change: Change) -> None:
        """Inputs and lengths change from replay to replay: bits with early starts and without."""
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
        wrong, worst, one = 0, 0.0, self.chain.one
        for x, n, got in zip(xs, lengths, early, strict=True):
            length = torch.tensor(n, dtype=torch.int32, device="cuda")
            wrong += int(not torch.equal(self.chain.step(x, length, self.caches, 0), got))
            self.chain.one = False
            worst = max(worst, float((self.chain.step(x, length, self.caches, 0) - got).abs().max() / got.abs().max()))
            self.chain.one = one
        finite = bool(torch.isfinite(out).all())
        print(f"{name}: early against plain: {wrong} of 6 differ in bits; against the three kernels: {worst:.2e} at most; finite {finite}", flush=True)


def truth(a: dict[str, torch.Tensor], n: int) -> torch.Tensor:
    d = a["q"].shape[-1]
    keys = torch.cat([a["past_k"][0, :n].double(), a["k"].double()])
    values = torch.cat([a["past_v"][0, :n].double(), a["v"].double()])
    weight = (torch.einsum("hd,jhd->hj", a["q"][0].double(), keys) * d**-0.5).softmax(-1)
    o = torch.einsum("hj,jhd->hd", weight, values).half().double().reshape(-1)
    s = (a["weight"].double() @ o + a["bias"].double()).half().double()
    if n:
        alpha = (a["past_kb"][0, :n].double() @ a["q_b"][0].double() * len(s) ** -0.5).softmax(-1)
        s = s + a["gamma"][0].double() * (alpha @ a["past_s"][0, :n].double())
    return s


def values() -> None:
    """The step alone against float64, beside the three kernels."""
    capacity, heads, d = 32768, 16, 64
    width = heads * d

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device="cuda")).half()

    a = {"q": random(1, heads, d), "k": random(1, heads, d), "v": random(1, heads, d), "past_k": random(1, capacity, heads, d),
         "past_v": random(1, capacity, heads, d), "weight": random(width, width, scale=width**-0.5), "bias": random(width), "q_b": random(1, width),
         "gamma": torch.rand(1, device="cuda"), "past_kb": random(1, capacity, width), "past_s": random(1, capacity, width)}  # fmt: skip
    row = []
    for n in (0, 1, 5, 63, 65, 160, 511, 1000, 4128, 32768):
        length = torch.tensor([n], dtype=torch.int32, device="cuda")
        wanted = truth(a, n)
        new, old = (run(**a, past_length=length)[0].double() for run in (mixer_one.step, mixer.step_batch))
        same = torch.equal(new, mixer_one.step(**a, past_length=length, early=1)[0].double())
        errors = [float((x - wanted).abs().max() / wanted.abs().max()) for x in (new, old)]
        row.append(f"{n}: {errors[0]:.1e} (was {errors[1]:.1e})" + ("" if same else " BITS"))
    print("error against float64: " + "; ".join(row), flush=True)


def trials() -> list[tuple[str, Change]]:
    """(name, what it changes) of mixer_one's splits and tiles."""
    def splits(f: int, b: int, **more: Any) -> Change:
        return {OUT: {"SPLITS_F": f, "SPLITS_B": b, **more}}

    two = {"ROWS_F": 32, "ROWS_B": 2, "num_warps": 2, "TILES_B": 4}
    eight = {"ROWS_F": 128, "ROWS_B": 8, "TILES_B": 1, "num_warps": 8}
    found: list[tuple[str, Change]] = [
        ("splits 8, 128", splits(8, 128)), ("splits 4, 64", splits(4, 64)), ("splits 8, 64", splits(8, 64)), ("splits 16, 128", splits(16, 128)),
        ("splits 16, 256", splits(16, 256)),
        ("stages 3", {PARTIAL: {"STAGES_F": 3, "STAGES_B": 3}, **splits(8, 128)}),
        ("stages 6", {PARTIAL: {"STAGES_F": 6, "STAGES_B": 6}, **splits(8, 128)}),
        ("stages 4, splits 16, 128", {PARTIAL: {"STAGES_F": 4, "STAGES_B": 4}, **splits(16, 128)}),
        ("stages 3, splits 16, 256", {PARTIAL: {"STAGES_F": 3, "STAGES_B": 3}, **splits(16, 256)}),
        ("two heads, splits 16, 128", {PARTIAL: {"HEADS_F": 2, "ROWS_F": 32, "TILES_F": 2}, **splits(16, 128)}),
        ("32 rows, stages 8", {PARTIAL: {"ROWS_F": 32, "TILES_F": 2, "STAGES_F": 8}, **splits(8, 128)}),
        ("8 rows of s", {PARTIAL: {"ROWS_B": 8, "TILES_B": 1, "STAGES_B": 3}, **splits(8, 128)}),
        ("8 rows of s, 128 of k", {PARTIAL: {"ROWS_F": 128, "STAGES_F": 3, "ROWS_B": 8, "TILES_B": 1, "STAGES_B": 3}, **splits(8, 128)}),
        ("8 warps", {PARTIAL: {**eight, "STAGES_F": 4, "STAGES_B": 4}, **splits(8, 128)}),
        ("8 warps, 64 rows", {PARTIAL: {**eight, "ROWS_F": 64, "STAGES_F": 6, "STAGES_B": 3}, **splits(8, 128)}),
        ("8 warps, stages 6, splits 4, 64", {PARTIAL: {**eight, "STAGES_F": 6, "STAGES_B": 6}, **splits(4, 64)}),
        ("2 warps, splits 16, 256", {PARTIAL: {**two, "STAGES_F": 5, "STAGES_B": 5}, **splits(16, 256)}),
        ("2 warps, stages 7, splits 16, 256", {PARTIAL: {**two, "STAGES_F": 7, "STAGES_B": 7}, **splits(16, 256)}),
        ("96 registers", {PARTIAL: {"maxnreg": 96}, **splits(8, 128)}),
        ("128 registers, stages 6", {PARTIAL: {"maxnreg": 128, "STAGES_F": 6, "STAGES_B": 6}, **splits(8, 128)}),
    ]  # fmt: skip
    return found


OUTS = [("out: 4 columns", {"BN": 4}), ("out: 8 warps", {"num_warps": 8}), ("out: 16 columns, 8 warps", {"BN": 16, "num_warps": 8})]
PROJECTS = [("project: 4 warps", {"num_warps": 4}), ("project: 16 columns, 8 warps", {"BN": 16}), ("project: 16 columns, 4 warps", {"BN": 16, "num_warps": 4})]
FIRST = {"project": ["layer_project_gain"], "enter": ["layer_norm_enter"], "enter, project": ["layer_norm_enter", "layer_project_gain"],
         "out": ["mixer_one_out"], "tail": ["layer_tail"], "out, tail": ["mixer_one_out", "layer_tail"],
         "all but the mixer": ["layer_norm_enter", "layer_project_gain", "mixer_one_out", "layer_tail"]}  # fmt: skip
NO_EARLY = {"rows:mixer_one_partial": 0}
STEP, COMBINE = "mixer_step_partial:1024.64", "mixer_step_combine:any"
LATE = {"pdl:mixer_step_partial": 3, "rows:mixer_step_partial": 64}
LATE_OUT_NOT = {**LATE, "rows:layer_tail": 0}
RAGGED: list[tuple[str, Change]] = [
    ("as it is", {}),
    ("attention early, waits inside", LATE),
    ("attention early, waits at its head", {"rows:mixer_step_partial": 64}),
    ("waits inside, projections let it in first", {**LATE, "pdl:layer_project_gain": 2}),
    ("combine: 2 warps", {COMBINE: {"num_warps": 2}}),
    ("combine: 64 columns", {COMBINE: {"BLOCK_D": 64}}),
    ("combine: 64 columns, 8 warps", {COMBINE: {"BLOCK_D": 64, "num_warps": 8}}),
    ("splits 64, 128", {COMBINE: {"BLOCK_F": 64, "BLOCK_B": 128}, STEP: {"TILES_F": 8, "TILES_B": 4}}),
    ("splits 64, 256, 32 rows", {COMBINE: {"BLOCK_F": 64}, STEP: {"TILES_F": 16, "TILES_B": 4}}),
    ("stages 8, 3", {STEP: {"STAGES_F": 8, "STAGES_B": 3}}),
    ("early out, 64 rows", {"rows:layer_out": 64}),
    ("early tail, 64 rows", {"rows:layer_tail": 64}),
    ("early out and tail, 64 rows", {"rows:layer_out": 64, "rows:layer_tail": 64}),
]  # fmt: skip


def compile_all(changes: list[Change]) -> None:
    jobs = [job for change in changes for job in jobs_of(change)]
    seen: dict[str, Any] = {str(job): job for job in jobs}
    workers = min(14, len(seen))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for complaint in pool.map(compile_one, seen.values()):
            if complaint:
                print(f"not compiled: {complaint}", flush=True)
    print(f"{len(seen)} binaries in [{time.perf_counter() - BEGUN:.0f} s]", flush=True)


def one_sequence(config: SessaConfig, copy: float, until: float) -> None:
    chain = Chain(config)
    bench = Bench(chain, 32768, [[4128], [160]])
    floors = [traffic.step_bytes(config, "fp16", [float(p[0])]) / copy / 1e6 for p in bench.points]
    print("one sequence: ms at 4128, at 160 of 32768; floors " + ", ".join(f"{f:.3f}" for f in floors), flush=True)
    chain.one = False
    bench.try_out("three kernels, as they were", {})
    chain.one = True
    bench.same_bits("bits", {})
    best, best_time = NO_EARLY, bench.try_out("two kernels, the first not early", NO_EARLY)

    def consider(name: str, change: Change) -> None:
        nonlocal best, best_time
        if time.perf_counter() - BEGUN < until:
            took = bench.try_out(name, change)
            if took < best_time:
                best, best_time = change, took

    for name, change in trials():
        consider(name, change)
    for name, tiles in OUTS:
        out: dict[str, Any] = best.get(OUT, {})
        consider(name, {**best, OUT: {**out, **tiles}})
    base = best
    for name, names in FIRST.items():
        consider(f"lets the next in first: {name}", {**base, **{f"pdl:{n}": 2 for n in names}})
    base = best
    for name, tiles in PROJECTS:
        consider(name, {**base, PROJECT: tiles})
        consider(f"{name}, lets the next in first", {**base, PROJECT: tiles, "pdl:layer_project_gain": 2})
    settled = best
    for percent in (44, 58, 72, 86, 100):
        consider(f"shared memory {percent}%", {**settled, "carve": percent})
    print(f"best: {best}", flush=True)
    bench.same_bits("best", best)
    print("without the mixer early: ", end="")
    bench.try_out("", {**best, **NO_EARLY})
    apply(best)
    bench.length.copy_(torch.tensor([4128], dtype=torch.int32))
    for early in (0, 1):
        print(f"kernels at 4128, early {early}: " + "; ".join(f"{k} {us:.1f} x{n}" for k, (us, n) in kernels(bench.graph(early)).items()), flush=True)


def ragged(config: SessaConfig, copy: float, until: float) -> None:
    chain = Chain(config)
    bench = Bench(chain, 8192, [[4128] + [160] * 31, [4128] * 32])
    floors = [traffic.step_bytes(config, "fp16", [float(n) for n in p]) / copy / 1e6 for p in bench.points]
    print("ragged, batch of 32: ms; floors " + ", ".join(f"{f:.3f}" for f in floors), flush=True)
    for name, change in RAGGED:
        if time.perf_counter() - BEGUN < until:
            bench.try_out(name, change)
    bench.same_bits("waits inside", LATE)
    apply({})
    bench.length.copy_(torch.tensor(bench.points[0], dtype=torch.int32))
    print("kernels, ragged, plain: " + "; ".join(f"{k} {us:.1f} x{n}" for k, (us, n) in kernels(bench.graph(0)).items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=140.0)
    parser.add_argument("--skip", nargs="*", choices=("one", "ragged"), default=[])
    args = parser.parse_args()
    changes = [*(c for _, c in trials()), *({OUT: t} for _, t in OUTS), *({PROJECT: t} for _, t in PROJECTS),
               *({PROJECT: t, "pdl:layer_project_gain": 2} for _, t in PROJECTS), *({f"pdl:{n}": 2} for n in FIRST["all but the mixer"]),
               *((c for _, c in RAGGED) if "ragged" not in args.skip else ())]  # fmt: skip
    compile_all(changes)
    config = SessaConfig(d_model=1024, n_layers=24, n_heads=16, vocab_size=50304)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy bandwidth {copy:.0f} GB/s", flush=True)
    for name, part, share in (("values", lambda *_: values(), 1.0), ("one", one_sequence, 0.72), ("ragged", ragged, 1.0)):
        if name in args.skip:
            continue
        try:
            part(config, copy, share * args.seconds)
        except Exception:
            print(f"{name} failed: " + " | ".join(traceback.format_exc().splitlines()[-6:]), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

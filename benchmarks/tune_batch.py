"""Kernels of a decode step of 32 sequences tried within the chain of bench_chain.py: combination, attentions, early starts, products of 8-bit weights.

    python benchmarks/tune_batch.py [--seconds 75] [--compile] [--skip large ragged]

1.1B parameters at 160 of 1024 with weights in 16 bits, int8 and fp8 in turn; then 350M, ragged and 32 at 4128 of 8192. A trial that gains is kept, and
the next ones build on it (marked *). What wins is checked against the tables' tiles. --compile: only compile, so that the cache on disk holds all.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import tune_chain as tune
from bench_chain import Chain, kernels
from gpu import capture, copy_bandwidth, event_ms
from tune_chain import COMBINE_ANY, COMBINE_WIDE, Change, apply, merged, shares

from sessa_deploy.config import SessaConfig
from sessa_deploy.kernels.engine import mixer
from sessa_deploy.kernels.launch import splits
from sessa_deploy.kernels.launch.limits import MIXER_MANY_B, MIXER_MANY_F
from sessa_deploy.runtime import traffic

BEGUN = time.perf_counter()
DONE = Path(tempfile.gettempdir(), "tune_batch.compiled")
LARGE, SMALL = "mixer_step_partial:2048.128", "mixer_step_partial:1024.64"
BASE: Change = {}
Trial = tuple[str, Change]
SHORT = dict.fromkeys(("project_gain", "tail"), ":64.1024")
CHUNKS = ((32, 0, 4), (32, 64, 4), (32, 32, 4), (64, 32, 4), (64, 16, 2), (64, 16, 4), (32, 16, 2), (32, 64, 8))


def combined(variant: str) -> list[Trial]:
    """Columns, splits at a time and warps of the combination."""
    return [(f"combine ({d}, {c}, {w})", {variant: {"BLOCK_D": d, "CHUNK": c, "num_warps": w}}) for d, c, w in CHUNKS]


FORM = {"ROWS_F": 2, "TILES_F": 4, "STAGES_F": 6, "ROWS_B": 4, "TILES_B": 2, "STAGES_B": 3, "HEADS_F": 8, "num_warps": 4}


def attention(rows_f: int, rows_b: int, **other: int) -> Trial:
    """Tiles of which a split takes so many rows at least in a short cache, see `splits.least_rows`."""
    form = {**FORM, **other}
    form["TILES_F"], form["TILES_B"] = rows_f // (form["ROWS_F"] * MIXER_MANY_F), rows_b // (form["ROWS_B"] * MIXER_MANY_B)
    return f"splits of {rows_f}, {rows_b} {other or ''}", {LARGE: form}


TWO = {"ROWS_F": 2, "STAGES_F": 5, "num_warps": 2}
ATTENTIONS = [
    attention(64, 32), attention(32, 32), attention(64, 16), attention(16, 16), attention(32, 16, ROWS_B=2, STAGES_B=5), attention(32, 16, STAGES_B=2),
    attention(32, 16, ROWS_B=2, STAGES_B=4, **TWO), attention(32, 16, ROWS_B=1, STAGES_B=5, **TWO), attention(32, 16, HEADS_F=4, ROWS_F=4, STAGES_F=4),
    attention(64, 32, HEADS_F=4, ROWS_F=4, STAGES_F=4), attention(32, 16, STAGES_F=4), attention(32, 16, STAGES_F=8),
]  # fmt: skip
EARLY: list[Trial] = [(f"{name} early, 64 rows", {f"rows:layer_{name}": 64}) for name in ("out", "tail")]
EARLY += [(f"{n} not early", {f"rows:{n}": 0}) for n in ("layer_norm", "layer_enter", "layer_project_gain", "mixer_step_combine", "layer_logits")]
# BM, BN, BK, KS, warps, stages
PRODUCTS: dict[str, list[tuple[int, ...]]] = {
    "project_gain": [(64, 64, 128, 1, 4, 4), (64, 64, 128, 1, 4, 3), (64, 32, 128, 1, 4, 4), (64, 32, 128, 1, 4, 5), (64, 64, 128, 1, 8, 4),
                     (64, 128, 128, 1, 8, 4), (64, 32, 256, 1, 4, 2), (32, 32, 256, 1, 8, 4)],
    "enter": [(64, 32, 128, 1, 4, 4), (64, 32, 256, 1, 4, 3), (64, 32, 256, 1, 4, 4), (64, 32, 128, 1, 4, 6), (64, 16, 256, 1, 4, 3), (64, 32, 512, 1, 8, 2)],
    "out": [(64, 16, 256, 1, 4, 3), (64, 16, 256, 1, 4, 4), (64, 16, 128, 1, 4, 6), (64, 16, 512, 1, 4, 2), (16, 8, 512, 4, 4, 4)],
    "tail": [(64, 16, 256, 1, 4, 3), (64, 16, 256, 1, 4, 2), (64, 16, 128, 1, 4, 4), (16, 8, 512, 4, 4, 3), (16, 8, 512, 4, 4, 4)],
    "logits": [(64, 128, 128, 1, 8, 4), (64, 64, 128, 1, 4, 4), (64, 128, 128, 1, 4, 3)],
}  # fmt: skip
WIDE: dict[str, list[tuple[int, ...]]] = {  # of 16-bit weights
    "project_gain": [(64, 64, 128, 1, 4, 4), (64, 32, 128, 1, 4, 4)], "logits": [(64, 128, 128, 1, 8, 3)],
    "enter": [(64, 32, 128, 1, 4, 5)], "out": [(64, 16, 128, 1, 4, 6)], "tail": [(64, 16, 128, 1, 4, 4)],
}  # fmt: skip


def product(name: str, tile: tuple[int, ...], kinds: Sequence[str] = (".i8", ".f8")) -> Trial:
    """Tiles of a product, by default of both kinds of 8-bit weights."""
    bm, bn, bk, ks, warps, stages = tile
    entry = {"BM": bm, "BN": bn, "BK": bk, "KS": ks, "num_warps": warps, "num_stages": stages}
    return f"{name} {tile}", {f"layer_{name}:64{kind}": entry for kind in kinds}


def short(name: str, tile: tuple[int, ...]) -> Trial:
    """The same of 16 bits for the rows of 350M, for which two products have tiles of their own."""
    said, change = product(name, tile, ("",))
    return said, {f"layer_{name}" + SHORT.get(name, ":64"): entry for entry in change.values()}


def dealt(percent: int) -> Trial:
    return f"{percent}% to causal attention", {"dealt:": percent}


_shares = splits.shares


def deal(percent: int | None) -> None:
    """Have so many programs of a device that does not hold all take causal attention; None: as in launch/splits.py."""

    def other(pieces_f: int, blocks: int, pieces_b: int, width_f: int, width_b: int, resident: int) -> tuple[int, int]:
        return _shares(pieces_f, blocks, pieces_b, percent or 50, 100 - (percent or 50), resident)

    mixer.shares = other if percent else _shares


class Bench:
    """Chains that share caches, and the lengths they are timed at."""

    def __init__(self, chains: dict[str, Chain], capacity: int, points: list[list[int]], repeats: list[int], until: float) -> None:
        self.chains, self.points, self.batch, self.repeats, self.until = chains, points, len(points[0]), repeats, until
        first = next(iter(chains.values()))
        self.caches = first.caches(capacity, [max(p[b] for p in points) for b in range(self.batch)])
        self.x = first.random(self.batch, first.config.d_model)
        self.length = torch.tensor(points[0], dtype=torch.int32, device="cuda")
        self.best: Change = {}
        self.best_score = 9e9
        self.first: dict[str, list[float]] = {}
        self.losers: list[str] = []
        self.forms: Sequence[str] = tuple(chains)  # that the trials are timed with

    def graph(self, form: str, early: int | None = None) -> torch.cuda.CUDAGraph:
        self.out: Any = None

        def call() -> None:
            self.out = self.chains[form].step(self.x, self.length, self.caches, self.batch if early is None else early)

        return capture([call])

    def set(self, change: Change) -> None:
        apply({k: v for k, v in change.items() if not k.startswith("dealt:")})
        deal(change.get("dealt:"))

    def times(self, change: Change, forms: Sequence[str]) -> dict[str, list[float]]:
        self.set(change)
        found: dict[str, list[float]] = {}
        for form in forms:
            graph = self.graph(form)
            found[form] = []
            for lengths, repeats in zip(self.points, self.repeats, strict=True):
                self.length.copy_(torch.tensor(lengths, dtype=torch.int32))
                found[form].append(statistics.median(event_ms(graph.replay, repeats)[3:]))
        return found

    def try_out(self, name: str, change: Change, forms: Sequence[str], keep: bool = True) -> None:
        """Time best + change, and keep it where the sum of the ratios falls by 0.3% of what it is."""
        missing = [f"{name}: no binary"] if DONE.is_file() and not set(jobs_of(self.only(change))) <= set(DONE.read_text().split("\n")) else []
        self.losers += missing
        if missing or time.perf_counter() - BEGUN > self.until:
            return
        try:
            times = self.times(merged(self.best, change), forms)
        except Exception:
            print(f"{name}: {traceback.format_exc().splitlines()[-1][:200]}", flush=True)
            return
        for form, its in times.items():
            self.first.setdefault(form, its)
        ratios = [t / f for form in forms for t, f in zip(times[form], self.first[form], strict=True)]
        score = sum(ratios) / len(ratios)
        gains = keep and score < 0.997 * self.best_score
        figures = "  ".join(f"{form} {'  '.join(f'{t:.3f}' for t in its)}" for form, its in times.items())
        if gains or not keep:
            self.say()
            print(f"{name}: {figures}  {score:.3f} [{time.perf_counter() - BEGUN:.0f} s]" + (" *" if gains else ""), flush=True)
        else:
            self.losers.append(f"{name} {'/'.join(f'{t:.3f}' for its in times.values() for t in its)}")
            if len(self.losers) == 5:
                self.say()
        if gains:
            self.best, self.best_score = merged(self.best, change), score

    def only(self, change: Change) -> Change:
        """What of a change these chains use."""
        unused = {".i8": "int8", ".f8": "fp8"}
        return {k: v for k, v in change.items() if unused.get(k[-3:], "") in ("", *self.forms)}

    def say(self) -> None:
        """Trials that did not gain, with their times."""
        if self.losers:
            print("  no gain: " + " | ".join(self.losers), flush=True)
        self.losers.clear()

    def again(self, forms: Sequence[str]) -> None:
        """Other forms count from here on."""
        self.say()
        self.forms, times = forms, self.times(self.best, forms)
        self.first = {form: self.first.get(form, its) for form, its in times.items()}
        ratios = [t / f for form in forms for t, f in zip(times[form], self.first[form], strict=True)]
        self.best_score = sum(ratios) / len(ratios)

    def profile(self, name: str, form: str, change: Change, early: int) -> None:
        try:
            self.set(change)
            self.length.copy_(torch.tensor(self.points[0], dtype=torch.int32))
            its = kernels(self.graph(form, early))
            print(f"{name}, {form or '16'}, early {early}: " + "; ".join(f"{k} {us:.1f} x{n}" for k, (us, n) in its.items() if n), flush=True)
        except Exception:
            print(f"{name}: {traceback.format_exc().splitlines()[-1][:200]}", flush=True)

    def check(self, name: str, form: str, change: Change) -> None:
        """Inputs and lengths change: bits with early starts and without, values against those of the tables' tiles."""
        generator = torch.Generator("cuda").manual_seed(7)
        xs = [torch.randn(self.x.shape, device="cuda", generator=generator).half() for _ in range(4)]
        lengths = [torch.tensor(self.points[i % len(self.points)], dtype=torch.int32, device="cuda") - i for i in range(4)]

        def run(early: int) -> list[torch.Tensor]:
            graph, found = self.graph(form, early), []
            for x, n in zip(xs, lengths, strict=True):
                self.x.copy_(x)
                self.length.copy_(n)
                graph.replay()
                found.append(self.out.clone())
            return found

        self.set(change)
        early, plain = run(self.batch), run(0)
        self.set(BASE)
        tables = run(0)
        wrong = sum(not torch.equal(a, b) for a, b in zip(plain, early, strict=True))
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(early, tables, strict=True))
        finite = all(bool(torch.isfinite(y).all()) for y in early)
        print(f"{name}, {form or '16'}: early against plain: {wrong} of 4 differ in bits; against the tables' {worst:.2e} at most; finite {finite}", flush=True)


def compile_one(job: tuple[Change, str, str, bool], until: float) -> str:
    """In a worker, before the time `until`."""
    change, name, variant, plain = job
    if time.time() > until:
        return f"{name} {variant}, no time left"
    rows = {f"rows:{name}": 0} if plain else {k: v for k, v in change.items() if k.startswith("rows:")}
    return tune.compile_one(({**change, **rows}, name, variant))


def jobs_of(change: Change) -> dict[str, tuple[Change, str, str, bool]]:
    """One job a binary that a trial needs and the tables' tiles do not."""
    found: dict[str, tuple[Change, str, str, bool]] = {}
    for key, value in change.items():
        kind, _, name = key.partition(":")
        if kind not in ("rows", "share", "opens", "dealt"):
            plain = kind in ("layer_out", "layer_tail") and not key.endswith(".1024")  # which do not start early with so many rows
            found[f"{key} {value} {plain}"] = ({key: value}, kind, name, plain)
    return found


def compile_all(workers: int, seconds: float) -> None:
    """One job a binary, what is needed most first; DONE then says which there are."""
    jobs: dict[str, tuple[Change, str, str, bool]] = {}
    many = [(f"layer_{n}", v) for n in ("enter", "project_gain", "out", "tail", "logits") for v in ("64", "64.i8", "64.f8")]
    many += [(f"layer_{n}", at[1:]) for n, at in SHORT.items()] + [("layer_norm", "1024"), ("layer_norm", "2048")]
    many += [(kernel, variant) for kernel, _, variant in (x.partition(":") for x in (LARGE, SMALL, COMBINE_ANY, COMBINE_WIDE))]
    single = [(f"layer_{n}", v) for n in ("project_gain", "out", "tail", "logits") for v in ("1", "1.i8")]
    single += [("layer_norm_enter", v) for v in ("1024", "2048", "2048.i8")] + [("mixer_step_combine", "1")]
    for name, variant in many:
        for plain in (True, False):
            jobs[f"{name}{variant}{plain}"] = ({}, name, variant, plain)
    for _, change in (*combined(COMBINE_WIDE), *ATTENTIONS):
        jobs |= jobs_of(change)
    products = [product(n, t)[1] for n, tiles in PRODUCTS.items() for t in tiles]
    jobs |= {f"{name}{variant}": ({}, name, variant, False) for name, variant in single}
    for change in (*products, *(c for _, c in RAGGED)):
        jobs |= jobs_of(change)
    done = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for key, complaint in zip(jobs, pool.map(compile_one, jobs.values(), [time.time() + seconds] * len(jobs)), strict=True):
            if not complaint:
                done.append(key)
            elif not complaint.endswith("no time left"):
                print(f"not compiled: {complaint}", flush=True)
    DONE.write_text("\n".join(done))
    print(f"{len(done)} of {len(jobs)} binaries in [{time.perf_counter() - BEGUN:.0f} s]", flush=True)


FORMS = ("", "int8", "fp8")
FOUND: Change = {}  # tiles of products that gained


def large(copy: float, until: float) -> None:
    config = SessaConfig(d_model=2048, n_layers=24, n_heads=16, vocab_size=50304)
    chains = {form: Chain(config, weights=form) for form in FORMS}
    bench = Bench(chains, 1024, [[160] * 32], [17], until)
    floor = traffic.step_bytes(config, "fp16", [160.0] * 32) / copy / 1e6
    print(f"1.1B, 32 at 160 of 1024: ms with 16 bits, int8, fp8; floor of 16 bits {floor:.3f} [{time.perf_counter() - BEGUN:.0f} s]", flush=True)
    bench.times(BASE, FORMS)  # warm
    bench.try_out("as it was", BASE, FORMS)
    for form in ("", "int8"):
        bench.profile("as it was", form, BASE, 0)
    two = ("", "int8")
    bench.again(two)
    for trial in (*combined(COMBINE_WIDE), *ATTENTIONS, *map(dealt, (44, 47, 53, 56))):
        bench.try_out(*trial, two)
    bench.again(FORMS[1:])
    for name, tiles in PRODUCTS.items():
        for tile in tiles:
            bench.try_out(*product(name, tile), FORMS[1:])
    for trial in (*EARLY, ("attentions not early", tune.NOT_EARLY)):
        bench.try_out(*trial, FORMS[1:])
    bench.again(("",))
    for name, tiles in WIDE.items():
        for tile in tiles:
            bench.try_out(*product(name, tile, ("",)), ("",))
    bench.say()
    print(f"best: {bench.best}", flush=True)
    bench.set(bench.best)
    last = bench.times(bench.best, FORMS)
    print("best: " + ", ".join(f"{form or '16'} {t[0]:.3f} ms, {last[''][0] / t[0]:.3f} x" for form, t in last.items()), flush=True)
    for form in ("", "int8"):
        bench.profile("best", form, bench.best, 0)
    for form in FORMS[:2]:
        bench.check("best", form, bench.best)
    best = {k: v for k, v in bench.best.items() if k.startswith("mixer")}
    FOUND.update({k: v for k, v in bench.best.items() if k.startswith("layer")})
    del bench
    torch.cuda.empty_cache()
    one = Bench(chains, 32768, [[4128], [160]], [23, 23], until + 6)
    few = [("the tables' tiles", BASE), ("the batch's best", best)]
    for name, change in few:
        one.try_out(f"one sequence at 4128, 160 of 32768, {name}", change, two, keep=False)


RAGGED: list[Trial] = [
    *combined(COMBINE_ANY),
    *map(dealt, (44, 47, 53, 56)),
    ("splits of 32 and 16 rows", {SMALL: {"TILES_F": 16, "TILES_B": 4}}),
    ("splits of 16 and 4 rows", {SMALL: {"TILES_B": 1}}),
    ("splits of 8 and 8 rows", {SMALL: {"TILES_F": 4}}),
    *(short(n, t) for n, tiles in WIDE.items() for t in tiles),
    shares({"layer_project_gain": 100, "mixer_step_partial": 100}),
]  # fmt: skip


def ragged(copy: float, until: float) -> None:
    config = SessaConfig(d_model=1024, n_layers=24, n_heads=16, vocab_size=50304)
    chain = Chain(config)
    bench = Bench({"": chain}, 8192, [[4128] + [160] * 31, [4128] * 32], [23, 11], until)
    floors = [traffic.step_bytes(config, "fp16", [float(n) for n in p]) / copy / 1e6 for p in bench.points]
    print(f"350M: ragged, 32 at 4128: ms; floors {floors[0]:.3f}, {floors[1]:.3f} [{time.perf_counter() - BEGUN:.0f} s]", flush=True)
    bench.times(BASE, ("",))
    bench.try_out("as it was", BASE, ("",))
    bench.profile("the same", "", BASE, 0)
    for trial in RAGGED:
        bench.try_out(*trial, ("",))
    bench.say()
    print(f"best: {bench.best}", flush=True)
    bench.profile("best", "", bench.best, 0)
    bench.profile("best", "", bench.best, 32)
    bench.check("best", "", bench.best)


def narrow(copy: float, until: float) -> None:
    """350M with weights of 8 bits, which the same tiles of products serve, for the fewest rows that take them and the most."""
    config = SessaConfig(d_model=1024, n_layers=24, n_heads=16, vocab_size=50304)
    chains = {form: Chain(config, weights=form) for form in FORMS}
    for rows in (32, 17, 64):
        bench = Bench(chains, 1024, [[160] * rows], [23], until)
        bench.times(BASE, FORMS)
        bench.try_out(f"350M, {rows} at 160, the tables' tiles", BASE, FORMS, keep=False)
        bench.try_out(f"350M, {rows} at 160, the products' best of 1.1B", FOUND, FORMS, keep=False)


def single(copy: float, until: float) -> None:
    """One sequence, which no change for batches may slow down."""
    chain = Chain(SessaConfig(d_model=1024, n_layers=24, n_heads=16, vocab_size=50304))
    one = Bench({"": chain}, 32768, [[4128], [160]], [33, 33], until)
    one.times({}, ("",))
    for _ in range(2):
        one.try_out("350M, one sequence at 4128, 160 of 32768", {}, ("",), keep=False)
    one.profile("the same", "", {}, 0)
    one.check("the same", "", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--skip", nargs="*", choices=("single", "large", "ragged", "narrow"), default=[])
    args = parser.parse_args()
    if args.compile:
        compile_all(args.workers, args.seconds)
        return
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy bandwidth {copy:.0f} GB/s", flush=True)
    for name, part, share_of in (("single", single, 0.2), ("large", large, 0.7), ("ragged", ragged, 0.97), ("narrow", narrow, 1.0)):
        if name in args.skip:
            continue
        try:
            part(copy, share_of * args.seconds)
        except Exception:
            print(f"{name} failed: " + " | ".join(traceback.format_exc().splitlines()[-6:]), flush=True)
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

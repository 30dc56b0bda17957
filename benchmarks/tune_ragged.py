"""Forms of a decode step's kernels for 32 sequences, most of them short, timed by turns within the chain of bench_chain.py.

    python benchmarks/tune_ragged.py --compile [--workers 5] [--seconds 95]
    python benchmarks/tune_ragged.py [--seconds 36]

350M, one sequence at 4128 and 31 at 160 of 8192 ("ragged"), and 32 at 4128. Every form is captured twice (captures of one chain lie apart by their addresses)
and replayed by turns with all others; figures are medians of the turns. Then the best form of each kernel together, and that without each of them; how far
all are from the tables' numbers; what a layer's kernels take; one sequence, and other batches, with the best of all.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import tune_chain as tune
from bench_chain import Chain, kernels
from gpu import copy_bandwidth, event_ms
from ragged_rule import over_rule
from torch import Tensor
from tune_chain import Change, apply

from sessa_deploy.config import SessaConfig
from sessa_deploy.kernels.engine import layer, layer_rows, mixer, mixer_batch
from sessa_deploy.kernels.launch import jit, splits, table
from sessa_deploy.runtime import traffic

BEGUN = time.perf_counter()
DONE = Path(tempfile.gettempdir(), "tune_ragged.compiled")
DEVICE = "cuda"
CONFIG = SessaConfig(d_model=1024, n_layers=24, n_heads=16, vocab_size=50304)
WIDE = SessaConfig(d_model=2048, n_layers=8, n_heads=16, vocab_size=50304)  # a third of 1.1B
CAPACITY, LONG, SHORT, BATCH = 8192, 4128, 160, 32
STEP, COMBINE = "mixer_step_partial:1024.64", "mixer_batch_combine:64"
ENTER, PROJECT, OUT, TAIL, LOGITS = "layer_enter:64", "layer_project_gain:64.1024", "layer_out:64", "layer_tail:64.1024", "layer_logits:64"
PRODUCTS = {OUT: "out", TAIL: "tail", LOGITS: "logits", PROJECT: "project", ENTER: "enter"}
FORMS = ("parts added across warps", "together", "columns long", "sideways")  # product.py
Trial = tuple[str, str, Change]  # which kernel's choice it is, name, change


def tile(at: str, bm: int, bn: int, bk: int, ks: int, warps: int, stages: int, form: int = 0, **more: int) -> Trial:
    name = f"{at.split(':')[0][6:]} {bm}x{bn}, {bk} deep in {ks}, {warps} warps, {stages} stages, {FORMS[form]}" + (" " + str(more) if more else "")
    return at, name, {at: {"BM": bm, "BN": bn, "BK": bk, "KS": ks, "num_warps": warps, "num_stages": stages, "FORM": form}, **more}


def step(name: str, **tiles: int) -> Trial:
    return STEP, f"attentions: {name}", {STEP: tiles}


def adds(columns: int, chunk: int, stages: int, warps: int, **more: int) -> Trial:
    said = f"combination: {columns} columns, {chunk} splits, {stages} stages, {warps} warps {more or ''}"
    return COMBINE, said, {COMBINE: {"BLOCK_D": columns, "CHUNK": chunk, "STAGES": stages, "num_warps": warps, **more}}


def shares(name: str, **percents: int) -> Trial:
    return "share", f"shared memory: {name}", {f"share:{k.removeprefix('all')}": v for k, v in percents.items()}


TWO = {"ROWS_B": 2, "TILES_B": 4, "STAGES_B": 3}
OUT_EARLY = {"rows:layer_out": 64}
TRIALS: list[Trial] = [
    step("the new row is asked for where it is wanted", SOON=0),
    step("neighbours are neighbours", APART=0),
    step("both", SOON=0, APART=0),
    step("128 registers", maxnreg=128),
    step("both, 128 registers", SOON=0, APART=0, maxnreg=128),
    step("2 rows of s, 3 stages", **TWO),
    step("the same, both", **TWO, SOON=0, APART=0),
    step("the same, 6 stages of causal attention", **TWO, STAGES_F=6),
    *((STEP, f"attentions: 2 rows of s, 3 stages, {percent}% to causal", {STEP: TWO, "dealt:": percent}) for percent in (44, 47)),
    adds(32, 64, 2, 2, maxnreg=128), adds(32, 32, 4, 2), adds(32, 64, 3, 4, maxnreg=128), adds(32, 32, 3, 2, maxnreg=128), adds(16, 64, 2, 2, maxnreg=128),
    tile(OUT, 16, 8, 256, 4, 4, 4, 1), tile(OUT, 16, 16, 512, 4, 4, 3, 1), tile(OUT, 32, 16, 512, 8, 8, 4, 2), tile(OUT, 32, 16, 256, 4, 4, 4, 2),
    (OUT, "out 32x16, 512 deep in 8, columns long, early", {**tile(OUT, 32, 16, 512, 8, 8, 4, 2)[2], **OUT_EARLY}),
    (OUT, "out 16x16, 512 deep in 4, together, early", {**tile(OUT, 16, 16, 512, 4, 4, 3, 1)[2], **OUT_EARLY}),
    tile(TAIL, 16, 16, 512, 4, 4, 3, 1), tile(TAIL, 16, 16, 512, 4, 4, 3, 2), tile(TAIL, 32, 16, 256, 4, 4, 3, 2),
    tile(ENTER, 32, 16, 256, 4, 4, 3, 1), tile(ENTER, 32, 16, 256, 4, 4, 4, 1), tile(ENTER, 32, 16, 256, 4, 4, 3, 2), tile(ENTER, 32, 16, 256, 4, 4, 4, 2),
    tile(ENTER, 32, 16, 512, 8, 8, 3, 2),
    tile(PROJECT, 32, 64, 128, 1, 4, 6, 3), tile(PROJECT, 32, 64, 128, 1, 4, 8, 3), tile(PROJECT, 32, 64, 256, 1, 4, 4, 3),
    tile(PROJECT, 32, 64, 128, 1, 4, 4, 3), tile(PROJECT, 32, 32, 256, 4, 4, 3, 2),
    tile(LOGITS, 32, 64, 128, 1, 4, 3, 3), tile(LOGITS, 32, 64, 128, 1, 4, 4, 3), tile(LOGITS, 32, 128, 128, 1, 8, 3, 3),
    *(("dealt", f"{percent}% of the programs to causal attention", {"dealt:": percent}) for percent in (46, 48, 52, 54)),
]  # fmt: skip
# Told to the driver for a binary, not for a launch: never beside another form of it.
SHARES: list[Trial] = [
    shares("100% for projections and attentions", layer_project_gain=100, mixer_step_partial=100),
    shares("60% for all", all=60), shares("100% for all", all=100),
    ("share", "shared memory: 60% for all, out early", {"share:": 60, **OUT_EARLY}),
]  # fmt: skip
# What a split takes at least may not hang on the batch; how much that rule costs is worth knowing.
FEWER: list[Trial] = [
    ("splits", "splits of 64 and 32 rows at least (for comparison: one sequence is slower)", {STEP: {"TILES_F": 32, "TILES_B": 8}}),
    ("splits", "splits of 12 and 8 rows at least", {STEP: {"TILES_F": 6}}),
]
ORDER = (
    layer.layer_norm, layer.layer_rotary, layer.layer_enter, layer.layer_project_gain, layer.layer_out, layer.layer_tail, layer.layer_logits,
    layer.layer_norm_enter, layer_rows.layer_norm_enter_rows, mixer.mixer_step_partial, mixer_batch.mixer_batch_combine, mixer.mixer_step_combine,
)  # fmt: skip
_shares = splits.shares


def keys() -> None:
    """What Triton calls a binary on disk hangs on the order in which a process asks for the keys of kernels that share functions."""
    for kernel in ORDER:
        kernel.cache_key  # noqa: B018


def deal(percent: int) -> None:
    """Have so many programs of a device that does not hold all take causal attention; 0: as in launch/splits.py."""

    def other(pieces_f: int, blocks: int, pieces_b: int, width_f: int, width_b: int, resident: int) -> tuple[int, int]:
        return _shares(pieces_f, blocks, pieces_b, percent, 100 - percent, resident)

    mixer.shares = other if percent else _shares


def choose(change: Change) -> None:
    """Make the tables say so."""
    apply({k: v for k, v in change.items() if not k.startswith("dealt:")})
    deal(change.get("dealt:", 0))


def left(limit: float) -> float:
    return limit - (time.perf_counter() - BEGUN)


def compile_one(job: tuple[Change, str, str], until: float) -> str:
    """In a worker, before the time `until`: have the cache on disk hold a kernel."""
    keys()
    change, name, variant = job
    if time.time() > until:
        return f"{name}: no time left"
    try:
        apply(change)
        device = torch.device("cuda", 0)
        kind = torch.float32 if table.kernel(name).dtypes == ("fp32",) else torch.float16
        jit.launcher(next(k for k in ORDER if k.__name__ == name), device, kind, jit.pinned((name,), device, kind, variant)[name])
    except Exception as error:
        return f"{name} {change}: {str(error)[-200:]}"
    return ""


def jobs_of(change: Change) -> dict[str, tuple[Change, str, str]]:
    """One job a binary that a change needs."""
    its = {at: at.partition(":") for at in change}
    return {f"{at} {change[at]}": ({at: change[at]}, kernel, variant) for at, (kernel, _, variant) in its.items() if kernel not in ("rows", "share", "dealt")}


def made(change: Change) -> bool:
    """Whether the binaries are there, where some were compiled before."""
    return not DONE.is_file() or set(jobs_of(change)) <= set(DONE.read_text().split("\n"))


def compile_all(workers: int, seconds: float) -> None:
    """One job a binary: those of the tables first."""
    jobs: dict[str, tuple[Change, str, str]] = {}
    ones = tune.ALONE, tune.COMBINE, tune.PROJECT, tune.ENTER, tune.OUT, tune.TAIL, "layer_logits:1"
    eight = "layer_tail:8.1024", "layer_project_gain:8.1024", "layer_out:16", "layer_logits:16", "layer_norm_enter_rows:8.1024"
    wide = "mixer_step_partial:2048.128", "mixer_step_combine:wide", "layer_project_gain:64", "layer_tail:64", "layer_norm:2048"
    for at in (STEP, COMBINE, ENTER, PROJECT, OUT, TAIL, LOGITS, "layer_norm:1024", "layer_rotary:any", *ones, *eight, *wide):
        kernel, _, variant = at.partition(":")
        jobs[at] = {}, kernel, variant
    for _, _, change in (*TRIALS, *FEWER):
        jobs |= jobs_of(change)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        complaints = dict(zip(jobs, pool.map(compile_one, jobs.values(), [time.time() + seconds] * len(jobs)), strict=True))
    for complaint in filter(None, complaints.values()):
        print(f"not compiled: {complaint}", flush=True)
    done = [key for key, complaint in complaints.items() if not complaint]
    DONE.write_text("\n".join(done))
    print(f"{len(done)} of {len(jobs)} binaries in [{time.perf_counter() - BEGUN:.0f} s]", flush=True)


class Graph:
    """A captured step; without PyTorch's own preparation, which collects garbage for most of a second."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            self.graph.capture_begin()
            try:
                self.out = call()
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        self.replay = self.graph.replay


class Bench:
    """A chain with caches, its forms as graphs, and their times."""

    def __init__(self, chain: Chain, capacity: int, filled: list[int]) -> None:
        self.chain, self.batch = chain, len(filled)
        self.caches = chain.caches(capacity, filled)
        self.x = chain.random(self.batch, chain.config.d_model)
        self.length = torch.tensor(filled, dtype=torch.int32, device=DEVICE)
        self.graphs: dict[str, list[Graph]] = {}
        self.found: dict[str, list[list[float]]] = {}

    def add(self, name: str, change: Change, copies: int = 2, early: int | None = None) -> bool:
        """Capture it; whether it can be had."""
        try:
            choose(change)
            early = self.batch if early is None else early
            made = [Graph(lambda: self.chain.step(self.x, self.length, self.caches, early)) for _ in range(copies)]
            self.graphs.setdefault(name, []).extend(made)
        except Exception:
            print(f"{name}: {traceback.format_exc().splitlines()[-1][:150]}", flush=True)
            return False
        return True

    def at(self, lengths: list[int]) -> None:
        self.length.copy_(torch.tensor(lengths, dtype=torch.int32))

    def turns(self, lengths: list[int], rounds: int, repeats: int, limit: float, names: list[str] | None = None, copies: int = 9) -> dict[str, float]:
        """Median milliseconds of each form, of all its graphs; those of each graph are in `found`."""
        self.at(lengths)
        every = [(name, i, g) for name in names or self.graphs for i, g in enumerate(self.graphs[name][:copies])]
        times: dict[tuple[str, int], list[float]] = {(name, i): [] for name, i, _ in every}
        for turn in range(rounds):
            for name, i, graph in every if turn % 2 == 0 else every[::-1]:
                times[name, i].append(statistics.median(event_ms(graph.replay, repeats)[2:]))
            if left(limit) < 0:
                break
        self.found = {name: [] for name, _, _ in every}
        for (name, _), its in times.items():
            self.found[name].append(its)
        return {name: statistics.median(itertools.chain(*its)) for name, its in self.found.items()}

    def copies(self, name: str) -> str:
        return " ".join(f"{statistics.median(its):.4f}" for its in self.found[name])

    def outputs(self, name: str, seeds: int, lengths: list[list[int]]) -> list[Tensor]:
        """Of changing inputs and lengths, by the first graph of a form."""
        made, kept = [], self.x.clone()
        for seed in range(seeds):
            self.x.copy_(torch.randn(self.x.shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE))
            self.at(lengths[seed % len(lengths)])
            self.graphs[name][0].replay()
            made.append(self.graphs[name][0].out.clone())
        self.x.copy_(kept)
        return made


RAGGED, FULL = [LONG] + [SHORT] * (BATCH - 1), [LONG] * BATCH
EDGES = [0, 1, 2, 100, 500, 1000, 3000, 4000, 4100, 4127, 4128, *(n + i for n in (8, 16, 64, 256, 512, 2048, 4096) for i in (-1, 0, 1))]


def say_difference(bench: Bench, names: list[str], base: str) -> None:
    """Bits and distance from the tables' numbers."""
    points = [RAGGED, EDGES, FULL]
    wanted = bench.outputs(base, 3, points)
    again = bench.outputs(base, 3, points)
    print(f"numbers of {base}, twice: {'the same bits' if all(map(torch.equal, wanted, again)) else 'OTHER BITS'}", flush=True)
    same, others, bad = [], [], []
    for name in names:
        its = bench.outputs(name, 3, points)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(its, wanted, strict=True))
        if all(map(torch.equal, its, wanted)):
            same.append(name)
        elif math.isfinite(worst) and worst < 3e-3:
            others.append(worst)
        else:
            bad.append(f"{name} {worst:.1e}")
    print(f"same bits as the tables: {len(same)} ({'; '.join(n for n in same if n.startswith('att'))}); others {len(others)}, at most "
          f"{max(others, default=0.0):.1e} of the largest logit; WRONG: {bad or 'none'}", flush=True)  # fmt: skip


def profile(bench: Bench, name: str, change: Change, early: int) -> None:
    """What a layer's kernels take, microseconds."""
    key = f"{name} {early}"
    if bench.add(key, change, 1, early):
        bench.at(RAGGED)
        its = kernels(bench.graphs.pop(key)[0].graph)
        print(f"us, {name}, {'early' if early else 'plain'}: " + "; ".join(f"{k} {us:.1f}" for k, (us, n) in its.items() if n), flush=True)


def ragged(chain: Chain, limit: float) -> Change:
    """The forms alone, then together."""
    copy = copy_bandwidth() if DEVICE == "cuda" else 1.0
    bench, base = Bench(chain, CAPACITY, FULL), "tables"
    floors = [traffic.step_bytes(chain.config, "fp16", [float(n) for n in p]) / copy / 1e6 for p in (RAGGED, FULL)]
    print(f"350M, floors of ragged and full {floors[0]:.3f}, {floors[1]:.3f} at {copy:.0f} GB/s [{time.perf_counter() - BEGUN:.0f} s]", flush=True)
    bench.add(base, {}, 2)
    bench.add("warm", {}, 1)
    bench.turns(FULL, 1, 6, limit, ["warm"])
    del bench.graphs["warm"]
    done = [t for t in (*TRIALS, *FEWER) if made(t[2]) and left(limit) > 15 and bench.add(t[1], t[2])]
    bench.add(base, {}, 2)
    names = [t[1] for t in done]
    print(f"{len(done)} of {len(TRIALS) + len(FEWER)} forms captured [{time.perf_counter() - BEGUN:.0f} s]", flush=True)
    ms = bench.turns(RAGGED, 6, 8, limit - 11)
    said = {name: bench.copies(name) for name in ms}
    full = bench.turns(FULL, 2, 5, limit - 9, copies=1)
    print(f"ragged (each graph), ratio; 32 at 4128, ratio. tables: {said[base]}; {bench.copies(base)} [{time.perf_counter() - BEGUN:.0f} s]", flush=True)
    best: dict[str, str] = {}
    score, lines = dict[str, float](), dict[str, str]()
    for at, name, _ in done:
        gains = ms[name] / ms[base], full[name] / full[base]
        score[name] = gains[0] + max(0.0, gains[1] - 1.002)  # the full batch may not lose
        lines[name] = f"{name}: {said[name]} {gains[0]:.4f}; {full[name]:.3f} {gains[1]:.4f}"
        best[at] = min(best.get(at, name), name, key=score.__getitem__)
    ranked = sorted(lines, key=score.__getitem__)
    print("\n".join(lines[name] for name in ranked[:12]), flush=True)
    for i in range(12, len(ranked), 3):
        print("  " + " | ".join(lines[name] for name in ranked[i : i + 3]), flush=True)
    chosen = [t for t in done if t[1] == best[t[0]] and score[t[1]] < 0.9975 and t[0] != "splits"]
    together: Change = {}
    for _, _, change in chosen:
        together |= change
    print("best of each: " + "; ".join(name for _, name, _ in chosen), flush=True)
    bench.add("together", together, 3)
    parts = []
    for at, name, _ in chosen:
        less = {k: v for other, _, c in chosen if other != at for k, v in c.items()}
        if left(limit) > 8 and len(chosen) > 1 and bench.add(f"without {name}", less):
            parts.append(f"without {name}")
    some = [base, "together", *parts]
    ms = bench.turns(RAGGED, 8, 8, limit - 6, some)
    copies = {name: bench.copies(name) for name in some}
    full = bench.turns(FULL, 3, 5, limit - 5, some, 2)
    for name in some:
        ratios = f"({ms[name] / ms[base]:.4f}), {floors[0] / ms[name]:.1%}; {full[name]:.3f} ({full[name] / full[base]:.4f})"
        print(f"by turns, {name}: {copies[name]} = {ms[name]:.4f} {ratios}", flush=True)
    say_difference(bench, [*names, "together"], base)
    bench.add("plain", together, 1, 0)
    pairs = [bench.outputs(name, 3, [RAGGED, EDGES, FULL]) for name in ("together", "plain")]
    print(f"together: early against plain, {sum(not torch.equal(a, b) for a, b in zip(*pairs, strict=True))} of 3 differ in bits "
          f"[{time.perf_counter() - BEGUN:.0f} s]", flush=True)  # fmt: skip
    worst = over_rule(CONFIG, DEVICE, [(PRODUCTS[at], name, change) for at, name, change in TRIALS if at in PRODUCTS], choose)
    print(worst, flush=True)
    for name, change in ((n, {**together, **c}) for _, n, c in [("", "together", {}), *SHARES, ("", "together", {})]):
        if left(limit) > 3 and bench.add(f"{name} then", change, 1):
            print(f"upon it, {name}: {bench.turns(RAGGED, 3, 9, limit, [f'{name} then'])[f'{name} then']:.4f}", flush=True)
    choose({})
    for early in (0, BATCH):
        if left(limit) > 1.5:
            profile(bench, "tables", {}, early)
    if left(limit) > 1.5:
        profile(bench, "together", together, 0)
    return together


OTHERS = [(1, LONG, 32768), (17, SHORT, 1024), (64, SHORT, 1024), (8, SHORT, 1024), (8, 900, 8192)]


def others(chain: Chain, best: Change, limit: float, points: list[tuple[int, int, int]]) -> None:
    """What may not lose: one sequence, and other numbers of rows and wider ones that the same tiles serve."""
    for batch, length, capacity in points:
        if left(limit) < 1.5:
            return
        bench = Bench(chain, capacity, [length] * batch)
        for name, change in (("tables", {}), ("best", best), ("tables", {}), ("best", best)):
            bench.add(name, change, 1)
        ms = bench.turns([length] * batch, 5, 9, limit)
        figures = f"tables {bench.copies('tables')}, best {bench.copies('best')} ({ms['best'] / ms['tables']:.4f})"
        print(f"D {chain.config.d_model}, {batch} at {length} of {capacity}: {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=36.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=5)
    args = parser.parse_args()
    if args.compile:
        compile_all(args.workers, args.seconds)
        return
    keys()
    best: Change = {}
    chain = Chain(CONFIG, DEVICE)
    for part in (
        lambda: best.update(ragged(chain, args.seconds - 4)),
        lambda: others(chain, best, args.seconds, OTHERS),
        lambda: others(Chain(WIDE, DEVICE), best, args.seconds, [(BATCH, SHORT, 1024)]),
    ):
        try:
            part()
        except Exception:
            print("failed: " + " | ".join(traceback.format_exc().splitlines()[-5:])[:500], flush=True)
    print(f"[{time.perf_counter() - BEGUN:.0f} s]", flush=True)


if __name__ == "__main__":
    main()

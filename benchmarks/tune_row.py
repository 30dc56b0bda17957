"""Products of one row with 8-bit weights tried within the chain of bench_chain.py, by turns with the tables' and with 16-bit weights.

    python benchmarks/tune_row.py [--seconds 41] [--compile] [--what 2048:int8:0.4 ...]

One sequence at 160 of 32768 (the middle of a run at 128), of each width and format that --what names: 1.1B (2048) if it is not given; 350M is 1024. What is
tried stands in row_choices.py: sets as a whole, then for each kernel a line: every choice's time over that of the best set with one of its own, from several
captures by turns (captures of one chain lie 2 to 4% apart); what gains 0.3% with right numbers is kept. Then the winner as a whole against the tables' and
16 bits, its numbers (2x rule against float64 of the dequantised weights; early starts against plain ones, bit for bit), lines for tiles.json and each
kernel's own time. --compile: only compile, in processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from bench_chain import Chain, kernels
from products import EPS, FORMATS, Case, quantise
from row_choices import ENTER, KERNELS, LOGITS, PROJECT, SETS, TRIALS, Choice, Tiles

from sessa_deploy.config import SessaConfig
from sessa_deploy.kernels.engine import layer, mixer
from sessa_deploy.kernels.launch import jit, table
from sessa_deploy.kernels.launch.spec import OPENS, WAITS

BEGUN = time.perf_counter()
SIZES = {2048: "1.1B", 1024: "350M"}
HALF = torch.float16
_tiles, _opens = table.tiles, dict[tuple[str, str, str], bool]()
_original: dict[Any, Any] = {}


def variant(kernel: str, width: int) -> str:
    return str(width) if kernel == ENTER else f"1.{width}"


def _changed_tiles(name: str, arch: int, dtype: str, variant: str) -> Tiles:
    found = _tiles(name, arch, dtype, variant)
    opens = _opens.get((name, dtype, variant))
    return found if opens is None or not found.get("PDL") else {**found, "PDL": OPENS if opens else WAITS}


def apply(choice: Choice, width: int, kind: str) -> None:
    """Make the tables those of a choice; kind: of `jit.weights_name`."""
    entries = table._entries()
    if not _original:
        _original.update(entries)
        table.tiles = _changed_tiles
    entries.clear()
    entries.update(_original)
    _opens.clear()
    for name, tiles in choice.items():
        at, dtype = variant(name, width), "fp16" + kind
        wanted = {k: v for k, v in tiles.items() if k != "opens"}
        if name == ENTER:
            wanted = {k: v for k, v in wanted.items() if k not in ("BM", "AHEAD", "FORM")}
        entries[(name, 90, dtype, at)] = {**wanted, "arch": [90], "dtype": [dtype], "variant": at, "tuned": True}
        if "opens" in tiles:
            _opens[(name, dtype, at)] = tiles["opens"]
    jit.pinned.cache_clear()
    jit.available.cache_clear()


def said(tiles: Tiles) -> str:
    """A few characters for tiles."""
    opens = "" if "opens" not in tiles else " opens" if tiles["opens"] else " waits"
    registers = f" r{tiles['maxnreg']}" if "maxnreg" in tiles else ""
    return f"{tiles['BN']}x{tiles['BK']}/{tiles['KS']} w{tiles['num_warps']}{registers}{opens}"


def compile_one(job: tuple[str, Tiles, int, str]) -> str:
    """In a worker: one binary into the cache on disk."""
    name, tiles, width, kind = job
    try:
        apply({name: tiles}, width, kind)
        device, dtype = torch.device("cuda", 0), "fp16" + kind
        options = jit.pinned((name,), device, HALF, variant(name, width), table.early(name, 90, dtype, variant(name, width)), kind)[name]
        jit.launcher(getattr(layer, name), device, HALF, options, kind)
    except Exception as error:
        return f"{name} {width} {kind} {said(tiles)}: {str(error)[-160:]}"
    return ""


def compile_beside(job: tuple[str, str, torch.dtype]) -> str:
    """In a worker: a kernel of the chains that no trial changes."""
    name, at, dtype = job
    device, kind = torch.device("cuda", 0), jit.dtype_name(dtype)
    fn = next(getattr(m, name) for m in (layer, mixer) if hasattr(m, name))
    jit.launcher(fn, device, dtype, jit.pinned((name,), device, dtype, at, table.early(name, 90, kind, at))[name])
    return ""


BESIDE = [
    ("mixer_step_partial", "2048.128.1", HALF), ("mixer_step_partial", "1024.64.1", HALF), ("layer_rotary", "any", torch.float32),
    *(("mixer_step_combine", at, HALF) for at in ("1", "1.wide")), *(("layer_norm", at, HALF) for at in ("1024", "2048")),
    *((ENTER, at, HALF) for at in ("1024", "2048")), *((name, "1.wide", HALF) for name in KERNELS[1:]), (PROJECT, "1.1024", HALF),
    *((name, "1", HALF) for name in KERNELS[2:]),
]  # fmt: skip


def compile_all(workers: int) -> None:
    """One job a binary that a trial makes."""
    jobs = []
    for width in SIZES:
        for kind in ("int8", "fp8"):
            for name in KERNELS:
                for tiles in (*(choice[name] for choice in SETS[width].values()), *TRIALS[width].get(name, ())):
                    jobs += [job] if (job := (name, tiles, width, FORMATS[kind])) not in jobs else []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        beside = pool.map(compile_beside, BESIDE)
        for complaint in filter(None, pool.map(compile_one, jobs, chunksize=2)):
            print(f"not compiled: {complaint}", flush=True)
        list(beside)
    print(f"{len(jobs) + len(BESIDE)} binaries [{time.perf_counter() - BEGUN:.0f} s]", flush=True)


class Racer:
    """A width's chains, of 16 bits and of a format, upon the same caches."""

    def __init__(self, width: int) -> None:
        self.width, config = width, SessaConfig(d_model=width, n_layers=24, n_heads=16, vocab_size=50304)
        self.chains = {"": Chain(config)}
        self.caches = self.chains[""].caches(32768, [4128])
        self.x, self.length = self.chains[""].random(1, width), torch.tensor([160], dtype=torch.int32, device="cuda")
        self.side = torch.cuda.Stream()
        self.keep = self.capture("", {})

    def chain(self, format: str) -> Chain:
        if format not in self.chains:
            self.chains[format] = Chain(self.chains[""].config, weights=format)
        return self.chains[format]

    def capture(self, format: str, choice: Choice, early: int = 1) -> tuple[torch.cuda.CUDAGraph, Any]:
        """(graph, logits). Without what torch.cuda.graph does before: collect garbage, empty the allocator's cache."""
        apply(choice, self.width, FORMATS[format])
        chain, graph = self.chain(format), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.side):
            chain.step(self.x, self.length, self.caches, early)
            self.side.synchronize()
            graph.capture_begin()
            try:
                out = chain.step(self.x, self.length, self.caches, early)
            finally:
                graph.capture_end()
        return graph, out

    def fails(self, format: str, choice: Choice) -> str:
        """What a choice that cannot be captured says."""
        try:
            self.capture(format, choice)
        except Exception:
            return traceback.format_exc().splitlines()[-1][:60]
        return ""

    def cached(self, format: str, choice: Choice) -> float:
        """Milliseconds where all layers have one's weights, which a cache of 50 MB holds: what a step takes besides the memory's bandwidth."""
        chain = self.chain(format)
        layers, chain.layers = chain.layers, chain.layers[:1] * len(chain.layers)
        try:
            return self.race([(format, choice)], 2, 14)[0]
        finally:
            chain.layers = layers

    def race(self, runners: list[tuple[str, Choice]], captures: int, repeats: int) -> list[float]:
        """Milliseconds of each, the mean over captures of the median of replays by turns."""
        found: list[list[float]] = [[] for _ in runners]
        for turn in range(captures):
            graphs = [self.capture(*r)[0] for r in (runners if turn % 2 else runners[::-1])]
            graphs = graphs if turn % 2 else graphs[::-1]
            events = [[(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)] for _ in runners]
            for i in range(repeats):
                for graph, its in zip(graphs, events, strict=True):
                    its[i][0].record()
                    graph.replay()
                    its[i][1].record()
                    its[i][1].synchronize()
            for times, its in zip(found, events, strict=True):
                times.append(statistics.median(a.elapsed_time(b) for a, b in its[3:]))
        return [statistics.mean(times) for times in found]

    def same(self, format: str, best: Choice) -> str:
        """Whether early starts have the bits of plain ones, row by row, and how far logits are from the tables'."""
        graph, out = self.capture(format, best)
        generator, wrong, worst, early = torch.Generator("cuda").manual_seed(7), 0, 0.0, []
        kept, xs = self.x.clone(), [torch.randn(self.x.shape, device="cuda", generator=generator).half() for _ in range(6)]
        for i, x in enumerate(xs):
            self.x.copy_(x)
            self.length.fill_((160, 4128, 1)[i % 3])
            graph.replay()
            early.append(out.clone())
        for choice in (best, Choice()):
            apply(choice, self.width, FORMATS[format])
            for i, x in enumerate(xs):
                self.length.fill_((160, 4128, 1)[i % 3])
                plain = self.chain(format).step(x, self.length, self.caches, 0)
                wrong += choice is best and not torch.equal(plain, early[i])
                worst = max(worst, float((plain - early[i]).abs().max() / plain.abs().max()))
        self.x.copy_(kept)
        self.length.fill_(160)
        finite = all(bool(torch.isfinite(y).all()) for y in early)
        return f"early against plain: {wrong} of 6 differ; from the tables {worst:.1e} of the largest; finite {finite}"


def numbers(width: int, format: str, choice: Choice) -> str:
    """The 2x rule for each kernel of a choice, and for the entrance with rows far off zero."""
    apply(choice, width, FORMATS[format])
    found = []
    for name in choice:
        case = Case(name, 1, width, 50304, HALF, format, cold=False)
        options = jit.pinned((name,), case.x.device, HALF, variant(name, width), 0, case.name)[name]
        err, plain = case.error(options)
        floor = 8 * 2.0**-23 if name == LOGITS else 2.0**-10
        found.append(f"{name[6:]} {err:.1e}/{plain:.1e}{'' if err <= 2 * plain + floor else ' FAILS'}")
        if name == ENTER:
            w, scale = quantise(torch.randn(2 * width, width, device="cuda"), format)
            exact, one = w.double() * scale.double()[:, None], torch.ones(width, device="cuda", dtype=HALF)
            bias, rows = torch.zeros(2 * width, device="cuda", dtype=HALF), torch.randn(4, width, device="cuda")
            rows[0] += 300.0
            rows[1, 0], rows[2, -1], rows[3] = 3e4, -3e4, 7.0
            for i, x in enumerate(rows.half()):
                y = layer.norm_enter(x[None], one, bias[:width], EPS, w, bias, scale=scale)[:, width:]
                normal = {t: torch.nn.functional.layer_norm(x[None].to(t), (width,), None, None, EPS).to(HALF).to(t) for t in (torch.float64, torch.float32)}
                truth, plain32 = (normal[t] @ exact[width:].to(t).T for t in normal)
                most = max(float(truth.abs().max()), 1e-3)
                off, yard = (float((v.double() - truth).abs().max()) / most for v in (y, plain32.half()))
                found.append(f"row {i} {off:.1e}/{yard:.1e}{'' if off <= 2 * yard + 2.0**-10 else ' FAILS'}")
    return "; ".join(found)


def one_kernel(racer: Racer, format: str, best: Choice, name: str, trials: list[Tiles], until: float) -> tuple[Choice, list[Tiles], str]:
    """(the best choice then, the trials that came near, a line of times over the best's). Few captures of all, more of those that may be better."""
    line, times = [], list[tuple[float, Tiles]]()
    for i in range(0, len(trials), 8):
        if time.perf_counter() - BEGUN > until:
            break
        some = trials[i : i + 8]
        try:
            now, *found = racer.race([(format, best), *((format, {**best, name: tiles}) for tiles in some)], 2, 10)
        except Exception:
            said_by = [racer.fails(format, {**best, name: tiles}) for tiles in some]
            line += [f"{said(tiles)}: {wrong}" for tiles, wrong in zip(some, said_by, strict=True) if wrong]
            some = [tiles for tiles, wrong in zip(some, said_by, strict=True) if not wrong]
            now, *found = racer.race([(format, best), *((format, {**best, name: tiles}) for tiles in some)], 2, 10)
        line += [f"{said(tiles)} {t / now:.3f}" for t, tiles in zip(found, some, strict=True)]
        times += [(t / now, tiles) for t, tiles in zip(found, some, strict=True)]
    times.sort(key=lambda pair: pair[0])
    held, near = said(best[name]), [tiles for t, tiles in times if t < 1.012][:5]
    if candidates := [tiles for t, tiles in times if t < 1.002][:2]:
        now, *found = racer.race([(format, best), *((format, {**best, name: tiles}) for tiles in candidates)], 4, 14)
        line.append("again: " + ", ".join(f"{said(tiles)} {t / now:.3f}" for t, tiles in zip(found, candidates, strict=True)))
        if (least := min(found)) < 0.997 * now:
            tiles = candidates[found.index(least)]
            right = "FAILS" not in numbers(racer.width, format, {name: tiles})
            near += [best[name]] if right else []
            best = {**best, name: tiles} if right else best
            line[-1] += "*" if right else " WRONG"
    return best, near, f"now {held}: " + ", ".join(line)


def tune(racer: Racer, format: str, until: float) -> Choice:
    width, kind = racer.width, FORMATS[format]
    head, sets = f"{SIZES[width]} {format}", SETS[width]
    runners = [(format, Choice()), ("", Choice()), *((format, choice) for choice in sets.values())]
    racer.race(runners, 1, 4)  # loads the binaries
    a, c, *found = racer.race(runners, 2, 14)
    said_sets = ", ".join(f"{name} {t:.4f}" for name, t in zip(sets, found, strict=True))
    print(f"{head}: 16 bits {c:.4f}, tables {a:.4f} ({c / a:.3f}x); {said_sets} [{time.perf_counter() - BEGUN:.0f} s]", flush=True)
    best = dict(list(sets.values())[found.index(min(found))])
    left = {name: list(trials) for name, trials in TRIALS[width].items()}
    for turn in range(3):
        for name, trials in left.items():
            if time.perf_counter() - BEGUN > until or not trials:
                continue
            best, left[name], line = one_kernel(racer, format, best, name, [t for t in trials if t != best[name]], until)
            print(f"  {turn} {name[6:]} {line} [{time.perf_counter() - BEGUN:.0f} s]", flush=True)
    a, b, c = racer.race([(format, {}), (format, best), ("", {})], 5, 20)
    racer.length.fill_(4128)
    d, e, f = racer.race([(format, {}), (format, best), ("", {})], 2, 14)
    racer.length.fill_(160)
    print(f"{head} WINNER at 160: {b:.4f}, tables {a:.4f}, 16 bits {c:.4f}: {c / b:.3f}x, was {c / a:.3f}x; 4128: {e:.4f}, {d:.4f}, {f:.4f}", flush=True)
    print("  " + racer.same(format, best), flush=True)
    print("  2x rule: " + numbers(width, format, best), flush=True)
    for name, tiles in best.items():
        row = {k: v for k, v in tiles.items() if k != "opens" and not (name == ENTER and k in ("BM", "AHEAD", "FORM"))}
        entry = {"arch": [90], "dtype": [f"fp16{kind}", f"bf16{kind}"], "variant": variant(name, width), **row, "tuned": True}
        print(f"  {name}: {json.dumps(entry)}" + (f"  # {said(tiles)}" if "opens" in tiles else ""), flush=True)
    return best


def profile(racer: Racer, formats: list[tuple[str, Choice]]) -> None:
    """Microseconds of each kernel of a layer, none started early: its own work. Last: it spoils later graphs."""
    for format, choice in formats:
        found = {name: us * count / 24 for name, (us, count) in kernels(racer.capture(format, choice, 0)[0]).items() if count >= 24 or "logits" in name}
        layers = sum(us for name, us in found.items() if "logits" not in name)
        each = ", ".join(f"{name.removeprefix('layer_').removeprefix('mixer_step_')} {us:.2f}" for name, us in found.items())
        print(f"{SIZES[racer.width]} {format or '16 bits'} plain: {layers:.1f} us a layer: {each} (logits of 24)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=41.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--what", nargs="+", default=["2048:int8:0.4", "2048:fp8:0.75"], help="width:format:share of the seconds at which its trials end")
    args = parser.parse_args()
    if args.compile:
        compile_all(args.workers)
        return
    gc.disable()
    racers: dict[int, Racer] = {}
    chosen: dict[int, list[tuple[str, Choice]]] = {}
    for what in args.what:
        if racers and time.perf_counter() - BEGUN > 0.88 * args.seconds:
            break
        width, format, share = (cast(part) for cast, part in zip((int, str, float), what.split(":"), strict=True))
        try:
            racers[width] = racers.get(width) or Racer(width)
            best = tune(racers[width], format, share * args.seconds)
            chosen.setdefault(width, [("", {})]).append((format, best))
            print(f"  the same with one layer's weights for all: {racers[width].cached(format, best):.4f}", flush=True)
        except Exception:
            print(f"{SIZES[width]} {format} failed: " + " | ".join(traceback.format_exc().splitlines()[-4:])[-600:], flush=True)
    for width, formats in chosen.items():
        if time.perf_counter() - BEGUN < args.seconds:
            profile(racers[width], [*formats, (formats[-1][0], {})])


if __name__ == "__main__":
    main()

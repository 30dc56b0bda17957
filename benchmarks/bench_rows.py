"""Decode steps of several rows of one sequence beside one of a single row, from the plugin's kernels alone in one CUDA graph, as an engine runs them.

    python benchmarks/bench_rows.py [--sweep] [--models 350M 1.1B] [--points 128 4096] [--rows 1 2 4 8 16] [--seconds 140] [--json FILE]

First the numbers: a step of several rows of a mixer under the error rule against float64, and bits that depend neither on the rows behind nor on the batch.
Then the time of a step through all layers (no head) at so many cached tokens of a capacity of 32768, and its ratio to a step of one row; and what each kernel
takes by PyTorch's profiler. --sweep: the mixer's kernels alone with other tiles, the best last. Nothing begins after --seconds. float16, random weights;
lengths stand still, nothing is appended. Kernels are compiled ahead, on all cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_chain import Chain, kernels
from gpu import capture, graph_ms
from random_bundle import SIZES
from torch import Tensor

from sessa_deploy.config import SessaConfig
from sessa_deploy.kernels.engine import layer, mixer, mixer_rows
from sessa_deploy.kernels.engine.spec import WIDE_ROW, ahead_variant, few_variant, mixer_rows_variants, product_variant, rows_combines, step_variants
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import arch_of, launcher, pinned
from sessa_deploy.kernels.launch.limits import AHEAD_DEPTH, MIXER_BROAD, PRODUCT_ROWS

CAPACITY = 32768
MODELS = {name: (SIZES[name][0], SIZES[name][2]) for name in ("350M", "1.1B")}  # d_model, heads; 24 layers
LAYERS = 24
Options = dict[str, Any]
Tiles = dict[str, Options]


def say(text: str) -> None:
    print(text, flush=True)


class Clock:
    """Seconds since the start, and whether there is time for more."""

    def __init__(self, seconds: float) -> None:
        self.begun, self.seconds = time.monotonic(), seconds

    def left(self) -> bool:
        return time.monotonic() - self.begun < self.seconds


def attempt(what: str, work: Callable[[], Any]) -> Any:
    """What `work` gives; None, and the last lines of why, where it fails."""
    try:
        return work()
    except Exception:
        say(f"{what}: " + " | ".join(traceback.format_exc().strip().splitlines()[-3:]))
        return None


def step(chain: Chain, x: Tensor, length: Tensor, caches: list[list[Tensor]], early: int, tiles: Tiles | None = None) -> Tensor:
    """One sequence's step over the rows x (T,D), through all layers."""
    config, rows = chain.config, x.shape[0]
    cos, sin = (t.view(rows, -1) for t in layer.rotary(length, chain.limbs, rows, early))
    for w, (k_f, v_f, k_b, s_b) in zip(chain.layers, caches, strict=True):
        h = layer.norm_enter(x, *w["norm"], config.layer_norm_eps, *w["enter"], early)
        q, k, v, q_b, k_new, gamma = layer.project_gain(h, w["project"], w["biases"], cos, sin, *w["gamma"], config.gamma_max, early)
        s = mix(w, (q, k, v, q_b, k_new), gamma, (k_f, v_f, k_b, s_b), length, config.n_heads, early, tiles)
        x = layer.tail(s.view(x.shape), h, *w["tail"], x, early)
    return x


def mix(w: dict[str, Any], x: Sequence[Tensor], gamma: Tensor, caches: Sequence[Tensor], length: Tensor, heads: int, early: int,
        tiles: Tiles | None) -> Tensor:  # fmt: skip
    """A mixer's step over rows of one sequence; x: q, k, v, q_b, k_b, (T,D) each."""
    rows, (q, k, v, q_b, k_b), (k_f, v_f, past_kb, past_s) = x[0].shape[0], x, caches
    if rows == 1:
        q, k, v = (t.view(1, heads, -1) for t in (q, k, v))
        return mixer.step(q, k, v, k_f, v_f, *w["out"], q_b, gamma, past_kb, past_s, length, early, behind=True)
    q, k, v = (t.view(1, rows, heads, -1) for t in (q, k, v))
    return mixer_rows.step(q, k, v, k_f, v_f, *w["out"], q_b[None], k_b[None], gamma[None], past_kb, past_s, length, early, tiles, behind=True)


# --- compiling ahead: each of Triton's binaries is written to its cache by a process of its own


Job = tuple[str, str, "Options | None"]  # kernel, variant, options in place of its pinned ones


def _compile(job: Job) -> str:
    name, variant, options = job
    try:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        device = torch.device("cuda", 0)
        kind = "fp16" if "fp16" in table.kernel(name).dtypes else "fp32"
        options = table.options(name, arch_of(0), kind, variant) if options is None else options
        module = __import__(table.kernel(name).module, fromlist=[name])
        launcher(getattr(module, name), device, torch.float16 if kind == "fp16" else torch.float32, options)
    except Exception:
        return f"{name} {variant} {options}: " + traceback.format_exc().strip().splitlines()[-1]
    return ""


def compile_ahead(jobs: list[Job]) -> None:
    """Compile on all cores; what cannot be compiled is said, and met again where it is used."""
    begun, workers = time.monotonic(), max(1, min(14, (os.cpu_count() or 2) - 1, len(jobs)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for trouble in filter(None, pool.map(_compile, jobs)):
            say(trouble[:600])
    say(f"{len(jobs)} kernels compiled by {workers} processes in {time.monotonic() - begun:.0f} s")


def first_of(kernel: str, *variants: str) -> str:
    """The first of these variants that there is on this GPU; "" is none."""
    return next(v for v in variants if v and (v not in table.kernel(kernel).optional or table.has(kernel, arch_of(0), "fp16", v)))


def product(kernel: str, rows: int, width: int, variant: str = "") -> str:
    """The variant of a product that so many rows take at this width on this GPU; variant: in place of that of the rows alone."""
    variant = variant or product_variant(rows)
    return first_of(kernel, few_variant(kernel, rows, "", width), ahead_variant(kernel, variant, "", width), variant)


def mixer_kernels(count: int, width: int, heads: int) -> list[tuple[str, str]]:
    """(kernel, variant) of a mixer's step of so many rows."""
    head = width // heads
    if count > 1:
        return [("mixer_rows_partial", first_of("mixer_rows_partial", *mixer_rows_variants(count, width, head))),
                ("mixer_rows_combine", first_of("mixer_rows_combine", *rows_combines(width))),
                ("mixer_rows_out", product("mixer_rows_out", count, width, "any"))]  # fmt: skip
    adds = (WIDE_ROW, "1") if width > MIXER_BROAD else ("1",)
    return [("mixer_step_partial", first_of("mixer_step_partial", *step_variants(1, width, head, 1))),
            ("mixer_step_combine", first_of("mixer_step_combine", *adds)), ("layer_out", product("layer_out", 1, width))]  # fmt: skip


def chain_jobs(models: list[str], rows: list[int]) -> list[Job]:
    """Every kernel of the chains, slowest first. A binary is the same whether it starts early."""
    found = {("layer_rotary", "any"): None}
    for name, count in itertools.product(models, rows):
        width, heads = MODELS[name]
        joined = product("layer_norm_enter_rows", count, width, "any") if 1 < count <= PRODUCT_ROWS[1] and width <= AHEAD_DEPTH else "any"
        if count == 1:
            around = [("layer_norm_enter", table.width_variant("layer_norm_enter", width))]
        elif joined != "any":
            around = [("layer_norm_enter_rows", joined)]
        else:
            around = [("layer_norm", table.width_variant("layer_norm", width)), ("layer_enter", product("layer_enter", count, width))]
        around += [(kernel, product(kernel, count, width)) for kernel in ("layer_project_gain", "layer_tail")]
        found |= dict.fromkeys([*mixer_kernels(count, width, heads), *around])
    return [(kernel, key, None) for kernel, key in sorted(found, key=lambda f: "partial" not in f[0])]


# --- numbers


def check_numbers() -> None:
    """The error rule and the promises on bits, on this GPU."""
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "kernels")]
    from rows_cases import SHARED, case, first, mixed
    from rule import check

    good = 0
    shapes = [(16, 16, 64, 4200, [4128], 8), (16, 16, 64, 4200, [4128, 0, 130, 1], 16), (16, 16, 128, 600, [513, 33], 5), (16, 16, 64, 32768, [32768], 3)]
    for shape in shapes:
        def one(shape: Any = shape) -> bool:
            a = case(*shape, "cuda")
            check(mixer_rows.step(**a), mixed(a, torch.float64), mixed(a, torch.float32), name=str(shape))
            return True

        good += bool(attempt(f"numbers {shape}", one))

    def bits() -> str:
        a = case(16, 16, 64, 4200, [4128, 0, 130], 16, "cuda")
        whole, found = mixer_rows.step(**a), []
        for tokens in (2, 5, 8, 13):
            found.append(torch.equal(mixer_rows.step(**first(a, tokens)), whole[:, :tokens]))
        bad = {n: x.clone() if n in ("q", "k", "v", "q_b", "k_b", "gamma") else x for n, x in a.items()}
        for n in ("q", "k", "v", "q_b", "k_b", "gamma"):
            bad[n][:, 7:] = torch.nan
        found.append(torch.equal(mixer_rows.step(**bad)[:, :7], whole[:, :7]))
        found.append(torch.equal(mixer_rows.step(**{n: x if n in SHARED else x[2:3] for n, x in a.items()}), whole[2:3]))
        found.append(torch.equal(mixer_rows.step(**a), mixer_rows.step(**a, early=16)))
        return " ".join(map(str, found))

    say(f"numbers: {good} of {len(shapes)} within the rule; bits of T = 2, 5, 8, 13 of 16, of poison behind, alone, early: {attempt('bits', bits)}")


# --- times


class Model:
    """A chain of layers with caches up to the largest point."""

    def __init__(self, name: str, points: list[int]) -> None:
        self.name, (width, self.heads) = name, MODELS[name]
        self.chain = Chain(SessaConfig(d_model=width, n_layers=LAYERS, n_heads=self.heads, vocab_size=64))
        self.caches = self.chain.caches(CAPACITY, [max(points)])
        self.lengths = [torch.tensor([p], dtype=torch.int32, device="cuda") for p in points]

    def recorded(self, x: Tensor, length: Tensor, early: int) -> tuple[Any, float]:
        """A graph of a step over the rows x, and its milliseconds."""
        graph = capture([lambda: step(self.chain, x, length, self.caches, early)])
        return graph, graph_ms(graph, 25)

    def profiled(self, x: Tensor, length: Tensor) -> dict[str, tuple[float, int]]:
        """What each kernel of that step takes, as `bench_chain.kernels`."""
        return kernels(self.recorded(x, length, x.shape[0])[0])

    def mixers(self, x: Sequence[Tensor], gamma: Tensor, length: Tensor, tiles: Tiles) -> None:
        for w, four in zip(self.chain.layers, self.caches, strict=True):
            mix(w, x, gamma, four, length, self.heads, 0, tiles)

    def mixer_times(self, x: Sequence[Tensor], gamma: Tensor, tiles: Tiles) -> list[float]:
        """Microseconds of the mixer of a layer, for each length."""
        found = []
        for length in self.lengths:
            graph = capture([lambda length=length: self.mixers(x, gamma, length, tiles)])  # type: ignore[misc]
            found.append(1e3 * graph_ms(graph, 17) / LAYERS)
        return found


def measure(models: list[str], points: list[int], rows: list[int], clock: Clock) -> list[dict[str, Any]]:
    """The figures of every size, length and number of rows. The profiler comes behind all times: once it has run, kernels of later graphs take longer."""
    results, made = list[dict[str, Any]](), list[Model]()
    for name in models:
        model = Model(name, points)
        made.append(model)
        for point, length in zip(points, model.lengths, strict=True):
            single = 0.0
            for count in rows:
                if not clock.left():
                    return results
                x = model.chain.random(count, model.chain.config.d_model)
                found = attempt(f"{name} {point} T={count}", partial(model.recorded, x, length, count))
                if found is None:
                    continue
                ms = found[1]
                single = single or ms
                plain = (attempt("without early starts", partial(model.recorded, x, length, 0)) or (None, 0.0))[1]
                times = f"{ms:.4f} ms, {1e3 * ms / LAYERS:.2f} us a layer, {ms / single:.2f} x T=1 (without early starts {plain:.4f})"
                say(f"{name:5} past {point:5} T={count:2}: {times}")
                results.append({"model": name, "past": point, "rows": count, "ms": ms, "ratio": ms / single, "plain_ms": plain})
    for row in results:
        if not clock.left():
            break
        model = made[models.index(row["model"])]
        x, length = model.chain.random(row["rows"], model.chain.config.d_model), model.lengths[points.index(row["past"])]
        row["kernels"] = attempt("profile", partial(model.profiled, x, length)) or {}
        each = "; ".join(f"{kernel} {us:.1f}" for kernel, (us, launches) in row["kernels"].items() if launches > 1)
        say(f"{row['model']:5} past {row['past']:5} T={row['rows']:2}: {each}")
    return results


# --- tiles


def candidates(kernel: str, base: Options) -> Iterator[Options]:
    """Changes of one kernel's tiles that are worth trying, one step from where it stands."""
    wide = base.get("LANES_B", 0) * base.get("CHUNKS_B", 0) > 1024
    if kernel == "mixer_rows_partial":
        for rows_f, stages_f in ((16, 2), (16, 3), (16, 4), (32, 2), (32, 3)):
            yield {"ROWS_F": rows_f, "STAGES_F": stages_f}
        for rows_b, stages_b in ((16, 2), (16, 3), (16, 4), (32, 2), (32, 1)):
            yield {"ROWS_B": rows_b, "STAGES_B": stages_b}
        yield {"HEADS_F": 16, "CHUNKS_B": 16, "LANES_B": base["LANES_B"] // 2, "ROWS_F": 16, "num_warps": 16}
        yield {"HEADS_F": 16, "CHUNKS_B": 16, "LANES_B": base["LANES_B"] // 2, "ROWS_F": 16, "num_warps": 16, "STAGES_F": 2, "STAGES_B": 2}
        yield {"HEADS_F": 4, "ROWS_F": 32}
        if not wide:
            yield {"HEADS_F": 4, "CHUNKS_B": 4, "LANES_B": 256, "ROWS_F": 32, "STAGES_F": 2, "STAGES_B": 2, "num_warps": 4}
    elif kernel == "mixer_rows_combine":
        for f, b in ((16, 64), (64, 64), (32, 32), (32, 128), (64, 128), (16, 32)):
            yield {"BLOCK_F": f, "BLOCK_B": b, "MOST_F": f, "MOST_B": b}
        for df, db, warps in ((32, 32, 4), (64, 32, 2), (64, 64, 2), (64, 128, 4), (64, 64, 8)):
            yield {"DF": df, "DB": db, "num_warps": warps}
        yield {"NF": 2, "NB": 2}
    else:
        for bn, bk, ks, warps, stages in itertools.product((8, 16), (128, 256, 512), (2, 4, 8), (2, 4, 8), (2, 3, 4)):
            if ks == warps and bk // ks in (64, 32, 128) and (bn, bk, ks, stages) != (base["BN"], base["BK"], base["KS"], base["num_stages"]) and stages > 2:
                yield {"BM": 16, "BN": bn, "BK": bk, "KS": ks, "AHEAD": 0, "num_warps": warps, "num_stages": stages}


def sweep(models: list[str], points: list[int], clock: Clock, count: int = 8) -> None:
    """Times of the mixer's three kernels in all layers, one kernel's tiles changed at a time; the best of each kernel are joined in the end."""
    device = torch.device("cuda", 0)
    for name in models:
        model = Model(name, points)
        base = {k: pinned((k,), device, torch.float16, variant, count)[k] for k, variant in mixer_kernels(count, *MODELS[name])}
        trials = [(k, {**base[k], **change}, change) for k in base for change in candidates(k, base[k])]
        compile_ahead([(k, "tried", options) for k, options, _ in trials])
        rows, gamma = [model.chain.random(count, model.chain.config.d_model) for _ in range(5)], torch.rand(count, device="cuda")
        start = model.mixer_times(rows, gamma, base)
        say(f"{name} T={count}: pinned {' '.join(f'{us:.2f}' for us in start)} us a layer at {points}")
        best = {k: (sum(start), dict[str, Any]()) for k in base}
        for kernel, options, change in trials:
            if not clock.left():
                break
            found = attempt(f"{kernel} {change}", partial(model.mixer_times, rows, gamma, {**base, kernel: options}))
            if found:
                say(f"  {kernel:18} {' '.join(f'{us:.2f}' for us in found)}  {change}")
                best[kernel] = min(best[kernel], (sum(found), change), key=lambda pair: pair[0])
        joined = {k: {**base[k], **change} for k, (_, change) in best.items()}
        found = attempt("the best of each", partial(model.mixer_times, rows, gamma, joined))
        say(f"{name} best of each joined: {' '.join(f'{us:.2f}' for us in found or [])}  " + json.dumps({k: change for k, (_, change) in best.items()}))
        del model
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--points", nargs="+", type=int, default=[128, 4096])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--sweep", action="store_true", help="try tiles in place of timing the chain")
    parser.add_argument("--seconds", type=float, default=140.0, help="after which nothing more is begun")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    clock = Clock(args.seconds)
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if args.sweep:
        sweep(args.models, args.points, clock)
        return
    compile_ahead(chain_jobs(args.models, args.rows))
    check_numbers()
    results = measure(args.models, args.points, args.rows, clock)
    if args.json:
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

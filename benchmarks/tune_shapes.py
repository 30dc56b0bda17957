"""Feedback attention at ten shapes, whole forward and whole backward, with every way to arrange its kernels; which is best where, and by how much.

    python benchmarks/tune_shapes.py [--seconds 140] [--shapes 4,2048,512 16,1024,768]

Times are those of CUDA graphs, so that the host does not count; the yardstick is causal attention of the same width by cuDNN, timed alike. Every arrangement's
numbers are compared with today's. Binaries are compiled by many processes at once. Writes nothing: tiles.json and `spec.py` hold what is chosen.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from bench_feedback import SHAPES, inputs, median_us
from gpu import capture
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from sessa_deploy.kernels.feedback import backward, forward
from sessa_deploy.kernels.feedback.spec import solver
from sessa_deploy.kernels.launch.jit import Options, arch_of, launcher

OURS = (*forward.APART, backward.TOGETHER)  # kernels that stand in for others
PATIENCE = 20.0  # seconds after which an arrangement hangs
Change = dict[str, dict[str, Any]]


def arrangements(back: bool) -> dict[str, Change]:
    """Label -> what it changes of today's options, {} for a kernel that is left out."""
    solve = solver(arch_of(0), "bf16", "bwd" if back else "fwd")
    found: dict[str, Change] = {"today": {}}
    for bn, two, more in ((32, False, {}), (64, False, {}), (128, False, {}), (128, True, {}), (64, False, {"STAGES": 3, "maxnreg": 128}),
                          (64, False, {"STAGES": 3, "num_warps": 4, "maxnreg": 168})):
        form = {"BN": bn, "TWO": two, **more} | ({} if back else {"ALONE": False})
        found[f"{bn} columns{' in two' * two}" + "".join(f" {k} {v}" for k, v in more.items())] = {solve: form}
    if back:
        found["two gradients"] = {backward.TOGETHER: {}}
        for bn, stages in ((128, 4), (256, 3)):
            gemm = {"BT": 128, "BN": bn, "BK": 64, "STAGES": stages, "SCALED": False, "num_warps": 8, "num_stages": 1}
            found[f"both gradients {bn}/{stages}"] = {backward.TOGETHER: gemm}
        for what in ({"maxnreg": 128}, {"num_warps": 16}):
            found[f"grad_scores {what}"] = {"feedback_grad_scores": what}
    else:
        # which in a forward's parts also has scores of more stages, and a first solve that starts early
        found["64 columns alone"] = {solve: {"BN": 64, "TWO": False, "ALONE": True}}
        found["scores 64"] = {"feedback_scores": {"BM": 64, "num_warps": 4}}
    return found


_MADE: dict[str, dict[str, Any]] = {}


def options(back: bool, shape: tuple[int, ...], change: Change) -> Options:
    """Today's options with `change`; equal ones are one object, whose identity stands for a binary."""
    side = backward if back else forward
    base = side.tiles(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, shape[2], shape[0] * shape[1], batch=shape[0])
    merged = {name: {**base.get(name, {}), **o} for name, o in {**base, **change}.items()}
    kept = {name: o for name, o in merged.items() if change.get(name) != {} or name not in OURS}
    return {name: _MADE.setdefault(f"{name} {sorted(o.items())}", o) for name, o in kept.items()}


def compiled(name: str, choice: dict[str, Any]) -> str:
    """Compile one binary into Triton's cache, in a process of its own. Returns what went wrong."""
    from sessa_deploy.kernels.feedback import gradients, halves, inverse, tiles

    module = next(m for m in (forward, backward, gradients, halves, inverse, tiles) if hasattr(m, name))
    try:
        launcher(getattr(module, name), torch.device("cuda", 0), torch.bfloat16, choice)
    except Exception as error:
        return f"{name} {choice}: {type(error).__name__} {str(error).splitlines()[0][:150]}"
    return ""


def compile_all(sets: Iterable[Options], workers: int) -> None:
    """Compile everything that the sets of options name."""
    units = {f"{name} {sorted(o.items())}": (name, o) for options_ in sets for name, o in options_.items() if name != "feedback_pack"}
    begin = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for said in pool.map(compiled, *zip(*units.values(), strict=True)):
            if said:
                print(said, flush=True)
    print(f"{len(units)} binaries in {time.perf_counter() - begin:.0f} s", flush=True)


class Watch:
    """Ends the process when what it watches takes too long: a kernel that waits for ever cannot be stopped otherwise."""

    def __init__(self, what: str) -> None:
        self.timer = threading.Timer(PATIENCE, self.end, (what,))

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()

    @staticmethod
    def end(what: str) -> None:
        print(f"{what} does not end: giving up", flush=True)
        os._exit(3)


def graph_us(call: Callable[[], object], repeats: int = 12) -> float:
    """Median microseconds of a replay of three calls, each."""
    return median_us(capture([call] * 3).replay, repeats, 2) / 3


def yardstick(batch: int, tokens: int, width: int) -> tuple[float, float]:
    """Microseconds of cuDNN's causal attention with heads of 128: forward, and forward with backward."""
    q, k, v, g = (torch.randn(batch, width // 128, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        with torch.no_grad():
            once = graph_us(attend)
        return once, graph_us(lambda: torch.autograd.grad(attend(), leaves, g))


def far(a: Iterable[Tensor | None], b: Iterable[Tensor | None], count: int) -> float:
    """The largest distance between the first `count` tensors of two results, each over the tensor's largest magnitude."""
    worst = 0.0
    for x, y in itertools.islice(zip(a, b, strict=True), count):
        if x is not None and y is not None and x.numel():
            x, y = (z.float().nan_to_num(0.0, 0.0, 0.0) for z in (x, y))  # lse begins with minus infinity
            worst = max(worst, float((x - y).abs().max() / y.abs().max()))
    return worst


def kernels_us(call: Callable[[], object]) -> str:
    """Each kernel's microseconds of a call."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    rows = sorted(trace.key_averages(), key=lambda e: -e.device_time_total)
    return ", ".join(f"{e.key.removeprefix('feedback_')[:24]} {e.device_time_total / 3:.0f}" for e in rows[:12] if e.device_time_total > 0)


class Case:
    """A shape's inputs, what its forward gave, and cuDNN's microseconds."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        torch.manual_seed(0)
        self.shape, self.x = shape, inputs(*shape)
        batch, _, width = shape
        past = self.x[0].new_empty(batch, 0, width)
        self.behind = past, past, torch.zeros(batch, dtype=torch.int32, device=past.device)
        self.saved: Any = forward.forward(*self.x, *self.behind, True)
        self.peer, self.peer_both = yardstick(*shape)

    def call(self, back: bool, choice: Options) -> Callable[[], Any]:
        """One direction with these options."""
        batch, tokens, width = self.shape
        q, k, gamma, f = self.x
        side: Any = backward if back else forward
        plan = side.Plan(q.device, q.dtype, batch, tokens, 0, width, choice, forward.PANEL_BYTES)
        if back:
            s, lse, low = self.saved
            return lambda: backward.backward(f, q, k, gamma, f, s, lse, low, *self.behind, options=choice, made=plan)
        return lambda: forward.forward(*self.x, *self.behind, True, options=choice, made=plan)


def compare(case: Case, back: bool, ways: dict[str, Change], end: float) -> tuple[float, float] | None:
    """Print every arrangement's time; (today's, the best's) as a multiple of cuDNN's. None where nothing was timed before `end`."""
    name = f"{','.join(map(str, case.shape))} {'backward' if back else 'forward'}"
    wanted: Any = None
    calls: dict[str, Callable[[], Any]] = {}
    times: dict[str, float] = {}
    said = []
    for label, change in ways.items():
        if time.perf_counter() > end:
            break
        try:
            with Watch(f"{name} {label}"):
                call = case.call(back, options(back, case.shape, change))
                got = call()
                torch.cuda.synchronize()
                wanted = got if wanted is None else wanted
                times[label], calls[label] = graph_us(call), call
                if far(call(), got, 4) > 0:
                    said.append("OTHER BITS IN A SECOND CALL:")
                said.append(f"{label} {times[label]:.0f} ({far(got, wanted, 4 if back else 2):.0e})")
        except Exception as error:
            said.append(f"{label}: {type(error).__name__} {str(error).splitlines()[0][:100]}")
    if "today" not in times:
        print(f"{name}: {'; '.join(said)}", flush=True)
        return None
    best = min(times, key=lambda label: times[label])
    unit = case.peer_both - case.peer if back else case.peer
    print(f"{name}: cuDNN {unit:.0f} us; today {times['today'] / unit:.2f}, best {times[best] / unit:.2f} ({best}); {'; '.join(said)}", flush=True)
    for label in dict.fromkeys(("today", best)):
        with Watch(f"{name} {label} profile"):
            print(f"    {label}: {kernels_us(calls[label])}", flush=True)
    return times["today"] / unit, times[best] / unit


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=140.0, help="no further arrangement begins after this")
    parser.add_argument("--shapes", nargs="*", default=[",".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--workers", type=int, default=max(2, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--only", default="", help="arrangements whose label holds this (and today's)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shapes]
    sides = {back: {k: v for k, v in arrangements(back).items() if arguments.only in k or k == "today"} for back in (False, True)}
    every = [options(back, shape, change) for back, ways in sides.items() for change in ways.values() for shape in shapes]
    compile_all(every, arguments.workers)
    for back, ways in sides.items():
        found: list[tuple[float, float]] = []
        for shape in shapes:
            if time.perf_counter() - begin < arguments.seconds:
                with Watch(str(shape)):
                    case = Case(shape)  # type: ignore[arg-type]
                pair = compare(case, back, ways, begin + arguments.seconds)
                found += [] if pair is None else [pair]
                del case
                torch.cuda.empty_cache()
        for what, values in zip(("today", "best"), zip(*found, strict=True), strict=False):
            print(f"{'backward' if back else 'forward'} {what}: {math.exp(statistics.fmean(map(math.log, values))):.2f} times cuDNN's over "
                  f"{len(values)} shapes, worst {max(values):.2f}", flush=True)
    print(f"{time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

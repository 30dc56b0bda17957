"""Feedback attention on a GPU beside its peers: the official algorithm, and causal attention of the same width (the yardstick).

    python benchmarks/bench_feedback.py [--no-compile] [--no-official] [--no-curves] [--out DIR]

bf16, medians over CUDA events, ours and the yardstick's by turns but for the curves. Official: einsum, softmax, gamma, one float32 triangular solve, eager
and under torch.compile. Yardstick: scaled_dot_product_attention(is_causal=True) with D/128 heads of width 128, the faster of the FLASH_ATTENTION and
CUDNN_ATTENTION backends. Random routing and the predecessor chain are both timed. Copy bandwidth and bf16 matrix rate are measured in the same run. Needs a
CUDA GPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from gpu import capture, peak_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sessa_deploy.kernels import ops

SHAPES = ((1, 2048, 768), (1, 8192, 1024), (8, 2048, 1024), (4, 8192, 1024), (1, 16384, 1024),
          (2, 4096, 1536), (1, 8192, 2048), (4, 2048, 512), (2, 5000, 1024), (16, 1024, 768))
CURVE = tuple(1024 << i for i in range(7))
OFFICIAL_UP_TO = 16384  # its T x T float32 matrices take gigabytes beyond
DTYPE = torch.bfloat16


def median_us(call: Callable[[], object], repeats: int = 15, warmup: int = 12) -> float:
    """Median device time of one call in microseconds, calls queued back to back so that host time shows only where it is the limit. warmup: as many as a
    training loop needs until it replays its steps, for all alike."""
    for _ in range(warmup):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def peak_mib(call: Callable[[], object]) -> float:
    """Peak device memory during a call above what was allocated before it, in MiB (outputs included)."""
    return peak_bytes(call) / 2**20


def inputs(batch: int, tokens: int, width: int, chain: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, f (B,T,D) bf16 and gamma (B,T) float32; with `chain` every row puts all its weight on its predecessor, gamma 0.999."""
    q, k, f = (torch.randn(batch, tokens, width, device="cuda", dtype=DTYPE) for _ in range(3))
    gamma = torch.rand(batch, tokens, device="cuda") * 2 - 1
    if chain:
        keys = F.normalize(torch.randn(batch, tokens + 1, width, device="cuda"), dim=-1) * (200 * math.sqrt(width)) ** 0.5
        q, k, gamma = keys[:, :-1].to(DTYPE).contiguous(), keys[:, 1:].to(DTYPE).contiguous(), torch.full_like(gamma, 0.999)
    return q, k, gamma, f


def official(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor) -> Tensor:
    """The official algorithm: T x T scores in bf16, masked softmax, B = gamma alpha, (I - B) s = f by a float32 triangular solve."""
    tokens = q.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril(-1)
    scores = torch.einsum("btd,bjd->btj", q, k) * q.shape[2] ** -0.5
    alpha = torch.softmax(scores.masked_fill(~mask, -torch.inf).float(), dim=-1).masked_fill(~mask, 0.0)
    system = torch.eye(tokens, device=q.device) - gamma[..., None] * alpha
    return torch.linalg.solve_triangular(system, f.float(), upper=False, unitriangular=True).to(q.dtype)


def training(call: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    """forward and backward of `call` on `leaves`, gradients to all of them."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    grad = torch.randn_like(call(*leaves))
    return lambda: torch.autograd.grad(call(*leaves), leaves, grad)


def by_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds of each call, of as many rounds as there are calls, each of which begins with another, every second one backwards: long kernels
    bring a card to its power limit, and who comes first, or behind a short one, would have the higher clock."""
    names, found = list(calls), dict[str, list[float]]()
    for call in calls.values():
        median_us(call, 1)  # until it is replayed, where it is
    for turn in range(len(names)):
        for name in (names[turn:] + names[:turn])[:: -1 if turn % 2 else 1]:
            found.setdefault(name, []).append(median_us(calls[name], 7, 3))
    return {name: statistics.median(found[name]) for name in names}


def causal(*x: Tensor) -> Tensor:
    """The yardstick, on q, k, v (B,heads,T,128)."""
    return F.scaled_dot_product_attention(*x, is_causal=True)


def yardstick(batch: int, tokens: int, width: int) -> tuple[SDPBackend, float, tuple[Tensor, ...]]:
    """The faster causal attention backend, the time of its forward, and its q, k, v."""
    x = tuple(torch.randn(batch, width // 128, tokens, 128, device="cuda", dtype=DTYPE) for _ in range(3))
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend), torch.no_grad():
            times[backend] = median_us(lambda: causal(*x))
    best = min(times, key=lambda backend: times[backend])
    return best, times[best], x


def ceilings() -> dict[str, float]:
    """Copy bandwidth in TB/s (bytes read and written) and bf16 matrix rate in TFLOP/s, on random data."""
    x = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    return {"copy_tb_s": 2 * x.numel() * 4 / median_us(lambda: y.copy_(x), 7) / 1e6, "matmul_tflop_s": 2 * 8192**3 / median_us(lambda: a @ b, 9) / 1e6}


def row(batch: int, tokens: int, width: int, compiled: Callable[..., Tensor] | None, peer: bool = True) -> dict[str, Any]:
    """Every time of one shape in microseconds, ours and the yardstick's by turns. peer: the official algorithm's too."""
    x, chain = inputs(batch, tokens, width), inputs(batch, tokens, width, chain=True)
    backend, _, y = yardstick(batch, tokens, width)
    result: dict[str, Any] = {"B": batch, "T": tokens, "D": width}
    with sdpa_kernel(backend):
        with torch.no_grad():
            theirs, ours = partial(causal, *y), partial(ops.feedback_attention, *x)
            times = by_turns({
                "sdpa": theirs, "forward": ours, "forward_chain": partial(ops.feedback_attention, *chain),
                "forward_graph": capture([ours]).replay, "sdpa_graph": capture([theirs]).replay})  # fmt: skip
            if peer and tokens <= OFFICIAL_UP_TO:
                result["official"] = median_us(lambda: official(*x), 5)
                if compiled is not None:
                    result["official_compiled"] = median_us(lambda: compiled(*x), 5)
        both = by_turns({"sdpa": training(causal, y), "both": training(ops.feedback_attention, x), "both_chain": training(ops.feedback_attention, chain)})
    sdpa = {"backend": backend.name, "forward": times.pop("sdpa"), "graph": times.pop("sdpa_graph"), "both": both.pop("sdpa")}
    return {**result, "sdpa": sdpa, **times, **both}


def curves() -> list[dict[str, Any]]:
    """B=1, D=1024 over T: time, TFLOP/s and peak memory of the forward and the training step, and of the official forward."""
    rows = []
    for tokens in CURVE:
        x = inputs(1, tokens, 1024)
        step = training(ops.feedback_attention, x)
        point: dict[str, Any] = {"T": tokens}
        with torch.no_grad():  # memory first: a call that is replayed later takes nothing anew
            point["forward_mib"] = peak_mib(lambda x=x: ops.feedback_attention(*x))
            point["forward"] = median_us(lambda x=x: ops.feedback_attention(*x), 5)
            if tokens <= OFFICIAL_UP_TO:
                point["official_mib"] = peak_mib(lambda x=x: official(*x))
                point["official"] = median_us(lambda x=x: official(*x), 3, 1)
        point["both_mib"], point["both"] = peak_mib(step), median_us(step, 5)
        point["tflop_s"] = 2 * tokens**2 * 1024 / point["forward"] / 1e6
        point["sdpa"] = yardstick(1, tokens, 1024)[1]
        rows.append(point)
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures the targets are stated in: geometric means over the shapes, and the worst of them."""

    def mean(values: list[float]) -> float:
        return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan

    forward, both = ([r[what] / r["sdpa"][what] for r in rows] for what in ("forward", "both"))
    graph = [r["forward_graph"] / r["sdpa"]["graph"] for r in rows]
    official = [r["official"] / r["forward"] for r in rows if "official" in r]
    return {
        "forward_over_yardstick": mean(forward), "forward_over_yardstick_worst": max(forward),
        "graph_over_yardstick": mean(graph), "graph_over_yardstick_worst": max(graph),
        "both_over_yardstick": mean(both), "both_over_yardstick_worst": max(both),
        "official_over_forward": mean(official), "official_over_forward_least": min(official, default=math.nan),
        "chain_over_random": mean([r["forward_chain"] / r["forward"] for r in rows]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the official algorithm out")
    parser.add_argument("--no-official", action="store_true", help="leave the official algorithm out")
    parser.add_argument("--no-curves", action="store_true", help="leave the curves over T out")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the plots (default: benchmarks/results)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU", file=sys.stderr)
        return 2
    if options.out:
        common.RESULTS = options.out
    compiled = None if options.no_compile or options.no_official else torch.compile(official, dynamic=False)
    rows = []
    for shape in SHAPES:
        try:
            rows.append(found := row(*shape, compiled, not options.no_official))
        except Exception as error:
            print(f"{shape} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            continue
        forward, both = (found[what] / found["sdpa"][what] for what in ("forward", "both"))
        print(f"{shape}: forward {found['forward']:.0f} us, {forward:.2f} times {found['sdpa']['backend']}; both {found['both']:.0f} us, {both:.2f} times",
              flush=True)  # fmt: skip
    if not rows:
        return 1
    summary, limits = ratios(rows), ceilings()
    title = f"microseconds; copies {limits['copy_tb_s']:.2f} TB/s, matrix products {limits['matmul_tflop_s']:.0f} TFLOP/s"
    table = Table("B,T,D", "forward", "chain", "SDPA", "x", "graph", "its SDPA", "x", "official", "compiled", "x", "both", "SDPA both", "x", title=title)
    for r in rows:
        peer = r.get("official", math.nan)
        numbers = [r["forward"], r["forward_chain"], r["sdpa"]["forward"], r["forward"] / r["sdpa"]["forward"]]
        numbers += [r["forward_graph"], r["sdpa"]["graph"], r["forward_graph"] / r["sdpa"]["graph"]]
        numbers += [peer, r.get("official_compiled", math.nan), peer / r["forward"], r["both"], r["sdpa"]["both"], r["both"] / r["sdpa"]["both"]]
        table.add_row(f"{r['B']},{r['T']},{r['D']}", *("-" if math.isnan(n) else f"{n:.3g}" if n < 100 else f"{n:.0f}" for n in numbers))
    Console(width=150).print(table, rows[0]["sdpa"]["backend"], {name: round(ratio, 3) for name, ratio in summary.items()})
    common.write("feedback", {"ceilings": limits, "ratios": summary, "shapes": rows})
    if not options.no_curves:
        points = curves()
        common.write("feedback", {"ceilings": limits, "ratios": summary, "shapes": rows, "curves": points})
        t = [p["T"] for p in points]
        few = [p["T"] for p in points if "official" in p]
        series = {"forward": (t, [p["forward"] / 1e3 for p in points]), "forward + backward": (t, [p["both"] / 1e3 for p in points])}
        series["causal attention, forward"] = (t, [p["sdpa"] / 1e3 for p in points])
        series["official, forward"] = (few, [p["official"] / 1e3 for p in points if "official" in p])
        common.line_plot("feedback_time", series, "T", "ms", "Feedback attention, B=1, D=1024, bf16")
        memory = {"forward": (t, [p["forward_mib"] for p in points]), "forward + backward": (t, [p["both_mib"] for p in points])}
        memory["official, forward"] = (few, [p["official_mib"] for p in points if "official" in p])
        common.line_plot("feedback_memory", memory, "T", "peak MiB above the inputs", "Feedback attention, B=1, D=1024, bf16")
        common.line_plot("feedback_rate", {"forward": (t, [p["tflop_s"] for p in points])}, "T", "TFLOP/s", "Feedback attention, B=1, D=1024, bf16")
        Console(width=150).print([{k: round(v, 1) for k, v in p.items()} for p in points])
    return 0 if len(rows) == len(SHAPES) else 1


if __name__ == "__main__":
    sys.exit(main())

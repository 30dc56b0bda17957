"""Tune the tiles of feedback attention's kernels on this GPU and pin the winners in the launch table.

    python benchmarks/tune.py [--kernel NAME ...] [--write]

One kernel at a time, the others at their pinned options; the score is the geometric mean over the target shapes of the kernel's device time, taken
from the profiler. --write pins the best for this compute capability and bf16; without it a table is printed.
Nothing is tuned at launch. The decode step has its own script, tune_step.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from typing import Any

import torch
from bench_feedback import SHAPES, inputs
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from sessa_deploy.kernels.feedback import backward, forward
from sessa_deploy.kernels.feedback.spec import solve_variant
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import Options, arch_of, pinned

SOLVE = {"BN": (64, 128), "STAGES": (2, 3), "num_warps": (4, 8)}
GEMM = {"BN": (128, 256), "BK": (64,), "STAGES": (2, 3, 4), "num_warps": (8,)}
TILES = {"BM": (128,), "NB": (1, 2), "num_stages": (3, 4), "GROUP": (4, 8, 16)}
SPACE: dict[str, dict[str, tuple[int, ...]]] = {
    "feedback_scores": TILES,
    "feedback_combine": {"num_warps": (4, 8)},
    "feedback_solve": SOLVE,
    "feedback_solve_transposed": SOLVE,
    "feedback_grad_products": TILES,
    "feedback_grad_scores": {"CHUNK": (8, 32), "num_warps": (4, 8)},
    "feedback_grad_q": GEMM,
    "feedback_grad_k": GEMM,
}
# Kernels that must agree: the scores kernels set the padding of the columns, the pack kernel writes what the solve reads.
TIED = {"feedback_scores": ("NB",), "feedback_grad_products": ("NB",), "feedback_solve": ("BN",)}
FOLLOWERS = {"feedback_scores": ("feedback_grad_products",), "feedback_grad_products": ("feedback_scores",), "feedback_solve": ("feedback_pack",)}


def candidates(name: str) -> list[dict[str, int]]:
    space = SPACE[name]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def override(options: Options, name: str, change: dict[str, int]) -> Options:
    """A copy of `options` with `change` in kernel `name`, and what is tied to it in the kernels that must agree."""
    copy = {n: dict(o) for n, o in options.items()}
    if name in copy:
        copy[name].update(change)
    for follower in FOLLOWERS.get(name, ()):
        if follower in copy:
            copy[follower].update({k: change[k] for k in TIED[name]})
    return copy


def shapes_of(name: str, variant: str, arch: int) -> list[tuple[int, int, int]]:
    """The target shapes on which a kernel runs with the tiles of this variant."""
    if "wide" not in table.kernel(name).variants:
        return list(SHAPES)
    side = table.kernel(name).variants[0]
    return [shape for shape in SHAPES if solve_variant(arch, "bf16", shape[2], side) == variant]


def kernel_us(name: str, back: bool, change: dict[str, int], shapes: list[tuple[int, int, int]], repeats: int = 5) -> float:
    """Geometric mean over `shapes` of kernel `name`'s device time in microseconds; inf where a candidate does not fit the GPU."""
    times = []
    for shape in shapes:
        q, k, gamma, f = inputs(*shape)
        past = q.new_empty(shape[0], 0, shape[2])
        length = torch.zeros(shape[0], dtype=torch.int32, device=q.device)
        there = override(forward.tiles(q.device, q.dtype, shape[2]), name, {} if back else change)
        s, lse, low = forward.forward(q, k, gamma, f, past, past, length, True, options=there)

        def call(x: tuple[Any, ...] = (q, k, gamma, f, s, lse, low, past, past, length), there: Options = there) -> None:
            if back:
                options = override(backward.tiles(x[0].device, x[0].dtype, x[0].shape[2]), name, change)
                backward.backward(x[3], *x, options=options)
            else:
                forward.forward(*x[:4], *x[7:], True, options=there)

        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
        times.append(sum(e.device_time_total for e in trace.key_averages() if e.key == name) / repeats)
    return math.exp(statistics.fmean(map(math.log, times)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", action="append", choices=sorted(SPACE), help="only this kernel (repeatable)")
    parser.add_argument("--write", action="store_true", help="pin the winners in the launch table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU", file=sys.stderr)
        return 2
    from triton.runtime.errors import OutOfResources

    arch = arch_of(torch.cuda.current_device())
    for name in arguments.kernel or SPACE:
        sides = [side for side, names in (("fwd", forward.FORWARD), ("bwd", backward.BACKWARD)) if name in names]
        variants = [(side, v) for side in sides for v in (side, "wide") if table.has(name, arch, "bf16", v) and shapes_of(name, v, arch)]
        for side, variant in variants:
            sheet = Table("options", "us (geometric mean)", title=f"{name}, {variant}, sm_{arch}, bf16")
            scores: list[tuple[float, dict[str, int]]] = []
            for change in candidates(name):
                try:
                    scores.append((kernel_us(name, side == "bwd", change, shapes_of(name, variant, arch)), change))
                except OutOfResources:
                    scores.append((math.inf, change))
                sheet.add_row(str(change), f"{scores[-1][0]:.1f}")
            Console().print(sheet)
            best = min(scores, key=lambda score: score[0])[1]
            if arguments.write:
                followers = [n for n in FOLLOWERS.get(name, ()) if variant in table.kernel(n).variants]
                for target, change in ((name, best), *((n, {k: best[k] for k in TIED[name]}) for n in followers)):
                    entry = {k: v for k, v in table.pinned(target, arch, "bf16", variant).items() if k not in ("arch", "dtype", "variant", "tuned")}
                    table.pin(target, arch, ["bf16"], variant, {**entry, **change})
                pinned.cache_clear()
    return 0


if __name__ == "__main__":
    sys.exit(main())

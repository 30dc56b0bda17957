"""Tiles of the layer's kernels around its attentions, timed on this GPU: candidates for each product and number of rows, the best of them, and cuBLAS beside.

    python benchmarks/tune_layer.py [--width 1024] [--seconds 45] [--json FILE] [--pin]

Weights come from as many copies as a deep model has, so that the cache holds none of them. Times are of one launch in a CUDA graph of many.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from gpu import capture, event_ms

from sessa_deploy.kernels.engine import layer
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, arch_of, launcher

# BM, BN, BK, KS, warps, stages
SMALL = [(16, 16, 128, 1, 4, 4), (16, 16, 256, 1, 4, 3), (16, 16, 256, 2, 2, 3), (16, 16, 256, 4, 4, 3), (16, 16, 256, 4, 4, 4),
         (16, 16, 512, 4, 4, 3), (16, 16, 512, 8, 8, 3), (16, 16, 128, 2, 2, 6), (16, 8, 256, 4, 4, 4), (16, 8, 128, 4, 4, 4), (16, 32, 256, 4, 4, 3),
         (16, 64, 128, 1, 4, 4)]  # fmt: skip
MIDDLE = [(m, *rest) for m in (32, 64) for rest in ((16, 256, 1, 4, 3), (16, 256, 4, 4, 3), (32, 128, 1, 4, 4), (32, 256, 1, 4, 3), (64, 128, 1, 4, 3))]
MIDDLE += [(16, 16, 256, 4, 4, 3), (16, 8, 256, 4, 4, 4), (32, 8, 256, 4, 4, 3)]
LARGE = [(128, 256, 64, 1, 8, 3), (128, 256, 64, 1, 8, 4), (128, 128, 64, 1, 8, 3), (128, 128, 64, 1, 8, 4), (128, 128, 64, 1, 4, 3),
         (256, 128, 64, 1, 8, 3), (64, 256, 64, 1, 4, 3), (64, 256, 64, 1, 4, 4), (64, 256, 64, 1, 8, 3), (128, 64, 64, 1, 4, 4), (128, 64, 64, 1, 8, 4),
         (128, 128, 128, 1, 8, 2)]  # fmt: skip
ONE = [(1, n, k, 1, w, 1) for n, k, w in ((4, 1024, 2), (4, 1024, 4), (8, 1024, 4), (8, 1024, 8), (16, 1024, 4), (16, 1024, 8), (32, 1024, 4), (8, 512, 4))]
CASES = {"1": (1, ONE), "16": (8, SMALL), "64": (32, MIDDLE), "any": (8192, LARGE)}
COPIES = {"1": 24, "16": 24, "64": 24, "any": 2}


class Case:
    """One kernel at one number of rows, with its tensors; the weights in several copies."""

    def __init__(self, kernel: str, variant: str, width: int, vocabulary: int, dtype: torch.dtype) -> None:
        self.kernel, self.variant, self.dtype, self.rows = kernel, variant, dtype, CASES[variant][0]
        self.columns = {"layer_enter": 2 * width, "layer_logits": vocabulary, "layer_project_gain": 5 * width}.get(kernel, width)
        if kernel == "layer_logits":
            self.rows = min(self.rows, 32)
        rows, device = self.rows, "cuda"

        def make(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).mul_(0.1).to(kind)

        x, h, bias = make(rows, width), make(rows, 2 * width), make(self.columns)
        self.x = x
        self.weights = [make(self.columns, width) for _ in range(min(COPIES[variant], max(1, (6 << 30) // (2 * self.columns * width))))]
        out = make(rows, self.columns, kind=torch.float32 if kernel == "layer_logits" else dtype)
        cos, sin = make(rows, 32, kind=torch.float32), make(rows, 32, kind=torch.float32)
        add = make(rows, width, kind=torch.float32)
        parts, gamma_weight, gamma = [make(rows, width) for _ in range(5)], make(width, kind=torch.float32), make(rows, kind=torch.float32)
        tail: tuple[Any, ...] = (rows, width)
        self.arguments = {
            "layer_linear": lambda w: (x, w, bias, out, *tail, self.columns), "layer_out": lambda w: (x, w, bias, add, out, *tail),
            "layer_enter": lambda w: (x, w, bias, out, *tail),
            "layer_logits": lambda w: (x, w, out, *tail, self.columns),
            "layer_tail": lambda w: (x, h, w, bias, x, out, *tail),
            "layer_project_gain": lambda w: (h, w, bias, bias, bias, bias, cos, sin, gamma_weight, gamma_weight, *parts, gamma, *tail, width, 8, 0.999),
        }[kernel]  # fmt: skip

    def grid(self, tiles: dict[str, Any]) -> tuple[int, ...]:
        tall = triton.cdiv(self.rows, tiles["BM"])
        if self.kernel == "layer_project_gain":
            return (layer.gamma_programs(self.rows, tiles["BM"]) + 5 * tall * triton.cdiv(self.columns // 5, tiles["BN"]),)
        return (tall * triton.cdiv(self.columns, tiles["BN"]),)

    def time(self, options: dict[str, Any] | None) -> float:
        """Microseconds a launch; options None: torch.mm."""
        if options is None:
            steps = [lambda w=w: torch.mm(self.x, w.t()) for w in self.weights]
        else:
            call = launcher(getattr(layer, self.kernel), self.x.device, self.dtype, options)
            grid = self.grid(options)
            steps = [lambda w=w: call(grid, *(address(a) if isinstance(a, torch.Tensor) else a for a in self.arguments(w))) for w in self.weights]
        calls = steps * (max(1, 24 // len(steps)) if self.variant != "any" else 2)
        return 1e3 * sorted(event_ms(capture(calls, steps[:2]).replay, 7))[2] / len(calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "fp32"))
    parser.add_argument("--seconds", type=float, default=45.0, help="begin no further candidate after this long")
    parser.add_argument("--only", nargs="*", default=[], metavar="KERNEL:VARIANT", help="e.g. layer_tail:any; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pin", action="store_true", help="write the best into the launch table")
    args = parser.parse_args()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    begun, arch, found = time.perf_counter(), arch_of(0), []
    names = ("layer_enter", "layer_project_gain", "layer_linear", "layer_out", "layer_tail", "layer_logits")
    without = {("layer_logits", "any"), ("layer_enter", "1")}
    pairs = [(n, v) for v in CASES for n in names if (n, v) not in without and (not args.only or f"{n}:{v}" in args.only)]
    jobs = [(name, variant, c) for name, variant in pairs for c in CASES[variant][1]]

    def tiles(c: tuple[int, ...]) -> dict[str, int]:
        """The launch table's entry; one row's weights are all read ahead, up to 1024 columns."""
        return {**dict(zip(("BM", "BN", "BK", "KS"), c, strict=False)), "AHEAD": 1024 // c[2] if c[0] == 1 else 0, "num_warps": c[4], "num_stages": c[5]}

    def options(c: tuple[int, ...]) -> dict[str, Any]:
        return {**tiles(c), "PDL": False}

    def compile_one(job: tuple[str, str, tuple[int, ...]]) -> tuple[Any, str]:
        try:
            launcher(getattr(layer, job[0]), torch.device("cuda", 0), dtype, options(job[2]))
            return job, ""
        except Exception as error:
            return job, f"{type(error).__name__}: {error}"[:80]

    with ThreadPoolExecutor(12) as pool:
        failed = {job: why for job, why in pool.map(compile_one, jobs) if why}
    print(f"compiled {len(jobs)} in {time.perf_counter() - begun:.0f} s, failed {len(failed)}: {list(failed.items())[:2]}", flush=True)
    for variant, (_, tried) in CASES.items():
        for name in names:
            if (name, variant) not in pairs or time.perf_counter() - begun > args.seconds:
                continue
            case, rows = Case(name, variant, args.width, args.vocabulary, dtype), []
            library = case.time(None)
            for c in tried:
                if (name, variant, c) in failed:
                    continue
                try:
                    rows.append((case.time(options(c)), c))
                except Exception as error:
                    print(f"{name} {variant} {c}: {type(error).__name__}: {error}"[:140])
            rows.sort()
            found.append({"kernel": name, "variant": variant, "rows": case.rows, "cublas_us": library, "candidates": rows})
            best = "  ".join(f"{t:.2f} {c}" for t, c in rows[:4])
            print(f"{name:14} {variant:>4} rows {case.rows:5}: cuBLAS {library:8.2f} us | {best}", flush=True)
            if args.pin and rows:
                table.pin(name, arch, [args.dtype] if args.dtype == "fp32" else ["fp16", "bf16"], variant, tiles(rows[0][1]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

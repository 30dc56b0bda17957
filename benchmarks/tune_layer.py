"""Tiles of the layer's kernels around its attentions, timed on this GPU: candidates for each product and number of rows, the best of them, and cuBLAS beside.

    python benchmarks/tune_layer.py [--width 1024] [--weights int8] [--seconds 45] [--json FILE] [--pin]

Weights come from as many copies as no cache holds. Times are of one launch in a CUDA graph of a launch for each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from products import DTYPES, Case, Job, compile_all

from sessa_deploy.contract import WEIGHT_FORMATS
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import arch_of, weights_name

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
Cases = dict[str, tuple[int, Sequence[tuple[int, ...]]]]
CASES: Cases = {"1": (1, ONE), "16": (8, SMALL), "64": (32, MIDDLE), "any": (8192, LARGE)}
# of weights of 8 bits; one row's last number: how many BK are read ahead
BYTES_ONE = [(1, n, k, 1, w, 1, a) for n, k, w, a in ((4, 1024, 2, 1), (4, 1024, 2, 2), (4, 2048, 4, 1), (8, 1024, 4, 1), (8, 1024, 4, 2), (8, 2048, 4, 1),
             (8, 2048, 8, 1), (16, 1024, 4, 1), (16, 1024, 8, 2), (16, 2048, 8, 1), (8, 512, 4, 2))]  # fmt: skip
BYTES_FEW = [(32, 16, 256, 4, 4, 3), (32, 16, 512, 4, 4, 3), (32, 32, 128, 4, 4, 4), (32, 32, 256, 4, 4, 3), (32, 32, 256, 8, 8, 3), (32, 32, 256, 1, 4, 3),
             (32, 64, 128, 1, 4, 4), (32, 64, 256, 1, 4, 3), (32, 128, 128, 1, 8, 4), (16, 16, 512, 4, 4, 3), (16, 32, 256, 4, 4, 4), (64, 64, 128, 1, 4, 3)]
BYTES_LARGE = [(128, 128, 64, 1, 8, 3), (128, 256, 64, 1, 8, 3), (128, 256, 64, 1, 8, 4), (256, 128, 64, 1, 8, 3), (256, 128, 64, 1, 8, 4),
               (128, 128, 128, 1, 8, 3), (128, 128, 64, 1, 4, 3), (64, 256, 64, 1, 8, 4), (256, 64, 64, 1, 4, 3)]  # fmt: skip
BYTES: Cases = {"1": (1, BYTES_ONE), "64": (32, BYTES_FEW), "any": (8192, BYTES_LARGE)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "fp32"))
    parser.add_argument("--weights", default="", choices=("", *WEIGHT_FORMATS), help="of 8 bits in place of the dtype's")
    parser.add_argument("--seconds", type=float, default=45.0, help="begin no further candidate after this long")
    parser.add_argument("--only", nargs="*", default=[], metavar="KERNEL:VARIANT", help="e.g. layer_tail:any; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pin", action="store_true", help="write the best into the launch table")
    args = parser.parse_args()
    dtype, weights = DTYPES[args.dtype], weights_name(getattr(torch, WEIGHT_FORMATS[args.weights].torch)) if args.weights else ""
    begun, arch, found, tried = time.perf_counter(), arch_of(0), [], BYTES if weights else CASES
    names = ("layer_enter", "layer_norm_enter", "layer_project_gain", "layer_linear", "layer_out", "layer_tail", "layer_logits")
    without = {("layer_logits", "any"), ("layer_enter", "1"), *(("layer_norm_enter", v) for v in tried if v != "1")}
    pairs = [(n, v) for v in tried for n in names if (n, v) not in without and (not args.only or f"{n}:{v}" in args.only)]
    jobs = [(name, variant, c) for name, variant in pairs for c in tried[variant][1]]

    def tiles(name: str, c: tuple[int, ...]) -> dict[str, int]:
        """The launch table's entry; one row's weights are all read ahead, up to 1024 columns where a candidate says nothing else."""
        if name == "layer_norm_enter":
            return {"BN": c[1], "BK": int(table.width_variant(name, args.width)), "num_warps": c[4], "num_stages": 1}
        ahead = (c[6] if len(c) > 6 else 1024 // c[2]) if c[0] == 1 else 0
        return {**dict(zip(("BM", "BN", "BK", "KS"), c, strict=False)), "AHEAD": ahead, "num_warps": c[4], "num_stages": c[5]}

    options: dict[tuple[Any, ...], dict[str, Any]] = {}  # a job's, the same object at every launch
    for name, variant, c in jobs:
        early = variant in table.kernel(name).early or name == "layer_norm_enter"
        starts = early and tried[variant][0] <= table.kernel(name).early_rows
        options[name, variant, c] = {**tiles(name, c), "PDL": early, **({"launch_pdl": True} if starts else {})}
    order: list[Job] = [(job[0], dtype, weights, options[job]) for job in jobs]
    failed = {jobs[i]: why for i, why in compile_all(order).items()}
    print(f"compiled {len(jobs)} in {time.perf_counter() - begun:.0f} s, failed {len(failed)}: {list(failed.values())[:2]}", flush=True)
    for name, variant in pairs:
        if time.perf_counter() - begun > args.seconds:
            print(f"no time left for {name}:{variant}")
            continue
        rows = min(tried[variant][0], 32) if name == "layer_logits" else tried[variant][0]
        case, times, seen = Case(name, rows, args.width, args.vocabulary, dtype, args.weights, cold=variant != "any"), [], []
        library = case.time(None) if not weights else 0.0
        for c in tried[variant][1]:
            if (name, variant, c) in failed or tiles(name, c) in seen:
                continue
            seen.append(tiles(name, c))
            try:
                times.append((case.time(options[name, variant, c]), c))
            except Exception as error:
                print(f"{name} {variant} {c}: {type(error).__name__}: {error}"[:140])
        times.sort()
        found.append({"kernel": name, "variant": variant, "rows": rows, "cublas_us": library, "candidates": times})
        best = "  ".join(f"{t:.2f} {c}" for t, c in times[:5])
        print(f"{name:18} {variant:>4} rows {rows:5}: cuBLAS {library:8.2f} us | {best} ... {times[-1][0] if times else 0:.2f}", flush=True)
        del case
        torch.cuda.empty_cache()
        if args.pin and times:
            key = table.width_variant(name, args.width) if name == "layer_norm_enter" else variant
            kinds = [args.dtype] if args.dtype == "fp32" else ["fp16" + weights, "bf16" + weights]
            table.pin(name, arch, kinds, key, tiles(name, times[0][1]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

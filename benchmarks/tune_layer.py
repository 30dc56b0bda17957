"""Tiles of the layer's kernels around its attentions, timed on this GPU: candidates for each product and number of rows, the best of them, and cuBLAS beside.

    python benchmarks/tune_layer.py [--width 1024 2048] [--weights int8 fp8] [--seconds 45] [--json FILE] [--pin]

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
from products import DTYPES, FORMATS, Case, Job, compile_all

from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import arch_of

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
KERNELS = ("layer_logits", "layer_project_gain", "layer_linear", "layer_tail", "layer_out", "layer_norm_enter", "layer_enter", "layer_widen")
Cases = dict[str, tuple[int, Sequence[tuple[int, ...]]]]
CASES: Cases = {"1": (1, ONE), "16": (8, SMALL), "64": (32, MIDDLE), "any": (8192, LARGE)}
# of weights of 8 bits; one row's last number: how many BK are read ahead
BYTES_ONE = [(1, n, k, 1, w, 1, a) for n, k, w, a in ((4, 1024, 2, 1), (4, 1024, 4, 1), (4, 1024, 2, 2), (4, 1024, 4, 2), (8, 1024, 4, 1), (8, 1024, 8, 1),
             (8, 1024, 4, 2), (8, 1024, 8, 2), (16, 1024, 4, 1), (16, 1024, 8, 1), (16, 1024, 8, 2), (8, 512, 4, 2), (8, 2048, 8, 1))]  # fmt: skip
BYTES_NARROW = [(32, 16, 256, 4, 4, 3), (32, 16, 256, 4, 4, 4), (32, 16, 512, 8, 8, 3), (16, 16, 512, 8, 8, 3), (16, 16, 512, 4, 4, 3),
                (16, 32, 256, 4, 4, 4), (16, 32, 512, 8, 8, 3), (32, 32, 256, 4, 4, 3), (32, 32, 256, 4, 4, 4), (32, 32, 512, 8, 8, 3), (32, 32, 256, 1, 4, 4)]
BYTES_BROAD = [(32, 32, 256, 4, 4, 3), (32, 32, 256, 4, 4, 4), (32, 32, 512, 8, 8, 3), (32, 64, 256, 4, 4, 3), (32, 64, 128, 4, 4, 4), (32, 64, 256, 4, 8, 3),
               (32, 64, 128, 1, 4, 4), (32, 64, 256, 1, 4, 3), (32, 64, 128, 2, 4, 4), (32, 128, 128, 1, 4, 4), (32, 128, 128, 1, 8, 4), (32, 32, 256, 1, 4, 4)]
BLOCKS = [(1, n, 0, 1, w, 1) for n, w in ((4096, 4), (4096, 8), (8192, 4), (8192, 8), (16384, 8))]
BYTES: Cases = {"1": (1, BYTES_ONE), "64": (32, BYTES_BROAD), "any": (1, BLOCKS)}
NARROW = ("layer_linear", "layer_out", "layer_tail")  # D columns: of wide tiles there are too few


def tried(kernel: str, variant: str, weights: str) -> tuple[int, Sequence[tuple[int, ...]]]:
    """(rows, candidates)."""
    if not weights:
        return CASES[variant]
    return (32, BYTES_NARROW) if variant == "64" and kernel in NARROW else BYTES[variant]


def tiles(kernel: str, width: int, c: tuple[int, ...]) -> dict[str, int]:
    """The launch table's entry; one row's weights are all read ahead, up to 1024 columns where a candidate says nothing else."""
    if kernel == "layer_widen":
        return {"BLOCK": c[1], "num_warps": c[4], "num_stages": 1}
    if kernel == "layer_norm_enter":
        return {"BN": c[1], "BK": int(table.width_variant(kernel, width)), "KS": c[3], "num_warps": c[4], "num_stages": 1}
    ahead = (c[6] if len(c) > 6 else 1024 // c[2]) if c[0] == 1 else 0
    return {**dict(zip(("BM", "BN", "BK", "KS"), c, strict=False)), "AHEAD": ahead, "FORM": 0, "num_warps": c[4], "num_stages": c[5]}


def launched(kernel: str, variant: str, rows: int, entry: dict[str, int]) -> dict[str, Any]:
    """An entry with what the plugin adds at a launch."""
    if kernel == "layer_widen":
        return dict(entry)
    early = variant in table.kernel(kernel).early or kernel == "layer_norm_enter"
    return {**entry, "PDL": early, **({"launch_pdl": True} if early and rows <= table.kernel(kernel).rows_of(variant) else {})}


def key(kernel: str, variant: str, width: int) -> str:
    return table.width_variant(kernel, width) if kernel == "layer_norm_enter" else variant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "fp32"))
    parser.add_argument("--weights", nargs="+", default=[""], choices=tuple(FORMATS), help="of 8 bits in place of the dtype's")
    parser.add_argument("--seconds", type=float, default=45.0, help="begin no further candidate after this long")
    parser.add_argument("--only", nargs="*", default=[], metavar="KERNEL:VARIANT", help="e.g. layer_tail:any; default: all")
    parser.add_argument("--skip", nargs="*", default=[], metavar="KERNEL", help="e.g. layer_out, which does what layer_linear does")
    parser.add_argument("--top", type=int, default=4, help="candidates printed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pin", action="store_true", help="write the best into the launch table")
    args = parser.parse_args()
    dtype, begun, arch, found = DTYPES[args.dtype], time.perf_counter(), arch_of(0), []
    options: dict[tuple[Any, ...], dict[str, Any]] = {}  # a job's, the same object at every launch
    made: set[tuple[str, ...]] = set()
    failed: dict[tuple[str, ...], str] = {}
    for width, variant in ((w, v) for w in args.width for v in CASES):
        pairs = [(name, format) for format in args.weights for name in KERNELS if name not in args.skip and _is(name, variant, bool(format))
                 if not args.only or f"{name}:{variant}" in args.only]  # fmt: skip
        entries = {(n, f): {str(t): t for t in (*([_today(n, arch, args.dtype + FORMATS[f], variant, width)] if f else []),
                            *(tiles(n, width, c) for c in tried(n, variant, f)[1]))} for n, f in pairs}  # fmt: skip
        jobs = [(n, f, str(t)) for n, f in pairs for t in entries[n, f].values()]
        for n, f, t in jobs:
            options.setdefault((n, f, variant, t), launched(n, variant, tried(n, variant, f)[0], entries[n, f][t]))
        if not jobs or time.perf_counter() - begun > args.seconds:
            continue
        new = [(n, f, t) for n, f, t in jobs if (n, f, variant, t) not in made]
        order: list[Job] = [(n, dtype, FORMATS[f], options[n, f, variant, t]) for n, f, t in new]
        failed |= {(*new[i][:2], variant, new[i][2]): why for i, why in (compile_all(order, 16) if order else {}).items()}
        made |= {(n, f, variant, t) for n, f, t in new}
        now = time.perf_counter() - begun
        print(f"D {width}, {variant}: compiled {len(new)} by {now:.0f} s, failed {len(failed)}: {list(failed.values())[:2]}", flush=True)
        for name, format in pairs:
            if time.perf_counter() - begun > args.seconds:
                print(f"no time left for {name}:{variant} {format}")
                continue
            rows = min(tried(name, variant, format)[0], 32) if name == "layer_logits" else tried(name, variant, format)[0]
            case = Case(name, rows, width, args.vocabulary, dtype, format, cold=variant != "any" or bool(format))
            library, times = case.time(None) if not format else 0.0, []
            for at, t in enumerate(entries[name, format]):
                if (name, format, variant, t) not in failed:
                    try:
                        times.append((case.time(options[name, format, variant, t]), at))
                    except Exception as error:
                        print(f"{name} {variant} {t}: {type(error).__name__}: {error}"[:140])
            listed = list(entries[name, format].values())
            first = next((us for us, at in times if at == 0), 0.0)
            times.sort()
            found.append({"kernel": name, "variant": variant, "width": width, "weights": format, "rows": rows, "cublas_us": library,
                          "candidates": [(us, listed[at]) for us, at in times]})  # fmt: skip
            best = "  ".join(f"{us:.2f} {tuple(listed[at].values())}" for us, at in times[: args.top])
            beside = f"today {first:6.2f}" if format else f"cuBLAS {library:6.2f}"
            worst = times[-1][0] if times else 0.0
            print(f"{name:18} {format or args.dtype:>4} {variant:>3} D {width} rows {rows:4}: {beside} us | {best} ... {worst:.2f}", flush=True)
            del case
            torch.cuda.empty_cache()
            if args.pin and times:
                pinned = [args.dtype] if args.dtype == "fp32" else ["fp16" + FORMATS[format], "bf16" + FORMATS[format]]
                table.pin(name, arch, pinned, key(name, variant, width), listed[times[0][1]])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    print(f"{time.perf_counter() - begun:.0f} s", flush=True)
    return 0


def _is(kernel: str, variant: str, quantised: bool) -> bool:
    """Whether there is such a binary."""
    if kernel in ("layer_norm_enter", "layer_enter"):
        return (variant == "1") == (kernel == "layer_norm_enter") and (not quantised or variant in ("1", "64"))
    if quantised:
        return variant in BYTES and (variant == "any") == (kernel == "layer_widen")
    return kernel != "layer_widen" and (kernel, variant) != ("layer_logits", "any")


def _today(kernel: str, arch: int, dtype: str, variant: str, width: int) -> dict[str, int]:
    """What the launch table has."""
    entry = table.options(kernel, arch, dtype, key(kernel, variant, width))
    return {k: v for k, v in entry.items() if k != "PDL"}


if __name__ == "__main__":
    sys.exit(main())

"""The layer's matrix products with weights of 16 and of 8 bits, as the plugin launches them: time, bandwidth, ratio, and the error against float64.

    python benchmarks/bench_products.py [--widths 1024 2048] [--rows 1 32 2048] [--dtype fp16]

Weights come from as many copies as no cache holds; times are of one launch in a CUDA graph of a launch for each copy. The error is of the largest value,
beside that of float32 rounded once, both against float64 with the weights as the kernel has them. Other tiles: tune_layer.py --weights.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from gpu import copy_bandwidth
from products import DTYPES, FORMATS, Case, Options, compile_all

from sessa_deploy.kernels.engine.spec import ahead_variant, many_kernel, many_variant, product_choice
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import available, pinned

KERNELS = ("layer_linear", "layer_out", "layer_tail", "layer_enter", "layer_project_gain", "layer_logits")


def chosen(kernel: str, rows: int, width: int, dtype: torch.dtype, weights: str) -> tuple[str, str, Options]:
    """(kernel, weights that it reads, options) as the plugin launches it: one row has a kernel of its own at the entrance, and many rows have of most."""
    if kernel == "layer_enter" and rows == 1:
        kernel = "layer_norm_enter"
    variant, kind = (table.width_variant(kernel, width), weights) if kernel == "layer_norm_enter" else product_choice(kernel, rows, weights)
    device = torch.device("cuda", 0)
    other = ahead_variant(kernel, variant, kind, width) if kernel != "layer_norm_enter" else ""
    variant = other if other and available(kernel, device, dtype, other, kind) else variant
    columns = width * {"layer_enter": 2, "layer_project_gain": 5}.get(kernel, 1)
    many = many_kernel(kernel, rows, columns, kind)
    if many and available(many, device, dtype, "any"):
        kernel, variant = many, many_variant(many, rows, columns)
    return kernel, kind, pinned((kernel,), device, dtype, variant, rows, kind)[kernel]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 2048])
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"))
    args = parser.parse_args()
    begun, dtype = time.perf_counter(), DTYPES[args.dtype]
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = [(k, r, w) for w in args.widths for r in args.rows for k in KERNELS if k != "layer_logits" or r <= 64]
    jobs = {(name, options["BN"], options["BK"], kind, r): (name, dtype, kind, options) for k, r, w in cases for weights in FORMATS.values()
            for name, kind, options in [chosen(k, r, w, dtype, weights)]}  # fmt: skip
    for why in compile_all(list(jobs.values())).values():
        print(why, flush=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}; compiled {len(jobs)} in {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"copy {copy_bandwidth():.0f} GB/s\n{'kernel':20}{'D':>5}{'rows':>6} | {args.dtype} us   GB/s | " + " | ".join(
        f"{name:>5} us   GB/s  ratio   error (of plain)" for name in list(FORMATS)[1:]), flush=True)  # fmt: skip
    worst = 0.0
    for kernel, rows, width in cases:
        line, peer = f"{kernel:20}{width:5}{rows:6} |", 0.0
        for format, weights in FORMATS.items():
            try:
                name, kind, options = chosen(kernel, rows, width, dtype, weights)
                case = Case(name, rows, width, args.vocabulary, dtype, format, cold=rows <= 64, widened=kind != weights)
                us = case.time(options)
                speed = case.bytes / us / 1e3
                if not format:
                    peer = us
                    line += f" {us:7.2f} {speed:6.0f} |"
                    continue
                error, plain = case.error(options)
                worst = max(worst, (error - torch.finfo(dtype).eps) / max(plain, 1e-12))
                line += f" {us:8.2f} {speed:6.0f} {peer / us:5.2f}x {error:.1e} ({plain:.1e}) |"
            except Exception as error:
                line += f" {format}: {type(error).__name__}: {str(error).splitlines()[0][:80]} |"
            finally:
                case = None  # type: ignore[assignment]
                torch.cuda.empty_cache()
        print(line, flush=True)
    print(f"errors are {'within' if worst <= 2 else 'BEYOND'} 2 x plain + eps; {time.perf_counter() - begun:.0f} s", flush=True)
    return 0 if worst <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())

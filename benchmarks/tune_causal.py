"""Measure tiles of the causal attention kernels (decode step and chunks with a cache) on this GPU, and pin the best ones.

    python benchmarks/tune_causal.py [--write] [--variant 64,128,64x4] [--json FILE]

Times are CUDA-graph replays, medians; the decode step's caches rotate so that they do not live in L2, and its GB/s counts the valid rows of k_f and
v_f once. Chunks stand beside PyTorch's scaled_dot_product_attention over the same keys laid out densely. --write pins the winners: highest geometric mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu import copy_bandwidth, replay_ms
from torch.nn.attention.bias import causal_lower_right
from tune_step import STORAGE

from sessa_deploy.kernels.causal import prefill, step
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import launcher
from sessa_deploy.kernels.launch.limits import LOG2E
from sessa_deploy.kernels.launch.spec import resolve
from sessa_deploy.kernels.launch.splits import step_programs, step_splits

# (B, capacity, context of each sequence); (B, T, capacity, context). Head counts are chosen so that Hq d = 1024.
STEP_SHAPES: list[tuple[int, int, list[int]]] = [(32, 8192, [4096]), (1, 32768, [4096]), (1, 256, [128]), (32, 8192, [128] * 31 + [4096])]
CHUNK_SHAPES = [(1, 256, 32768, 4096), (1, 1024, 8192, 4096), (1, 1024, 8192, 0), (8, 512, 2048, 512)]
Tiles = dict[str, Any]
# BLOCK_S is the most splits, whatever the variant.
COMBINES: list[Tiles] = [{"BLOCK_S": s, "BLOCK_D": d, "num_warps": w, "num_stages": 1} for s, d, w in ((128, 32, 4), (64, 32, 4), (32, 32, 4), (128, 64, 8))]


def heads_of(variant: str) -> tuple[int, int, int]:
    """(Hq, Hkv, d) that a variant is measured with."""
    width = int(variant.split("x")[0])
    return 1024 // width, 1024 // width // (4 if "x" in variant else 1), width


def step_candidates(variant: str, dtype: str) -> list[Tiles]:
    """Tiles of 2 to 8 KiB in which a thread has one or two 16-byte pieces of a row, and 3 to 5 stages."""
    _, kv_heads, width = heads_of(variant)
    size, found = 4 if dtype == "fp32" else 2, []
    for rows, block, warps, stages, group in itertools.product((2, 4, 8, 16), (1, 2, 4, 8, 16), (2, 4, 8), (3, 4, 5), (1, 2, 4)):
        tile = rows * block * width * size
        pieces = tile / (16 * 32 * warps)
        if block > kv_heads or pieces not in (1, 2) or not 2048 <= tile <= 8192 or (tile == 8192 and stages == 5):
            continue
        if "x" in variant and (pieces == 2 or stages == 5):  # four accumulators already
            continue
        found.append({"BLOCK_R": rows, "BLOCK_H": block, "BLOCK_G": 4 if "x" in variant else 1, "BLOCK_D": width, "STAGES": stages, "TILES": group,
                      "num_warps": warps, "num_stages": 1})  # fmt: skip
    return found


def chunk_candidates(variant: str, dtype: str) -> list[Tiles]:
    width = int(variant)
    shapes = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 4, 3)]
    if width == 128:
        shapes = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 128, 8, 2)]
    if width == 256:
        shapes = [(64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)]
    if dtype == "fp32":
        shapes = [(64, 32, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1), (64, 16, 8, 1)]
    return [{"BM": m, "BN": n, "BE": min(n, 32), "BD": width, "num_warps": w, "num_stages": s} for m, n, w, s in shapes]


def compile_one(kernel: str, dtype: str, tiles: Tiles) -> None:
    """Put a binary into Triton's cache, in a process of its own, forked before CUDA is touched."""
    fn = prefill.causal_prefill if kernel == "causal_prefill" else getattr(step, kernel)
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}
    resolved = [resolve(p.type, dtype) for p in table.kernel(kernel).params]
    fn.warmup(*(types[t[1:]] if t.startswith("*") else 1.0 if t == "fp32" else 16 for t in resolved), grid=(1,), **tiles)


class StepCase:
    """Inputs of one shape of the decode step, in enough copies that a replay does not live in L2."""

    def __init__(self, batch: int, capacity: int, lengths: list[int], variant: str, dtype: torch.dtype) -> None:
        self.heads, self.kv_heads, self.width = heads_of(variant)
        self.batch, self.capacity = batch, capacity
        lengths = lengths * (batch // len(lengths))
        self.bytes = 2 * sum(lengths) * self.kv_heads * self.width * dtype.itemsize
        copies = max(1, min(24, math.ceil(400e6 / self.bytes), math.ceil(24e9 / (2 * batch * capacity * self.kv_heads * self.width * dtype.itemsize))))
        self.length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.past = [torch.randn(2, batch, capacity, self.kv_heads, self.width, device="cuda", dtype=dtype) for _ in range(copies)]
        self.q = torch.randn(batch, 1, self.heads, self.width, device="cuda", dtype=dtype)
        self.k, self.v = torch.randn(2, batch, 1, self.kv_heads, self.width, device="cuda", dtype=dtype)
        self.out = torch.empty_like(self.q)

    def launches(self, partial: Tiles, combine: Tiles) -> list[Callable[[], None]]:
        rows = partial["BLOCK_R"] * partial["TILES"]
        splits = step_splits(self.capacity, rows, combine["BLOCK_S"])
        part = torch.empty(self.batch * self.heads * splits * self.width, device="cuda")
        stat = torch.empty(self.batch * self.heads * splits * 2, device="cuda")
        scale, group, units = self.width**-0.5 * LOG2E, self.heads // self.kv_heads, self.width // 8
        blocks = -(-self.kv_heads // partial["BLOCK_H"]) * -(-group // partial["BLOCK_G"])
        held = launcher(step.causal_step_partial, self.length.device, self.q.dtype, {"PDL": False, **partial}).resident

        def one(past: torch.Tensor) -> None:
            step.causal_step_partial[(blocks, step_programs(self.batch * splits, blocks, held))](
                self.q, self.k, self.v, past[0], past[1], self.length, part, stat, *step.strides(past[0]), *step.strides(past[1]),
                self.batch, splits, self.capacity, self.kv_heads, group, units, scale, **partial,
            )  # fmt: skip
            step.causal_step_combine[(self.heads, -(-self.width // combine["BLOCK_D"]), self.batch)](
                part, stat, self.length, self.out, self.capacity, splits, rows, units, **combine
            )

        return [lambda past=past: one(past) for past in self.past]  # type: ignore[misc]


class ChunkCase:
    """Inputs of one shape of a chunk."""

    def __init__(self, batch: int, tokens: int, capacity: int, context: int, variant: str, dtype: torch.dtype) -> None:
        self.heads, self.kv_heads, self.width = heads_of(variant)
        self.batch, self.tokens, self.capacity, self.context = batch, tokens, capacity, context
        self.flop = 4 * batch * self.heads * self.width * (tokens * context + tokens * (tokens + 1) // 2)
        self.q = torch.randn(batch, tokens, self.heads, self.width, device="cuda", dtype=dtype)
        self.new = torch.randn(2, batch, tokens, self.kv_heads, self.width, device="cuda", dtype=dtype)
        self.past = torch.randn(2, batch, capacity, self.kv_heads, self.width, device="cuda", dtype=dtype)
        self.length = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.out = torch.empty_like(self.q)

    def launches(self, tiles: Tiles) -> list[Callable[[], None]]:
        def one() -> None:
            prefill.causal_prefill[(-(-self.tokens // tiles["BM"]), self.heads, self.batch)](
                self.q, self.new[0], self.new[1], self.past[0], self.past[1], self.length, self.out, *step.strides(self.past[0]),
                *step.strides(self.past[1]), self.tokens, self.capacity, self.heads // self.kv_heads, self.width // 8,
                self.width**-0.5 * LOG2E, **tiles,
            )  # fmt: skip

        return [one] * 4

    def library(self) -> list[Callable[[], None]]:
        """scaled_dot_product_attention over past and new rows side by side, which a cache of fixed capacity would first have to copy."""
        k, v = (torch.cat([self.past[i, :, : self.context], self.new[i]], 1).transpose(1, 2) for i in range(2))
        q, bias = self.q.transpose(1, 2), causal_lower_right(self.tokens, self.context + self.tokens)
        grouped = self.heads != self.kv_heads
        if self.context:
            return [lambda: F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=grouped)] * 4  # type: ignore[list-item]
        return [lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)] * 4  # type: ignore[list-item]


def mean(values: list[float]) -> float:
    return math.exp(statistics.mean(map(math.log, values)))


def short(tiles: Tiles) -> str:
    return " ".join(str(v) for k, v in tiles.items() if k not in ("BLOCK_D", "BD"))


def try_steps(variant: str, dtype: str, copy: float) -> list[dict[str, Any]]:
    """Every tile with the most splits, then the best few with every combination."""
    cases = [StepCase(*shape, variant, STORAGE[dtype]) for shape in STEP_SHAPES]
    rows: list[dict[str, Any]] = []

    def measure(tiles: Tiles, combine: Tiles) -> None:
        try:
            times = [replay_ms(c.launches(tiles, combine), 9) for c in cases]
        except Exception as error:  # a tile that does not fit
            print(f"{variant} {short(tiles)}: {str(error)[:80]}", flush=True)
            return
        shares = [c.bytes / ms / 1e6 / copy for c, ms in zip(cases, times, strict=True)]
        rows.append({"kernel": "causal_step_partial", "variant": variant, "dtype": dtype, "tiles": tiles, "combine": combine,
                     "us": [1e3 * ms for ms in times], "shares": shares, "score": mean(shares)})  # fmt: skip

    for tiles in step_candidates(variant, dtype):
        measure(tiles, COMBINES[0])
    rows.sort(key=lambda r: -r["score"])
    for tiles in [r["tiles"] for r in rows[:4]]:
        for combine in COMBINES[1:]:
            measure(tiles, combine)
    return sorted(rows, key=lambda r: -r["score"])


def try_chunks(variant: str, dtype: str) -> tuple[list[float], list[dict[str, Any]]]:
    cases = [ChunkCase(*shape, variant, STORAGE[dtype]) for shape in CHUNK_SHAPES]
    library = [c.flop / replay_ms(c.library(), 9) / 1e9 for c in cases]
    rows = []
    for tiles in chunk_candidates(variant, dtype):
        try:
            rates = [c.flop / replay_ms(c.launches(tiles), 9) / 1e9 for c in cases]
        except Exception as error:
            print(f"{variant} {short(tiles)}: {str(error)[:80]}", flush=True)
            continue
        rows.append({"kernel": "causal_prefill", "variant": variant, "dtype": dtype, "tiles": tiles, "tflops": rates, "score": mean(rates)})
    return library, sorted(rows, key=lambda r: -r["score"])


def pinned_splits(steps: list[dict[str, Any]], arch: int) -> dict[str, Any]:
    """The best of those measured with the combination that the table pins."""
    combine = table.options("causal_step_combine", arch, "fp16", "any")
    return next((r for r in steps if r["combine"] == combine), steps[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="pin the winners for this architecture")
    parser.add_argument("--variant", default="64,64x4,128", help="head widths, with x4 for grouped heads (the decode step alone)")
    parser.add_argument("--dtype", default="fp16", help="storage types to tune; bf16 takes fp16's tiles")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile beforehand")
    parser.add_argument("--compile", action="store_true", help="compile only")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    work = [("causal_step_combine", d, c) for d in args.dtype.split(",") for c in COMBINES]
    for dtype in args.dtype.split(","):
        for variant in args.variant.split(","):
            work += [("causal_step_partial", dtype, t) for t in step_candidates(variant, dtype)]
            work += [("causal_prefill", dtype, t) for t in chunk_candidates(variant, dtype)] if "x" not in variant else []
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(compile_one, *zip(*work, strict=True), chunksize=4))
    if args.compile:
        return
    copy, arch = copy_bandwidth(), 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    print(f"copy bandwidth {copy:.0f} GB/s on {torch.cuda.get_device_name()}; {len(work)} binaries", flush=True)
    results: list[dict[str, Any]] = []
    for dtype in args.dtype.split(","):
        targets = ["fp16", "bf16"] if dtype == "fp16" else [dtype]
        for variant in args.variant.split(","):
            steps = try_steps(variant, dtype, copy)
            results += steps
            for r in steps[:6] + steps[-1:]:
                figures = " ".join(f"{x:.2f}({u:.1f})" for x, u in zip(r["shares"], r["us"], strict=True))
                tile = f"R,H,G,stages,tiles,warps={short(r['tiles'])} S,D,warps={r['combine']['BLOCK_S']} {r['combine']['BLOCK_D']} {r['combine']['num_warps']}"
                print(f"step {dtype} {variant} {tile}: {r['score']:.3f} | share(us) {figures}", flush=True)
            if args.write and steps:
                table.pin("causal_step_partial", arch, targets, variant, pinned_splits(steps, arch)["tiles"])
            if "x" not in variant:
                library, chunks = try_chunks(variant, dtype)
                results += chunks
                for r in chunks:
                    figures = " ".join(f"{x:.0f}/{y:.0f}" for x, y in zip(r["tflops"], library, strict=True))
                    print(f"chunk {dtype} {variant} M,N,warps,stages={short(r['tiles'])}: {r['score']:.0f} | TFLOP/s ours/SDPA {figures}", flush=True)
                if args.write and chunks:
                    table.pin("causal_prefill", arch, targets, variant, chunks[0]["tiles"])
            torch.cuda.empty_cache()
    if args.json:
        shapes = {"step": STEP_SHAPES, "chunk": CHUNK_SHAPES}
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "copy_gbs": copy, "shapes": shapes, "results": results}, indent=1))


if __name__ == "__main__":
    main()

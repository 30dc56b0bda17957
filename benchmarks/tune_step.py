"""Measure tiles of the decode step kernel on this GPU, beside its copy bandwidth, and pin the best ones.

    python benchmarks/tune_step.py [--write] [--quick] [--json FILE]

Times are CUDA-graph replays over rotating caches larger than L2, medians. GB/s counts the valid rows of k_b and s, once.
The score of a tile is the geometric mean of its shares of copy bandwidth over the shapes; --write puts the winner into kernels/feedback/tiles.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import copy_bandwidth, replay_ms

from sessa_deploy.kernels.feedback import step
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import launcher
from sessa_deploy.kernels.launch.limits import LOG2E, STEP_MAX_SPLITS
from sessa_deploy.kernels.launch.splits import step_programs

# (B, capacity, context of each sequence)
SHAPES: list[tuple[int, int, list[int]]] = [(32, 8192, [4096]), (1, 8192, [4096]), (1, 32768, [32768]), (32, 8192, [128] * 31 + [4096]), (8, 2048, [1500])]
STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Case:
    """Inputs of one shape, in enough copies that a replay does not live in L2."""

    def __init__(self, batch: int, capacity: int, lengths: list[int], width: int, dtype: torch.dtype) -> None:
        self.batch, self.capacity, self.width = batch, capacity, width
        lengths = lengths * (batch // len(lengths))
        self.bytes = 2 * sum(lengths) * width * dtype.itemsize
        copies = max(1, min(12, math.ceil(400e6 / self.bytes)))
        self.length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.past = [torch.randn(2, batch, capacity, width, device="cuda", dtype=dtype) for _ in range(copies)]
        self.q, self.f = torch.randn(2, batch, 1, width, device="cuda", dtype=dtype)
        self.gamma = torch.rand(batch, 1, device="cuda")
        self.out = torch.empty_like(self.f)

    def launches(self, partial: dict[str, Any], combine: dict[str, Any], splits_max: int) -> list[Callable[[], None]]:
        rows = partial["BLOCK_R"] * partial["TILES"]
        splits = max(1, min(splits_max, -(-self.capacity // rows)))
        part = torch.empty(self.batch, splits, self.width, device="cuda")
        stat = torch.empty(self.batch, splits, 2, device="cuda")
        scale = self.width**-0.5 * LOG2E
        held = launcher(step.feedback_step_partial, self.length.device, self.q.dtype, {"PDL": False, **partial}).resident

        def one(past: torch.Tensor) -> None:
            k, s = past[0], past[1]
            strides = (k.stride(0), k.stride(1), s.stride(0), s.stride(1))
            step.feedback_step_partial[(step_programs(self.batch * splits, 1, held),)](
                self.q, k, s, self.length, part, stat, *strides, self.batch, splits, self.capacity, self.width, scale, **partial
            )
            if combine:
                step.feedback_step_combine[(self.batch, -(-self.width // combine["BLOCK_D"]))](
                    part, stat, self.length, self.gamma, self.f, self.out, self.capacity, splits, rows, self.width, **combine
                )

        return [lambda past=past: one(past) for past in self.past]  # type: ignore[misc]


def candidates(variant: str, dtype: str, quick: bool) -> list[dict[str, Any]]:
    """Tiles worth trying for a width: a lane block of 16-byte loads for 1, 2 or 4 warps, 1 to 4 rows a warp at 1024, 2 to 5 stages, 96 KiB at most."""
    width, size = int(variant), 4 if dtype == "fp32" else 2
    found = []
    for across, down, rows, stages, group in itertools.product((1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8), (2, 3, 4, 5), (1, 2, 4)):
        lanes, warps, tile = across * 512 // size, across * down, down * rows * width * size
        chunks = width // lanes
        if not 1 <= chunks <= 8 or chunks * rows > 8 or not 2 <= warps <= 8 or not 4096 <= tile <= 32768 or 2 * (stages - 1) * tile > 98304:
            continue
        # Warps side by side along D keep rows inside a thread and need no sum across warps at the end; narrow rows leave no room for that.
        if quick and (group != 2 or stages not in (3, 4) or tile not in (8192, 16384) or (down > 1 and width * size > 1024)):
            continue
        tile_of = {"BLOCK_R": down * rows, "BLOCK_C": chunks, "BLOCK_L": lanes, "STAGES": stages, "TILES": group, "OWN": int(down > 1)}
        found.append({**tile_of, "num_warps": warps, "num_stages": 1})
    return found


COMBINES = [{"BLOCK_S": 128, "BLOCK_D": d, "num_warps": w, "num_stages": 1} for d, w in ((32, 4), (16, 4), (16, 2), (8, 4), (8, 2))]


def score(case_times: list[tuple[Case, float]], copy: float) -> float:
    return math.exp(statistics.mean(math.log(c.bytes / ms / 1e6 / copy) for c, ms in case_times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="pin the winners for this architecture")
    parser.add_argument("--quick", action="store_true", help="fewer tiles")
    parser.add_argument("--dtype", default="bf16,fp32", help="storage types to tune; fp16 takes bf16's tiles")
    parser.add_argument("--width", default="1024,4096,256")
    parser.add_argument("--splits", default=str(STEP_MAX_SPLITS), help="numbers of splits to try; the pinned tiles are of the library's own")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.0f} GB/s on {torch.cuda.get_device_name()}", flush=True)
    results = []
    for dtype, variant in itertools.product(args.dtype.split(","), args.width.split(",")):
        cases = [Case(b, p, n, int(variant), STORAGE[dtype]) for b, p, n in (SHAPES if int(variant) <= 1024 and dtype != "fp32" else SHAPES[:2])]
        if int(variant) == 1024 and dtype == "bf16":
            tiles = table.options("feedback_step_partial", major * 10 + minor, dtype, variant)
            for combine in COMBINES:
                cost = [replay_ms(c.launches(tiles, combine, 128)) - replay_ms(c.launches(tiles, {}, 128)) for c in cases]
                print(f"combine {combine}: " + " ".join(f"{1e3 * x:.2f}" for x in cost) + " us", flush=True)
        combine = table.options("feedback_step_combine", major * 10 + minor, dtype, "128")
        for tiles, splits in itertools.product(candidates(variant, dtype, args.quick), map(int, args.splits.split(","))):
            times = [(c, replay_ms(c.launches(tiles, combine, splits))) for c in cases]
            share = score(times, copy)
            results.append({"dtype": dtype, "variant": variant, "splits": splits, "tiles": tiles, "share": share, "ms": [ms for _, ms in times],
                            "shares": [c.bytes / ms / 1e6 / copy for c, ms in times]})  # fmt: skip
        del cases
        mine = sorted((r for r in results if r["dtype"] == dtype and r["variant"] == variant), key=lambda r: -r["share"])
        for r in mine[:6] + mine[-1:]:
            t = r["tiles"]
            tile = f"R={t['BLOCK_R']} C={t['BLOCK_C']} L={t['BLOCK_L']} stages={t['STAGES']} tiles={t['TILES']} warps={t['num_warps']} splits={r['splits']}"
            shares, micros = (" ".join(texts) for texts in ((f"{x:.3f}" for x in r["shares"]), (f"{1e3 * m:.1f}" for m in r["ms"])))
            print(f"{dtype} {variant} {tile}: share {r['share']:.3f} | {shares} | us {micros}", flush=True)
        if args.write:
            best = next((r for r in mine if r["splits"] == STEP_MAX_SPLITS), None)
            if best is None:
                raise SystemExit(f"--write needs {STEP_MAX_SPLITS} among --splits")
            table.pin("feedback_step_partial", major * 10 + minor, ["fp16", "bf16"] if dtype == "bf16" else [dtype], variant, best["tiles"])
    if args.json:
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "copy_gbs": copy, "shapes": SHAPES, "results": results}, indent=1))


if __name__ == "__main__":
    main()

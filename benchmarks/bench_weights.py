"""Weights in 16 bits, int8 and fp8 side by side in one process: decode steps, a batch, a prompt, and device memory.

    python benchmarks/bench_weights.py --size 1.1B --folder /tmp/w8                 ONNX Runtime with our kernels, on a GPU
    python benchmarks/bench_weights.py --bundles 16=m350 int8=m350-int8             bundles that are there, each prepared (`build --for ort`)
    python benchmarks/bench_weights.py --cpu --folder /tmp/w8 --rounds 9            the demo in plain ONNX Runtime on a CPU, against its fp32 bundle
    python benchmarks/bench_weights.py --prove --folder /tmp/w8                     no time: `validate` of the demo in fp16 with both, on ort-cuda

The forms take turns, round by round, so that clocks and other load hit them alike; a ratio is the median over rounds. Bundles are made where --folder does
not hold them yet, each by a process of its own: the same random model, exported and prepared. Prints the table and writes weights.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from common import write
from compare_peer import Point
from compare_worker import Runtime, decode, prefill
from random_bundle import SIZES, VOCABULARY, config_of, random_model, write_bundle

from sessa_deploy.contract import DEFAULT_OPSET, WEIGHT_FORMATS
from sessa_deploy.cuda import used_memory
from sessa_deploy.runtime import environment
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.sizes import weight_sizes

FORMS = ("16", *WEIGHT_FORMATS)
DEMO = Path(__file__).resolve().parent.parent / "checkpoints/demo"
# point -> (times faster than weights in 16 bits: must, aim), by size
GOALS = {"1.1B": {"short": (1.35, 1.6), "batch": (1.2, 1.4), "prefill": (0.95, 1.0)}, "350M": {"short": (1.0, 1.1)}, "demo": {"short": (0.8, 1.0)}}


def points(given: argparse.Namespace) -> list[Point]:
    """What is timed, points of one shape next to each other."""
    found = [Point("short", given.capacity, (given.context,)), Point("prefill", given.capacity, (0,), given.prompt),
             Point("batch", given.batch_capacity, (given.context,) * given.batch)]  # fmt: skip
    return [p for p in found if p.name in given.points]


def describe(p: Point) -> str:
    """A point in words."""
    return f"prompt of {p.prompt}" if p.prompt else f"{p.batch} at {p.contexts[0]} of {p.capacity}"


def make(form: str, given: argparse.Namespace) -> None:
    """Write one form's bundle: of the demo for a CPU, else of a random model, prepared for ONNX Runtime."""
    from sessa_deploy.export.to_onnx import export_bundle
    from sessa_deploy.export.to_ort import build_ort

    begun, out = time.perf_counter(), given.folder / form
    weights = None if form == "16" else form
    if given.cpu:
        export_bundle(DEMO, out, "fp32", WEIGHT_FORMATS[form].opset if weights else DEFAULT_OPSET, weights=weights)
        return
    import torch

    torch.set_num_threads(given.threads)
    model = random_model(config_of(given.size, given.layers, given.vocabulary, given.capacity))
    torch.cuda.empty_cache()
    drawn = time.perf_counter()
    write_bundle(model, out, given.precision, weights)
    exported = time.perf_counter()
    build_ort(out)
    print(f"{form}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, weights {drawn - begun:.1f} s, export {exported - drawn:.1f} s, "
          f"prepared {time.perf_counter() - exported:.1f} s", flush=True)


def bundles(given: argparse.Namespace) -> dict[str, Path]:
    """Form -> its bundle, made where it is not there."""
    if given.bundles:
        return {form: Path(place) for form, _, place in (x.partition("=") for x in given.bundles)}
    running = {}
    for form in given.forms:
        if not (given.folder / form).is_dir():
            running[form] = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--make", form])
    for form, process in running.items():
        if process.wait():
            print(f"{form}: its bundle was not made (exit code {process.returncode})", flush=True)
    return {form: given.folder / form for form in given.forms if (given.folder / form).is_dir()}


def prove(given: argparse.Namespace) -> int:
    """Export the demo in fp16 with weights in each form of 8 bits, prepare it and judge it on the GPU; how many failed."""
    failed = 0
    for form in (f for f in given.forms if f in WEIGHT_FORMATS):
        out, begun = given.folder / f"demo-{form}", time.perf_counter()
        options = ["--precision", given.precision, "--weights", form, "--opset", str(WEIGHT_FORMATS[form].opset)]
        for arguments in (["export", str(DEMO), "--out", str(out), *options], ["build", str(out), "--for", "ort"],
                          ["validate", str(out), "--checkpoint", str(DEMO), "--backend", "ort-cuda"]):  # fmt: skip
            done = subprocess.run([sys.executable, "-m", "sessa_deploy", *arguments], capture_output=True, text=True, check=False)
            last = (done.stdout.strip().splitlines() + done.stderr.strip().splitlines())[-4:]
            print(f"{form} {arguments[0]}: exit code {done.returncode}", *last, f"{time.perf_counter() - begun:.0f} s", sep="\n  ", flush=True)
            failed += done.returncode != 0
            if done.returncode:
                break
    return failed


def opened(place: Path, given: argparse.Namespace, batch: int, capacity: int) -> tuple[Runtime, int | None]:
    """A bundle's backend, and the bytes of device memory that it took."""
    bundle = Bundle.open(place, verify=False)
    job = {"peer": "ort" if given.cpu else "ort-cuda", "config": bundle.config.to_dict(), "precision": bundle.precision, "bundle": str(place),
           "device": "cpu" if given.cpu else "cuda", "trt_bundles": [], "build": None}  # fmt: skip
    peer, before = Runtime(job), used_memory()
    peer.open(batch, capacity)
    after = used_memory()
    return peer, None if before is None or after is None else after - before


def measure(places: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """point -> form -> milliseconds of each round (medians) and the device bytes; an error in place of what failed."""
    result: dict[str, Any] = {}
    for shape in dict.fromkeys((p.batch, p.capacity) for p in points(given)):
        peers: dict[str, Runtime] = {}
        held: dict[str, int | None] = {}
        failed: dict[str, str] = {}
        for form, place in places.items():
            try:
                peers[form], held[form] = opened(place, given, *shape)
            except Exception as error:
                traceback.print_exc()
                failed[form] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        for p in (p for p in points(given) if (p.batch, p.capacity) == shape):
            rows: dict[str, Any] = {form: {"error": why} for form, why in failed.items()}
            rounds: dict[str, list[float]] = {form: [] for form in peers}
            job = {"warmup": given.seconds / 4, "seconds": given.seconds, "steps": 1, "max_seconds": given.seconds, "prefills": 2}
            for turn in range(given.rounds):
                for form in (peers if turn % 2 else [*peers][::-1]):
                    if form in rows:
                        continue
                    try:
                        times = prefill(peers[form], p, job) if p.prompt else decode(peers[form], p, job)
                        rounds[form].append(1e3 * float(np.median(times)))
                    except Exception as error:
                        traceback.print_exc()
                        rows[form] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
            for form in (f for f in peers if f not in rows):
                rows[form] = {"ms": statistics.median(rounds[form]), "rounds": rounds[form], "device_bytes": held[form], "batch": p.batch,
                              "tokens": p.prompt or 1}  # fmt: skip
                if "16" in rounds and len(rounds["16"]) == len(rounds[form]):
                    rows[form]["times_faster"] = statistics.median(a / b for a, b in zip(rounds["16"], rounds[form], strict=True))
            result[p.name] = rows
            show(p, {form: rows[form] for form in places}, given)
        for peer in peers.values():
            peer.close()
    return result


def show(p: Point, rows: dict[str, Any], given: argparse.Namespace) -> None:
    """One point's lines, as soon as it is measured."""
    must, aim = GOALS.get("demo" if given.cpu else given.size, {}).get(p.name, (None, None))
    goal = f"   (must {must}, aim {aim} x)" if must else ""
    print(f"{describe(p)}{goal}", flush=True)
    for form, row in rows.items():
        if "error" in row:
            print(f"  {form:>4}  failed: {row['error']}", flush=True)
            continue
        ratio = f"{row['times_faster']:5.2f} x" if "times_faster" in row else "      -"
        memory = f", device {row['device_bytes'] / 2**30:.2f} GiB" if row["device_bytes"] else ""
        print(f"  {form:>4}  {row['ms']:8.3f} ms  {ratio}  {1e3 * row['batch'] * row['tokens'] / row['ms']:9.0f} tokens/s{memory}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="1.1B")
    add("--layers", type=int, help="another depth at the size's width")
    add("--vocabulary", type=int, default=VOCABULARY)
    add("--precision", choices=("fp16", "bf16"), default="fp16", help="of activations and caches, and of weights in 16 bits")
    add("--folder", type=Path, default=Path("/tmp/weights8"), help="where the bundles are, or are made")
    add("--bundles", nargs="+", metavar="FORM=BUNDLE", help="bundles that are there, in place of a random model's")
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    add("--points", nargs="+", choices=("short", "prefill", "batch"), default=["short", "prefill", "batch"])
    for name, value in (("--capacity", 32768), ("--context", 128), ("--batch", 32), ("--batch-capacity", 1024), ("--prompt", 8192), ("--rounds", 5)):
        add(name, type=int, default=value)
    add("--threads", type=int, default=5, help="of each process that makes a bundle")
    add("--seconds", type=float, default=0.5, help="of each form in each round")
    add("--cpu", action="store_true", help="the demo in plain ONNX Runtime, the forms against its fp32 bundle")
    add("--prove", action="store_true", help="judge the demo, time nothing")
    add("--make", choices=FORMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cpu:
        given.capacity, given.points = 512, ["short"]
    if given.make:
        make(given.make, given)
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.prove:
        return int(prove(given) > 0)
    begun = time.perf_counter()
    places = bundles(given)
    sizes = {}
    for form, place in places.items():
        bundle = Bundle.open(place, verify=False)
        sizes[form] = weight_sizes(bundle.config, bundle.precision, bundle.weights).to_dict()
        eight = f", in 8 bits {sizes[form]['eight'] / 1e6:.1f} MB with scales, {sizes[form]['ratio']:.4f} x" if sizes[form]["ratio"] else ""
        whole = f", {sizes[form]['total_ratio']:.4f} x of {bundle.precision}" if sizes[form]["ratio"] else ""
        print(f"{form:>4}: weights {sizes[form]['total'] / 1e6:.1f} MB{whole}{eight}", flush=True)
    print(f"bundles ready after {time.perf_counter() - begun:.0f} s", flush=True)
    found = measure(places, given)
    device = {form: rows["device_bytes"] for form, rows in next(iter(found.values()), {}).items() if rows.get("device_bytes")}
    for form in (f for f in device if f != "16" and "16" in device):
        saved, expected = device["16"] - device[form], sizes["16"]["total"] - sizes[form]["total"]
        print(f"device memory: {form} takes {saved / 2**20:.0f} MiB less than 16 bits; by arithmetic {expected / 2**20:.0f} MiB", flush=True)
    rows = {"settings": {k: str(v) for k, v in vars(given).items()}, "sizes": sizes, "points": found, "environment": environment.describe()}
    out = write(f"weights_{'cpu' if given.cpu else given.size}", rows)
    print(f"{json.dumps({p: {f: round(r.get('times_faster', 0), 3) for f, r in rows.items()} for p, rows in found.items()})}\n{out}, "
          f"{time.perf_counter() - begun:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

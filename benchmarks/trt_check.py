"""TensorRT on a GPU, in one run: build engines of the demo, compare numbers and text with ONNX Runtime's on a CPU, time decode steps, soak.

    python benchmarks/trt_check.py prepare --checkpoint checkpoints/demo --work DIR     where there is torch: bundles and reference numbers
    python benchmarks/trt_check.py run --work DIR --out DIR [--plugin LIB] [--only STEP]      where there is TensorRT and a GPU; no torch

Every step is a process with its own time limit and writes STEP.json into --out; a step that fails or hangs does not keep the next from running.
The last lines are a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import run_logged

BATCH, CAPACITY, CHUNK = 3, 512, 96
PROMPTS = ("def ", "import os\n\nclass ", "    return self.")
TOKENS = 200
SOAK_STEPS = 20_000
# Ragged steps: (T, new_length); rows stand still, stop and start again, prompts are longer than a chunk.
STEPS = [(150, (150, 7, 0)), (1, (1, 1, 0)), (1, (1, 0, 0)), (40, (0, 40, 33)), (1, (1, 1, 1)), (1, (1, 1, 1)), (97, (3, 97, 1)), (1, (0, 1, 1)),
         (1, (1, 1, 1))]  # fmt: skip
LIMITS = {"load": 60, "build-fp32": 150, "numbers-fp32": 60, "text-fp32": 60, "build-fp16": 150, "numbers-fp16": 60, "text-fp16": 60, "speed-fp32": 45,
          "speed-fp16": 45, "soak-fp16": 120, "second-fp16": 90, "killed-fp16": 90, "memcheck-fp16": 150}  # fmt: skip


def drive(backend: Any, poison: bool = False) -> dict[str, np.ndarray]:
    """Logits of STEPS and the caches at their end; rows that stood still are zeros."""
    rng, found = np.random.default_rng(0), {}
    for i, (tokens, new) in enumerate(STEPS):
        if poison:
            backend.poison()
        counts = np.array(new, np.int32)
        ids = rng.integers(0, backend.config.vocab_size, (BATCH, tokens))
        found[f"logits.{i}"] = np.where(counts[:, None] > 0, backend.step(ids, counts), 0.0)
    for row in range(BATCH):
        found |= {f"{row}.{name}": np.asarray(x) for name, x in backend.cached(row).items()}
    return found


def greedy(backend: Any, prompts: list[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    """Greedy tokens behind each prompt, all prompts at once."""
    backend.reset()
    rows, longest = np.arange(BATCH), max(map(len, prompts))
    ids, new = np.zeros((BATCH, longest), np.int64), np.array([len(p) for p in prompts], np.int32)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)] = prompt
    picked = np.argmax(backend.step(ids, new), axis=-1)
    out = [picked]
    for _ in range(tokens - 1):
        picked = backend.step_greedy(picked[:, None], np.ones(BATCH, np.int32))
        out.append(picked)
    return np.stack(out, 1)[rows].tolist()


def prepare(args: argparse.Namespace) -> None:
    """Export both bundles and write what ONNX Runtime computes on a CPU."""
    from sessa_deploy.export.to_onnx import export_bundle
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.ort.backend import OrtBackend
    from sessa_deploy.runtime.tokenizer import Tokenizer

    args.work.mkdir(parents=True, exist_ok=True)
    for precision in ("fp32", "fp16"):
        bundle = Bundle.open(export_bundle(args.checkpoint, args.work / precision, precision))
        backend = OrtBackend(bundle, batch=BATCH, capacity=CAPACITY, threads=2)
        tokenizer = Tokenizer(bundle.file("tokenizer.json"))
        prompts = [[0 if bundle.config.bos_token_id is None else bundle.config.bos_token_id, *tokenizer.encode(p)] for p in PROMPTS]
        np.savez(args.work / f"{precision}.npz", **drive(backend))
        (args.work / f"{precision}.json").write_text(json.dumps({"prompts": prompts, "tokens": greedy(backend, prompts)}))


def open_backend(args: argparse.Namespace, precision: str, **options: Any) -> Any:
    """The TensorRT backend on a bundle of --work."""
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.trt.backend import TrtBackend

    return TrtBackend(Bundle.open(args.work / precision), plugin=args.plugin, **{"batch": BATCH, "capacity": CAPACITY, **options})


def step_load(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """TensorRT imports, registers the plugin, sees the GPU, and the decode kernels are there for it."""
    from sessa_deploy.export.to_engine import this_machine
    from sessa_deploy.plugins import library
    from sessa_deploy.runtime.device import kernels as device_kernels
    from sessa_deploy.runtime.trt import api as trt_api

    trt = trt_api.load()
    plugin = library.load(trt, args.plugin)
    machine = this_machine(trt)
    found = device_kernels.images(plugin, int(machine.arch.removeprefix("sm_")))
    return {"ok": True, "python": sys.version.split()[0], "tensorrt": machine.tensorrt, "gpu": machine.gpu, "arch": machine.arch, "driver": machine.driver,
            "free_gib": machine.free / 2**30, "kernels": sorted(found)}  # fmt: skip


def step_build(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """An engine into the bundle."""
    from sessa_deploy.export.to_engine import build_engine

    built = build_engine(args.work / precision, BATCH, CAPACITY, CHUNK, opt_level=args.opt_level, plugin=args.plugin, force=args.force, verbose=args.verbose,
                         layers=args.layers)
    return {"ok": True, "seconds": built.info.seconds, "plan_mib": built.info.plan_size / 2**20, "folder": built.folder, "inlined": built.info.inlined}


def step_numbers(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Every step's logits and the caches, with and without a graph, clean and poisoned, against ONNX Runtime's float32 and its own error in this precision."""
    truth, same = (dict(np.load(args.work / f"{p}.npz")) for p in ("fp32", precision))
    result: dict[str, Any] = {"ok": True}
    first: dict[str, np.ndarray] | None = None
    for graph in (False, True):
        for poison in (False, True):
            backend = open_backend(args, precision, graph=graph)
            found = drive(backend, poison)
            backend.close()
            worst, where = 0.0, ""
            for name, value in found.items():
                wide = truth[name].astype(np.float64)
                scale = max(float(np.abs(wide).max()), 1e-30)
                error = float(np.abs(value - wide).max()) / scale
                error = error if np.isfinite(value).all() else float("inf")
                yardstick = float(np.abs(same[name].astype(np.float64) - wide).max()) / scale
                over = error / (3 * yardstick + (3e-5 if precision == "fp32" else 3e-3))
                if over > worst:
                    worst, where = over, f"{name}: {error:.2e}, ONNX Runtime {yardstick:.2e}"
            key = f"graph={graph} poison={poison}"
            result[key] = {"error_over_allowed": worst, "worst": where}
            result["ok"] = result["ok"] and worst <= 1.0
            first = found if first is None else first
            result[key]["same_bits"] = all(np.array_equal(first[n], found[n]) for n in first)
    return result


def step_text(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Greedy tokens against ONNX Runtime's in float32; fp16 may part where two tokens are nearly as likely, fp32 may not."""
    reference = json.loads((args.work / "fp32.json").read_text())
    result: dict[str, Any] = {"ok": True}
    for graph in (True, False):
        backend = open_backend(args, precision, graph=graph)
        found = greedy(backend, reference["prompts"], args.tokens)
        backend.close()
        wanted = [x[: args.tokens] for x in reference["tokens"]]
        equal = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), args.tokens) for x, y in zip(found, wanted, strict=True)]
        result[f"graph={graph}"] = {"equal_tokens": equal, "of": args.tokens, "sum": int(np.sum(found))}
        result["ok"] = result["ok"] and (precision != "fp32" or min(equal) == args.tokens)
    return result


def step_speed(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Milliseconds of a greedy step of one sequence, host clock, ids back on the host, at about half the capacity."""
    result: dict[str, Any] = {"ok": True}
    for graph in (True, False):
        backend = open_backend(args, precision, batch=1, graph=graph)
        backend.step(np.ones((1, 200), np.int64), np.array([200], np.int32))
        ids, new, times = np.ones((1, 1), np.int64), np.ones(1, np.int32), []
        for i in range(1200):
            if int(backend.length[0]) >= 300:
                backend.rewind(0, 200)
            begun = time.perf_counter()
            ids = backend.step_greedy(ids, new)[:, None]
            if i >= 200:
                times.append(1e3 * (time.perf_counter() - begun))
        backend.close()
        result[f"graph={graph}"] = {f"p{p}_ms": float(np.percentile(times, p)) for p in (50, 95, 99)}
    return result


def own_memory() -> int | None:
    """Bytes of the GPU's memory that this process holds, by NVIDIA's management library; None where it does not tell (other process ids in a container)."""
    import ctypes
    import os

    class Process(ctypes.Structure):
        _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("instance", ctypes.c_uint), ("compute", ctypes.c_uint)]

    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        ask = library.nvmlDeviceGetComputeRunningProcesses_v3
    except (OSError, AttributeError):
        return None
    device, count, found = ctypes.c_void_p(), ctypes.c_uint(64), (Process * 64)()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) or ask(device, ctypes.byref(count), found):
        return None
    unknown = 2**64 - 1
    return next((p.used for p in found[: count.value] if p.pid == os.getpid() and p.used != unknown), None)


def step_soak(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Many steps with changing lengths and prompts; the memory stays, and a sequence begun anew gives the bits it gave at first.

    The memory is this process's own where the driver tells it; else the whole GPU's, which means something only if nothing else runs there.
    """
    backend, rng = open_backend(args, precision), np.random.default_rng(1)
    prompt, counts = rng.integers(0, backend.config.vocab_size, (BATCH, 20)), np.full(BATCH, 20, np.int32)
    first = backend.step(prompt, counts)
    free, own = backend._cuda.memory()[0], own_memory()
    steps = 0
    while steps < SOAK_STEPS:
        for row in range(BATCH):
            if backend.room(row) < 130 or rng.random() < 0.01:
                backend.reset([row])
        tokens = int(rng.integers(2, 120)) if rng.random() < 0.05 else 1
        new = rng.integers(0, tokens + 1, BATCH).astype(np.int32)
        new[int(rng.integers(0, BATCH))] = tokens
        backend.step(rng.integers(0, backend.config.vocab_size, (BATCH, tokens)), new)
        steps += 1
    lost = free - backend._cuda.memory()[0] if own is None else (own_memory() or 0) - own
    backend.reset()
    same = bool(np.array_equal(first, backend.step(prompt, counts)))
    backend.close()
    whose = "the GPU" if own is None else "this process"
    return {"ok": same and lost <= 16 << 20, "steps": steps, "memory_lost_mib": lost / 2**20, "memory_of": whose, "same_bits_at_the_end": same}


def again(args: argparse.Namespace, name: str, work: Path, out: Path, *extra: str) -> list[str]:
    """The command of another step of this script."""
    plugin = ["--plugin", str(args.plugin)] if args.plugin else []
    return [sys.executable, __file__, "step", "--name", name, "--work", str(work), "--out", str(out), *plugin, *extra]


def step_second(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Two processes generate on the same GPU at the same time, with the tokens that one alone gives."""
    alone = step_text(args, precision)
    folders = [args.out / f"second.{i}" for i in range(2)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    beside = [subprocess.Popen(again(args, f"text-{precision}", args.work, f), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) for f in folders]
    codes = [p.wait() for p in beside]
    found = [json.loads((f / f"text-{precision}.json").read_text()) for f in folders]
    return {"ok": codes == [0, 0] and all(x == alone for x in found), "alone": alone, "beside": found}


def step_killed(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """A build that is killed with -9 leaves the bundle as it was: it opens, its checksums hold, and its old engine gives the tokens it gave."""
    from sessa_deploy.runtime.bundle import Bundle

    before, work = step_text(args, precision), args.out / "killed"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(args.work, work)
    marks = []
    for seconds in (1.5, 2.5, 4.0):  # while TensorRT is loaded, while it builds, while files are written
        build = subprocess.Popen(again(args, f"build-{precision}", work, args.out / "killed", "--force"), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        time.sleep(seconds)
        marks.append("running" if build.poll() is None else "over")
        build.kill()
        build.wait()
        Bundle.open(work / precision)
    after = step_text(argparse.Namespace(**{**vars(args), "work": work}), precision)
    built = step_build(argparse.Namespace(**{**vars(args), "work": work, "force": True}), precision)
    left = sorted(p.name for p in work.iterdir() if ".sessa-tmp-" in p.name)
    shutil.rmtree(work, ignore_errors=True)
    return {"ok": before == after and "running" in marks and built["ok"] and not left, "killed_while": marks, "text": after, "left_behind": left}


def step_memcheck(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """A short generation, prefill and replayed steps included, under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ok": False, "error": "no compute-sanitizer on PATH"}
    folder = args.out / "memcheck"
    folder.mkdir(exist_ok=True)
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *again(args, f"text-{precision}", args.work, folder, "--tokens", "6")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "Invalid" in line]
    file = folder / f"text-{precision}.json"
    text = json.loads(file.read_text()) if file.is_file() else {"ok": False, "error": (done.stderr or done.stdout)[-500:]}
    return {"ok": done.returncode == 0 and text["ok"] and any("0 errors" in line for line in said), "code": done.returncode, "said": said[-4:], "text": text}


def run(args: argparse.Namespace) -> int:
    """All steps, each a process of its own."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in [args.only] if args.only else list(LIMITS):
        command = [sys.executable, __file__, "step", "--name", name, "--work", str(args.work), "--out", str(args.out)]
        command += ["--plugin", str(args.plugin)] if args.plugin else []
        command += [] if args.opt_level is None else ["--opt-level", str(args.opt_level)]
        command += [] if args.layers is None else ["--layers", args.layers]
        begun, log = time.monotonic(), args.out / f"{name}.log"
        code = run_logged(command, log, LIMITS[name])
        file = args.out / f"{name}.json"
        result = json.loads(file.read_text()) if file.is_file() else {"ok": False, "error": " / ".join(log.read_text(errors="replace").splitlines()[-4:])}
        rows.append((name, code, time.monotonic() - begun, result))
        print(f"{name} {code} {time.monotonic() - begun:.1f}s {json.dumps(result)[:1500]}", flush=True)
    print(f"\n{'step':<14}{'result':<8}{'seconds':>8}")
    for name, code, seconds, result in rows:
        print(f"{name:<14}{'ok' if code == 0 and result['ok'] else 'FAILED':<8}{seconds:>8.1f}")
    return 0 if all(code == 0 and result["ok"] for _, code, _, result in rows) else 1


def step(args: argparse.Namespace) -> int:
    """One step in this process; its JSON is written whatever happens short of a crash."""
    kind, _, precision = args.name.partition("-")
    work: Callable[[argparse.Namespace, str], dict[str, Any]] = globals()[f"step_{kind}"]
    try:
        result = work(args, precision)
    except Exception as error:
        traceback.print_exc()
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "run", "step"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument("--out", type=Path, default=Path("out/trt_check"))
    parser.add_argument("--plugin", type=Path)
    parser.add_argument("--only", choices=list(LIMITS))
    parser.add_argument("--name", choices=list(LIMITS))
    parser.add_argument("--opt-level", type=int, help="of the builds; default: TensorRT's own")
    parser.add_argument("--layers", choices=("plugin", "tensorrt"), help="who computes what stands around the attentions")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to generate in the text steps")
    parser.add_argument("--force", action="store_true", help="build even where the engine is there")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    if args.verb == "prepare":
        prepare(args)
        return 0
    return run(args) if args.verb == "run" else step(args)


if __name__ == "__main__":
    sys.exit(main())

"""What engine_check.py does on a GPU, step by step, and the two engines it does it with. numpy and the runtime; the steps of TensorRT build engines too."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock, patch

import numpy as np
from common import greedy_step, own_memory, same_bits

BATCH, CAPACITY, CHUNK = 3, 512, 96
# form of the bundle -> (precision, weights in 8 bits, the form whose numbers on a CPU are what it should compute)
FORMS: dict[str, tuple[str, str | None, str]] = {
    "fp32": ("fp32", None, "fp32"), "fp16": ("fp16", None, "fp32"), "int8.fp32": ("fp32", "int8", "int8.fp32"), "int8": ("fp16", "int8", "int8.fp32"),
}  # fmt: skip
REFERENCES = ("int8.fp32",)  # forms that no engine runs
TOKENS = 200
SOAK_STEPS = 20_000
WARM, TIMED = 100, 1000  # steps, a quarter as many of few rows
FEW = (1, 2, 4, 8, 16)  # rows of a sequence in one step, which one session replays as CUDA graphs
# Ragged steps: (T, new_length); rows stand still, stop and start again, prompts are longer than a chunk, steps of few rows come often enough to be recorded.
STEPS = [(150, (150, 7, 0)), (1, (1, 1, 0)), (1, (1, 0, 0)), (40, (0, 40, 33)), (1, (1, 1, 1)), (1, (1, 1, 1)), (97, (3, 97, 1)), (1, (0, 1, 1)),
         (1, (1, 1, 1)), (4, (4, 1, 0)), (4, (0, 4, 2)), (4, (3, 3, 4)), (4, (1, 1, 4))]  # fmt: skip
Result = dict[str, Any]


class Engine(ABC):
    """One of the engines: how its backend is opened, and the steps that are its own. limits: step -> seconds it may take, in order."""

    limits: ClassVar[dict[str, int]]
    sanitizer: tuple[str, ...] = ()

    @abstractmethod
    def open(self, args: argparse.Namespace, precision: str, **options: Any) -> Any:
        """Its backend on a bundle of --work."""

    @abstractmethod
    def load(self, args: argparse.Namespace) -> Result:
        """Whether the library, the engine and the GPU fit together."""

    def build(self, args: argparse.Namespace, precision: str) -> Result:
        """Build what runs into the bundle, where that needs the GPU."""
        raise NotImplementedError


class TensorRT(Engine):
    """TensorRT's engines, built here."""

    limits: ClassVar = {"load": 60, "build-fp32": 150, "numbers-fp32": 90, "text-fp32": 60, "build-fp16": 150, "start-fp16": 60, "numbers-fp16": 90,
                        "rows-fp16": 45, "behind-fp16": 45, "text-fp16": 60, "build-int8": 150, "numbers-int8": 90, "rows-int8": 45, "text-int8": 60,
                        "speed-fp32": 45, "speed-fp16": 45, "soak-fp16": 120, "second-fp16": 90, "killed-fp16": 90,
                        "memcheck-fp16": 150}  # fmt: skip

    def open(self, args: argparse.Namespace, precision: str, **options: Any) -> Any:
        from sessa_deploy.runtime.bundle import Bundle
        from sessa_deploy.runtime.trt.backend import TrtBackend

        return TrtBackend(Bundle.open(args.work / precision), plugin=args.plugin, **{"batch": BATCH, "capacity": CAPACITY, **options})

    def load(self, args: argparse.Namespace) -> Result:
        from sessa_deploy.export.to_engine import this_machine
        from sessa_deploy.plugins import library
        from sessa_deploy.runtime.device import kernels
        from sessa_deploy.runtime.trt import api as trt_api

        trt = trt_api.load()
        plugin = library.load(trt, args.plugin)
        machine = this_machine(trt)
        found = kernels.images(plugin, int(machine.arch.removeprefix("sm_")))
        return {"ok": True, "tensorrt": machine.tensorrt, "gpu": machine.gpu, "arch": machine.arch, "driver": machine.driver,
                "free_gib": machine.free / 2**30, "kernels": sorted(found)}  # fmt: skip

    def build(self, args: argparse.Namespace, precision: str) -> Result:
        from sessa_deploy.export.to_engine import build_engine

        built = build_engine(args.work / precision, BATCH, CAPACITY, CHUNK, opt_level=args.opt_level, plugin=args.plugin, force=args.force,
                             verbose=args.verbose, layers=args.layers)
        return {"ok": True, "seconds": built.info.seconds, "plan_mib": built.info.plan_size / 2**20, "folder": built.folder, "inlined": built.info.inlined}


class OnnxRuntime(Engine):
    """ONNX Runtime with our kernels, on the graphs that `prepare` made."""

    limits: ClassVar = {"load": 60, "start-fp32": 90, "start-fp16": 90, "numbers-fp32": 90, "rows-fp32": 60, "text-fp32": 60, "numbers-fp16": 90,
                        "rows-fp16": 60, "behind-fp16": 60, "text-fp16": 60, "numbers-int8": 90, "rows-int8": 60, "text-int8": 60,
                        "speed-fp32": 60, "speed-fp16": 60, "soak-fp16": 120, "second-fp16": 90,
                        "memcheck-fp16": 400}  # fmt: skip
    sanitizer = ("--report-api-errors", "no")  # its libraries ask the driver what it may not have

    def open(self, args: argparse.Namespace, precision: str, **options: Any) -> Any:
        from sessa_deploy.runtime.bundle import Bundle
        from sessa_deploy.runtime.ort.engine import OrtCudaBackend

        return OrtCudaBackend(Bundle.open(args.work / precision), plugin=args.plugin, **{"batch": BATCH, "capacity": CAPACITY, **options})

    def load(self, args: argparse.Namespace) -> Result:
        from sessa_deploy.cuda import Device, devices, driver_version
        from sessa_deploy.plugins import library
        from sessa_deploy.runtime.bundle import Bundle
        from sessa_deploy.runtime.ort import prepared, session

        runtime, found = session.load(), devices()
        seen = library.check(args.plugin, product="ort")
        graphs = {p: prepared.find(Bundle.open(args.work / p)) for p in FORMS if p not in REFERENCES}
        gpu = found[0] if found else Device(0, "no GPU", "", 0)
        return {"ok": session.cuda_is_usable() and all(graphs.values()), "onnxruntime": runtime.__version__, "cuda": getattr(runtime, "cuda_version", ""),
                "driver": driver_version(), "gpu": gpu.name, "arch": gpu.arch, "library": str(seen.path), "archs": seen.archs,
                "ops": {p: g.ops for p, g in graphs.items() if g}, "added_bytes": {p: g.added_bytes for p, g in graphs.items() if g}}  # fmt: skip


ENGINES: dict[str, Engine] = {"trt": TensorRT(), "ort": OnnxRuntime()}


def drive(backend: Any, poison: bool = False) -> dict[str, np.ndarray]:
    """Logits of STEPS and the caches at their end; rows that stood still are zeros."""
    rng, found = np.random.default_rng(0), {}
    for i, (tokens, new) in enumerate(STEPS):
        if poison:
            backend.poison()
        counts = np.array(new, np.int32)
        ids = rng.integers(0, backend.config.vocab_size, (BATCH, tokens))
        found[f"logits.{i}"] = np.where(counts[:, None] > 0, backend.step(ids, counts), 0.0)
    return found | {f"{row}.{name}": np.asarray(x) for row in range(BATCH) for name, x in backend.cached(row).items()}


def drive_alone(backend: Any) -> dict[str, np.ndarray]:
    """Like `drive`, each sequence stepped alone among the others, whose caches are poisoned beyond their ends."""
    rng, found = np.random.default_rng(0), {}
    for i, (tokens, new) in enumerate(STEPS):
        backend.poison()
        ids = rng.integers(0, backend.config.vocab_size, (BATCH, tokens))
        logits = np.zeros((BATCH, backend.config.vocab_size), np.float32)
        for row in np.flatnonzero(new).tolist():
            logits[row] = backend.step_row(row, ids[row, : new[row]])
        found[f"logits.{i}"] = logits
    return found | {f"{row}.{name}": np.asarray(x) for row in range(BATCH) for name, x in backend.cached(row).items()}


def greedy(backend: Any, prompts: list[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    """Greedy tokens behind each prompt, all prompts at once."""
    backend.reset()
    longest = max(map(len, prompts))
    ids, new = np.zeros((BATCH, longest), np.int64), np.array([len(p) for p in prompts], np.int32)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)] = prompt
    picked = np.argmax(backend.step(ids, new), axis=-1)
    out = [picked]
    for left in range(tokens - 1, 0, -1):
        picked = greedy_step(backend, picked[:, None], np.ones(BATCH, np.int32), left == 1)
        out.append(picked)
    found: list[list[int]] = np.stack(out, 1).tolist()
    return found


def step_load(args: argparse.Namespace, precision: str) -> Result:
    """Everything is there, and fits together."""
    return {**ENGINES[args.engine].load(args), "python": sys.version.split()[0]}


def step_build(args: argparse.Namespace, precision: str) -> Result:
    """What runs, into the bundle."""
    return ENGINES[args.engine].build(args, precision)


def step_begin(args: argparse.Namespace, precision: str) -> Result:
    """Seconds from this process's first line to its first token, by parts; the parts of opening as the backend tells them, where it does."""
    imported = time.perf_counter()
    backend = ENGINES[args.engine].open(args, precision, batch=1)
    opened = time.perf_counter()
    token = int(backend.step_greedy(np.ones((1, 4), np.int64), np.full(1, 4, np.int32))[0])
    first = time.perf_counter()
    backend.step_greedy(np.full((1, 1), token), np.ones(1, np.int32))
    second = time.perf_counter()
    backend.close()
    return {"ok": True, "total_s": first - args.began, "numpy_s": imported - args.began, "opened_s": opened - imported, "first_token_s": first - opened,
            "second_token_s": second - first, "parts_s": getattr(backend, "seconds", {})}  # fmt: skip


def step_start(args: argparse.Namespace, precision: str) -> Result:
    """From nothing to the first token in a fresh process, twice: the first time the machine's file cache may be cold."""
    runs = []
    for _ in range(2):
        begun = time.perf_counter()
        done = subprocess.run(again(args, f"begin-{precision}", args.work, args.out), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False)
        runs.append({"process_s": time.perf_counter() - begun, "code": done.returncode, **json.loads((args.out / f"begin-{precision}.json").read_text())})
    return {"ok": all(r["ok"] and not r["code"] for r in runs) and runs[1]["total_s"] <= 3.0, "must_s": 3.0, "aim_s": 1.5, "cold": runs[0], "warm": runs[1]}


def compared(args: argparse.Namespace, precision: str, found: dict[str, np.ndarray]) -> Result:
    """How far numbers are from ONNX Runtime's in float32 on a CPU (of the same weights), as a share of what its own error in this precision allows."""
    truth, same = (dict(np.load(args.work / f"{p}.npz")) for p in (FORMS[precision][2], precision))
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
    return {"error_over_allowed": worst, "worst": where}


def step_numbers(args: argparse.Namespace, precision: str) -> Result:
    """Every step's logits and the caches, with and without a graph, clean and poisoned: near enough to ONNX Runtime's on a CPU, and the same bits each time."""
    result: Result = {"ok": True}
    first: dict[str, np.ndarray] | None = None
    for graph in (False, True):
        for poison in (False, True):
            backend = ENGINES[args.engine].open(args, precision, graph=graph)
            found = drive(backend, poison)
            recorded = len(backend._graphs)
            backend.close()
            first = found if first is None else first
            bits = same_bits(first, found)
            row = compared(args, precision, found) | {"same_bits": bits, "graphs": recorded}
            result[f"graph={graph} poison={poison}"] = row
            result["ok"] = result["ok"] and row["error_over_allowed"] <= 1.0 and bits and (recorded > 0) == graph
    return result


def step_rows(args: argparse.Namespace, precision: str) -> Result:
    """STEPS again, each sequence stepped alone among the others: the same numbers; and a copied sequence goes on as its source does."""
    backend = ENGINES[args.engine].open(args, precision)
    found = drive_alone(backend)
    result = compared(args, precision, found)
    backend.copy_row(0, 1, int(backend.length[0]))
    backend.poison()
    ids = np.full((BATCH, 1), 7)
    logits = backend.step(ids, np.array([1, 1, 0], np.int32))
    alone = backend._runs_rows()
    backend.close()
    whole = ENGINES[args.engine].open(args, precision)
    bits = same_bits(drive(whole), found)
    whole.close()
    copied = bool(np.array_equal(logits[0], logits[1]))
    return {"ok": result["error_over_allowed"] <= 1.0 and copied, **result, "alone": alone, "same_bits_as_all_together": bits, "copied_goes_on_alike": copied}


def step_behind(args: argparse.Namespace, precision: str) -> Result:
    """Sequences stepped alone, whose new rows are copied behind their cached ones, or laid there by the engine itself, as those of long prompts are."""
    found, laid = [], []
    for least in (1 << 60, 0):
        with patch("sessa_deploy.runtime.device.buffers._LEAST_BEHIND", least):
            backend = ENGINES[args.engine].open(args, precision)
            backend._run = seen = Mock(wraps=backend._run)
            found.append(drive_alone(backend))
            laid.append(sum(call.args[0].behind is not None for call in seen.call_args_list))
            backend.close()
    bits = same_bits(*found)
    return {"ok": bits and laid[0] == 0 < laid[1], **compared(args, precision, found[1]), "same_bits": bits, "laid_by_the_engine": laid}


def step_text(args: argparse.Namespace, precision: str) -> Result:
    """Greedy tokens against ONNX Runtime's in float32 on a CPU; fp16 may part where two tokens are nearly as likely, fp32 may not."""
    reference = json.loads((args.work / f"{FORMS[precision][2]}.json").read_text())
    result: Result = {"ok": True}
    for graph in (True, False):
        backend = ENGINES[args.engine].open(args, precision, graph=graph)
        found = greedy(backend, reference["prompts"], args.tokens)
        backend.close()
        wanted = [x[: args.tokens] for x in reference["tokens"]]
        equal = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), args.tokens) for x, y in zip(found, wanted, strict=True)]
        result[f"graph={graph}"] = {"equal_tokens": equal, "of": args.tokens, "sum": int(np.sum(found))}
        result["ok"] = result["ok"] and (precision != "fp32" or min(equal) == args.tokens)
    return result


def step_speed(args: argparse.Namespace, precision: str) -> Result:
    """Milliseconds of a greedy step of one sequence, host clock, ids back on the host, at about half the capacity; with a graph, of steps of few rows too."""
    result: Result = {"ok": True}
    for graph in (True, False):
        backend = ENGINES[args.engine].open(args, precision, batch=1, graph=graph)
        backend.step(np.ones((1, 200), np.int64), np.array([200], np.int32))
        for tokens in FEW if graph else FEW[:1]:
            ids, new, times = np.ones((1, tokens), np.int64), np.full(1, tokens, np.int32), []
            for i in range(WARM + (TIMED if tokens == 1 else TIMED // 4)):
                if int(backend.length[0]) >= 300:
                    backend.rewind(0, 200)
                begun = time.perf_counter()
                if tokens == 1:
                    greedy_step(backend, ids, new)
                else:
                    backend.step_greedy(ids, new)
                if i >= WARM:
                    times.append(1e3 * (time.perf_counter() - begun))
            row = {f"p{p}_ms": float(np.percentile(times, p)) for p in (50, 95, 99)}
            result[f"graph={graph}" + (f" rows={tokens}" if tokens > 1 else "")] = row
        backend.close()
    return result


def step_soak(args: argparse.Namespace, precision: str) -> Result:
    """Many steps with changing lengths and prompts; the memory stays, and a sequence begun anew gives the bits it gave at first.

    The memory is this process's own where the driver tells it; else the whole GPU's, which means something only if nothing else runs there. It counts
    from where every number of rows that is recorded has been, and the longest step.
    """
    backend, rng = ENGINES[args.engine].open(args, precision), np.random.default_rng(1)
    prompt, counts = rng.integers(0, backend.config.vocab_size, (BATCH, 20)), np.full(BATCH, 20, np.int32)
    first = backend.step(prompt, counts)
    for tokens in (*range(1, FEW[-1] + 1), 119):
        for _ in range(4):
            backend.reset()
            backend.step(rng.integers(0, backend.config.vocab_size, (BATCH, tokens)), np.full(BATCH, tokens, np.int32))
    free, own = backend._cuda.memory()[0], own_memory()
    steps = 0
    begun = time.perf_counter()
    while steps < args.soak:
        for row in range(BATCH):
            if backend.room(row) < 130 or rng.random() < 0.01:
                backend.reset([row])
        tokens = int(rng.integers(2, 120)) if rng.random() < 0.05 else 1
        new = rng.integers(0, tokens + 1, BATCH).astype(np.int32)
        new[int(rng.integers(0, BATCH))] = tokens
        backend.step(rng.integers(0, backend.config.vocab_size, (BATCH, tokens)), new)
        steps += 1
    seconds = time.perf_counter() - begun
    lost = free - backend._cuda.memory()[0] if own is None else (own_memory() or 0) - own
    backend.reset()
    same = bool(np.array_equal(first, backend.step(prompt, counts)))
    graphs = len(backend._graphs)
    backend.close()
    return {"ok": same and lost <= 16 << 20, "steps": steps, "seconds": seconds, "memory_lost_mib": lost / 2**20, "graphs": graphs,
            "memory_of": "the GPU" if own is None else "this process", "same_bits_at_the_end": same}  # fmt: skip


def again(args: argparse.Namespace, name: str, work: Path, out: Path, *extra: str) -> list[str]:
    """The command of another step of this script."""
    plugin = ["--plugin", str(args.plugin)] if args.plugin else []
    script = str(Path(__file__).with_name("engine_check.py"))
    return [sys.executable, script, "step", "--engine", args.engine, "--name", name, "--work", str(work), "--out", str(out), *plugin, *extra]


def step_second(args: argparse.Namespace, precision: str) -> Result:
    """Two processes generate on the same GPU at the same time, with the tokens that one alone gives."""
    alone = step_text(args, precision)
    folders = [args.out / f"second.{i}" for i in range(2)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    beside = [subprocess.Popen(again(args, f"text-{precision}", args.work, f), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) for f in folders]
    codes = [p.wait() for p in beside]
    found = [json.loads((f / f"text-{precision}.json").read_text()) for f in folders]
    return {"ok": codes == [0, 0] and all(x == alone for x in found), "alone": alone, "beside": found}


def step_killed(args: argparse.Namespace, precision: str) -> Result:
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


def step_memcheck(args: argparse.Namespace, precision: str) -> Result:
    """A short generation, prefill and replayed steps included, under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ok": False, "error": "no compute-sanitizer on PATH"}
    folder = args.out / "memcheck"
    folder.mkdir(exist_ok=True)
    options = ["--tool", "memcheck", "--error-exitcode", "9", *ENGINES[args.engine].sanitizer]
    command = [tool, *options, *again(args, f"text-{precision}", args.work, folder, "--tokens", "6")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "Invalid" in line]
    file = folder / f"text-{precision}.json"
    text = json.loads(file.read_text()) if file.is_file() else {"ok": False, "error": (done.stderr or done.stdout)[-500:]}
    return {"ok": done.returncode == 0 and text["ok"] and any("0 errors" in line for line in said), "code": done.returncode, "said": said[-4:], "text": text}


WORK: dict[str, Callable[[argparse.Namespace, str], Result]] = {
    "load": step_load, "build": step_build, "begin": step_begin, "start": step_start, "numbers": step_numbers, "rows": step_rows, "text": step_text,
    "behind": step_behind, "speed": step_speed, "soak": step_soak, "second": step_second, "killed": step_killed, "memcheck": step_memcheck,
}  # fmt: skip

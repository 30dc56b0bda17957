"""What the benchmarks share: timing, peak memory in a child process, where results go, and how a plot looks."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sessa_deploy.files import write_whole

RESULTS = Path(__file__).parent / "results"


def paired_ms(calls: Sequence[Callable[[], object]], repeats: int = 9, warmup: int = 2) -> tuple[list[float], float]:
    """(median milliseconds of each call, median over rounds of first / second): the calls take turns, so that other load hits all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + repeats):
        order = list(enumerate(calls))
        for i, call in order if turn % 2 else reversed(order):
            start = time.perf_counter()
            call()
            if turn >= warmup:
                times[i].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(t) for t in times], statistics.median(a / b for a, b in zip(times[0], times[1], strict=True))


def same_bits(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether arrays of the same names hold the same values."""
    return first.keys() == second.keys() and all(np.array_equal(value, second[name]) for name, value in first.items())


def own_memory() -> int | None:
    """Bytes of the GPU's memory that this process holds, by NVIDIA's management library; None where it does not tell (other process ids in a container)."""

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


def greedy_step(backend: Any, ids: Any, new: Any, last: bool = False) -> Any:
    """Token ids (B,) of a decode step as a session takes it: where the backend looks ahead, the step behind it is begun before they are read.

    ids (B,1): the tokens before, which a step that was begun already does not ask for; new (B,): new_length. last: nothing follows on this step.
    """
    if not backend.looks_ahead:
        return backend.step_greedy(ids, new)
    if not backend.under_way:
        backend.begin_greedy(ids, new)
    if not last:
        backend.begin_next(new)
    return backend.end_greedy()


def run_logged(command: Sequence[str], log: Path, limit: float) -> int:
    """Exit code of a process whose output goes to the file `log`; 124 if `limit` seconds did not suffice, 127 if it cannot be started (the log says why)."""
    with log.open("w") as stream:
        try:
            return subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return 124
        except OSError as error:
            stream.write(f"{command[0]}: {error.strerror}\n")
            return 127


def _status_kib(field: str) -> int:
    # Not getrusage: its maximum survives exec, so a child would start at its parent's peak.
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))


def _peak(call: Callable[..., object], args: tuple[Any, ...], warm: tuple[Any, ...], queue: Any) -> None:
    call(*warm)  # what a library loads at its first call is not the algorithm's
    before = _status_kib("VmRSS")
    call(*args)
    queue.put(_status_kib("VmHWM") - before)


def peak_growth_mib(call: Callable[..., object], args: tuple[Any, ...], warm: tuple[Any, ...]) -> float:
    """Growth of the peak resident memory during call(*args), in a fresh process after call(*warm) on something small, in MiB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(call, args, warm, queue))
    process.start()
    kib = queue.get()
    process.join()
    return kib / 1024


def machine() -> dict[str, Any]:
    """What a figure must be read with: processor, threads, versions."""
    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}


def write(name: str, rows: Any) -> Path:
    """Write results/<name>.json with the machine beside the rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    return write_whole(path, json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", what="the results")


def line_plot(name: str, series: dict[str, tuple[list[float], list[float]]], xlabel: str, ylabel: str, title: str) -> Path:
    """results/<name>.png: one log-log line a series."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for label, (x, y) in series.items():
        axes.plot(x, y, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    axes.set_xscale("log", base=2)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path

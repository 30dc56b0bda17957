"""Decode on a CPU: ONNX Runtime through the session's backend beside our torch model in eager mode, on the same weights.

    python benchmarks/bench_decode.py [--checkpoint checkpoints/demo] [--threads N] [--contexts 64 256 ...] [--batches 1 8]

Both take token ids in and give the most likely ids out, append and argmax included, on equally many threads. Their steps alternate in short rounds and
take turns at going first, so that what else the machine does hits both alike; the ratio is the median over rounds of the ratio within a round, with its
quartiles. Writes results/decode.json and results/decode.png, unless the machine was busy before it began (--force writes all the same).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine, write
from rich.console import Console
from rich.table import Table

from sessa_deploy.checkpoint import load_checkpoint
from sessa_deploy.export.to_onnx import export_bundle
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.ort.backend import OrtBackend

ROUND = 16  # steps of one side before the other has its turn
BUSY = 0.5  # load average above which figures are not kept


class Torch:
    """Our model in eager mode with its own caches."""

    def __init__(self, model: SessaLM, batch: int, capacity: int) -> None:
        self.model, self.caches = model, model.init_cache(batch, capacity)

    def start(self, prompt: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model.prefill(torch.from_numpy(prompt), self.caches).argmax(-1).numpy()

    def step(self, ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model.decode_step(torch.from_numpy(ids[:, None]), self.caches).argmax(-1).numpy()


class Ort:
    """The bundle in ONNX Runtime, through the runtime's backend."""

    def __init__(self, bundle: Bundle, batch: int, capacity: int, threads: int) -> None:
        self.backend, self.new = OrtBackend(bundle, batch, capacity, threads=threads), np.ones(batch, np.int32)

    def start(self, prompt: np.ndarray) -> np.ndarray:
        return self.backend.step_greedy(prompt, self.new * prompt.shape[1])

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self.backend.step_greedy(ids[:, None], self.new)


def timed(step: Callable[[np.ndarray], np.ndarray], ids: np.ndarray, times: list[float], tokens: list[list[int]]) -> np.ndarray:
    """One round; appends milliseconds a step and the tokens, returns the last ids."""
    for _ in range(ROUND):
        start = time.perf_counter()
        ids = step(ids)
        times.append(1e3 * (time.perf_counter() - start))
        tokens.append(ids.tolist())
    return ids


def compare(model: SessaLM, bundle: Bundle, batch: int, context: int, threads: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds a step of both at this context, and at how many steps their greedy tokens are the same from the first on."""
    capacity = context + (rounds + 1) * ROUND
    prompt = np.random.default_rng(context).integers(0, model.config.vocab_size, (batch, context))
    sides = [Torch(model, batch, capacity), Ort(bundle, batch, capacity, threads)]
    ids = [side.start(prompt) for side in sides]
    times: list[list[float]] = [[], []]
    tokens: list[list[list[int]]] = [[], []]
    for turn in range(rounds + 1):
        for i in (0, 1) if turn % 2 else (1, 0):
            ids[i] = timed(sides[i].step, ids[i], times[i], tokens[i])
            if turn == 0:
                times[i].clear()  # warm-up
    same = next((n for n, (a, b) in enumerate(zip(*tokens, strict=True)) if a != b), len(tokens[0]))
    medians = [[statistics.median(t[start : start + ROUND]) for start in range(0, len(t), ROUND)] for t in times]
    low, middle, high = np.percentile([a / b for a, b in zip(*medians, strict=True)], (25, 50, 75)).tolist()
    eager, ort = (statistics.median(t) for t in times)
    return {"batch": batch, "context": context, "torch_eager_ms": eager, "ort_ms": ort, "torch_eager_min_ms": min(times[0]), "ort_min_ms": min(times[1]),
            "speedup": middle, "speedup_quartiles": [low, high], "rounds": rounds, "same_greedy_tokens": f"{same}/{len(tokens[0])}"}


def busy() -> str:
    """The load average of the last minute in words, with a warning where other work competes for the cores; empty where none does."""
    found, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    # PyTorch's threads wait for each other by spinning: on a busy machine they lose far more than ONNX Runtime's, and the ratio flatters us.
    return f"the load average was {found:.2f} on {cores} cores: other work was running, and it slows PyTorch more" if found > BUSY else ""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds a token against context, one panel a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(1, len(batches), figsize=(5 * len(batches), 3.6), squeeze=False, constrained_layout=True)
    for axis, batch in zip(axes[0], batches, strict=True):
        mine = [row for row in rows if row["batch"] == batch]
        for key, label in (("torch_eager_ms", "torch eager"), ("ort_ms", "ONNX Runtime")):
            axis.plot([row["context"] for row in mine], [row[key] for row in mine], marker="o", label=label)
        axis.set(title=f"batch {batch}", xlabel="context, tokens", ylabel="ms a step", xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/demo")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--force", action="store_true", help="write results of a busy machine too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    before, remark = os.getloadavg()[0], busy()
    model = load_checkpoint(given.checkpoint).eval()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(export_bundle(given.checkpoint, Path(folder) / "bundle"))
        rows = [compare(model, bundle, batch, context, given.threads, given.rounds) for batch in given.batches for context in given.contexts]
    table = Table(title=f"decode, {given.checkpoint}, fp32, {given.threads} threads, {machine()['cpu']}, torch {torch.__version__}")
    for column in ("batch", "context", "torch eager ms", "ONNX Runtime ms", "times faster", "quartiles", "same greedy tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["batch"]), str(row["context"]), f"{row['torch_eager_ms']:.2f}", f"{row['ort_ms']:.2f}", f"{row['speedup']:.2f}",
                      "{:.2f} to {:.2f}".format(*row["speedup_quartiles"]), row["same_greedy_tokens"])
    Console(width=120).print(table)
    if remark:
        print(remark)
        if not given.force:
            print("nothing was written; run it again on an idle machine, or with --force")
            return
    print(write("decode", {"load_average_before": before, "threads": given.threads, "figures": rows}))
    plot(rows, RESULTS / "decode.png")


if __name__ == "__main__":
    main()

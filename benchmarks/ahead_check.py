"""Decoding with and without the next step begun before the host has read the ids, on one engine: the same tokens, and milliseconds a token of both.

    python benchmarks/ahead_check.py --bundle DIR --backend trt [--contexts 4096 128] [--batch 1]

Needs a GPU and what runs the bundle there (an engine for TensorRT, a graph prepared for ONNX Runtime), no torch. The decode kernels come from that engine's
library; --kernels takes them from a folder instead, which any machine with Triton makes:

    python -m sessa_deploy.plugins.lower --arch 90 --out DIR --kernel decode_append --kernel decode_end --kernel decode_draft

Tokens by `Session.generate`, figures by what `sessa-deploy bench` measures, both ways by turns. `chain`: the GPU's part alone, steps replayed with nobody
between them. Exits with 1 where tokens differ or something failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sessa_deploy.runtime.bench import BenchOptions, measure
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.session import Session

CHAIN = 200  # steps


def opened(given: argparse.Namespace) -> Session:
    """The session on the engine."""
    bundle = Bundle.open(given.bundle)
    if given.backend == "ort":  # rehearses this on a CPU, where nothing is won
        from sessa_deploy.runtime.ort.backend import OrtBackend

        return Session(bundle, OrtBackend(bundle, given.batch, given.capacity))
    options = {"plugin": given.plugin, "kernels": given.kernels}
    if given.backend == "trt":
        from sessa_deploy.runtime.trt.backend import TrtBackend

        return Session(bundle, TrtBackend(bundle, given.batch, given.capacity, **options))
    from sessa_deploy.runtime.ort.engine import OrtCudaBackend

    return Session(bundle, OrtCudaBackend(bundle, given.batch, given.capacity, **options))


def texts(session: Session, context: int, tokens: int) -> dict[str, Any]:
    """Greedy tokens of every sequence both ways; they end at different steps, all but the first."""
    batch, rng = session.max_batch, np.random.default_rng(context)
    prompts = [rng.integers(0, session.config.vocab_size, max(1, context - 3 * b)).tolist() for b in range(batch)]
    limits = [max(1, tokens - 37 * b) for b in range(batch)]
    found = {}
    for ahead in (True, False, True):
        session.backend.looks_ahead = ahead
        session.reset()
        begun = time.perf_counter()
        made = [g.tokens for g in session.generate(prompts, limits, stop_tokens=())]
        found[ahead] = made, time.perf_counter() - begun, found.get(ahead, (made,))[0] == made
    return {"tokens": sum(map(len, found[True][0])), "the same": found[True][0] == found[False][0], "the same again": found[True][2],
            "distinct": len({t for text in found[True][0] for t in text}), "s, prompt included": [round(found[a][1], 3) for a in (True, False)]}


def figures(session: Session, context: int, seconds: float) -> dict[str, Any]:
    """Milliseconds from token to token both ways, by turns, and those of the GPU's steps alone."""
    p50: dict[bool, list[float]] = {True: [], False: []}
    mean: dict[bool, list[float]] = {True: [], False: []}
    for ahead in (True, False, True, False):
        session.backend.looks_ahead = ahead
        ms = measure(session, BenchOptions(context, 128, 300, seconds, 4 * seconds, 0.2, 1))["inter_token_ms"]
        p50[ahead].append(ms["p50"])
        mean[ahead].append(ms["mean"])
    result = {name: {"p50": min(p50[ahead]), "mean": min(mean[ahead]), "each p50": p50[ahead]} for name, ahead in (("ahead", True), ("without", False))}
    session.backend.looks_ahead = True
    return result | {"without/ahead": min(p50[False]) / min(p50[True]), "chain": chain(session, context), "host_us": host(session, context)}


def begin(session: Session, context: int) -> None:
    """Every sequence at `context` random tokens."""
    session.reset()
    rng = np.random.default_rng(0)
    session.prefill([rng.integers(0, session.config.vocab_size, context).tolist() for _ in range(session.max_batch)])


def chain(session: Session, context: int) -> float | None:
    """Milliseconds of one replay among many with nothing between them; None where steps are not recorded."""
    backend: Any = session.backend
    graphs = [graph for (_, _, fed), graph in getattr(backend, "_graphs", {}).items() if not fed]
    if not graphs:
        return None
    begin(session, context)
    backend.step_greedy(np.zeros((session.max_batch, 1), np.int64), np.ones(session.max_batch, np.int32))
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        for step in range(CHAIN):
            backend._cuda.replay(graphs[step % len(graphs)])
        backend._cuda.wait()
        times.append(1e3 * (time.perf_counter() - begun) / CHAIN)
    backend._on_device = None  # the device's lengths are not the session's now
    session.reset()
    return min(times)


def host(session: Session, context: int) -> dict[str, float]:
    """Microseconds of the host's calls, the wait for the tokens among them."""
    backend, batch = session.backend, session.max_batch
    begin(session, context)
    ids, new = np.zeros((batch, 1), np.int64), np.ones(batch, np.int32)
    spent: dict[str, list[float]] = {"begin_greedy": [], "begin_next": [], "end_greedy": []}

    def timed(name: str, call: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        call()
        spent[name].append(1e6 * (time.perf_counter() - begun))

    for _ in range(100):
        timed("begin_greedy", lambda: backend.begin_greedy(ids, new))
        for _ in range(4):
            timed("begin_next", lambda: backend.begin_next(new))
            timed("end_greedy", backend.end_greedy)
        backend.call_off()
        for row in range(batch):
            backend.rewind(row, context)
    session.reset()
    return {name: round(statistics.median(times), 1) for name, times in spent.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--backend", choices=("trt", "ort-cuda", "ort"), default="trt")
    parser.add_argument("--plugin", type=Path, help="path of the engine's library; found by itself by default")
    parser.add_argument("--kernels", type=Path, help="folder of decode kernels, in place of the library's")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 128])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--capacity", type=int, help="default: the engine's, or the model's max_context")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each of four measurements a context")
    given = parser.parse_args()
    begun, good = time.perf_counter(), True
    with opened(given) as session:
        print(f"{session.backend.name}, batch {session.max_batch}, capacity {session.capacity}, opened in {time.perf_counter() - begun:.1f} s", flush=True)
        for context in given.contexts:
            calls: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (
                ("texts", lambda context=context: texts(session, context, given.tokens)),
                ("figures", lambda context=context: figures(session, context, given.seconds)))  # fmt: skip
            for name, call in calls:
                try:
                    found = call()
                    good &= found.get("the same", True) and found.get("the same again", True)
                    print(f"{context} {name}: {json.dumps(found)}", flush=True)
                except Exception:
                    good = False
                    print(f"{context} {name} failed: {' / '.join(traceback.format_exc().splitlines()[-6:])}", flush=True)
    print(f"{'ok' if good else 'FAILED'}, {time.perf_counter() - begun:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

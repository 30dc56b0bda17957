"""One peer of compare.py in its own process: opens it, times decode steps and prompts, writes what it found after each point.

    python compare_worker.py JOB.json RESULT.json

Host clock, token ids back on the host after every step, append and argmax included, for every peer alike. No torch is needed for "trt", "ort" and "ort-cuda".
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from common import greedy_step
from compare_peer import Peer, Point

from sessa_deploy.contract import PRECISIONS
from sessa_deploy.cuda import used_memory
from sessa_deploy.files import write_whole
from sessa_deploy.runtime import environment, traffic
from sessa_deploy.runtime.backend import IntArray

WINDOW = 64  # steps before the context is rewound to where it began
WARM_STEPS = 3
FILL_TOKENS = 4096  # tokens of all sequences together in one step of a prefill that only fills caches


class Runtime(Peer):
    """The deployed side: a bundle on TensorRT or ONNX Runtime, through the runtime's backends."""

    backend: Any = None

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.opened: dict[str, Any] = {}

    def notes(self) -> dict[str, Any]:
        return self.opened

    def open(self, batch: int, capacity: int) -> None:
        from sessa_deploy.runtime.bundle import Bundle

        if self.job["peer"] == "trt":
            from sessa_deploy.runtime.trt.backend import TrtBackend

            bundle = engine_bundle(self.job, batch, capacity)
            self.backend = TrtBackend(bundle, batch=batch)
        elif self.job["peer"] == "ort-cuda":
            from sessa_deploy.runtime.ort.engine import OrtCudaBackend, kernels

            bundle = prepared_bundle(self.job)
            self.backend = OrtCudaBackend(bundle, batch, capacity)
            self.opened = {"kernels": kernels(bundle), **{f"s, {part}": f"{seconds:.2f}" for part, seconds in self.backend.seconds.items()}}
        else:
            from sessa_deploy.runtime.ort.backend import OrtBackend

            if not self.job["bundle"]:
                raise RuntimeError("no --bundle")
            bundle = Bundle.open(self.job["bundle"])
            self.backend = OrtBackend(bundle, batch, capacity, provider="cuda" if self.device == "cuda" else "cpu")
        self.weights = bundle.weights if self.backend.packed_weights else None
        self.ids, self.new = np.zeros((batch, 1), np.int64), np.ones(batch, np.int32)

    def begin(self, contexts: tuple[int, ...]) -> None:
        self.backend.reset()
        self.contexts, on_device = contexts, getattr(self.backend, "_device", None)
        if on_device is None:
            self._feed(self.drawn(max(contexts), len(contexts)), np.array(contexts), max(1, min(self.backend.best_chunk, FILL_TOKENS // len(contexts))))
            return
        # ONNX Runtime would take long to prefill a batch: it reads the whole capacity at every step.
        rows = np.random.default_rng(0).standard_normal((max(contexts), self.config.d_model), np.float32)
        raw = (rows.view(np.uint32) >> 16).astype(np.uint16).tobytes() if self.precision == "bf16" else rows.astype(PRECISIONS[self.precision].numpy).tobytes()
        for row, length in enumerate(contexts):
            on_device.overwrite(row, raw[: length * len(raw) // len(rows)])
        self.backend.length[:] = contexts

    def rewind(self) -> None:
        for row, length in enumerate(self.contexts):
            self.backend.rewind(row, length)

    def step(self, last: bool = False) -> list[int]:
        self.ids[:, 0] = greedy_step(self.backend, self.ids, self.new, last)
        return self.ids[:, 0].tolist()

    def prompt(self, ids: IntArray) -> list[int]:
        self.backend.reset()
        return np.argmax(self._feed(ids, np.full(len(ids), ids.shape[1]), self.backend.best_chunk), axis=-1).tolist()

    def _feed(self, ids: IntArray, lengths: np.ndarray, chunk: int) -> np.ndarray:
        logits = np.empty(0, np.float32)
        for start in range(0, int(lengths.max()), chunk):
            new = np.clip(lengths - start, 0, chunk).astype(np.int32)
            found = self.backend.step(ids[:, start : start + int(new.max())], new)
            logits = found if start == 0 else np.where(new[:, None] > 0, found, logits)
        return logits

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()
        self.backend = None


def engine_bundle(job: dict[str, Any], batch: int, capacity: int) -> Any:
    """A bundle whose engine for this GPU holds exactly `capacity` tokens, built where the job allows it."""
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.trt.plan import engines

    places = [*job["trt_bundles"], *([job["bundle"]] if job["bundle"] else [])]
    for place in places:
        opened = Bundle.open(place)
        if any(info.capacity == capacity and info.max_batch >= batch for info in engines(opened).values()):
            return opened
    wanted = f"--max-batch {batch} --max-context {capacity}"
    if not job["build"] or not places:
        raise RuntimeError(f"no bundle has an engine for it: sessa-deploy build BUNDLE {wanted}, or --build")
    from sessa_deploy.export.to_engine import build_engine

    copy = copied(places[-1], Path(job["build"], f"b{batch}-c{capacity}"))
    tokens = max(1, min(capacity, job["max_prompt"] // batch))  # buffers are for all sequences together
    return build_engine(copy, batch, capacity, tokens, opt_level=job["opt_level"]).bundle


def prepared_bundle(job: dict[str, Any]) -> Any:
    """A bundle with a graph prepared for ONNX Runtime, prepared now where the job allows it."""
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.ort import prepared

    places = [*job["trt_bundles"], *([job["bundle"]] if job["bundle"] else [])]
    for place in places:
        opened = Bundle.open(place)
        if prepared.find(opened) is not None:
            return opened
    if not job["build"] or not places:
        raise RuntimeError("no bundle has a graph prepared for ONNX Runtime: sessa-deploy build BUNDLE --for ort, or --build")
    from sessa_deploy.export.to_ort import build_ort

    return build_ort(copied(places[-1], Path(job["build"], "ort"))).bundle


def copied(place: str, copy: Path) -> Path:
    """A copy of a bundle without its engines, made where there is none yet."""
    from sessa_deploy.contract import ENGINES_DIR
    from sessa_deploy.runtime.bundle import Bundle, write_bundle

    if not copy.exists():
        source = Bundle.open(place)
        copy.parent.mkdir(parents=True, exist_ok=True)
        files: dict[str, Any] = {name: source.file(name) for name in source.names() if not name.startswith(f"{ENGINES_DIR}/")}
        write_bundle(copy, files, source.config, source.precision, source.versions, source.opset, weights=source.weights)
    return copy


def decode(peer: Peer, point: Point, job: dict[str, Any]) -> np.ndarray:
    """Seconds of each step, after `warmup` seconds that do not count."""
    peer.begin(point.contexts)
    window = min(WINDOW, point.capacity - max(point.contexts))
    times: list[float] = []
    at, taken, warm = 0, 0, time.perf_counter() + job["warmup"]
    while True:
        if at == window:
            peer.rewind()
            at = 0
        start = time.perf_counter()
        peer.step(at == window - 1)
        end = time.perf_counter()
        at, taken = at + 1, taken + 1
        if taken == WARM_STEPS:
            warm = max(warm, end)
        if taken <= WARM_STEPS or start < warm:
            continue
        times.append(end - start)
        spent = end - warm
        if spent >= job["max_seconds"] or (spent >= job["seconds"] and len(times) >= job["steps"]):
            return np.array(times)


def prefill(peer: Peer, point: Point, job: dict[str, Any]) -> np.ndarray:
    """Seconds from prompt to first token, the first prompt not counted. What is asked is there before the clock starts, on the host for every peer."""
    ids = peer.drawn(point.prompt, point.batch)
    peer.prompt(ids)
    times: list[float] = []
    while len(times) < job["prefills"] and (sum(times) < job["max_seconds"] or not times):
        start = time.perf_counter()
        peer.prompt(ids)
        times.append(time.perf_counter() - start)
    return np.array(times)


def measure(peer: Peer, point: Point, job: dict[str, Any], before: int | None) -> dict[str, Any]:
    """The figures of one point."""
    seconds = prefill(peer, point, job) if point.prompt else decode(peer, point, job)
    ms, tokens = 1e3 * seconds, point.batch * (point.prompt or 1)
    mean = (min(WINDOW, point.capacity - max(point.contexts)) - 1) / 2
    now = used_memory()
    return {
        **{f"p{q}_ms": float(np.percentile(ms, q)) for q in (50, 95, 99)}, "min_ms": float(ms.min()), "count": len(ms),
        "tokens_per_second": tokens * len(ms) / float(seconds.sum()),
        "bytes_per_step": None if point.prompt else traffic.step_bytes(peer.config, peer.precision, [n + mean for n in point.contexts], peer.weights),
        # engines and allocators keep what they took, so that what is in use at the end was the peak; the CUDA context is not in it
        "device_bytes": None if now is None or before is None or now < before else now - before,  # less: another process gave memory back
    }


def make(job: dict[str, Any]) -> Peer:
    """The peer that a job names."""
    if job["peer"] in ("trt", "ort", "ort-cuda"):
        return Runtime(job)
    import compare_torch

    return compare_torch.make(job)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="what compare.py wants, JSON")
    parser.add_argument("result", type=Path, help="where the figures go, JSON")
    given = parser.parse_args()
    job, out = json.loads(given.job.read_text()), given.result
    points = [Point(p["name"], p["capacity"], tuple(p["contexts"]), p["prompt"], p["size"]) for p in job["points"]]
    result: dict[str, Any] = {"points": {}, "bandwidth": traffic.copy_bandwidth()}
    before, room = used_memory(), None
    size = points[0].size
    peer: Peer | None = make(job | job["others"].get(size, {}))
    for point in points:
        began = time.perf_counter()
        try:
            if peer is not None and (room != (point.batch, point.capacity) or size != point.size):
                peer.close()
                room = None
                if size != point.size:
                    peer = None  # before there are two models
                gc.collect()
            if peer is None:
                size, peer = point.size, make(job | job["others"].get(point.size, {}))
            if room is None:
                peer.open(point.batch, point.capacity)
                room = (point.batch, point.capacity)
            result["points"][point.name] = measure(peer, point, job, before) | {"wall_s": time.perf_counter() - began}
        except Exception as error:
            traceback.print_exc()
            result["points"][point.name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
            room = None
        result |= {"notes": {} if peer is None else peer.notes(), "environment": environment.describe()}
        write_whole(out, json.dumps(result), what="the result")
    if peer is not None:
        peer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

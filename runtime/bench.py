"""Latency of a session: time to the first token, and between tokens, on the host's clock with append and sampling inside."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.checks import as_number, integer
from sessa_deploy.contract import MODEL_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.runtime import environment, traffic
from sessa_deploy.runtime.generation import Row, Steps, take_all
from sessa_deploy.runtime.lookup import DraftStats
from sessa_deploy.runtime.sampling import Sampler, SamplingParams
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.sizes import weight_sizes

BENCH_SCHEMA = 2
_QUANTILES = (50, 95, 99)
_LOOKUP_WARMUP = 3  # windows, after which every number of rows has been seen and recorded


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. prompt_tokens: context at which decoding starts; window: tokens decoded before it is rewound to there.

    Decoding goes on for at least `seconds` and `steps`, but for no more than max_seconds; warmup seconds come before and do not count.
    bandwidth: bytes a second of the memory that holds weights and caches, for the share of the floor; None leaves it out. seed: of the random prompt.
    """

    prompt_tokens: int = 128
    window: int = 128
    steps: int = 1000
    seconds: float = 3.0
    max_seconds: float = 60.0
    warmup: float = 0.2
    prefills: int = 5
    bandwidth: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("prompt_tokens", 1), ("window", 1), ("steps", 1), ("prefills", 1), ("seed", 0)):
            object.__setattr__(self, name, integer(name, getattr(self, name), low))
        for name in ("seconds", "max_seconds", "warmup"):
            found = as_number(getattr(self, name))
            if found is None or not found >= 0:
                raise UserError(f"{name} is out of range", got=repr(getattr(self, name)), allowed="seconds >= 0")
            object.__setattr__(self, name, found)
        if self.bandwidth is not None:
            found = as_number(self.bandwidth)
            if found is None or not found > 0:
                raise UserError("bandwidth is out of range", got=repr(self.bandwidth), allowed="more than 0")
            object.__setattr__(self, "bandwidth", found)


def measure(
    session: Session, options: BenchOptions, progress: Callable[[float, float], None] | None = None, device_before: int = 0,
    text: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Measure an open session on all of its sequences; the result is plain data, ready for JSON. The session is reset.

    device_before: bytes of the device's memory that were in use before the session was opened; what came on top is the session's. text: tokens whose first
    ones are the prompt, in place of random ones. Of a session with lookup it is also measured what that makes of a window.
    Raises UserError if prompt and window do not fit the capacity, or the text is too short.
    """
    if options.prompt_tokens + options.window > session.capacity:
        raise UserError("the context is full", got=f"a prompt of {options.prompt_tokens} tokens and a window of {options.window}",
                        allowed=f"a capacity of {session.capacity} tokens", fix="raise --capacity or lower --prompt-tokens")
    if text is not None and len(text) < options.prompt_tokens:
        raise UserError("the text is shorter than the prompt", got=f"{len(text)} tokens", allowed=f"at least {options.prompt_tokens}",
                        fix=f"lower --prompt-tokens to {len(text)}" if text else "name a file of text")
    random = np.random.default_rng(options.seed)
    prompts = random.integers(0, session.config.vocab_size, (session.max_batch, options.prompt_tokens)).tolist()
    if text is not None:
        prompts = [list(text[: options.prompt_tokens])] * session.max_batch
    first = _prefills(session, prompts, options)
    times, where = _decode(session, options, progress or (lambda done, total: None))
    total, context = float(times.sum()), options.prompt_tokens + (options.window - 1) / 2
    bundle, read = session.bundle, session.bundle.weights if session.backend.packed_weights else None
    moved = traffic.step_bytes(session.config, bundle.precision, [context] * session.max_batch, read)
    result: dict[str, Any] = {
        "schema_version": BENCH_SCHEMA, "kind": "sessa-deploy bench", "backend": session.backend.name, "looks_ahead": session.backend.looks_ahead,
        "bundle": {"model_sha256": bundle.sha256(MODEL_FILE), "precision": bundle.precision, "config": session.config.to_dict(),
                   "weights": None if bundle.weights is None else bundle.weights.to_dict()},
        "weight_bytes": weight_sizes(session.config, bundle.precision, read).to_dict(),  # as this engine holds them
        "settings": {**asdict(options), "batch": session.max_batch, "capacity": session.capacity, "chunk": session.chunk},
        "ttft_ms": _summary(first), "inter_token_ms": _summary(times), "tokens_per_second": session.max_batch * len(times) / total,
        "prefill_tokens_per_second": session.max_batch * options.prompt_tokens / float(np.median(first)),
        # the floor reads every weight once and every valid cache row once a step
        "bytes_per_step": moved, "achieved_bytes_per_second": moved / float(np.median(times)),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "environment": where,
    }
    if session.lookup:
        result["lookup"] = _lookup(session, prompts[0], options)
    if options.bandwidth is not None:
        result["floor_ms"] = 1e3 * moved / options.bandwidth
        result["share_of_floor"] = result["floor_ms"] / result["inter_token_ms"]["p50"]
    used = session.backend.device_bytes()  # engines keep the memory they took, so that what is in use at the end was the peak
    if used:
        result["device_bytes_before"] = device_before
    if used > device_before:  # else another process gave memory back meanwhile, and nobody knows what this one took
        result["peak_device_bytes"] = used - device_before
    return result


def _prefills(session: Session, prompts: list[list[int]], options: BenchOptions) -> NDArray[np.float64]:
    """Seconds from a prompt to its first token; the first of them warms up and does not count. Leaves the prompts in the caches."""
    times = []
    for _ in range(options.prefills + 1):
        session.reset()
        start = time.perf_counter()
        np.argmax(session.prefill(prompts), axis=-1)
        times.append(time.perf_counter() - start)
    return np.array(times[1:])


def _decode(session: Session, options: BenchOptions, progress: Callable[[float, float], None]) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Seconds from token to token as a session draws them, text included; and what the machine is, its clocks read while steps still run."""
    backend, steps = session.backend, Steps(session.backend)
    rows: list[Row] = []
    times: list[float] = []

    def step() -> tuple[float, float]:
        nonlocal rows
        if not rows:
            tokenizer = session.tokenizer if session.has_tokenizer else None
            for row in range(session.max_batch):
                backend.rewind(row, options.prompt_tokens)
            rows = [Row(row, [0], Sampler(SamplingParams(), session.config.vocab_size), tokenizer, limit=options.window) for row in range(session.max_batch)]
        start = time.perf_counter()
        rows, found = steps(rows)
        rows = [row for row, one in zip(rows, take_all(rows, found), strict=True) if one.finish is None]
        return start, time.perf_counter()

    warm = time.perf_counter() + options.warmup
    while True:
        start, end = step()
        if start < warm:
            continue
        times.append(end - start)
        spent = end - warm
        share = min(spent / options.seconds if options.seconds else 1.0, len(times) / options.steps)
        share = max(share, spent / options.max_seconds if options.max_seconds else 1.0)
        progress(min(share, 1.0), 1.0)
        if share >= 1.0:
            break
    where: dict[str, Any] = {}
    look = threading.Thread(target=lambda: where.update(environment.describe()))
    look.start()
    while look.is_alive() and backend.device_bytes():  # on a CPU steps would only be in the way
        step()
    look.join()
    session.reset()
    return np.array(times), where


def _lookup(session: Session, prompt: list[int], options: BenchOptions) -> dict[str, Any]:
    """A window of greedy text with and without drafts, in turn, so that other load hits both alike: tokens a second of each, and what drafts brought."""
    most = session.lookup
    seconds: dict[bool, list[float]] = {True: [], False: []}
    stats, tokens = DraftStats(), 0
    begun = time.perf_counter()
    while True:
        for drafted in (True, False) if len(seconds[True]) % 2 else (False, True):
            session.reset()
            session.lookup = most if drafted else 0
            try:
                stream = session.stream([prompt], options.window + 1, stop_tokens=())
                next(stream)  # the prompt's
                start = time.perf_counter()
                count = sum(1 for _ in stream)
                seconds[drafted].append(time.perf_counter() - start)
            finally:
                session.lookup = most
            if drafted and len(seconds[True]) > _LOOKUP_WARMUP:
                stats, tokens = stats + session.drafts, tokens + count
        spent = time.perf_counter() - begun
        if len(seconds[True]) > _LOOKUP_WARMUP and (spent >= options.seconds or spent >= options.max_seconds):
            break
    session.reset()
    with_drafts, plain = (sum(seconds[drafted][_LOOKUP_WARMUP:]) for drafted in (True, False))
    return {"most": most, **stats.to_dict(), "tokens_per_second": tokens / with_drafts, "plain_tokens_per_second": tokens / plain,
            "ratio": plain / with_drafts}


def _summary(seconds: NDArray[np.float64]) -> dict[str, float]:
    ms = 1e3 * seconds
    return {**{f"p{q}": float(np.percentile(ms, q)) for q in _QUANTILES}, "mean": float(ms.mean()), "min": float(ms.min()), "max": float(ms.max()),
            "count": len(ms)}

"""Many requests on one engine, against what the engine can do alone. Needs no torch.

    python benchmarks/serve_bench.py server BUNDLE [--backend ort] [--slots 8]     the HTTP server beside Session and `run`, on a CPU
    python benchmarks/serve_bench.py curve BUNDLE --backend trt --slots 32         the batcher in this process, on a GPU

server: random prompts of 64 tokens, 256 new ones each, stop tokens ignored; `slots` streams against a Session with a full batch, one stream against a
Session of one, as `run` has it. Both sides take turns; the ratio is the median over rounds of the ratio within a round.
curve: prompts of 512, 128 new tokens. Saturated throughput against slots * new / (slots * t_prefill + new * t_step), timed in the same process; Poisson
arrivals; what a prompt of 4096 does to running streams; and requests of every kind whose tokens must be those of their solo runs.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import platform
import re
import selectors
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import greedy_step

from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.engines import open_slots
from sessa_deploy.runtime.requests import Event, Request
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.session import Session

GREEDY = SamplingParams()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["server", "curve"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto", choices=["auto", "ort", "ort-cuda", "trt"])
    parser.add_argument("--slots", type=int, help="default: 8, or 32 for the curve")
    parser.add_argument("--capacity", type=int, help="tokens of a slot; default: the model's max_context, for the curve at most --long and 256")
    parser.add_argument("--prompt-tokens", type=int, help="default: 64, or 512 for the curve")
    parser.add_argument("--new-tokens", type=int, help="default: 256, or 128 for the curve")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU backend")
    parser.add_argument("--long", type=int, default=4096, help="tokens of the prompt that comes among running streams")
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals at each rate")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.25, 0.5, 0.75, 0.9], help="shares of the saturated throughput")
    parser.add_argument("--requests", type=int, default=200, help="whose tokens are compared with their solo runs; 0 leaves that out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    curve = args.what == "curve"
    args.slots = args.slots or (32 if curve else 8)
    args.prompt_tokens = args.prompt_tokens or (512 if curve else 64)
    args.new_tokens = args.new_tokens or (128 if curve else 256)
    if curve and args.capacity is None:
        args.capacity = min(bundle.config.max_context, args.long + 256)
    found = measure_curve(bundle, args) if curve else measure_server(bundle, args)
    found |= {"machine": platform.platform(), "python": platform.python_version(), "numpy": np.__version__}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found.get("different", 0) == 0 else 1


def prompts_of(bundle: Bundle, random: np.random.Generator, count: int, length: int) -> list[list[int]]:
    """`count` random prompts, no two alike in their first token where the vocabulary allows: nothing of one can serve another."""
    firsts = random.permutation(bundle.config.vocab_size)[:count]
    return [[int(firsts[i % len(firsts)]), *random.integers(0, bundle.config.vocab_size, length - 1).tolist()] for i in range(count)]


# The server on a CPU


def measure_server(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the HTTP server and of sessions, in turn."""
    random = np.random.default_rng(0)
    one = Session(bundle, args.backend, 1, args.capacity, threads=args.threads)
    full = Session(bundle, args.backend, args.slots, args.capacity, threads=args.threads)
    rows: dict[str, list[tuple[float, float]]] = {"1": [], str(args.slots): []}
    with served(bundle, args) as (port, seconds):
        for turn in range(args.rounds + 1):  # the first is not counted
            for streams, session in ((1, one), (args.slots, full)):
                prompts = prompts_of(bundle, random, streams, args.prompt_tokens)
                sides = [lambda p=prompts: by_http(port, p, args.new_tokens), lambda p=prompts, s=session: by_session(s, p, args.new_tokens)]
                speeds = {i: side() for i, side in (list(enumerate(sides)) if turn % 2 else list(enumerate(sides))[::-1])}
                if turn:
                    rows[str(streams)].append((speeds[0], speeds[1]))
    one.close()
    full.close()
    print(f"{full.backend.name}, prompts of {args.prompt_tokens}, {args.new_tokens} new tokens, median of {args.rounds}; ready after {seconds:.2f} s")
    print(f"{'streams':>8} {'server':>12} {'session':>12} {'ratio':>7}   (tokens/s, first token included)")
    found: dict[str, Any] = {"ready_seconds": seconds}
    for streams, pairs in rows.items():
        server, session = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        found[f"streams_{streams}"] = {"server": server, "session": session, "ratio": ratio}
        print(f"{streams:>8} {server:>12.0f} {session:>12.0f} {ratio:>7.2f}   {'reached' if ratio >= 0.85 else 'NOT reached'}: 0.85")
    return found


@contextlib.contextmanager
def served(bundle: Bundle, args: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """(port, seconds until ready) of a server in a process of its own."""
    command = [sys.executable, "-m", "sessa_deploy", "serve", str(bundle.path), "--port", "0", "--backend", args.backend, "--slots", str(args.slots)]
    for name in ("capacity", "threads"):
        command += [f"--{name}", str(getattr(args, name))] if getattr(args, name) is not None else []
    begun = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = 0
    for line in process.stderr:
        port = int(found.group(1)) if (found := re.search(r"http://[^ ]*:(\d+)", line)) else port
        if line.startswith("serving ") and port:
            break
    else:
        raise SystemExit("the server did not start")
    seconds = time.perf_counter() - begun
    reader = threading.Thread(target=process.stderr.read, daemon=True)
    reader.start()
    try:
        yield port, seconds
    finally:
        process.terminate()
        process.wait(30)


def by_http(port: int, prompts: Sequence[list[int]], new: int) -> float:
    """Tokens a second of streams that begin together, one a prompt."""
    wait, counts, open_ = selectors.DefaultSelector(), 0, 0
    begun = time.perf_counter()
    for prompt in prompts:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        wait.register(connection.sock, selectors.EVENT_READ, (connection, bytearray()))
        open_ += 1
    while open_:
        for key, _ in wait.select():
            connection, held = key.data
            data = connection.sock.recv(1 << 16)
            held += data
            if not data or b"data: [DONE]" in held[-64 - len(data) :]:
                usage = re.findall(rb'"completion_tokens": ?(\d+)', bytes(held))
                if not usage:
                    raise SystemExit(f"a stream broke: {bytes(held[:400])!r}")
                counts += int(usage[-1])
                wait.unregister(key.fileobj)
                connection.close()
                open_ -= 1
    seconds = time.perf_counter() - begun
    if counts != new * len(prompts):
        raise SystemExit(f"{counts} tokens came, {new * len(prompts)} were asked for")
    return counts / seconds


def by_session(session: Session, prompts: Sequence[list[int]], new: int) -> float:
    """Tokens a second of a session whose whole batch generates together."""
    session.reset()
    begun = time.perf_counter()
    answers = session.generate(list(prompts), new, GREEDY, [])
    seconds = time.perf_counter() - begun
    assert all(len(answer.tokens) == new for answer in answers)
    return new * len(prompts) / seconds


# The batcher on a GPU


class Told:
    """One request's tokens and when they came."""

    def __init__(self, request: Request) -> None:
        self.request, self.tokens, self.times = request, [], []  # type: tuple[Request, list[int], list[float]]
        self.begun, self.finish = time.perf_counter(), ""
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        if event.token is not None:
            self.tokens.append(event.token)
            self.times.append(time.perf_counter())
        if event.finish is not None:
            self.finish = event.finish
            self.over.set()

    def gaps(self) -> list[float]:
        return np.diff(self.times).tolist()


def measure_curve(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """Saturation, arrivals, the long prompt and the comparison with solo runs."""
    random, new, length = np.random.default_rng(0), args.new_tokens, args.prompt_tokens
    backend = open_slots(bundle, args.backend, args.slots, args.capacity, args.threads)
    batcher = Batcher(backend, queue=10**6, queue_timeout=None, prefix_reuse=False)
    slots, chunk = backend.batch, batcher.chunk
    print(f"{backend.name}, {bundle.precision}, {slots} slots of {backend.capacity} tokens, chunk {chunk}; prompts of {length}, {new} new tokens", flush=True)
    prefill, step = statistics.median(map(sum, time_chunks(backend, random, length, chunk, 9)[2:])), time_step(backend, random, length + new // 2)
    slowest = max(time_chunks(backend, random, args.long, chunk, 3)[-1]) if args.long + 1 <= backend.capacity else 0.0
    ideal = slots * new / (slots * prefill + new * step)
    found: dict[str, Any] = {"backend": backend.name, "chunk": chunk, "prefill_ms": 1e3 * prefill, "step_ms": 1e3 * step, "ideal": ideal}
    print(f"alone: prefill({length}) {1e3 * prefill:.2f} ms, step({slots} rows) {1e3 * step:.2f} ms: {ideal:.0f} tokens/s at best", flush=True)

    def request(prompt: list[int], count: int = new) -> Request:
        return Request(tuple(prompt), GREEDY, count, ignore_eos=True)

    batcher.start()
    run_all(batcher, [request(p) for p in prompts_of(bundle, random, slots, length)])  # warm
    told = run_all(batcher, [request(p) for p in prompts_of(bundle, random, 5 * slots, length)])
    speed = steady(told, slots)
    found |= {"saturated": speed, "share": speed / ideal}
    print(f"saturated: {speed:.0f} tokens/s, {speed / ideal:.2f} of it   {'reached' if speed >= 0.8 * ideal else 'NOT reached'}: 0.80", flush=True)
    print(f"{'rate/s':>8} {'share':>6} {'tokens/s':>9} {'p50 gap':>9} {'p99 gap':>9} {'p50 first':>10} {'p99 first':>10}   (ms)")
    found["curve"] = []
    for share in args.rates:
        rate = share * speed / new
        told = arrive(batcher, [request(p) for p in prompts_of(bundle, random, max(8, int(rate * args.seconds)), length)], rate, random)
        gaps, first = [g for one in told for g in one.gaps()], [one.times[0] - one.begun for one in told]
        lasted = max(one.times[-1] for one in told) - told[0].begun
        row = {"rate": rate, "share": share, "tokens_s": new * len(told) / lasted,
               **{f"{name}_{q}_ms": 1e3 * float(np.percentile(values, q)) for name, values in (("gap", gaps), ("first", first)) for q in (50, 99)}}
        found["curve"].append(row)
        print(f"{rate:>8.1f} {share:>6.2f} {row['tokens_s']:>9.0f} {row['gap_50_ms']:>9.2f} {row['gap_99_ms']:>9.2f} {row['first_50_ms']:>10.1f} "
              f"{row['first_99_ms']:>10.1f}", flush=True)
    if args.long + 1 <= backend.capacity:
        found["long"] = long_prompt(batcher, bundle, random, args, request, slowest, step)
    batcher.drain(60)
    batcher.close()
    if args.requests:
        found["different"], found["compared"] = compare(backend, bundle, random, args.requests)
    backend.close()
    return found


def time_chunks(backend: Backend, random: np.random.Generator, length: int, chunk: int, rounds: int) -> list[list[float]]:
    """Seconds of each chunk of one prompt, read alone, for each round; the first rounds warm up."""
    found = []
    for _ in range(rounds):
        backend.reset()
        ids = random.integers(0, backend.config.vocab_size, length)
        found.append([])
        for at in range(0, length, chunk):
            begun = time.perf_counter()
            backend.step_row(0, ids[at : at + chunk])
            found[-1].append(time.perf_counter() - begun)
    return found


def time_step(backend: Backend, random: np.random.Generator, length: int, rounds: int = 40) -> float:
    """Seconds of a decode step of all rows, each with about `length` tokens; median, the first eight not counted."""
    backend.reset()
    for row in range(backend.batch):
        for at in range(0, length, backend.best_chunk):
            backend.step_row(row, random.integers(0, backend.config.vocab_size, min(backend.best_chunk, length - at)))
    ids, new, times = np.zeros((backend.batch, 1), np.int64), np.ones(backend.batch, np.int32), []
    for _ in range(rounds + 8):
        begun = time.perf_counter()
        ids[:, 0] = greedy_step(backend, ids, new)
        times.append(time.perf_counter() - begun)
    backend.reset()
    return statistics.median(times[8:])


def run_all(batcher: Batcher, requests: Sequence[Request]) -> list[Told]:
    """Submit all at once and wait for their ends."""
    told = [Told(request) for request in requests]
    for one in told:
        batcher.submit(one.request, one)
    for one in told:
        one.over.wait()
        assert one.finish == "length", one.finish
    return told


def steady(told: Sequence[Told], slots: int) -> float:
    """Tokens a second while every slot was taken: from the end of the first `slots` requests' work to the last one's first token."""
    ends = sorted(one.times[-1] for one in told)
    begin, end = ends[slots - 1], max(one.times[0] for one in told)
    return sum(begin < at <= end for one in told for at in one.times) / (end - begin)


def arrive(batcher: Batcher, requests: Sequence[Request], rate: float, random: np.random.Generator) -> list[Told]:
    """Submit at random times, `rate` a second on average, and wait for their ends."""
    told = []
    due = time.perf_counter()
    for request in requests:
        due += random.exponential(1 / rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        told.append(Told(request))
        batcher.submit(request, told[-1])
    for one in told:
        one.over.wait()
    return told


def long_prompt(batcher: Batcher, bundle: Bundle, random: np.random.Generator, args: argparse.Namespace, request: Callable[..., Request],
                slowest: float, step: float) -> dict[str, Any]:
    """What a long prompt does to the streams that run when it comes. slowest: seconds of its slowest chunk alone; step: of a decode step."""
    chunks = -(-args.long // batcher.chunk)
    count = min(max(args.new_tokens, 3 * chunks + 64), batcher.backend.capacity - args.prompt_tokens)
    running = [Told(request(p, count)) for p in prompts_of(bundle, random, batcher.backend.batch - 1, args.prompt_tokens)]
    for one in running:
        batcher.submit(one.request, one)
    while not all(one.times for one in running):
        time.sleep(0.001)
    long = Told(request(prompts_of(bundle, random, 1, args.long)[0], 1))
    batcher.submit(long.request, long)
    for one in (long, *running):
        one.over.wait()
    during = [b - a for one in running for a, b in zip(one.times, one.times[1:], strict=False) if b > long.begun and a < long.times[0]]
    added = max(during) - step
    reached = "reached" if added <= 1.1 * slowest else "NOT reached"
    median, longest = 1e3 * statistics.median(during), 1e3 * max(during)
    print(f"a prompt of {args.long} among {len(running)} streams, {chunks} chunks of {batcher.chunk}: gaps of {median:.1f} ms (median), "
          f"{longest:.1f} ms (longest)\n  a step takes {1e3 * step:.1f} ms, its slowest chunk alone {1e3 * slowest:.1f} ms: "
          f"added {added / slowest:.2f} chunks   {reached}: one chunk", flush=True)
    return {"chunk": batcher.chunk, "slowest_chunk_ms": 1e3 * slowest, "step_ms": 1e3 * step, "longest_gap_ms": longest}


def compare(backend: Backend, bundle: Bundle, random: np.random.Generator, count: int) -> tuple[int, int]:
    """(requests whose tokens differ from their solo runs', requests compared): lengths, sampling and arrivals at random, a fifth cancelled."""
    vocabulary, most = bundle.config.vocab_size, min(700, backend.capacity - 64)
    requests = [Request(tuple(random.integers(0, vocabulary, int(random.integers(1, most))).tolist()),
                        SamplingParams(temperature=float(random.choice([0.0, 0.7, 1.3])), top_k=int(random.choice([0, 20])), seed=int(random.integers(2**31))),
                        int(random.integers(1, 64)), ignore_eos=True, choice=int(random.integers(3))) for _ in range(count)]
    batcher = Batcher(backend, queue=10**6, queue_timeout=None, prefix_reuse=False)
    batcher.start()
    told, begun = [], time.perf_counter()
    for i, request in enumerate(requests):
        told.append(Told(request))
        handle = batcher.submit(request, told[-1])
        if random.random() < 0.2:
            threading.Timer(float(random.random()) * 0.3, handle.cancel).start()
        if i % 8 == 0:
            time.sleep(float(random.random()) * 0.05)
    for one in told:
        one.over.wait()
    busy, different = time.perf_counter() - begun, 0
    for one in told:
        solo = Told(one.request)
        batcher.submit(one.request, solo)
        solo.over.wait()
        different += solo.tokens[: len(one.tokens)] != one.tokens or (one.finish != "cancelled" and one.finish != solo.finish)
    batcher.close()
    print(f"{count} requests together ({busy:.1f} s) and each alone ({time.perf_counter() - begun - busy:.1f} s): {different} differ "
          f"({sum(one.finish == 'cancelled' for one in told)} were cancelled)", flush=True)
    return different, count


if __name__ == "__main__":
    sys.exit(main())

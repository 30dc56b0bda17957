"""Many requests on one engine against the same requests alone: the tokens, and how much longer they take one after the other.

    python benchmarks/batcher_check.py BUNDLE --backend trt --slots 32 [--requests 200] [--capacity 512] [--chunk N] [--out FILE]

Requests come at random turns, a few are cancelled; a third draw with a seed. They run twice: once with prompts that share nothing, whose tokens must be those
of the same request alone (same backend, slots, capacity, chunk), and once as conversations of several turns, whose prompts take over rows that other kernels
wrote when they were answers. There a greedy text may leave its own at a step whose two best logits are closer than ten times the error of the logits that the
run itself shows; such texts are counted, and at most 1% may be such. Exit code 1 where a text differs otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sessa_deploy.files import write_whole
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.engines import open_backend
from sessa_deploy.runtime.requests import Event, Request
from sessa_deploy.runtime.sampling import SamplingParams

NEW, TURNS, MOST_DIFFERING = 40, 3, 0.01
GAP_FACTOR = 10  # design: a step whose two best logits are closer than this many times the logits' error may go either way


@dataclass
class Text:
    """A request and the events that it got; at, cancel: turns before it comes, and of its life (None: it is not cancelled)."""

    request: Request
    at: int = 0
    cancel: int | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]


def play(batcher: Batcher, texts: list[Text]) -> float:
    """Run texts to their end; seconds."""
    handles: dict[int, Any] = {}
    start, turn, left = time.perf_counter(), 0, True
    while left or len(handles) < len(texts):
        for number, text in enumerate(texts):
            if number not in handles and text.at <= turn:
                handles[number] = batcher.submit(text.request, text.events.append)
            elif number in handles and text.cancel is not None and text.at + text.cancel == turn:
                handles[number].cancel()
        left, turn = batcher.turn(), turn + 1
    return time.perf_counter() - start


def difference(together: Text, alone: Text) -> dict[str, Any] | None:
    """Where a text leaves what it is alone, with the gap of the two best log probabilities there; None where it does not."""
    mine, theirs = together.tokens, alone.tokens
    if together.events[-1].finish == "cancelled":
        theirs = theirs[: len(mine)]
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    if at is None:
        return None if len(mine) == len(theirs) else {"at": min(len(mine), len(theirs)), "gap": None}
    best = alone.events[at].top
    return {"at": at, "gap": best[0][1] - best[1][1], "sampled": together.request.sampling.temperature > 0}


def logit_error(pairs: list[tuple[Text, Text]]) -> float:
    """The largest difference of a log probability as long as two texts are the same."""
    worst = 0.0
    for one, other in pairs:
        for a, b in zip(one.events, other.events, strict=False):
            if a.token != b.token or a.logprob is None or b.logprob is None:
                break
            worst = max(worst, abs(a.logprob - b.logprob))
    return worst


def compare(name: str, texts: list[Text], batcher: Batcher, together: float, reuse: bool, solo: Batcher) -> tuple[list[str], dict[str, Any]]:
    """Texts that were played together in so many seconds, against each alone; (what is wrong, figures)."""
    stats, singles, alone = batcher.stats(), [], 0.0
    for text in texts:
        singles.append(Text(text.request))
        alone += play(solo, singles[-1:])
    error = logit_error(list(zip(texts, singles, strict=True)))
    found = [d for pair in zip(texts, singles, strict=True) if (d := difference(*pair)) is not None]
    close = [d for d in found if reuse and d["gap"] is not None and (d["sampled"] or d["gap"] < GAP_FACTOR * max(error, 1e-6))]
    wrong = [f"{name}: a text differs at token {d['at']}, gap {d['gap']}" for d in found if d not in close]
    if len(close) > MOST_DIFFERING * len(texts):
        wrong.append(f"{name}: {len(close)} of {len(texts)} texts differ where two logits are close")
    failed = [t.events[-1].error for t in texts if t.events[-1].finish == "error"]
    wrong += [f"{name}: a request failed: {reason}" for reason in failed[:3]]
    tokens = sum(len(t.tokens) for t in texts)
    return wrong, {
        "texts": len(texts), "differ_where_close": len(close), "wrong": len(found) - len(close), "cancelled": stats.finished["cancelled"],
        "logit_error": error, "tokens": tokens, "prompt_tokens": stats.prompt_tokens, "cached_tokens": stats.cached_tokens, "prefix_hits": stats.prefix_hits,
        "prefix_copies": stats.prefix_copies, "together_tokens_per_second": tokens / together,
        "alone_tokens_per_second": sum(len(t.tokens) for t in singles) / alone,
    }


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    bundle = Bundle.open(given.bundle)
    backend = open_backend(bundle, given.backend, given.slots, given.capacity)
    rng = np.random.default_rng(given.seed)

    def make(reuse: bool) -> Batcher:
        return Batcher(backend, None, given.chunk, queue=given.requests, queue_timeout=None, eos=(), prefix_reuse=reuse)

    def request(prompt: list[int]) -> Request:
        params = SamplingParams(1.0, seed=int(rng.integers(1000))) if rng.random() < 1 / 3 else SamplingParams()
        return Request(tuple(prompt), params, NEW, logprobs=2)

    def fresh(most: int) -> list[int]:
        found: list[int] = rng.integers(0, backend.config.vocab_size, int(rng.integers(1, most + 1))).tolist()
        return found

    report: dict[str, Any]
    wrong: list[str]
    room = backend.capacity - NEW
    apart = [Text(request(fresh(room)), int(rng.integers(4 * given.requests)), int(rng.integers(NEW)) if rng.random() < 0.1 else None)
             for _ in range(given.requests)]
    batcher = make(False)
    seconds = play(batcher, apart)
    wrong, report = [], {"bundle": given.bundle, "backend": backend.name, "slots": backend.batch, "capacity": backend.capacity, "chunk": batcher.chunk}
    faults, report["apart"] = compare("apart", apart, batcher, seconds, False, make(False))
    wrong += faults
    # Each turn of a conversation goes on from the answer before, which is known once it was played.
    piece, batcher, seconds, talked = room // (2 * TURNS), make(True), 0.0, []
    talks = [fresh(piece) for _ in range(max(1, min(backend.batch, given.requests // TURNS)))]
    for _ in range(TURNS):
        texts = [Text(request(talk[:room]), int(rng.integers(given.slots))) for talk in talks]
        seconds += play(batcher, texts)
        talked += texts
        talks = [[*talk, *text.tokens, *fresh(piece)] for talk, text in zip(talks, texts, strict=True)]
    faults, report["conversations"] = compare("conversations", talked, batcher, seconds, True, make(False))
    wrong += faults
    backend.close()
    for name, row in report.items():
        print(name, row if not isinstance(row, dict) else json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}))
    ratio = report["apart"]["together_tokens_per_second"] / report["apart"]["alone_tokens_per_second"]
    print(f"together / one after the other: {ratio:.2f} x the tokens a second")
    for line in wrong[:10]:
        print(f"WRONG {line}")
    if given.out:
        write_whole(given.out, (json.dumps(report, indent=2) + "\n").encode())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

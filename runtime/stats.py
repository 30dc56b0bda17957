"""What a batcher counts: plain numbers for a metrics page."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Histogram:
    """How many values fell at or below each of `bounds` and above the one before; the last of counts: above all. total: their sum, in seconds."""

    bounds: tuple[float, ...] = _SECONDS
    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass
class Stats:
    """Counters since the start, and how things stand.

    accepted, rejected (the queue was full), expired (waited too long); finished: by why ("stop", "length", "context", "cancelled", "error").
    prompt_tokens: of requests that were begun, of which cached_tokens were not computed again; prefix_hits: requests of which that is true;
    prefix_copies: copies from slot to slot for it; new_tokens: drawn. chunks, steps: of prompts and decode steps that came through; failures: those that
    did not; failures_in_row: since the last that did. first_token: seconds from submission; between_tokens; waiting: in the queue.
    slots, queued, reading (prompts), running (drawing), resting (slots that keep a conversation), ready: now.
    """

    accepted: int = 0
    rejected: int = 0
    expired: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "context", "cancelled", "error"), 0))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefix_hits: int = 0
    prefix_copies: int = 0
    new_tokens: int = 0
    chunks: int = 0
    steps: int = 0
    failures: int = 0
    failures_in_row: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    waiting: Histogram = field(default_factory=Histogram)
    slots: int = 0
    queued: int = 0
    reading: int = 0
    running: int = 0
    resting: int = 0
    ready: bool = False

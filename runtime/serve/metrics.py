"""What Prometheus scrapes at /metrics: answers by path and status, and the batcher's own counters at the moment of the scrape. Times in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from sessa_deploy.runtime.batcher import Batcher
    from sessa_deploy.runtime.stats import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# name -> (what it is, the field of the batcher's Stats)
_COUNTERS = {
    "sessa_requests_accepted": ("Requests that were taken on: one a prompt and choice.", "accepted"),
    "sessa_requests_rejected": ("Requests turned away since the queue was full.", "rejected"),
    "sessa_requests_expired": ("Requests that waited for a slot too long.", "expired"),
    "sessa_prompt_tokens": ("Tokens of prompts that were begun.", "prompt_tokens"),
    "sessa_generated_tokens": ("Tokens generated.", "new_tokens"),
    "sessa_prefix_hits": ("Requests whose prompt began like a conversation that was still there.", "prefix_hits"),
    "sessa_prefix_tokens": ("Tokens of prompts that were therefore not computed again.", "cached_tokens"),
    "sessa_prefix_copies": ("Copies between slots on the device for it.", "prefix_copies"),
    "sessa_prefill_chunks": ("Chunks of prompts computed.", "chunks"),
    "sessa_decode_steps": ("Decode steps of all running requests.", "steps"),
    "sessa_errors": ("Steps that failed.", "failures"),
}
_GAUGES = {
    "sessa_slots": ("Requests that can run at once.", "slots"),
    "sessa_requests_waiting": ("Requests in the queue.", "queued"),
    "sessa_requests_reading": ("Requests whose prompt is being read.", "reading"),
    "sessa_requests_running": ("Requests that generate.", "running"),
    "sessa_ready": ("Whether the engine is well: 1, or 0 after failures in a row and while it drains.", "ready"),
}
_HISTOGRAMS = {
    "sessa_time_to_first_token_seconds": ("From a request's arrival to its first token.", "first_token"),
    "sessa_time_between_tokens_seconds": ("From one token of a request to its next.", "between_tokens"),
    "sessa_queue_seconds": ("From a request's arrival to its slot.", "waiting"),
}


class Metrics:
    """Figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.http = Counter("sessa_http_requests", "Answers by path and status.", ("path", "status"), registry=self.registry)

    def watch(self, batcher: Batcher) -> None:
        """Show a batcher's counters too."""
        self.registry.register(_Watch(batcher))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class _Watch:
    """A batcher's counters, read when they are asked for."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def collect(self) -> Iterator[Any]:
        """prometheus_client's way to ask."""
        stats = self._batcher.stats()
        for name, (what, field) in _COUNTERS.items():
            yield CounterMetricFamily(name, what, value=getattr(stats, field))
        for name, (what, field) in _GAUGES.items():
            yield GaugeMetricFamily(name, what, value=float(getattr(stats, field)))
        ended = CounterMetricFamily("sessa_requests_ended", "Requests by how they ended.", labels=("finish",))
        for finish, count in stats.finished.items():
            ended.add_metric((finish,), count)
        yield ended
        yield CounterMetricFamily("sessa_cancels", "Requests that were cancelled: their client went away, or the server ended.",
                                  value=stats.finished["cancelled"])
        yield GaugeMetricFamily("sessa_slots_busy", "Slots that read a prompt or generate.", value=stats.reading + stats.running)
        for name, (what, field) in _HISTOGRAMS.items():
            yield _histogram(name, what, getattr(stats, field))


def _histogram(name: str, what: str, values: Histogram) -> HistogramMetricFamily:
    buckets, below = [], 0
    for bound, count in zip((*values.bounds, float("inf")), values.counts, strict=True):
        below += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), below))
    return HistogramMetricFamily(name, what, buckets=buckets, sum_value=values.total)

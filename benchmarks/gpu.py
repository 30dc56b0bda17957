"""What the benchmarks on a GPU share: timing by CUDA events, capturing, replaying, peak memory, and the bandwidth of a copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

Calls = Sequence[Callable[[], object]]


def event_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Device milliseconds of each of `repeats` calls, the next one begun when the one before is over."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def capture(calls: Calls, warm: Calls | None = None) -> torch.cuda.CUDAGraph:
    """A graph of all calls, which, or `warm` in their place, have run once before on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls if warm is None else warm:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def graph_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Median milliseconds of a replay, the first two not counted."""
    return statistics.median(event_ms(graph.replay, repeats)[2:])


def replay_ms(calls: Calls, repeats: int = 15) -> float:
    """Median milliseconds of one call, from replays of a graph that holds all of them."""
    return graph_ms(capture(calls), repeats) / len(calls)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy of 2 GiB, bytes read plus bytes written, outside any graph."""
    x = torch.empty(2**29, device="cuda").normal_()
    y = torch.empty_like(x)
    return 2 * x.numel() * x.itemsize / statistics.median(event_ms(lambda: y.copy_(x), 12)[2:]) / 1e6


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak device memory during a call above what was allocated before it, outputs included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

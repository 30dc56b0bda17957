"""Work that is replayed where it comes again: when it is captured, and what makes room."""

from __future__ import annotations

import functools
import gc
import itertools
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sessa_deploy.kernels import replay
from sessa_deploy.train_graph import Graphed


class Graph:
    """A CUDA graph whose capture runs nothing, and whose replay says so."""

    current: Any = None
    refuses = False
    begun = 0

    def __init__(self) -> None:
        self.replays = 0
        self.lacks_memory = False

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local" and pool == "pool"
        Graph.current = self
        Graph.begun += 1

    def capture_end(self) -> None:
        Graph.current = None
        if Graph.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self) -> None:
        assert Graph.current is None
        if self.lacks_memory:
            raise RuntimeError("out of memory")
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The GPU as `Replays` sees it: `capturing` is whether somebody captures the current stream, `ended` what was allocated to no longer."""
    seen = SimpleNamespace(capturing=False, streams=itertools.count(100), ended=[])
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: seen.ended.append((device, pool)), raising=False)
    monkeypatch.setattr(Graph, "refuses", False)
    monkeypatch.setattr(replay, "new_stream", lambda: next(seen.streams))
    for name, value in {"CUDAGraph": Graph, "graph_pool_handle": lambda: "pool", "stream": lambda s: nullcontext(),
                        "ExternalStream": lambda number, device: SimpleNamespace(cuda_stream=number, device_index=device.index)}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: seen.capturing, raising=False)
    return seen


def test_what_comes_again_is_captured_and_replayed(graphs: SimpleNamespace) -> None:
    kept, ran = replay.Replays(torch.device("cuda", 0)), list[str]()
    for _ in range(replay.SEEN):
        kept.run(("a", 1), lambda: ran.append("a"))
        kept.run(("b", len(ran)), lambda: ran.append("b"))  # never the same again
    assert ran == ["a", "b"] * replay.SEEN and not kept._graphs
    for _ in range(4):
        kept.run(("a", 1), lambda: ran.append("captured"))
    assert ran[2 * replay.SEEN :] == ["captured"] and [g.replays for g in kept._graphs.values()] == [4]
    graphs.capturing = True  # a graph of somebody else's: what it holds is queued into it
    kept.run(("a", 1), lambda: ran.append("theirs"))
    assert ran[-1] == "theirs" and kept._graphs["a", 1].replays == 4


def test_what_cannot_be_captured_is_queued_as_ever(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, ran = replay.Replays(torch.device("cuda", 0)), list[int]()
    monkeypatch.setattr(Graph, "refuses", True)
    for i in range(replay.SEEN + 3):
        kept.run("a", functools.partial(ran.append, i))
    # the one that was tried ran twice: in the capture, which does nothing on a GPU, and behind it
    seen = replay.SEEN
    assert ran == [*range(seen + 1), seen, seen + 1, seen + 2] and not kept._graphs
    monkeypatch.setattr(Graph, "refuses", False)
    monkeypatch.setenv("SESSA_REPLAY", "0")
    off = replay.Replays(torch.device("cuda", 0))
    for _ in range(9):
        off.run("a", lambda: ran.append(9))
    assert ran[-9:] == [9] * 9 and not off._graphs


def test_a_capture_that_fails_is_over(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's allocator is told so where the end of the capture fails, and an interrupt is the user's."""
    kept = replay.Replays(torch.device("cuda", 0))
    for _ in range(replay.SEEN):
        kept.run("a", lambda: None)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.run("a", interrupted)
    assert Graph.current is None and not graphs.ended and kept._on
    monkeypatch.setattr(Graph, "refuses", True)
    Graph.begun = 0
    with pytest.raises(KeyboardInterrupt):
        kept.run("a", interrupted)
    assert graphs.ended == [(0, "pool")] and Graph.begun == 2, "a capture of nothing, for PyTorch's generator"
    kept.run("a", lambda: None)
    assert len(graphs.ended) == 2 and not kept._graphs


@pytest.mark.parametrize("fails", ["work", "end", "replay"])
def test_what_failed_holds_no_memory_and_hides_no_error(fails: str, graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most captures that fail lack memory: nothing of them may stay until Python looks for circles."""
    kept, seen = replay.Replays(torch.device("cuda", 0)), list[Any]()
    for _ in range(replay.SEEN + (fails == "replay")):
        kept.run("a", lambda: None)

    def work() -> None:
        seen.append(weakref.ref(y := torch.zeros(1)))
        if fails == "work" and Graph.current is not None:
            raise torch.OutOfMemoryError("in the graph")
        if Graph.current is None:
            raise ValueError(f"the user's own {y.numel()}")

    monkeypatch.setattr(Graph, "refuses", fails == "end")
    for graph in kept._graphs.values():
        graph.lacks_memory = True
    gc.disable()
    try:
        with pytest.raises(ValueError, match="the user's own") as raised:
            kept.run("a", work)
        assert raised.value.__context__ is None and seen[:-1] == [x for x in seen[:-1] if x() is None] and len(seen) == (1 if fails == "replay" else 2)
    finally:
        gc.enable()


def test_a_capture_ends_where_the_second_stream_cannot_be_waited_for(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a void capture every event fails; a thread whose capture does not end can allocate nothing more."""
    kept = replay.Replays(torch.device("cuda", 0))
    for _ in range(replay.SEEN):
        kept.run("a", lambda: None)

    def fails() -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    ran = list[int]()

    def work() -> None:
        ran.append(1)
        if Graph.current is not None:
            fails()

    monkeypatch.setattr(kept, "_join", fails)
    kept.run("a", work)
    assert Graph.current is None and ran == [1, 1] and kept._on


def test_an_interrupt_while_a_capture_begins_ends_it(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen when the call that begins it returns; a thread that went on capturing could allocate nothing more."""
    kept, begin, ran = replay.Replays(torch.device("cuda", 0)), Graph.capture_begin, list[int]()

    def interrupted(graph: Graph, pool: Any, capture_error_mode: str) -> None:
        begin(graph, pool, capture_error_mode)
        raise KeyboardInterrupt

    monkeypatch.setattr(Graph, "capture_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(replay.SEEN + 1):
            kept.run("a", lambda: ran.append(1))
    assert Graph.current is None and len(ran) == replay.SEEN and kept._on


def test_a_graph_that_another_thread_let_go_of_is_gone(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of two loops run in four threads: one may make room while another replays, or both find no memory for the same graph."""
    monkeypatch.setattr(replay, "MOST", 2)
    monkeypatch.setattr(replay, "STALE", 4)
    kept, graph = replay.Replays(torch.device("cuda", 0)), Graph()  # one that was dropped in between
    for graph.lacks_memory in (False, True, True, False):
        kept._replay("a", graph, lambda: None)
    for key in range(9):
        for _ in range(replay.SEEN + 1):
            kept.run(key, lambda: None)
    assert kept._graphs and set(kept._used) == set(kept._graphs)


def test_work_whose_graph_finds_no_memory_is_queued_as_ever(graphs: SimpleNamespace) -> None:
    kept, ran = replay.Replays(torch.device("cuda", 0)), list[int]()
    for i in range(replay.SEEN + 2):
        kept.run("a", functools.partial(ran.append, i))
    kept._graphs["a"].lacks_memory = True
    kept.run("a", lambda: ran.append(99))
    assert ran[-1] == 99 and not kept._graphs and not kept._used


def test_streams_that_somebody_captures_on_take_no_place(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_KEPT", {})
    monkeypatch.setattr(replay, "_LEFT", set())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    graphs.capturing = True
    assert replay.replays(torch.device("cuda", 0)) is None and not replay._KEPT
    graphs.capturing = False
    found = replay.replays(torch.device("cuda", 0))
    graphs.capturing = True
    assert found is not None and replay.replays(torch.device("cuda", 0)) is found
    graphs.capturing = False
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device_index=device.index, cuda_stream=7))
    Graphed(lambda _: (torch.zeros(()),) * 2, torch.device("cuda", 0))  # its plain steps' graphs would be of no use, and their memory lost
    assert replay.replays(torch.device("cuda", 0)) is None
    assert replay.replays(torch.device("cuda", 1)) is None, "another device is the current one"
    of_streams = []
    for number in range(replay.STREAMS + 2):
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index, number=number: 8 + number)
        of_streams.append(replay.replays(torch.device("cuda", 0)))
    assert len(replay._KEPT) == replay.STREAMS and of_streams[-3:] == [None] * 3 and None not in of_streams[:-3]


def test_graphs_and_keys_are_bounded(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 2)
    monkeypatch.setattr(replay, "_REMEMBERED", 5)
    kept = replay.Replays(torch.device("cuda", 0))
    for key in range(3):
        for _ in range(replay.SEEN + 1):
            kept.run(key, lambda: None)
    assert len(kept._graphs) == 2
    more = replay.Replays(torch.device("cuda", 0))
    for key in range(100):
        more.run(key, lambda: None)
    assert len(more._seen) <= 5


def test_one_piece_that_cannot_be_captured_leaves_the_others(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = replay.Replays(torch.device("cuda", 0))
    for i in range(4 * replay.SEEN):
        monkeypatch.setattr(Graph, "refuses", True)
        kept.run("bad", lambda: None)
        monkeypatch.setattr(Graph, "refuses", False)
        kept.run(("good", i // 4), lambda: None)  # each comes just often enough
    assert kept._on and ("good", 0) in kept._graphs and "bad" not in kept._graphs and kept._captures == 1 + len(kept._graphs)
    for key in range(2 * replay.TRIES):  # as many as end it one after the other, and more, but for one that succeeds between them
        monkeypatch.setattr(Graph, "refuses", key % replay.TRIES > 0)
        for _ in range(replay.SEEN + 1):
            kept.run(("by turns", key), lambda: None)
    assert kept._on
    monkeypatch.setattr(Graph, "refuses", True)
    for key in range(replay.TRIES):
        for _ in range(replay.SEEN + 1):
            kept.run(("worse", key), lambda: None)
    assert not kept._on


def test_graphs_of_memory_that_lies_elsewhere_by_now_make_room(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 4)
    monkeypatch.setattr(replay, "STALE", 12)
    kept = replay.Replays(torch.device("cuda", 0))

    def steps(places: range, count: int) -> None:
        for _ in range(count):
            for key in places:
                kept.run(key, lambda: None)

    steps(range(4), 8)
    assert set(kept._graphs) == set(range(4))
    first, stays = kept._graphs[0], kept._graphs[2]
    steps(range(2, 6), 16)  # two where they were, two elsewhere
    assert kept._graphs[2] is stays
    assert set(kept._graphs) == set(kept._used) == {2, 3, 4, 5}
    assert kept._first is first  # the pool must not lose all of its graphs


def test_captures_that_are_not_worth_it_end(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "FREE", 3)
    kept = replay.Replays(torch.device("cuda", 0))
    for key in range(20):  # each place comes just often enough to be captured, and never again
        for _ in range(replay.SEEN + 1):
            kept.run(key, lambda: None)
    assert len(kept._graphs) == 3
    for key, times in (("too early", replay.SEEN + 1), (0, 3 * replay.WORTH - 1), ("too early", replay.SEEN + 1), (0, 2)):
        for _ in range(times):
            kept.run(key, lambda: None)
    assert len(kept._graphs) == 3
    for _ in range(replay.SEEN + 1):
        kept.run("again", lambda: None)
    assert "again" in kept._graphs


def test_what_another_thread_queued_counts_for_that_thread(graphs: SimpleNamespace) -> None:
    """Libraries keep their plans for each thread: a capture must not be what makes one."""
    kept = replay.Replays(torch.device("cuda", 0))
    for _ in range(replay.SEEN):
        kept.run("a", lambda: None)
    other = threading.Thread(target=lambda: kept.run("a", lambda: None))
    other.start()
    other.join()
    assert not kept._graphs
    kept.run("a", lambda: None)
    assert "a" in kept._graphs


def test_one_capture_at_a_time(graphs: SimpleNamespace) -> None:
    """Threads that capture at once would take each other's allocations."""
    kept, held = replay.Replays(torch.device("cuda", 0)), list[bool]()
    for _ in range(replay.SEEN + 1):
        kept.run("a", lambda: held.append(replay._ONE_AT_A_TIME.locked()))
    assert held == [False] * replay.SEEN + [True] and not replay._ONE_AT_A_TIME.locked()


def test_places_tell_views_apart() -> None:
    x = torch.zeros(4, 4)
    assert replay.places([x, None, x[1:]]) == (x.data_ptr(), 0, x[1:].data_ptr())
    assert len({replay.places([y]) for y in (x, x.t(), x[:, ::2], x[:1].expand(4, 4))}) == 4


def test_settings_of_either_kind_are_seen() -> None:
    """PyTorch refuses to answer for its older settings where one of the newer was set."""
    before, first, seen = torch.backends.cuda.matmul.fp32_precision, replay.flags(), set()
    assert torch._C._get_cublas_allow_fp16_accumulation in replay._ASKED
    try:
        for kind in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = kind
            seen.add(replay.flags())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(seen) == 2 and replay.flags() == first

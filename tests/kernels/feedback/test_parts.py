"""A forward in parts on several streams: what each step of a part waits for, and what the captured stream waits for in the end."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sessa_deploy.kernels.feedback import parts

WAITED: set[str] = set()  # streams that are part of a graph


class Lane:
    """A stream that knows what is over before what is queued on it next begins."""

    device_index, device = 0, "a GPU"

    def __init__(self, number: int, over: set[str] | None = None) -> None:
        self.cuda_stream, self.over, self.heads = number, over or set(), set[str]()

    def record_event(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset(self.over), frozenset(self.heads)

    def wait_event(self, event: tuple[frozenset[str], frozenset[str]]) -> None:
        self.over |= event[0] | {f"stream {self.cuda_stream}"}
        self.heads |= event[1]  # what the next launch has edges from
        WAITED.add(f"stream {self.cuda_stream}")


def test_a_solve_begins_behind_the_inverses_of_all_parts_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs wait for rows of other launches, which must be able to run by then. Scores of later parts wait for no solve, and nothing is left behind."""
    main, before, edges, priorities = Lane(1, {"begun"}), dict[str, set[str]](), dict[str, set[str]](), list[int]()
    seen, taken = SimpleNamespace(current=main), defaultdict[str, set[int]](set)

    @contextlib.contextmanager
    def stream(lane: Lane) -> Iterator[None]:
        outer, seen.current = seen.current, lane
        yield
        seen.current = outer

    def new_stream(priority: int) -> int:
        priorities.append(priority)
        return 100 + len(priorities)

    def step(name: str, part: int) -> None:
        before[f"{name} {part}"], edges[f"{name} {part}"] = set(seen.current.over), seen.current.heads
        seen.current.heads = {f"{name} {part}"}
        taken[name].add(seen.current.cuda_stream)
        seen.current.over.add(f"{name} {part}")

    for name, value in {"current_stream": lambda: seen.current, "stream": stream, "ExternalStream": lambda number, device: Lane(number)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(parts, "new_stream", new_stream)
    monkeypatch.setattr(parts, "_LANES", {})
    cases = ((range(4), False, False), (range(2), False, True), (range(3), True, True), (range(2), True, False))
    for every, whole, joint, early in ((*case, early) for case in cases for early in (False, True)):
        main.over = {"begun"}
        for lane in (x for kind in parts._LANES.values() for lanes in kind for x in lanes):
            lane.over = set()  # of another call, which may be of the same graph: the last launches in it have an edge to what comes
        before.clear()
        WAITED.clear()
        if whole:
            main.over.add("scores")
        scores, *rest = (lambda part, name=name: step(name, part) for name in ("scores", "inverse", "near", "solve"))
        parts.queue(every, None if whole else scores, *rest, joint=joint, early=early)
        # what is launched early is right behind the one that lets it in, and behind nothing else
        assert not early or edges["solve 0"] == {"near 0"}
        assert whole or all(edges[f"scores {i}"] == {f"scores {i - 1}"} for i in every[1:])
        assert len(before) == (3 if whole else 4) * len(every) and main.over >= {"begun", *before, *WAITED}
        for i in every:
            if not whole:  # in one stream, where a launch may begin before the one ahead of it is over
                assert before[f"scores {i}"] == {"begun", *(f"scores {j}" for j in range(i))} and taken["scores"] == {1}
            assert ("scores" if whole else f"scores {i}") in before[f"inverse {i}"]
            assert not any(x.startswith(("near", "solve")) for x in before[f"inverse {i}"]), "it waits for its scores alone"
            assert not {f"scores {j}" for j in every if j > i} & before[f"solve {i}"], "nor for scores of later rows"
            assert f"inverse {i}" in before[f"near {i}"] and {f"near {j}" for j in range(i + 1)} <= before[f"solve {i}"]
            assert not any(x.startswith("solve") for x in before[f"solve {i}"] | before[f"near {i}"]), "they run at once"
    streams = {101 + i: priority for i, priority in enumerate(priorities)} | {1: 0}
    assert {name: {streams[x] for x in lanes} for name, lanes in taken.items()} == {"scores": {0}, "inverse": {-2}, "near": {-2, -1}, "solve": {-1}}
    # what waits for scores goes first, inverses before solves; later graphs have the streams of the first
    assert sorted(priorities) == [-2] * 5 + [-1] * 4

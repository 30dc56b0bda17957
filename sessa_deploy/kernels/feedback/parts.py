"""A forward in parts of its rows, on several streams of a CUDA graph: the solve begins while scores of later rows are still made. The same bits.
Where large tiles make the scores of a long sequence, in one launch, it begins while later inverses are made.

Behind the scores of a part come its inverses and near tiles, and then as many programs of the solve as it has tiles. Those draw their tickets from one counter,
whichever launch they came with, and a launch starts behind the inverses of all parts before it: a program waits for none that does not run.
What waits for a part's scores has a higher priority than further scores, so that places that become free are the chain's first. Inverses and near tiles have
a higher one than solves: programs of a solve that are not placed yet would else go before the inverses that later rows wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sessa_deploy.cuda import new_stream
from sessa_deploy.kernels.launch.jit import SHARE, interpreted

Step = Callable[[Any], None]  # queues one step of a part on the current stream

GROUP = 2  # row tiles of 128 in a group of score tiles: parts are multiples of it
FIRST, LARGE_FIRST = 256, 512  # rows of the first part, each further one twice as many (measured on an H200)
LEAST, MOST = 512, 4096  # rows beyond which there are parts, and up to which scores go in parts though large tiles could make them
LONG_FIRST = 2048  # rows of the first of two parts where one launch makes all scores
JOINT = 2048  # rows beyond which near tiles go in one stream
SHORT, FEW, FEW_ROWS = 1024, 2048, 8192  # rows up to which the first part is of FIRST; the same where fewer than FEW_ROWS are those of all sequences

_LANES: dict[tuple[int, int], tuple[list[Any], list[Any], list[Any]]] = {}  # device and captured stream: for scores beside it, for combinations, for solves


def scores_whole(tokens: int, many: bool) -> bool:
    """Whether one launch makes the scores of all parts. many: whether large tiles can make them, which take every multiprocessor."""
    return many and tokens > MOST


def cuts(batch: int, tokens: int, many: bool) -> tuple[int, ...]:
    """The rows where parts begin; () where there is but one."""
    if tokens <= LEAST:
        return ()
    if scores_whole(tokens, many):
        return 0, LONG_FIRST
    rows, step = [0], FIRST if tokens <= SHORT or (tokens <= FEW and batch * tokens < FEW_ROWS) else LARGE_FIRST
    while rows[-1] + step < tokens:
        rows.append(rows[-1] + step)
        step *= 2
    return tuple(rows)


_MORE: dict[tuple[str, int], tuple[dict[str, Any], dict[str, Any]]] = {}  # an object of options, kept since its identity stands for it, and those made of it


def beside_others(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A kernel's options where it runs in parts: one object for each that is given. All kernels want all shared memory set apart, since a multiprocessor must
    be empty before it is divided in another way."""
    more: dict[str, Any] = {} if interpreted() else {SHARE: 100}
    return _MORE.setdefault((name, id(options)), (options, {**options, **more, **({"GROUP": GROUP} if "GROUP" in options else {})}))[1]


def capturing(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph of this device."""
    return device.type == "cuda" and torch._C._cuda_isCurrentStreamCapturing() and torch._C._cuda_getDevice() == device.index


def _lanes(main: Any, count: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Two streams for scores, `count` and one for combinations and `count` for solves, all of their own: one of PyTorch's may be in use elsewhere."""
    kinds = _LANES.setdefault((main.device_index, main.cuda_stream), ([], [], []))
    for lanes, wanted, priority in zip(kinds, (2, count + 1, count), (0, -2, -1), strict=True):
        while len(lanes) < wanted:
            lanes.append(torch.cuda.ExternalStream(new_stream(priority), main.device))
    return kinds


def queue(parts: Sequence[Any], scores: Step | None, inverse: Step, near: Step, solve: Step, joint: bool) -> None:
    """Queue all parts into the graph that the current stream captures. scores: None where those of all parts are queued there.

    joint: near tiles of all parts in one stream. A solve then has one edge, where else it has one from each part before it.
    """
    main = torch.cuda.current_stream()
    beside, (shared, *combining), solving = _lanes(main, len(parts))
    ways = [main, *beside] if scores is not None else [main]
    begun, known = main.record_event(), list[Any]()
    for lane in ways[1:]:
        lane.wait_event(begun)
    for i, (part, lane) in enumerate(zip(parts, combining, strict=False)):
        ahead, last = ways[i % len(ways)], shared if joint else lane
        if scores is not None:
            with torch.cuda.stream(ahead):
                scores(part)
        lane.wait_event(ahead.record_event())
        with torch.cuda.stream(lane):
            inverse(part)
        if joint:
            shared.wait_event(lane.record_event())
        with torch.cuda.stream(last):
            near(part)
        if known and not joint:
            lane.wait_event(known[-1])
        known.append(last.record_event())
    ends = []
    for part, lane, event in zip(parts, solving, known, strict=False):
        lane.wait_event(event)
        with torch.cuda.stream(lane):
            solve(part)
        ends.append(lane.record_event())
    ends += [lane.record_event() for lane in ways[1:]]
    for end in ends:
        main.wait_event(end)

"""A forward in parts of its rows, on several streams of a CUDA graph: the solve begins while scores of later rows are still made. The same bits.
Where large tiles make the scores of a long sequence, in one launch, it begins while later inverses are made.

The launches of the scores go behind each other, each from when all programs of the one before have begun: a stream of its own would begin 3 to 7 us late.
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
from sessa_deploy.kernels.launch.jit import SHARE, varied

Step = Callable[[Any], None]  # queues one step of a part on the current stream

GROUP = 2  # row tiles of 128 in a group of score tiles: parts are multiples of it
FIRST, LARGE_FIRST = 256, 512  # rows of the first part, each further one twice as many (measured on an H200)
LEAST, MOST = 512, 4096  # rows beyond which there are parts, and up to which scores go in parts though large tiles could make them
LONG_FIRST = 2048  # rows of the first of two parts where one launch makes all scores
JOINT = 2048  # rows beyond which near tiles go in one stream
SHORT, FEW, FEW_ROWS = 1024, 2048, 8192  # rows up to which the first part is of FIRST; the same where fewer than FEW_ROWS are those of all sequences
MANY_ROWS = 16384  # rows of all sequences from which, of SHORT to FEW of each, the second part is no longer than the first
FEW_STAGES = 4  # of the scores where programs are few: more columns on their way, and one program a multiprocessor

_LANES: dict[tuple[int, int], tuple[list[Any], list[Any]]] = {}  # device and captured stream: for combinations, for solves


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
    again = SHORT < tokens <= FEW and batch * tokens >= MANY_ROWS
    while rows[-1] + step < tokens:
        rows.append(rows[-1] + step)
        step *= 1 if again and len(rows) == 2 else 2
    return tuple(rows)


def beside_others(name: str, options: dict[str, Any], few: bool) -> dict[str, Any]:
    """A kernel's options where it runs in parts, few: programs at a time. All kernels want all shared memory set apart, since a multiprocessor must be empty
    before it is divided in another way."""
    changes: dict[str, Any] = {SHARE: 100}
    if name == "feedback_scores":
        changes |= {"GROUP": GROUP} | ({"num_stages": FEW_STAGES} if few else {})
    return varied(options, **changes)


def capturing(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph of this device."""
    return device.type == "cuda" and torch._C._cuda_isCurrentStreamCapturing() and torch._C._cuda_getDevice() == device.index


def _lanes(main: Any, count: int) -> tuple[list[Any], list[Any]]:
    """`count` streams and one for combinations, `count` for solves, all of their own: one of PyTorch's may be in use elsewhere."""
    kinds = _LANES.setdefault((main.device_index, main.cuda_stream), ([], []))
    for lanes, wanted, priority in zip(kinds, (count + 1, count), (-2, -1), strict=True):
        while len(lanes) < wanted:
            lanes.append(torch.cuda.ExternalStream(new_stream(priority), main.device))
    return kinds


def queue(parts: Sequence[Any], scores: Step | None, inverse: Step, near: Step, solve: Step, joint: bool, early: bool) -> None:
    """Queue all parts into the graph that the current stream captures. scores: None where those of all parts are queued there.

    joint: near tiles of all parts but the first in one stream. A solve then has one edge, where else it has one from each part before it.
    early: whether the first solve is launched early. Its near tiles then go into its stream, and are all that it is behind: one edge, between two kernels of
    one stream, is what the driver is known to make an early one, and a stream of solves may hold those of a call before in the same graph.
    """
    main = torch.cuda.current_stream()
    (shared, *combining), solving = _lanes(main, len(parts))
    made, known = [], list[Any]()
    for part in parts:
        if scores is not None:
            scores(part)
        made.append(main.record_event())
    for part, lane, event in zip(parts, combining, made, strict=False):
        last = solving[0] if early and not known else shared if joint and known else lane
        lane.wait_event(event)
        with torch.cuda.stream(lane):
            inverse(part)
        if last is not lane:
            last.wait_event(lane.record_event())
            if known:
                last.wait_event(known[-1])
        with torch.cuda.stream(last):
            near(part)
        if known and not joint:
            lane.wait_event(known[-1])
        known.append(last.record_event())
    ends = []
    for i, (part, lane, event) in enumerate(zip(parts, solving, known, strict=False)):
        if i > 0 or not early:
            lane.wait_event(event)
        with torch.cuda.stream(lane):
            solve(part)
        ends.append(lane.record_event())
    for end in ends:
        main.wait_event(end)

"""A forward in parts of its rows, on several streams of a CUDA graph: the solve begins while scores of later rows are still made. The same bits.

Behind the scores of a part come its inverses and near tiles, and then as many programs of the solve as it has tiles. Those draw their tickets from one counter,
whichever launch they came with, and a launch starts behind the inverses of all parts before it: a program waits for none that does not run.
What waits for a part's scores has a higher priority than further scores, so that places that become free are the chain's first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sessa_deploy.cuda import new_stream
from sessa_deploy.kernels.launch.jit import SHARE, interpreted

GROUP = 2  # row tiles of 128 in a group of score tiles: parts are multiples of it
FIRST, LARGE_FIRST = 256, 512  # rows of the first part, each further one twice as many (measured on an H200)
LEAST, MOST = 512, 4096  # rows beyond which there are parts, and up to which
SHORT, FEW, FEW_ROWS = 1024, 2048, 8192  # rows up to which the first part is of FIRST; the same where fewer than FEW_ROWS are those of all sequences

_LANES: dict[tuple[int, int], tuple[list[Any], list[Any]]] = {}  # device and captured stream: for scores beside it, and for what waits for them


def cuts(batch: int, tokens: int) -> tuple[int, ...]:
    """The rows where parts begin; () where there is but one."""
    if not LEAST < tokens <= MOST:
        return ()
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


def _lanes(main: Any, count: int) -> tuple[list[Any], list[Any]]:
    """Two streams for scores and `count` for what waits for them, all of their own: one of PyTorch's may be in use elsewhere."""
    beside, behind = _LANES.setdefault((main.device_index, main.cuda_stream), ([], []))
    for lanes, wanted, priority in ((beside, 2, 0), (behind, count, -1)):
        while len(lanes) < wanted:
            lanes.append(torch.cuda.ExternalStream(new_stream(priority), main.device))
    return beside, behind


def queue(parts: Sequence[Any], scores: Callable[[Any], None], combine: Callable[[Any], None], solve: Callable[[Any], None]) -> None:
    """Queue all parts into the graph that the current stream captures; each function queues one step of a part on the current stream."""
    main = torch.cuda.current_stream()
    beside, behind = _lanes(main, len(parts))
    begun, before = main.record_event(), None
    for lane in beside:
        lane.wait_event(begun)
    ends = []
    for i, (part, lane) in enumerate(zip(parts, behind, strict=False)):
        ahead = (main, *beside)[i % 3]
        with torch.cuda.stream(ahead):
            scores(part)
            lane.wait_event(ahead.record_event())
        with torch.cuda.stream(lane):
            combine(part)
            if before is not None:
                lane.wait_event(before)
            before = lane.record_event()
            solve(part)
            ends.append(lane.record_event())
    for lane in beside:
        ends.append(lane.record_event())
    for end in ends:
        main.wait_event(end)

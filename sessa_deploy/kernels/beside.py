"""A second stream beside a captured one, for what nothing waits for yet: it takes the multiprocessors that a kernel's end or a chain leaves idle.

Only in CUDA graphs, where the host pays nothing for it: an event each way costs as much as a short kernel's launch, in a step that waits for the host already.
"""

from __future__ import annotations

from typing import Any

import torch

_SIDES: dict[tuple[int, int], tuple[Any, bool]] = {}  # device and captured stream: the second, and whether graphs of ours are captured there


def pair(stream: Any, side: Any) -> None:
    """Let `side` be the second of a stream on which graphs of ours are captured."""
    _SIDES[stream.device_index, stream.cuda_stream] = side, True


class Beside:
    """`with beside:` queues work on the second stream, behind what the current stream holds by then; `join` lets the current one wait for all of it.

    Where no graph is captured, and on a CPU, everything is in one line. Memory: every tensor that is used in a block is held by the caller until `join`.
    """

    __slots__ = ("_main", "_own", "_side", "_used")

    def __init__(self, device: torch.device) -> None:
        self._main: Any = None
        self._side: Any = None
        self._used = self._own = False
        if device.type == "cuda" and torch._C._cuda_isCurrentStreamCapturing() and torch._C._cuda_getDevice() == device.index:
            self._main = torch.cuda.current_stream()
            key = (device.index, self._main.cuda_stream)
            side, self._own = _SIDES.get(key, (None, False))
            if side is None:  # one for all: each stream that products run on has a workspace of theirs
                side, self._own = _SIDES[key] = torch.cuda.Stream(), False
            self._side = side

    def __enter__(self) -> Beside:
        if self._side is not None:
            self._side.wait_event(self._main.record_event())
            self._used = True
            torch.cuda.set_stream(self._side)
        return self

    def __exit__(self, *_: object) -> None:
        if self._side is not None:
            torch.cuda.set_stream(self._main)

    @property
    def pending(self) -> bool:
        """Whether there is work that was not joined."""
        return self._used

    def rest(self) -> None:
        """At the end of a piece: `join` where the piece is a graph of its own; in somebody else's graph what comes next may go beside it too."""
        if self._own:
            self.join()

    def join(self) -> None:
        """Let the current stream wait for the second."""
        if self._used:
            self._main.wait_event(self._side.record_event())
            self._used = False

"""A second stream beside a captured one, for what nothing waits for yet: it takes the multiprocessors that a kernel's end or a chain leaves idle.

Only in CUDA graphs, where the host pays nothing for it: an event each way costs as much as a short kernel's launch, in a step that waits for the host already.
"""

from __future__ import annotations

from typing import Any

import torch

_SIDES: dict[tuple[int, int], Any] = {}  # device and captured stream: the second


def pair(stream: Any, side: Any) -> None:
    """Let `side` be the second of a stream on which graphs are captured."""
    _SIDES[stream.device_index, stream.cuda_stream] = side


class Beside:
    """`with beside:` queues work on the second stream, behind what the current stream holds by then; `join` lets the current one wait for all of it.

    Where no graph is captured, and on a CPU, everything is in one line. Memory: every tensor that is used in a block is held by the caller until `join`.
    """

    __slots__ = ("_main", "_side", "_used")

    def __init__(self, device: torch.device) -> None:
        self._main: Any = None
        self._side: Any = None
        self._used = False
        if device.type == "cuda" and torch._C._cuda_isCurrentStreamCapturing() and torch._C._cuda_getDevice() == device.index:
            self._main = torch.cuda.current_stream()
            key = (device.index, self._main.cuda_stream)
            side = _SIDES.get(key)
            if side is None:
                side = _SIDES[key] = torch.cuda.Stream()
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

    def join(self) -> None:
        """Let the current stream wait for the second."""
        if self._used:
            self._main.wait_event(self._side.record_event())
            self._used = False

"""Work on a GPU that comes again with the same arguments, as one CUDA graph: what costs the host hundreds of microseconds to queue costs ten to replay.

A training loop's tensors lie where they lay a step before, since the allocator gives the same places to the same requests. Work whose every address and
number is as it was before is the same work, whoever owns the memory by now: a graph of it holds no activations and changes no bit. SESSA_REPLAY=0 in the
environment queues everything anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from sessa_deploy.cuda import new_stream
from sessa_deploy.kernels.training.beside import pair

SEEN = 3  # times that work is queued plainly before it is captured: it compiles, plans and loads
MOST = 512  # graphs of a stream; beyond, what is new is queued plainly
STREAMS = 8  # that have graphs
_REMEMBERED = 4096  # keys whose times are counted
_ONE_AT_A_TIME = threading.Lock()  # captures


class Replays:
    """The graphs of work that is queued on one stream of a device.

    They are captured on a stream of their own, which is nobody else's: a library's workspace belongs to a stream, and those of two streams may run at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Hashable, Any] = {}
        self._seen: dict[Hashable, int] = {}
        self._device = device
        self._on = os.environ.get("SESSA_REPLAY") != "0"
        self._stream: Any = None
        self._pool: Any = None
        self._warm: set[int] = set()

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Queue `work` on the stream, where key names everything it reads and writes by address and everything else that decides what it queues.

        work gives nothing back, and allocates nothing that is read behind it.
        """
        if not self._on or torch._C._cuda_isCurrentStreamCapturing():
            work()
            return
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
        elif self._due(key):
            self._capture(key, work)
        else:
            work()

    def _due(self, key: Hashable) -> bool:
        if len(self._graphs) >= MOST:
            return False
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        times = self._seen[key] = self._seen.get(key, 0) + 1
        return times > SEEN

    def _capture(self, key: Hashable, work: Callable[[], None]) -> None:
        try:
            with _ONE_AT_A_TIME:
                graph = self._captured(work)
        except RuntimeError:  # what cannot be captured here is queued as ever
            self._on = False
            work()
            return
        self._graphs[key] = graph
        self._seen.pop(key, None)
        graph.replay()

    def _captured(self, work: Callable[[], None]) -> Any:
        if self._stream is None:
            self._stream, side = (torch.cuda.ExternalStream(new_stream(), self._device) for _ in range(2))
            self._pool = torch.cuda.graph_pool_handle()
            pair(self._stream, side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            self._warm_up()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph

    def _warm_up(self) -> None:
        """Let the library of products take its workspace on this stream before a capture, once a thread: it then belongs to no graph."""
        thread = threading.get_ident()
        if thread not in self._warm:
            self._warm.add(thread)
            x = torch.zeros((64, 64), dtype=torch.float16, device=self._device)
            torch.addmm(x[0], x, torch.mm(x, x))
            self._stream.synchronize()


_KEPT: dict[tuple[int, int], Replays] = {}


def replays(device: torch.device) -> Replays | None:
    """Those of a device's current stream; None on a CPU, where another device is the current one, and for streams beyond the first few."""
    if device.type != "cuda" or torch._C._cuda_getDevice() != device.index:
        return None
    at = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    found = _KEPT.get(at)
    if found is None and len(_KEPT) < STREAMS:
        found = _KEPT[at] = Replays(device)
    return found


def flags() -> tuple[Any, ...]:
    """Settings of PyTorch that decide which products are queued."""
    c = torch._C
    return (c._get_cublas_allow_tf32(), c._get_cublas_allow_fp16_reduced_precision_reduction(), c._get_cublas_allow_bf16_reduced_precision_reduction(),
            c._get_deterministic_algorithms(), c._get_blas_preferred_backend())  # fmt: skip


def places(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Their addresses, 0 for none."""
    return tuple([0 if x is None else x.data_ptr() for x in tensors])

"""Work on a GPU that comes again with the same arguments, as one CUDA graph: what costs the host hundreds of microseconds to queue costs ten to replay.

A training loop's tensors lie where they lay a step before, since the allocator gives the same places to the same requests. Work whose every address and
number is as it was before is the same work, whoever owns the memory by now: a graph of it holds no activations and changes no bit. SESSA_REPLAY=0 in the
environment queues everything anew.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from sessa_deploy.cuda import new_stream
from sessa_deploy.kernels.beside import pair

SEEN = 2  # times that work is queued plainly before it is captured: it compiles, plans and loads
MOST = 512  # graphs of a stream; beyond, what is new is queued plainly
STALE = 16 * MOST  # runs of other work after which a graph makes room
FREE, WORTH = 256, 8  # graphs that are captured without a question; beyond, those there are must have been replayed so often each
TRIES = 3  # captures that may fail one after the other
STREAMS = 8  # that have graphs
_REMEMBERED = 4096  # keys whose times are counted
_NEVER = -(1 << 62)
_ONE_AT_A_TIME = threading.Lock()  # captures


class Replays:
    """The graphs of work that is queued on one stream of a device.

    They are captured on a stream of their own, which is nobody else's: a library's workspace belongs to a stream, and those of two streams may run at once.
    What they allocate themselves is one pool's: one stream replays them, one behind the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Hashable, Any] = {}
        self._used: dict[Hashable, int] = {}  # the run in which each was replayed last
        self._seen: dict[Hashable, int] = {}
        self._device = device
        self._on = os.environ.get("SESSA_REPLAY") != "0"
        self._stream: Any = None
        self._side: Any = None
        self._pool: Any = None
        self._first: Any = None  # of all graphs, held for ever: PyTorch takes no capture into a pool whose last graph is gone
        self._runs = self._replayed = self._captures = self._failed = self._swept = 0

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Queue `work` on the stream, where key names everything it reads and writes by address and everything else that decides what it queues.

        work gives nothing back, and what it allocates is not read behind it.
        """
        if not self._on or torch._C._cuda_isCurrentStreamCapturing():
            work()
            return
        self._runs += 1
        graph = self._graphs.get(key)
        if graph is not None:
            self._replayed += 1
            self._replay(key, graph, work)
        elif self._due(key):
            self._capture(key, work)
        else:
            work()

    def _due(self, key: Hashable) -> bool:
        if (self._captures >= FREE and self._captures * WORTH > self._replayed) or not self._room():
            return False
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        key = threading.get_ident(), key  # libraries keep plans for each thread
        times = self._seen[key] = self._seen.get(key, 0) + 1
        return times > SEEN

    def _room(self) -> bool:
        """Whether another graph may be kept. Where memory lies elsewhere for good, those of before make room."""
        if len(self._graphs) >= MOST and self._runs - self._swept >= MOST:
            self._swept = self._runs
            for key, run in list(self._used.items()):
                if self._runs - run >= STALE:
                    self._drop(key)
        return len(self._graphs) < MOST

    def _drop(self, key: Hashable) -> None:
        """Let go of a graph, which another thread may have done by now."""
        self._graphs.pop(key, None)
        self._used.pop(key, None)

    def _replay(self, key: Hashable, graph: Any, work: Callable[[], None]) -> None:
        self._used[key] = self._runs
        try:
            graph.replay()
            return
        except RuntimeError:  # a graph takes memory when it is launched, where plain launches take none
            self._drop(key)
        work()  # out here: an error of its own is not the other's

    def _capture(self, key: Hashable, work: Callable[[], None]) -> None:
        self._captures += 1
        try:
            with _ONE_AT_A_TIME:
                graph = self._captured(work)
        except RuntimeError:  # what cannot be captured here is queued as ever
            graph = None
        if graph is None:
            self._failed += 1
            self._on = self._failed < TRIES
            self._seen[threading.get_ident(), key] = _NEVER
            work()
            return
        self._failed = 0
        self._graphs[key] = graph
        self._seen.pop((threading.get_ident(), key), None)
        self._replay(key, graph, work)

    def _captured(self, work: Callable[[], None]) -> Any:
        if self._stream is None:
            self._stream, self._side = (torch.cuda.ExternalStream(new_stream(), self._device) for _ in range(2))
            pair(self._stream, self._side)
        if self._first is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, begun = torch.cuda.CUDAGraph(), False
        error: BaseException | None = None
        with torch.cuda.stream(self._stream):
            # libraries take their workspaces inside, so from the pool: they are the graphs' own, whoever clears what libraries hold
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                begun = True
                work()
            except BaseException as raised:  # also the user's interrupt, wherever it comes, which goes on when the capture is over
                error = raised
            if error is not None and begun:
                with suppress(RuntimeError):  # of a capture that is void by now; its end must come all the same
                    self._join()
            try:
                if begun or not isinstance(error, RuntimeError):
                    graph.capture_end()
                else:
                    self._recover()
            except RuntimeError as raised:
                error = error or raised
                self._recover()
        if error is not None:
            try:
                raise error
            finally:
                del error  # whose frames hold what was captured, and this one it
        self._first = self._first or graph
        return graph

    def _recover(self) -> None:
        """What PyTorch leaves undone where the end of a capture fails: its allocator goes on with the pool, and the device's generator takes every
        draw for one of the graph (up to 2.12) until a capture ends well: one of nothing does."""
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is empty
            nothing = torch.cuda.CUDAGraph()
            nothing.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            nothing.capture_end()

    def _join(self) -> None:
        """Let the captured stream wait for the second one where that was left: a capture cannot end with work that nobody waits for."""
        with torch.cuda.stream(self._side):
            begun = torch._C._cuda_isCurrentStreamCapturing()
        if begun:
            self._stream.wait_stream(self._side)


_KEPT: dict[tuple[int, int], Replays] = {}
_LEFT: set[tuple[int, int]] = set()


def leave(stream: Any) -> None:
    """Queue everything anew on this stream: for one that somebody will capture, after which nothing replays what was captured before."""
    _LEFT.add((stream.device_index, stream.cuda_stream))


def replays(device: torch.device) -> Replays | None:
    """Those of a device's current stream; None on a CPU, where another device is the current one, on a stream that was left, and beyond the first few."""
    if device.type != "cuda" or torch._C._cuda_getDevice() != device.index:
        return None
    at = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    if at in _LEFT:
        return None
    found = _KEPT.get(at)
    if found is None and len(_KEPT) < STREAMS and not torch._C._cuda_isCurrentStreamCapturing():  # streams to capture on are no streams to replay on
        found = _KEPT[at] = Replays(device)
    return found


def queue(what: Hashable, device: torch.device, tensors: Sequence[Tensor | None], work: Callable[[], None]) -> None:
    """Queue work on a device's current stream, replayed where it was there before: `what` and the places of the tensors decide what it does.

    tensors: all that work reads and writes, but for what it allocates itself and nobody reads behind it; their shapes and types are decided by `what`.
    """
    kept = replays(device)
    if kept is None:
        work()
    else:
        kept.run((what, places(tensors)), work)


_ASKED = [getattr(torch._C, name) for name in (
    "_get_cublas_allow_fp16_reduced_precision_reduction", "_get_cublas_allow_bf16_reduced_precision_reduction", "_get_cublas_allow_fp16_accumulation",
    "_get_deterministic_algorithms", "_get_blas_preferred_backend", "_get_sm_carveout_experimental") if hasattr(torch._C, name)]  # fmt: skip


def flags() -> tuple[Any, ...]:
    """Settings of PyTorch that decide which products are queued."""
    # not _get_cublas_allow_tf32, which raises where the newer setting was used
    return (torch._C._get_fp32_precision_getter("cuda", "matmul"), *[ask() for ask in _ASKED])


def places(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Where they lie: addresses, 0 for none, with strides where one is not contiguous."""
    return tuple([0 if x is None else x.data_ptr() if x.is_contiguous() else (x.data_ptr(), x.stride()) for x in tensors])

"""A session on the GPU, whichever engine runs the graph: caches that never leave it, and each decode step one captured CUDA graph.

A step enqueues: ids and lengths to the device, the engine, and a kernel that appends, picks, advances the lengths and writes the ids to the host. The rows of
more tokens than are picked are appended by a kernel of their own; a long prompt's are not: the engine is given their places in the caches as its outputs.
Lengths are read on the device, so steps of one extent (how many sequences, how many new rows of each) are the same work on the same addresses, whatever the
sequences hold: it is recorded once and replayed. The host reads the ids, or the logits where somebody samples.
The last kernel also leaves the ids where the engine reads its own, so that the next greedy step can be enqueued before the host has seen them. Two such
steps take turns at two places for their ids on the host, each with an event behind it. A step that verifies a draft can be enqueued so too: a kernel before
it settles what the one before found and makes the draft (drafts.py).
"""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import FEW_ROWS
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.begun import Begun
from sessa_deploy.runtime.device.buffers import Buffers, Extent
from sessa_deploy.runtime.device.drafts import MOST_PLACES, Drafts
from sessa_deploy.runtime.report import note

_FED, _KEPT, _DRAFTED = "fed", "kept", "drafted"  # what a step is fed: what the host put, what the one before picked, that and a draft behind it


class DeviceBackend(Backend):
    """What an engine on a GPU does besides running the graph. It sets `_cuda`, `_buffers` (and `best_chunk`, the tokens a sequence that a step takes at most)
    and implements `_run`; while the buffers are None it counts as closed.

    recorded_tokens: steps of all sequences over at most so many tokens are replayed as a CUDA graph. warm_runs: of one extent, before it is recorded, on the
    thread that records: what an engine allocates or loads at its first run must be there by then. row_alignment: bytes at whose multiples the engine's
    inputs and outputs must begin: a sequence's cache rows for it to run that sequence alone, and the row behind them for it to lay new ones there.
    padded_rows: where an engine can have only one size of steps recorded beside those of one row, steps of one sequence over fewer are computed over so many.
    drafting_precisions: with kernels for few rows, so that drafts made on the device are worth it.
    """

    looks_ahead = True
    packed_weights = True
    recorded_tokens: int = 1
    padded_rows = 0
    drafting_precisions: tuple[str, ...] = ("fp16", "bf16")
    draft_cost = (0.7, 0.03)  # fp32 on an H200, which has no kernels for few rows, and every draft waits for the host
    warm_runs = 1
    row_alignment = 16
    engine_name = "the engine"

    def __init__(self, config: SessaConfig, batch: int, capacity: int | None, graph: bool = True) -> None:
        super().__init__(config, batch, capacity)
        self._cuda: Any = None
        self._buffers: Buffers | None = None
        self._on_device: bytes | None = None  # lengths the device holds, as an int32 array's bytes; None: unknown
        self._new_there: bytes | None = None  # new_length on the device, likewise
        self._slot: int | None = None  # of the greedy step that was enqueued last; None: something is behind it, and its ids are the device's no more
        self._drafts: Drafts | None = None
        self._flying = 0  # steps that were begun and nobody has waited for
        self._use_graph = graph
        self._graphs: dict[tuple[Extent, int, str], int] = {}  # step, slot, what it is fed
        self._warm: Counter[tuple[Extent, int]] = Counter()

    @abstractmethod
    def _run(self, step: Extent) -> None:
        """Enqueue the engine on the stream, on the buffers' addresses and shapes of `step`. Raises SessaError if it refuses."""

    def _release(self) -> None:
        """Let go of the engine, or of as much of it as there is; the GPU is idle and the recorded graphs are gone."""
        return

    @contextlib.contextmanager
    def _opening(self, cuda: Any) -> Iterator[None]:
        """What a constructor does once it has `cuda`: if it fails, or is interrupted, the GPU gets back what was taken."""
        try:
            yield
        except BaseException:
            self._buffers = None
            self._release()
            with contextlib.suppress(SessaError):  # the error on its way says more
                cuda.close()
            raise

    def expect_rows(self, rows: int) -> None:
        buffers = self._own()
        most = min(rows, self.most_rows, buffers.picked_rows)
        if self.batch == 1 and most > 1 and buffers.precision in self.drafting_precisions and buffers.capacity < MOST_PLACES:
            self._cuda.enter()
            self._drafts = self._drafts or Drafts(buffers)
            self.draft_rows = (most,) if most <= FEW_ROWS else (FEW_ROWS, most)  # which take half as long again
            self.draft_cost = (0.1, 0.04)  # on an H200: 8 rows 1.25 for the demo, 1.3 to 1.5 for layers of 350M and 1.1B; 16 rows 1.8

    def _pick(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.int64]:
        if ids.shape[1] == 1:  # nothing between the step and its ids
            self._enqueue(ids, new, self.length)
            return self._own().picked()[:, 0]
        if self.all_logits:  # the kernel looks at one row of logits a sequence
            return super()._pick(ids, new)
        picked = np.zeros(self.batch, np.int64)
        for _, part in self._parts(ids, new):
            found = self._own().picked()[:, 0]
            picked[part > 0] = found[part > 0]  # a sequence's last part has its last token
        return picked

    def _some(self, ids: NDArray[np.int64], new: NDArray[np.int32], rows: list[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if ids.shape[1] > 1:
            return super()._some(ids, new, rows)
        self._enqueue(ids, new, self.length)
        logits = self._own().logits_of(rows)
        return self._own().picked()[:, 0], logits

    def _begin(self, begun: Begun) -> None:
        assert begun.ids is not None
        if begun.ids.shape[1] > 1:
            begun.picked = self._pick(begun.ids, begun.new)
            return
        self._enqueue(begun.ids, begun.new, self.length)
        self._begun_in(0)

    def _begin_next(self, begun: Begun) -> bool:
        if self._slot is None:
            return False
        if self._begun and self._begun[-1].rows > 1:  # nobody has settled it yet
            begun.rows = 1
            self.bytes_moved += self._own().row_bytes
            return self._begin_drafted(begun)
        buffers, length, new = self._own(), self._on_device, begun.new.tobytes()
        begun.slot = 1 - self._slot
        self._slot = self._on_device = None
        self._cuda.enter()
        if new != self._new_there:
            self._new_there = None
            buffers.set_new(begun.new, begun.slot)
            self._new_there = new
        self._launch(Extent(self.batch, 1), begun.slot, _KEPT)
        self._on_device = None if length is None else (np.frombuffer(length, np.int32) + begun.new).tobytes()
        self.bytes_moved += int(begun.new.sum()) * buffers.row_bytes
        self._begun_in(begun.slot)
        return True

    def _tell(self, tokens: Sequence[int], since: int) -> None:
        self._own()
        assert self._drafts is not None
        self._cuda.enter()
        self._drafts.put(tokens, since)

    def _begin_drafted(self, begun: Begun) -> bool:
        if self._slot is None:
            return False
        begun.slot = 1 - self._slot
        self._slot = self._on_device = self._new_there = None
        self._cuda.enter()
        self._launch(Extent(1, begun.rows), begun.slot, _DRAFTED)
        self._begun_in(begun.slot)
        if begun.rows == 1:
            self._new_there = begun.new.tobytes()
        return True

    def _end_drafted(self, begun: Begun) -> tuple[list[int], list[int]]:
        if begun.rows < 2:
            return super()._end_drafted(begun)
        assert self._drafts is not None
        buffers = self._own()
        self._cuda.enter()
        picked = buffers.picked_in(begun.slot, begun.rows).tolist()
        self._flying -= 1
        draft = self._drafts.told(begun.slot)
        self.bytes_moved += (1 + len(draft)) * buffers.row_bytes
        return picked, draft

    def _begun_in(self, slot: int) -> None:
        self._flying += 1
        self._own().mark(slot)
        self._slot = slot

    def _end(self, begun: Begun) -> NDArray[np.int64]:
        if begun.picked is None:
            buffers = self._own()
            self._cuda.enter()
            begun.picked = buffers.picked_in(begun.slot)
            self._flying -= 1
        return begun.picked

    def _land(self) -> None:
        """Wait for steps that were begun, and keep what they picked: the host's memory is then free for another step."""
        if self._flying:
            self._cuda.wait()
            for begun in self._begun:
                if begun.picked is None:
                    begun.picked = self._own().picked_in(begun.slot)
            self._flying = 0

    def _forward(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        logits = np.empty(0, np.float32)
        for start, part in self._parts(ids, new):
            found = self._own().get_logits(part, int(part.max()))
            # every sequence has its first token in the first part
            logits = found if start == 0 else np.where(part[:, None] > 0, found, logits)
        return logits

    def _forward_all(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        logits = np.zeros((*ids.shape, self.config.vocab_size), np.float32)
        for start, part in self._parts(ids, new):
            tokens = int(part.max())
            logits[:, start : start + tokens] = self._own().every_logits(self.batch, tokens)
        return logits

    def _forward_row(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        if not self._runs_rows():
            return super()._forward_row(row, ids)
        for part in self._row_parts(row, ids):
            logits = self._own().get_logits(part, int(part[0]))[0]
        return logits

    def _forward_row_all(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        if not self._runs_rows():
            return super()._forward_row_all(row, ids)
        return np.concatenate([self._own().every_logits(1, int(part[0]))[0] for part in self._row_parts(row, ids)])

    def _pick_row_all(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.batch > 1 or len(ids) > self._own().picked_rows:
            return super()._pick_row_all(row, ids)
        fed, new = self._alone(row, ids)
        self._enqueue(fed, new, self.length)
        picked: NDArray[np.int64] = self._own().picked(len(ids))[0]
        return picked

    def _copy_row(self, source: int, target: int, length: int) -> None:
        buffers = self._own()
        self._cuda.enter()
        buffers.copy_rows(source, target, length)
        self.bytes_moved += length * buffers.row_bytes

    def _runs_rows(self) -> bool:
        """Whether a sequence can be computed alone where others stand beside it; of one sequence there is no other."""
        return self.batch > 1 and self._own().aligned(self.row_alignment)

    def _row_chunk(self) -> int:
        """Tokens that one step of one sequence alone takes at most."""
        return self._own().chunk

    def _parts(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Enqueue ids (B,T) in steps the engine takes; (first token, new_length (B,)) of each when it is enqueued. The caller waits for each."""
        done, most = self.length.copy(), self._own().chunk
        for start in range(0, ids.shape[1], most):
            part = np.clip(new - start, 0, most).astype(np.int32)
            self._enqueue(ids[:, start : start + int(part.max())], part, done)
            done += part
            yield start, part

    def _row_parts(self, row: int, ids: NDArray[np.int64]) -> Iterator[NDArray[np.int32]]:
        """Like `_parts` for ids (T,) of one sequence alone; new_length (1,) of each."""
        done, most = self.length[row : row + 1].copy(), self._row_chunk()
        for start in range(0, len(ids), most):
            fed = ids[None, start : start + most]
            part = np.array([fed.shape[1]], np.int32)
            self._enqueue(fed, part, done, row)
            done += part
            yield part

    def _enqueue(self, ids: NDArray[np.int64], new: NDArray[np.int32], length: NDArray[np.int32], row: int | None = None) -> None:
        """One step over ids (N,T) on the stream, T within what a step takes; its sequences stand at `length` (N,) before it."""
        if self.batch == 1 and 1 < ids.shape[1] < self.padded_rows:
            ids = np.pad(ids, ((0, 0), (0, self.padded_rows - ids.shape[1])))
        buffers, step = self._own(), self._extent(ids.shape[1], length, row)
        self._cuda.enter()
        self._slot = None
        self._land()
        if self._on_device != length.tobytes():
            self._cuda.wait()  # for a step that was interrupted and may not have read what the host gave it
        self._on_device = self._new_there = None
        buffers.put(ids, new, length)
        self._launch(step, 0, _FED)
        # after the launch, so that the host's time is the device's too
        self._on_device, self._new_there = (length + new).tobytes(), new.tobytes()
        self.bytes_moved += int(new.sum()) * buffers.row_bytes

    def _extent(self, tokens: int, length: NDArray[np.int32], row: int | None) -> Extent:
        """The step of `tokens` new rows of sequences that stand at `length` (N,); a large one of one sequence lays them behind its cached rows itself."""
        step, at = Extent(len(length), tokens, row), int(length[0])
        recorded = row is None and self._records(tokens)  # whose addresses do not move
        return step._replace(behind=at) if not recorded and self._own().fits_behind(step, at, self.row_alignment) else step

    def _records(self, tokens: int) -> bool:
        """Whether steps of all sequences over so many rows are replayed as a CUDA graph."""
        return tokens <= self.recorded_tokens or tokens == self.padded_rows

    def _launch(self, step: Extent, slot: int, feed: str) -> None:
        """Enqueue a step, fed by what was put, what is on the device or a draft that is made there; its tokens go to a slot."""
        graph = self._graph(step, slot, feed)
        if graph:
            self._cuda.replay(graph)
        else:
            self._record(step, slot, feed)

    def _record(self, step: Extent, slot: int, feed: str) -> None:
        buffers = self._own()
        if feed == _FED:
            buffers.feed(step)
        elif feed == _DRAFTED:
            assert self._drafts is not None
            self._drafts.make(step.tokens, slot)
        self._run(step)
        buffers.finish(step, slot)

    def _graph(self, step: Extent, slot: int, feed: str) -> int:
        """The CUDA graph that is this step, recorded now if it is time; 0 where it is to be enqueued piece by piece."""
        found = self._graphs.get((step, slot, feed))
        if found is not None or not self._use_graph or step.row is not None or not self._records(step.tokens):
            return found or 0
        key = (step, threading.get_ident())
        if self._warm[key] < self.warm_runs:
            self._warm[key] += 1
            return 0
        try:
            made = self._cuda.capture(lambda: self._record(step, slot, feed))
        except SessaError as error:
            self._record_no_more(str(error))
            return 0
        self._graphs[step, slot, feed] = made
        return int(made)

    def _record_no_more(self, why: str) -> None:
        """Enqueue every step piece by piece from now on, and say so; what was recorded so far stays good."""
        self._use_graph = False
        note(f"decode steps run without a CUDA graph, and slower, as {self.engine_name} cannot be recorded: {why}")

    def cached(self, row: int) -> dict[str, NDArray[np.generic]]:
        buffers = self._own()
        self._cuda.enter()
        return buffers.rows(row, int(self.length[row]))

    def poison(self) -> None:
        buffers = self._own()
        self._cuda.enter()
        ahead = self.length + sum(begun.new for begun in self._begun)  # rows of steps that are under way are in the cache already
        buffers.poison(np.maximum(self.kept(), ahead))

    def device_bytes(self) -> int:
        self._own()
        self._cuda.enter()
        free, total = self._cuda.memory()
        return int(total - free)

    def close(self) -> None:
        if self._buffers is None:
            return
        self._buffers = None  # closed, whatever the driver says of it
        self.call_off()
        try:
            self._cuda.enter()
            self._cuda.wait()
            for graph in self._graphs.values():  # before the engine: they hold addresses of its memory
                self._cuda.forget(graph)
        finally:
            self._graphs.clear()
            self._release()
            self._cuda.close()

    def _own(self) -> Buffers:
        if self._buffers is None:
            raise UserError("the session is closed", fix="open the bundle again")
        return self._buffers

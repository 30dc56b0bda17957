"""The CUDA driver on host memory: sessa_deploy.cuda.Cuda whose launches are numpy, and the decode kernels' folder."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sessa_deploy.contract import STEP_ROWS
from sessa_deploy.runtime.device.kernels import APPEND, DRAFT, END

SPLITS = 4


class HostCuda:
    """sessa_deploy.cuda.Cuda on host memory. Memory starts as 0xFF: NaN, and lengths of -1."""

    arch, stream = 90, 7

    def __init__(self, free: int = 8 << 30, arch: int = 90) -> None:
        if arch != self.arch:
            self.arch = arch
        self.blocks: dict[int, Any] = {}
        self.sizes: dict[int, int] = {}
        self.host: set[int] = set()
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.log: list[str] = []  # replays, and waits for events
        self.replays = self.launches = self.read_back = self.sent = self.events = 0
        self.free, self.closed = free, False

    def enter(self) -> None: ...

    def wait(self) -> None:
        assert self.recording is None, "a wait inside a capture"

    def memory(self) -> tuple[int, int]:
        return self.free, 16 << 30

    def allocate(self, size: int) -> int:
        assert self.recording is None, "an allocation inside a capture"
        block = (ctypes.c_char * (max(size, 1) + 256))(*b"")
        ctypes.memset(block, 0xFF, len(block))
        address = -(-ctypes.addressof(block) // 256) * 256
        self.blocks[address], self.sizes[address] = block, size
        return address

    def allocate_host(self, size: int) -> int:
        self.host.add(address := self.allocate(size))
        return address

    def do(self, work: Callable[[], None]) -> None:
        """Run now, or record where a graph is captured."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def to_device(self, target: int, source: int, size: int) -> None:
        self.sent += 1
        self.do(lambda: ctypes.memmove(target, source, size))

    def to_host(self, target: int, source: int, size: int) -> None:
        self.read_back += size
        self.do(lambda: ctypes.memmove(target, source, size))

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        for row in range(height):
            self.do(lambda at=row: ctypes.memmove(target + at * target_pitch, source + at * source_pitch, width))

    def fill(self, target: int, word: int, count: int) -> None:
        assert any(a <= target and target + 4 * count <= a + size for a, size in self.sizes.items()), "beyond what was allocated"
        self.do(lambda: view(target, np.uint32, count).fill(word))

    def read(self, source: int, size: int) -> bytes:
        return ctypes.string_at(source, size)

    def kernel(self, image: bytes, entry: str, warps: int, shared: int, params: int, early: bool = False) -> tuple[str, int]:
        return entry, params

    def launch(self, kernel: tuple[str, int], grid: tuple[int, int, int], arguments: Sequence[tuple[str, int]]) -> None:
        entry, params = kernel
        assert params == len(arguments) + 2, "Triton's two hidden pointers come last"
        self.launches += 1
        values = [value for _, value in arguments]
        assert entry != END or self.on_host(values[7]), "the tokens are written to the host's memory"
        assert entry != DRAFT or self.on_host(values[2]), "and so is the draft"
        work = {APPEND: _append, END: _end, DRAFT: draft}[entry]
        self.do(lambda: work(grid, *values))

    def capture(self, enqueue: Callable[[], None]) -> int:
        self.recording = []
        try:
            enqueue()
            graph = len(self.graphs) + 1
            self.graphs[graph] = self.recording
        finally:
            self.recording = None
        return graph

    def replay(self, graph: int) -> None:
        self.replays += 1
        self.log.append("replay")
        for work in self.graphs[graph]:
            work()

    def on_host(self, address: int) -> bool:
        return any(block <= address < block + len(self.blocks[block]) for block in self.host)

    def event(self) -> int:
        self.events += 1
        return self.events

    def record(self, event: int) -> None:
        assert self.recording is None, "an event inside a capture"
        self.log.append(f"record {event}")

    def wait_event(self, event: int) -> None:
        assert self.recording is None, "a wait inside a capture"
        self.log.append(f"wait {event}")

    def forget(self, graph: int) -> None:
        del self.graphs[graph]

    def close(self) -> None:
        self.closed = True


class LateCuda(HostCuda):
    """A GPU that does nothing of what is enqueued before somebody waits, or reads, and then reads the host's memory as it is by then.

    interrupts: how many waits are to be cut short by Ctrl-C.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Callable[[], None]] = []
        self.marks: dict[int, Callable[[], None]] = {}
        self.interrupts = 0

    def do(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def replay(self, graph: int) -> None:
        self.replays += 1
        self.log.append("replay")
        self.queue += self.graphs[graph]

    def record(self, event: int) -> None:
        super().record(event)
        self.marks[event] = mark = lambda: None
        self.queue.append(mark)

    def wait(self) -> None:
        super().wait()
        self._until(None)

    def wait_event(self, event: int) -> None:
        super().wait_event(event)
        mark = self.marks[event]
        if mark in self.queue:
            self._until(mark)

    def _until(self, mark: Callable[[], None] | None) -> None:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        while self.queue:
            work = self.queue.pop(0)
            work()
            if work is mark:
                return

    def read(self, source: int, size: int) -> bytes:
        self.wait()
        return super().read(source, size)


def view(address: int, kind: Any, count: int) -> Any:
    """A numpy array on memory."""
    size = count * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind)


def _append(grid: tuple[int, int, int], table: int, past: int, new: int, tokens: int, capacity: int) -> None:
    steps, batch, entries = grid
    assert steps == tokens
    lengths, counts = view(past, np.int32, batch), view(new, np.int32, batch)
    for source, target, words in view(table, np.int64, 3 * entries).reshape(-1, 3).tolist():
        rows, cache = (view(a, np.int32, batch * n * words).reshape(batch, n, words) for a, n in ((source, tokens), (target, capacity)))
        for b in range(batch):
            cache[b, lengths[b] : lengths[b] + counts[b]] = rows[b, : counts[b]]


def _end(grid: tuple[int, int, int], table: int, logits: int, best: int, where: int, ended: int, past: int, new: int, ids: int, following: int, words: int,
         entries: int, capacity: int, vocabulary: int) -> None:  # fmt: skip
    programs, tokens, batch = grid
    rows = batch * tokens
    assert programs == entries + SPLITS and not view(ended, np.int32, batch).any()
    if entries:
        _append((tokens, batch, entries), table, past, new, tokens, capacity)
    x = view(logits, np.float32, rows * vocabulary).reshape(rows, vocabulary)
    tops, places = (view(a, kind, rows * SPLITS).reshape(rows, SPLITS) for a, kind in ((best, np.float32), (where, np.int32)))
    tops[:], places[:] = -np.inf, 2**31 - 1
    tops[:, 0], places[:, 0] = x.max(axis=1), np.where(np.isfinite(x.max(axis=1)), np.argmax(x, axis=1), -1)
    view(ids, np.int32, rows)[:] = places[:, 0]
    view(following, np.int32 if words == 1 else np.int64, rows)[:] = np.maximum(places[:, 0], 0)
    view(past, np.int32, batch)[:] += view(new, np.int32, batch)


def draft(grid: tuple[int, int, int], text: int, drafted: int, told: int, past: int, new: int, ids: int, words: int, rows: int) -> None:
    """The kernel decode_draft, by lists."""
    assert grid == (1, 1, 1) and 1 <= rows <= STEP_ROWS
    length, count = view(past, np.int32, 1), view(new, np.int32, 1)
    fed, row = int(count[0]), view(ids, np.int32 if words == 1 else np.int64, STEP_ROWS)
    start, picks, bets = int(length[0]) - fed, row[:fed].tolist(), view(drafted, np.int32, STEP_ROWS)
    settled = next((at for at in range(1, fed) if bets[at] != picks[at - 1]), fed)
    known = view(text, np.int32, start + settled + 1)
    known[start + 1 :] = picks[:settled]
    found = likely(known.tolist(), rows - 1)
    row[: 1 + len(found)], bets[: 1 + len(found)] = [picks[settled - 1], *found], [picks[settled - 1], *found]
    length[0], count[0] = start + settled, 1 + len(found)
    view(told, np.int32, 1 + len(found))[:] = [1 + len(found), *found]


def likely(text: list[int], count: int) -> list[int]:
    """What followed the latest of the places in a text where the most tokens, 16 at most, agree with its end; a text that runs out there goes round."""
    best, at = 0, 0
    for place in range(1, len(text)):
        run = next((back for back in range(min(16, place)) if text[place - 1 - back] != text[-1 - back]), min(16, place))
        best, at = (run, place) if run >= max(best, 1) else (best, at)
    return [text[at + i % (len(text) - at)] for i in range(count)] if best else []


def fake_cubins(folder: Path, arch: int = 90) -> Path:
    """A folder like the one that lowering writes, with the decode kernels for one architecture."""
    rows = []
    for name, params, tiles in ((APPEND, 5, {"BLOCK": 512}), (END, 13, {"SPLITS": SPLITS, "BLOCK": 512}), (DRAFT, 8, {"BLOCK": 512})):
        data = name.encode()
        (folder / f"{name}.cubin").write_bytes(data)
        rows.append({"kernel": name, "arch": arch, "dtype": "fp32", "variant": "any", "file": f"{name}.cubin", "sha256": hashlib.sha256(data).hexdigest(),
                     "entry": name, "params": [{}] * (params + 2), "num_warps": 4, "shared": 0, "tiles": tiles})
    (folder / "cubins.json").write_text(json.dumps({"cubins": rows}))
    return folder

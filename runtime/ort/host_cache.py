"""Fixed-capacity caches in host memory, handed to the graph as views: a step moves the new rows and nothing else.

A sequence alone: its rows lie one behind the other, so the view of exact length is contiguous. Several that step together lie `pitch` rows apart at the
beginning of the buffer, and pitch goes through a fixed ladder of buckets, moving the old rows inside the same buffer each time (on average at most a few
rows for each new one). The others stay at home, `capacity` apart: what rests there, and however long it is, costs a step nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import cache_entries, cache_row_shape
from sessa_deploy.errors import UserError

_GRAIN = 64
_GROWTH = 1.25
Array = NDArray[np.generic]


def bucket(rows: int, capacity: int) -> int:
    """The smallest pitch of the ladder (64, 128, 192, ... each about 1.25 times the last, capacity) that holds `rows`."""
    size = _GRAIN
    while size < rows:
        size = max(size + _GRAIN, -int(-size * _GROWTH // _GRAIN) * _GRAIN)
    return min(size, capacity)


class HostCache:
    """All layers' caches of `batch` sequences, `capacity` rows each, in `dtype`. Lengths (B,), by sequence, are the caller's.

    Sequence b lies at place where[b], and who[p] at place p; the first `packed` places are `pitch` rows apart. bytes_moved counts every byte of a row that
    was copied. Memory is reserved at once and touched as it fills.
    """

    def __init__(self, config: SessaConfig, batch: int, capacity: int, dtype: np.dtype) -> None:
        self.batch, self.capacity, self.bytes_moved = batch, capacity, 0
        self.pitch, self.packed = capacity if batch == 1 else 0, 0
        self.where, self.who = np.arange(batch), np.arange(batch)
        self.entries = list(cache_entries(config.n_layers))
        self._shapes = [cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim) for _, field in self.entries]
        self._sizes = [int(np.prod(shape)) for shape in self._shapes]
        try:
            self._flat = [np.zeros(batch * capacity * size, dtype) for size in self._sizes]
        except (MemoryError, ValueError, OverflowError):
            need = batch * capacity * sum(self._sizes) * dtype.itemsize / 2**30
            raise UserError("the caches do not fit into memory", got=f"{need:.1f} GiB for {batch} x {capacity} tokens",
                            fix="lower --capacity or the batch") from None
        self.row_bytes = sum(self._sizes) * dtype.itemsize

    def pack(self, active: NDArray[np.integer], length: NDArray[np.int32]) -> NDArray[np.integer]:
        """Bring several sequences to the first places, at the pitch that they need; their numbers (N,), in the order of `views(0, N)`.

        length: (B,) rows of every sequence that must survive.
        """
        count, need = len(active), int(length[active].max())
        pitch = bucket(need, self.capacity) if need else 0
        inside = self.where[active] < count
        if not inside.all():
            if self.packed and pitch > self.pitch:  # so that each fits into the other's place
                self._arrange(self.packed, pitch, length)
            left = [p for p in range(count) if self.who[p] not in active]
            for sequence, place in zip(active[~inside].tolist(), left, strict=True):
                self._swap(place, int(self.where[sequence]), length)
        if count > self.packed or pitch != self.pitch:
            self._arrange(count, pitch, length)
        return self.who[:count]

    def views(self, first: int, last: int, length: NDArray[np.int32]) -> list[Array]:
        """Contiguous views (last-first, P, ...) of places first..last-1, one an entry; P is the exact length of a single one, else the pitch."""
        count = last - first
        if count > 1 and last > self.packed:
            self._arrange(last, max(self.pitch, bucket(int(length.max()), self.capacity)), length)
        rows, start = int(length[self.who[first]]) if count == 1 else self.pitch, self._at(first)
        return [flat[start * size : (start + count * rows) * size].reshape(count, rows, *shape)
                for flat, size, shape in zip(self._flat, self._sizes, self._shapes, strict=True)]

    def append(self, first: int, length: NDArray[np.int32], new: NDArray[np.int32], rows: Sequence[Array], kept: NDArray[np.int32] | None = None) -> None:
        """Write rows[e][p - first, :new[b]] of every entry e behind the length[b] rows of the sequence b at place p, for the places rows has.

        kept: (B,) rows of each sequence that must survive, where they are not `length`.
        """
        last = first + len(rows[0])
        members = self.who[first:last]
        need = int((length[members] + new[members]).max())
        kept = length if kept is None else kept
        if last - first == 1:
            if first < self.packed and need > self.pitch:
                self._arrange(first, self.pitch if first else 0, kept)  # home, where it does not widen the others' pitch
        elif last > self.packed or need > self.pitch:
            self._arrange(last, max(bucket(need, self.capacity), self.pitch), kept)
        places = [(self._at(p) + int(length[b]), int(new[b])) for p, b in enumerate(members.tolist(), start=first)]
        for flat, size, values in zip(self._flat, self._sizes, rows, strict=True):
            for (start, count), fresh in zip(places, values, strict=True):
                flat[start * size : (start + count) * size] = fresh[:count].reshape(-1)
        self.bytes_moved += int(new[members].sum()) * self.row_bytes

    def copy_row(self, source: int, target: int, length: int, kept: NDArray[np.int32]) -> None:
        """Lay the first `length` rows of one sequence over another's. kept: (B,) rows of each sequence that must survive."""
        if self.where[target] < self.packed and length > self.pitch:
            self._arrange(0, 0, kept)
        start, to = self._at(int(self.where[source])), self._at(int(self.where[target]))
        for flat, size in zip(self._flat, self._sizes, strict=True):
            flat[to * size : (to + length) * size] = flat[start * size : (start + length) * size]
        self.bytes_moved += length * self.row_bytes

    def shrink(self, length: NDArray[np.int32]) -> None:
        """Come back to the pitch that the lengths need, after sequences were reset."""
        if self.packed:
            need = int(length[self.who[: self.packed]].max())
            pitch = bucket(need, self.capacity) if need else 0
            if pitch < self.pitch:
                self._arrange(self.packed if need else 0, pitch, length)

    def rows(self, entry: int, sequence: int, length: int) -> Array:
        """A copy (length, ...) of one sequence's rows of one entry."""
        size, start = self._sizes[entry], self._at(int(self.where[sequence])) * self._sizes[entry]
        return self._flat[entry][start : start + length * size].reshape(length, *self._shapes[entry]).copy()

    def poison(self, length: NDArray[np.int32]) -> None:
        """NaN into everything that is no sequence's valid row."""
        for flat, size in zip(self._flat, self._sizes, strict=True):
            keep = np.zeros(len(flat), dtype=bool)
            for b, rows in enumerate(length):
                start = self._at(int(self.where[b]))
                keep[start * size : (start + int(rows)) * size] = True
            flat[~keep] = np.nan

    def _at(self, place: int) -> int:
        """The first row of a place, in rows from the buffer's beginning."""
        return place * (self.pitch if place < self.packed else self.capacity)

    def _swap(self, one: int, other: int, length: NDArray[np.int32]) -> None:
        """Exchange what lies at two places; each has room for it."""
        a, b = self.who[one], self.who[other]
        counts = (int(length[a]), int(length[b]))
        for flat, size in zip(self._flat, self._sizes, strict=True):
            left, right = flat[self._at(one) * size :], flat[self._at(other) * size :]
            held = left[: counts[0] * size].copy()
            left[: counts[1] * size] = right[: counts[1] * size]
            right[: counts[0] * size] = held
        self.who[[one, other]] = b, a
        self.where[[a, b]] = other, one
        self.bytes_moved += sum(counts) * self.row_bytes

    def _arrange(self, packed: int, pitch: int, length: NDArray[np.int32]) -> None:
        """Move every place's rows to where they lie with `packed` places at `pitch`.

        Places keep their order in both layouts, so that rows that move up, from the last on, and then rows that move down, from the first on, meet none that
        have yet to move.
        """
        old = [self._at(p) for p in range(self.batch)]
        self.packed, self.pitch = packed, pitch
        moves = [(old[p], self._at(p), int(length[self.who[p]])) for p in range(self.batch)]
        moves = [move for move in reversed(moves) if move[1] > move[0]] + [move for move in moves if move[1] < move[0]]
        for flat, size in zip(self._flat, self._sizes, strict=True):
            for start, to, count in moves:
                flat[to * size : (to + count) * size] = flat[start * size : (start + count) * size]  # numpy buffers where the two overlap
        self.bytes_moved += sum(count for _, _, count in moves) * self.row_bytes

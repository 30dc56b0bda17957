"""Fixed-capacity caches in host memory, handed to the graph as views: a step moves the new rows and nothing else.

One sequence: its rows lie one behind the other, so the view of exact length is contiguous. Several: rows lie `pitch` apart, and pitch grows
through a fixed ladder of buckets, moving the old rows inside the same buffer each time (on average at most a few rows for each new one).
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
    """All layers' caches of `batch` sequences, `capacity` rows each, in `dtype`. Lengths are the caller's.

    bytes_moved counts every byte of a row that was copied. Memory is reserved at once and touched as it fills.
    """

    def __init__(self, config: SessaConfig, batch: int, capacity: int, dtype: np.dtype) -> None:
        self.batch, self.capacity, self.bytes_moved = batch, capacity, 0
        self.pitch = capacity if batch == 1 else 0
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

    def views(self, first: int, last: int, length: NDArray[np.int32]) -> list[Array]:
        """Contiguous views (last-first, P, ...) of sequences first..last-1, one an entry; P is the exact length of a single one, else the pitch."""
        count = last - first
        rows = int(length[first]) if count == 1 else self.pitch
        start = first * self.pitch
        return [flat[start * size : (start + count * rows) * size].reshape(count, rows, *shape)
                for flat, size, shape in zip(self._flat, self._sizes, self._shapes, strict=True)]

    def append(self, first: int, length: NDArray[np.int32], new: NDArray[np.int32], rows: Sequence[Array], kept: NDArray[np.int32] | None = None) -> None:
        """Write rows[e][b - first, :new[b]] of every entry e behind the length[b] rows of sequence b, for the sequences rows has.

        kept: (B,) rows of each sequence that must survive, where they are not `length`.
        """
        need = int((length + new).max())
        if need > self.pitch:
            self._spread(bucket(need, self.capacity), length if kept is None else kept)
        for flat, size, values in zip(self._flat, self._sizes, rows, strict=True):
            for b, fresh in enumerate(values, start=first):
                count = int(new[b])
                start = (b * self.pitch + int(length[b])) * size
                flat[start : start + count * size] = fresh[:count].reshape(-1)
        self.bytes_moved += int(new.sum()) * self.row_bytes

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Lay the first `length` rows of one sequence over another's; the source holds as many, so that the pitch does too."""
        for flat, size in zip(self._flat, self._sizes, strict=True):
            start, to = source * self.pitch * size, target * self.pitch * size
            flat[to : to + length * size] = flat[start : start + length * size]
        self.bytes_moved += length * self.row_bytes

    def shrink(self, length: NDArray[np.int32]) -> None:
        """Come back to the pitch that the lengths need, after sequences were reset."""
        need = int(length.max())
        pitch = bucket(need, self.capacity) if need else 0
        if self.batch > 1 and pitch < self.pitch:
            self._spread(pitch, length)

    def rows(self, entry: int, sequence: int, length: int) -> Array:
        """A copy (length, ...) of one sequence's rows of one entry."""
        size, start = self._sizes[entry], sequence * self.pitch * self._sizes[entry]
        return self._flat[entry][start : start + length * size].reshape(length, *self._shapes[entry]).copy()

    def poison(self, length: NDArray[np.int32]) -> None:
        """NaN into everything that is no sequence's valid row."""
        for flat, size in zip(self._flat, self._sizes, strict=True):
            keep = np.zeros(len(flat), dtype=bool)
            for b, rows in enumerate(length):
                keep[b * self.pitch * size : (b * self.pitch + int(rows)) * size] = True
            flat[~keep] = np.nan

    def _spread(self, pitch: int, length: NDArray[np.int32]) -> None:
        """Move every sequence's rows to the new pitch: from the last sequence on when it grows, from the first when it shrinks."""
        order = range(1, self.batch) if pitch < self.pitch else range(self.batch - 1, 0, -1)
        for flat, size in zip(self._flat, self._sizes, strict=True):
            for b in order:
                count = int(length[b]) * size
                if count:
                    old = flat[b * self.pitch * size :][:count]
                    flat[b * pitch * size :][:count] = old  # numpy copies by way of a buffer where the two overlap
        self.bytes_moved += int(length[1:].sum()) * self.row_bytes
        self.pitch = pitch

"""Everything a session keeps on the GPU: caches at full capacity, one step's rows, ids, lengths and logits, and the kernels between them."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import (
    INPUT_IDS,
    LOGITS,
    MAX_WIDTH,
    NEW_LENGTH,
    PAST_LENGTH,
    PRECISIONS,
    STEP_ROWS,
    WIDTH_MULTIPLE,
    cache_entries,
    cache_row_shape,
    new_name,
    past_name,
)
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.device.kernels import APPEND, END, Image

_NAN_WORD = {"fp32": 0x7FC00000, "fp16": 0x7E007E00, "bf16": 0x7FC07FC0}
_WORD, _ALIGNMENT = 4, 16
_TENSOR_ALIGNMENT = 256  # bytes, of an input or output of an engine
_MOST_FRESH = 2 << 30  # bytes of new rows that a step may make
_LEAST_BEHIND = 1 << 20  # bytes of a cache's new rows from which copying them takes longer than telling the engine another address


class Extent(NamedTuple):
    """What a step computes: `tokens` new rows of each of `batch` sequences. row: that sequence alone, on its own rows of the caches; None: all of them.

    behind: the engine lays the new rows of its one sequence right behind so many cached ones; None: into buffers of their own, and `finish` appends them.
    """

    batch: int
    tokens: int
    row: int | None = None
    behind: int | None = None


class Entry:
    """One cache: its graph names, row shape and row size in bytes, and the addresses of the cache (B,P,row) and of the new rows (B,T,row)."""

    def __init__(self, layer: int, field: str, config: SessaConfig, itemsize: int) -> None:
        self.past, self.new = past_name(layer, field), new_name(layer, field)
        self.shape = cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim)
        self.row = int(np.prod(self.shape)) * itemsize
        self.cache = self.fresh = 0


def check_rows(config: SessaConfig, precision: str, engine: str = "TensorRT", fix: str = "use --backend ort") -> None:
    """Raise UserError unless D is within what the kernels hold and every cached row a multiple of 16 bytes, which they rely on.

    engine: what wants them; fix: what runs instead.
    """
    for field in ("k_f", "k_b"):
        row = int(np.prod(cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim))) * PRECISIONS[precision].itemsize
        if row % _ALIGNMENT or (field == "k_b" and (config.d_model % WIDTH_MULTIPLE or config.d_model > MAX_WIDTH)):
            got = f"d_model={config.d_model}, n_kv_heads={config.kv_heads}, {precision}: {field} rows of {row} bytes"
            allowed = f"d_model a multiple of {WIDTH_MULTIPLE} up to {MAX_WIDTH}, cached rows of a multiple of {_ALIGNMENT} bytes"
            raise UserError(f"this model's width does not run in {engine}", got=got, allowed=allowed, fix=fix)  # fmt: skip


def values(raw: bytes, precision: str) -> NDArray[Any]:
    """What the bytes of a cache hold, flat; bfloat16 comes as float32."""
    if precision == "bf16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, PRECISIONS[precision].numpy)


def most_tokens(config: SessaConfig, precision: str, tokens: int) -> int:
    """Tokens, of all sequences together, whose new rows a step may make: `tokens`, or fewer where they would take more than 2 GiB."""
    item = PRECISIONS[precision].itemsize
    row = sum(Entry(layer, field, config, item).row for layer, field in cache_entries(config.n_layers))
    return max(1, min(tokens, _MOST_FRESH // row))


class Buffers:
    """Device and page-locked memory of `batch` sequences of `capacity` rows, steps of at most `chunk` tokens a sequence, batch * chunk of one alone.

    id_dtype: numpy's name of the type the engine takes token ids in. all_logits: the engine gives (B,T,V), not (B,V). cuda: a sessa_deploy.cuda.Cuda.
    kernels: from runtime.device.kernels.images. picked_rows: in steps of at most so many rows, the most likely token after each is found on the device.
    """

    def __init__(self, cuda: Any, config: SessaConfig, precision: str, batch: int, capacity: int, chunk: int, id_dtype: str, kernels: dict[str, Image],
                 all_logits: bool = False) -> None:
        self.cuda, self.config, self.precision = cuda, config, precision
        self.batch, self.capacity, self.chunk = batch, capacity, chunk
        item = PRECISIONS[precision].itemsize
        self.entries = [Entry(layer, field, config, item) for layer, field in cache_entries(config.n_layers)]
        for entry in self.entries:
            entry.cache = cuda.allocate(batch * capacity * entry.row)
            entry.fresh = cuda.allocate(batch * chunk * entry.row)
        self.row_bytes = sum(entry.row for entry in self.entries)
        self.id_type = np.dtype(id_dtype)
        self.id_words = self.id_type.itemsize // _WORD
        self._splits = kernels[END].splits
        # lengths, new_length and ids side by side, so that one copy brings them
        apart = -(-4 * batch // _TENSOR_ALIGNMENT) * _TENSOR_ALIGNMENT
        self._ids_at = 2 * apart
        self.length = cuda.allocate(self._ids_at + batch * chunk * self.id_type.itemsize)
        self.new, self.ids = self.length + apart, self.length + self._ids_at
        self._logits_size = 4 * batch * config.vocab_size * (chunk if all_logits else 1)
        self.logits, self._all_logits = cuda.allocate(self._logits_size), all_logits
        self.picked_rows = min(chunk, STEP_ROWS) if all_logits else 1
        most = batch * self.picked_rows
        self._best, self._where = cuda.allocate(4 * most * self._splits), cuda.allocate(4 * most * self._splits)
        self._ended = cuda.allocate(4 * batch)
        cuda.fill(self._ended, 0, batch)
        self._host_fed = self._host(self._ids_at + batch * chunk * self.id_type.itemsize, np.uint8)
        self._host_length, self._host_new = (self._host_fed[at : at + 4 * batch].view(np.int32) for at in (0, apart))
        self._host_ids, self._host_picked = self._host_fed[self._ids_at :].view(self.id_type), self._host(2 * most, np.int32)
        self._host_moved = self._host(2 * batch, np.int32).reshape(2, batch)
        self._picked_at = (0, most)  # of the two slots, by turns, so that a step that runs does not write over what the one before it picked
        self._over = [cuda.event() for _ in self._picked_at]
        self._host_logits = self._host((most if batch == 1 else batch) * config.vocab_size, np.float32)
        # one table for all sequences, then one for each alone
        tables = self._host(3 * len(self.entries) * (batch + 1), np.int64)
        self._table_size = 24 * len(self.entries)
        self._table = cuda.allocate(tables.nbytes)
        tables[:] = [word for row in (None, *range(batch)) for e in self.entries for word in (e.fresh, self._cache(e, row), e.row // _WORD)]
        cuda.to_device(self._table, tables.ctypes.data, tables.nbytes)
        cuda.wait()
        self.kernels = {name: cuda.kernel(k.data, k.entry, k.warps, k.shared, k.params, k.early) for name, k in kernels.items()}

    def addresses(self, step: Extent) -> dict[str, int]:
        """Graph name -> device address, of every input and output; of a step of one sequence alone its caches'."""
        pasts = {e.past: self._cache(e, step.row) for e in self.entries}
        return {INPUT_IDS: self.ids, PAST_LENGTH: self.length, NEW_LENGTH: self.new, LOGITS: self.logits, **pasts, **self.new_addresses(step)}

    def new_addresses(self, step: Extent) -> dict[str, int]:
        """Graph name -> device address of where a step's new rows go."""
        return {e.new: e.fresh if step.behind is None else self._cache(e, step.row) + step.behind * e.row for e in self.entries}

    def fits_behind(self, step: Extent, length: int, alignment: int) -> bool:
        """Whether a step's new rows may and should be laid right behind the `length` rows of its one sequence: no kernel reads a cache beyond that length, so
        that nothing is read which the step writes. alignment: bytes that the engine asks of an output's address."""
        worth = step.tokens * self.row_bytes >= _LEAST_BEHIND * len(self.entries)
        return step.batch == 1 and worth and length + step.tokens <= self.capacity and all(length * e.row % alignment == 0 for e in self.entries)

    def shapes(self, step: Extent) -> dict[str, tuple[int, ...]]:
        """Graph name -> shape of every input of a step."""
        pasts = {e.past: (step.batch, self.capacity, *e.shape) for e in self.entries}
        return {INPUT_IDS: (step.batch, step.tokens), PAST_LENGTH: (step.batch,), NEW_LENGTH: (step.batch,), **pasts}

    def output_shapes(self, step: Extent) -> dict[str, tuple[int, ...]]:
        """Graph name -> shape of every output of a step."""
        rows = (step.batch, step.tokens) if self._all_logits else (step.batch,)
        return {LOGITS: (*rows, self.config.vocab_size), **{e.new: (step.batch, step.tokens, *e.shape) for e in self.entries}}

    def aligned(self, alignment: int = _TENSOR_ALIGNMENT) -> bool:
        """Whether every sequence's rows of every cache begin at a multiple of `alignment` bytes, as an engine asks of an input of its own."""
        return all(self.capacity * e.row % alignment == 0 for e in self.entries)

    def put(self, ids: NDArray[np.int64], new: NDArray[np.int32], length: NDArray[np.int32]) -> None:
        """Lay ids (N,T), new_length (N,) and lengths (N,) where `feed` takes them from. The step before must be over."""
        self._host_ids[: ids.size] = ids.reshape(-1)
        self._host_new[: len(new)], self._host_length[: len(length)] = new, length

    def feed(self, step: Extent) -> None:
        """Enqueue what was put to the device."""
        self.cuda.to_device(self.length, self._host_fed.ctypes.data, self._ids_at + step.batch * step.tokens * self.id_type.itemsize)

    def set_new(self, new: NDArray[np.int32], slot: int) -> None:
        """Enqueue new_length (B,) to the device, for steps that nothing is fed to. The step of that slot before must be over."""
        self._host_moved[slot] = new
        self.cuda.to_device(self.new, self._host_moved[slot].ctypes.data, 4 * self.batch)

    def finish(self, step: Extent, slot: int = 0) -> None:
        """Enqueue what follows the engine: append new rows that do not lie where they belong, pick the most likely tokens, advance the lengths.

        The kernel writes the tokens to the host's memory itself: a copy of its own would cost a decode step some microseconds. It also lays them where
        the engine takes its ids from, which is what a step of one row each that is fed nothing goes on from. With all logits and more than `picked_rows`
        rows what is picked means nothing. slot: 0 or 1, where the tokens go of a step that another may stand behind; of others always 0.
        """
        ptr, batch, lengths = "ptr", step.batch, (("ptr", self.length), ("ptr", self.new))
        table = ptr, self._table + (0 if step.row is None else (1 + step.row) * self._table_size)
        rows = step.tokens if self._all_logits and step.tokens <= self.picked_rows else 1
        entries = len(self.entries) if step.behind is None else 0
        if entries and rows < step.tokens:  # more rows are appended than picked
            self.cuda.launch(self.kernels[APPEND], (step.tokens, batch, entries), (table, *lengths, ("i32", step.tokens), ("i32", self.capacity)))
            entries = 0
        parts = (ptr, self.logits), (ptr, self._best), (ptr, self._where), (ptr, self._ended)
        ids = (ptr, self._host_picked.ctypes.data + 4 * self._picked_at[slot]), (ptr, self.ids), ("i32", self.id_words)
        sizes = ("i32", entries), ("i32", self.capacity), ("i32", self.config.vocab_size)
        self.cuda.launch(self.kernels[END], (entries + self._splits, rows, batch), (table, *parts, *lengths, *ids, *sizes))

    def mark(self, slot: int) -> None:
        """Enqueue the mark that `picked_in` waits for, behind a step of that slot."""
        self.cuda.record(self._over[slot])

    def picked_in(self, slot: int, rows: int = 1) -> NDArray[np.int64]:
        """Wait for the step that was marked in a slot, and for none behind it; its most likely tokens (B rows,), -1 where the logits were not finite."""
        self.cuda.wait_event(self._over[slot])
        at = self._picked_at[slot]
        return self._host_picked[at : at + self.batch * rows].astype(np.int64)

    def picked(self, tokens: int = 1) -> NDArray[np.int64]:
        """Wait for the step; the most likely tokens (B,T) after each of its `tokens` rows (of a graph without all logits 1: the last of each sequence),
        -1 where the logits were not finite."""
        self.cuda.wait()
        return self._host_picked[: self.batch * tokens].reshape(self.batch, tokens).astype(np.int64)

    def get_logits(self, new: NDArray[np.int32], tokens: int) -> NDArray[np.float32]:
        """Wait for a step of new (N,) among `tokens` rows; the logits (N,V) of each sequence's last."""
        target, row, count = self._host_logits.ctypes.data, 4 * self.config.vocab_size, len(new)
        if not self._all_logits or tokens == 1:
            self.cuda.to_host(target, self.logits, count * row)
        else:
            for b in np.flatnonzero(new).tolist():
                self.cuda.to_host(target + b * row, self.logits + (b * tokens + int(new[b]) - 1) * row, row)
        self.cuda.wait()
        return self._host_logits[: count * self.config.vocab_size].reshape(count, -1).copy()

    def logits_of(self, sequences: list[int]) -> NDArray[np.float32]:
        """Wait for a step of one row each; the logits (N,V) of N of its sequences."""
        target, row = self._host_logits.ctypes.data, 4 * self.config.vocab_size
        for at, sequence in enumerate(sequences):
            self.cuda.to_host(target + at * row, self.logits + sequence * row, row)
        self.cuda.wait()
        return self._host_logits[: len(sequences) * self.config.vocab_size].reshape(len(sequences), -1).copy()

    def every_logits(self, batch: int, tokens: int) -> NDArray[np.float32]:
        """Wait for a step of `tokens` rows of `batch` sequences of an engine with all logits; its logits (batch,tokens,V)."""
        count = batch * tokens * self.config.vocab_size
        if count > len(self._host_logits):
            return np.frombuffer(self.cuda.read(self.logits, 4 * count), np.float32).reshape(batch, tokens, -1)
        self.cuda.to_host(self._host_logits.ctypes.data, self.logits, 4 * count)
        self.cuda.wait()
        return self._host_logits[:count].reshape(batch, tokens, -1).copy()

    def rows(self, sequence: int, length: int) -> dict[str, NDArray[np.generic]]:
        """Copies of one sequence's first `length` rows by graph name; bfloat16 comes as float32."""
        found: dict[str, NDArray[np.generic]] = {}
        for entry in self.entries:
            raw = self.cuda.read(self._cache(entry, sequence), length * entry.row)
            found[entry.past] = values(raw, self.precision).reshape(length, *entry.shape).copy()
        return found

    def copy_rows(self, source: int, target: int, length: int) -> None:
        """Enqueue a copy of the first `length` rows of one sequence's caches over another's."""
        for entry in self.entries:
            size = length * entry.row
            self.cuda.copy(self._cache(entry, target), size, self._cache(entry, source), size, size, 1)

    def poison(self, length: NDArray[np.int32]) -> None:
        """NaN into every cache row at or beyond its sequence's length, and into the new rows and logits of the step before."""
        word = _NAN_WORD[self.precision]
        for entry in self.entries:
            for b, rows in enumerate(length):
                self.cuda.fill(self._cache(entry, b) + int(rows) * entry.row, word, (self.capacity - int(rows)) * entry.row // _WORD)
            self.cuda.fill(entry.fresh, word, self.batch * self.chunk * entry.row // _WORD)
        self.cuda.fill(self.logits, _NAN_WORD["fp32"], self._logits_size // _WORD)

    def _cache(self, entry: Entry, row: int | None) -> int:
        """Address of a cache, or of one sequence's part of it."""
        return entry.cache + (row or 0) * self.capacity * entry.row

    def _host(self, count: int, kind: Any) -> NDArray[Any]:
        return page_locked(self.cuda, count, kind)


def page_locked(cuda: Any, count: int, kind: Any) -> NDArray[Any]:
    """A page-locked array; it lives as long as `cuda`."""
    size = count * np.dtype(kind).itemsize
    memory = (ctypes.c_char * size).from_address(cuda.allocate_host(size))
    return np.frombuffer(memory, kind)

"""Everything a TensorRT session keeps on the GPU: caches at full capacity, one step's rows, ids, lengths and logits, and the kernels between them."""

from __future__ import annotations

import ctypes
from typing import Any

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
    WIDTH_MULTIPLE,
    cache_entries,
    cache_row_shape,
    new_name,
    past_name,
)
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.trt.kernels import APPEND, ARGMAX, FINISH, Image

_NAN_WORD = {"fp32": 0x7FC00000, "fp16": 0x7E007E00, "bf16": 0x7FC07FC0}
_WORD, _ALIGNMENT = 4, 16
_TENSOR_ALIGNMENT = 256  # bytes, of an input or output of an engine


class Entry:
    """One cache: its graph names, row shape and row size in bytes, and the addresses of the cache (B,P,row) and of the new rows (B,T,row)."""

    def __init__(self, layer: int, field: str, config: SessaConfig, itemsize: int) -> None:
        self.past, self.new = past_name(layer, field), new_name(layer, field)
        self.shape = cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim)
        self.row = int(np.prod(self.shape)) * itemsize
        self.cache = self.fresh = 0


def check_rows(config: SessaConfig, precision: str) -> None:
    """Raise UserError unless D is within what the kernels hold and every cached row a multiple of 16 bytes, which they rely on."""
    for field in ("k_f", "k_b"):
        row = int(np.prod(cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim))) * PRECISIONS[precision].itemsize
        if row % _ALIGNMENT or (field == "k_b" and (config.d_model % WIDTH_MULTIPLE or config.d_model > MAX_WIDTH)):
            got = f"d_model={config.d_model}, n_kv_heads={config.kv_heads}, {precision}: {field} rows of {row} bytes"
            allowed = f"d_model a multiple of {WIDTH_MULTIPLE} up to {MAX_WIDTH}, cached rows of a multiple of {_ALIGNMENT} bytes"
            raise UserError("this model's width does not run in TensorRT", got=got, allowed=allowed, fix="use --backend ort")  # fmt: skip


class Buffers:
    """Device and page-locked memory of `batch` sequences of `capacity` rows, steps of at most `chunk` tokens.

    id_dtype: numpy's name of the type the engine takes token ids in. all_logits: the engine
    gives (B,T,V), not (B,V). cuda: a sessa_deploy.cuda.Cuda. kernels: from trt_kernels.images.
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
        self._splits = kernels[ARGMAX].splits
        # new_length and ids side by side, so that one copy brings both
        self._ids_at = -(-4 * batch // _TENSOR_ALIGNMENT) * _TENSOR_ALIGNMENT
        self.new, self.length = cuda.allocate(self._ids_at + batch * chunk * self.id_type.itemsize), cuda.allocate(4 * batch)
        self.ids = self.new + self._ids_at
        self._logits_size = 4 * batch * config.vocab_size * (chunk if all_logits else 1)
        self.logits, self._all_logits = cuda.allocate(self._logits_size), all_logits
        self._best, self._where = cuda.allocate(4 * batch * self._splits), cuda.allocate(4 * batch * self._splits)
        self._table = cuda.allocate(24 * len(self.entries))
        self._host_fed = self._host(self._ids_at + batch * chunk * self.id_type.itemsize, np.uint8)
        self._host_new, self._host_ids = self._host_fed[: 4 * batch].view(np.int32), self._host_fed[self._ids_at :].view(self.id_type)
        self._host_length, self._host_picked = (self._host(batch, np.int32) for _ in range(2))
        self._host_logits = self._host(batch * config.vocab_size, np.float32)
        table = self._host(3 * len(self.entries), np.int64)
        table[:] = [word for e in self.entries for word in (e.fresh, e.cache, e.row // _WORD)]
        cuda.to_device(self._table, table.ctypes.data, table.nbytes)
        cuda.wait()
        self._kernels = {name: cuda.kernel(k.data, k.entry, k.warps, k.shared, k.params) for name, k in kernels.items()}

    def addresses(self) -> dict[str, int]:
        """Graph name -> device address, of every input and output."""
        pairs = {e.past: e.cache for e in self.entries} | {e.new: e.fresh for e in self.entries}
        return {INPUT_IDS: self.ids, PAST_LENGTH: self.length, NEW_LENGTH: self.new, LOGITS: self.logits, **pairs}

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Graph name -> shape of every input of a step over `tokens` tokens."""
        pasts = {e.past: (self.batch, self.capacity, *e.shape) for e in self.entries}
        return {INPUT_IDS: (self.batch, tokens), PAST_LENGTH: (self.batch,), NEW_LENGTH: (self.batch,), **pasts}

    def set_length(self, length: NDArray[np.int32]) -> None:
        """Tell the device the lengths (B,); only needed where they did not come about by steps."""
        self._host_length[:] = length
        self.cuda.to_device(self.length, self._host_length.ctypes.data, 4 * self.batch)

    def put(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> None:
        """Lay ids (B,T) and new_length (B,) where `feed` takes them from. The step before must be over."""
        self._host_ids[: ids.size] = ids.reshape(-1)
        self._host_new[:] = new

    def feed(self, tokens: int) -> None:
        """Enqueue what was put to the device."""
        self.cuda.to_device(self.new, self._host_fed.ctypes.data, self._ids_at + self.batch * tokens * self.id_type.itemsize)

    def finish(self, tokens: int) -> None:
        """Enqueue what follows the engine: append its new rows, pick the most likely tokens, advance the lengths.

        The last kernel writes the tokens to the host's memory itself: a copy of its own would cost a decode step some microseconds.
        """
        ptr = "ptr"
        batch, lengths = self.batch, ((ptr, self.length), (ptr, self.new))
        self.cuda.launch(self._kernels[APPEND], (tokens, batch, len(self.entries)), ((ptr, self._table), *lengths, ("i32", tokens), ("i32", self.capacity)))
        self.cuda.launch(self._kernels[ARGMAX], (batch, self._splits, 1),
                         ((ptr, self.logits), (ptr, self._best), (ptr, self._where), ("i32", self.config.vocab_size)))
        picked = (ptr, self._host_picked.ctypes.data)
        self.cuda.launch(self._kernels[FINISH], (batch, 1, 1), ((ptr, self._best), (ptr, self._where), *lengths, picked))

    def picked(self) -> NDArray[np.int64]:
        """Wait for the step; its most likely tokens (B,), -1 where the logits were not finite."""
        self.cuda.wait()
        return self._host_picked.astype(np.int64)

    def get_logits(self, new: NDArray[np.int32], tokens: int) -> NDArray[np.float32]:
        """Wait for a step of new (B,) among `tokens` rows; the logits (B,V) of each sequence's last."""
        target, row = self._host_logits.ctypes.data, 4 * self.config.vocab_size
        if not self._all_logits or tokens == 1:
            self.cuda.to_host(target, self.logits, self._host_logits.nbytes)
        else:
            for b in np.flatnonzero(new).tolist():
                self.cuda.to_host(target + b * row, self.logits + (b * tokens + int(new[b]) - 1) * row, row)
        self.cuda.wait()
        return self._host_logits.reshape(self.batch, -1).copy()

    def every_logits(self, tokens: int) -> NDArray[np.float32]:
        """Wait for a step of `tokens` rows of an engine with all logits; its logits (B,tokens,V)."""
        raw = self.cuda.read(self.logits, 4 * self.batch * tokens * self.config.vocab_size)
        return np.frombuffer(raw, np.float32).reshape(self.batch, tokens, -1)

    def rows(self, sequence: int, length: int) -> dict[str, NDArray[np.generic]]:
        """Copies of one sequence's first `length` rows by graph name; bfloat16 comes as float32."""
        found: dict[str, NDArray[np.generic]] = {}
        for entry in self.entries:
            raw = self.cuda.read(entry.cache + sequence * self.capacity * entry.row, length * entry.row)
            if self.precision == "bf16":
                flat: NDArray[Any] = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                flat = np.frombuffer(raw, PRECISIONS[self.precision].numpy)
            found[entry.past] = flat.reshape(length, *entry.shape).copy()
        return found

    def poison(self, length: NDArray[np.int32]) -> None:
        """NaN into every cache row at or beyond its sequence's length, and into the new rows and logits of the step before."""
        word = _NAN_WORD[self.precision]
        for entry in self.entries:
            for b, rows in enumerate(length):
                at = (b * self.capacity + int(rows)) * entry.row
                self.cuda.fill(entry.cache + at, word, (self.capacity - int(rows)) * entry.row // _WORD)
            self.cuda.fill(entry.fresh, word, self.batch * self.chunk * entry.row // _WORD)
        self.cuda.fill(self.logits, _NAN_WORD["fp32"], self._logits_size // _WORD)

    def _host(self, count: int, kind: Any) -> NDArray[Any]:
        """A page-locked array; it lives as long as `cuda`."""
        size = count * np.dtype(kind).itemsize
        memory = (ctypes.c_char * size).from_address(self.cuda.allocate_host(size))
        return np.frombuffer(memory, kind)

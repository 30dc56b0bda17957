"""The bundle's own graph in ONNX Runtime: on a CPU with views into host caches, on a GPU with caches that never leave it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.contract import (
    INPUT_IDS,
    NEW_LENGTH,
    PAST_LENGTH,
    PRECISIONS,
    cache_entries,
    graph_outputs,
    past_name,
)
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.ort.device_cache import DeviceCache
from sessa_deploy.runtime.ort.host_cache import HostCache
from sessa_deploy.runtime.ort.session import has_all_logits, open_session
from sessa_deploy.runtime.sampling import last_rows
from sessa_deploy.runtime.sizes import bounded_chunk

_DEVICE_CHUNK = 2048


class OrtBackend(Backend):
    """A bundle's model.onnx in ONNX Runtime, on provider "cpu" or "cuda".

    threads: CPU threads, None for all this process may use, and never more. Raises UserError if ONNX Runtime or the provider is missing, if the precision
    does not run there, or if the graph is not the contract's.
    """

    def __init__(self, bundle: Bundle, batch: int = 1, capacity: int | None = None, provider: str = "cpu", threads: int | None = None) -> None:
        super().__init__(bundle.config, batch, capacity)
        self.name = "ort" if provider == "cpu" else "ort-cuda"
        self.session = open_session(bundle, provider, threads)
        names = [past_name(layer, field) for layer, field in cache_entries(bundle.config.n_layers)]
        self._past, self._outputs = names, graph_outputs(bundle.config.n_layers)
        self._host: HostCache | None = None
        self._device: DeviceCache | None = None
        if provider == "cpu":
            self.turn_chunk = 64  # the demo's 448 tokens take 68 ms of one core, 62 ms in chunks of 128 and 256, 90 ms of 32
            self._host = HostCache(bundle.config, self.batch, self.capacity, np.dtype(PRECISIONS[bundle.precision].numpy))
        else:
            self.best_chunk = _DEVICE_CHUNK
            self._device = DeviceCache(bundle.config, self.batch, self.capacity, bundle.precision, self.session)
        self.all_logits = has_all_logits(self.session)
        if self.all_logits:
            self.best_chunk = bounded_chunk(self.best_chunk, self.batch, self.config.vocab_size)

    def _forward(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        return last_rows(self._run(ids, new), new)

    def _forward_all(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._run(ids, new)

    def _run(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        """One step of the graph; its logits (B,V) or (B,T,V), zero in the sequences that were not computed."""
        if self._device is not None:
            logits = self._device.run(ids, self.length, new)
            self.bytes_moved = self._device.bytes_moved
            return logits
        # Sequences without a new token are not computed.
        host, order = self._own(self._host), np.flatnonzero(new)
        if len(order) == 1:
            first = int(host.where[order[0]])
        else:
            first, order = 0, host.pack(order, self.kept()).copy()
        found = self._together(first, order, ids[order], new)
        if self.batch == 1:
            return found
        logits = np.zeros((self.batch, *found.shape[1:]), np.float32)
        logits[order] = found
        return logits

    def _together(self, first: int, order: NDArray[np.integer], ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        """Run ids (N,T) through the sequences `order` (N,), which lie from place `first` on in the host caches; their logits (N,V) or (N,T,V).

        One alone gets a view of exact length. new: new_length (B,) of all sequences.
        """
        host = self._own(self._host)
        feeds = {INPUT_IDS: ids, PAST_LENGTH: self.length[order], NEW_LENGTH: new[order],
                 **dict(zip(self._past, host.views(first, first + len(order), self.length), strict=True))}
        found, *rows = self.session.run(self._outputs, feeds)
        host.append(first, self.length, new, rows, self.kept())
        self.bytes_moved = host.bytes_moved
        return np.asarray(found, np.float32)

    def _forward_row(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._device is not None:
            return super()._forward_row(row, ids)
        found = self._one(row, ids)
        return found if found.ndim == 1 else found[-1]

    def _forward_row_all(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return super()._forward_row_all(row, ids) if self._device is not None else self._one(row, ids)

    def _one(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (V,) or (T,V) of ids (T,) through one sequence on host caches."""
        new = np.zeros(self.batch, np.int32)
        new[row] = len(ids)
        first = int(self._own(self._host).where[row])
        found: NDArray[np.float32] = self._together(first, np.array([row]), ids[None], new)[0]
        return found

    def _copy_row(self, source: int, target: int, length: int) -> None:
        cache = self._own(self._host or self._device)
        cache.copy_row(source, target, length, *(() if self._host is None else (self.kept(),)))
        self.bytes_moved = cache.bytes_moved

    def reset(self, rows: Any = None) -> None:
        super().reset(rows)
        if self._host is not None:
            self._host.shrink(self.kept())

    def cached(self, row: int) -> dict[str, NDArray[np.generic]]:
        cache = self._own(self._host or self._device)
        return {name: cache.rows(entry, row, int(self.length[row])) for entry, name in enumerate(self._past)}

    def poison(self) -> None:
        self._own(self._host or self._device).poison(self.kept())

    def device_bytes(self) -> int:
        return 0 if self._device is None else self._device.used()

    def close(self) -> None:
        if self._device is not None:
            self._device.close()
        self._host = self._device = self.session = None

    @staticmethod
    def _own(cache: Any) -> Any:
        if cache is None:
            raise UserError("the session is closed", fix="open the bundle again")
        return cache

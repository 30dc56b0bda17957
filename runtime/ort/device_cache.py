"""Caches that stay on the device at full capacity, for ONNX Runtime with I/O binding.

ONNX Runtime alone cannot append in place. With one sequence its outputs are bound straight to the rows behind the past, so no copy exists at all, and
the past is bound as a view of its valid rows, so that a step costs what its context costs, not what the capacity would. With several, the graph reads
the whole capacity and the new rows are copied behind each past on the device.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import INPUT_IDS, LOGITS, NEW_LENGTH, PAST_LENGTH, PRECISIONS, cache_entries, cache_row_shape, new_name, past_name
from sessa_deploy.cuda import Cuda
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.device.buffers import values
from sessa_deploy.runtime.ort.session import element_type

_BITS = {"fp32": ("uint32", 0x7FC00000), "fp16": ("uint16", 0x7E00), "bf16": ("uint16", 0x7FC0)}  # the integer type and its NaN


def _refused(why: str, precision: str, version: str) -> UserError:
    if precision == "bf16" and "numpy type" in why:
        return UserError("this ONNX Runtime cannot hold bfloat16 caches", got=version, allowed="1.20 or later", fix="pip install -U onnxruntime-gpu")
    return UserError("ONNX Runtime cannot hold the caches", got=why[:200], fix="lower --capacity or the batch, or use --backend ort")


class HostMemory:
    """What a DeviceCache asks of a `Cuda`, on memory of this process, for tests without a GPU."""

    def enter(self) -> None: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...

    def memory(self) -> tuple[int, int]:
        return 0, 0

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    def read(self, source: int, size: int) -> bytes:
        return ctypes.string_at(source, size)

    def write(self, target: int, data: bytes) -> None:
        ctypes.memmove(target, data, len(data))


class DeviceCache:
    """All layers' caches (batch, capacity, ...) as OrtValues on `device`, bound to `session` once, and the steps over them.

    bytes_moved counts the bytes of new rows. device "cpu" runs the same code on host memory, for tests.
    """

    def __init__(self, config: SessaConfig, batch: int, capacity: int, precision: str, session: Any, device: str = "cuda") -> None:
        import onnxruntime

        self.batch, self.capacity, self.device, self.bytes_moved = batch, capacity, device, 0
        self._session, self._precision = session, precision
        self.memory: Cuda | HostMemory = Cuda() if device == "cuda" else HostMemory()
        self._binding: Any = session.io_binding()
        item = PRECISIONS[precision].itemsize
        self._kind = element_type(precision)
        self._new, self._shapes, self._row, self._values = [], [], [], []
        self._past = [past_name(layer, field) for layer, field in cache_entries(config.n_layers)]
        for layer, field in cache_entries(config.n_layers):
            shape = cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim)
            try:
                value = onnxruntime.OrtValue.ortvalue_from_shape_and_type([batch, capacity, *shape], self._kind, device, 0)
            except Exception as error:  # its exception classes differ between versions
                self.close()
                raise _refused(str(error), precision, onnxruntime.__version__) from None
            if batch > 1:
                self._binding.bind_ortvalue_input(past_name(layer, field), value)
            self._new.append(new_name(layer, field))
            self._shapes.append(shape)
            self._row.append(int(np.prod(shape)) * item)
            self._values.append(value)

    def run(self, ids: NDArray[np.int64], length: NDArray[np.int32], new: NDArray[np.int32]) -> NDArray[np.float32]:
        """One step over all sequences: logits (B,V), or (B,T,V) of a graph with all of them, and the new rows appended at `length`.

        ids (B,T) with T == max(new).
        """
        binding, tokens = self._binding, ids.shape[1]
        binding.bind_cpu_input(INPUT_IDS, ids)
        binding.bind_cpu_input(PAST_LENGTH, length.copy())
        binding.bind_cpu_input(NEW_LENGTH, new.copy())
        binding.clear_binding_outputs()
        binding.bind_output(LOGITS, "cpu")
        at = int(length[0])
        for past, name, shape, row, value in zip(self._past, self._new, self._shapes, self._row, self._values, strict=True):
            if self.batch == 1:
                # At least one row: no kernel has to cope with an empty tensor. past_length tells the graph that it does not count.
                binding.bind_input(past, self.device, 0, self._kind, [1, max(at, 1), *shape], value.data_ptr())
                binding.bind_output(name, self.device, 0, self._kind, [1, tokens, *shape], value.data_ptr() + at * row)
            else:
                binding.bind_output(name, self.device, 0)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if self.batch > 1:
            self._append(outputs[1:], tokens, length, new)
        self.bytes_moved += int(new.sum()) * sum(self._row)
        return np.array(outputs[0].numpy(), np.float32)

    def _append(self, fresh: list[Any], tokens: int, length: NDArray[np.int32], new: NDArray[np.int32]) -> None:
        self.memory.enter()
        runs = []  # neighbours with equal lengths go in one copy
        for (at, count), group in itertools.groupby(range(self.batch), key=lambda b: (int(length[b]), int(new[b]))):
            members = list(group)
            if count:
                runs.append((members[0], len(members), at, count))
        for value, rows, row in zip(self._values, fresh, self._row, strict=True):
            target, source = value.data_ptr(), rows.data_ptr()
            for first, height, at, count in runs:
                self.memory.copy(target + (first * self.capacity + at) * row, self.capacity * row, source + first * tokens * row, tokens * row,
                                  count * row, height)
        self.memory.wait()

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Lay the first `length` rows of one sequence over another's, on the device."""
        self.memory.enter()
        for value, row in zip(self._values, self._row, strict=True):
            start, pitch = value.data_ptr(), self.capacity * row
            self.memory.copy(start + target * pitch, pitch, start + source * pitch, pitch, length * row, 1)
        self.memory.wait()
        self.bytes_moved += length * sum(self._row)

    def rows(self, entry: int, sequence: int, length: int) -> NDArray[np.generic]:
        """A copy (length, ...) of one sequence's rows of one entry; bfloat16 comes as float32."""
        self.memory.enter()
        row = self._row[entry]
        raw = self.memory.read(self._values[entry].data_ptr() + sequence * self.capacity * row, length * row)
        return values(raw, self._precision).reshape(length, *self._shapes[entry]).copy()

    def overwrite(self, sequence: int, raw: bytes) -> None:
        """Lay `raw` over the first rows of every entry of one sequence, as far as it goes: contents for a benchmark."""
        self.memory.enter()
        for value, row in zip(self._values, self._row, strict=True):
            size = min(len(raw), self.capacity * row) // row * row
            self.memory.write(value.data_ptr() + sequence * self.capacity * row, raw[:size])

    def poison(self, length: NDArray[np.int32]) -> None:
        """NaN into everything that is no sequence's valid row."""
        self.memory.enter()
        kind, nan = _BITS[self._precision]
        for value, row in zip(self._values, self._row, strict=True):
            for b, rows in enumerate(length):
                left = (self.capacity - int(rows)) * row
                self.memory.write(value.data_ptr() + (b * self.capacity + int(rows)) * row, np.full(left // np.dtype(kind).itemsize, nan, kind).tobytes())

    def used(self) -> int:
        """Bytes of the device's memory in use, by every process."""
        self.memory.enter()
        free, total = self.memory.memory()
        return total - free

    def close(self) -> None:
        """Let go of the caches."""
        self._binding = None
        self._values.clear()
        self.memory.close()

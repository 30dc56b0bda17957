"""ONNX Runtime as a backend: on a CPU with views into host caches, on a GPU with caches that never leave it."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.contract import (
    ALL_LOGITS_RANK,
    INPUT_IDS,
    LAST_LOGITS_RANK,
    LOGITS,
    NEW_LENGTH,
    PAST_LENGTH,
    PRECISIONS,
    cache_entries,
    graph_inputs,
    graph_outputs,
    past_name,
)
from sessa_deploy.cuda import devices
from sessa_deploy.errors import UserError, packages_named
from sessa_deploy.runtime.backend import Backend, bounded_chunk, last_rows
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.environment import check_threads, default_threads
from sessa_deploy.runtime.ort.device_cache import DeviceCache
from sessa_deploy.runtime.ort.host_cache import HostCache

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_INT32, _TYPES = "tensor(int32)", {"fp32": "tensor(float)", "fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
_ERRORS_ONLY, _WARNINGS, _FATAL_ONLY = 3, 2, 4
_DEVICE_CHUNK = 2048
# What the CUDA provider loads, what needs another one after it.
_CUDA_LIBRARIES = ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn")
_NUMBERED_AS_CUDA = ("cudart", "nvrtc", "cublasLt", "cublas")


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
        self.all_logits = next(len(x.shape) for x in self.session.get_outputs() if x.name == LOGITS) == ALL_LOGITS_RANK
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


def load() -> Any:
    """The onnxruntime module. Raises UserError with the command that installs it."""
    with packages_named():
        import onnxruntime
    return onnxruntime


def preload(runtime: Any) -> list[str]:
    """Load the CUDA libraries of pip's nvidia packages, wherever on Python's path they are, so that the CUDA provider finds them; their paths.

    Libraries of another CUDA than `runtime` was built for are left alone, and where there are none the system's loader looks for its own.
    """
    major, spec = str(getattr(runtime, "cuda_version", "")).split(".")[0], importlib.util.find_spec("nvidia")
    if not major or spec is None:
        return []
    loaded = []
    for name in _CUDA_LIBRARIES:
        paths = [path for place in spec.submodule_search_locations or () for path in sorted(Path(place).glob(f"*/lib/lib{name}.so.*"))]
        if name in _NUMBERED_AS_CUDA:
            paths = [path for path in paths if path.name == f"lib{name}.so.{major}"]
        # the packages of one CUDA may lie beside those of another
        for path in sorted(paths, key=lambda path: path.parts[-3] != f"cu{major}")[:1]:
            try:
                ctypes.CDLL(str(path))
            except OSError:
                continue  # the provider's own message says what it lacks
            loaded.append(str(path))
    return loaded


def why_no_cuda(runtime: Any) -> str:
    """What the system's loader says of the CUDA provider's library; empty where it says nothing."""
    folder = Path(runtime.__file__).parent / "capi"
    try:
        for name in ("shared", "cuda"):
            ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"), ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return "" if devices() else "no GPU"


def cuda_is_usable() -> bool:
    """Whether ONNX Runtime has its CUDA provider and the driver shows a GPU."""
    return CUDA in load().get_available_providers() and bool(devices())


def open_session(bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> Any:
    """An onnxruntime.InferenceSession on the bundle's graph, checked against the contract. Raises UserError as OrtBackend does."""
    threads = check_threads(threads)
    if provider == "cpu" and bundle.precision == "bf16":
        raise UserError("a bf16 bundle does not run on a CPU", got=str(bundle.path), allowed="fp32 or fp16 on a CPU; bf16 with ort-cuda or trt",
                        fix="sessa-deploy export CHECKPOINT --out BUNDLE --precision fp32")
    runtime = load()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Threads that spin fight whatever else runs: a step of the demo on two busy cores took 16 ms with and 4.7 ms without, at best 2.6 and 2.0 ms.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False  # it would keep one plan for each length of the past
    providers: list[Any] = [CPU]
    if provider == "cuda":
        preload(runtime)
        if CUDA not in runtime.get_available_providers():
            raise UserError("this ONNX Runtime has no CUDA provider", got=", ".join(runtime.get_available_providers()),
                            fix="pip uninstall onnxruntime; pip install onnxruntime-gpu (Python 3.10: onnxruntime-gpu==1.23.2), or use --backend ort")
        providers.insert(0, (CUDA, {"use_tf32": "0"}))  # fp32 means fp32
        runtime.set_default_logger_severity(_FATAL_ONLY)  # a provider that does not start would write pages; the error below says why
    try:
        session = runtime.InferenceSession(str(bundle.model), options, providers=providers)
    except Exception as error:  # its exception classes differ between versions and derive from nothing in common
        raise UserError("ONNX Runtime cannot load the graph", got=str(error)[:300], fix=bundle.export_hint()) from None
    finally:
        if provider == "cuda":
            runtime.set_default_logger_severity(_WARNINGS)  # its default
    bundle.require_unchanged()  # what was checked is what was loaded
    if provider == "cuda" and CUDA not in session.get_providers():
        cuda = getattr(runtime, "cuda_version", "")
        raise UserError("the CUDA provider of ONNX Runtime did not start", got=why_no_cuda(runtime) or ", ".join(session.get_providers()),
                        fix=f"install the CUDA{f' {cuda}' if cuda else ''} and cuDNN it was built for (sessa-deploy doctor), or use --backend ort")
    _check_graph(bundle, session.get_inputs(), session.get_outputs())
    return session


def _check_graph(bundle: Bundle, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    layers, storage = bundle.config.n_layers, _TYPES[bundle.precision]
    expected = dict.fromkeys(graph_inputs(layers), storage) | {INPUT_IDS: "tensor(int64)", PAST_LENGTH: _INT32, NEW_LENGTH: _INT32}
    found = {value.name: value.type for value in inputs}
    wrong = [f"{n}: {found.get(n, 'absent')}" for n in sorted({*expected, *found}) if expected.get(n) != found.get(n)]
    names = {value.name: value for value in outputs}
    wrong += [f"{n}: absent" for n in graph_outputs(layers) if n not in names]
    if LOGITS in names and len(names[LOGITS].shape) not in (LAST_LOGITS_RANK, ALL_LOGITS_RANK):
        wrong.append(f"{LOGITS}: {len(names[LOGITS].shape)} dimensions")
    if wrong:
        raise UserError("the graph's inputs and outputs are not what the manifest's config says", got="; ".join(wrong[:5]),
                        fix=bundle.export_hint())

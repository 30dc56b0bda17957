"""ONNX Runtime on CUDA with our kernels: the graph that `build --for ort` prepared, run by libsessa_ort.so, in a session of runtime/device.

ONNX Runtime launches on a stream of ours and does not wait, so that what follows a step is enqueued right behind it, and a decode step is captured whole,
append, argmax and advance with it. It captures nothing itself (gpu_graph_id -1), but is told that somebody will (enable_cuda_graph): it then refuses, when
the session is made, a graph in which anything crosses between CPU and GPU. What keeps the addresses in a captured graph valid: caches, rows, ids, lengths and
logits are the session's own; weights stay where they were loaded; and scratch lies in ONNX Runtime's arena, which grows but gives nothing back while the
session lives. A prefill between two replays may use the same scratch, and the stream keeps them apart. The arena has what a step needs before it is
captured, as the same step has run before.
"""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from sessa_deploy.contract import INPUT_IDS, LOGITS, NEW_LENGTH, ORT_API, ORT_ENGINE, PAST_LENGTH, PRECISIONS, STEP_ROWS
from sessa_deploy.cuda import Cuda, devices
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.plugins import library
from sessa_deploy.process import command
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.device.backend import DeviceBackend
from sessa_deploy.runtime.device.buffers import Buffers, Extent, check_rows, most_tokens
from sessa_deploy.runtime.device.kernels import images
from sessa_deploy.runtime.ort import prepared as ort_prepared
from sessa_deploy.runtime.ort.session import element_type, has_all_logits, load, preload, session_options, start
from sessa_deploy.runtime.sizes import bounded_chunk

_BUILD = library.build_command(None, ORT_ENGINE)
_UPGRADE = "pip install -U onnxruntime-gpu"
_STEP_TOKENS = 8192  # of all sequences together
_MOST_BINDINGS = 64
_RUN = {"disable_synchronize_execution_providers": "1", "gpu_graph_id": "-1"}
_SILENT = 4  # what fails is said by an error of ours, or by a note
_SESSION = {
    "session.use_device_allocator_for_initializers": "1",  # out of the arena, which doubles as it grows
}


class OrtCudaBackend(DeviceBackend):
    """A bundle's graph on the first GPU, by ONNX Runtime and libsessa_ort.so.

    graph: replay steps of few rows as CUDA graphs; False enqueues them one by one, for comparison. plugin: path of the library, found by itself by default.
    kernels: where the decode kernels come from, that library by default. `seconds`: what opening took, by its parts. Raises UserError if ONNX Runtime, its
    CUDA provider, the library or the prepared graph is missing or does not fit, and if the caches do not fit into the GPU's memory.
    """

    name = "ort-cuda"
    engine_name = "ONNX Runtime"
    recorded_tokens = STEP_ROWS
    warm_runs = 2  # the arena finds its chunks in the first, and has them in the second

    def __init__(self, bundle: Bundle, batch: int = 1, capacity: int | None = None, graph: bool = True, plugin: Path | None = None,
                 kernels: Path | None = None, cuda: Any = None) -> None:
        super().__init__(bundle.config, batch, capacity, graph)
        self.seconds: dict[str, float] = {}
        self._weights: dict[str, Any] = {}
        self._bindings: dict[Extent, tuple[Any, int | None]] = {}  # step -> its binding, and what its new rows lie behind there
        self._clock = time.perf_counter()
        self._runtime = load()
        _check_version(self._runtime)
        bundle.require_engine_weights("the library for ONNX Runtime")
        check_rows(bundle.config, bundle.precision, "ONNX Runtime with our kernels")
        found = ort_prepared.find(bundle)
        if found is None:
            raise UserError("the bundle has no graph prepared for ONNX Runtime", got=str(bundle.path), fix=_prepare_command(bundle))
        plugin = plugin or library.find(product=ORT_ENGINE)
        self._told("ONNX Runtime imported")
        preload(self._runtime)
        self._told("CUDA's libraries loaded")
        self._cuda = Cuda() if cuda is None else cuda
        with self._opening(self._cuda):
            self._cuda.enter()
            bundle.require_engine_weights("the library for ONNX Runtime", [self._cuda.arch])
            binaries = images(kernels or plugin, self._cuda.arch, _BUILD)
            self._told("GPU opened")
            self.session = self._open(bundle, found, plugin)
            self._told("session made")
            self.all_logits = has_all_logits(self.session)
            self.best_chunk = max(1, min(self.capacity, most_tokens(bundle.config, bundle.precision, _STEP_TOKENS) // self.batch))
            if self.all_logits:
                self.best_chunk = bounded_chunk(self.best_chunk, self.batch, self.config.vocab_size)
            self._buffers = Buffers(self._cuda, bundle.config, bundle.precision, self.batch, self.capacity, self.best_chunk, "int64", binaries,
                                    self.all_logits)  # fmt: skip
        self._told("memory reserved")
        self._kind = element_type(bundle.precision)
        self._options = self._runtime.RunOptions()
        for key, value in _RUN.items():
            self._options.add_run_config_entry(key, value)

    def _run(self, step: Extent) -> None:
        binding = self._bind(step)
        try:
            self.session.run_with_iobinding(binding, self._options)
        except Exception as error:  # its exception classes differ between versions
            raise self._failure(step, str(error)) from None

    def _bind(self, step: Extent) -> Any:
        """The step's inputs and outputs, by address; the latest few are kept."""
        buffers, key = self._own(), step._replace(behind=None)
        binding, behind = self._bindings.get(key, (None, None))
        if binding is not None and behind == step.behind:
            return binding
        self._bindings.pop(key, None)  # nobody's, should that fail halfway
        kinds = {INPUT_IDS: np.int64, PAST_LENGTH: np.int32, NEW_LENGTH: np.int32, LOGITS: np.float32}
        shapes = buffers.output_shapes(step)
        if binding is None:
            binding, addresses = self.session.io_binding(), buffers.addresses(step)
            for name, shape in buffers.shapes(step).items():
                binding.bind_input(name, "cuda", 0, kinds.get(name, self._kind), list(shape), addresses[name])
        else:
            addresses = buffers.new_addresses(step)
        for name in shapes.keys() & addresses.keys():
            binding.bind_output(name, "cuda", 0, kinds.get(name, self._kind), list(shapes[name]), addresses[name])
        while len(self._bindings) >= _MOST_BINDINGS:
            del self._bindings[next(iter(self._bindings))]
        self._bindings[key] = binding, step.behind
        return binding

    def _row_chunk(self) -> int:
        return self.batch * self._own().chunk  # the room that all sequences' new rows have

    def _release(self) -> None:
        self._bindings.clear()
        self.session = None
        self._weights = {}

    def _open(self, bundle: Bundle, found: ort_prepared.Prepared, plugin: Path) -> Any:
        """The session on the prepared graph; without leave to capture where ONNX Runtime sees that it cannot be."""
        options = session_options(self._runtime, 1)  # nothing is computed on the CPU but a few shapes
        options.log_severity_level = _SILENT
        options.use_deterministic_compute = True
        for key, value in _SESSION.items():
            options.add_session_config_entry(key, value)
        library.register(options, plugin)
        # Mapped from the bundle's files, and kept mapped: whether a session still looks at them is its own affair.
        kinds, arrays = {w.name: w.onnx_type for w in found.weights}, ort_prepared.weights(bundle, found)
        self._weights = {name: self._value(array, kinds[name]) for name, array in arrays.items()}
        if self._weights:
            options.add_external_initializers(list(self._weights), list(self._weights.values()))
        cuda, fix = {"user_compute_stream": str(self._cuda.stream)}, f"{_prepare_command(bundle)} --force"
        try:
            return start(bundle, self._runtime, found.model, options, {**cuda, "enable_cuda_graph": str(int(self._use_graph))}, fix)
        except UserError as error:
            if not self._use_graph or "graph capture" not in str(error).lower():
                raise
            self._record_no_more(str(error.got))
            return start(bundle, self._runtime, found.model, options, cuda, fix)

    def _value(self, array: Any, onnx_type: int) -> Any:
        make = self._runtime.OrtValue
        if onnx_type != PRECISIONS["bf16"].onnx:
            return make.ortvalue_from_numpy(array)
        if not hasattr(make, "ortvalue_from_numpy_with_onnx_type"):
            raise UserError("this ONNX Runtime takes no bfloat16 weights", got=self._runtime.__version__, allowed="1.20 or later", fix=_UPGRADE)
        return make.ortvalue_from_numpy_with_onnx_type(array, onnx_type)

    def _failure(self, step: Extent, why: str) -> SessaError:
        what = f"ONNX Runtime refused a step of {step.batch} x {step.tokens} tokens: {' '.join(why.split())[:300]}"
        full = "allocate" in why.lower() or "out of memory" in why.lower()
        mend = "lower --capacity, the batch or --chunk" if full else "sessa-deploy build BUNDLE --for ort --force"
        return SessaError(f"{what}; fix: {mend}, or use --backend ort")

    def _told(self, part: str) -> None:
        """Keep the seconds since the last part."""
        now = time.perf_counter()
        self.seconds[part], self._clock = now - self._clock, now


def _prepare_command(bundle: Bundle) -> str:
    return command("build", bundle.path, "--for", ORT_ENGINE)


def _check_version(runtime: Any) -> None:
    """Raise UserError where ONNX Runtime is too old for the library."""
    found = re.match(r"(\d+)\.(\d+)", str(runtime.__version__))
    if found and (int(found[1]), int(found[2])) < (1, ORT_API):
        raise UserError("this ONNX Runtime is too old for our kernels", got=runtime.__version__, allowed=f"1.{ORT_API} or later", fix=_UPGRADE)


def obstacle(bundle: Bundle) -> str | None:
    """Why a bundle's plain graph runs here where our kernels could run, as one line with the command that changes it; None where they run.

    Only to be asked where ONNX Runtime has its CUDA provider and there is a GPU. Raises UserError on a prepared graph that is damaged or not this bundle's.
    """
    slow, absent = "ONNX Runtime runs the bundle's plain graph, without our kernels and many times slower", []
    try:
        _check_version(load())
        arch = int(devices()[0].arch.removeprefix("sm_"))  # the first GPU's
        bundle.require_engine_weights("the library", [arch])
        check_rows(bundle.config, bundle.precision, "our kernels")
    except UserError as error:
        fast = f"; fast with: {error.fix}" if bundle.weights is not None else ""
        return f"{slow}: {error.what} (got {error.got}{f'; allowed: {error.allowed}' if error.allowed else ''}){fast}"
    try:
        path = library.find(product=ORT_ENGINE)
        images(path, arch, _BUILD)
    except UserError as error:
        absent.append((error.what, error.fix))
    if ort_prepared.find(bundle) is None:
        absent.append(("no prepared graph in the bundle", _prepare_command(bundle)))
    if not absent:
        return None
    return f"{slow}: {' and '.join(what for what, _ in absent)}; fast with: {'; then '.join(str(fix) for _, fix in absent)}"


def kernels(bundle: Bundle) -> str:
    """Which library and which prepared graph run a bundle here, where `obstacle` sees none."""
    path, found = library.find(product=ORT_ENGINE), ort_prepared.find(bundle)
    return f"{path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}) on {found.folder if found else 'no prepared graph'}"

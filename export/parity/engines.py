"""The engines that parity can drive, by name. Each opener imports its engine only when it is called; none imports torch.

A new backend becomes a rung by its name in OPENERS and in runtime.engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata

import numpy as np

from sessa_deploy.contract import ALL_LOGITS_RANK, LOGITS, graph_outputs
from sessa_deploy.errors import UserError, need
from sessa_deploy.export.parity.drive import Engine, GraphStep, Tensors
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.bundle import Bundle

KERNELS = "kernels"  # among an engine's versions: whose kernels ran, where that is not plain from its name
_ROOM = 264  # smallest capacity opened where the context allows it, so that most cases share one backend


class BackendSession:
    """A runtime backend as a SessionRunner (see drive.py). open_backend: (batch, capacity) -> Backend; max_context: of the model."""

    def __init__(self, open_backend: Callable[[int, int], Backend], max_context: int = _ROOM) -> None:
        self._open, self._room = open_backend, min(_ROOM, max_context)
        self._backend: Backend | None = None
        self._poison = False

    @property
    def backend(self) -> Backend:
        """The backend in use; RuntimeError before `begin`."""
        if self._backend is None:
            raise RuntimeError("begin comes first")
        return self._backend

    def begin(self, batch: int, capacity: int, poison: bool) -> None:
        if self._backend is None or self._backend.batch != batch or self._backend.capacity < capacity:
            if self._backend is not None:
                self._backend.close()
            self._backend = self._open(batch, max(capacity, self._room))
        self._backend.reset()
        self._poison = poison

    def step(self, input_ids: np.ndarray, new_length: np.ndarray) -> np.ndarray:
        if self._poison:
            self.backend.poison()
        return np.asarray(self.backend.step(input_ids, new_length))

    def step_all(self, input_ids: np.ndarray, new_length: np.ndarray) -> np.ndarray:
        if self._poison:
            self.backend.poison()
        return np.asarray(self.backend.step_all(input_ids, new_length))

    def step_greedy(self, input_ids: np.ndarray, new_length: np.ndarray) -> np.ndarray:
        if self._poison:
            self.backend.poison()
        return np.asarray(self.backend.step_greedy(input_ids, new_length))

    def rows(self, sequence: int) -> dict[str, np.ndarray]:
        return {name: np.asarray(x) for name, x in self.backend.cached(sequence).items()}


def _session(bundle: Bundle, name: str, threads: int) -> BackendSession:
    from sessa_deploy.runtime.engines import open_backend

    return BackendSession(lambda batch, capacity: open_backend(bundle, name, batch, capacity, threads), bundle.config.max_context)


def _ort_graph(bundle: Bundle, provider: str, threads: int) -> GraphStep:
    from sessa_deploy.runtime.ort.session import open_session

    session, names = open_session(bundle, provider, threads), graph_outputs(bundle.config.n_layers)

    def step(feeds: Tensors) -> Tensors:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return step


def open_ort(bundle: Bundle, threads: int) -> Engine:
    """ONNX Runtime on a CPU: the graph itself, and the runtime's backend with its own caches."""
    return Engine(_ort_graph(bundle, "cpu", threads), _session(bundle, "ort", threads), _versions("onnxruntime"))


def open_ort_cuda(bundle: Bundle, threads: int) -> Engine:
    """ONNX Runtime on a GPU: model.onnx itself, and the backend, which takes our library's kernels and the prepared graph where they are found. `kernels`
    among the versions says whose ran in the sessions; those of the library also without the CUDA graph.

    numpy has no bfloat16 to feed the graph with, so bf16 is driven through the backend only.
    """
    from sessa_deploy.runtime.ort import engine
    from sessa_deploy.runtime.ort.session import cuda_is_usable

    graph = None if bundle.precision == "bf16" else _ort_graph(bundle, "cuda", threads)
    why = engine.obstacle(bundle) if cuda_is_usable() else None  # without a GPU opening the session says what is missing
    eager = None
    if why is None:
        eager = BackendSession(lambda batch, capacity: engine.OrtCudaBackend(bundle, batch, capacity, graph=False), bundle.config.max_context)
    versions = {**_versions("onnxruntime-gpu", "onnxruntime"), KERNELS: engine.kernels(bundle) if why is None else f"ONNX Runtime's own ({why})"}
    return Engine(graph, _session(bundle, "ort-cuda", threads), versions, eager)


def open_trt(bundle: Bundle, threads: int) -> Engine:
    """TensorRT, through the backend only: its engines are built for caches of fixed capacity. Decode steps also without the CUDA graph."""

    def eager(batch: int, capacity: int) -> Backend:
        from sessa_deploy.runtime.trt.backend import TrtBackend

        return TrtBackend(bundle, batch, capacity, graph=False)

    from sessa_deploy.runtime.trt import api as trt_api
    from sessa_deploy.runtime.trt.backend import product_here
    from sessa_deploy.runtime.trt.plan import engines

    product = product_here(bundle)
    smallest = min((info.max_batch for info in engines(bundle).values() if info.product == product.name), default=None)
    versions = {**_versions(), product.modules[0]: str(trt_api.load(product.name).__version__)}
    return Engine(None, _session(bundle, "trt", threads), versions, BackendSession(eager, bundle.config.max_context), smallest)


OPENERS: dict[str, Callable[[Bundle, int], Engine]] = {"ort": open_ort, "ort-cuda": open_ort_cuda, "trt": open_trt}
ENGINE_RUNGS = tuple(OPENERS)


def check_engine(rung: str, bundle: Bundle) -> None:
    """Raise UserError where an engine cannot run this bundle's precision at all."""
    if rung not in OPENERS:
        raise UserError("no such backend", got=rung, allowed=", ".join(("auto", *ENGINE_RUNGS)))
    if rung == "trt":
        bundle.require_engine_weights("a TensorRT engine")
    if rung == "ort" and bundle.precision == "bf16":
        raise UserError("a bf16 bundle cannot be validated on a CPU", got=bundle.path.name, allowed="fp32 or fp16 on a CPU; bf16 with ort-cuda or trt",
                        fix="sessa-deploy export CHECKPOINT --out BUNDLE --precision fp32")


def open_engine(rung: str, bundle: Bundle, threads: int) -> Engine:
    """The engine behind a rung's name. Raises UserError if it is not known or cannot be used here."""
    check_engine(rung, bundle)
    return OPENERS[rung](bundle, threads)


def has_all_logits(bundle: Bundle) -> bool:
    """Whether the graph gives the logits of every token; False too where onnx is not installed, and then only each step's last are judged."""
    try:
        import onnx
    except ImportError:
        return False
    outputs = onnx.load(str(bundle.model), load_external_data=False).graph.output
    return any(x.name == LOGITS and len(x.type.tensor_type.shape.dim) == ALL_LOGITS_RANK for x in outputs)


def _versions(*distributions: str) -> dict[str, str]:
    found = {"numpy": np.__version__}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def resolve_backends(wanted: Sequence[str], bundle: Bundle) -> list[str]:
    """The engines' rungs for a list of backend names; "auto" is what the runtime would choose here.

    Raises UserError on a name or a precision that does not fit.
    """
    from sessa_deploy.runtime.engines import choose, trt_installed

    names = []
    for name in wanted:
        if name == "auto":
            name = choose(bundle)
        check_engine(name, bundle)
        if name != "trt" or not trt_installed():
            need("tensorrt" if name == "trt" else "onnxruntime")
        names.append(name)
    return list(dict.fromkeys(names))

"""Which engine runs a bundle: names of the backends, and the choice that "auto" makes. Each engine library is imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any

from sessa_deploy.errors import MissingPackage, UserError, install_command
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.environment import check_threads, importable
from sessa_deploy.runtime.report import note

BACKENDS = ("auto", "ort", "ort-cuda", "trt")
ON_A_GPU = ("ort-cuda", "trt")
DEFAULT_SLOTS = 8  # where the engine leaves the choice


def open_backend(bundle: Bundle, name: str = "auto", batch: int = 1, capacity: int | None = None, threads: int | None = None) -> Backend:
    """Open a bundle on a backend. Raises UserError naming what is missing and the command that installs it."""
    if name not in BACKENDS:
        raise UserError("no such backend", got=repr(name), allowed=", ".join(BACKENDS))
    threads = check_threads(threads)
    if name == "auto":
        name = choose(bundle)
    if name == "trt":
        bundle.require_engine_weights("a TensorRT engine")
        return _trt().TrtBackend(bundle, batch=batch, capacity=capacity)  # type: ignore[no-any-return]
    from sessa_deploy.runtime.ort.backend import OrtBackend

    if name == "ort-cuda":
        from sessa_deploy.runtime.ort import engine
        from sessa_deploy.runtime.ort.session import cuda_is_usable

        if cuda_is_usable():  # else the plain graph's session says what is missing
            why = engine.obstacle(bundle)
            if why is None:
                return engine.OrtCudaBackend(bundle, batch=batch, capacity=capacity)
            note(why)
    return OrtBackend(bundle, batch=batch, capacity=capacity, provider="cuda" if name == "ort-cuda" else "cpu", threads=threads)


def choose(bundle: Bundle) -> str:
    """What "auto" means here: TensorRT if the bundle has engines of one that is installed, ONNX Runtime on a GPU if it can use one, else on the CPU."""
    if importable("sessa_deploy.runtime.trt.backend"):
        from sessa_deploy.runtime.trt import api, plan

        if any(api.importable(p) for p in api.PRODUCTS if p.name in plan.products(bundle)):
            return "trt"
    from sessa_deploy.runtime.ort.session import cuda_is_usable

    return "ort-cuda" if cuda_is_usable() else "ort"


def trt_installed() -> bool:
    """Whether Python would find any TensorRT. Imports none."""
    from sessa_deploy.runtime.trt import api

    return any(api.importable(p) for p in api.PRODUCTS)


def _trt() -> Any:
    if not importable("sessa_deploy.runtime.trt.backend"):
        raise UserError("this version has no TensorRT backend", got="backend trt", allowed="auto, ort, ort-cuda", fix="use --backend ort")
    if not trt_installed():
        raise MissingPackage("TensorRT is not installed", got="backend trt", fix=f"{install_command('tensorrt')}, or use --backend ort")
    return importlib.import_module("sessa_deploy.runtime.trt.backend")


def most_sequences(bundle: Bundle, name: str) -> int | None:
    """Sequences that the bundle's engines take at once on a backend ("auto": the one it would choose); None where any number goes."""
    if (choose(bundle) if name == "auto" else name) != "trt":
        return None
    from sessa_deploy.runtime.trt.plan import engines

    return min((info.max_batch for info in engines(bundle).values()), default=None)


def open_slots(bundle: Bundle, name: str = "auto", slots: int | None = None, capacity: int | None = None, threads: int | None = None) -> Backend:
    """Open a bundle to serve: as many sequences as are asked for, else as the engine takes, else 8. Raises UserError as `open_backend` does."""
    return open_backend(bundle, name, slots or most_sequences(bundle, name) or DEFAULT_SLOTS, capacity, threads)

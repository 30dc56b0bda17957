"""ONNX Runtime's CUDA provider on host memory, beside the driver of fake_cuda.py: an onnxruntime module whose CUDA sessions run the bundle's plain graph by
the real CPU provider, bound to the very addresses that the real CUDA provider would be given."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from fake_cuda import HostCuda, fake_cubins

from sessa_deploy.cuda import Device
from sessa_deploy.plugins import library
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.device import kernels
from sessa_deploy.runtime.ort import engine, prepared

BATCH, CAPACITY = 3, 48
CUDA = "CUDAExecutionProvider"
NO_CAPTURE = "This session cannot use the graph capture feature as requested by the user as the model has Memcpy nodes"


class Options:
    """SessionOptions, as far as ours are asked of it."""

    intra_op_num_threads = inter_op_num_threads = log_severity_level = 0
    enable_mem_pattern, use_deterministic_compute = True, False

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.libraries: list[str] = []
        self.initializers: dict[str, Any] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def register_custom_ops_library(self, path: str) -> None:
        if not Path(path).is_file():
            raise RuntimeError(f"Failed to load library {path}")
        self.libraries.append(path)

    def add_external_initializers(self, names: list[str], values: list[Any]) -> None:
        self.initializers |= dict(zip(names, values, strict=True))


class Binding:
    """An IOBinding whose device is host memory."""

    def __init__(self, session: Session) -> None:
        self.real, self.bound = session.real.io_binding(), {}

    def bind_input(self, name: str, device: str, index: int, kind: Any, shape: list[int], address: int) -> None:
        self._note(name, device, index, shape, address)
        self.real.bind_input(name, "cpu", 0, kind, shape, address)

    def bind_output(self, name: str, device: str, index: int, kind: Any, shape: list[int], address: int) -> None:
        self._note(name, device, index, shape, address)
        self.real.bind_output(name, "cpu", 0, kind, shape, address)

    def _note(self, name: str, device: str, index: int, shape: list[int], address: int) -> None:
        assert (device, index) == ("cuda", 0) and address % 16 == 0
        self.bound[name] = (address, shape)


class Session:
    """An InferenceSession with the CUDA provider."""

    def __init__(self, module: Any, model: str, options: Options, providers: list[Any]) -> None:
        self.module, self.options, self.model = module, options, model
        self.cuda_options = dict(providers[0][1])
        assert providers[0][0] == CUDA and self.cuda_options["user_compute_stream"] == str(HostCuda.stream) and self.cuda_options["use_tf32"] == "0"
        if module.refused is not None:
            raise RuntimeError(module.refused)
        if module.memcpy and self.cuda_options.get("enable_cuda_graph") == "1":
            raise RuntimeError(NO_CAPTURE)
        plain = onnxruntime.SessionOptions()
        plain.intra_op_num_threads = 1
        self.real = onnxruntime.InferenceSession(str(module.plain), plain, providers=["CPUExecutionProvider"])
        self.runs: list[dict[str, Any]] = []
        module.sessions.append(self)

    def get_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        for key, value in {"disable_synchronize_execution_providers": "1", "gpu_graph_id": "-1"}.items():
            assert options.get_run_config_entry(key) == value
        if self.module.failing is not None:
            raise RuntimeError(self.module.failing)
        if self.module.cuda.recording is not None and self.module.uncapturable:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        self.runs.append(dict(binding.bound))
        self.module.cuda.do(lambda: self.real.run_with_iobinding(binding.real))


def install(patch: pytest.MonkeyPatch, folder: Path, cuda: Callable[[], HostCuda] = HostCuda) -> Path:
    """A GPU of compute capability 9.0, the library for it in `folder`, and a prepared graph in every bundle; returns the library's path."""
    plugin, cubins = folder / library.ORT_LIBRARY, folder / "cubins"
    cubins.mkdir(exist_ok=True)
    fake_cubins(cubins)
    plugin.write_bytes(b"library")
    patch.setattr(library, "check", lambda path=None, major=None, product="tensorrt": None)
    patch.setattr(library, "find", lambda major=None, product="tensorrt": plugin)
    patch.setattr(prepared, "find", described)
    patch.setattr(engine, "images", lambda path, arch, build: kernels.images(cubins, arch, build))
    patch.setattr(engine, "Cuda", cuda)
    patch.setattr(engine, "devices", lambda: [Device(0, "Fake", "sm_90", 1 << 34)])
    patch.setattr("sessa_deploy.runtime.ort.session.cuda_is_usable", lambda: True)
    return plugin


def make(cuda: HostCuda, plain: Path, version: str = "1.31.1") -> Any:
    """An onnxruntime module of `version` whose sessions run `plain` where `cuda` is.

    Set on it: refused, why sessions cannot be made; memcpy, whether the graph cannot be captured and ONNX Runtime sees it; uncapturable, whether it cannot
    and ONNX Runtime does not; failing, why runs fail.
    """
    module: Any = types.SimpleNamespace(cuda=cuda, plain=plain, __version__=version, sessions=[], refused=None, memcpy=False, uncapturable=False, failing=None)
    module.SessionOptions, module.RunOptions, module.OrtValue = Options, onnxruntime.RunOptions, onnxruntime.OrtValue
    module.get_available_providers = lambda: [CUDA, "CPUExecutionProvider"]
    module.set_default_logger_severity = lambda level: None
    module.InferenceSession = lambda model, options, providers: Session(module, model, options, providers)
    return module


def described(bundle: Bundle, **change: Any) -> prepared.Prepared:
    """As `build --for ort` would describe a graph of the bundle; here the graph is the plain one, with its weights in it."""
    return prepared.Prepared(**{"folder": "engines/ort", "model": bundle.model, "precision": bundle.precision, "weights": (), "ops": {}, "layers": "plugin",
                       "inlined": [], "plugin_sha256": "", "added_bytes": 0, "all_logits": False, **change})  # fmt: skip

"""ONNX Runtime's sessions: opening one on a CPU or on CUDA, with every failure as one line."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sessa_deploy.contract import (
    ALL_LOGITS_RANK,
    INPUT_IDS,
    LAST_LOGITS_RANK,
    LOGITS,
    NEW_LENGTH,
    PAST_LENGTH,
    graph_inputs,
    graph_outputs,
)
from sessa_deploy.cuda import devices
from sessa_deploy.errors import UserError, packages_named
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.environment import check_threads, default_threads

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_INT32, _TYPES = "tensor(int32)", {"fp32": "tensor(float)", "fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
_ERRORS_ONLY, _WARNINGS, _FATAL_ONLY = 3, 2, 4
# What the CUDA provider loads, what needs another one after it.
_CUDA_LIBRARIES = ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn")
_NUMBERED_AS_CUDA = ("cudart", "nvrtc", "cublasLt", "cublas")


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
    return start(bundle, runtime, bundle.model, session_options(runtime, threads or default_threads()), {} if provider == "cuda" else None)


def session_options(runtime: Any, threads: int) -> Any:
    """An onnxruntime.SessionOptions as every session of ours has it."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Threads that spin fight whatever else runs: a step of the demo on two busy cores took 16 ms with and 4.7 ms without, at best 2.6 and 2.0 ms.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Weights in 8 bits are made wide once, as the session opens, and not at every step.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.enable_mem_pattern = False  # it would keep one plan for each length of the past
    return options


def start(bundle: Bundle, runtime: Any, model: Path, options: Any, cuda: dict[str, str] | None, fix: str | None = None) -> Any:
    """A session on one of the bundle's graphs, checked against the contract. cuda: options of the CUDA provider; None: on the CPU. fix: the command that
    makes the graph anew (None: export).

    Raises UserError if the provider is missing or does not start, or the graph cannot be loaded or is not the contract's.
    """
    providers: list[Any] = [CPU]
    fix = fix or bundle.export_hint()
    if cuda is not None:
        preload(runtime)
        if CUDA not in runtime.get_available_providers():
            raise UserError("this ONNX Runtime has no CUDA provider", got=", ".join(runtime.get_available_providers()),
                            fix="pip uninstall onnxruntime; pip install onnxruntime-gpu (Python 3.10: onnxruntime-gpu==1.23.2), or use --backend ort")
        providers.insert(0, (CUDA, {"use_tf32": "0", **cuda}))  # fp32 means fp32
        runtime.set_default_logger_severity(_FATAL_ONLY)  # a provider that does not start would write pages; the error below says why
    try:
        session = runtime.InferenceSession(str(model), options, providers=providers)
    except Exception as error:  # its exception classes differ between versions and derive from nothing in common
        raise UserError("ONNX Runtime cannot load the graph", got=str(error)[:300], fix=fix) from None
    finally:
        if cuda is not None:
            runtime.set_default_logger_severity(_WARNINGS)  # its default
    bundle.require_unchanged()  # what was checked is what was loaded
    if cuda is not None and CUDA not in session.get_providers():
        version = getattr(runtime, "cuda_version", "")
        raise UserError("the CUDA provider of ONNX Runtime did not start", got=why_no_cuda(runtime) or ", ".join(session.get_providers()),
                        fix=f"install the CUDA{f' {version}' if version else ''} and cuDNN it was built for (sessa-deploy doctor), or use --backend ort")
    _check_graph(bundle, session.get_inputs(), session.get_outputs(), fix)
    return session


def has_all_logits(session: Any) -> bool:
    """Whether a session's graph gives the logits of every token."""
    return next(len(x.shape) for x in session.get_outputs() if x.name == LOGITS) == ALL_LOGITS_RANK


def _check_graph(bundle: Bundle, inputs: Sequence[Any], outputs: Sequence[Any], fix: str) -> None:
    layers, storage = bundle.config.n_layers, _TYPES[bundle.precision]
    expected = dict.fromkeys(graph_inputs(layers), storage) | {INPUT_IDS: "tensor(int64)", PAST_LENGTH: _INT32, NEW_LENGTH: _INT32}
    found = {value.name: value.type for value in inputs}
    wrong = [f"{n}: {found.get(n, 'absent')}" for n in sorted({*expected, *found}) if expected.get(n) != found.get(n)]
    names = {value.name: value for value in outputs}
    wrong += [f"{n}: absent" for n in graph_outputs(layers) if n not in names]
    if LOGITS in names and len(names[LOGITS].shape) not in (LAST_LOGITS_RANK, ALL_LOGITS_RANK):
        wrong.append(f"{LOGITS}: {len(names[LOGITS].shape)} dimensions")
    if wrong:
        raise UserError("the graph's inputs and outputs are not what the manifest's config says", got="; ".join(wrong[:5]), fix=fix)

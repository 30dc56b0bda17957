"""What differs between TensorRT 8.6, 10, 11 and TensorRT for RTX, in one place: the side that builds and the side that runs go through this file.

8.6: explicit-batch networks whose precision the builder chooses, int64 inputs become int32, no progress monitor, contexts get their memory by a
property. 10: strongly typed networks on request, IProgressMonitor, node names in parser errors. 11: strongly typed networks only, and the flag
that asked for them may be gone. TensorRT for RTX: the interface of 11 under versions 1.x and another module; it builds for named compute capabilities
without a GPU, keeps no timings, and compiles kernels on the card, which a runtime cache keeps. `PRODUCTS` is the table of that.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sessa_deploy.errors import MissingPackage, SessaError, UserError, install_command
from sessa_deploy.files import scratch

_SEVERITY_SHOWN = ("INTERNAL_ERROR", "ERROR")
_LAYERS_SAID = "Layers:\n"  # how the builder's message that lists an engine's layers begins
_preloaded: dict[str, list[Any]] = {}  # product -> handles of its libraries, loaded through links of ours


@dataclass(frozen=True)
class Product:
    """One of the TensorRTs that engines are for, and all in which they differ.

    name: the word of `--for`; modules, packages: under which Python and pip know it; headers: major of the headers its plugins are compiled against
    (None: its version's own); targets: the only compute capabilities it takes (empty: any GPU's); ahead: builds for named compute capabilities
    without a GPU, and says an engine's layers in its log; timings: keeps those of tactics between builds; compiles: kernels are compiled on the card
    and kept in a runtime cache; links: libraries that it opens by a name which its wheel lacks, each with a number behind.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    versions: str
    oldest: tuple[int, ...]
    headers: int | None = None
    targets: tuple[int, ...] = ()
    ahead: bool = False
    timings: bool = True
    compiles: bool = False
    libraries: str = ""
    links: tuple[str, ...] = ()

    @property
    def install(self) -> str:
        """The command that installs it."""
        return install_command(self.modules[0])


PRODUCTS = (
    Product("tensorrt", "TensorRT", ("tensorrt",), ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt_cu13", "tensorrt_cu12"), "8.6, 10 or 11", (8, 6)),
    Product("rtx", "TensorRT for RTX", ("tensorrt_rtx", "tensorrt_rtx_bindings"), ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx", "tensorrt-rtx-cu12-bindings"),
            "1.x", (1, 0), headers=11, targets=(80, 86, 89, 120), ahead=True, timings=False, compiles=True, libraries="tensorrt_rtx_libs",
            links=("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")),
)  # fmt: skip
NAMES = tuple(p.name for p in PRODUCTS)
INSTALL = PRODUCTS[0].install


def product(name: str) -> Product:
    """The product of that name. Raises UserError on any other."""
    for one in PRODUCTS:
        if one.name == name:
            return one
    raise UserError("no such TensorRT", got=repr(name), allowed=", ".join(NAMES))


def of(trt: Any) -> Product:
    """Which product an imported module is."""
    return next((p for p in PRODUCTS if trt.__name__ in p.modules), PRODUCTS[0])


def importable(one: Product) -> str | None:
    """The module under which Python would find a product, or None. Imports nothing."""
    for name in one.modules:
        try:
            if sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None:
                return name
        except (ImportError, ValueError):
            continue
    return None


def wanted(name: str | None = None) -> Product:
    """The product called `name`; without one, TensorRT, or the one that alone is installed. Raises UserError on an unknown name."""
    if name is not None:
        return product(name)
    found = [p for p in PRODUCTS if importable(p)]
    return found[0] if found else PRODUCTS[0]


def installed_version(one: Product) -> str | None:
    """The version a product would import with, by pip's records or else by what its source says; None without one. Imports nothing."""
    module = importable(one)
    if module is None:
        return None
    loaded = getattr(sys.modules.get(module), "__version__", None)
    if loaded is not None:
        return str(loaded)
    for name in one.packages:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for name in (module, f"{module}_bindings"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            said = re.search(r"^__version__ = [\"']([0-9][^\"']*)", Path(spec.origin).read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
            if said:
                return said[1]
    return None


def header_major(one: Product, version: str | None) -> int | None:
    """Major version of the headers that a product's plugins are compiled against; None where its version is not known."""
    if one.headers is not None:
        return one.headers
    found = re.match(r"\d+", version or "")
    return int(found[0]) if found else None


def load(name: str | None = None) -> Any:
    """The module of the product called `name` (None: what `wanted` says).

    Raises UserError with the command that installs it, or naming the version if it is too old.
    """
    one = wanted(name)
    _preload(one)
    try:
        trt = importlib.import_module(importable(one) or one.modules[0])
    except (ImportError, OSError) as error:
        raise MissingPackage(f"{one.title} cannot be imported", got=str(error), allowed=f"{one.title} {one.versions}", fix=one.install) from None
    if version(trt)[: len(one.oldest)] < one.oldest:
        raise UserError(f"{one.title} is too old", got=trt.__version__, allowed=one.versions, fix=f"{one.install} --upgrade")
    return trt


def _preload(one: Product) -> None:
    """Load a product's libraries through links that have the names it opens them by.

    Its wheel ships libtensorrt_rtx.so.1, while its parser opens libtensorrt_rtx.so beside itself ($ORIGIN) at the first plugin and ends the process where
    there is none. A parser that was loaded through a link of ours looks beside that link. Raises UserError where others have loaded it before.
    """
    if not one.links or one.name in _preloaded:
        return
    spec = importlib.util.find_spec(one.libraries) if importable(one) else None
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    if folder is None or all((folder / name).exists() for name in one.links):
        return
    numbered = {name: found[0] for name in one.links if (found := sorted(folder.glob(f"{name}.*")))}
    if len(numbered) < len(one.links):
        raise MissingPackage(f"{one.title} is incomplete", got=f"{folder} without {', '.join(set(one.links) - set(numbered))}.N", fix=one.install)
    if one.libraries in sys.modules:
        first = numbered[one.links[0]].name
        raise UserError(f"{one.title} was imported before sessa-deploy, and its parser would end this process at the first plugin",
                        got=f"no {one.links[0]} in {folder}", allowed="sessa_deploy loads it first",
                        fix=f"ln -s {first} {folder / one.links[0]}")
    kept = contextlib.ExitStack()
    links = kept.enter_context(scratch("sessa-links-"))
    atexit.register(kept.close)
    for name, target in numbered.items():
        (links / name).symlink_to(target)
        (links / target.name).symlink_to(target)
    try:
        _preloaded[one.name] = [ctypes.CDLL(str(links / target.name)) for target in numbered.values()]
    except OSError as error:
        raise MissingPackage(f"{one.title} cannot be loaded", got=str(error), allowed=f"{one.title} {one.versions}", fix=one.install) from None


def version(trt: Any) -> tuple[int, ...]:
    """TensorRT's version as integers, (8, 6, 0)."""
    return tuple(int(part) for part in trt.__version__.split("+")[0].split(".") if part.isdigit())


def interface(trt: Any) -> int:
    """Major version of the interface that a module has: 8, 10 or 11, the latter for TensorRT for RTX."""
    return of(trt).headers or version(trt)[0]


def strongly_typed(trt: Any) -> bool:
    """Whether networks carry their own precisions (10 and later), so that the builder chooses none."""
    return interface(trt) >= 10


def logger(trt: Any, verbose: bool = False) -> Any:
    """A TensorRT logger that keeps errors in `.lines` and prints everything if `verbose`. `.layers`: the builder's list of layers, if it said it."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.layers = ""
            self.verbose = verbose

        def log(self, severity: Any, message: str) -> None:
            name = str(severity).rpartition(".")[2]
            if message.startswith(_LAYERS_SAID):
                self.layers = message
            if name in _SEVERITY_SHOWN:
                self.lines.append(" ".join(str(message).split()))
            if self.verbose:
                print(f"[TensorRT {name.lower()}] {message}", flush=True)

    return Log()


def create_network(trt: Any, builder: Any) -> Any:
    """An empty network: strongly typed where there is such a thing, else explicit batch."""
    kinds = trt.NetworkDefinitionCreationFlag
    if strongly_typed(trt):
        flag = getattr(kinds, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))
    return builder.create_network(1 << int(kinds.EXPLICIT_BATCH))


def parser_errors(parser: Any, nodes: list[str]) -> list[str]:
    """Every error of an OnnxParser as one line with the node's name; nodes: names of the graph's nodes in order, for versions that count only."""
    lines = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        index = error.node()
        name = error.node_name() if hasattr(error, "node_name") else ""
        if not name and 0 <= index < len(nodes):
            name = nodes[index]
        operator = f" ({error.node_operator()})" if hasattr(error, "node_operator") and error.node_operator() else ""
        lines.append(f"{name or 'the graph'}{operator}: {' '.join(str(error.desc()).split())}")
    return lines


def plain_tactics(trt: Any, config: Any) -> None:
    """Leave out cuDNN on 8.6: the graph has no convolution, and the library need not be installed then."""
    sources = trt.TacticSource
    if interface(trt) < 10 and hasattr(sources, "CUDNN"):
        config.set_tactic_sources(config.get_tactic_sources() & ~(1 << int(sources.CUDNN)))


def set_flag(trt: Any, config: Any, name: str, on: bool = True) -> bool:
    """Set or clear a BuilderFlag by name; False where this version has no such flag."""
    flag = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        return False
    (config.set_flag if on else config.clear_flag)(flag)
    return True


def watch(trt: Any, config: Any, step: Callable[[str, int, int], bool]) -> Any:
    """Have `step(phase, done, of)` called while the engine is built; it returns False to stop.

    Returns the monitor, which must live that long, or None where this version has no IProgressMonitor.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._go_on = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._go_on = step(phase_name, 0, num_steps) and self._go_on

        def step_complete(self, phase_name: str, step_index: int) -> bool:
            of = self._steps.get(phase_name, 0)
            self._go_on = step(phase_name, step_index + 1, of) and self._go_on
            return self._go_on

        def phase_finish(self, phase_name: str) -> None:
            of = self._steps.pop(phase_name, 0)
            self._go_on = step(phase_name, of, of) and self._go_on

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


def compute_capabilities(trt: Any, config: Any, targets: tuple[int, ...]) -> None:
    """Have the engine built for these compute capabilities, of 86 for 8.6; none: for the GPU that is here. Raises SessaError where TensorRT has no such."""
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        kind = getattr(trt.ComputeCapability, f"SM{target}", None)
        if kind is None or not config.set_compute_capability(kind, i):
            raise SessaError(f"{of(trt).title} {trt.__version__} does not build for sm_{target}; fix: leave it out of --arch")


def check_target(one: Product, arch: int) -> None:
    """Raise UserError where a product does not take GPUs of this compute capability (90 for 9.0)."""
    if one.targets and arch not in one.targets:
        other = PRODUCTS[0]
        raise UserError(f"{one.title} does not support this compute capability", got=f"sm_{arch}", allowed=", ".join(f"sm_{t}" for t in one.targets),
                        fix=f"{other.install}, and --for {other.name}")


def layer_information(trt: Any, engine: Any, log: Any = None) -> str:
    """The engine inspector's JSON of all layers, or without an engine what the builder said of them on `log`."""
    if engine is None:
        return str(log.layers)
    text: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def inputs_and_outputs(engine: Any, trt: Any) -> tuple[list[str], list[str]]:
    """Names of an engine's inputs and outputs."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    return inputs, [n for n in names if n not in inputs]


def numpy_dtype(trt: Any, kind: Any) -> str | None:
    """Name of the numpy dtype of a TensorRT DataType; None for bfloat16, which numpy lacks. Raises SessaError on any other."""
    name = str(kind).rpartition(".")[2]
    known = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool", "BF16": None}
    if name not in known:
        raise SessaError(f"TensorRT gives a tensor of type {name}, which the runtime does not know")
    return known[name]


def scratch_size(engine: Any) -> int:
    """Bytes of scratch that one execution context of any profile needs."""
    newer = getattr(engine, "device_memory_size_v2", None)
    return int(engine.device_memory_size if newer is None else newer)


def runtime_config(trt: Any, engine: Any, kept: bytes | None) -> tuple[Any, Any]:
    """(what contexts are made with, the cache of kernels compiled on this card); both None where engines hold their kernels.

    kept: an earlier cache's bytes; damaged ones, or those of another version, are passed over. Kernels are made for a shape when it is first enqueued
    and waited for: a kernel that came later would change a sequence's bits in the midst of it, and could not come while a graph is captured.
    """
    if not of(trt).compiles:
        return None, None
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    cache = config.create_runtime_cache()
    if kept and not cache.deserialize(kept):
        cache.reset()
    config.set_runtime_cache(cache)
    return config, cache


def cache_file(kind: str, gpu: str, arch: str, version: str) -> Path:
    """Where what TensorRT learns of a GPU is kept: kind "timing" (of tactics, when it builds) or "runtime" (kernels compiled on the card)."""
    import platformdirs

    name = re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-")
    return Path(platformdirs.user_cache_dir("sessa-deploy", appauthor=False)) / kind / f"{name}-{arch}-{version}.cache"


def shares_profiles(trt: Any) -> bool:
    """Whether contexts may share an optimisation profile, as they may from TensorRT 10 on; 8.6 gives a profile to one context alone, and a process that
    asked it for another ended in a segmentation fault (8.6.0, H200)."""
    return hasattr(trt, "ExecutionContextAllocationStrategy")


def context(trt: Any, engine: Any, profile: int, stream: int, scratch: int, size: int, log: Any = None, config: Any = None) -> Any:
    """An execution context on optimisation profile `profile` whose scratch is the `size` bytes at address `scratch`.

    Contexts may share a scratch if they never run at the same time. config: of `runtime_config`. Raises SessaError, with the last lines of `log`, if
    TensorRT gives none.
    """
    strategies = getattr(trt, "ExecutionContextAllocationStrategy", None)
    if config is not None:
        made = engine.create_execution_context(config)
    elif strategies is None:
        made = engine.create_execution_context_without_device_memory()
    else:
        made = engine.create_execution_context(strategies.USER_MANAGED)
    if made is None:
        reasons = " / ".join(log.lines[-3:]) if log is not None else ""
        raise SessaError(f"TensorRT made no execution context: {reasons or 'no reason given'}; fix: build with a smaller --max-batch or --max-prompt")
    if hasattr(made, "set_device_memory"):
        made.set_device_memory(scratch, size)
    else:
        made.device_memory = scratch
    if not made.set_optimization_profile_async(profile, stream):
        raise SessaError(f"TensorRT refused optimisation profile {profile}; fix: sessa-deploy build BUNDLE --force")
    return made

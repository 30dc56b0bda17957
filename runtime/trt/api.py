"""What differs between TensorRT 8.6, 10 and 11, in one place: both the side that builds and the side that runs go through this file.

8.6: explicit-batch networks whose precision the builder chooses, int64 inputs become int32, no progress monitor, contexts get their memory by a
property. 10: strongly typed networks on request, IProgressMonitor, node names in parser errors. 11: strongly typed networks only, and the flag
that asked for them may be gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sessa_deploy.errors import MissingPackage, SessaError, UserError, install_command

INSTALL = install_command("tensorrt")
_SEVERITY_SHOWN = ("INTERNAL_ERROR", "ERROR")


def load() -> Any:
    """The tensorrt module. Raises UserError with the command that installs it, or naming the version if it is older than 8.6."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise MissingPackage("TensorRT cannot be imported", got=str(error), allowed="TensorRT 8.6, 10 or 11", fix=INSTALL) from None
    if version(tensorrt)[:2] < (8, 6):
        raise UserError("TensorRT is too old", got=tensorrt.__version__, allowed="8.6, 10 or 11", fix=f"{INSTALL} --upgrade")
    return tensorrt


def version(trt: Any) -> tuple[int, ...]:
    """TensorRT's version as integers, (8, 6, 0)."""
    return tuple(int(part) for part in trt.__version__.split("+")[0].split(".") if part.isdigit())


def strongly_typed(trt: Any) -> bool:
    """Whether networks carry their own precisions (10 and later), so that the builder chooses none."""
    return version(trt)[0] >= 10


def logger(trt: Any, verbose: bool = False) -> Any:
    """A TensorRT logger that keeps warnings and errors in `.lines` and prints them only if `verbose`."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.verbose = verbose

        def log(self, severity: Any, message: str) -> None:
            name = str(severity).rpartition(".")[2]
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
    if version(trt)[0] < 10 and hasattr(sources, "CUDNN"):
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


def layer_information(trt: Any, engine: Any) -> str:
    """The engine inspector's JSON of all layers."""
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


def context(trt: Any, engine: Any, profile: int, stream: int, scratch: int, size: int, log: Any = None) -> Any:
    """An execution context on optimisation profile `profile` whose scratch is the `size` bytes at address `scratch`.

    Contexts may share a scratch if they never run at the same time. Raises SessaError, with the last lines of `log`, if TensorRT gives none.
    """
    strategies = getattr(trt, "ExecutionContextAllocationStrategy", None)
    if strategies is None:
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

"""The engines that parity can drive, by name. Each opener imports its engine only when it is called; none imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sessa_deploy.contract import graph_inputs, graph_outputs
from sessa_deploy.errors import UserError
from sessa_deploy.export.parity_drive import Engine, Tensors
from sessa_deploy.export.parity_rungs import check_engine
from sessa_deploy.runtime.bundle import Bundle


def open_ort(bundle: Bundle, threads: int) -> Engine:
    """ONNX Runtime on a CPU: the graph itself, and the runtime's backend with its own caches."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(bundle.model), options, providers=["CPUExecutionProvider"])
    names = graph_outputs(bundle.config.n_layers)
    inputs = {x.name: x for x in session.get_inputs()}
    if set(inputs) != set(graph_inputs(bundle.config.n_layers)) or [x.name for x in session.get_outputs()] != names:
        raise UserError("model.onnx has other inputs or outputs than its configuration says", got=", ".join(inputs), fix="export the checkpoint again")

    def step(feeds: Tensors) -> Tensors:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return Engine(step, None, {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__})


OPENERS: dict[str, Callable[[Bundle, int], Engine]] = {"ort": open_ort}


def resolve_backends(wanted: Sequence[str], bundle: Bundle) -> list[str]:
    """The engines' rungs for a list of backend names; "auto" is ONNX Runtime on the CPU. Raises UserError on a name or precision that does not fit."""
    names = list(dict.fromkeys("ort" if name == "auto" else name for name in wanted))
    for name in names:
        check_engine(name, bundle)
    return names

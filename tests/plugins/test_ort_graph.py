"""A bundle's prepared graph and the library in the real ONNX Runtime: every node is known to it, and the weights go in by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from plugin_harness import Built

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.plugins import library
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.ort import prepared as ort_prepared

CONFIG = SessaConfig(d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, max_context=32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """opset -> model.onnx in float16; the graph is captured once."""
    pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    folder = tmp_path_factory.mktemp("exported")
    return lambda opset: export_onnx(SessaLM(CONFIG), folder / str(opset) / contract.MODEL_FILE, "fp16", opset)


@pytest.mark.parametrize(("layers", "opset"), [("plugin", 17), ("ort", 17), ("plugin", 23), ("ort", 23)])
def test_onnx_runtime_takes_a_prepared_graph(ort_stub: Built, exported: Callable[[int], Path], tmp_path: Path, layers: str, opset: int) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from sessa_deploy.export.to_ort import build_ort

    bundle = build_ort(write_bundle(tmp_path / "bundle", {contract.MODEL_FILE: exported(opset)}, CONFIG, "fp16", {}, opset), layers).bundle
    found = ort_prepared.find(bundle)
    assert found is not None and set(found.ops) <= set(library.OPS)

    values = {name: runtime.OrtValue.ortvalue_from_numpy(value) for name, value in ort_prepared.weights(bundle, found).items()}
    for graph in (str(found.model), found.model.read_bytes()):
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        library.register(options, ort_stub[1])
        options.add_external_initializers(list(values), list(values.values()))
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        assert [x.name for x in session.get_inputs()] == contract.graph_inputs(2) and [x.name for x in session.get_outputs()] == contract.graph_outputs(2)
        shapes = {x.name: x.shape for x in session.get_outputs()}
        assert shapes[contract.LOGITS] == ["B", 61] and shapes["new.1.k_f"] == ["B", "T", 2, 16] and shapes["new.0.s"] == ["B", "T", 64]

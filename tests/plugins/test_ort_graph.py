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
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str | None], Path]:
    """(opset, form of matrices in 8 bits) -> model.onnx in float16; the graph is captured once."""
    pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    folder = tmp_path_factory.mktemp("exported")
    return lambda opset, form: export_onnx(SessaLM(CONFIG), folder / f"{opset}{form}" / contract.MODEL_FILE, "fp16", opset, weights=form)


@pytest.mark.parametrize(("layers", "opset", "form"), [
    ("plugin", 17, None), ("ort", 17, None), ("plugin", 23, None), ("ort", 23, None), ("plugin", 17, "int8"), ("plugin", 19, "fp8")])  # fmt: skip
def test_onnx_runtime_takes_a_prepared_graph(
    ort_stub: Built, exported: Callable[[int, str | None], Path], tmp_path: Path, layers: str, opset: int, form: str | None
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from sessa_deploy.export.to_ort import build_ort

    small = None if form is None else contract.Weights(form)
    bundle = build_ort(write_bundle(tmp_path / "bundle", {contract.MODEL_FILE: exported(opset, form)}, CONFIG, "fp16", {}, opset, weights=small), layers).bundle
    found = ort_prepared.find(bundle)
    assert found is not None and set(found.ops) <= set(library.OPS) and bool(found.eight_bytes) == (form is not None)

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

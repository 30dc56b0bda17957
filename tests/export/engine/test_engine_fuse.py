"""The rewrites before an engine is built: ONNX Runtime computes the same tokens and rows from the rewritten graph, with fewer nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_models import CONFIG

from sessa_deploy import contract
from sessa_deploy.export.engine import fuse as engine_fuse
from sessa_deploy.export.engine import graph as engine_graph
from sessa_deploy.export.trt import parser as trt_parser


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    torch = pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    def make(precision: str, inline_limit: int = 1 << 30) -> Path:
        torch.manual_seed(5)
        model = SessaLM(CONFIG)
        with torch.no_grad():  # biases that are zero would hide a wrong order
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)
        return export_onnx(model, tmp_path_factory.mktemp("model") / "model.onnx", precision, inline_limit=inline_limit)

    return make


def run(model: onnx.ModelProto, functions: Path, precision: str) -> dict[str, np.ndarray]:
    import onnxruntime

    used = {n.op_type for n in model.graph.node}
    del model.functions[:]
    model.functions.extend(f for f in engine_graph.load(functions).functions if f.name in used)
    onnx.checker.check_model(model)
    rng, storage = np.random.default_rng(0), np.dtype(contract.PRECISIONS[precision].numpy)
    feeds: dict[str, Any] = {contract.INPUT_IDS: rng.integers(0, CONFIG.vocab_size, (2, 3)), contract.PAST_LENGTH: np.array([4, 0], np.int32),
                             contract.NEW_LENGTH: np.array([3, 2], np.int32)}  # fmt: skip
    for layer, field in contract.cache_entries(2):
        feeds[contract.past_name(layer, field)] = rng.standard_normal((2, 6, *contract.cache_row_shape(field, 16, 2, 4))).astype(storage)
    names = contract.graph_outputs(2)
    return dict(zip(names, onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(names, feeds), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_session_sees_the_same_numbers(model: Callable[..., Path], precision: str) -> None:
    path = model(precision)
    plain, spared = (engine_graph.prepare(engine_graph.load(path)) for _ in range(2))
    before = len(spared.model.graph.node)
    assert engine_fuse.unmasked_rows(spared.model.graph) == 8
    same = engine_fuse.one_projection(spared.model.graph, path.parent)
    assert len(same) == 4 and all(old in spared.types for old in same.values())
    assert len(spared.model.graph.node) < before - 8 - 2 * 2 * 3
    assert sum(n.op_type == "MatMul" for n in spared.model.graph.node) == sum(n.op_type == "MatMul" for n in plain.model.graph.node) - 2 * 3
    assert trt_parser.complaints(spared.model, (8, 6, 0)) == []
    wanted, found = run(plain.model, path, precision), run(spared.model, path, precision)
    for name, value in wanted.items():
        counts = (3, 2) if name != contract.LOGITS else (1, 1)
        for row, count in enumerate(counts):  # rows from new_length on are nobody's
            np.testing.assert_array_equal(*((x[row, :count] if name != contract.LOGITS else x[row]) for x in (value, found[name])), err_msg=name)
    assert not wanted["new.0.s"][1, 2].any() and found["new.0.s"][1, 2].any(), "a padded row is not masked any more"


def test_weights_beside_the_graph_are_found_and_large_ones_left_alone(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = model("fp32", 0)
    prepared = engine_graph.prepare(engine_graph.load(path))
    external = [x for x in prepared.model.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]
    assert external
    monkeypatch.setattr(engine_fuse, "_INLINE_LIMIT", 100)
    assert engine_fuse.one_projection(prepared.model.graph, path.parent) == {}
    monkeypatch.undo()
    assert len(engine_fuse.one_projection(prepared.model.graph, path.parent)) == 4
    merged = {x.name: x for x in prepared.model.graph.initializer}["layers.0.mixer.projections.weight"]
    assert list(merged.dims) == [16, 16 + 8 + 8 + 32]
    assert not any("q_proj" in x.name for x in prepared.model.graph.initializer)

"""The graph TensorRT's parser gets: it computes the same, ops with a plugin lose their bodies, and what an old parser cannot take is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.export.engine import graph as engine_graph
from sessa_deploy.export.trt import parser as trt_parser


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_parsers_graph_computes_the_same(models: Callable[[str], Path], precision: str) -> None:
    """With the claimed op's body put back, ONNX Runtime gives the same bits on the prepared graph as on the file."""
    import onnxruntime

    prepared = engine_graph.prepare(engine_graph.load(models(precision)))
    whole = engine_graph.load(models(precision))
    assert prepared.inlined == [contract.CAUSAL_OP] and not prepared.model.functions
    assert {n.op_type for n in prepared.model.graph.node if n.domain == contract.DOMAIN} == {contract.FEEDBACK_OP}
    assert prepared.direct == sorted(contract.past_name(i, f) for i in range(2) for f in ("k_b", "s"))
    assert all(n.name for n in prepared.model.graph.node) and len({n.name for n in prepared.model.graph.node}) == len(prepared.model.graph.node)
    assert {n.name for n in whole.graph.node if n.op_type != contract.CAUSAL_OP} <= {n.name for n in prepared.model.graph.node}
    assert all(value in prepared.types for node in prepared.model.graph.node for value in node.output)
    assert [x.SerializeToString() for x in prepared.model.graph.initializer] == [x.SerializeToString() for x in whole.graph.initializer]
    assert trt_parser.complaints(prepared.model, (8, 6, 0)) == []
    prepared.model.functions.extend(f for f in whole.functions if f.name == contract.FEEDBACK_OP)
    rng, storage = np.random.default_rng(0), np.dtype(contract.PRECISIONS[precision].numpy)
    feeds: dict[str, Any] = {contract.INPUT_IDS: rng.integers(0, 257, (2, 3)), contract.PAST_LENGTH: np.array([4, 0], np.int32),
                             contract.NEW_LENGTH: np.array([3, 2], np.int32)}  # fmt: skip
    for layer, field in contract.cache_entries(2):
        shape = (2, 6, *contract.cache_row_shape(field, 16, 2, 4))
        feeds[contract.past_name(layer, field)] = rng.standard_normal(shape).astype(storage)
    runs = [onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds) for m in (whole, prepared.model)]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_widths_decide_what_the_plugin_claims(tmp_path: Path) -> None:
    """A head of 8 goes to the plugin with its body dropped and its caches direct; one of 4, or a D of 24, is inlined."""
    torch = pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    def graph(d_model: int, n_heads: int) -> onnx.ModelProto:
        torch.manual_seed(0)
        config = SessaConfig(d_model=d_model, n_layers=1, n_heads=n_heads, vocab_size=257, max_context=16)
        return engine_graph.load(export_onnx(SessaLM(config), tmp_path / f"{d_model}.{n_heads}.onnx", "fp32"))

    model = graph(16, 2)
    assert engine_graph.claims(model) == contract.GRAPH_OPS
    assert engine_graph.claims(model, [contract.FEEDBACK_OP]) == (contract.FEEDBACK_OP,)
    prepared = engine_graph.prepare(model)
    assert prepared.inlined == [] and prepared.direct == sorted(contract.past_name(0, f) for f in contract.CACHE_FIELDS)
    node = next(n for n in prepared.model.graph.node if n.op_type == contract.CAUSAL_OP)
    assert len(node.input) == len(contract.CAUSAL_INPUTS) and list(node.input[3:]) == ["past.0.k_f", "past.0.v_f", contract.PAST_LENGTH]
    assert {a.name: (a.f, a.i) for a in node.attribute} == {contract.ATTR_SCALE: (pytest.approx(8**-0.5), 0), contract.ATTR_STORAGE: (0.0, TensorProto.FLOAT)}
    assert trt_parser.complaints(prepared.model, (8, 6, 0)) == []
    assert set(contract.GRAPH_OPS) - set(engine_graph.claims(graph(16, 4))) == {contract.CAUSAL_OP}
    assert set(contract.GRAPH_OPS) - set(engine_graph.claims(graph(24, 3))) == {contract.FEEDBACK_OP}
    assert engine_graph.prepare(graph(16, 2), claimed=(contract.FEEDBACK_OP,)).inlined == [contract.CAUSAL_OP]


def test_float32_islands_of_an_fp16_graph_are_known(models: Callable[[str], Path]) -> None:
    prepared = engine_graph.prepare(engine_graph.load(models("fp16")))
    kinds = prepared.types
    assert kinds["past.0.k_f"] == TensorProto.FLOAT16 and kinds[contract.LOGITS] == TensorProto.FLOAT
    by_op = {n.op_type: n for n in prepared.model.graph.node}
    assert kinds[by_op["Softmax"].output[0]] == kinds[by_op["Tanh"].output[0]] == kinds[by_op["Cos"].output[0]] == TensorProto.FLOAT
    assert kinds[by_op[contract.FEEDBACK_OP].output[0]] == TensorProto.FLOAT16


def test_an_op_with_neither_plugin_nor_body_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = engine_graph.load(models("fp32"))
    del model.functions[:]
    with pytest.raises(UserError, match="neither a plugin nor a body: got SessaCausalAttention"):
        engine_graph.prepare(model)
    (tmp_path / "x.onnx").write_bytes(b"\xff\xff no graph")
    with pytest.raises(UserError, match=r"cannot be read|is empty"):
        engine_graph.load(tmp_path / "x.onnx")


def test_what_the_old_parser_cannot_take_is_named() -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["a", "b"]) for n in "xy")
    nodes = [helper.make_node("Gelu", ["x"], ["g"], name="layer/gelu"), helper.make_node("Shape", ["x"], ["n"], name="shape", start=1),
             helper.make_node("Unsqueeze", ["g", "n"], ["u"], name="grow"), helper.make_node("Constant", [], ["c"], name="five", value_int=5),
             helper.make_node("Identity", ["g"], ["y"], name="id")]  # fmt: skip
    weights = [helper.make_tensor("w", TensorProto.BFLOAT16, [1], [0])]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 20)])
    found = trt_parser.complaints(model, (8, 6, 0))
    assert len(found) == 6 and any("five: " in f for f in found) and "opset 20" in found[0] and "layer/gelu: TensorRT 8.6 has no Gelu" in found
    assert any("grow: the axes" in f for f in found) and any("start and end" in f for f in found) and any("bfloat16" in f for f in found)
    assert trt_parser.complaints(model, (10, 0, 1)) == []


def test_a_shape_that_depends_on_data_is_named(models: Callable[[str], Path]) -> None:
    graph = engine_graph.prepare(engine_graph.load(models("fp32"))).model.graph
    assert trt_parser.data_dependent_shapes(graph) == []
    graph.node.append(helper.make_node("Range", ["constant.3", "past_length", "constant.1"], ["r"], name="late/Range"))
    graph.node.append(helper.make_node("Add", ["new_length", "past_length"], ["sum"], name="late/Add"))
    graph.node.append(helper.make_node("Expand", ["past.0.s", "sum"], ["grown"], name="late/Expand"))
    assert trt_parser.data_dependent_shapes(graph) == ["late/Range", "late/Expand"]


def test_weights_beside_the_file_stay_there(models: Callable[[str], Path], tmp_path: Path) -> None:
    onnx.save(onnx.load(models("fp32")), tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=512)
    prepared = engine_graph.prepare(engine_graph.load(tmp_path / "m.onnx"))
    outside = [t for t in prepared.model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert outside and all({e.key: e.value for e in t.external_data}["location"] == "m.onnx.data" and not t.raw_data for t in outside)

"""What a body of If or Loop captures from around it is read like an input: no pass may drop, rename or merge it away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sessa_deploy.export.engine import fuse as engine_fuse
from sessa_deploy.export.engine import layers as engine_layers
from sessa_deploy.export.graph import passes
from sessa_deploy.export.trt import parser as trt_parser

F = TensorProto.FLOAT


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, F, shape)


def weight(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32), name)


def captured(*names: str, shape: int = 4) -> NodeProto:
    """An If whose branches read `names` from around it: nowhere else does a node read them, and a nested If captures the last through both."""
    deep = helper.make_graph([helper.make_node("Identity", [names[-1]], ["deep"])], "deep", [], [value("deep", "B", shape)])
    nested = helper.make_node("If", ["flag"], ["last"], name="nested", then_branch=deep, else_branch=deep)
    then = helper.make_graph([nested, helper.make_node("Sum", ["last", *names], ["a"])], "then", [], [value("a", "B", shape)])
    other = helper.make_graph([helper.make_node("Neg", [names[-1]], ["b"])], "else", [], [value("b", "B", shape)])
    return helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=then, else_branch=other)


def model(nodes: list[NodeProto], weights: list[TensorProto], *outputs: str) -> ModelProto:
    inputs = [value("x", "B", 4), helper.make_tensor_value_info("flag", TensorProto.BOOL, [])]
    made = helper.make_model(helper.make_graph(nodes, "g", inputs, [value(n, "B", 4) for n in outputs], weights), ir_version=8,
                             opset_imports=[helper.make_opsetid("", 17)])  # fmt: skip
    onnx.checker.check_model(made, full_check=True)
    return made


def run(made: ModelProto) -> list[np.ndarray]:
    onnx.checker.check_model(made)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    return [y for flag in (True, False) for y in session.run(None, {"x": x, "flag": np.array(flag)})]


def nodes() -> list[NodeProto]:
    """x w1 and x w2, and two equal constants, of which the If alone reads some."""
    return [helper.make_node("MatMul", ["x", "w1"], ["p"], name="p"), helper.make_node("Add", ["p", "c1"], ["q"], name="q"),
            helper.make_node("MatMul", ["x", "w2"], ["only"], name="only"), captured("only", "c2", "w3", "q"), helper.make_node("Neg", ["y"], ["z"], name="z")]


PASSES: dict[str, Callable[[GraphProto], object]] = {
    "drop_unused": passes.drop_unused,
    "drop_weights": passes.drop_weights,
    "merge_constants": passes.merge_constants,
    "rename": lambda graph: passes.rename(graph, {"w1": "first.weight"}),
    "unmasked_rows": engine_fuse.unmasked_rows,
    "one_projection": lambda graph: engine_fuse.one_projection(graph, Path()),
    "sorted": lambda graph: engine_layers._set_sorted(graph, list(graph.node)[::-1]),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_leaves_what_a_body_reads(name: str) -> None:
    same = weight("c", 4)
    same_again = TensorProto()
    same_again.CopyFrom(same)
    same.name, same_again.name = "c1", "c2"
    made = model(nodes(), [weight("w1", 4, 4), weight("w2", 4, 4), weight("w3", 4), same, same_again, weight("unused", 3)], "z")
    before = run(made)
    PASSES[name](made.graph)
    for a, b in zip(before, run(made), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ("unused" in {x.name for x in made.graph.initializer}) == (name in ("merge_constants", "unmasked_rows")) or name == "rename"


def test_new_rows_that_a_body_reads_are_renamed_there() -> None:
    """unmasked_rows gives the rows their output's name: in the body too."""
    mask = [helper.make_node("MatMul", ["x", "w1"], ["rows"], name="rows"), helper.make_node("Where", ["flag", "rows", "zero"], ["new.0.s"], name="mask"),
            captured("c1", "rows")]
    made = model(mask, [weight("w1", 4, 4), weight("zero"), weight("c1", 4)], "new.0.s", "y")
    before = run(made)
    assert engine_fuse.unmasked_rows(made.graph) == 1
    assert "rows" not in passes.reads(made.graph.node[-1]) and "new.0.s" in passes.reads(made.graph.node[-1])
    after = run(made)
    np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_array_equal(before[3], after[3])


@pytest.mark.parametrize("inside", ["product", "sum", None])
def test_a_projection_whose_inside_a_body_reads_stays(inside: str | None) -> None:
    made = []
    for part in ("q_proj", "k_proj"):
        made += [helper.make_node("MatMul", ["x", f"{part}.w"], [f"{part}.product"], name=f"layers.0.mixer.{part}/MatMul.0"),
                 helper.make_node("Add", [f"{part}.product", f"{part}.b"], [f"{part}.sum"], name=f"layers.0.mixer.{part}/Add.0")]
    made += [captured("c1", f"k_proj.{inside}" if inside else "x"), helper.make_node("Add", ["q_proj.sum", "k_proj.sum"], ["z"], name="z")]
    weights = [w for part in ("q_proj", "k_proj") for w in (weight(f"{part}.w", 4, 4), weight(f"{part}.b", 4))]
    graph = model(made, [*weights, weight("c1", 4)], "z", "y")
    before = run(graph)
    merged = engine_fuse.one_projection(graph.graph, Path())
    assert bool(merged) == (inside != "product")
    for a, b in zip(before, run(graph), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_transposed_weight_that_a_body_reads_stays_as_it_is() -> None:
    turned = [helper.make_node("Transpose", ["w"], ["wt"], name="t", perm=[1, 0]), helper.make_node("MatMul", ["x", "wt"], ["z"], name="z")]
    made = model(turned, [weight("w", 4, 4)], "z")
    made.graph.input.append(value("w", 4, 4))
    alone, with_body = (ModelProto() for _ in range(2))
    alone.CopyFrom(made)
    with_body.CopyFrom(made)
    with_body.graph.node.append(captured("w"))
    assert passes.transposed_weights(alone.graph, ["w"]) == {"w": True} and passes.transposed_weights(with_body.graph, ["w"]) == {"w": False}


def test_a_shape_that_follows_from_a_captured_length_is_named() -> None:
    body = helper.make_graph([helper.make_node("Identity", ["past_length"], ["n"])], "b", [], [helper.make_tensor_value_info("n", TensorProto.INT64, [1])])
    graph = helper.make_graph([helper.make_node("If", ["flag"], ["length"], name="choice", then_branch=body, else_branch=body),
                               helper.make_node("ConstantOfShape", ["length"], ["z"], name="zeros")], "g", [], [])  # fmt: skip
    assert trt_parser.data_dependent_shapes(graph) == ["zeros"]

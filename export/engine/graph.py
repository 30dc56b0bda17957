"""From a bundle's model.onnx to the graph that an engine gets: ops that the library claims lose their function bodies, any other body is inlined.

Nothing here touches a weight's bytes: they are taken out while the graph is rewritten and put back. onnx only; no torch, no engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, TensorProto

from sessa_deploy import contract
from sessa_deploy.errors import UserError
from sessa_deploy.plugins import ops

PLUGIN_OPS = contract.GRAPH_OPS  # which the plugin library may compute
_PAST_INPUT = "past_k"  # whose shape the graph states
SMALL = 1024  # bytes; constants up to this size stay in place, shape inference reads them


@dataclass
class PreparedGraph:
    """A graph for the parser. types: value name -> ONNX element type; inlined: ops that run without a plugin; direct: cache inputs a plugin reads;
    reasons: why an op is inlined, where the plugin's limits say so."""

    model: ModelProto
    types: dict[str, int] = field(default_factory=dict)
    inlined: list[str] = field(default_factory=list)
    direct: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def load(path: Path) -> ModelProto:
    """model.onnx with its weights, those in a data file beside it left there. Raises UserError if it is no ONNX model."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is not one class across its versions
        raise UserError("the graph cannot be read", got=f"{path} ({error})", fix="sessa-deploy export CHECKPOINT --out BUNDLE") from None
    if not model.graph.node:
        raise UserError("the graph is empty", got=str(path), fix="sessa-deploy export CHECKPOINT --out BUNDLE")
    return model


def claims(model: ModelProto, available: Collection[str] = PLUGIN_OPS) -> tuple[str, ...]:
    """Ops of the graph to leave to plugins: those `available` whose kernels take the graph's widths. The others' bodies are inlined."""
    refused = refusals(model)
    return tuple(op for op in PLUGIN_OPS if op in available and op not in refused)


def refusals(model: ModelProto) -> dict[str, str]:
    """Op of the graph -> which of the plugin's limits its widths break, for those that do."""
    dims = {x.name: x.type.tensor_type.shape.dim for x in model.graph.input}
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.domain != contract.DOMAIN or node.op_type not in PLUGIN_OPS:
            continue
        op = ops.op(node.op_type)
        at = next((i for i, x in enumerate(op.inputs) if x.name == _PAST_INPUT), None)
        if at is None:
            continue
        stated = zip(op.inputs[at].shape, dims.get(node.input[at], ()), strict=False)
        wrong = op.refusal({letter: dim.dim_value for letter, dim in stated if dim.dim_value})  # what is not known here, the plugin will say
        if wrong:
            found[node.op_type] = wrong
    return found


def prepare(model: ModelProto, claimed: Collection[str] | None = None) -> PreparedGraph:
    """Drop the bodies of `claimed` ops (None: what `claims` says) and inline every other one, whose nodes are then called `CALL/Operator.n`.

    Every node has a name afterwards. The model is taken apart: use the result instead. Raises UserError if an op of ours has neither a plugin nor a body.
    """
    reasons = refusals(model)
    claimed = claims(model) if claimed is None else claimed
    bodies = {f.name: len(f.node) for f in model.functions if f.domain == contract.DOMAIN}
    calls = [(n.name, n.op_type) for n in model.graph.node]
    ours = sorted({n.op_type for n in model.graph.node if n.domain == contract.DOMAIN})
    lost = [op for op in ours if op not in claimed and op not in bodies]
    if lost:
        raise UserError("the graph uses an op that has neither a plugin nor a body", got=", ".join(lost), fix="sessa-deploy export CHECKPOINT --out BUNDLE")
    kept = [f for f in model.functions if f.name not in claimed]
    del model.functions[:]
    model.functions.extend(kept)
    weights = _take_weights(model.graph)
    if kept:
        model = onnx.inliner.inline_local_functions(model)
        _name_nodes(model.graph, calls, {f.name: len(f.node) for f in kept})
    _storage_of_plugins(model.graph, claimed)
    types = _types(onnx.shape_inference.infer_shapes(model).graph)
    del model.graph.value_info[:]
    _put_weights(model.graph, weights)
    pasts = {x.name for x in model.graph.input} - {contract.INPUT_IDS, contract.PAST_LENGTH, contract.NEW_LENGTH}
    direct = sorted({x for n in model.graph.node if n.op_type in claimed for x in n.input if x in pasts})
    inlined = [op for op in ours if op not in claimed]
    return PreparedGraph(model, types, inlined, direct, {op: reasons[op] for op in inlined if op in reasons})


def _take_weights(graph: GraphProto) -> dict[str, TensorProto]:
    """Take the data of large initializers out of the graph; their names, types and shapes stay."""
    taken = {}
    for i, tensor in enumerate(graph.initializer):
        if tensor.data_location == TensorProto.EXTERNAL or len(tensor.raw_data) > SMALL:
            whole = TensorProto()
            whole.CopyFrom(tensor)
            taken[tensor.name] = whole
            graph.initializer[i].CopyFrom(TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
    return taken


def _put_weights(graph: GraphProto, weights: dict[str, TensorProto]) -> None:
    for i, tensor in enumerate(graph.initializer):
        if tensor.name in weights:
            graph.initializer[i].CopyFrom(weights.pop(tensor.name))


def _name_nodes(graph: GraphProto, calls: Iterable[tuple[str, str]], bodies: dict[str, int]) -> None:
    """Name the nodes that came in place of a call after that call; the inliner keeps their order and gives them none."""
    nodes, at = list(graph.node), 0
    for name, op in calls:
        count, counts = bodies.get(op, 0), Counter[str]()
        for node in nodes[at : at + count]:
            node.name = f"{name}/{node.op_type}.{counts[node.op_type]}"
            counts[node.op_type] += 1
        at += count or 1
    for i, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}.{i}"


def _storage_of_plugins(graph: GraphProto, claimed: Collection[str]) -> None:
    """State the types of the plugins' outputs, so that type inference goes on behind them."""
    for node in graph.node:
        if node.op_type in claimed:
            storage = next((a.i for a in node.attribute if a.name == contract.ATTR_STORAGE), TensorProto.FLOAT)
            graph.value_info.extend(onnx.helper.make_tensor_value_info(x, storage, None) for x in node.output)


def _types(graph: GraphProto) -> dict[str, int]:
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {v.name: v.type.tensor_type.elem_type for v in values if v.type.HasField("tensor_type")}
    return {**types, **{t.name: t.data_type for t in graph.initializer}}

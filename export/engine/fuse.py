"""Work that an engine is spared: rewrites of the prepared graph after which a session computes the same tokens with fewer kernels. onnx only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, helper, numpy_helper

from sessa_deploy.export.graph.passes import drop_weights, reads, rename_reads, set_nodes

_INLINE_LIMIT = 1 << 30  # bytes of merged weights kept inside the message, which protobuf limits to 2 GiB
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "proj_fb")


def unmasked_rows(graph: GraphProto) -> int:
    """Give new.* as the layers compute them, without the zeros from new_length on; returns how many masks went.

    A session appends rows below new_length[b] only, so that nothing ever reads the others.
    """
    makers = {x: n for n in graph.node for x in n.output}
    gone, renamed = set(), {}
    for output in (x.name for x in graph.output):
        mask = makers.get(output)
        if mask is None or mask.op_type != "Where" or not output.startswith("new."):
            continue
        rows = mask.input[1]
        if rows in renamed or rows not in makers:  # one tensor cannot be two outputs
            continue
        gone.add(id(mask))
        renamed[rows] = output
    kept = [n for n in graph.node if id(n) not in gone]
    for node in kept:
        rename_reads(node, renamed)
        node.output[:] = [renamed.get(x, x) for x in node.output]
    set_nodes(graph, _needed(kept, {x.name for x in graph.output}))
    return len(gone)


def one_projection(graph: GraphProto, folder: Path) -> dict[str, str]:
    """Compute q, k, v and both halves of proj_fb of a layer by one matrix product; folder: of the graph's data file.

    Returns new value -> an old value of the same type. Columns of a product do not see each other, so each comes out as before. A graph whose merged
    weights would not fit into one message, or whose projections look otherwise, stays as it is.
    """
    weights = {x.name: x for x in graph.initializer}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for x in reads(node):
            readers[x].append(node)
    groups: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights and any(f".{p}/" in node.name for p in PROJECTIONS):
            groups[node.input[0]].append(node)
    size = sum(_bytes(weights[n.input[1]]) for group in groups.values() for n in group)
    if size > _INLINE_LIMIT:
        return {}
    plan: dict[int, list[NodeProto]] = {}
    gone: set[int] = set()
    same: dict[str, str] = {}
    merged: list[onnx.TensorProto] = []
    for source, group in groups.items():
        parts = [_Projection(n, readers, weights) for n in group]
        if len(parts) < 2 or any(p.outputs is None for p in parts):
            continue
        stem = group[0].name.split(".q_proj/")[0] + ".projections"
        tensors = {"weight": [p.weight for p in parts], "bias": [p.bias for p in parts]}
        for what, names in tensors.items():
            value = np.concatenate([numpy_helper.to_array(weights[n], str(folder)) for n in names], axis=-1)
            merged.append(numpy_helper.from_array(value, f"{stem}.{what}"))
        merged.append(numpy_helper.from_array(np.array([w for p in parts for w in p.widths], np.int64), f"{stem}.widths"))
        product, total = f"{stem}/MatMul.0:0", f"{stem}/Add.0:0"
        same |= {product: group[0].output[0], total: group[0].output[0]}
        plan[id(group[0])] = [
            helper.make_node("MatMul", [source, f"{stem}.weight"], [product], name=f"{stem}/MatMul.0"),
            helper.make_node("Add", [product, f"{stem}.bias"], [total], name=f"{stem}/Add.0"),
            helper.make_node("Split", [total, f"{stem}.widths"], [x for p in parts for x in p.outputs or ()], name=f"{stem}/Split.0", axis=-1),
        ]
        gone |= {id(n) for p in parts for n in p.nodes}
    nodes = []
    for node in graph.node:
        nodes += plan.get(id(node), [])
        if id(node) not in gone:
            nodes.append(node)
    set_nodes(graph, nodes)
    graph.initializer.extend(merged)
    drop_weights(graph)
    return same


class _Projection:
    """MatMul, Add of a bias and, behind proj_fb, Split in equal parts: its weights, nodes, and its outputs with their widths (outputs None: it is not one)."""

    def __init__(self, product: NodeProto, readers: dict[str, list[NodeProto]], weights: dict[str, onnx.TensorProto]) -> None:
        self.weight, self.bias, self.nodes = product.input[1], "", [product]
        self.outputs: Sequence[str] | None = None
        add = readers[product.output[0]]
        if len(add) != 1 or add[0].op_type != "Add" or add[0].input[1] not in weights or len(readers[self.weight]) != 1:
            return
        self.bias, width = add[0].input[1], weights[self.weight].dims[-1]
        self.nodes.append(add[0])
        behind = readers[add[0].output[0]]
        if len(behind) == 1 and behind[0].op_type == "Split" and len(behind[0].input) == 1:
            self.nodes.append(behind[0])
            self.outputs = list(behind[0].output)
        else:
            self.outputs = list(add[0].output)
        self.widths = [width // len(self.outputs)] * len(self.outputs)


def _bytes(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _needed(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """The nodes that something reads."""
    kept = []
    for node in reversed(nodes):
        if outputs.intersection(node.output):
            outputs = outputs.union(reads(node))
            kept.append(node)
    return kept[::-1]

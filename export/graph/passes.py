"""From the exporter's graph to the graph that ships: readers as old as TensorRT 8.6 take it, and equal models give equal bytes.

Each pass works on a GraphProto in place and uses nothing but onnx.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig

TRANSPOSED = ".T"  # suffix of a weight that the file holds transposed, ready for MatMul
# Operators whose later versions, up to opset 23, only take more types (or a default that keeps the old meaning).
_ONLY_MORE_TYPES = frozenset(("Cast", "Cos", "Identity", "Reshape", "Shape", "Sin", "Split", "Squeeze", "Transpose", "Unsqueeze"))
_SCOPES = "pkg.torch.onnx.name_scopes"


def plain_shapes(graph: GraphProto) -> None:
    """Replace Shape's start and end, which TensorRT 8.6's parser silently ignores, by Shape and Gather; one Shape a tensor."""
    nodes: list[NodeProto] = []
    whole: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "Shape":
            nodes.append(node)
            continue
        given = {a.name: a.i for a in node.attribute}
        start, end = given.get("start", 0), given.get("end")
        source = node.input[0]
        if source not in whole:
            whole[source] = f"{source}/shape"
            nodes.append(helper.make_node("Shape", [source], [whole[source]]))
        if start == 0 and end is None:
            _replace_input(graph, node.output[0], whole[source])
            continue
        if end is None or start < 0 or end <= start:
            raise RuntimeError(f"the exporter asked for dimensions {start}..{end} of {source}, which no pass handles")
        index = _constant(graph, list(range(start, end)))
        nodes.append(helper.make_node("Gather", [whole[source], index], [node.output[0]], axis=0))
    gathers = {n.output[0]: n for n in nodes if n.op_type == "Gather" and n.input[0] in whole.values()}
    for node in nodes:
        if node.op_type == "Squeeze" and len(node.input) == 1 and node.input[0] in gathers:
            # One dimension as a scalar: gather it as one, rather than squeeze what a parser may not know to be a vector of one.
            source, index = gathers[node.input[0]].input
            node.CopyFrom(helper.make_node("Gather", [source, _scalar(graph, index)], list(node.output), axis=0))
    set_nodes(graph, nodes)


def scalar_zeros(graph: GraphProto) -> None:
    """Where(mask, x, Expand(scalar, shape)) -> Where(mask, x, scalar): the zeros need no tensor of their own."""
    scalars = {x.name for x in graph.initializer if not x.dims}
    expanded = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Expand" and n.input[0] in scalars}
    for node in graph.node:
        if node.op_type == "Where" and node.input[2] in expanded:
            node.input[2] = expanded[node.input[2]]


def transposed_weights(graph: GraphProto, weights: Iterable[str]) -> dict[str, bool]:
    """Take Transpose nodes off weights that nothing else reads; returns weight -> whether the file is to hold it transposed."""
    uses = Counter(name for node in graph.node for name in reads(node))
    result = dict.fromkeys(weights, False)
    nodes = []
    for node in graph.node:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        if node.op_type != "Transpose" or node.input[0] not in result or perm != [1, 0] or uses[node.input[0]] != 1:
            nodes.append(node)
            continue
        value = next(x for x in graph.input if x.name == node.input[0])
        dims = value.type.tensor_type.shape.dim
        dims[0].dim_value, dims[1].dim_value = dims[1].dim_value, dims[0].dim_value
        result[value.name] = True
        _replace_input(graph, node.output[0], value.name)
    set_nodes(graph, nodes)
    return result


def retarget(graph: GraphProto, source: int, target: int) -> None:
    """Rewrite nodes of opset `source` as opset `target`. Raises RuntimeError on an operator whose meaning changed between the two."""
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Split" and len(node.input) == 1:
            kept = [a for a in node.attribute if a.name != "num_outputs"]
            del node.attribute[:]
            node.attribute.extend(kept)
            if target >= 18:
                node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
        old, new = (onnx.defs.get_schema(node.op_type, version) for version in (source, target))
        if old.since_version != new.since_version and node.op_type not in _ONLY_MORE_TYPES:
            raise RuntimeError(f"{node.op_type} differs between opset {source} and {target}, and export.passes knows no conversion")


def drop_unused(graph: GraphProto) -> None:
    """Remove nodes whose outputs nobody reads, then initializers nobody reads."""
    needed = {x.name for x in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(reads(node))
            kept.append(node)
    set_nodes(graph, kept[::-1])
    drop_weights(graph)


def merge_constants(graph: GraphProto) -> None:
    """One initializer a distinct value."""
    first: dict[bytes, str] = {}
    renamed, kept = {}, []
    for tensor in graph.initializer:
        name = first.setdefault(_bare_tensor(tensor, "").SerializeToString(deterministic=True), tensor.name)
        renamed[tensor.name] = name
        if name == tensor.name:
            kept.append(tensor)
    for node in graph.node:
        rename_reads(node, renamed)
    del graph.initializer[:]
    graph.initializer.extend(kept)


def shape_interface(graph: GraphProto, config: SessaConfig, all_logits: bool) -> None:
    """Name the dynamic dims of inputs and outputs B, T and P, the same P on every past input. Raises RuntimeError on other names or ranks."""
    batch, tokens, past = contract.DIM_BATCH, contract.DIM_TOKENS, contract.DIM_PAST
    shapes: dict[str, list[str | int]] = {
        contract.INPUT_IDS: [batch, tokens], contract.PAST_LENGTH: [batch], contract.NEW_LENGTH: [batch],
        contract.LOGITS: [batch, tokens, config.vocab_size] if all_logits else [batch, config.vocab_size],
    }
    for i, field in contract.cache_entries(config.n_layers):
        row = contract.cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim)
        shapes[contract.past_name(i, field)] = [batch, past, *row]
        shapes[contract.new_name(i, field)] = [batch, tokens, *row]
    inputs, outputs = contract.graph_inputs(config.n_layers), contract.graph_outputs(config.n_layers)
    if [x.name for x in graph.input][: len(inputs)] != inputs or [x.name for x in graph.output] != outputs:
        raise RuntimeError("the exporter changed the names or the order of the graph's inputs and outputs")
    for value in [*graph.input[: len(inputs)], *graph.output]:
        kind = value.type.tensor_type.elem_type
        if value.type.tensor_type.HasField("shape") and len(value.type.tensor_type.shape.dim) != len(shapes[value.name]):
            raise RuntimeError(f"the exporter gave {value.name} another rank")
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shapes[value.name]))


def rename(graph: GraphProto, weights: dict[str, str]) -> None:
    """Strip what ties the graph to a machine or a run (docs, metadata, traces) and give every node and value a name of its place in the model.

    weights: name in the graph -> name in the file. Nodes are called `scope/Operator.n`, their values `scope/Operator.n:output`.
    """
    fixed = {x.name for x in graph.output} | {x.name for x in graph.input}
    names: dict[str, str] = dict(weights)
    counts: Counter[str] = Counter()
    scope = ""
    for node in graph.node:
        scope = _scope(node, scope)
        stem = f"{scope}/{node.op_type}" if scope else node.op_type
        node.name = f"{stem}.{counts[stem]}"
        counts[stem] += 1
        for i, output in enumerate(node.output):
            if output not in fixed:
                names[output] = f"{node.name}:{i}"
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    constants = {x.name: x for x in graph.initializer}
    order: dict[str, None] = {}
    for node in graph.node:
        order.update(dict.fromkeys(x for x in reads(node) if x in constants))
    for i, old in enumerate(order):
        names[old] = f"constant.{i}"
    for node in graph.node:
        rename_reads(node, names)
        node.output[:] = [names.get(x, x) for x in node.output]
    for value in graph.input:
        value.name = names.get(value.name, value.name)
    ordered = [_bare_tensor(constants[old], names[old]) for old in order]
    del graph.initializer[:]
    graph.initializer.extend(ordered)
    for field in ("doc_string", "value_info", "metadata_props", "quantization_annotation"):
        graph.ClearField(field)  # type: ignore[arg-type]
    graph.name = "sessa"


def _scope(node: NodeProto, current: str) -> str:
    """Module a node comes from (`layers.0.mixer.q_proj`), or the layer we are in where the node does not say."""
    text = next((x.value for x in node.metadata_props if x.key == _SCOPES), "")
    scopes = ast.literal_eval(text) if text else []
    named = [x for x in scopes[:-1] if x and not x.startswith("_")]
    if named:
        return named[-1].removeprefix("model").removeprefix(".")
    return ".".join(current.split(".")[:2]) if current.startswith("layers.") else ""


def _bare_tensor(tensor: TensorProto, name: str) -> TensorProto:
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), name)


def _constant(graph: GraphProto, values: list[int]) -> str:
    name = f"index/{'_'.join(map(str, values))}"
    if all(x.name != name for x in graph.initializer):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    return name


def _scalar(graph: GraphProto, vector: str) -> str:
    value = next(x for x in graph.initializer if x.name == vector)
    if list(value.dims) != [1]:
        raise RuntimeError("the exporter squeezed a shape of more than one dimension")
    name = f"{vector}/scalar"
    if all(x.name != name for x in graph.initializer):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [], [int(onnx.numpy_helper.to_array(value)[0])]))
    return name


def _replace_input(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        rename_reads(node, {old: new})


def reads(node: NodeProto) -> list[str]:
    """Names of the values a node reads: its inputs, then what the bodies of If, Loop and Scan capture from around them."""
    found = list(node.input)
    for body in _bodies(node):
        inside = _defined(body)
        for inner in body.node:
            found += [x for x in reads(inner) if x not in inside]
        found += [x.name for x in body.output if x.name not in inside]
    return found


def rename_reads(node: NodeProto, names: Mapping[str, str]) -> None:
    """Have a node read `names[x]` in place of x, in its bodies too, save where a body has a value of that name itself."""
    node.input[:] = [names.get(x, x) for x in node.input]
    for body in _bodies(node):
        inside = _defined(body)
        here = {old: new for old, new in names.items() if old not in inside}
        for inner in body.node:
            rename_reads(inner, here)
        for value in body.output:
            value.name = here.get(value.name, value.name)


def _bodies(node: NodeProto) -> list[GraphProto]:
    return [body for a in node.attribute for body in ([a.g] if a.type == AttributeProto.GRAPH else a.graphs)]


def _defined(body: GraphProto) -> set[str]:
    """Names that a body gives values itself."""
    return {x.name for x in body.input} | {x.name for x in body.initializer} | {x for n in body.node for x in n.output}


def set_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Put these nodes, which may be the graph's own, in place of the graph's."""
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def drop_weights(graph: GraphProto) -> None:
    """Remove the initializers that neither a node reads nor the graph gives out."""
    read = {x for n in graph.node for x in reads(n)} | {x.name for x in graph.output}
    kept = [x for x in graph.initializer if x.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)

"""What TensorRT 8.6's parser cannot take of a graph, said before TensorRT sees it. onnx only."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from sessa_deploy import contract
from sessa_deploy.export.engine.graph import PLUGIN_OPS
from sessa_deploy.export.graph.passes import reads

_OLD_PARSER_OPSET = 17  # the last one that TensorRT 8.6 knows
# Operators of our graphs that TensorRT 8.6's parser imports; everything else is named to the user before TensorRT sees it.
_OLD_PARSER_OPS = frozenset(
    word
    for line in (
        "Abs Add And ArgMax Cast Ceil Clip Concat Constant ConstantOfShape Cos CumSum Div Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements",
        "GatherND Gemm Greater GreaterOrEqual Identity If IsInf IsNaN LayerNormalization Less LessOrEqual Log Loop MatMul Max Mean Min Mod Mul Neg Not OneHot",
        "Or Pad Pow Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Round ScatterElements ScatterND Shape Sigmoid",
        "Sign Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor",
    )
    for word in line.split()
)
# Operators one of whose inputs is a shape, and the first such input.
_SHAPE_INPUTS = {"Range": 0, "ConstantOfShape": 0, **dict.fromkeys(("Reshape", "Expand", "Tile", "Slice", "Split", "Squeeze", "Unsqueeze", "Pad", "TopK"), 1)}
_OLD_PARSER_CONSTANT = {"Squeeze": 1, "Unsqueeze": 1, "ReduceSum": 1}  # inputs (axes) that must be constants there


def complaints(model: ModelProto, tensorrt: tuple[int, ...], claimed: Collection[str] = PLUGIN_OPS) -> list[str]:
    """What this TensorRT's parser cannot take, one line each with the node's name; empty for 10 and later, whose parsers say it themselves."""
    if tensorrt[0] >= 10:
        return []
    found = []
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset > _OLD_PARSER_OPSET:
        found.append(f"the graph is of opset {opset}, TensorRT 8.6 reads up to {_OLD_PARSER_OPSET}: export with --opset {_OLD_PARSER_OPSET}")
    constants = {x.name for x in model.graph.initializer}
    for node in _nodes(model.graph):
        constants.update(node.output if node.op_type == "Constant" else ())
        if node.op_type in claimed:
            continue
        if node.op_type not in _OLD_PARSER_OPS:
            found.append(f"{node.name}: TensorRT 8.6 has no {node.op_type}")
        at = _OLD_PARSER_CONSTANT.get(node.op_type)
        if at is not None and len(node.input) > at and node.input[at] and node.input[at] not in constants:
            found.append(f"{node.name}: the axes of {node.op_type} must be constant in TensorRT 8.6")
        if node.op_type == "Constant" and any(a.name in ("value_int", "value_ints") for a in node.attribute):
            found.append(f"{node.name}: TensorRT 8.6 reads integers of Constant from a tensor only")
        if node.op_type == "Shape" and node.attribute:
            found.append(f"{node.name}: TensorRT 8.6 ignores start and end of Shape")
    found += [f"{name}: its shape depends on lengths or ids, not on shapes alone" for name in data_dependent_shapes(model.graph)]
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            found.append(f"{tensor.name}: TensorRT 8.6 has no bfloat16: export with --precision fp16 or fp32")
            break
    return found


def data_dependent_shapes(graph: GraphProto) -> list[str]:
    """Names of nodes whose output shape follows from the values of input_ids, past_length or new_length: TensorRT would read them on the host."""
    data, found = {contract.INPUT_IDS, contract.PAST_LENGTH, contract.NEW_LENGTH}, []
    for node in graph.node:
        if node.op_type == "Shape":
            continue
        if any(x in data for x in list(node.input)[_SHAPE_INPUTS.get(node.op_type, len(node.input)) :]):
            found.append(node.name)
        if any(x in data for x in reads(node)):
            data.update(node.output)
    return found


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those of nested graphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)

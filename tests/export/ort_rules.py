"""What a graph must not have so that ONNX Runtime can capture its steps as a CUDA graph, and SessaRotary in standard operators."""

from __future__ import annotations

import onnx
import onnx.parser

from sessa_deploy import contract
from sessa_deploy.export.graph.passes import reads

_ON_THE_HOST = {"Reshape": 1, "Expand": 1, "Split": 1, "Squeeze": 1, "Unsqueeze": 1}  # which input is a shape, of operators that run on the GPU
_OF_SHAPES = {"Gather", "Concat", "Cast", "Mul", "Add", "Sub", "Div", "Squeeze", "Unsqueeze", "Slice"}  # that may make one shape of others
_NEVER = {"If", "Loop", "Scan", "Pad", "TopK", "NonZero", "Range", "ConstantOfShape", "GatherND", "ScatterND"}


def breaches(graph: onnx.GraphProto) -> list[str]:
    """Nodes that would run on the host between nodes of the GPU, branch, or copy pointers from the host: an unequal Split."""
    constants = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer if x.data_location != onnx.TensorProto.EXTERNAL}
    types = {x.name: x.type.tensor_type.elem_type for x in graph.input}
    shapes: set[str] = set()
    found = []
    for node in graph.node:
        read = [x for x in reads(node) if x]
        varying = [x for x in read if x not in constants]
        if node.op_type in _NEVER:
            found.append(f"{node.name}: {node.op_type}")
        elif node.op_type == "Shape" or (node.op_type in _OF_SHAPES and varying and shapes.issuperset(varying)):
            shapes.update(node.output)
        elif any(x in shapes and i != _ON_THE_HOST.get(node.op_type) for i, x in enumerate(node.input)):
            found.append(f"{node.name}: {node.op_type} reads a shape as a value")
        if node.op_type == "Split" and len(node.input) > 1 and len(set(constants[node.input[1]].tolist())) > 1:
            found.append(f"{node.name}: unequal Split")
        if node.op_type == "Clip" and types.get(node.input[0]) == onnx.TensorProto.INT32:
            found.append(f"{node.name}: Clip of int32")
    return found


def rotary_function(opset: int) -> onnx.FunctionProto:
    """cos and sin (B,T,J) of the positions past_length[b] + t, by the turns whose three limbs and rest are the rows of limbs (4,J)."""
    return onnx.parser.parse_function(f"""
        <domain: "{contract.DOMAIN}", opset_import: ["": {opset}]>
        {contract.ROTARY_OP} <storage> (x, past_length, limbs) => (cos, sin) {{
            zero = Constant <value: tensor = int64 {{0}}> ()
            one = Constant <value: tensor = int64 {{1}}> ()
            axis0 = Constant <value: tensor = int64[1] {{0}}> ()
            axis1 = Constant <value: tensor = int64[1] {{1}}> ()
            axis2 = Constant <value: tensor = int64[1] {{2}}> ()
            ones = Constant <value: tensor = int64[4] {{1, 1, 1, 1}}> ()
            turn = Constant <value: tensor = float {{6.2831855}}> ()
            shape = Shape (x)
            tokens = Gather (shape, one)
            range = Range (zero, tokens, one)
            new = Unsqueeze (range, axis0)
            wide = Cast <to = 7> (past_length)
            past = Unsqueeze (wide, axis1)
            sum = Add (past, new)
            at = Cast <to = 1> (sum)
            where = Unsqueeze (at, axis2)
            l0, l1, l2, l3 = Split <axis = 0> (limbs, ones)
            p0 = Mul (where, l0)
            p1 = Mul (where, l1)
            p2 = Mul (where, l2)
            p3 = Mul (where, l3)
            f0 = Floor (p0)
            f1 = Floor (p1)
            f2 = Floor (p2)
            r0 = Sub (p0, f0)
            r1 = Sub (p1, f1)
            r2 = Sub (p2, f2)
            a01 = Add (r0, r1)
            a012 = Add (a01, r2)
            whole = Floor (a012)
            part = Sub (a012, whole)
            turns = Add (part, p3)
            angle = Mul (turns, turn)
            cos = Cos (angle)
            sin = Sin (angle)
        }}""")

"""Graphs of one of our nodes, as bytes of ONNX: what the tests of libsessa_ort.so give to ONNX Runtime."""

from __future__ import annotations

from typing import Any

from sessa_deploy import contract
from sessa_deploy.plugins import ops

OPEN = {"B": "batch", "T": "tokens", "P": "capacity"}  # dimensions that a bundle's graph leaves open
# one size for every letter, fitting together; D is wide enough that heads, pairs and projections of every operation fit
SIZES = {"B": 2, "T": 3, "P": 5, "D": 64, "H": 4, "K": 2, "C": 16, "N": 3 * 64 + 2 * 32, "E": 128, "J": 8, "I": 1, "R": 4}
KINDS = {"float32": 1, "int32": 6}  # ONNX types
Dim = int | str | None


def type_of(operand: ops.Operand, storage: int) -> int:
    """An operand's ONNX type."""
    return KINDS.get(operand.kind, storage)


def node_model(op: ops.Op, storage: int, sizes: dict[str, Dim] | None = None, attributes: dict[str, Any] | None = None,
               shapes: dict[str, list[Dim] | None] | None = None, types: dict[str, int] | None = None, weights: int = 0) -> bytes:  # fmt: skip
    """A graph of one node, its inputs and outputs those of the graph; the outputs have neither type nor shape, for ONNX Runtime to infer.

    sizes: of letters, where they are not SIZES' own; OPEN's are open unless they stand here. weights: the form of the operation. attributes: default,
    `storage` and, where they are not 0, `weights`. shapes, types: of inputs that are to be other than they should; a shape of None is unknown.
    """
    from onnx import helper

    known: dict[str, Dim] = {**SIZES, **OPEN, **(sizes or {})}
    shapes, types = shapes or {}, types or {}
    attributes = op.node_attributes(storage, weights) if attributes is None else attributes
    op = op.form(weights)
    known |= {letter.lower(): size // 2 for letter, size in known.items() if isinstance(size, int)}
    inputs = [helper.make_tensor_value_info(x.name, types.get(x.name, type_of(x, storage)), shapes.get(x.name, [known[c] for c in x.shape]))
              for x in op.inputs]  # fmt: skip
    outputs = [helper.make_empty_tensor_value_info(x.name) for x in op.outputs]
    node = helper.make_node(op.name, [x.name for x in op.inputs], [x.name for x in op.outputs], name="layers.0", domain=contract.DOMAIN,
                            **attributes)  # fmt: skip
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(contract.DOMAIN, contract.DOMAIN_VERSION)]
    model = helper.make_model(helper.make_graph([node], "one", inputs, outputs), opset_imports=imports, ir_version=9)
    data: bytes = model.SerializeToString()
    return data

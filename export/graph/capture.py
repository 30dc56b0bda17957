"""A model's graph through torch.export and torch's ONNX exporter, without its weights: they are fake while it is traced.

Nothing here touches a weight's bytes, so tracing a model of any size costs the same little memory. Only API common to torch 2.11 and 2.13 is used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import onnx_ir
import onnxscript
import torch
from onnx.defs import OpSchema
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.model import SessaLM
from sessa_deploy.plugins import ops

EXPORTER_OPSET = 18  # what torch's exporter writes; export.passes takes it from there to the opset asked for
# Sizes of the traced example: all different and none of them 0 or 1, which torch.export would take for constants.
_BATCH, _TOKENS, _PAST = 2, 3, 5


class _Graph(nn.Module):
    """SessaLM.graph as a forward method."""

    def __init__(self, model: SessaLM, all_logits: bool) -> None:
        super().__init__()
        self.model = model
        self.all_logits = all_logits

    def forward(self, input_ids: Tensor, past_length: Tensor, new_length: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        return self.model.graph(input_ids, past_length, new_length, past, self.all_logits)


def capture(config: SessaConfig, precision: str, all_logits: bool = False) -> tuple[onnx.GraphProto, list[str]]:
    """The graph of a SessaLM at `precision` in opset 18, and the names of its weights (state_dict names) that it reads.

    Inputs and outputs are named as contract.py says; behind them the inputs list the weights, of which the graph holds no values.
    Each op of the contract is one node of domain `sessa`.
    """
    content, weights = _captured(config, precision, all_logits)
    return onnx.GraphProto.FromString(content), list(weights)


@functools.lru_cache(maxsize=16)
def _captured(config: SessaConfig, precision: str, all_logits: bool) -> tuple[bytes, tuple[str, ...]]:
    """The same as bytes; kept, because tracing takes seconds and the graph some kilobytes a layer."""
    with _quiet():
        program = torch.onnx.export(
            _trace(config, precision, all_logits), dynamo=True, opset_version=EXPORTER_OPSET, optimize=False, verbose=False,
            input_names=contract.graph_inputs(config.n_layers), output_names=contract.graph_outputs(config.n_layers), custom_translation_table=_translations(),
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        model = program.model
        weights = [name for name, value in model.graph.initializers.items() if isinstance(getattr(value.const_value, "raw", None), FakeTensor)]
        for name in weights:
            value = model.graph.initializers.pop(name)
            value.const_value = None
            model.graph.inputs.append(value)
        onnxscript.optimizer.optimize(model)
        graph = onnx_ir.serde.serialize_model(model).graph
    return graph.SerializeToString(), tuple(weights)


def _trace(config: SessaConfig, precision: str, all_logits: bool) -> torch.export.ExportedProgram:
    """torch.export of a model whose parameters are fake tensors of the right shapes and dtypes."""
    with torch.device("meta"):
        model = SessaLM(config).to_precision(precision).eval()
    batch, tokens, rows = (torch.export.Dim(name) for name in (contract.DIM_BATCH, contract.DIM_TOKENS, contract.DIM_PAST))
    with FakeTensorMode():
        fake: dict[int, nn.Parameter] = {}  # a tied weight stays one parameter
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) not in fake:
                    fake[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=False)
                setattr(module, name, fake[id(weight)])
        storage = getattr(torch, contract.PRECISIONS[precision].torch)
        past = [
            torch.empty(_BATCH, _PAST, *contract.cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim), dtype=storage)
            for _, field in contract.cache_entries(config.n_layers)
        ]
        ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64)
        past_length, new_length = torch.zeros(_BATCH, dtype=torch.int32), torch.zeros(_BATCH, dtype=torch.int32)
        shapes = ({0: batch, 1: tokens}, {0: batch}, {0: batch}, [{0: batch, 1: rows} for _ in past])
        with torch.no_grad():
            return torch.export.export(_Graph(model, all_logits).eval(), (ids, past_length, new_length, past), dynamic_shapes=shapes, strict=False)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the exporter writes for our ops, which stay nodes, and for GELU, whose exact form needs float32."""
    op: Any = onnxscript.opset18

    def attention(operator: Any) -> Callable[..., Any]:
        def translate(q: Any, *rest: Any) -> Any:
            return operator(q, *rest, **{contract.ATTR_SCALE: float(q.shape[-1]) ** -0.5, contract.ATTR_STORAGE: int(q.dtype)})

        return translate

    def gelu(x: Any, approximate: str = "none") -> Any:
        if approximate != "none":
            raise NotImplementedError(f"GELU approximated by {approximate}")
        # The exporter's own form rounds sqrt(2) to the storage type: 1.4140625 in float16.
        wide = x if int(x.dtype) == onnx.TensorProto.FLOAT else op.Cast(x, to=onnx.TensorProto.FLOAT)
        out = op.Mul(op.Mul(wide, 0.5), op.Add(op.Erf(op.Mul(wide, 0.5**0.5)), 1.0))
        return out if wide is x else op.Cast(out, to=int(x.dtype))

    return {
        torch.ops.sessa.feedback_attention.default: attention(_operator(contract.FEEDBACK_OP)),
        torch.ops.sessa.causal_attention.default: attention(_operator(contract.CAUSAL_OP)),
        torch.ops.aten.gelu.default: gelu,
    }


def _operator(name: str) -> Any:
    """An onnxscript operator of domain `sessa`, made from its description: the exporter leaves its node in the graph."""
    described, kinds = ops.op(name), {"storage": "T", "float32": "tensor(float)", "int32": "tensor(int32)"}
    schema = OpSchema(
        name, contract.DOMAIN, contract.DOMAIN_VERSION,
        inputs=[OpSchema.FormalParameter(x.name, kinds[x.kind]) for x in described.inputs],
        outputs=[OpSchema.FormalParameter(x.name, kinds[x.kind]) for x in described.outputs],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "the storage type")],
        attributes=[
            *(OpSchema.Attribute(x.name, OpSchema.AttrType.FLOAT, x.allowed) for x in described.attributes),
            OpSchema.Attribute(contract.ATTR_STORAGE, OpSchema.AttrType.INT, "ONNX type number of the storage type"),
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(contract.DOMAIN, contract.DOMAIN_VERSION), name, schema)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings (missing torchvision, its own deprecations) off the user's terminal; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

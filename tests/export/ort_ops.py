"""Small helpers of the export tests: one op as a model, an ONNX Runtime session, the recurrences in numpy float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from sessa_deploy import contract
from sessa_deploy.export.graph.functions import causal_function, feedback_function


def op_model(op: str, storage: int, opset: int, scale: float, block: int | None = None) -> onnx.ModelProto:
    """A model of one node of `op`, its function body beside it; every dimension dynamic."""
    feedback = op == contract.FEEDBACK_OP
    names = contract.FEEDBACK_INPUTS if feedback else contract.CAUSAL_INPUTS
    kinds = {"gamma": 11 if storage == 11 else 1, "past_length": 6}
    row = ["D"] if feedback else ["H", "d"]
    shapes = {"gamma": ["B", "T"], "past_length": ["B"], "past_k": ["B", "P", *row], "past_s": ["B", "P", *row], "past_v": ["B", "P", *row]}
    if not feedback:
        shapes["q"] = ["B", "T", "Hq", "d"]
    inputs = [helper.make_tensor_value_info(n, kinds.get(n, storage), shapes.get(n, ["B", "T", *row])) for n in names]
    out = contract.FEEDBACK_OUTPUTS[0] if feedback else contract.CAUSAL_OUTPUTS[0]
    outputs = [helper.make_tensor_value_info(out, storage, ["B", "T", "D"] if feedback else ["B", "T", "Hq", "d"])]
    node = helper.make_node(op, list(names), [out], domain=contract.DOMAIN, scale=scale, storage=storage)
    if feedback:
        function = feedback_function(storage, opset) if block is None else feedback_function(storage, opset, block)
    else:
        function = causal_function(storage, opset)
    return helper.make_model(
        helper.make_graph([node], op, inputs, outputs), functions=[function], ir_version=8,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(contract.DOMAIN, contract.DOMAIN_VERSION)],
    )


def session(model: onnx.ModelProto | str, threads: int = 2, without: Sequence[str] = ()) -> onnxruntime.InferenceSession:
    """An ONNX Runtime CPU session of a model or a file. without: names of optimizers to leave out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without))


def _softmax(scores: np.ndarray) -> np.ndarray:
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def recurrence(q: np.ndarray, k: np.ndarray, gamma: np.ndarray, f: np.ndarray, past_k: np.ndarray, past_s: np.ndarray, past_length: np.ndarray) -> np.ndarray:
    """Feedback attention token by token in float64; s (B,T,D)."""
    q, k, gamma, f, past_k, past_s = (x.astype(np.float64) for x in (q, k, gamma, f, past_k, past_s))
    batch, tokens, width = q.shape
    s = f.copy()
    for b in range(batch):
        keys, values = list(past_k[b, : past_length[b]]), list(past_s[b, : past_length[b]])
        for t in range(tokens):
            if keys:
                alpha = _softmax(np.array(keys) @ q[b, t] * width**-0.5)
                s[b, t] += gamma[b, t] * (alpha @ np.array(values))
            keys.append(k[b, t])
            values.append(s[b, t])
    return s


def causal(q: np.ndarray, k: np.ndarray, v: np.ndarray, past_k: np.ndarray, past_v: np.ndarray, past_length: np.ndarray) -> np.ndarray:
    """Causal attention with a cache in float64; o (B,T,Hq,d)."""
    q, k, v, past_k, past_v = (x.astype(np.float64) for x in (q, k, v, past_k, past_v))
    batch, tokens, heads, width = q.shape
    group = heads // k.shape[2]
    o = np.empty_like(q)
    for b in range(batch):
        for h in range(heads):
            old = slice(0, past_length[b]), h // group
            keys = np.concatenate([past_k[b][old], k[b, :, h // group]])
            values = np.concatenate([past_v[b][old], v[b, :, h // group]])
            for t in range(tokens):
                end = past_length[b] + t + 1
                o[b, t, h] = _softmax(keys[:end] @ q[b, t, h] * width**-0.5) @ values[:end]
    return o

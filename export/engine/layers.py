"""Layers computed by the library alone: everything between embedding and logits becomes nodes that our kernels run.

TensorRT 8.6 gives a fused region one type. The float32 islands of a 16-bit graph (norm, GELU, gain, rotary positions) then make whole layers float32,
products included, and its 16-bit products may sum in 16 bits. The library's kernels sum in float32 and round where the graph does. onnx and numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, external_data_helper, helper, numpy_helper

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.export.engine.fuse import PROJECTIONS
from sessa_deploy.export.graph.passes import drop_weights, reads, set_nodes
from sessa_deploy.kernels.launch.limits import ROTARY_LIMBS
from sessa_deploy.plugins import ops

_EIGHT = {f.onnx for f in contract.WEIGHT_FORMATS.values()}
_MESSAGE_LIMIT = 2_000_000_000  # bytes; protobuf refuses 2 GiB
_PICKED = ["GatherElements", "Expand", "Unsqueeze", "Clip", "Sub", "Cast"]  # upwards from the last tokens' rows to new_length


class Unavailable(Exception):
    """The library cannot compute these layers; the message says why, and the graph is as it was."""


@dataclass(frozen=True)
class _Matrix:
    """An op's matrix (columns, depth): its operand, and where that is in 8 bits the operand of its scales and the ONNX type of its values (0: it is not)."""

    weight: str
    scale: str = ""
    form: int = 0


@dataclass
class _Rewrite:
    """What is known of the graph, and what replaces parts of it. made: new nodes; weights: new initializers; types: those of new values."""

    graph: GraphProto
    config: SessaConfig
    storage: int
    folder: Path
    made: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    types: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {n.name: n for n in self.graph.node}
        self.maker = {x: n for n in self.graph.node for x in n.output}
        self.tensors = {x.name: x for x in self.graph.initializer}

    def array(self, name: str) -> NDArray[Any]:
        if name not in self.tensors:
            raise Unavailable(f"the graph has no weight {name}, as our exporter writes it")
        return numpy_helper.to_array(self.tensors[name], str(self.folder))

    def weight(self, name: str) -> NDArray[Any]:
        """A weight as in the state dict, (columns, depth), however the file holds it."""
        return self.array(f"{name}.T").T if f"{name}.T" in self.tensors else self.array(name)

    def matrix(self, name: str, *parts: str) -> _Matrix:
        """The matrices of the state dict, one below the other, as an op reads them; name: of what is made of them.

        In 8 bits it is (columns, depth / 2) of the storage type's bits, so that no engine needs a type for them. One alone is the bytes of the file. Where
        some of several stay in 16 bits, all are: an op reads one matrix.
        """
        stored = {p: found for p in parts if (found := self.eight(p)) is not None}
        if len(stored) < len(parts):
            return _Matrix(self.put(f"{name}.rows", np.concatenate([self.wide(*stored[p]) if p in stored else self.weight(p) for p in parts])))
        values, scales = ([pair[i] for pair in stored.values()] for i in range(2))
        columns, depth, form = sum(x.dims[0] for x in values), values[0].dims[1], values[0].data_type
        packed, scale = TensorProto(), scales[0].name
        if len(parts) == 1:
            packed.CopyFrom(values[0])
        else:
            packed.name, packed.raw_data = name + contract.QUANTISED, b"".join(self.raw(x) for x in values)
            scale = self.put(name + contract.SCALE, np.concatenate([self.array(x.name) for x in scales]))
        packed.data_type, packed.dims[:] = self.storage, (columns, depth // 2)
        self.weights.append(packed)
        return _Matrix(packed.name, scale, form)

    def eight(self, name: str) -> tuple[TensorProto, TensorProto] | None:
        """Values (columns, depth) and scales (columns,) of a matrix that the graph makes wide itself; None for one that is."""
        node = self.nodes.get(f"{name}/DequantizeLinear")
        if node is None:
            return None
        found = [self.tensors.get(x) for x in node.input]
        if len(found) != 2 or found[0] is None or found[1] is None or found[0].data_type not in _EIGHT or found[1].dims != found[0].dims[:1]:
            raise Unavailable(f"{node.name} is not as our exporter writes it")
        return found[0], found[1]

    def wide(self, q: TensorProto, scale: TensorProto) -> NDArray[Any]:
        """A matrix in 8 bits as the file's graph gives it to its product."""
        whole = self.array(q.name).astype(np.float32) * self.array(scale.name)[:, None]
        return whole.astype(helper.tensor_dtype_to_np_dtype(self.storage))

    def raw(self, tensor: TensorProto) -> bytes:
        if tensor.data_location != TensorProto.EXTERNAL:
            return tensor.raw_data
        loaded = TensorProto()
        loaded.CopyFrom(tensor)
        external_data_helper.load_external_data_for_tensor(loaded, str(self.folder))
        return loaded.raw_data

    def put(self, name: str, value: NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, name: str) -> NodeProto:
        if name not in self.nodes:
            raise Unavailable(f"the graph has no node {name}, as our exporter writes it")
        return self.nodes[name]

    def add(self, op: str, name: str, inputs: list[str], outputs: list[str], matrix: _Matrix | None = None, **numbers: float) -> None:
        """matrix: whose operand is among the inputs."""
        if matrix is not None and matrix.form:
            inputs, numbers = [*inputs, matrix.scale], {**numbers, contract.ATTR_WEIGHTS: matrix.form}
        self.made.append(_node(op, name, inputs, outputs, self.storage, **numbers))
        self.types |= dict.fromkeys(outputs, self.storage)


def sizes(config: SessaConfig) -> dict[str, int]:
    """The model's widths by the letters of `ops.SIZES`."""
    d, head, kv = config.d_model, config.head_dim, config.kv_heads
    return {"D": d, "E": 2 * d, "H": config.n_heads, "K": kv, "C": head, "J": head // 2, "N": 3 * d + 2 * kv * head}


def refusal(graph: GraphProto, config: SessaConfig) -> str | None:
    """Why the library has no kernels for these layers, or None: their widths, `rotary` tables, both attentions as plugins."""
    for op in (contract.NORM_ENTER_OP, contract.PROJECT_GAIN_OP, contract.TAIL_OP):
        wrong = ops.op(op).refusal(sizes(config))
        if wrong is not None:
            return wrong
    kinds = [n.op_type for n in graph.node]
    for op in (contract.FEEDBACK_OP, contract.CAUSAL_OP):
        if kinds.count(op) != config.n_layers:
            return f"{kinds.count(op)} of {config.n_layers} layers have {op} as a plugin"
    return None if kinds.count(contract.ROTARY_OP) == 1 else "the graph has no rotary positions as our exporter writes them"


def rotary(graph: GraphProto, storage: int) -> dict[str, int] | None:
    """Put the library's node in place of the sums that give cos and sin: one kernel instead of ten, and nothing for TensorRT to try for a minute.

    storage: ONNX type number of the activations. Returns the ONNX types of the new values, or None, with the graph as it was, without such sums.
    """
    maker = {x: n for n in graph.node for x in n.output}
    tables = [next((n.output[0] for n in graph.node if n.op_type == op), "") for op in ("Cos", "Sin")]
    embedding = next((n.output[0] for n in graph.node if n.name == "embedding/Gather.0"), "")
    above, queue = set[int](), [maker[t] for t in tables if t]
    while queue:
        node = queue.pop()
        if id(node) not in above:
            above.add(id(node))
            queue += [maker[x] for x in reads(node) if x in maker]
    tensors = {x.name: x for x in graph.initializer}
    read = [x for n in graph.node if id(n) in above for x in reads(n)]
    limbs = [numpy_helper.to_array(tensors[x]) for x in read if x in tensors and len(tensors[x].dims) == 1 and tensors[x].data_type == TensorProto.FLOAT]
    if len(limbs) != ROTARY_LIMBS or not embedding or len({x.shape for x in limbs}) != 1:
        return None
    flat, axes = [f"rotary:{i}" for i in range(2)], "rotary/axes"
    graph.initializer.extend([numpy_helper.from_array(np.stack(limbs), "rotary/limbs"), numpy_helper.from_array(np.array([2], np.int64), axes)])
    made = [_node(contract.ROTARY_OP, "rotary", [embedding, contract.PAST_LENGTH, "rotary/limbs"], flat, storage)]
    made += [helper.make_node("Unsqueeze", [x, axes], [t], name=f"rotary/heads.{i}") for i, (x, t) in enumerate(zip(flat, tables, strict=True))]
    _set_sorted(graph, [n for n in graph.node if not set(tables) & set(n.output)] + made)
    return dict.fromkeys(flat, TensorProto.FLOAT)


def rewrite(graph: GraphProto, config: SessaConfig, storage: int, folder: Path, one_message: bool = True) -> dict[str, int]:
    """Put the library's nodes in place of the layers, the last norm and the product behind it; folder: of the graph's data file.

    storage: ONNX type number. one_message: the merged weights travel inside the graph's message. Returns the ONNX types of the new values. Raises
    Unavailable, with the graph as it was, where `refusal` says why, nodes or weights are not our exporter's, or the merged weights would not fit into one
    message. Run `fuse.unmasked_rows` before: rows behind new_length[b] are computed, not zeroed.
    """
    wrong = refusal(graph, config)
    if wrong is not None:
        raise Unavailable(wrong)
    work = _Rewrite(graph, config, storage, folder)
    tables = list(next(n.output for n in graph.node if n.op_type == contract.ROTARY_OP))
    for layer in range(config.n_layers):
        _layer(work, layer, tables)
    _logits(work)
    size = sum(len(x.raw_data) for x in (*work.weights, *graph.initializer))
    if one_message and size > _MESSAGE_LIMIT:
        raise Unavailable(f"{size / 1e9:.1f} GB of merged weights, a message holds {_MESSAGE_LIMIT / 1e9:.1f} GB")
    made = {x for n in work.made for x in n.output}
    nodes = [n for n in graph.node if made.isdisjoint(n.output)] + work.made
    again = {x.name for x in work.weights}
    kept = [x for x in graph.initializer if x.name not in again]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *work.weights])
    _set_sorted(graph, nodes)
    return work.types


def _node(op: str, name: str, inputs: list[str], outputs: list[str], storage: int, **numbers: float) -> NodeProto:
    return helper.make_node(op, inputs, outputs, name=name, domain=contract.DOMAIN, **ops.op(op).node_attributes(storage, **numbers))


def _only(nodes: list[NodeProto], what: str) -> NodeProto:
    """The one node that was looked for."""
    if len(nodes) != 1:
        raise Unavailable(f"{len(nodes)} nodes are {what}, where our exporter writes one")
    return nodes[0]


def _layer(work: _Rewrite, i: int, tables: list[str]) -> None:
    """One layer: norm, W_in and GELU; projections and gain; both attentions with out_proj between them; gate, W_out and residual."""
    config, stem, mixer = work.config, f"layers.{i}", f"layers.{i}.mixer"
    mine = [n for n in work.graph.node if n.name.startswith(f"{stem}/")]
    causal, feedback = (_only([n for n in mine if n.op_type == op], f"{op} of {stem}") for op in (contract.CAUSAL_OP, contract.FEEDBACK_OP))
    norm = work.node(f"{stem}.ln/LayerNormalization.0")
    x, out = norm.input[0], work.node(f"{stem}.W_out/Add.0").output[0]
    residual = _only([n for n in mine if n.op_type == "Add" and set(n.input) == {x, out}], f"the residual of {stem}")
    h = f"{stem}/h:0"
    w_in = work.matrix(f"{stem}.W_in", f"{stem}.W_in.weight")
    work.add(contract.NORM_ENTER_OP, f"{stem}/W_in", [*norm.input, w_in.weight, f"{stem}.W_in.bias"], [h], w_in, epsilon=config.layer_norm_eps)
    gain = work.put(f"{mixer}.gain.weight", work.array(f"{mixer}.gamma_ctx.weight").reshape(-1).astype(np.float32))
    bias = work.put(f"{mixer}.gain.bias", work.array(f"{mixer}.gamma_bias").reshape(1).astype(np.float32))
    gamma = feedback.input[contract.FEEDBACK_INPUTS.index("gamma")]
    parts = [f"{mixer}.{name}" for name in PROJECTIONS]
    joined = work.matrix(f"{mixer}.projections", *(f"{p}.weight" for p in parts))
    heads = (config.n_heads, config.kv_heads, config.kv_heads)
    biases = [work.put(f"{p}.heads", work.array(f"{p}.bias").reshape(n, config.head_dim)) for p, n in zip(parts, heads, strict=False)]
    outputs = [*causal.input[:3], *feedback.input[:2]]
    inputs = [h, joined.weight, *biases, f"{parts[3]}.bias", *tables, gain, bias]
    work.add(contract.PROJECT_GAIN_OP, f"{mixer}/projections", inputs, [*outputs, gamma], joined, gamma_max=config.gamma_max)
    work.types[gamma] = TensorProto.FLOAT
    if config.n_heads > 1:
        out_proj = work.matrix(f"{mixer}.out_proj", f"{mixer}.out_proj.weight")
        none = work.put(f"{mixer}.out_proj.none", np.zeros(config.d_model, work.array(f"{stem}.W_in.bias").dtype))
        past_kb, past_s, length = feedback.input[contract.FEEDBACK_INPUTS.index("past_k") :]
        if ops.op(contract.MIXER_OP).refusal(sizes(config)) is None and _usual_scale(causal, config.head_dim) and _usual_scale(feedback, config.d_model):
            inputs = [*causal.input[:5], out_proj.weight, none, *feedback.input[:2], gamma, past_kb, past_s, length]
            work.add(contract.MIXER_OP, f"{mixer}/mixer", inputs, [feedback.output[0]], out_proj)
        else:
            f = feedback.input[contract.FEEDBACK_INPUTS.index("f")]
            work.add(contract.LINEAR_HEADS_OP, f"{mixer}/out_proj", [causal.output[0], out_proj.weight, none], [f], out_proj)
    w_out = work.matrix(f"{stem}.W_out", f"{stem}.W_out.weight")
    work.add(contract.TAIL_OP, f"{stem}/tail", [x, feedback.output[0], h, w_out.weight, f"{stem}.W_out.bias"], [residual.output[0]], w_out)


def _usual_scale(attention: NodeProto, width: int) -> bool:
    """Whether an attention's scores are scaled by width^-1/2, as SessaMixer's are."""
    scale = next((a.f for a in attention.attribute if a.name == contract.ATTR_SCALE), 0.0)
    return scale == 0.0 or abs(scale * width**0.5 - 1.0) < 1e-6


def _logits(work: _Rewrite) -> None:
    """The last norm, on one row of each sequence or on all, and the product with lm_head, whose sums stay float32."""
    norm = work.node("norm/LayerNormalization.0")
    squeeze = work.maker.get(norm.input[0])
    product = _only([n for n in work.graph.node if norm.output[0] in reads(n)], "readers of the last norm")
    weight, head = product.input[1], None
    turned = work.maker.get(weight)
    if work.eight(contract.HEAD) is not None:
        head = work.matrix("lm_head", contract.HEAD)
        weight = head.weight
    elif turned is not None and turned.op_type == "Transpose" and turned.input[0] in work.tensors:  # of the embedding's weight, which the file holds once
        weight = turned.input[0]
    elif product.op_type == "MatMul" or not any(a.name == "transB" and a.i for a in product.attribute):
        weight = work.put("lm_head.rows", work.array(weight).T)
    if squeeze is not None and squeeze.op_type == "Squeeze":  # one row of each sequence, picked by new_length
        inputs = [_picked(work, squeeze), contract.NEW_LENGTH, norm.input[1], norm.input[2], weight]
        work.add(contract.LAST_LOGITS_OP, "lm_head/logits", inputs, [contract.LOGITS], head, epsilon=work.config.layer_norm_eps)
    else:
        work.add(contract.NORM_OP, "norm/last", norm.input[:3], ["norm/last:0"], epsilon=work.config.layer_norm_eps)
        work.add(contract.LOGITS_OP, "lm_head/logits", ["norm/last:0", weight], [contract.LOGITS], head)
    work.types[contract.LOGITS] = TensorProto.FLOAT


def _picked(work: _Rewrite, squeeze: NodeProto) -> str:
    """The rows (B,T,D) of which a gather takes the last of each sequence: new_length - 1, and 0 where that is -1."""
    above, at = list[NodeProto](), squeeze.input[0]
    while at in work.maker and len(above) < len(_PICKED):
        above.append(work.maker[at])
        at = above[-1].input[0 if len(above) > 1 else -1]
    kinds, axes = [n.op_type for n in above], [a.i for n in above[:1] for a in n.attribute]
    if kinds != _PICKED or at != contract.NEW_LENGTH or axes != [1] or [work.array(x).tolist() for n in above[3:5] for x in n.input[1:]] != [0, 1]:
        raise Unavailable("the graph does not pick the last tokens as our exporter writes it")
    return str(above[0].input[0])


def _set_sorted(graph: GraphProto, nodes: list[NodeProto]) -> None:
    """The nodes that lead to an output, each behind those it reads, and the weights they read."""
    maker = {x: n for n in nodes for x in n.output}
    order: list[NodeProto] = []
    done: set[int] = set()

    def visit(names: list[str]) -> None:
        stack: list[tuple[str, bool]] = [(x, False) for x in reversed(names)]
        while stack:
            name, ready = stack.pop()
            node = maker.get(name)
            if node is None or id(node) in done:
                continue
            if ready:
                done.add(id(node))
                order.append(node)
            else:
                stack.append((name, True))
                stack.extend((x, False) for x in reversed(reads(node)))

    visit([x.name for x in graph.output])
    set_nodes(graph, order)
    drop_weights(graph)

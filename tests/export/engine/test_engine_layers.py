"""Layers as nodes of the plugin library: with each node's arithmetic in numpy, the rewritten graph gives what ONNX Runtime gives on the file."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from operators import operators

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.export.engine import fuse as engine_fuse
from sessa_deploy.export.engine import graph as engine_graph
from sessa_deploy.export.engine import layers as engine_layers

SIZES = {"two heads a key": {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "layer_norm_eps": 0.3},
         "one head": {"d_model": 16, "n_heads": 1, "n_layers": 1}, "wide heads": {"d_model": 272, "n_heads": 2, "n_layers": 1}}  # fmt: skip


def exported(folder: Path, config: SessaConfig, all_logits: bool = False, inline_limit: int = 1 << 30, precision: str = "fp32") -> Path:
    torch = pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    torch.manual_seed(5)
    model = SessaLM(config)
    with torch.no_grad():  # biases that are zero would hide a wrong order
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return export_onnx(model, folder / "model.onnx", precision, all_logits=all_logits, inline_limit=inline_limit)


@pytest.mark.parametrize(("size", "all_logits"), [("one head", False), ("two heads a key", True), ("two heads a key", False), ("wide heads", False)])
def test_the_rewritten_graph_computes_the_same(tmp_path: Path, size: str, all_logits: bool) -> None:
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    config = SessaConfig(vocab_size=61, max_context=32, **SIZES[size])
    deep = config.n_layers
    path = exported(tmp_path, config, all_logits, inline_limit=0)
    prepared = engine_graph.prepare(engine_graph.load(path), engine_graph.PLUGIN_OPS)
    graph = prepared.model.graph
    engine_fuse.unmasked_rows(graph)
    assert engine_layers.rotary(graph, onnx.TensorProto.FLOAT) is not None
    types = engine_layers.rewrite(graph, config, onnx.TensorProto.FLOAT, path.parent)
    assert types is not None and contract.LOGITS not in {n.op_type for n in graph.node}
    counts = Counter(n.op_type for n in graph.node)
    assert counts[contract.NORM_OP] == all_logits and counts[contract.TAIL_OP] == counts[contract.NORM_ENTER_OP] == counts[contract.PROJECT_GAIN_OP] == deep
    both = deep if size == "two heads a key" else 0  # a single head has no output projection, and the mixer's kernels end at heads of 128
    assert counts[contract.MIXER_OP] == both and counts[contract.CAUSAL_OP] == counts[contract.FEEDBACK_OP] == deep - both
    assert counts[contract.LINEAR_HEADS_OP] == (deep if size == "wide heads" else 0)
    assert counts[contract.LOGITS_OP] == all_logits and counts[contract.LAST_LOGITS_OP] == (not all_logits)
    if not all_logits:  # nothing is left behind the last layer but one node
        assert not {"Cast", "Sub", "Clip", "Expand", "GatherElements", "Squeeze"} & set(counts)
    assert counts[contract.ROTARY_OP] == 1 and not {"Cos", "Sin", "Floor"} & set(counts)
    assert not {"MatMul", "Gemm", "LayerNormalization", "Erf", "Softmax"} & set(counts)
    assert len(graph.node) == len({n.name for n in graph.node})
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {contract.INPUT_IDS: rng.integers(0, 61, (2, 3)), contract.PAST_LENGTH: np.array([4, 0], np.int32),
                             contract.NEW_LENGTH: np.array([3, 2], np.int32)}  # fmt: skip
    for layer, name in contract.cache_entries(deep):
        shape = (2, 6, *contract.cache_row_shape(name, config.d_model, config.kv_heads, config.head_dim))
        feeds[contract.past_name(layer, name)] = rng.standard_normal(shape).astype(np.float32)
    names = contract.graph_outputs(deep)
    wanted = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(names, feeds)
    onnx.external_data_helper.load_external_data_for_model(prepared.model, str(path.parent))
    found = ReferenceEvaluator(prepared.model, new_ops=operators()).run(names, feeds)
    for name, mine, theirs in zip(names, found, wanted, strict=True):
        assert mine.shape == theirs.shape, name
        for row, count in enumerate((3, 2)):
            part = slice(None) if name == contract.LOGITS and not all_logits else slice(count)
            np.testing.assert_allclose(mine[row][part], theirs[row][part], rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("op", [contract.CAUSAL_OP, contract.FEEDBACK_OP])
def test_attentions_with_a_scale_of_their_own_are_not_merged(tmp_path: Path, op: str) -> None:
    config = SessaConfig(n_layers=1, vocab_size=11, max_context=8, d_model=32, n_heads=2)
    path = exported(tmp_path, config)
    graph = engine_graph.prepare(engine_graph.load(path)).model.graph
    assert engine_layers.rotary(graph, onnx.TensorProto.FLOAT) is not None
    node = next(n for n in graph.node if n.op_type == op)
    next(a for a in node.attribute if a.name == contract.ATTR_SCALE).f = 0.5
    assert engine_layers.rewrite(graph, config, onnx.TensorProto.FLOAT, path.parent) is not None
    counts = Counter(n.op_type for n in graph.node)
    assert counts[contract.MIXER_OP] == 0 and counts[contract.LINEAR_HEADS_OP] == counts[contract.CAUSAL_OP] == counts[contract.FEEDBACK_OP] == 1


def test_layers_without_kernels_stay_tensorrts(tmp_path: Path) -> None:
    cases = (({"d_model": 24, "n_heads": 2}, "width D: got 24; allowed: a multiple of 16 up to 4096"),
             ({"d_model": 32, "n_heads": 2, "use_forward_rope": False}, "no rotary positions"))  # fmt: skip
    for i, (wrong, reason) in enumerate(cases):
        config = SessaConfig(n_layers=1, vocab_size=11, max_context=8, **wrong)
        path = exported(tmp_path / str(i), config)
        model = engine_graph.prepare(engine_graph.load(path), engine_graph.PLUGIN_OPS).model
        assert (engine_layers.rotary(model.graph, onnx.TensorProto.FLOAT) is None) == (not config.use_forward_rope)
        before = model.SerializeToString()
        with pytest.raises(engine_layers.Unavailable, match=reason):
            engine_layers.rewrite(model.graph, config, onnx.TensorProto.FLOAT, path.parent)
        assert model.SerializeToString() == before


SMALL = SessaConfig(n_layers=1, vocab_size=257, max_context=8, d_model=16, n_heads=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """(folder, prepared graph with rotary tables) of one small model."""
    path = exported(tmp_path_factory.mktemp("small"), SMALL)
    model = engine_graph.prepare(engine_graph.load(path)).model
    assert engine_layers.rotary(model.graph, onnx.TensorProto.FLOAT) is not None
    return path.parent, model.SerializeToString()


def refused(small: tuple[Path, bytes], config: SessaConfig = SMALL, lost: str = "") -> str:
    """Why the small model is not rewritten, the node `lost` renamed; the graph stays as it was."""
    model = onnx.ModelProto.FromString(small[1])
    for node in model.graph.node:
        node.name = "renamed" if node.name == lost else node.name
    before = model.SerializeToString()
    with pytest.raises(engine_layers.Unavailable) as caught:
        engine_layers.rewrite(model.graph, config, onnx.TensorProto.FLOAT, small[0])
    assert model.SerializeToString() == before
    return str(caught.value)


def test_every_reason_is_named(small: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    for lost in ("layers.0.ln/LayerNormalization.0", "layers.0.W_out/Add.0", "norm/LayerNormalization.0"):
        assert refused(small, lost=lost) == f"the graph has no node {lost}, as our exporter writes it"
    assert refused(small, dataclasses.replace(SMALL, n_heads=4)) == "head width d: got 4; allowed: a multiple of 8 up to 65536"
    assert refused(small, dataclasses.replace(SMALL, n_kv_heads=1)) == "Hkv x head width: got 8; allowed: a multiple of 16 up to 65536"
    assert refused(small, dataclasses.replace(SMALL, d_model=4112)) == "width D: got 4112; allowed: a multiple of 16 up to 4096"
    assert refused(small, dataclasses.replace(SMALL, n_layers=2)) == "1 of 2 layers have SessaFeedbackAttention as a plugin"
    monkeypatch.setattr(engine_layers, "_MESSAGE_LIMIT", 1000)
    assert refused(small).endswith("GB of merged weights, a message holds 0.0 GB")


def test_last_tokens_that_are_picked_otherwise_are_not_taken_for_them(small: tuple[Path, bytes]) -> None:
    """Where another index than new_length - 1, from 0 on, decides the row, the library's node would give another row's logits."""
    kinds = ("GatherElements", "Expand", "Unsqueeze", "Clip", "Sub", "Cast")
    for change in (*kinds, "axis", "by another number", "at most", "of another input"):
        model = onnx.ModelProto.FromString(small[1])
        makers = {n.output[0]: n for n in model.graph.node}
        at, chain = makers[makers["norm/LayerNormalization.0:0"].input[0]].input[0], dict[str, onnx.NodeProto]()
        for kind in kinds:
            chain[kind] = makers[at]
            at = chain[kind].input[kind == "GatherElements"]
        assert at == contract.NEW_LENGTH and [n.op_type for n in chain.values()] == list(kinds)
        if change in chain:
            chain[change].op_type = "Identity"
        elif change == "axis":
            chain["GatherElements"].attribute[0].i = 2
        elif change == "by another number":
            chain["Sub"].input[1] = chain["Clip"].input[1]
        elif change == "at most":
            chain["Clip"].input.append(chain["Sub"].input[1])
        else:
            chain["Cast"].input[0] = contract.PAST_LENGTH
        before = model.SerializeToString()
        with pytest.raises(engine_layers.Unavailable, match="does not pick the last tokens as our exporter writes it"):
            engine_layers.rewrite(model.graph, SMALL, onnx.TensorProto.FLOAT, small[0])
        assert model.SerializeToString() == before


def test_numbers_that_a_node_cannot_hold_are_refused(small: tuple[Path, bytes]) -> None:
    graph = onnx.ModelProto.FromString(small[1]).graph
    with pytest.raises(UserError, match="attribute epsilon of SessaNormEnter is out of range: got 1e-60; allowed: a finite number above 0"):
        engine_layers.rewrite(graph, dataclasses.replace(SMALL, layer_norm_eps=1e-60), onnx.TensorProto.FLOAT, small[0])

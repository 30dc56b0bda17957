"""Matrices in 8 bits: values, scales, and what may be kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import WEIGHT_FORMATS
from sessa_deploy.errors import UserError
from sessa_deploy.export.graph.quantise import choose, dequantise, matrices, quantise, quantised

CONFIG = SessaConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61)
FORMATS = list(WEIGHT_FORMATS)


def by_the_standard(x: torch.Tensor, scale: torch.Tensor, form: str) -> np.ndarray:
    """QuantizeLinear by ONNX Runtime, as bits."""
    kind, opset = WEIGHT_FORMATS[form].onnx, WEIGHT_FORMATS[form].opset
    zero = helper.make_tensor("z", kind, [len(scale)], bytes(len(scale)), raw=True)
    inputs = [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", list(x.shape)), ("s", [len(scale)]))]
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0), helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=0)]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, list(x.shape))], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x.numpy(), "s": scale.numpy()})[0]


@pytest.mark.parametrize("form", FORMATS)
def test_values_and_scales_are_the_standards(form: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 200) * torch.logspace(-6, 4, 37)[:, None]
    x[5] = 0.5 * torch.arange(-100, 100).float()  # ties
    x[5, 0] = 127.0
    q, scale = quantise(x, form)
    assert scale.dtype == torch.float32 and torch.equal(scale, x.abs().amax(1) / WEIGHT_FORMATS[form].largest)
    assert np.array_equal(dequantise(q, scale).numpy(), by_the_standard(x, scale, form))
    if form == "int8":
        assert q.dtype == torch.int8 and int(q.min()) >= -127
        assert q[5, [97, 99, 101, 103, 105]].tolist() == [-2, 0, 0, 2, 2]  # -1.5, -0.5, 0.5, 1.5, 2.5: to even
        assert float(((dequantise(q, scale, torch.float64) - x.double()).abs() / scale[:, None]).max()) <= 0.5 * (1 + 2e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_channels_of_zeros_outliers_and_the_smallest_numbers(form: str) -> None:
    x = torch.full((4, 8), 1e-3)
    x[0], x[1, 3], x[2] = 0.0, 1e4, 1e-44
    q, scale = quantise(x, form)
    wide = dequantise(q, scale)
    assert bool((scale >= torch.finfo(torch.float32).tiny).all()) and bool(torch.isfinite(wide).all())
    assert scale[0] == 1.0 and not wide[0].any()
    assert wide[1, 3] == pytest.approx(1e4, rel=1e-6) and torch.allclose(wide[3], x[3])
    if form == "int8":
        assert not wide[1, :3].any()  # what an outlier does to its channel, and to no other


def test_what_is_stored_in_8_bits() -> None:
    names = matrices(CONFIG)
    assert names[-1] == "lm_head.weight" and len(names) == 2 * 7 + 1
    assert not [n for n in names if "embedding" in n or "gamma" in n or "norm" in n or ".ln." in n or n.endswith("bias")]
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    assert "lm_head.weight" in matrices(tied)
    assert "layers.0.mixer.out_proj.weight" not in matrices(SessaConfig(d_model=32, n_layers=2, n_heads=1, vocab_size=61))


@pytest.mark.parametrize(("keep", "left"), [
    (["lm_head"], 14), (["lm_head.weight"], 14), (["layers.1"], 8), (["mixer.q_proj"], 13), (["layers.0.W_in"], 14), (["layers.0.W_in.weight"], 14),
    (["layers.0", "lm_head", "W_out"], 6),
])  # fmt: skip
def test_what_is_kept(keep: list[str], left: int) -> None:
    found = choose(CONFIG, "int8", keep)
    assert found is not None and len(quantised(CONFIG, found)) == left and len(found.kept) == 15 - left


def test_names_to_keep_are_whole_names() -> None:
    deep = dataclasses.replace(CONFIG, n_layers=12)
    found = choose(deep, "int8", ["layers.1"])
    assert found is not None and len(found.kept) == 7 and all(name.startswith("layers.1.") for name in found.kept)
    for part in ("layers", "layers.", "layers.1.", "layers.01", "mixer", "mixer.q", "W", "lm", "weight", ".weight", "", "layers.0.mixer"):
        with pytest.raises(UserError, match="no such tensor to keep"):
            choose(deep, "int8", [part])


@pytest.mark.parametrize(("arguments", "says"), [
    (("int8", ["embedding"], 17), "lm_head, layers.0 to layers.1 whole, one of W_in"), (("int8", ["layers.2"], 17), "--keep layers.2"),
    (("int8", ["layers.0.ln"], 17), "no such tensor to keep"), (("int4", [], 17), "int8, fp8"), (("fp8", [], 18), "--opset 19"),
    ((None, ["lm_head"], 17), "without --weights"),
    (("int8", ["layers.0", "layers.1", "lm_head"], 17), "nothing is left"),
])  # fmt: skip
def test_what_is_refused(arguments: tuple[str | None, list[str], int], says: str) -> None:
    with pytest.raises(UserError) as refused:
        choose(CONFIG, *arguments)
    assert says in str(refused.value) and "\n" not in str(refused.value)

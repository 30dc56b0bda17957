"""The function bodies in ONNX Runtime against the recurrences in numpy float64, and their accuracy against `reference.plain`."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from ort_ops import causal, op_model, recurrence, session
from rule import check

from sessa_deploy import contract
from sessa_deploy.export.graph.functions import causal_function, feedback_function, functions
from sessa_deploy.kernels import reference

Arrays = dict[str, np.ndarray]


def feedback_inputs(batch: int, tokens: int, past: int, width: int, length: list[int], dtype: str = "f4", seed: int = 0) -> Arrays:
    """Random inputs whose past is poisoned behind length[b]."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    old_k, old_s = draw(batch, past, width), draw(batch, past, width)
    for b, count in enumerate(length):
        old_k[b, count:], old_s[b, count:] = np.nan, np.inf
    gamma = (0.999 * np.tanh(rng.standard_normal((batch, tokens)))).astype("f8" if dtype == "f8" else "f4")
    return {"q": 2 * draw(batch, tokens, width), "k": 2 * draw(batch, tokens, width), "gamma": gamma, "f": draw(batch, tokens, width),
            "past_k": old_k, "past_s": old_s, "past_length": np.array(length, np.int32)}


def causal_inputs(batch: int, tokens: int, past: int, heads: int, kv_heads: int, width: int, length: list[int], dtype: str = "f4") -> Arrays:
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    old_k, old_v = draw(batch, past, kv_heads, width), draw(batch, past, kv_heads, width)
    for b, count in enumerate(length):
        old_k[b, count:], old_v[b, count:] = np.inf, np.nan
    return {"q": 2 * draw(batch, tokens, heads, width), "k": 2 * draw(batch, tokens, kv_heads, width), "v": draw(batch, tokens, kv_heads, width),
            "past_k": old_k, "past_v": old_v, "past_length": np.array(length, np.int32)}


def run(op: str, inputs: Arrays, storage: int = 1, opset: int = 17, block: int | None = None) -> np.ndarray:
    # ONNX Runtime 1.23 puts a fused node into a float64 graph for which it has no kernel
    without = ["MatmulTransposeFusion"] if storage == onnx.TensorProto.DOUBLE else []
    return session(op_model(op, storage, opset, inputs["q"].shape[-1] ** -0.5, block), without=without).run(None, inputs)[0]


FEEDBACK_SHAPES = [(2, 1, 0, 16, [0, 0]), (2, 1, 5, 16, [0, 5]), (1, 1, 9, 24, [9]), (2, 7, 5, 16, [3, 5]), (1, 63, 0, 8, [0]), (1, 64, 0, 8, [0]),
                   (2, 65, 4, 8, [4, 1]), (1, 66, 3, 10, [3]), (1, 130, 0, 8, [0]), (2, 257, 9, 12, [9, 0])]


@pytest.mark.parametrize(("batch", "tokens", "past", "width", "length"), FEEDBACK_SHAPES)
def test_feedback_body_is_the_recurrence(batch: int, tokens: int, past: int, width: int, length: list[int]) -> None:
    inputs = feedback_inputs(batch, tokens, past, width, length)
    expected = recurrence(**inputs)
    np.testing.assert_allclose(run(contract.FEEDBACK_OP, inputs), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


CAUSAL_SHAPES = [(2, 1, 0, 4, 2, 8, [0, 0]), (2, 1, 5, 4, 4, 8, [0, 5]), (2, 7, 5, 4, 1, 8, [3, 5]), (1, 130, 0, 2, 2, 16, [0]), (2, 33, 9, 1, 1, 7, [9, 0])]


@pytest.mark.parametrize(("batch", "tokens", "past", "heads", "kv_heads", "width", "length"), CAUSAL_SHAPES)
def test_causal_body_is_attention(batch: int, tokens: int, past: int, heads: int, kv_heads: int, width: int, length: list[int]) -> None:
    inputs = causal_inputs(batch, tokens, past, heads, kv_heads, width, length)
    expected = causal(**inputs)
    np.testing.assert_allclose(run(contract.CAUSAL_OP, inputs), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("opset", contract.OPSETS)
def test_every_opset_checks_and_runs(opset: int) -> None:
    feedback, attention = feedback_inputs(2, 70, 5, 16, [5, 2]), causal_inputs(2, 70, 5, 4, 2, 8, [5, 2])
    for op, inputs in ((contract.FEEDBACK_OP, feedback), (contract.CAUSAL_OP, attention)):
        onnx.checker.check_model(op_model(op, 1, opset, 0.25), full_check=True)
        np.testing.assert_array_equal(run(op, inputs, opset=opset), run(op, inputs))


@pytest.mark.parametrize(("storage", "dtype", "tolerance"), [(10, "f2", 1e-3), (11, "f8", 1e-13)])
def test_other_storage_types(storage: int, dtype: str, tolerance: float) -> None:
    feedback, attention = feedback_inputs(2, 70, 5, 16, [5, 0], dtype), causal_inputs(2, 20, 5, 4, 2, 16, [4, 0], dtype)
    for op, inputs, reference_op in ((contract.FEEDBACK_OP, feedback, recurrence), (contract.CAUSAL_OP, attention, causal)):
        result, expected = run(op, inputs, storage), reference_op(**inputs)
        assert result.dtype == np.dtype(dtype)
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("opset", [17, 23])
def test_bfloat16_bodies_pass_the_checker(opset: int) -> None:
    for op in (contract.FEEDBACK_OP, contract.CAUSAL_OP):
        onnx.checker.check_model(op_model(op, onnx.TensorProto.BFLOAT16, opset, 0.25), full_check=True)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("tokens", "past", "constant"), [(1025, 0, False), (700, 70, False), (1025, 0, True)])
def test_predecessor_chain_meets_the_error_rule(tokens: int, past: int, constant: bool, sign: float) -> None:
    # Row t attends to row t-1 alone, so errors of every block edge and of the past/new edge travel the whole way (sessa amplifies 871x).
    rng, width = np.random.default_rng(3), 32
    key = rng.standard_normal((1, past + tokens, width))
    key *= np.sqrt(width) / np.linalg.norm(key, axis=-1, keepdims=True)
    query = np.zeros_like(key)
    query[:, 1:] = 100 * key[:, :-1]
    f = np.ones((1, tokens, width)) if constant else rng.standard_normal((1, tokens, width))
    inputs = {name: x.astype(np.float32) for name, x in {
        "q": query[:, past:], "k": key[:, past:], "gamma": np.full((1, tokens), 0.999 * sign), "f": f,
        "past_k": key[:, :past], "past_s": rng.standard_normal((1, past, width))}.items()} | {"past_length": np.array([past], np.int32)}
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    exact = {name: x if name == "past_length" else x.double() for name, x in tensors.items()}
    check(torch.from_numpy(run(contract.FEEDBACK_OP, inputs)), reference.plain(**exact), reference.plain(**tensors))


@pytest.mark.parametrize("name", ["q", "k", "gamma", "f"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 5, 64, 69, 129])
def test_a_row_that_is_not_finite_spoils_no_earlier_row(name: str, value: float, row: int) -> None:
    inputs = feedback_inputs(2, 130, 4, 16, [4, 2])
    clean = run(contract.FEEDBACK_OP, inputs)
    inputs[name][0, row] = value
    spoilt = run(contract.FEEDBACK_OP, inputs)
    np.testing.assert_array_equal(spoilt[1], clean[1])
    np.testing.assert_array_equal(spoilt[0, :row], clean[0, :row])
    if name != "k":  # the row's own key is read by later rows only
        assert not np.isfinite(spoilt[0, row]).any()


@pytest.mark.parametrize("name", ["k", "v"])
def test_causal_rows_that_are_not_finite_spoil_no_earlier_row(name: str) -> None:
    for value in (np.nan, np.inf):
        inputs = causal_inputs(2, 9, 4, 4, 2, 8, [4, 0])
        clean = run(contract.CAUSAL_OP, inputs)
        inputs[name][0, 5, 1] = value
        spoilt = run(contract.CAUSAL_OP, inputs)
        np.testing.assert_array_equal(spoilt[1], clean[1])
        np.testing.assert_array_equal(spoilt[0, :5], clean[0, :5])


def test_causal_body_has_no_control_flow_and_nothing_that_tensorrt_8_6_cannot_take() -> None:
    function = causal_function(onnx.TensorProto.FLOAT16, 17)
    assert not {"Loop", "If", "Scan"} & {n.op_type for n in function.node}
    for node in function.node:
        names = {a.name for a in node.attribute}
        assert not (node.op_type == "Shape" and names), "TensorRT 8.6 ignores start and end"
        assert not (node.op_type == "Cast" and any(a.i == onnx.TensorProto.DOUBLE for a in node.attribute))


def test_bodies_can_be_inlined() -> None:
    for op in (contract.FEEDBACK_OP, contract.CAUSAL_OP):
        flat = onnx.inliner.inline_local_functions(op_model(op, 1, 17, 0.25))
        assert not flat.functions
        assert {n.domain for n in flat.graph.node} == {""}
        onnx.checker.check_model(flat, full_check=True)


def test_decode_runs_no_block_and_the_buffer_never_grows() -> None:
    loop = next(n for n in feedback_function(1, 17).node if n.op_type == "Loop")
    body = next(a.g for a in loop.attribute if a.name == "body")
    assert [n.op_type for n in body.node][-1] == "ScatterND"
    assert len(body.input) == 3, "one carried tensor"


@pytest.mark.parametrize(("storage", "opset", "block"), [(7, 17, 64), (1, 16, 64), (1, 24, 64), (1, 17, 48)])
def test_bad_requests_are_refused(storage: int, opset: int, block: int) -> None:
    with pytest.raises(ValueError, match="is not"):
        feedback_function(storage, opset, block)


def test_both_functions_are_listed() -> None:
    assert [(x.domain, x.name) for x in functions(1, 17)] == [("sessa", "SessaFeedbackAttention"), ("sessa", "SessaCausalAttention")]
    assert all(list(x.attribute) == ["scale", "storage"] for x in functions(1, 17))

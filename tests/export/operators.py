"""The arithmetic of the library's operators in numpy, so that a graph with their nodes runs where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from sessa_deploy import contract
from sessa_deploy.plugins import ops


def _norm(x: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weight + bias


def _last_logits(epsilon: float, x: Any, new: Any, gain: Any, shift: Any, weight: Any) -> Any:
    last = x[np.arange(len(new)), np.clip(new, 1, x.shape[1]) - 1]
    return _norm(last, gain, shift, epsilon) @ weight.T


def _enter(x: Any, weight: Any, bias: Any) -> Any:
    from math import erf

    a, g = np.split(x @ weight.T + bias, 2, axis=-1)
    return np.concatenate([a * 0.5 * (1 + np.vectorize(erf)(a / np.sqrt(2.0))), g], -1)


def _project_gain(gamma_max: float, h: Any, *rest: Any) -> tuple[Any, ...]:
    *behind, gain, bias = rest
    a = h[..., : h.shape[-1] // 2]
    return (*_project(a, *behind), gamma_max * np.tanh(bias[0] + a @ gain))


def _project(a: Any, weight: Any, bias_q: Any, bias_k: Any, bias_v: Any, bias_fb: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
    d, shape = a.shape[-1], a.shape[:2]
    kv = bias_k.size
    y = a @ weight.T + np.concatenate([x.reshape(-1) for x in (bias_q, bias_k, bias_v, bias_fb)])
    q, k, v, q_b, k_b = np.split(y, np.cumsum([d, kv, kv, d]), axis=-1)

    def turned(x: Any, like: Any) -> Any:
        x = x.reshape(*shape, *like.shape)
        even, odd = x[..., 0::2], x[..., 1::2]
        c, s = cos[..., None, :], sin[..., None, :]
        return np.stack([even * c - odd * s, even * s + odd * c], -1).reshape(x.shape)

    return turned(q, bias_q), turned(k, bias_k), v.reshape(*shape, *bias_v.shape), q_b, k_b


def _rotary(x: Any, length: Any, limbs: Any) -> tuple[Any, Any]:
    at = (length[:, None] + np.arange(x.shape[1])).astype(np.float32)[..., None]
    parts = [at * limb for limb in limbs]
    turn = sum(p - np.floor(p) for p in parts[:3])
    angle = (turn - np.floor(turn) + parts[3]) * np.float32(2 * np.pi)
    return np.cos(angle), np.sin(angle)


def _softmax_over(past: Any, new: Any, length: int, upto: int, query: Any, scale: float, value_past: Any, value_new: Any) -> Any:
    """Attention of one query over `length` past and `upto` new rows; zeros where there are none."""
    keys, values = (np.concatenate([a[:length], b[:upto]]) for a, b in ((past, new), (value_past, value_new)))
    if not len(keys):
        return np.zeros(values.shape[1:], values.dtype)
    weight = np.exp(scale * keys @ query - (scale * keys @ query).max())
    return (weight / weight.sum()) @ values


def _causal(scale: float, q: Any, k: Any, v: Any, past_k: Any, past_v: Any, length: Any) -> Any:
    out, group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, i in np.ndindex(q.shape[:3]):
        h = i // group
        out[b, t, i] = _softmax_over(past_k[b, :, h], k[b, :, h], length[b], t + 1, q[b, t, i], scale, past_v[b, :, h], v[b, :, h])
    return out


def _feedback(scale: float, q: Any, k: Any, gamma: Any, f: Any, past_k: Any, past_s: Any, length: Any) -> Any:
    s = f.copy()
    for b, t in np.ndindex(q.shape[:2]):
        s[b, t] += gamma[b, t] * _softmax_over(past_k[b], k[b], length[b], t, q[b, t], scale, past_s[b], s[b])
    return s


def _mixer(_: float, q: Any, k: Any, v: Any, past_k: Any, past_v: Any, weight: Any, bias: Any, q_b: Any, k_b: Any, gamma: Any, *pasts: Any) -> Any:
    past_kb, past_s, length = pasts
    o = _causal(q.shape[-1] ** -0.5, q, k, v, past_k, past_v, length)
    return _feedback(q_b.shape[-1] ** -0.5, q_b, k_b, gamma, o.reshape(*o.shape[:2], -1) @ weight.T + bias, past_kb, past_s, length)


def unpacked(name: str, weights: int, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands of an op that reads its matrix in 8 bits, ONNX type `weights`, with that matrix in float32 and without its scales."""
    from onnx import helper

    at = [x.name for x in ops.op(name).inputs].index(contract.WEIGHT)
    *others, scale = inputs
    assert scale.dtype == np.float32 and len(scale) == len(others[at]) and others[at].dtype.itemsize == 2
    q = np.ascontiguousarray(others[at]).view(helper.tensor_dtype_to_np_dtype(weights))
    others[at] = q.astype(np.float32) * scale[:, None]
    return tuple(others)


def operators() -> list[Any]:
    """The library's operators for onnx's reference evaluator; they compute in float32 and give it, whatever the storage."""
    from onnx.reference.op_run import OpRun

    def make(name: str, compute: Any) -> Any:
        def _run(self: Any, *inputs: Any, storage: int | None = None, weights: int | None = None, **numbers: float | None) -> tuple[Any, ...]:
            given = [x for x in numbers.values() if x is not None]
            inputs = unpacked(name, weights, inputs) if weights else inputs
            inputs = tuple(x.astype(np.float32) if x.dtype == np.float16 else x for x in inputs)
            found = compute(*(given or [None]), *inputs)
            return tuple(np.asarray(x, np.float32) for x in (found if isinstance(found, tuple) else (found,)))

        return type(name, (OpRun,), {"op_domain": contract.DOMAIN, "_run": _run})

    return [
        make(contract.ROTARY_OP, lambda _, x, length, limbs: _rotary(x, length, limbs)),
        make(contract.CAUSAL_OP, _causal), make(contract.FEEDBACK_OP, _feedback),
        make(contract.NORM_OP, lambda e, x, w, b: _norm(x, w, b, e)),
        make(contract.LOGITS_OP, lambda _, x, w: x @ w.T),
        make(contract.LAST_LOGITS_OP, _last_logits),
        make(contract.LINEAR_HEADS_OP, lambda _, x, w, b: x.reshape(*x.shape[:2], -1) @ w.T + b),
        make(contract.NORM_ENTER_OP, lambda e, x, w, b, *rest: _enter(_norm(x, w, b, e), *rest)),
        make(contract.MIXER_OP, _mixer), make(contract.PROJECT_GAIN_OP, _project_gain),
        make(contract.TAIL_OP, lambda _, x, s, h, w, b: x + (s * h[..., h.shape[-1] // 2 :]) @ w.T + b),
    ]  # fmt: skip

"""The two ops on the CPU: against the recurrence, under stress, with poisoned rows, and as torch.library citizens."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import EPS, check
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from sessa_deploy.kernels import blocked, ops, reference


def problem(batch: int, tokens: int, width: int, past: int = 0, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    gamma_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "q": normal(batch, tokens, width), "k": normal(batch, tokens, width),
        "gamma": (0.999 * torch.tanh(2 * torch.randn(batch, tokens, generator=g, dtype=torch.float64))).to(gamma_dtype),
        "f": normal(batch, tokens, width), "past_k": normal(batch, past, width), "past_s": normal(batch, past, width),
        "past_length": torch.randint(0, past + 1, (batch,), generator=g, dtype=torch.int32),
    }


def chain(tokens: int, width: int, gamma: float, alternate: bool, past: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every row attends to its predecessor alone, across block edges and the past/new edge."""
    total = past + tokens
    g = torch.Generator().manual_seed(7)
    base = torch.nn.functional.normalize(torch.randn(total, width, generator=g, dtype=torch.float64), dim=-1).to(dtype)
    p = problem(1, tokens, width, past, dtype)
    sign = torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0) if alternate else torch.ones(tokens)
    p["k"], p["past_k"] = base[past:][None].contiguous(), base[:past][None].contiguous()
    p["q"] = base.roll(1, 0)[past:][None] * 8192.0
    p["f"] = sign[None, :, None].expand(1, tokens, width).to(dtype).contiguous()
    p["past_s"] = torch.zeros_like(p["past_s"]) + 1
    p["gamma"] = torch.full_like(p["gamma"], gamma)
    p["past_length"] = torch.full((1,), past, dtype=torch.int32)
    return p


def check_rule(p: dict[str, Tensor], got: Tensor) -> None:
    """`got` against what `plain` makes of p."""
    assert got.dtype == p["q"].dtype
    check(got, reference.plain(**{n: x if n == "past_length" else x.double() for n, x in p.items()}), reference.plain(**p))


@pytest.mark.parametrize("past", [0, 1, 37])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 257])
def test_blocked_op_equals_the_recurrence(tokens: int, past: int) -> None:
    p = problem(2, tokens, 16, past)
    torch.testing.assert_close(blocked.feedback_forward(**p, block=64)[0], reference.recurrence(**p), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(ops.feedback_attention(**p), reference.plain(**p), rtol=1e-10, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 40), past=st.integers(0, 20), width=st.sampled_from([1, 4, 24]), block=st.integers(1, 50),
       seed=st.integers(0, 999))
def test_any_shape_and_block(batch: int, tokens: int, past: int, width: int, block: int, seed: int) -> None:
    p = problem(batch, tokens, width, past, seed=seed)
    torch.testing.assert_close(blocked.feedback_forward(**p, block=block)[0], reference.recurrence(**p), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("gamma", [0.999, -0.999])
@pytest.mark.parametrize("past", [0, 5])
def test_predecessor_chain(gamma: float, alternate: bool, past: int, dtype: torch.dtype) -> None:
    p = chain(700, 32, gamma, alternate, past, dtype)
    got = ops.feedback_attention(**p)
    check_rule(p, got)
    if past == 0 and (gamma > 0) != alternate:
        amplification = (1 - 0.999**700) / (1 - 0.999)
        assert float(got[0, -1].double().abs().max()) == pytest.approx(amplification, rel=2e-2)


@pytest.mark.parametrize("dtype", EPS)
def test_every_dtype_meets_the_rule_on_random_data(dtype: torch.dtype) -> None:
    p = problem(2, 300, 48, 20, dtype)
    got = ops.feedback_attention(**p)
    assert got.dtype == dtype
    check_rule(p, got)


def test_uniform_attention_key_zero_and_gamma_zero() -> None:
    p = problem(1, 90, 16)
    p["q"].zero_()
    torch.testing.assert_close(ops.feedback_attention(**p), reference.recurrence(**p), rtol=1e-11, atol=1e-12)
    p = problem(1, 90, 16)
    p["q"].fill_(1.0)
    p["k"].zero_()[:, 0] = 100.0
    torch.testing.assert_close(ops.feedback_attention(**p), reference.recurrence(**p), rtol=1e-11, atol=1e-12)
    p["gamma"].zero_()
    assert torch.equal(ops.feedback_attention(**p), p["f"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_past_rows_beyond_the_length_never_matter(value: float) -> None:
    p = problem(3, 9, 16, 12)
    p["past_length"] = torch.tensor([0, 5, 12], dtype=torch.int32)
    for name in ("past_k", "past_s"):
        p[name][0, :], p[name][1, 5:] = 0.0, 0.0
    want = ops.feedback_attention(**p)
    for name in ("past_k", "past_s"):
        p[name][0, :], p[name][1, 5:] = value, -value
    assert torch.equal(ops.feedback_attention(**p), want)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "gamma", "f"])
def test_a_bad_new_row_reaches_no_earlier_row_and_no_other_sequence(name: str, value: float) -> None:
    p = problem(2, 20, 16, 3)
    clean = ops.feedback_attention(**p)
    p[name][0, 13] = value
    dirty = ops.feedback_attention(**p)
    assert torch.equal(dirty[0, :13], clean[0, :13]) and torch.equal(dirty[1], clean[1])
    spoilt = 14 if name == "k" else 13  # a key is for later rows
    assert not torch.isfinite(dirty[0, spoilt]).any()


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_causal_attention_equals_plain(heads: tuple[int, int], past: int) -> None:
    g = torch.Generator().manual_seed(1)
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    q, k, v = normal(3, 70, heads[0], 8), normal(3, 70, heads[1], 8), normal(3, 70, heads[1], 8)
    past_k, past_v, length = normal(3, past, heads[1], 8), normal(3, past, heads[1], 8), torch.tensor([0, past, past // 2], dtype=torch.int32)
    past_k[0], past_v[0] = torch.nan, torch.nan
    want = reference.plain_causal(q, k, v, past_k, past_v, length)
    torch.testing.assert_close(ops.causal_attention(q, k, v, past_k, past_v, length), want)
    torch.testing.assert_close(blocked.causal_forward(q, k, v, past_k, past_v, length, block=32), want)
    k[1, 50:], v[2, 60:] = torch.nan, torch.inf
    dirty = ops.causal_attention(q, k, v, past_k, past_v, length)
    torch.testing.assert_close(dirty[1, :50], want[1, :50])
    torch.testing.assert_close(dirty[2, :60], want[2, :60])
    torch.testing.assert_close(dirty[0], want[0])


@pytest.mark.parametrize("past", [0, 6])
def test_gradients_against_numerical_ones_and_against_plain(past: int) -> None:
    p = problem(2, 7, 4, past)
    inputs = [p[n].requires_grad_() for n in ("q", "k", "gamma", "f", "past_k", "past_s")]
    assert torch.autograd.gradcheck(lambda *x: ops.feedback_attention(*x, p["past_length"]), inputs, fast_mode=False)
    big = problem(2, 300, 16, past, seed=3)
    names = ("q", "k", "gamma", "f", "past_k", "past_s")
    ours, plain = ([big[n].clone().requires_grad_() for n in names] for _ in range(2))
    weight = torch.randn(2, 300, 16, dtype=torch.float64)
    (ops.feedback_attention(*ours, big["past_length"]) * weight).sum().backward()
    (reference.plain(*plain, big["past_length"]) * weight).sum().backward()
    for name, a, b in zip(names, ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("past", [0, 3])
def test_causal_gradients(past: int) -> None:
    g = torch.Generator().manual_seed(2)
    shapes = [(2, 6, 4, 2), (2, 6, 2, 2), (2, 6, 2, 2), (2, past, 2, 2), (2, past, 2, 2)]
    inputs = [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    length = torch.tensor([past, past // 2], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *x: torch.ops.sessa.causal_attention(*x, length), inputs)
    shapes = [(2, 150, 4, 8), (2, 150, 2, 8), (2, 150, 2, 8), (2, past, 2, 8), (2, past, 2, 8)]  # several blocks of rows
    ours = [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    plain, weight = [x.detach().clone().requires_grad_() for x in ours], torch.randn(shapes[0], generator=g, dtype=torch.float64)
    (torch.ops.sessa.causal_attention(*ours, length) * weight).sum().backward()
    (reference.plain_causal(*plain, length) * weight).sum().backward()
    for name, a, b in zip(("q", "k", "v", "past_k", "past_v"), ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_direct_call_of_the_public_op_is_differentiable() -> None:
    p = problem(1, 5, 4, 2)
    inputs = [p[n].requires_grad_() for n in ("q", "k", "gamma", "f", "past_k", "past_s")]
    assert torch.autograd.gradcheck(lambda *x: torch.ops.sessa.feedback_attention(*x, p["past_length"]), inputs)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_a_second_derivative_is_refused(weight: float) -> None:
    """Also where the first one's weights are constants: PyTorch's own guard gives zeros there."""
    p = problem(1, 5, 4, dtype=torch.float32)
    q = p["q"].requires_grad_()
    s = ops.feedback_attention(q, p["k"], p["gamma"], p["f"])
    (dq,) = torch.autograd.grad((s**weight).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (dq.square().sum() + s.sum()).backward()


@pytest.mark.parametrize("call", ["jvp", "jacfwd", "dual"])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_mode_derivative_is_refused(call: str, past: bool, grad: bool) -> None:
    """The kernels and the registered operators know none: zeros would come back."""
    p = problem(1, 5, 4, 3, torch.float32)
    names = list(p) if past else list(p)[:4]
    behind = [torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4), p["past_length"]] if past else []
    q = p["q"].requires_grad_(grad)

    def feedback(x: Tensor) -> Tensor:
        return ops.feedback_attention(x, *(p[n] for n in names[1:]))

    def causal(x: Tensor) -> Tensor:
        return ops.causal_attention(x[:, :, None], p["k"][:, :, None], p["f"][:, :, None], *behind)

    def take(of: Callable[[Tensor], Tensor]) -> Tensor:
        if call == "dual":
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(of(forward_ad.make_dual(q, torch.ones_like(q)))).tangent
                assert tangent is not None
                return tangent
        found: Tensor = torch.func.jacfwd(of)(q) if call == "jacfwd" else torch.func.jvp(of, (q,), (torch.ones_like(q),))[1]
        return found

    for of in (feedback, causal) if past else (feedback,):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            take(of)
    with forward_ad.dual_level():  # nothing to take a derivative of
        torch.testing.assert_close(feedback(q), ops.feedback_attention(**{n: p[n] for n in names}))
    if not past:
        with sdpa_kernel(SDPBackend.MATH):
            assert take(causal).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(dtype: torch.dtype, grad: bool) -> None:
    p = problem(2, 5, 8, 3, dtype)
    args = tuple(p[n].requires_grad_(grad and n != "past_length") for n in p)
    for op in (torch.ops.sessa.feedback_attention, torch.ops.sessa.feedback_attention_fwd):
        torch.library.opcheck(op.default, args)
    q, k = torch.randn(2, 5, 4, 8, dtype=dtype), torch.randn(2, 5, 2, 8, dtype=dtype)
    past = torch.randn(2, 3, 2, 8, dtype=dtype)
    causal = tuple(x.clone().requires_grad_(grad) for x in (q, k, k, past, past))
    torch.library.opcheck(torch.ops.sessa.causal_attention.default, (*causal, p["past_length"]))


def test_autocast_casts_storage_and_keeps_gamma() -> None:
    p = problem(1, 9, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.feedback_attention(p["q"], p["k"], p["gamma"], p["f"]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": torch.zeros(1, 4, dtype=torch.bfloat16)}, "gamma must be float32"),
        ({"gamma": torch.zeros(1, 5)}, "gamma must have shape"),
        ({"k": torch.zeros(1, 4, 9)}, "k must match q"),
        ({"past_s": torch.zeros(1, 3, 8)}, "past_s must have shape"),
        ({"past_k": torch.zeros(1, 2, 8, dtype=torch.float16)}, "past_k must have the storage dtype"),
        ({"past_length": torch.zeros(1)}, "past_length must be int32"),
        ({"past_length": torch.zeros(2, dtype=torch.int32)}, "past_length must have shape"),
        ({"k": torch.zeros(1, 4, 8, device="meta")}, "k must be on q's device cpu, got meta"),
        ({"past_length": torch.zeros(1, dtype=torch.int32, device="meta")}, "past_length must be on q's device"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Tensor], message: str) -> None:
    p = problem(1, 4, 8, 2, torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.feedback_attention(**{**p, **change})


@pytest.mark.parametrize("name", ["k", "past_v", "past_length"])
def test_causal_attention_has_its_tensors_on_one_device(name: str) -> None:
    """A kernel would read an address of another device."""
    x = torch.zeros(1, 4, 2, 8)
    p = {"q": x, "k": x, "v": x, "past_k": x, "past_v": x, "past_length": torch.zeros(1, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"{name} must be on q's device"):
        ops.causal_attention(**{**p, name: p[name].to("meta")})


def test_a_sequence_is_the_same_whatever_batch_it_is_in() -> None:
    p = problem(4, 150, 16, 9)
    whole = ops.feedback_attention(**p)
    for b in range(4):
        alone = ops.feedback_attention(**{n: x[b : b + 1] for n, x in p.items()})
        torch.testing.assert_close(alone[0], whole[b], rtol=1e-12, atol=1e-13)


def test_gradients_are_on_again_where_a_call_without_them_fails() -> None:
    try:
        with pytest.raises(ZeroDivisionError):
            ops.without_grad(lambda: 1 / 0)
        assert torch.is_grad_enabled() and not ops.without_grad(torch.is_grad_enabled) and torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_who_attends_is_asked_again_where_a_setting_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cuDNN's operator and PyTorch's choice; once for the same settings."""
    asked, known, c = list[int](), dict[Any, bool](), torch._C
    x = SimpleNamespace(is_cuda=True, shape=(1, 4, 2, 8), transpose=lambda *_: None)
    monkeypatch.setattr(ops, "_wants_other_backend", lambda *_: False)

    def fuses() -> tuple[bool, int]:
        found = ops.fuses(known, lambda: asked.append(0) or (x, x, x))  # type: ignore[func-returns-value]
        return found, len(asked)

    assert fuses() == (True, 1) == fuses()
    order = list(c._get_sdp_priority_order())
    changes: list[tuple[Any, Any, Any]] = [(c._set_cudnn_enabled, c._get_cudnn_enabled(), None), (c._set_sdp_use_cudnn, c._get_cudnn_sdp_enabled(), None),
                                           (c._set_sdp_use_flash, c._get_flash_sdp_enabled(), None), (c._set_sdp_use_math, c._get_math_sdp_enabled(), None),
                                           (c._set_sdp_use_mem_efficient, c._get_mem_efficient_sdp_enabled(), None),
                                           (c._set_sdp_priority_order, order, order[::-1]), (c._set_deterministic_algorithms, False, True)]  # fmt: skip
    for count, (change, before, after) in enumerate(changes, 2):
        change(not before if after is None else after)
        try:
            assert fuses() == (after is not True, count), change
        finally:
            change(before)
        assert fuses() == (True, count)
    monkeypatch.setattr(ops, "_wants_other_backend", lambda *_: True)
    assert fuses() == (False, len(changes) + 2)

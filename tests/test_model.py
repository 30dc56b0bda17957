"""The model against the official numbers, and its cached paths against its whole-sequence path."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from sessa_deploy import SessaConfig, SessaLayer, SessaLM, UserError, fused_layer
from sessa_deploy.contract import CACHE_FIELDS, cache_entries
from sessa_deploy.model import Ops, using_ops

Golden = tuple[dict[str, Any], dict[str, Tensor]]
BUFFERS = ("rope_inv_freq", "causal_mask_f_full", "causal_mask_fb_full")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def golden_layer(golden: Golden, dtype: torch.dtype) -> SessaLayer:
    config, tensors = golden
    layer = SessaLayer(config["D"], config["n_heads"], config["n_kv_heads"], config["gamma_max"], config["use_forward_rope"], config["ln_eps"])
    state = {name[6:]: x for name, x in tensors.items() if name.startswith("param.") and not name.endswith(BUFFERS)}
    layer.load_state_dict(state, strict=True)
    return layer.to(dtype)


def relative(got: Tensor, want: Tensor, scale: float = 0.0) -> float:
    return float((got.detach().double() - want).abs().max() / max(float(want.abs().max()), scale, 1e-30))


def tiny(seed: int = 0, **changes: Any) -> SessaLM:
    torch.manual_seed(seed)
    config = SessaConfig(**{"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50, **changes})
    model = SessaLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_golden_forward_and_every_gradient(golden: Golden, dtype: torch.dtype) -> None:
    config, tensors = golden
    layer = golden_layer(golden, dtype)
    x = tensors["x"].to(dtype).requires_grad_()
    y = layer(x)
    assert relative(y, tensors["y"]) < TOLERANCE[dtype]
    (y * torch.linspace(-1, 1, config["D"], dtype=dtype)).sum().backward()
    assert relative(x.grad, tensors["grad.x"]) < TOLERANCE[dtype]
    grads = {name: tensors[f"grad.{name}"] for name, _ in layer.named_parameters()}
    largest = max(float(g.abs().max()) for g in grads.values())
    for name, parameter in layer.named_parameters():
        # A gradient that is zero but for rounding is judged against the largest one.
        assert relative(parameter.grad, grads[name], scale=0.01 * largest) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_golden_prefill_decode_and_caches(golden: Golden, dtype: torch.dtype) -> None:
    config, tensors = golden
    layer, x = golden_layer(golden, dtype), tensors["x"].to(dtype)
    total = x.shape[1]
    cache = layer.init_cache(x.shape[0], total)
    for name in CACHE_FIELDS:
        getattr(cache, name).fill_(torch.nan)
    parts = [layer.prefill(x[:, : config["T"]], cache)]
    parts += [layer.decode_step(x[:, t : t + 1], cache) for t in range(config["T"], total)]
    assert relative(torch.cat(parts, 1), tensors["y"]) < TOLERANCE[dtype]
    assert cache.length.tolist() == [total] * x.shape[0]
    for name in CACHE_FIELDS:
        assert relative(getattr(cache, name), tensors[f"cache.{name}"]) < TOLERANCE[dtype], name


def test_state_dict_holds_the_official_parameters_and_nothing_else(golden: Golden) -> None:
    _, tensors = golden
    official = {name[6:] for name in tensors if name.startswith("param.") and not name.endswith(BUFFERS)}
    assert set(golden_layer(golden, torch.float32).state_dict()) == official


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,), (7, 8), (3, 3, 20), (63, 64)])
def test_prefill_in_chunks_equals_the_whole(cuts: tuple[int, ...]) -> None:
    model = tiny()
    ids = torch.randint(50, (2, 70))
    whole = model(ids)
    caches = model.init_cache(2, 70)
    parts = [model.prefill(part, caches, all_logits=True) for part in ids.tensor_split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_ragged_batch_equals_single_sequences() -> None:
    model = tiny(use_forward_rope=True)
    lengths = [5, 0, 9, 1]
    caches = model.init_cache(4, 12)
    for cache in caches:
        for name in CACHE_FIELDS:
            getattr(cache, name).fill_(torch.nan)
    singles = [model.init_cache(1, 12) for _ in lengths]
    ids = torch.randint(50, (4, 9))
    logits = model.prefill(ids, caches, torch.tensor(lengths, dtype=torch.int32))
    for step in range(3):
        for b, n in enumerate(lengths):
            if n:
                want = model.prefill(ids[b : b + 1, :n], singles[b])
                torch.testing.assert_close(logits[b : b + 1], want, rtol=1e-10, atol=1e-12)
        assert caches[0].length.tolist() == [int(single[0].length) for single in singles]
        ids = torch.randint(50, (4, 1))
        lengths = [[1, 1, 0, 1], [1, 0, 1, 1], []][step]
        if lengths:
            logits = model.decode_step(ids, caches, torch.tensor(lengths, dtype=torch.int32))
    for cache, layer in zip(caches, range(3), strict=True):
        for b, single in enumerate(singles):
            n = int(single[layer].length)
            torch.testing.assert_close(cache.s[b, :n], single[layer].s[0, :n], rtol=1e-10, atol=1e-12)
            assert torch.isnan(cache.s[b, n:]).all(), "rows beyond a sequence's length were written"


@torch.no_grad()
def test_exactly_full_cache_works_and_one_more_token_is_refused() -> None:
    model = tiny()
    ids = torch.randint(50, (2, 8))
    caches = model.init_cache(2, 8)
    model.prefill(ids[:, :7], caches)
    model.decode_step(ids[:, 7:], caches)
    before = caches[0].s.clone()
    with pytest.raises(UserError, match=r"8 cached and 1 new tokens.*at most 8"):
        model.decode_step(ids[:, :1], caches)
    assert torch.equal(caches[0].s, before)
    model.decode_step(ids[:, :1], caches, torch.zeros(2, dtype=torch.int32))  # finished sequences may stand in a full cache
    assert caches[0].length.tolist() == [8, 8]
    caches[0].reset()
    assert caches[0].length.tolist() == [0, 0]


@torch.no_grad()
def test_graph_zeroes_rows_that_do_not_count_and_picks_the_last_counted_row() -> None:
    model = tiny()
    ids = torch.randint(50, (3, 6))
    length = torch.zeros(3, dtype=torch.int32)
    counted = torch.tensor([6, 2, 0], dtype=torch.int32)
    past = [torch.empty(3, 0, *((2, 8) if name in ("k_f", "v_f") else (32,)), dtype=torch.float64) for _, name in cache_entries(3)]
    logits, *new = model.graph(ids, length, counted, past)
    whole = model(ids)
    torch.testing.assert_close(logits[0], whole[0, 5], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logits[1], whole[1, 1], rtol=1e-10, atol=1e-12)
    for rows in new:
        assert rows[1, 2:].eq(0).all() and rows[2].eq(0).all() and rows[1, :2].ne(0).any()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@torch.no_grad()
def test_gamma_stays_float32_in_every_precision(precision: str) -> None:
    model = tiny().to_precision(precision)
    mixer = model.layers[0].mixer
    assert mixer.gamma_bias.dtype == mixer.gamma_ctx.weight.dtype == torch.float32
    mixer.gamma_bias.fill_(30.0)
    gamma = mixer.gain(torch.zeros(1, 2, 32, dtype=model.layers[0].W_in.weight.dtype))
    assert gamma.dtype == torch.float32 and (gamma < 1).all() and torch.allclose(gamma, torch.tensor(0.999))
    assert model(torch.randint(50, (1, 5))).dtype == torch.float32


@torch.no_grad()
def test_padded_rows_may_hold_nan() -> None:
    layer = tiny().layers[0]
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    clean, dirty = layer.init_cache(2, 6), layer.init_cache(2, 6)
    counted = torch.tensor([4, 6], dtype=torch.int32)
    want = layer.prefill(x, clean, counted)
    x[0, 4:] = torch.nan
    got = layer.prefill(x, dirty, counted)
    assert torch.equal(got[0, :4], want[0, :4]) and torch.equal(got[1], want[1])


def test_tied_embeddings_share_one_weight() -> None:
    model = SessaLM(SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=9, tie_word_embeddings=True))
    assert model.lm_head.weight is model.embedding.weight


def test_bad_calls_are_refused_in_one_line() -> None:
    layer = tiny().layers[0]
    cache = layer.init_cache(1, 4)
    with pytest.raises(UserError, match="one token"):
        layer.decode_step(torch.zeros(1, 2, 32, dtype=torch.float64), cache)
    with pytest.raises(UserError, match="batch size"):
        layer.prefill(torch.zeros(2, 2, 32, dtype=torch.float64), cache)
    with pytest.raises(UserError, match="capacity"):
        layer.init_cache(1, 0)
    with pytest.raises(UserError, match="divisible"):
        SessaLayer(10, 4)


def test_copies_of_a_model_take_the_road_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they were copied, also behind a block of other ops, which sets a mixer's own."""
    model, asked = SessaLM(SessaConfig(d_model=8, n_layers=2, n_heads=1, vocab_size=5)), list[Any]()
    monkeypatch.setattr(fused_layer, "applies", lambda layer, x: asked.append(layer))
    with pytest.raises(ZeroDivisionError), using_ops(model, Ops(causal=lambda q, *_: q)):
        model(torch.zeros(1, 3, dtype=torch.int64))
        raise ZeroDivisionError
    assert not asked
    for of in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        of(torch.zeros(1, 3, dtype=torch.int64))
        assert asked[-2:] == [*of.layers]

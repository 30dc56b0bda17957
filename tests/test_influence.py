"""Influence: the exact values of uniform routing, from the op and from the verb, and what the measurement is of on a model whose routing is anything.

Closed form (arXiv 2604.18580, Proposition 29): alpha[t,j] = 1/t and a constant gamma give K[tau+1,tau] = gamma/(tau+1), K[t+1,tau] = K[t,tau] (t+gamma)/(t+1).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command import call
from hypothesis import given, settings
from hypothesis import strategies as st

from sessa_deploy import SessaConfig, SessaLM, UserError, save_checkpoint
from sessa_deploy import influence as measured
from sessa_deploy import influence_curves as curves
from sessa_deploy.influence_plot import FORMATS
from sessa_deploy.kernels import reference
from sessa_deploy.kernels.ops import feedback_attention, no_past

GAMMAS = (0.25, 0.5, 0.75, 0.9, 0.999, -0.5)
K_OF_0 = {  # K[t,0] at t = 1, 4, 16, 64, 256, 1024, 4096
    0.25: (0.25, 9.521484375e-2, 3.4274514246e-2, 1.2171579707e-2, 4.3080412780e-3, 1.5235411662e-3, 5.3869013643e-4),
    0.5: (0.5, 2.734375e-1, 1.3994993409e-1, 7.0386092170e-2, 3.5244635486e-2, 1.7628772405e-2, 8.8151932205e-3),
    0.75: (0.75, 5.6396484375e-1, 4.0565335337e-1, 2.8809509927e-1, 2.0393756129e-1, 1.4424522908e-1, 1.0200378273e-1),
    0.9: (0.9, 8.0583750000e-1, 7.0721255025e-1, 6.1695067244e-1, 5.3736932015e-1, 4.6786880204e-1, 4.0731687151e-1),
}
# Slope of log K[tau+l,tau] on log l: (tau, first lag, last lag) -> gamma -> slope.
SLOPES = {
    (0, 64, 1024): {0.25: -0.74956, 0.5: -0.49941, 0.75: -0.24956, 0.9: -0.09979},
    (0, 128, 4096): {0.25: -0.74983, 0.5: -0.49977, 0.75: -0.24983, 0.9: -0.09992},
    (16, 128, 4096): {0.25: -0.72866, 0.5: -0.48567, 0.75: -0.24278, 0.9: -0.09710},
    (256, 128, 4096): {0.25: -0.53571, 0.5: -0.35710, 0.75: -0.17853, 0.9: -0.07141},
    (256, 1024, 65536): {0.25: -0.71737, 0.5: -0.47824, 0.75: -0.23911, 0.9: -0.09564},
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 8e-3}


def exact_column(gamma: float, tokens: int, tau: int = 0) -> np.ndarray:
    """K[:, tau] (T,) by the ratio form."""
    t = np.arange(tau + 1, tokens - 1)
    ratios = np.concatenate([[gamma / (tau + 1)], (t + gamma) / (t + 1)])
    return np.concatenate([np.zeros(tau), [1.0], np.cumprod(ratios)])[:tokens]


def exact(gamma: float, tokens: int) -> np.ndarray:
    return np.stack([exact_column(gamma, tokens, tau) for tau in range(tokens)], axis=1)


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    assert ((got == 0) == (wanted == 0)).all()
    there = wanted != 0
    return float(np.max(np.abs(got[there] / wanted[there] - 1)))


def lm(tokens: int = 64, **changes: object) -> SessaLM:
    torch.manual_seed(0)
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 11, "n_kv_heads": 1, "max_context": tokens}
    model = SessaLM(SessaConfig(**(shape | changes)))  # type: ignore[arg-type]
    for p in model.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p)
    return model.eval()


def uniform(gamma: float, **changes: object) -> SessaLM:
    """A model whose feedback routing is uniform and whose gain is gamma everywhere."""
    model = lm(**changes)
    for layer in model.layers:
        for p in (*layer.mixer.proj_fb.parameters(), *layer.mixer.gamma_ctx.parameters()):
            p.data.zero_()
        layer.mixer.gamma_bias.data.fill_(math.atanh(gamma / 0.999))
    return model


def dense(routing: measured.Routing) -> np.ndarray:
    """(I - B)^-1 of the recorded routing, in float64, by numpy."""
    q, k, gamma = (x.double()[None] for x in (routing.q_b, routing.k_b, routing.gamma))
    alpha = reference.routing(q, k, *(no_past(q, False)[i] for i in (0, 2)))[0]
    return np.linalg.inv(np.eye(len(alpha)) - (gamma[0][:, None] * alpha).numpy())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_op_gives_every_column_at_once(gamma: float, dtype: torch.dtype) -> None:
    tokens = 512
    zeros, gain = torch.zeros(tokens, tokens, dtype=dtype), torch.full((tokens,), gamma)
    if dtype == torch.float64:
        gain = gain.double().fill_(gamma)
    found = measured.solve_columns(zeros, zeros, gain, torch.eye(tokens, dtype=dtype)).double().numpy()
    assert relative(found, exact(float(gain[0]), tokens)) < TOLERANCE[dtype] * (2 if gamma < 0 else 1)  # 1 and the sum of the others nearly cancel


def test_closed_form_is_the_published_one() -> None:
    for gamma, values in K_OF_0.items():
        assert exact_column(gamma, 4097)[[1, 4, 16, 64, 256, 1024, 4096]] == pytest.approx(values, rel=1e-9)
    for gamma in GAMMAS[:4]:
        column = exact(gamma, 200)
        assert column.sum(1) == pytest.approx((1 - gamma * column[:, 0]) / (1 - gamma), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.9, -0.5])
def test_the_report_of_a_layer_of_uniform_routing(gamma: float) -> None:
    model, tokens = uniform(gamma), 200
    lags = [0, 1, 4, 16, 64, 150]
    report = measured.measure(model, np.random.default_rng(0).integers(0, 11, tokens).tolist(), 5, lags)
    assert [layer["layer"] for layer in report["layers"]] == [0, 1] and report["schema_version"] == 1 and report["context"] == tokens
    for layer in report["layers"]:
        assert layer["gamma"] == pytest.approx({"min": gamma, "mean": gamma, "max": gamma}, abs=1e-7)
        assert layer["c2"] == pytest.approx(1.0) and layer["eta"] == pytest.approx(abs(gamma)) and layer["beta"] == pytest.approx(1 - abs(gamma))
        assert layer["support"]["values"] == pytest.approx(layer["support"]["targets"])  # even attention over t tokens
        assert [s["source"] for s in layer["sources"]] == curves.source_positions(5, tokens)
        for source in layer["sources"]:
            tau, column = source["source"], exact_column(gamma, tokens, source["source"])
            assert source["lags"] == lags
            wanted = [None if tau + lag >= tokens else column[tau + lag] for lag in lags]
            if gamma == 0:
                assert source["influence"] == wanted and source["fit"] is None and source["verdict"] in ("none", "too short")  # K = I, exactly
                continue
            assert [x is None for x in source["influence"]] == [x is None for x in wanted]
            assert [x for x in source["influence"] if x is not None] == pytest.approx([x for x in wanted if x is not None], rel=3e-6)
            assert source["transformer"][1] == 1 / (tau + 2)
        if gamma != 0:
            ideal = curves.fit(exact_column(gamma, tokens), 0)
            assert ideal is not None and layer["sources"][0]["fit"]["slope"] == pytest.approx(ideal.slope, abs=1e-4)
            assert layer["sources"][0]["verdict"] == "power"


def test_the_verb_fits_the_exponent(tmp_path: Path) -> None:
    save_checkpoint(uniform(0.5, n_layers=1, n_heads=1), tmp_path / "checkpoint")
    assert call("influence", tmp_path / "checkpoint", "--context", 1025, "--sources", 1, "--device", "cpu", "--json", tmp_path / "out.json") == 0
    layer, = json.loads((tmp_path / "out.json").read_text())["layers"]
    assert layer["sources"][0]["fit"]["slope"] == pytest.approx(SLOPES[0, 64, 1024][0.5], abs=2e-4) and layer["sources"][0]["verdict"] == "power"
    assert [o["slope"] for o in layer["sources"][0]["slopes"]][4:] == pytest.approx([-0.5] * 6, abs=0.006)


@pytest.mark.parametrize(("window", "slopes"), SLOPES.items())
def test_fits(window: tuple[int, int, int], slopes: dict[float, float]) -> None:
    tau, low, high = window
    for gamma, slope in slopes.items():
        found = curves.fit(exact_column(gamma, tau + high + 1, tau), tau, low, high)
        assert found is not None and found.lags == (low, high) and found.slope == pytest.approx(slope, abs=1e-5) and found.r2 > 0.98
    negative = curves.fit(exact_column(-0.5, 4097), 0, 128, 4096)
    assert negative is not None and negative.slope == pytest.approx(-1.5, abs=1e-3)


def test_tails_are_told_apart_where_r2_does_not() -> None:
    t = np.arange(2049)
    for rate in (0.001, 0.01, 0.1):
        slopes = curves.octave_slopes(np.exp(-rate * t), 0)
        assert [o["slope"] for o in slopes] == pytest.approx([-rate * o["from"] / math.log(2) for o in slopes], abs=1e-9)
        assert curves.verdict(slopes) == "exponential"
    channels = np.exp(-np.linspace(0.001, 0.1, 16)[:, None] * t).sum(0)
    found = curves.fit(channels, 0, 16, 2048)
    assert found is not None and found.slope == pytest.approx(-0.775, abs=5e-4) and found.r2 == pytest.approx(0.992, abs=5e-4)
    slopes = curves.octave_slopes(channels, 0)
    assert slopes[-1]["from"] == 1024 and slopes[-1]["slope"] == pytest.approx(-1.48, abs=5e-3) and curves.verdict(slopes) == "steepening"
    assert curves.verdict(curves.octave_slopes(1 / (1 + t), 0)) == "power"
    assert curves.verdict(curves.octave_slopes(np.where(t > 0, np.cos(t), 1.0), 0)) == "irregular"
    assert curves.verdict(curves.octave_slopes(np.zeros(2049), 0)) == "none" and curves.verdict(curves.octave_slopes(np.ones(40), 0)) == "too short"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 1.5), st.floats(0.05, 0.95))
def test_the_bound_of_bounded_logits(seed: int, delta: float, share: float) -> None:
    """Theorem 8: logits in [0, delta] and |gamma| <= g give |K[tau+l,tau]| <= eta e^eta l^-(1-eta), eta = g e^delta < 1."""
    rng, tokens = np.random.default_rng(seed), 48
    most = share * math.exp(-delta)
    logits = rng.uniform(0, delta, (tokens, tokens))
    gamma = rng.uniform(-most, most, tokens)
    # one-hot keys, so that the logits are the queries themselves
    q_b, k_b = torch.from_numpy(logits) * tokens**0.5, torch.eye(tokens, dtype=torch.float64)
    columns = measured.solve_columns(q_b, k_b, torch.from_numpy(gamma), torch.eye(tokens, dtype=torch.float64)).numpy()
    lag = np.subtract.outer(np.arange(tokens), np.arange(tokens))
    eta = most * math.exp(delta)
    bound = eta * math.exp(eta) * np.where(lag > 0, lag, 1.0) ** (eta - 1)
    assert (np.abs(columns) <= bound)[lag > 0].all()
    told = measured.spread(measured.Routing(q_b[:, None], k_b[:, None], q_b, k_b, torch.from_numpy(gamma)))
    assert told["c2"] <= math.exp(delta) + 1e-12 and told["eta"] <= eta + 1e-12


@pytest.mark.parametrize("chunks", [(96,), (1,) * 96, (40, 1, 55), (7,) * 13 + (5,)])
def test_decode_and_chunked_prefill_give_the_same_columns(chunks: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(1)
    tokens, width = sum(chunks), 32
    q, k = (torch.randn(1, tokens, width, generator=rng) for _ in range(2))
    gamma = 0.999 * torch.tanh(torch.randn(1, tokens, generator=rng))
    f = measured.one_hot(range(width), tokens, q)[None]
    whole = measured.solve_columns(q[0], k[0], gamma[0], f[0])
    past_s, at = q.new_empty(1, 0, width), 0
    for count in chunks:
        part = slice(at, at + count)
        length = torch.tensor([at], dtype=torch.int32)
        new = feedback_attention(q[:, part], k[:, part], gamma[:, part], f[:, part], k[:, :at], past_s, length)
        past_s, at = torch.cat([past_s, new], 1), at + count
    exact_columns = reference.recurrence(q, k, gamma, f, *no_past(q, False))
    for found in (whole, past_s[0]):
        assert float((found.double() - exact_columns[0]).abs().max()) < 8 * 2.0**-23 * float(exact_columns.abs().max())


def test_the_columns_are_those_of_the_real_routing() -> None:
    model, ids = lm(), np.random.default_rng(2).integers(0, 11, 60).tolist()
    before = [layer.mixer.ops for layer in model.layers]
    routings = measured.record_routing(model, torch.tensor([ids]))
    assert [layer.mixer.ops for layer in model.layers] == before
    report = measured.measure(model, ids, 20, [0, 1, 5, 30])  # more sources than features: two calls of the op
    for routing, layer in zip(routings, report["layers"], strict=True):
        inverse = dense(routing)
        forward = np.zeros((60, 60))
        for head in range(2):
            scores = (routing.q[:, head].double() @ routing.k[:, 0].double().T).numpy() / 8**0.5
            weights = np.where(np.tri(60) > 0, np.exp(scores), 0)
            forward += weights / weights.sum(1, keepdims=True) / 2
        for source in layer["sources"]:
            tau = source["source"]
            for key, curve in (("influence", inverse[:, tau]), ("forward", forward[:, tau]), ("value_path", (inverse @ forward)[:, tau])):
                wanted = curves.at_lags(curve, tau, source["lags"])
                assert [x for x in source[key] if x is not None] == pytest.approx([x for x in wanted if x is not None], rel=2e-5, abs=2e-6), key
        alpha = np.eye(60) - np.linalg.inv(inverse)
        alpha = alpha / routing.gamma.double().numpy()[:, None]
        assert layer["c2"] == pytest.approx((np.arange(60)[:, None] * alpha).max(), rel=1e-6)
        assert layer["support"]["min"] == pytest.approx((1 / (alpha[1:] ** 2).sum(1)).min(), rel=1e-6)


def test_one_layer_alone_is_the_same_layer() -> None:
    model, ids = lm(), [1, 2, 3, 4, 5, 6, 7, 8]
    both, second = measured.measure(model, ids), measured.measure(model, ids, layer=1)
    assert second["layers"] == both["layers"][1:] and len(both["layers"][0]["sources"]) == 7


@pytest.mark.parametrize("layer", [None, 1])
def test_end_to_end_is_the_norm_of_the_jacobian(layer: int | None) -> None:
    """Against autograd in float64; eight probes estimate a norm to about 1/sqrt(8 d), so the probes themselves are compared too."""
    model = lm(d_model=8, n_heads=1).to_precision("fp64")
    ids, layers = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], list(model.layers)
    x = model.embedding(torch.tensor([ids])).detach()
    before, after = (layers[:0], layers) if layer is None else (layers[:layer], layers[layer : layer + 1])
    for part in before:
        x = part(x).detach()

    def stack(y: torch.Tensor) -> torch.Tensor:
        for part in after:
            y = part(y)
        return y

    jacobian = torch.autograd.functional.jacobian(stack, x)[0, :, :, 0]  # (T,D,T,D)
    many = measured.end_to_end(stack, x, [0, 3], probes=4000)
    wanted = jacobian.square().sum(dim=(1, 3)).sqrt()[:, [0, 3]].numpy()
    assert many == pytest.approx(wanted, rel=0.05) and (many[:3, 1] == 0).all()
    v = torch.randn(1, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)[0]
    one = measured.end_to_end(stack, x, [3], probes=1, seed=7)[:, 0]
    assert one == pytest.approx(torch.einsum("tdse,e->tds", jacobian, v)[..., 3].square().sum(1).sqrt().numpy(), rel=1e-7, abs=1e-12)
    report = measured.measure(model, ids, 3, [0, 1, 2], layer, deep=True)["end_to_end"]
    assert report["layer"] == layer and report["sources"][0]["influence"] == pytest.approx(measured.end_to_end(stack, x, [0])[:3, 0].tolist())


@pytest.mark.parametrize("tokens", [2, 3, 5, 17, 100, 513, 4096])
def test_sources_are_a_count_from_zero_on(tokens: int) -> None:
    for count in {1, min(2, tokens - 1), min(16, tokens - 1), tokens - 1}:
        found = curves.source_positions(count, tokens)
        assert len(found) == count and found == sorted(set(found)) and found[0] == 0 and found[-1] <= tokens - 2
    for count in (0, tokens, 10**9):
        with pytest.raises(UserError, match="sources"):
            curves.source_positions(count, tokens)
    assert curves.source_positions(9, 513) == [0, 1, 2, 5, 11, 24, 53, 116, 256]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(lm(vocab_size=257, bos_token_id=256), tmp_path_factory.mktemp("influence") / "checkpoint")


def report_of(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, object]:
    assert call("influence", *args, "--device", "cpu", "--json", "-") == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_the_verb_takes_a_prompt_tokens_or_nothing(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids").write_text("256\n 104  105\t33\n")
    prompt = report_of(capsys, checkpoint, "--prompt", "hi!")
    tokens = report_of(capsys, checkpoint, "--tokens", tmp_path / "ids")
    assert prompt["layers"] == tokens["layers"] and prompt["context"] == 4  # bos stands before a prompt
    first, again, other = (report_of(capsys, checkpoint, "--seed", seed) for seed in (0, 0, 1))
    assert first == again and first["layers"] != other["layers"] and first["context"] == 64
    assert report_of(capsys, checkpoint, "--prompt", "hi!", "--context", 3)["context"] == 3
    assert report_of(capsys, checkpoint, "--context", 9)["context"] == 9


def test_the_verb_lists_the_lags_asked_for(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, checkpoint, "--lags", "1,4,16", "--sources", 3, "--layer", 1)
    layer, = report["layers"]  # type: ignore[misc]
    assert [s["lags"] for s in layer["sources"]] == [[1, 4, 16]] * 3 and layer["layer"] == 1
    assert all(len(s["influence"]) == 3 and set(s) >= {"source", "lags", "influence", "slopes", "fit"} for s in layer["sources"])
    assert set(layer["gamma"]) == {"min", "mean", "max"}


@pytest.mark.parametrize("form", FORMATS)
def test_the_verb_draws(checkpoint: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("influence", checkpoint, "--device", "cpu", "--plot", tmp_path / f"x.{form}", "--end-to-end", "--sources", 3, "--context", 40) == 0
    content = (tmp_path / f"x.{form}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[form]) and len(content) > 10_000
    out = capsys.readouterr().out
    assert "end to end" in out and "even attention" in out


def test_what_the_verb_refuses(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "one").write_text("5")
    (tmp_path / "far").write_text("5 6 257")
    (tmp_path / "words").write_text("5 six")
    here = tmp_path / "other"
    save_checkpoint(lm(), here)
    for args, word in [
        (["bundle"], "checkpoint: a folder with config.json and model.safetensors"), (["bundle/manifest.json"], "q_b nor gamma"),
        (["bundle/model.onnx"], "an ONNX graph"), (["nowhere"], "no such checkpoint"), ([checkpoint, "--tokens", "one"], "too short"),
        ([checkpoint, "--tokens", "far"], "257"), ([checkpoint, "--tokens", "words"], "token ids"), ([checkpoint, "--layer", 2], "layer"),
        ([checkpoint, "--lags", "1,64"], "lag"), ([checkpoint, "--sources", 64], "sources"), ([checkpoint, "--plot", "x.jpg"], "--plot x.jpg"),
        ([checkpoint, "--prompt", "x", "--tokens", "one"], "exclude each other"), ([here, "--prompt", "x"], "no tokenizer"),
        ([checkpoint, "--json", "x.png", "--plot", "x.png"], "same place"), ([checkpoint, "--json", "no/such/folder"], "--json"),
    ]:
        assert call("influence", *args, *([] if "--device" in args else ["--device", "cpu"])) == 2, args
        seen = capsys.readouterr()
        assert seen.err.startswith("error: ") and seen.err.count("\n") == 1 and word in seen.err and seen.out == "", (args, seen)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "far", "one", "other", "words"]

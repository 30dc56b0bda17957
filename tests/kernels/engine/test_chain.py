"""The chain of kernels that bench_chain.py times is a decode step of the model: the same logits as SessaLM's, on the GPU or through the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from feedback_cases import DEVICE

from sessa_deploy import SessaConfig, SessaLM
from sessa_deploy.contract import CACHE_FIELDS
from sessa_deploy.rope import _limbs

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))


def alike(chain: Any) -> SessaLM:
    """The model that has a chain's weights, in float64; its embedding is rounded as the chain's rows are."""
    config, width = chain.config, chain.config.d_model
    model = SessaLM(config).double()
    chain.limbs = torch.tensor(_limbs(config.head_dim), device=DEVICE)
    state = model.state_dict()
    for i, w in enumerate(chain.layers):
        weight, biases = w["project"].double().cpu(), [b.double().cpu() for b in w["biases"]]
        stem = f"layers.{i}"
        rows = {"q_proj": (0, width), "k_proj": (width, 2 * width), "v_proj": (2 * width, 3 * width), "proj_fb": (3 * width, 5 * width)}
        for (name, (first, last)), bias in zip(rows.items(), biases, strict=True):
            state[f"{stem}.mixer.{name}.weight"], state[f"{stem}.mixer.{name}.bias"] = weight[first:last], bias
        state[f"{stem}.mixer.gamma_ctx.weight"], state[f"{stem}.mixer.gamma_bias"] = w["gamma"][0][None], w["gamma"][1][0]
        state[f"{stem}.mixer.out_proj.weight"] = w["out"][0]
        w["out"][1].zero_()  # out_proj has no bias
        for name, pair in (("ln", "norm"), ("W_in", "enter"), ("W_out", "tail")):
            state[f"{stem}.{name}.weight"], state[f"{stem}.{name}.bias"] = w[pair]
    state["norm.weight"], state["norm.bias"] = chain.last
    state["lm_head.weight"] = chain.head
    model.load_state_dict({name: x.double().cpu() for name, x in state.items()}, strict=True)
    model.embedding.weight.data = model.embedding.weight.data.half().double()
    return model


def truth(model: SessaLM, ids: torch.Tensor, lengths: list[int], caches: list[list[torch.Tensor]]) -> torch.Tensor:
    """Logits of the last of ids (B,T) in float64."""
    past = [torch.nan_to_num(x.double().cpu()) for layer in caches for x in layer]
    assert len(past) == model.config.n_layers * len(CACHE_FIELDS)
    new = torch.full((len(lengths),), ids.shape[1], dtype=torch.int32)
    with torch.no_grad():
        return model.graph(ids, torch.tensor(lengths, dtype=torch.int32), new, past)[0]


@pytest.mark.parametrize("separate", [False, True])
def test_the_chain_computes_a_decode_step(separate: bool) -> None:
    from bench_chain import Chain

    torch.manual_seed(0)
    chain, lengths = Chain(SessaConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=40), DEVICE, separate), [9, 0, 3]
    model, caches, ids = alike(chain), chain.caches(12, lengths), torch.tensor([5, 17, 33])
    logits = chain.step(model.embedding(ids).detach().half().to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE), caches).double().cpu()
    wanted = truth(model, ids[:, None], lengths, caches)
    assert (logits - wanted).abs().max() <= 1e-2 * wanted.abs().max()


def test_the_chain_of_several_rows_computes_a_step() -> None:
    from bench_chain import Chain
    from bench_rows import step

    torch.manual_seed(0)
    chain, lengths = Chain(SessaConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=40), DEVICE), [9]
    model, caches, ids = alike(chain), chain.caches(12, lengths), torch.tensor([5, 17, 33])
    x = step(chain, model.embedding(ids).detach().half().to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE), caches, 0)
    wanted = truth(model, ids[None], lengths, caches)
    logits = model.lm_head(model.norm(x[-1:].double().cpu())).detach()
    assert (logits - wanted).abs().max() <= 1e-2 * wanted.abs().max()


def test_the_chain_computes_a_prefill() -> None:
    from bench_chain import Chain

    torch.manual_seed(0)
    chain, lengths, tokens = Chain(SessaConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=40), DEVICE), [9], 18
    model, caches, ids = alike(chain), chain.caches(12, lengths), torch.randint(40, (len(lengths), tokens))
    x = model.embedding(ids).detach().half().to(DEVICE).flatten(0, 1)
    logits = chain.chunk(x, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), caches).double().cpu()
    wanted = truth(model, ids, lengths, caches)
    assert (logits - wanted).abs().max() <= 1e-2 * wanted.abs().max()

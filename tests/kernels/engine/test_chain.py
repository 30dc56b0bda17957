"""The chain of kernels that bench_chain.py times is a decode step of the model: the same logits as SessaLM's, on the GPU or through the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from feedback_cases import DEVICE

from sessa_deploy import SessaConfig, SessaLM
from sessa_deploy.contract import CACHE_FIELDS
from sessa_deploy.rope import _limbs

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))


@pytest.mark.parametrize("separate", [False, True])
def test_the_chain_computes_a_decode_step(separate: bool) -> None:
    from bench_chain import Chain

    config = SessaConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=40)
    torch.manual_seed(0)
    chain, lengths, capacity = Chain(config, DEVICE, separate), [9, 0, 3], 12
    model = SessaLM(config).double()
    chain.limbs = torch.tensor(_limbs(16), device=DEVICE)
    state = model.state_dict()
    for i, w in enumerate(chain.layers):
        weight, biases = w["project"].double().cpu(), [b.double().cpu() for b in w["biases"]]
        stem, rows = f"layers.{i}", {"q_proj": (0, 32), "k_proj": (32, 64), "v_proj": (64, 96), "proj_fb": (96, 160)}
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
    caches, ids = chain.caches(capacity, lengths), torch.tensor([5, 17, 33])
    logits = chain.step(model.embedding(ids).detach().half().to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE), caches).double().cpu()
    model.embedding.weight.data = model.embedding.weight.data.half().double()
    past = [torch.nan_to_num(x.double().cpu()) for layer in caches for x in layer]
    assert len(past) == 2 * len(CACHE_FIELDS)
    with torch.no_grad():
        truth = model.graph(ids[:, None], torch.tensor(lengths, dtype=torch.int32), torch.ones(3, dtype=torch.int32), past)[0]
    assert (logits - truth).abs().max() <= 1e-2 * truth.abs().max()

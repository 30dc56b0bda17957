"""The torch rungs' hold on a model: other ops in one model and only inside the block, and the maxima that are recorded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parity_fixtures import CONFIG, LAYERS, lively_model
from torch import Tensor

from sessa_deploy import model as model_module
from sessa_deploy.contract import cache_entries, cache_row_shape
from sessa_deploy.export.parity.models import record_headroom, using_ops
from sessa_deploy.kernels import reference
from sessa_deploy.model import KERNELS, Ops, SessaLM


def run(model: SessaLM, tokens: int = 9) -> tuple[Tensor, ...]:
    """SessaLM.graph of one sequence behind an empty past."""
    ids = torch.arange(tokens)[None] % CONFIG.vocab_size
    past = [torch.empty(1, 0, *cache_row_shape(field, CONFIG.d_model, CONFIG.kv_heads, CONFIG.head_dim)) for _, field in cache_entries(LAYERS)]
    with torch.no_grad():
        return model.graph(ids, torch.zeros(1, dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32), past)


def test_other_ops_are_one_models_and_end_with_the_block() -> None:
    model, other, calls = lively_model(), lively_model(), []

    def spy(*args: Any) -> Tensor:
        calls.append(args[0].shape)
        return reference.plain(*args)

    before = model_module.feedback_attention, model_module.causal_attention
    with pytest.raises(ZeroDivisionError), using_ops(model, Ops(feedback=spy)):
        assert (model_module.feedback_attention, model_module.causal_attention) == before
        want = run(other)
        assert not calls
        torch.testing.assert_close(run(model), want, rtol=1e-4, atol=1e-5)
        assert calls == [(1, 9, CONFIG.d_model)] * LAYERS
        raise ZeroDivisionError
    run(model)
    assert len(calls) == LAYERS and all(layer.mixer.ops is KERNELS for layer in model.layers)


def test_headroom_is_the_largest_magnitude_of_each_layer() -> None:
    model, gated = lively_model(), dict[int, float]()
    with record_headroom(model) as found:
        out = run(model, 4)
        run(model, 1)
        again = run(lively_model(seed=1, scale=9.0), 4)
    for i in range(LAYERS):
        assert found["s"][i] == float(out[1 + 4 * i + 3].abs().max()) != float(again[1 + 4 * i + 3].abs().max())
        model.layers[i].W_out.register_forward_hook(lambda _, args, y, i=i: gated.update({i: float(args[0].abs().max())}))
    run(model, 4)
    assert found["s*g"] == [gated[i] for i in range(LAYERS)]
    largest = {key: list(rows) for key, rows in found.items()}
    run(model, 200)
    assert found == largest, "nothing is recorded behind the block"
    with record_headroom(model) as found:
        model.layers[1].mixer.gamma_bias.data.fill_(torch.nan)
        run(model)
        model.layers[1].mixer.gamma_bias.data.fill_(0.0)
        run(model)
    assert found["s"][0] > 0 and math.isnan(found["s"][1]) and math.isnan(found["s*g"][1]), "a NaN stays"

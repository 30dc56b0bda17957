"""Mean nats of a language model's targets by the fused kernels, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from feedback_cases import DEVICE
from rule import check

from sessa_deploy import SessaConfig, SessaLM
from sessa_deploy.kernels.training import loss


def both(logits: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The mean and `factor` times its gradient."""
    leaf = logits.clone().requires_grad_()
    value = loss.mean_nats(leaf, targets)
    (factor * value).backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [8, 5000], ids=str)
def test_the_mean_and_its_gradient(vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, targets = (4 * torch.randn(2, 3, vocabulary)).to(DEVICE, dtype), torch.randint(0, vocabulary, (2, 3), device=DEVICE)
    logits[0, 1], logits[1, 2, 3] = -30000.0, 30000.0  # a flat row, a row that is sure of itself
    exact = both(logits.double(), targets, 0.5)
    monkeypatch.setattr(loss, "_fits", lambda *_: False)
    plain = both(logits, targets, 0.5)
    monkeypatch.setattr(loss, "_fits", lambda *_: True)
    got = both(logits, targets, 0.5)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    check(got[0][None], exact[0][None], plain[0][None], torch.float32, "mean")
    check(got[1], exact[1], plain[1], dtype, "gradient")
    logits[1, 0, 2] = torch.nan
    value, grad = both(logits, targets, 0.5)
    assert torch.isnan(value) and torch.isnan(grad[1, 0]).all() and torch.isfinite(grad[0]).all()


def test_a_model_gives_the_loss_of_its_logits() -> None:
    torch.manual_seed(0)
    model = SessaLM(SessaConfig(d_model=32, n_layers=1, n_heads=2, vocab_size=24)).to(DEVICE)
    ids, targets = torch.randint(0, 24, (2, 2, 9), device=DEVICE)
    want = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    assert torch.equal(model(ids, targets), want)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert abs(float(model(ids, targets) - want)) < 1e-2

"""Ways to compute the same run: compiled, and with activations computed anew. The curve is that of the plain one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from sessa_deploy.errors import UserError
from sessa_deploy.model import SessaLayer
from sessa_deploy.train import TrainOptions, start, train
from sessa_deploy.train_log import read_log

SHAPE: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2}


def curve(text: Path, out: Path, **changes: Any) -> list[tuple[Any, ...]]:
    options = TrainOptions(data=str(text), out=str(out), **{"steps": 2, "batch_size": 4, "context": 16, "device": "cpu", "held_out": 0.3, "eval_every": 2,
                                                            **changes})
    train(start(options, **SHAPE))
    return [(r.step, r.loss, r.grad_norm, r.held_out) for r in read_log(out)]


def test_the_curve_is_the_same(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def traced(work: Any) -> Any:
        compiled.append(work)
        return plain(work, backend="eager")  # what is traced, without the time to compile it

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    wanted = curve(text, tmp_path / "plain")
    assert curve(text, tmp_path / "again", activation_checkpointing=True) == wanted and not compiled
    assert curve(text, tmp_path / "compiled", compile=True) == wanted and len(compiled) == 2  # one layer for all, the loss
    assert curve(text, tmp_path / "both", compile=True, activation_checkpointing=True) == wanted and len(compiled) == 4
    assert curve(text, tmp_path / "global", batch_size=2, global_batch=4) == curve(text, tmp_path / "parts", batch_size=2, accumulate=2)


def test_activations_are_computed_anew_in_the_backward(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], SessaLayer.step

    @functools.wraps(plain)
    def counted(*args: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return plain(*args)

    monkeypatch.setattr(SessaLayer, "step", counted)
    options = TrainOptions(data=str(text), out=str(tmp_path / "run"), batch_size=2, context=16, device="cpu", held_out=0.3, activation_checkpointing=True)
    run = start(options, **SHAPE)
    run.optimize(1e-3)
    assert calls == [True] * 2 * SHAPE["n_layers"]
    calls.clear()
    run.evaluate()
    assert not any(calls)
    model = run.model
    rows = torch.zeros(1, 4, SHAPE["d_model"])
    assert model.layers[0].step(rows, None, None, None)[1] == ()  # no rows of a cache are kept


@pytest.mark.parametrize("changes", [{"global_batch": 0}, {"global_batch": 1.5}, {"shard": "yes"}, {"compile": 1}, {"activation_checkpointing": None}], ids=str)
def test_options_are_checked(text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        TrainOptions(data=str(text), out=str(tmp_path / "run"), **changes)

"""Ways to compute the same run: compiled, and with activations computed anew. The curve is that of the plain one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sessa_deploy.errors import UserError
from sessa_deploy.model import SessaLayer
from sessa_deploy.train import Run, TrainOptions, resume, start, train
from sessa_deploy.train_graph import PLAIN_STEPS, Graphed
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


@pytest.mark.parametrize("changes", [{"global_batch": 0}, {"global_batch": 1.5}, {"shard": "yes"}, {"compile": 1}, {"activation_checkpointing": None},
                                     {"cuda_graph": 2}], ids=str)  # fmt: skip
def test_options_are_checked(text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        TrainOptions(data=str(text), out=str(tmp_path / "run"), **changes)


def near(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]], most: float) -> bool:
    """Whether two curves are the same up to a relative distance."""
    return [[x or 0.0 for x in row] for row in one] == [pytest.approx([x or 0.0 for x in row], rel=most) for row in other]


class Replayed(Graphed):
    """A graph whose replay runs the step on what it holds, as a captured one does: with the tensors of the capture, whatever was given since."""

    def _run_plainly(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._step(inputs)

    def _capture(self, inputs: Sequence[torch.Tensor]) -> None:
        self._held = [torch.zeros_like(x) for x in inputs]
        self._graph, self.replays = self, 0  # type: ignore[assignment]
        self._given = (torch.zeros(()), torch.zeros(()))

    def replay(self) -> None:
        self.replays += 1
        for held, new in zip(self._given, self._step(self._held), strict=True):
            held.copy_(new)


def test_a_replayed_step_is_the_step(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph reads and writes stays where it is: windows, learning rate, losses; a run goes on from it without one, and the other way round."""
    settings: dict[str, Any] = {"steps": 6, "accumulate": 2, "batch_size": 2, "save_every": 4}
    wanted = curve(text, tmp_path / "plain", **settings)
    made: list[Replayed] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device_index=0, cuda_stream=-1))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_graphed", lambda run: made.append(Replayed(run._step, run.device)) or made[-1])
        got = curve(text, tmp_path / "graph", cuda_graph=True, **settings)
        begun = start(TrainOptions(data=str(text), out=str(tmp_path / "both"), cuda_graph=True, **settings,
                                   context=16, device="cpu", held_out=0.3, eval_every=2), **SHAPE)
        train(begun, 4)
    assert made[0].replays == 6 - PLAIN_STEPS and made[1].replays == 4 - PLAIN_STEPS
    train(resume(tmp_path / "both", cuda_graph=False))
    both = [(r.step, r.loss, r.grad_norm, r.held_out) for r in read_log(tmp_path / "both")]
    assert near(got, wanted, 1e-4) and near(both, wanted, 1e-4)  # the rate is a float32 there


def test_a_graph_needs_a_gpu_and_one_process(text: Path, tmp_path: Path) -> None:
    options = {"data": str(text), "out": str(tmp_path / "run"), "cuda_graph": True}
    with pytest.raises(UserError, match="needs a GPU"):
        start(TrainOptions(**options, device="cpu"), **SHAPE)
    with pytest.raises(UserError, match="compiled"):
        TrainOptions(**options, compile=True)
    assert not (tmp_path / "run" / "resume.pt").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_draws_the_plain_curve(text: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 12, "accumulate": 2, "device": "cuda", "eval_every": 5}
    wanted, got = (curve(text, tmp_path / str(graph), cuda_graph=graph, **settings) for graph in (False, True))
    assert near(got, wanted, 2e-2)

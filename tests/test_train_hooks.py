"""The curve in other tools: off unless asked for, named before the work where a library lacks, closed at the end."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from command import call

from sessa_deploy.train_log import read_log

SMALL = ["--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--context", "16", "--batch-size", "2", "--device", "cpu", "--held-out", "0.3", "--steps", "4"]


def module(monkeypatch: pytest.MonkeyPatch, name: str, **things: Any) -> None:
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(things)
    monkeypatch.setitem(sys.modules, name, made)


def test_the_curve_goes_to_both_tools_step_by_step(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"wandb": [], "tensorboard": [], "closed": []}

    class Session:
        def log(self, values: dict[str, float], step: int) -> None:
            seen["wandb"].append((step, values))

        def finish(self) -> None:
            seen["closed"].append("wandb")

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "run" / "tensorboard") and purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen["tensorboard"].append((step, name, value))

        def close(self) -> None:
            seen["closed"].append("tensorboard")

    def init(**settings: Any) -> Session:
        assert settings["name"] == "run" and settings["config"]["model"]["d_model"] == 16 and settings["config"]["processes"] == 1
        return Session()

    module(monkeypatch, "wandb", init=init)
    module(monkeypatch, "tensorboard")
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    command = ("train", "--data", text, *SMALL, "--eval-every", 2)
    assert call(*command, "--out", tmp_path / "run", "--log-to", "wandb", "--log-to", "tensorboard") == 0
    rows = read_log(tmp_path / "run")
    sent = [(step, values["train/loss"], values.get("held_out/bits_per_byte")) for step, values in seen["wandb"]]
    assert sent == [(r.step, r.loss, r.held_out) for r in rows]
    assert {(r.step, "train/lr", r.lr) for r in rows} <= set(seen["tensorboard"]) and sorted(seen["closed"]) == ["tensorboard", "wandb"]
    assert call(*command, "--out", tmp_path / "quiet") == 0 and len(seen["wandb"]) == 4  # off by default


@pytest.mark.parametrize("tool", ["wandb", "tensorboard"])
def test_a_library_that_lacks_is_named_before_the_work(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tool: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == tool else importlib.machinery.ModuleSpec(name, None))
    assert call("train", "--data", text, "--out", tmp_path / "run", *SMALL, "--log-to", tool) == 2
    error = capsys.readouterr().err
    assert f"needs the package {tool}" in error and f"pip install {tool}" in error and error.count("\n") == 1 and not (tmp_path / "run").exists()

"""The state that several processes save, read by one: exact, and where it is damaged one line, nothing executed, nothing changed."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call

from sessa_deploy.distributed import states
from sessa_deploy.distributed.group import ALONE
from sessa_deploy.errors import UserError
from sessa_deploy.train import Run, TrainOptions, resume, start, train
from sessa_deploy.train_log import read_log

SHAPE: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "tie_word_embeddings": True}


def options(text: Path, out: Path) -> TrainOptions:
    return TrainOptions(data=str(text), out=str(out), steps=6, batch_size=2, context=16, device="cpu", held_out=0.3)


def shared(run: Run) -> None:
    """The run as several processes would have saved it."""
    file = run.folder / "resume.pt"
    state = torch.load(file, weights_only=True)
    plain = {name: value for name, value in state.items() if name not in ("model", "optimizer", "torch_rng")}
    states.save(run.folder / "resume", ALONE, states.tensors(run.model, run.optimizer), plain)
    file.unlink()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_was_saved_goes_on_bit_for_bit(text: Path, tmp_path: Path) -> None:
    for name in "ab":
        run = start(options(text, tmp_path / name), **SHAPE)
        train(run, stop_at=3)
        if name == "b":
            shared(run)
        train(resume(tmp_path / name))
    ours, theirs = ([(r.step, r.loss, r.grad_norm) for r in read_log(tmp_path / name)] for name in "ba")
    assert ours == theirs and len(ours) == 6 and not (tmp_path / "b" / "resume").exists()


def test_the_later_of_two_states_counts(text: Path, tmp_path: Path) -> None:
    run = start(options(text, tmp_path / "run"), **SHAPE)
    train(run, stop_at=3)
    file, whole = tmp_path / "run" / "resume.pt", (tmp_path / "run" / "resume.pt").read_bytes()
    shared(run)
    file.write_bytes(whole)
    for age, broken in ((-100, file), (100, tmp_path / "run" / "resume" / "state.json")):  # the one that is not looked at may be anything
        kept = broken.read_bytes()
        broken.write_bytes(b"junk")
        os.utime(file, (2e9 + age, 2e9 + age))
        os.utime(tmp_path / "run" / "resume" / "state.json", (2e9, 2e9))
        assert resume(tmp_path / "run").step == 3
        broken.write_bytes(kept)


class Command:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "state.json").read_text())
        change(values)
        (folder / "state.json").write_text(json.dumps(values))

    return edit


def written(name: str, content: bytes | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = next(p for p in folder.rglob("*") if p.name.endswith(name))
        file.write_bytes(file.read_bytes()[:100] if content is None else content)

    return write


BROKEN: dict[str, Callable[[Path], None]] = {
    "no JSON": written("state.json", b"{"), "a list": written("state.json", b"[1]"), "empty": written("state.json", b""),
    "another folder": edited(lambda s: s.update(folder="step-00000099")), "a folder above": edited(lambda s: s.update(folder="../../x")),
    "no folder": edited(lambda s: s.pop("folder")), "no options": edited(lambda s: s.pop("options")), "options 7": edited(lambda s: s.update(options=7)),
    "later options": edited(lambda s: s["options"].update(new=1)), "step": edited(lambda s: s.update(step="x")),
    "processes": edited(lambda s: s.update(processes=0)), "another width": edited(lambda s: s["config"].update(d_model=32)),
    "more layers": edited(lambda s: s["config"].update(n_layers=2)), "tokenizer": edited(lambda s: s.update(tokenizer="{}")),
    "config": edited(lambda s: s.update(config=[])), "seconds": edited(lambda s: s.update(seconds=None)),
    "index cut": written(".metadata", None), "index empty": written(".metadata", b""), "index junk": written(".metadata", b"junk" * 9),
    "index of commands": written(".metadata", pickle.dumps(Command())), "index of a list": written(".metadata", pickle.dumps([1])),
    "tensors cut": written(".distcp", None), "tensors empty": written(".distcp", b""), "tensors of commands": written(".distcp", pickle.dumps(Command()) * 99),
}


def test_a_damaged_state_is_one_line_and_left_alone(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = start(options(text, tmp_path / "run"), **SHAPE)
    train(run, stop_at=2)
    shared(run)
    folder = tmp_path / "run" / "resume"
    whole = everything(folder)
    for name, damage in BROKEN.items():
        damage(folder)
        before = everything(tmp_path / "run")
        assert call("train", "--resume", "--out", tmp_path / "run") == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and len(error) < 700, (name, error)
        assert everything(tmp_path / "run") == before and not (tmp_path / "owned").exists(), name
        for file, content in whole.items():
            (folder / file).write_bytes(content)
    assert train(resume(tmp_path / "run"))["steps"] == 6
    with pytest.raises(UserError, match="already holds a run"):
        shared(run) if (tmp_path / "run" / "resume.pt").exists() else None
        start(options(text, tmp_path / "run"), **SHAPE)

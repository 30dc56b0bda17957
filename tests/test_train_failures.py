"""What may go wrong before, in and after a run: one line, nothing half written, and a run that goes on from its last save."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call

from sessa_deploy import data
from sessa_deploy.errors import UserError
from sessa_deploy.train import Interrupted, Run, TrainOptions, learning_rate, resume, start, train
from sessa_deploy.train_log import read_log

SHAPE: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2}
SMALL = ["--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--context", "16", "--batch-size", "2", "--device", "cpu", "--held-out", "0.3"]


def options(text: Path, out: Path, **changes: Any) -> TrainOptions:
    base: dict[str, Any] = {"data": str(text), "out": str(out), "steps": 8, "batch_size": 2, "context": 16, "device": "cpu", "held_out": 0.3, "save_every": 4}
    return TrainOptions(**(base | changes))


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- options

@pytest.mark.parametrize("changes", [
    {"warmup": -1}, {"warmup": 0.5}, {"weight_decay": -1}, {"weight_decay": float("inf")}, {"seed": 2**64}, {"seed": True}, {"steps": 1.0}, {"steps": "8"},
    {"lr": float("nan")}, {"lr": float("inf")}, {"grad_clip": 0}, {"grad_clip": -1}, {"max_seconds": 0}, {"accumulate": 0}, {"eval_every": 0},
    {"save_every": 0}, {"held_out": 0.0}, {"held_out": 1.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"context": 2**31}, {"data": ""}, {"out": ""},
    {"extensions": "py"}, {"extensions": ("",)},
], ids=str)
def test_options_of_the_library_have_the_ranges_of_the_command_line(text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        TrainOptions(**{"data": str(text), "out": str(tmp_path / "run"), **changes})


@pytest.mark.parametrize("device", ["mps", "meta", "cpu:0", "cuda:-1", "cuda:", "", "cuda:999", "hip"])
def test_devices_that_are_none(text: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(UserError, match=r"no such device|no CUDA GPU"):
        _ = options(text, tmp_path / "run", device=device).torch_device


def test_a_gpu_is_named_by_its_number(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [options(text, tmp_path, device=d).torch_device for d in ("auto", "cuda:1")] == [torch.device("cuda"), torch.device("cuda", 1)]
    with pytest.raises(UserError, match=r"no such device.*cuda:2.*cuda:0, cuda:1"):
        _ = options(text, tmp_path, device="cuda:2").torch_device


def test_numbers_of_numpy_and_paths_are_taken(text: Path, tmp_path: Path) -> None:
    opts = TrainOptions(data=text, out=tmp_path / "run", steps=np.int64(3), lr=np.float32(0.5), seed=np.uint64(2**64 - 1))  # type: ignore[arg-type]
    assert (opts.data, opts.steps, opts.lr, opts.seed) == (str(text), 3, 0.5, 2**64 - 1) and type(opts.steps) is int and type(opts.lr) is float


def test_no_warm_up_begins_at_the_peak(text: Path, tmp_path: Path) -> None:
    opts = options(text, tmp_path / "run", warmup=0, lr=1.0, steps=100)
    assert opts.warmup_steps == 0 and learning_rate(opts, 0, 0.0) == 1.0 and learning_rate(opts, 50, 0.5) == pytest.approx(0.5)
    train(start(options(text, tmp_path / "run", warmup=0, lr=1e-3, seed=2**64 - 1), **SHAPE), stop_at=2)
    assert read_log(tmp_path / "run")[0].lr == 1e-3


def test_shapes_are_mended_on_the_command_line_not_in_a_file(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in (
        (["--n-heads", "3"], ("--d-model or --n-heads", "n_heads=3")), (["--d-model", "6", "--n-heads", "2"], ("--d-model or --n-heads", "odd")),
        (["--n-heads", "4", "--n-kv-heads", "3"], ("--n-heads or --n-kv-heads",)), (["--n-kv-heads", "8"], ("--n-kv-heads", "8", "1..2")),
        (["--gamma-max", "1"], ("--gamma-max", "1.0")),
    ):
        assert call("train", "--data", text, "--out", tmp_path / "run", *SMALL, *args) == 2
        error = the_error(capsys)
        assert all(word in error for word in words) and "config.json" not in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("args", [["--d-model", "1000000"], ["--n-layers", "2147483647"], ["--batch-size", "2147483647"]])
def test_what_cannot_fit_into_memory_is_refused_before_it_is_tried(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert call("train", "--data", text, "--out", tmp_path / "run", *SMALL, *args) == 2
    assert "GB at least" in the_error(capsys) and not (tmp_path / "run").exists()


# -- text

def test_text_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(b"\0\1\2" * 100)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"x")
    (tmp_path / "none").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "b.bin").write_bytes(b"\0")
    os.mkfifo(tmp_path / "mixed" / "fifo")
    for name, words in (("fifo", "neither a folder nor a file"), ("binary", "1 binary"), ("empty", "no text"), ("none", "no text"), ("mixed", "1 binary"),
                        ("one", "too little text"), ("absent", "no such data"), ("empty/below", "cannot be read")):
        assert call("train", "--data", tmp_path / name, "--out", tmp_path / "run", *SMALL) == 2
        error = the_error(capsys)
        assert words in error and str(name) in error, error
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "a.txt").write_text("text\n" * 100)
    plain = Path.read_bytes

    def denied(path: Path) -> bytes:  # permission bits do not stop the superuser
        if path.name == "a.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", denied)
        assert call("train", "--data", tmp_path / "locked", "--out", tmp_path / "run", *SMALL) == 2
    assert f"{tmp_path / 'locked' / 'a.txt'} (Permission denied)" in the_error(capsys)

    def walk(top: Any, onerror: Callable[[OSError], Any]) -> Any:
        yield str(top), ["closed"], ["a.txt"]
        onerror(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "closed"))

    monkeypatch.setattr(data.os, "walk", walk)
    with pytest.raises(UserError, match="the data cannot be read: got closed"):  # not a smaller corpus, silently
        data.read_files(tmp_path / "locked")


def test_a_link_to_a_text_is_a_text_and_a_run_inside_its_text_is_not(text: Path, tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(text / "0.txt")
    assert data.read_files(tmp_path / "link.txt")[0][0][0] == "link.txt"
    train(start(options(text, text / "run"), **SHAPE), stop_at=2)
    assert train(resume(text / "run"))["train_files"] + len(start(options(text, tmp_path / "b"), **SHAPE).corpus.held_out_files) == 6


def test_a_single_file_is_cut_between_characters() -> None:
    for fraction in (0.01, 0.3, 0.5, 0.99, 1e-20):
        (head,), (tail,) = data.split_files([("a", "\u20ac".encode() * 7)], fraction)
        assert head[1].decode() + tail[1].decode() == "\u20ac" * 7 and head[1] and tail[1], fraction


# -- places

def test_places_that_cannot_be_written_are_found_before_the_text_is_read(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sessa_deploy.train_begin.load_corpus", lambda *_: pytest.fail("the text was read"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("mine")
    for out, words in ((tmp_path / "file", "not a folder"), (tmp_path / "file" / "run", "not a folder"), ("/proc/run", "cannot be written"),
                       ("/dev/full", "not a folder"), (tmp_path / "mine", "mine/report.json")):
        before = everything(tmp_path)
        assert call("train", "--data", text, "--out", out, *SMALL) == 2
        error = the_error(capsys)
        assert words in error and str(out) in error and "--out" in error and everything(tmp_path) == before


# -- saves

def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, armed: Callable[[], bool]) -> None:
    """The disk is full when the file `name` is to be written."""
    plain = os.fsync

    def fsync(handle: int) -> None:
        if armed() and name in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)


UNBROKEN: list[float] = []  # the losses of the run that nothing befell


@pytest.mark.parametrize("name", ["log.csv", "resume.pt", "model.safetensors", "report.json", "loss.png"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_its_last_save(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out, command = tmp_path / "run", ("train", "--data", text, *SMALL, "--steps", 8, "--save-every", 4)
    with monkeypatch.context() as patch:
        fail_at(patch, name, lambda: (out / "checkpoint").exists())
        assert call(*command, "--out", out) == 2
    error = the_error(capsys)
    assert "No space left on device" in error and "free space there" in error
    if name in ("log.csv", "resume.pt", "model.safetensors"):
        assert f"from step {8 if name == 'model.safetensors' else 4} with: sessa-deploy train --resume --out {out}" in error
    assert not [p.name for p in out.rglob("*") if p.name.startswith(".")]
    assert call("inspect", out / "checkpoint") == call("train", "--resume", "--out", out) == 0
    if not UNBROKEN:
        assert call(*command, "--out", tmp_path / "whole") == 0
        UNBROKEN.extend(r.loss for r in read_log(tmp_path / "whole"))
    assert [r.loss for r in read_log(out)] == UNBROKEN and len(UNBROKEN) == 8


def test_a_full_disk_at_the_first_save(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "resume.pt", lambda: True)
    assert call("train", "--data", text, *SMALL, "--steps", 2, "--out", tmp_path / "run") == 2
    assert "--resume" not in the_error(capsys) and [p.name for p in (tmp_path / "run").iterdir()] == ["log.csv"]


def test_a_checkpoint_that_does_not_fit_leaves_the_older_one(tmp_path: Path) -> None:
    """The limit on a file's size strikes where a full disk does, in the library that writes safetensors."""
    code = (
        "import resource, sys\nfrom sessa_deploy.checkpoint import save_checkpoint\nfrom sessa_deploy.config import SessaConfig\n"
        "from sessa_deploy.errors import UserError\nfrom sessa_deploy.model import SessaLM\n"
        "model = SessaLM(SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=64))\nsave_checkpoint(model, sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    save_checkpoint(model, sys.argv[1])\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("the checkpoint cannot be written: got "), done
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and (tmp_path / "c" / "model.safetensors").stat().st_size > 4096


# -- resume

class Command:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda s: [1, 2], "no model": lambda s: {k: v for k, v in s.items() if k != "model"}, "options of later": lambda s: s["options"].update(new=1),
    "steps of text": lambda s: s["options"].update(steps="many"), "options of a list": lambda s: s.update(options=[1]),
    "seed": lambda s: s["options"].update(seed=-1), "another shape": lambda s: s["config"].update(d_model=32), "no width": lambda s: s["config"].pop("d_model"),
    "tokenizer": lambda s: s.update(tokenizer="{}"), "tokenizer 7": lambda s: s.update(tokenizer=7),
    "rng": lambda s: s.update(torch_rng=torch.zeros(3, dtype=torch.uint8)), "rng 7": lambda s: s.update(torch_rng=7),
    "step": lambda s: s.update(step="x"), "optimizer": lambda s: s.update(optimizer={}), "optimizer 7": lambda s: s.update(optimizer=7),
    "no weight": lambda s: s["model"].pop("norm.weight"), "model 7": lambda s: s.update(model=7), "extensions": lambda s: s["options"].update(extensions=7),
    "no data": lambda s: s["options"].pop("data"), "config 7": lambda s: s.update(config=7),
}


def test_a_broken_resume_file_is_one_line_and_left_alone(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    train(start(options(text, out), **SHAPE), stop_at=2)
    path, whole = out / "resume.pt", (out / "resume.pt").read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "cut": whole[:-1], "empty": b"", "junk": b"junk" * 99, "pickle": pickle.dumps(Command())}
    warnings.simplefilter("error")  # a warning would be a second line
    for name, change in BROKEN.items():
        state = torch.load(path, weights_only=True)
        changed = change(state)
        torch.save(changed if name in ("a list", "no model") else state, tmp_path / "x.pt")
        contents[name] = (tmp_path / "x.pt").read_bytes()
    for name, content in contents.items():
        path.write_bytes(content)
        before = everything(out)
        assert call("train", "--resume", "--out", out) == 2, name
        seen = capsys.readouterr().err
        assert seen.count("\n") == 1 and seen.startswith("error: ") and len(seen) < 600, (name, seen)
        assert everything(out) == before and not (tmp_path / "owned").exists(), name
    path.write_bytes(whole)
    (out / "log.csv").write_text("step,loss\n1,x\n")
    with pytest.raises(UserError, match=r"log\.csv cannot be read.*remove it"):
        resume(out)
    (out / "log.csv").unlink()
    assert train(resume(out))["steps"] == 8


def test_resuming_where_there_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert call("train", "--resume", "--out", out) == 2
        assert "no run to resume" in the_error(capsys)


def test_a_stop_that_lies_behind_trains_nothing_and_says_so(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(start(options(text, tmp_path / "run"), **SHAPE), stop_at=5)
    assert call("train", "--resume", "--out", tmp_path / "run", "--stop-at", 3, "--store", "fp16") == 0
    assert "--stop-at 3 lies behind: the run is at step 5" in capsys.readouterr().err and len(read_log(tmp_path / "run")) == 5
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(UserError, match="stop_at is out of range"):
            train(resume(tmp_path / "run"), stop_at=wrong)  # type: ignore[arg-type]


# -- signals

@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_once_and_says_how_to_go_on(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    optimize, save, saves = Run.optimize, Run.save, []

    def struck(run: Run, lr: float) -> Any:
        if run.step == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # an impatient hand, or a wrapper that passes on what the terminal sent already
        return optimize(run, lr)

    def counted(run: Run) -> None:
        saves.append(run.step)
        save(run)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "optimize", struck)
        patch.setattr(Run, "save", counted)
        assert call("train", "--data", text, *SMALL, "--steps", 8, "--save-every", 4, "--out", tmp_path / "run") == code
    seen = capsys.readouterr().err
    assert saves == [4] and "Traceback" not in seen
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert seen.splitlines()[-1] == f"{word}; saved at step 4, continue with: sessa-deploy train --resume --out {tmp_path / 'run'}"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert call("train", "--resume", "--out", tmp_path / "run") == 0 and len(read_log(tmp_path / "run")) == 8
    assert issubclass(Interrupted, KeyboardInterrupt)

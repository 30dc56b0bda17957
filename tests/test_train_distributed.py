"""Training on two processes: the curve of one, whoever saved and whoever resumes; and how all of them stop, fail and refuse together."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sessa_deploy.checkpoint import load_checkpoint
from sessa_deploy.errors import UserError
from sessa_deploy.train import TrainOptions, resume, start, train
from sessa_deploy.train_log import read_log

WORKER = Path(__file__).parent / "distributed" / "worker.py"
SHAPE: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 2}
SMALL = ["--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--context", "16", "--batch-size", "2", "--device", "cpu", "--held-out", "0.3"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*words: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]


def exit_codes(text: str) -> list[int]:
    """Those of the processes, as torchrun tells them."""
    return [int(x) for x in re.findall(r"exitcode +: (-?\d+)", text)]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def options(text: Path, out: Path, **changes: Any) -> TrainOptions:
    base: dict[str, Any] = {"steps": 8, "batch_size": 8, "context": 16, "device": "cpu", "held_out": 0.3, "eval_every": 4, "save_every": 4}
    return TrainOptions(data=str(text), out=str(out), **(base | changes))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """(text, folder of runs, what process 0 saw) after two processes went through worker.py; one process did "one", "alone" and "alone sharded" before."""
    here = tmp_path_factory.mktemp("distributed")
    for name, count in (("text", 6), ("other text", 5)):
        (here / name).mkdir()
        for i in range(count):
            (here / name / f"{i}.txt").write_text("".join(f"line {i} of {w} and {w * i}\n" for w in range(60)))
    text = here / "text"
    train(start(options(text, here / "one"), **SHAPE))
    for name in ("alone", "alone sharded"):
        train(start(options(text, here / name), **SHAPE), stop_at=4)
    done = subprocess.run(torchrun(WORKER, text, here), capture_output=True, text=True, env=ENVIRONMENT, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return text, here, json.loads((here / "seen.json").read_text())


def curve(out: Path) -> dict[str, list[Any]]:
    rows = [dataclasses.asdict(row) for row in read_log(out)]
    return {name: [row[name] for row in rows] for name in ("step", "loss", "grad_norm", "lr", "tokens", "held_out")}


def assert_same_curve(out: Path, wanted: Path, exact: bool = False) -> None:
    ours, theirs = curve(out), curve(wanted)
    assert len(ours["step"]) == 8
    if exact:
        assert ours == theirs
    for name in ("step", "lr", "tokens"):
        assert ours[name] == theirs[name], name
    for name in ("loss", "grad_norm", "held_out"):
        known = [i for i, x in enumerate(theirs[name]) if x is not None]
        assert [ours[name][i] for i in known] == pytest.approx([theirs[name][i] for i in known], rel=2e-6), name
        assert len(known) in (2, 8)


@pytest.mark.parametrize("name", ["replicated", "sharded", "alone", "alone sharded"])
def test_two_processes_draw_the_curve_of_one(both: tuple[Path, Path, dict[str, Any]], name: str) -> None:
    _, here, _ = both
    assert_same_curve(here / name, here / "one")
    ours, theirs = (load_checkpoint(here / x / "checkpoint") for x in (name, "one"))
    assert ours.config == theirs.config
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["half", "half sharded"])
def test_one_process_goes_on_where_two_were(both: tuple[Path, Path, dict[str, Any]], name: str) -> None:
    _, here, _ = both
    assert (here / name / "resume" / "state.json").is_file() and not (here / name / "resume.pt").exists()
    run = resume(here / name)
    assert (run.step, run.share.windows, run.share.accumulate) == (4, 8, 4)
    train(run)
    assert_same_curve(here / name, here / "one")
    assert (here / name / "resume.pt").is_file() and not (here / name / "resume").exists()


def test_process_zero_alone_hears_rows_and_writes(both: tuple[Path, Path, dict[str, Any]]) -> None:
    _, here, seen = both
    assert seen["rows heard"] == [list(range(1, 9)), []] and seen["reports"] == [2, None]
    report = json.loads((here / "sharded" / "report.json").read_text())
    one = json.loads((here / "one" / "report.json").read_text())
    assert report["processes"] == 2 and report["global_batch"] == one["global_batch"] == 8 and one["processes"] == 1
    assert report["held_out_bits_per_byte"] == pytest.approx(one["held_out_bits_per_byte"], rel=1e-6) and report["parameters"] == one["parameters"]
    for name in ("replicated", "sharded", "one"):
        best = json.loads((here / name / "report.json").read_text())["best"]
        assert best["step"] in (4, 8) and (here / name / "checkpoint-best" / "model.safetensors").is_file()


def test_a_sharded_run_holds_a_share_of_the_parameters(both: tuple[Path, Path, dict[str, Any]]) -> None:
    _, here, seen = both
    whole = json.loads((here / "one" / "report.json").read_text())["parameters"]
    assert sum(seen["parameters held"]) < 1.01 * whole and max(seen["parameters held"]) < 0.55 * whole


def test_a_step_sends_its_gradients_once_however_many_micro_batches(both: tuple[Path, Path, dict[str, Any]]) -> None:
    accumulate, sent = both[2]["sent"]
    assert accumulate == 3 and len(set(sent)) == 1 and sent[0] == 1  # one bucket holds so small a model


def test_the_global_batch_stays_when_other_processes_go_on(both: tuple[Path, Path, dict[str, Any]]) -> None:
    text, here, seen = both
    assert seen["alone"] == seen["alone sharded"] == [8, 4, 4]  # 8 windows: now 4 a process
    saved = options(text, here / "x")
    assert saved.reshared(1, 1) == saved and saved.reshared(4, 1, 1).share(4).accumulate == 2
    odd = options(text, here / "x", batch_size=6, accumulate=3).reshared(2, 1)
    assert (odd.batch_size, odd.accumulate, odd.share(2).windows) == (3, 3, 18)
    for processes, batch_size, words in ((3, None, "8 windows a step and 3 processes"), (2, 3, "--batch-size 3")):
        with pytest.raises(UserError, match=words):
            saved.reshared(processes, 1, batch_size)
    with pytest.raises(UserError, match="--accumulate 2; fix"):
        options(text, here / "x", global_batch=16, accumulate=3).share(1)


def test_what_one_process_refuses_all_refuse(both: tuple[Path, Path, dict[str, Any]]) -> None:
    _, _, seen = both
    for kind, code, error in seen["do not divide"]:
        assert (kind, code) == ("UserError", 2) and "--global-batch 10, --batch-size 2 and 2 processes; allowed: a multiple of 4" in error
    assert all((kind, code) == ("UserError", 2) and "different texts" in error for kind, code, error in seen["other text"])
    assert seen["left behind"] is False


def test_a_full_disk_of_one_process_fails_all_and_the_last_save_stays(both: tuple[Path, Path, dict[str, Any]]) -> None:
    _, here, seen = both
    (kind, code, error), (other, other_code, _) = seen["full disk"]
    assert (kind, code, other, other_code) == ("UserError", 2, "OtherFailed", 2) and "No space left on device" in error
    assert f"from step 8 with: sessa-deploy train --resume --out {here / 'full'}" in error  # the state was saved, the checkpoint was not
    step, failed = seen["full disk of the other"]
    assert step == 8 and all(code == 2 and "No space left on device" in error for _, code, error in failed)
    assert seen["after it"] == [8, ["state.json", "step-00000008"]]


def test_a_signal_to_one_process_stops_all_after_the_same_step(both: tuple[Path, Path, dict[str, Any]]) -> None:
    assert both[2]["stopped"] == [[signal.SIGTERM, 3, [3]]] * 2


FAILING = """
import os, sys
from sessa_deploy.train_run import Run
plain = Run.optimize
def optimize(run, lr):
    if run.step == 3 and run.group.rank == 1:
        open(os.environ["RAISED"], "w").close()
        raise MemoryError("no room")
    return plain(run, lr)
Run.optimize = optimize
from sessa_deploy.cli import main
sys.argv.insert(1, "train")
main()
"""


def test_an_error_of_one_process_ends_all_with_its_line_and_code(text: Path, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    command = torchrun(tmp_path / "failing.py", "--data", text, "--out", tmp_path / "run", "--steps", 8, "--save-every", 2, *SMALL)
    environment = {**ENVIRONMENT, "RAISED": str(tmp_path / "raised")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)
    assert time.time() - (tmp_path / "raised").stat().st_mtime < 60
    assert errors(done.stderr) == ["error: process 1: out of memory: got no room; fix: a smaller model, or a smaller --batch-size (with --accumulate) or "
                                   "--context"], done.stderr
    assert exit_codes(done.stderr) == [2, 2]
    assert json.loads((tmp_path / "run" / "resume" / "state.json").read_text())["step"] == 2


def test_ctrl_c_of_torchrun_is_saved_once_and_said_once(text: Path, tmp_path: Path) -> None:
    """torchrun hands it on to its processes."""
    out = tmp_path / "run"
    command = torchrun("-m", "sessa_deploy", "train", "--data", text, "--out", out, "--steps", 10**6, "--save-every", 5, *SMALL)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        end = time.monotonic() + 150
        while not (out / "checkpoint" / "config.json").exists() and child.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        seen = child.communicate(timeout=120)[1]
    finally:
        child.kill()
        child.wait()
    step = json.loads((out / "resume" / "state.json").read_text())["step"]
    said = [line for line in seen.splitlines() if "saved at step" in line]
    assert said == [f"interrupted; saved at step {step}, continue with: sessa-deploy train --resume --out {out}"], seen
    assert len(read_log(out)) == step and len(list((out / "resume").iterdir())) == 2


def test_a_refusal_is_one_line_of_process_zero_and_the_code_of_all(text: Path, tmp_path: Path) -> None:
    """Without torchrun's words around it: two processes with the environment that it gives them."""
    words = ["-m", "sessa_deploy", "train", "--data", str(text), "--out", str(tmp_path / "run"), "--global-batch", "7", *SMALL]
    with socket.socket() as keeper:  # both bind with SO_REUSEADDR, which keeps others away until the store of process 0 listens
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        place = {**ENVIRONMENT, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(keeper.getsockname()[1])}
        children = [subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                     env={**place, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)]
        seen = [child.communicate(timeout=200) for child in children]
    assert [child.returncode for child in children] == [2, 2]
    assert seen[1] == ("", "") and seen[0][0] == "" and seen[0][1].count("\n") == 1 and "allowed: a multiple of 4" in seen[0][1], seen
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("words", [[], ["--shard"], ["--compile"], ["--shard", "--activation-checkpointing", "--compile"]], ids=" ".join)
def test_two_gpus_draw_the_curve_of_one(text: Path, tmp_path: Path, words: list[str]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    shape = ["--d-model", "64", "--n-layers", "2", "--n-heads", "2", "--context", "64", "--device", "cuda", "--precision", "fp32", "--held-out", "0.3",
             "--steps", "6", "--eval-every", "3"]
    for name, command in (("one", [sys.executable, "-m", "sessa_deploy"]), ("two", torchrun("-m", "sessa_deploy"))):
        size = "8" if name == "one" else "4"
        done = subprocess.run([*command, "train", "--data", str(text), "--out", str(tmp_path / name), *shape, "--batch-size", size,
                               *(words if name == "two" else [])], capture_output=True, text=True, env=ENVIRONMENT, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    ours, theirs = (read_log(tmp_path / name) for name in ("two", "one"))
    for field in ("loss", "grad_norm"):
        assert [getattr(r, field) for r in ours] == pytest.approx([getattr(r, field) for r in theirs], rel=1e-3)
    assert json.loads((tmp_path / "two" / "report.json").read_text())["processes"] == 2

"""What any verb owes its shell: quiet when the reader leaves, one line when the machine lacks something, nothing left when it is told to end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import psutil
import pytest

from sessa_deploy import cli, describe
from sessa_deploy.cli import VERBS, main
from sessa_deploy.cli.output import JsonCommand
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MODEL_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.export.parity import process as parity_process
from sessa_deploy.export.parity.process import ProcessLaunch, RungError, launch_all
from sessa_deploy.export.parity.rungs import RungJob
from sessa_deploy.process import python, run_group
from sessa_deploy.runtime import environment
from sessa_deploy.runtime.bundle import write_bundle

MAIN = [sys.executable, "-c", "from sessa_deploy.cli import main; main()"]
CONFIG = SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=61, max_context=32)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", {MODEL_FILE: b"not read"}, CONFIG, "fp32", {}).path


def one_line(err: str, *words: str) -> None:
    assert err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err


# --- the streams ---


@pytest.mark.parametrize("verb", [*VERBS, "plugin build"])
def test_standard_output_of_every_verb_may_be_full_closed_or_left(verb: str) -> None:
    words = [*verb.split(), "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MAIN, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    one_line(done.stderr, "standard output", "No space left on device")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*MAIN, *words], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_tables_and_json_into_a_full_closed_or_left_standard_output(bundle: Path) -> None:
    shell = f"{sys.executable} -c 'from sessa_deploy.cli import main; main()' inspect {bundle} --no-verify"
    for command, code, word in ((f"{shell} >/dev/full", 2, "No space left"), (f"{shell} --json - >/dev/full", 2, "No space left"),
                                (f"{shell} >&-", 2, "it is closed"), (f"{shell} 2>&- | head -1", 0, ""), (f"{shell} --json | head -c 1", 0, ""),
                                (f"{shell} 2>/dev/full", 0, "")):
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
        assert done.returncode == code and done.stderr.count("\n") == (1 if word else 0) and word in done.stderr, (command, done)


def test_names_that_the_terminal_cannot_show_stop_nothing(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "größe\udcff", {MODEL_FILE: b""}, CONFIG, "fp32", {}).path
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run([*MAIN, "inspect", folder, "--no-verify"], capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 0 and not done.stderr and b"udcff" in done.stdout


# --- errors of the machine, and ours ---


@pytest.mark.parametrize(("error", "words"), [
    (OSError(errno.ENOSPC, "No space left on device", "/a"), ("No space", "/a", "free space")),
    (OSError(errno.EROFS, "Read-only file system"), ("Read-only",)),
    (OSError(errno.EMFILE, "Too many open files", "/b"), ("Too many", "ulimit")), (PermissionError(errno.EACCES, "Permission denied", "/c"), ("/c",)),
    (MemoryError(), ("memory",)), (RecursionError("deep"), ("nested",)),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ("memory",)),
    (ModuleNotFoundError("No module named 'torch'", name="torch"), ("the package torch", "sessa-deploy[export]")),
    (ModuleNotFoundError("No module named 'onnxruntime.capi'", name="onnxruntime.capi"), ("the package onnxruntime", "sessa-deploy[ort]")),
    (ImportError("libcudart.so.12: cannot open", name="onnx"), ("cannot be imported", "libcudart"))])
def test_what_the_machine_lacks_is_one_line(
    error: Exception, words: tuple[str, ...], bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(describe, "describe", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(bundle)])
    assert stopped.value.code == 2
    one_line(capsys.readouterr().err, *words)


@pytest.mark.parametrize("error", [ValueError("a bug"), AttributeError("a bug"), RuntimeError("a bug"), ModuleNotFoundError("ours", name="sessa_deploy.x")])
def test_a_bug_keeps_its_traceback(error: Exception, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(describe, "describe", fail)
    with pytest.raises(type(error)):
        main(["inspect", str(bundle)])


# --- told to end ---


def wait_until_none(is_one: Callable[[psutil.Process], bool]) -> None:
    """A process that was told to end needs a moment for it; one that nobody told sleeps for a minute."""
    def lives(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # any process of the machine may end while it is looked at
            return process.status() != psutil.STATUS_ZOMBIE and is_one(process)
        return False

    end = time.monotonic() + 30
    while found := [p for p in psutil.process_iter() if lives(p)]:
        assert time.monotonic() < end, found
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_verb_that_is_told_to_end_leaves_no_temporary_files_and_no_children(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    program = ("import subprocess, sys, time\nfrom sessa_deploy import cli, describe\nfrom sessa_deploy.files import scratch, whole\n"
               "from sessa_deploy.process import run_group\n"
               "def work(*_, **__):\n"
               "    with scratch('sessa-test-') as folder, whole(folder.parent / 'out') as stream:\n"
               "        (folder / 'tensors').write_bytes(bytes(1000)); stream.write(bytes(1000)); stream.flush()\n"
               f"        run_group(['sh', '-c', 'echo $$ > {tmp_path}/pid; sleep 60 & wait'])\n"
               "describe.describe = work\ncli.main(['inspect', 'x'])")
    child = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert child.poll() is None
        time.sleep(0.02)
    assert len(list((tmp_path / "tmp").iterdir())) == 2
    child.send_signal(number)
    assert child.communicate()[1] == "terminated\n" and child.returncode == code
    assert not list((tmp_path / "tmp").iterdir())
    group = int((tmp_path / "pid").read_text())
    wait_until_none(lambda p: os.getpgid(p.pid) == group)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_a_child_begins_leaves_none(number: int, tmp_path: Path) -> None:
    """The moment between the child's beginning and its parent's knowing of it."""
    program = ("import os, subprocess, sys\nfrom pathlib import Path\nfrom sessa_deploy.export.parity.process import ProcessLaunch\n"
               "from sessa_deploy.export.parity.rungs import RungJob\nfrom sessa_deploy.process import ending_cleanly, run_group\n"
               "class Popen(subprocess.Popen):\n"
               "    def __init__(self, *words, **how):\n"
               "        super().__init__(*words, **how)\n"
               "        print(self.pid, flush=True)\n"
               f"        os.kill(os.getpid(), {int(number)})\n"
               "        sum(range(10**6))\n"
               "subprocess.Popen = Popen\n"
               "with ending_cleanly():\n"
               "    if sys.argv[1:]: ProcessLaunch(sys.argv[1])(RungJob('ort', Path('x'), Path('y')))\n"
               "    else: run_group(['sh', '-c', 'sleep 60 & wait'])\n")
    sleeper = fake(tmp_path, "exec sleep 60").engine_python
    for words in ([], [str(sleeper)]):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == (-number if number == signal.SIGINT else 128 + number), done
        wait_until_none(lambda p, child=int(done.stdout): child in (p.pid, os.getpgid(p.pid)))  # type: ignore[misc]


@pytest.mark.parametrize(("place", "words", "code"), [
    ({"WORLD_SIZE": "2", "RANK": "0"}, ["--version"], 0), ({"WORLD_SIZE": "2", "RANK": "0"}, ["inspect", "/no"], 2), ({}, ["inspect", "/no"], 2)])
def test_one_of_several_processes_leaves_without_pythons_own_end(place: dict[str, str], words: list[str], code: int) -> None:
    """A thread of gloo's, in a collective that another process broke off, may ask for the interpreter at any moment, and there must be one."""
    program = "import atexit\natexit.register(print, 'the end')\nfrom sessa_deploy.cli import main\nprint('begun')\nmain()"
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", program, *words], env={**environment, "LOCAL_RANK": "0", **place}, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout.startswith("begun\n") and ("the end" in done.stdout) is not bool(place), done
    assert (cli.__version__ in done.stdout) if code == 0 else done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_nohup_is_respected() -> None:
    program = ("import os, signal\nfrom sessa_deploy import cli, describe\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
               "describe.describe = lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP) or 1 / 0\ncli.main(['inspect', 'x'])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ZeroDivisionError" in done.stderr


# --- children ---


def test_no_child_takes_packages_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random.py", "json.py", "sessa_deploy/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert environment.probe("import random, json, sessa_deploy; print(json.dumps(sessa_deploy.__version__))") == (cli.__version__, None)
    command = python("import sessa_deploy.export.parity.rungs as r, random; print(sys.argv[1:])", "a b", "-c")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "['a b', '-c']\n"
    seen: list[str] = []
    done = subprocess.run([sys.executable, "-m", "sessa_deploy.cli"], capture_output=True, text=True, check=False)
    assert "the wrong one" in done.stderr, "the trap works"
    job = RungJob("ort", tmp_path, tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no readable parity cases|no bundle"):  # it began, and says what is wrong
        ProcessLaunch()(job, lambda *x: seen.append(x[0]))


def test_the_same_package_runs_in_child_and_parent_where_it_is_not_installed(tmp_path: Path) -> None:
    root = Path(cli.__file__).parents[2]
    for name in ("sessa_deploy", "export", "runtime", "plugins"):  # a clone
        (tmp_path / name).symlink_to(root / name)
    hidden = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; sys.path.insert(0, '')\n"
    program = hidden + ("import subprocess, sessa_deploy.export\nfrom sessa_deploy.process import python\n"
                        "print(subprocess.run(python('import sessa_deploy.runtime; print(sessa_deploy.__file__)'), capture_output=True, text=True).stdout)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(root / "sessa_deploy/__init__.py") or done.stdout.strip().startswith(str(tmp_path)), done


def fake(tmp_path: Path, script: str) -> ProcessLaunch:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return ProcessLaunch(path)


BEGUN = 'echo \'{"done": 0, "of": 0}\'; '


@pytest.mark.parametrize(("script", "kind", "words"), [
    ("echo 'No module named sessa_deploy.export' >&2; exit 1", UserError, "could not be started: got No module named sessa_deploy.export"),
    ("exit 1", UserError, "could not be started: got nothing but exit code 1"),
    ("echo banner; echo bad >&2; exit 2", UserError, "could not be started: got bad"),
    (BEGUN + "echo 'no space left' >&2; exit 2", UserError, "^no space left$"),
    (BEGUN + "kill -9 $$", UserError, "killed by SIGKILL"),
    (BEGUN + "kill -11 $$", RungError, r"died \(exit code -11\): nothing"),
    (BEGUN + "echo 'the engine refused the graph' >&2; exit 1", RungError, "the engine refused the graph")])
def test_what_the_end_of_a_rung_means(script: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
    launch, job = fake(tmp_path, script), RungJob("ort", tmp_path, tmp_path)
    with pytest.raises(kind, match=words) as caught:
        launch(job, lambda *_: None)
    assert type(caught.value) is kind
    if kind is RungError:
        assert launch_all([job], launch, 1, lambda *_: None).keys() == {"ort"}


def test_a_reference_that_dies_is_no_verdict(tmp_path: Path) -> None:
    def die(job: RungJob, progress: object) -> None:
        raise RungError("the rung torch died")

    with pytest.raises(UserError, match="the rung torch died"):
        launch_all([RungJob("torch", tmp_path, tmp_path)], die, 1, parity_process.silent)


def test_a_launch_that_was_stopped_starts_nothing_that_stays(tmp_path: Path) -> None:
    launch = fake(tmp_path, BEGUN + "exec sleep 60")
    launch.stop()
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"SIGKILL|started"):
        launch(RungJob("ort", tmp_path, tmp_path), lambda *_: None)
    assert time.monotonic() - begun < 30


def test_a_program_is_heard_whole() -> None:
    done = run_group(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


# --- --json ---


@pytest.mark.parametrize(("words", "found"), [
    ("P", (None, "P")), ("P --json", ("-", "P")), ("--json P", ("-", "P")), ("P --json -", ("-", "P")), ("--json - P", ("-", "P")),
    ("P --json f", ("f", "P")), ("--json f P", ("f", "P")), ("--json=f P", ("f", "P")), ("--json=- P", ("-", "P")), ("--json --flag P", ("-", "P")),
    ("P --json --n 3", ("-", "P")), ("--n 3 --json P", ("-", "P")), ("--json f --n 3 P", ("f", "P")), ("--json -- P", ("-", "P")),
    ("--flag --json f -- P", ("f", "P"))])
def test_json_takes_a_file_a_dash_or_nothing(words: str, found: tuple[str | None, str]) -> None:
    @click.command(cls=JsonCommand)
    @click.argument("path")
    @click.option("--json", "target")
    @click.option("--flag", is_flag=True)
    @click.option("--n", type=int)
    def verb(path: str, target: str | None, flag: bool, n: int | None) -> tuple[str | None, str]:
        return target, path

    assert verb.main(words.split(), standalone_mode=False) == found


def test_inspect_and_doctor_print_or_write_json(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sessa_deploy.runtime import doctor

    monkeypatch.setattr(doctor, "examine", lambda *_: {"checks": [], "ready": ["run"]})
    for words, key in ((["inspect", str(bundle), "--no-verify"], "kind"), (["doctor"], "ready")):
        for target in (["--json"], ["--json", "-"]):
            main([*words, *target])
            assert key in json.loads(capsys.readouterr().out)
        main([*words, "--json", str(tmp_path / "out.json")])
        assert key in json.loads((tmp_path / "out.json").read_text()) and capsys.readouterr().out
        with pytest.raises(SystemExit):
            main([*words, "--json", str(bundle / "out.json")])
        out, err = capsys.readouterr()
        one_line(err, "inside a bundle", "--json")
        assert not out and not (bundle / "out.json").exists()


def test_no_verb_puts_anything_into_a_bundle(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a" * 1000)
    (tmp_path / "link").symlink_to(bundle)
    monkeypatch.chdir(bundle)
    before = {x: x.stat().st_mtime_ns for x in sorted(bundle.rglob("*"))}
    for place in (str(bundle / "new"), "new", "./deeper/../new", str(tmp_path / "link/new")):
        for words in (["bench", str(bundle), "--json"], ["inspect", str(bundle), "--json"], ["doctor", "--json"], ["export", str(tmp_path), "--out"],
                      ["train", "--data", str(tmp_path / "text"), "--steps", "1", "--d-model", "16", "--n-heads", "2", "--out"], ["plugin", "build", "--out"],
                      ["validate", str(bundle), "--checkpoint", str(tmp_path), "--json"], ["validate", str(bundle), "--checkpoint", str(tmp_path), "--report"],
                      ["validate", str(bundle), "--dump"]):
            with pytest.raises(SystemExit) as stopped:
                main([*words, place])
            assert stopped.value.code == 2
            one_line(capsys.readouterr().err, "inside a bundle", words[-1])
    assert {x: x.stat().st_mtime_ns for x in sorted(bundle.rglob("*"))} == before

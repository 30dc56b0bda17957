"""What validate does with its outputs and options: checked before the work, never inside a bundle, and the verdict is said whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sessa_deploy.cli import main
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MAX_POSITION, PARITY_FILE
from sessa_deploy.errors import ParityError, UserError
from sessa_deploy.export import parity
from sessa_deploy.export.parity.cases import build_cases
from sessa_deploy.export.parity.process import launch_here
from sessa_deploy.export.parity.verdict import Failure, Report
from sessa_deploy.export.to_onnx import export_bundle
from sessa_deploy.model import SessaLM

CONFIG = SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=257, max_context=4)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Report]:
    """(bundle, state dict without a configuration, a report that says passed), of a model with next to no context."""
    folder = tmp_path_factory.mktemp("outputs")
    torch.manual_seed(0)
    model = SessaLM(CONFIG)
    torch.save(model.state_dict(), folder / "x.pt")
    (folder / "config").mkdir()
    CONFIG.save(folder / "config")
    export_bundle(folder / "x.pt", folder / "bundle", config=CONFIG)
    report = parity.validate(folder / "bundle", folder / "x.pt", config=folder / "config", launch=launch_here, workers=1, lengths=(2,), also=(2, 9))
    return folder / "bundle", folder / "x.pt", report


@pytest.fixture
def run(material: tuple[Path, Path, Report], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """validate BUNDLE --checkpoint CHECKPOINT ARGUMENTS -> (exit code, stdout, stderr), with the work done already."""
    bundle, checkpoint, report = material
    monkeypatch.setattr(parity, "validate", lambda *_, **__: report)
    monkeypatch.setattr(report, "failure", None)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = 0
        try:
            main(["validate", str(bundle), "--checkpoint", str(checkpoint), "--no-record", *map(str, arguments)])
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    for name in ("validate", "dump_engines"):
        monkeypatch.setattr(parity, name, work)


def test_a_length_beyond_max_context_is_judged(material: tuple[Path, Path, Report]) -> None:
    report = material[2]
    assert report.passed and report.cases["prefill-9"]["lengths"] == [9]
    assert {(c.rung, c.mode) for c in report.comparisons if c.case == "prefill-9"} == {("torch", "graph"), ("torch", "session"), ("ort", "graph"),
                                                                                        ("ort", "session")}
    names = [case.name for case in build_cases(CONFIG, also=(2, 30, 30)).cases]
    assert [n for n in names if n.startswith("prefill")] == ["prefill-1", "prefill-2", "prefill-30"]
    with pytest.raises(UserError, match=f"at most {MAX_POSITION}"):
        build_cases(CONFIG, also=(MAX_POSITION + 1,))


def test_json_on_standard_output_stands_alone(run: Run, material: tuple[Path, Path, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("--json", "-")
    assert code == 0 and json.loads(out)["passed"] and err.splitlines()[-1].startswith("parity: PASSED") and "share of the limit" in err
    code, out, err = run("--report", "-")
    assert code == 0 and out.startswith("<!doctype html>") and out.endswith("</html>\n") and err.splitlines()[-1].startswith("parity: PASSED")
    monkeypatch.setattr(material[2], "failure", Failure("layer 0 s", "too far", "look there"))
    code, out, err = run("--json", "-")
    assert code == 1 and not json.loads(out)["passed"] and err.splitlines()[-1].startswith("parity: FAILED at layer 0 s")

    def refuse(*_: object, **__: object) -> None:
        raise ParityError("configuration: another")

    monkeypatch.setattr(parity, "validate", refuse)
    code, out, err = run("--json", "-")
    assert code == 1 and json.loads(out) == {"passed": False, "line": "parity: FAILED at configuration: another"} and "FAILED" in err


def test_targets_that_cannot_be_written_are_found_before_the_work(
    run: Run, material: tuple[Path, Path, Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = material[0]
    no_work(monkeypatch)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(bundle)
    before = sorted(bundle.rglob("*"))
    for arguments, words in (
        (("--report", bundle / "r.html"), "inside a bundle"), (("--json", bundle / "p.json"), "inside a bundle"),
        (("--json", tmp_path / "link/p.json"), "inside a bundle"),
        (("--dump", bundle / "d"), "inside a bundle"), (("--dump", bundle), "inside a bundle"), (("--json", bundle / PARITY_FILE), "inside a bundle"),
        (("--json", tmp_path / "missing/p.json"), "mkdir -p"), (("--report", tmp_path), "it is a folder"),
        (("--json", tmp_path / "file/p.json"), "Not a directory"),
        (("--dump", tmp_path / "file"), "not a folder"), (("--json", tmp_path / "x", "--report", tmp_path / "x"), "same place"),
        (("--json", "-", "--report", "-"), "same place"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and words in err and err.count("\n") == 1 and not out, (arguments, err)
    assert sorted(bundle.rglob("*")) == before and sorted(x.name for x in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("failure", [None, Failure("layer 0 s", "too far", "look there")])
def test_the_verdict_is_said_though_a_file_fails_late(
    run: Run, material: tuple[Path, Path, Report], failure: Failure | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(material[2], "failure", failure)
    code, out, err = run("--json", "/dev/full", "--report", tmp_path / "r.html")
    assert code == (2 if failure is None else 1) and "No space left" in err and "--json" in err and err.count("\n") == 1
    assert out.splitlines()[-1].startswith("parity: PASSED" if failure is None else "parity: FAILED") and (tmp_path / "r.html").stat().st_size > 1000


def test_options_that_would_do_nothing_are_refused(
    material: tuple[Path, Path, Report], run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundle = str(material[0])
    no_work(monkeypatch)
    for option in (("--length", "9"), ("--seed", "1"), ("--backend", "ort"), ("--python", sys.executable)):
        code, _, err = run("--compare", tmp_path, *option)
        assert code == 2 and option[0] in err and err.count("\n") == 1
    for option in (("--json", "x"), ("--report", "x"), ("--config", "x")):
        with pytest.raises(SystemExit, match="2"):
            main(["validate", bundle, "--dump", str(tmp_path / "d"), *option])
        assert option[0] in capsys.readouterr().err


def test_a_folder_of_older_cases_takes_no_further_lengths(material: tuple[Path, Path, Report], tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text("{}")
    with pytest.raises(UserError, match="--length"):
        parity.dump_engines(material[0], tmp_path, also=(9,))


def test_a_failed_verdict_exits_1_though_its_reader_has_gone(material: tuple[Path, Path, Report]) -> None:
    program = ("import sys\nfrom sessa_deploy.cli import main\nfrom sessa_deploy.errors import ParityError\nfrom sessa_deploy.export import parity\n"
               "def validate(*a, **k): raise ParityError('configuration: another')\nparity.validate = validate\n"
               f"main(['validate', {str(material[0])!r}, '--checkpoint', 'x'])")
    for target in ("pipe", "/dev/full"):
        read, write = os.pipe()
        os.close(read)
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", program], stdout=write if target == "pipe" else full, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert done.returncode == 1 and done.stderr.count("\n") == (0 if target == "pipe" else 1)


def test_a_full_disk_under_the_temporary_files_is_told(material: tuple[Path, Path, Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the rung's process gets it too."""
    program = ("import resource, signal\nfrom sessa_deploy.cli import main\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
               f"main(['validate', {str(material[0])!r}, '--checkpoint', {str(material[1])!r}, '--config', {str(material[1].parent / 'config')!r}])")
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr and str(tmp_path) in done.stderr, done
    assert "parity:" not in done.stdout and not list(tmp_path.glob("sessa*"))


def test_no_place_for_temporary_files_is_told(material: tuple[Path, Path, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(UserError, match=r"no place for temporary files.*TMPDIR"):
        parity.validate(material[0], material[1], config=material[1].parent / "config", launch=launch_here)


def test_sigterm_ends_the_rungs_and_leaves_no_tensors(material: tuple[Path, Path, Report], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sessa_deploy", "validate", material[0], "--checkpoint", material[1], "--config", material[1].parent / "config"]
    child = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
    while not list(tmp_path.glob("sessa-parity-*/float64")) and child.poll() is None:  # a rung is at work
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=200)
    assert (child.returncode, out, err) == (143, "", "terminated\n") and not list(tmp_path.glob("sessa*"))

"""`sessa-deploy build`: one honest line where something is missing, and what it prints when the engine is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from sessa_deploy import contract
from sessa_deploy.cli import main
from sessa_deploy.config import SessaConfig
from sessa_deploy.plugins import library
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.trt import plan as trt_plan

pytest.importorskip("onnx")
CONFIG = SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=61, max_context=32)


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    return str(write_bundle(tmp_path / "bundle", {contract.MODEL_FILE: b"not read"}, CONFIG, "fp32", {}).path)


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["build", *args])
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1
    return text


def test_missing_things_are_one_line_with_the_command(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "no bundle" in error_of(capsys, str(tmp_path / "nowhere"))
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'sessa-deploy[tensorrt]'" in error_of(capsys, bundle)
    from fake_tensorrt import HostCuda, make

    monkeypatch.setitem(sys.modules, "tensorrt", make("8.6.0", HostCuda()))
    monkeypatch.setenv(library.ENVIRONMENT, str(tmp_path / "none.so"))
    assert "sessa-deploy plugin build" in error_of(capsys, bundle)
    monkeypatch.setitem(sys.modules, "tensorrt", make("8.5.3", HostCuda()))
    assert "too old: got 8.5.3" in error_of(capsys, bundle)


def test_bad_options_are_refused_before_tensorrt_is_asked(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-batch is out of range" in error_of(capsys, bundle, "--max-batch", "0")
    assert "--opt-level is out of range" in error_of(capsys, bundle, "--opt-level", "9")
    assert "--workspace is out of range" in error_of(capsys, bundle, "--workspace", "0")


def test_what_it_prints(bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sessa_deploy.export import to_engine

    info = trt_plan.EngineInfo("k", "0" * 64, 3 << 20, "8.6.0", "sm_90", "Fake GPU", "12.8", "fp32", 2, 32, 32, "0" * 64, 12.3)
    asked: list[tuple[object, ...]] = []

    def fake_build(*args: object) -> to_engine.Built:
        asked.append(args[:9])
        return to_engine.Built(to_engine.Bundle.open(bundle), "engines/x", info, fresh=len(asked) == 1, notes=("layers: by TensorRT (why)",))

    monkeypatch.setattr(to_engine, "build_engine", fake_build)
    main(["build", bundle, "--max-batch", "2", "--workspace", "64", "--opt-level", "3"])
    out = capsys.readouterr().out
    assert f"engine: {bundle}/engines/x (3 MiB, Fake GPU), built in 12 s" in out and "run" in out
    assert out.startswith("layers: by TensorRT (why)\n")
    assert asked[0] == (bundle, 2, None, 512, 64 << 20, 3, None, None, False)
    main(["build", bundle])
    assert "nothing to do" in capsys.readouterr().out


TENSORRTS = {"--arch": "90", "--max-batch": "1", "--max-context": "32", "--max-prompt": "512", "--workspace": "64", "--opt-level": "3", "--plugin": "lib.so"}


def test_for_ort_takes_none_of_tensorrts_options(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each that is given is named, even one that says what the default does."""
    from sessa_deploy.cli.build import command

    ours = {"--for", "--layers", "--precision", "--force"}
    assert {p.opts[0] for p in command.params if isinstance(p, click.Option)} == {*TENSORRTS, "--verbose", *ours}
    for option, value in TENSORRTS.items():
        text = error_of(capsys, bundle, "--for", "ort", option, value)
        assert f"GPU: got {option} {value}; allowed: --layers, --precision, --force; fix: sessa-deploy build {bundle} --for ort\n" in text
    text = error_of(capsys, bundle, "--verbose", "--max-batch", "4", "--for", "ort", "--layers", "ort", "--force")
    assert "got --max-batch 4, --verbose;" in text
    assert "no bundle" in error_of(capsys, f"{bundle}x", "--for", "ort") and "the graph cannot be read" in error_of(capsys, bundle, "--for", "ort")
    assert "--layers is none of ours: got 'tensorrt'; allowed: plugin, ort" in error_of(capsys, bundle, "--for", "ort", "--layers", "tensorrt")
    assert "--layers is none of ours: got 'ort'; allowed: plugin, tensorrt" in error_of(capsys, bundle, "--layers", "ort")
    assert "error: --layers is unknown" in error_of(capsys, bundle, "--layers", "onnx")


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys; from sessa_deploy.cli import cli; from click.testing import CliRunner; r = CliRunner().invoke(cli, ['build', '--help'])\n"
            "assert r.exit_code == 0 and '--max-prompt' in r.output; assert not {'onnx', 'numpy', 'tensorrt'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

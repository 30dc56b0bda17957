"""`sessa-deploy export`: the bundle it writes, and every bad input as one line with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import call

from sessa_deploy.checkpoint import save_checkpoint
from sessa_deploy.config import SessaConfig
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.bundle import Bundle

CONFIG = SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=257, max_context=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(SessaLM(CONFIG), folder)
    return folder


def test_a_bundle_is_written_and_checks(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    assert call("export", checkpoint, "--out", out, "--precision", "fp16", "--opset", "21") == 0
    text = capfd.readouterr()
    assert text.out.splitlines() == [f"bundle: {out}", f"next: sessa-deploy validate {out} --checkpoint {checkpoint}"]
    assert text.err == "", "the exporter's noise reached the terminal"
    bundle = Bundle.open(out)
    assert (bundle.precision, bundle.opset, bundle.config) == ("fp16", 21, CONFIG)
    assert bundle.names() == ["model.onnx", "tokenizer.json"]
    assert {"torch", "onnx", "onnxscript", "sessa-deploy"} <= set(bundle.versions)
    tokenizer = json.loads(bundle.file("tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) in (256, 257)


def test_the_checkpoint_s_own_tokenizer_goes_along_and_an_odd_vocabulary_gets_none(tmp_path: Path) -> None:
    model = SessaLM(SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=31))
    save_checkpoint(model, tmp_path / "checkpoint")
    assert call("export", tmp_path / "checkpoint", "--out", tmp_path / "bundle") == 0
    assert Bundle.open(tmp_path / "bundle").names() == ["model.onnx"]
    own = small_tokenizer(20)  # fewer tokens than rows: an embedding padded to a rounder number
    (tmp_path / "checkpoint" / "tokenizer.json").write_text(own)
    assert call("export", tmp_path / "checkpoint", "--out", tmp_path / "bundle") == 0
    assert Bundle.open(tmp_path / "bundle").file("tokenizer.json").read_text() == own


def test_what_a_tokenizer_asks_for_in_vain_is_said_by_export_and_inspect(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(checkpoint, tmp_path / "c")
    asks = {**json.loads(small_tokenizer(20)), "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}
    (tmp_path / "c" / "tokenizer.json").write_text(json.dumps(asks))
    for words in (["export", tmp_path / "c", "--out", tmp_path / "bundle"], ["inspect", tmp_path / "c"]):
        assert call(*words) == 0
        assert one_line(capfd) == "note: tokenizer.json asks for truncation to 8 tokens: ignored, text is encoded whole and as it is"
    assert Bundle.open(tmp_path / "bundle").file("tokenizer.json").read_text() == json.dumps(asks), "the file goes along as it is"


def small_tokenizer(size: int) -> str:
    vocabulary = {f"w{i}": i for i in range(size)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
                       "post_processor": None, "decoder": None, "model": model})


@pytest.mark.parametrize(("tokenizer", "words"), [
    ('{"version": "1.0"}', ("is not a tokenizers JSON",)), ("{}", ("is not a tokenizers JSON",)), ("[1]", ("is not a tokenizers JSON",)),
    (small_tokenizer(300), ("300 tokens", "vocab_size 257")),
    (small_tokenizer(20).replace('"w19": 19', '"w19": 999'), ("1000 tokens", "vocab_size 257")),  # ids with a gap
    (small_tokenizer(20).replace("WordLevel", "FromTheFuture"), ("is not a tokenizers JSON", "pip install -U tokenizers")),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ("Git LFS pointer", "git lfs pull")),
])
def test_a_tokenizer_that_does_not_fit_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], tokenizer: str, words: tuple[str, ...]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text(tokenizer)
    assert call("export", tmp_path / "c", "--out", tmp_path / "bundle") == 2
    line = one_line(capfd)
    assert all(word in line for word in words), line
    assert [x.name for x in tmp_path.iterdir()] == ["c"]


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(("change", "words"), [
    (["--precision", "fp64"], "fp32, fp16, bf16"), (["--precision", "tf32"], "fp32, fp16, bf16"), (["--opset", "16"], "17 to 23"),
    (["--opset", "24"], "17 to 23"), (["--opset", "latest"], "17 to 23"), (["--opset", "-1"], "17 to 23"), (["--config", "absent.json"], "config.json")])
def test_bad_options_are_one_line(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: list[str], words: str) -> None:
    assert call("export", checkpoint, "--out", tmp_path / "bundle", *change) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_bad_places_are_one_line(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    for source, out in ((tmp_path / "absent", tmp_path / "bundle"), (checkpoint, tmp_path / "notes"), (checkpoint, tmp_path / "notes" / "mine.txt" / "x"),
                        (tmp_path / "notes", tmp_path / "bundle")):
        assert call("export", source, "--out", out) == 2
        assert len(capfd.readouterr().err.splitlines()) == 1
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["mine.txt", "notes"]


def test_weights_that_do_not_fit_are_one_line_and_leave_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = SessaLM(CONFIG)
    model.lm_head.weight.data[3, 3] = 1e6
    save_checkpoint(model, tmp_path / "checkpoint")
    assert call("export", tmp_path / "checkpoint", "--out", tmp_path / "bundle", "--precision", "fp16") == 2
    assert "lm_head.weight does not fit into fp16" in capfd.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["checkpoint"]


def test_a_killed_export_leaves_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    program = "from sessa_deploy.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", program, "export", str(checkpoint), "--out", str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert call("export", checkpoint, "--out", out) == 0
    assert [x.name for x in tmp_path.iterdir()] == ["bundle"], "the next export sweeps up"
    Bundle.open(out)

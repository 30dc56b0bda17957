"""sessa-deploy validate: exit codes and last lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from sessa_deploy.checkpoint import save_checkpoint
from sessa_deploy.cli import main
from sessa_deploy.cli.inputs import encoded_texts
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MODEL_FILE, PARITY_FILE
from sessa_deploy.export.parity import process as parity_process
from sessa_deploy.export.to_onnx import export_bundle
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(bundle, checkpoint) of a model with a short context, so that there is little to run."""
    folder = tmp_path_factory.mktemp("validate")
    torch.manual_seed(0)
    save_checkpoint(SessaLM(SessaConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=40, max_context=20)), folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder / "bundle", folder / "checkpoint"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """validate ARGUMENTS -> (exit code, stdout, stderr), with rungs inside this process."""
    monkeypatch.setattr(parity_process, "ProcessLaunch", lambda python: parity_process.launch_here)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # one rung at a time: they patch the same modules

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = 0
        try:
            main(["validate", *map(str, arguments)])
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def signed_again(bundle: Path, out: Path, weight: str) -> Path:
    """The bundle with one element of a weight changed behind a manifest that fits."""
    opened = Bundle.open(bundle)
    graph = onnx.load(opened.model)
    tensor = next(x for x in graph.graph.initializer if x.name == weight)
    x = numpy_helper.to_array(tensor).copy()
    x.flat[-1] += np.float32(1e-6)
    tensor.CopyFrom(numpy_helper.from_array(x, weight))
    files = {name: opened.file(name) for name in opened.names() if name != PARITY_FILE} | {MODEL_FILE: graph.SerializeToString()}
    write_bundle(out, files, opened.config, opened.precision, opened.versions, opened.opset)
    return out


def test_passes_in_processes(material: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, checkpoint = material
    files = {"--json": tmp_path / "p.json", "--report": tmp_path / "p.html", "--dump": tmp_path / "d"}
    main(["validate", str(bundle), "--checkpoint", str(checkpoint), *(str(x) for pair in files.items() for x in pair)])
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("parity: PASSED (torch, ort against float64 at fp32") and "layer 1" in out and not err
    assert json.loads((tmp_path / "p.json").read_text())["passed"] and (tmp_path / "p.html").stat().st_size > 10_000
    assert json.loads(Bundle.open(bundle).file(PARITY_FILE).read_text())["passed"]
    assert {x.name for x in (tmp_path / "d").iterdir()} == {"cases.json", "cases.npz", "float64", "plain", "torch", "ort"}


def test_dump_and_compare(material: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    bundle, checkpoint = material
    code, out, _ = run(bundle, "--dump", tmp_path / "d")
    assert code == 0 and "--compare" in out.splitlines()[-1]
    code, out, _ = run(bundle, "--checkpoint", checkpoint, "--compare", tmp_path / "d", "--no-record")
    assert code == 0 and out.splitlines()[-1].startswith("parity: PASSED (torch, ort")


def test_a_wrong_weight_behind_a_signed_manifest_exits_1(material: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    code, out, _ = run(signed_again(material[0], tmp_path / "bundle", "layers.1.ln.weight"), "--checkpoint", material[1], "--json", tmp_path / "p.json")
    assert code == 1 and out.splitlines()[-1].startswith("parity: FAILED at weights: layers.1.ln.weight")
    assert not json.loads((tmp_path / "p.json").read_text())["passed"]
    assert not json.loads((tmp_path / "bundle" / PARITY_FILE).read_text())["passed"]


def test_a_checkpoint_of_another_shape_exits_1(material: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    save_checkpoint(SessaLM(SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=40)), tmp_path / "other")
    code, out, _ = run(material[0], "--checkpoint", tmp_path / "other")
    assert code == 1 and out.splitlines()[-1].startswith("parity: FAILED at configuration: ") and "n_layers 1 (the bundle: 2)" in out


def test_bad_input_exits_2_with_one_line(material: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    bundle, checkpoint = material
    broken = signed_again(bundle, tmp_path / "broken", "norm.bias")
    raw = bytearray((broken / MODEL_FILE).read_bytes())
    raw[-40] ^= 1
    (broken / MODEL_FILE).write_bytes(raw)
    opened = Bundle.open(bundle)
    write_bundle(tmp_path / "bf16", {MODEL_FILE: opened.model}, opened.config, "bf16", {})
    for arguments, word in (
        ((broken, "--checkpoint", checkpoint), MODEL_FILE),
        ((tmp_path / "bf16", "--checkpoint", checkpoint), "--precision fp32"),
        ((bundle, "--checkpoint", tmp_path / "nothing"), "nothing"),
        ((tmp_path / "nothing", "--checkpoint", checkpoint), "nothing"),
        ((bundle,), "--checkpoint"),
        ((bundle, "--checkpoint", checkpoint, "--backend", "abacus"), "ort-cuda"),
        ((bundle, "--checkpoint", checkpoint, "--compare", tmp_path), "--dump"),
        ((bundle, "--checkpoint", checkpoint, "--compare", tmp_path, "--dump", tmp_path), "exclude"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and word in err and len(err.strip().splitlines()) == 1 and not out, (arguments, out, err)


def test_text_is_judged_beside_the_built_cases(run: Run, tmp_path: Path) -> None:
    """On a bundle with all logits, so that every row of them is judged too."""
    torch.manual_seed(0)
    save_checkpoint(SessaLM(SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=257, max_context=20)), tmp_path / "checkpoint")
    bundle = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", all_logits=True)
    (tmp_path / "a.txt").write_text("größe = 3\n" * 5)
    (tmp_path / "b.txt").write_text("x")
    texts = ("--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt")
    code, out, err = run(bundle, "--checkpoint", tmp_path / "checkpoint", "--json", tmp_path / "p.json", *texts)
    assert code == 0 and out.splitlines()[-1].startswith("parity: PASSED"), out
    assert err.count("\n") == 1 and "text-1" in err and "the first 20 of its 60 tokens" in err
    figures = json.loads((tmp_path / "p.json").read_text())
    assert {name: case["lengths"] for name, case in figures["cases"].items() if case["kind"] == "text"} == {"text-1": [20], "text-2": [1]}
    tokens = {(t["rung"], t["mode"]): t["steps"] for t in figures["tokens"]}
    rows = sum(sum(case["lengths"]) for case in figures["cases"].values())
    assert tokens["ort", "graph"] == tokens["ort", "session"] == tokens["torch", "session"] == rows > tokens["ort", "greedy"]
    judged = {c["case"] for c in figures["comparisons"] if c["field"] == "logits" and c["rung"] == "ort"}
    assert {"text-1", "text-2", "ragged"} <= judged


def test_a_wrong_row_of_all_logits_is_found(tmp_path: Path, material: tuple[Path, Path]) -> None:
    """The graph's logits of a prompt's first token are another's; the last row is right."""
    from sessa_deploy.export import parity
    from sessa_deploy.export.parity.drive import Engine
    from sessa_deploy.export.parity.engines import open_ort
    from sessa_deploy.export.parity.rungs import RungJob

    bundle = export_bundle(material[1], tmp_path / "bundle", all_logits=True)

    def launch(job: RungJob, progress: parity_process.Progress) -> None:
        engine = None
        if job.rung == "ort":
            real = open_ort(Bundle.open(bundle), 1).graph

            def step(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                out = real(feeds)
                if out["logits"].shape[1] > 1:
                    out["logits"] = out["logits"].copy()
                    out["logits"][:, 0] = out["logits"][:, 1]
                return out

            engine = Engine(step, None, {})
        parity_process.run_rung(job, engine=engine)

    report = parity.validate(bundle, material[1], ["ort"], lengths=(2, 9), launch=launch, workers=1)
    assert not report.passed and report.failure is not None and (report.failure.rung, report.failure.field) == ("ort", "logits")


@pytest.mark.parametrize("content", [b"", b"\xff", None, b"x"], ids=["empty", "bytes", "absent", "no tokenizer"])
def test_a_text_that_cannot_be_judged_is_refused(run: Run, material: tuple[Path, Path], tmp_path: Path, content: bytes | None) -> None:
    bundle = material[0]
    if content != b"x":
        bundle = write_bundle(tmp_path / "b", {MODEL_FILE: b"", "tokenizer.json": byte_level_tokenizer().encode()}, SessaConfig(16, 1, 2, 257), "fp32", {})
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    code, out, err = run(bundle, "--checkpoint", material[1], "--text", tmp_path / "t")
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    code, _, err = run(bundle, "--checkpoint", material[1], "--text", tmp_path / "t", "--compare", tmp_path)
    assert code == 2 and "--compare" in err


def test_of_a_large_text_no_more_is_encoded_than_can_be_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "b", {MODEL_FILE: b"", "tokenizer.json": byte_level_tokenizer().encode()}, SessaConfig(16, 1, 2, 257), "fp32", {})
    plain, seen = Tokenizer.encode, []
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: seen.append(len(text)) or plain(self, text))
    most = bundle.config.max_context
    assert encoded_texts(bundle.path, {"large": "ab" * 5_000_000}) == {"text-1": list(b"ab" * most)[:most]}
    assert sum(seen) <= max(1 << 20, 64 * most) and f"the first {most} of its more than" in capsys.readouterr().err

"""Two verdicts of weights in 8 bits: planted faults are caught and located, and what the weights cost on text is measured and bounded."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from parity_fixtures import judge, lively_model

from sessa_deploy.checkpoint import load_checkpoint, save_checkpoint
from sessa_deploy.cli import main
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MODEL_FILE, SAMPLE_FILE, Weights
from sessa_deploy.errors import UserError
from sessa_deploy.export.parity import process as parity_process
from sessa_deploy.export.parity import validate, worth
from sessa_deploy.export.parity.report import render
from sessa_deploy.export.parity.weights import check_weights
from sessa_deploy.export.to_onnx import export_bundle
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.scoring import score
from sessa_deploy.runtime.session import Session

CONFIG = SessaConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=257, max_context=48)
TEXT = "def held_out(text):\n    return [word for word in text.split() if word]\n"
OPSET = {"int8": 17, "fp8": 19}
WEIGHT = "layers.1.W_out.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is sharp, so that text has something to lose."""
    folder = save_checkpoint(lively_model(CONFIG), tmp_path_factory.mktemp("worth") / "checkpoint")
    (folder / SAMPLE_FILE).write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {form: export_bundle(checkpoint, folder / form, opset=opset, all_logits=True, weights=form) for form, opset in OPSET.items()}


def planted(bundle: Path, out: Path, change: Callable[[onnx.ModelProto, dict[str, onnx.TensorProto]], None]) -> Path:
    """The bundle with a fault in its graph, behind a manifest that fits."""
    opened = Bundle.open(bundle)
    graph = onnx.load(opened.model)
    change(graph, {t.name: t for t in graph.graph.initializer})
    files = {name: opened.file(name) for name in opened.names() if name != "parity.json"} | {MODEL_FILE: graph.SerializeToString()}
    write_bundle(out, files, opened.config, opened.precision, opened.versions, opened.opset, weights=opened.weights)
    return out


def bits(tensor: onnx.TensorProto, kind: str = "uint8") -> np.ndarray:
    return np.frombuffer(bytearray(tensor.raw_data), kind).reshape(tensor.dims)


def shifted_scales(tensors: dict[str, onnx.TensorProto], by: int = 1) -> None:
    scale = tensors[f"{WEIGHT}.scale"]
    scale.raw_data = np.roll(bits(scale, "float32"), by).tobytes()


def negative(q: np.ndarray, form: str) -> np.ndarray:
    return (-q.view(np.int8)).view(np.uint8) if form == "int8" else q ^ 0x80


def one_sign(tensors: dict[str, onnx.TensorProto], form: str) -> None:
    q = bits(tensors[f"{WEIGHT}.q"])
    at = int(np.argmax(np.abs(q[3].view(np.int8))))
    q[3, at : at + 1] = negative(q[3, at : at + 1], form)
    tensors[f"{WEIGHT}.q"].raw_data = q.tobytes()


def channel_sign(tensors: dict[str, onnx.TensorProto], form: str) -> None:
    q = bits(tensors[f"{WEIGHT}.q"])
    q[5] = negative(q[5], form)
    tensors[f"{WEIGHT}.q"].raw_data = q.tobytes()


def swapped_rows(tensors: dict[str, onnx.TensorProto]) -> None:
    q = bits(tensors[f"{WEIGHT}.q"])
    q[[2, 9]] = q[[9, 2]]
    tensors[f"{WEIGHT}.q"].raw_data = q.tobytes()


def zero_scale(tensors: dict[str, onnx.TensorProto]) -> None:
    scale = bits(tensors[f"{WEIGHT}.scale"], "float32")
    scale[11] = 0.0
    tensors[f"{WEIGHT}.scale"].raw_data = scale.tobytes()


FAULTS: dict[str, tuple[Callable[..., None], str]] = {
    "shifted scales": (lambda t, form: shifted_scales(t), "off by one channel: channel 0 has that of the one before it"),
    "scales shifted back": (lambda t, form: shifted_scales(t, -1), "off by one channel: channel 0 has that of the one behind it"),
    "one sign": (one_sign, "channel 3, input"),
    "a channel's sign": (channel_sign, "channel 5 has the opposite sign"),
    "swapped rows": (lambda t, form: swapped_rows(t), "channel 2 holds the values of channel 9"),
    "zero scale": (lambda t, form: zero_scale(t), "the scale of channel 11 is 0,"),
}  # fmt: skip


@pytest.mark.parametrize("form", OPSET)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_located(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path, fault: str, form: str) -> None:
    plant, says = FAULTS[fault]
    bad = Bundle.open(planted(bundles[form], tmp_path / "bad", lambda graph, tensors: plant(tensors, form)))
    found = check_weights(bad.model, checkpoint, bad.precision, bad.config, weights=bad.weights)
    assert [name for name, _ in found.missing] == [WEIGHT] and says in found.missing[0][1], found.missing


def test_a_manifest_that_names_others_as_kept(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    """A tensor that should have been kept and is in 8 bits, and one that should be in 8 bits and was kept."""
    kept = export_bundle(checkpoint, tmp_path / "kept", all_logits=True, weights="int8", keep=[WEIGHT])
    for path, said in ((bundles["int8"], Weights("int8", (WEIGHT,))), (kept, Weights("int8"))):
        bundle = Bundle.open(path)
        assert not check_weights(bundle.model, checkpoint, bundle.precision, bundle.config, weights=bundle.weights).missing
        found = check_weights(bundle.model, checkpoint, bundle.precision, bundle.config, weights=said)
        assert [name for name, _ in found.missing] == [WEIGHT] and found.missing[0][1].startswith("no "), found.missing


def test_a_fault_in_the_weights_fails_the_verdict(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    bad = planted(bundles["int8"], tmp_path / "bad", lambda graph, tensors: zero_scale(tensors))
    report = judge(bad, checkpoint, tmp_path / "kept")
    assert not report.passed and f"weights: {WEIGHT}" in report.line() and "channel 11" in report.line()


def test_a_fault_in_the_graph_is_found_by_the_ladder(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    """The right weights with the wrong scales read: two projections of one layer."""

    def crossed(graph: onnx.ModelProto, tensors: dict[str, onnx.TensorProto]) -> None:
        k, v = (next(n for n in graph.graph.node if n.op_type == "DequantizeLinear" and f"layers.1.mixer.{x}_proj" in n.name) for x in "kv")
        k.input[1], v.input[1] = v.input[1], k.input[1]

    report = judge(planted(bundles["int8"], tmp_path / "bad", crossed), checkpoint, tmp_path / "kept")
    assert not report.passed and report.failure is not None and report.failure.layer == 1 and report.failure.field in ("k_f", "v_f")
    assert report.worth is not None and report.worth["passed"] and report.verdicts()[0].startswith("exactness: FAILED at layer 1")


def test_both_verdicts_and_where_the_figures_come_from(
    bundles: dict[str, Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_process, "ProcessLaunch", lambda python: parity_process.launch_here)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    (tmp_path / "t.txt").write_text(TEXT)
    main(["validate", str(bundles["fp8"]), "--checkpoint", str(checkpoint), "--max-loss", "50", "--json", str(tmp_path / "p.json"), "--text",
          str(tmp_path / "t.txt"), "--report", str(tmp_path / "p.html")])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith("exactness: PASSED (torch, ort against float64") and lines[1].startswith("worth: PASSED (fp8 takes ")
    assert lines[2].startswith("parity: PASSED") and "costs most" in lines[1]
    data = json.loads((tmp_path / "p.json").read_text())
    found = data["worth"]
    assert data["exactness"]["passed"] and found["passed"] and found["max_loss_percent"] == 50.0
    page = (tmp_path / "p.html").read_text()
    assert "Worth of the weights in 8 bits" in page and all(html.escape(line) in page for line in lines[:2])
    assert {x["name"] for x in found["layers"]} == {"layers.0", "layers.1", "lm_head"} and found["layers"][0]["name"] in lines[1]
    assert [x["kl"] for x in found["layers"]] == sorted((x["kl"] for x in found["layers"]), reverse=True) and 0 < found["layers"][-1]["kl"] < 0.1
    assert json.loads(Bundle.open(bundles["fp8"]).read("parity.json"))["worth"]["format"] == "fp8"
    # the same as `score` says of the bundle, and of one with the original weights
    wide = export_bundle(checkpoint, tmp_path / "wide", all_logits=True, opset=19)
    for bundle, key in ((bundles["fp8"], "bits_per_byte"), (wide, "original_bits_per_byte")):
        with Session(bundle, "ort") as session:
            assert score(session, TEXT).bits_per_byte == pytest.approx(found[key], rel=1e-5)


def test_a_layer_that_costs_most_is_named_and_can_be_kept(checkpoint: Path, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.layers[1].mixer.proj_fb.weight[:, 5] *= 1e4  # every channel then has an outlier
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    (folder / SAMPLE_FILE).write_text(TEXT)
    bad, kept = (Bundle.open(export_bundle(folder, tmp_path / name, all_logits=True, weights="int8", keep=keep))
                 for name, keep in (("bad", []), ("kept", ["layers.1"])))
    figures = [worth.measure(b, folder, None, worth.texts_for(folder, None), lambda done, of: None) for b in (bad, kept)]
    assert figures[0]["layers"][0]["name"] == "layers.1" and figures[1]["kl"] < figures[0]["kl"]
    assert {x["name"] for x in figures[1]["layers"]} == {"layers.0", "lm_head"}


def test_a_loss_beyond_the_bound_fails(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    report = judge(bundles["int8"], checkpoint, tmp_path / "kept")
    assert report.worth is not None and report.worth["max_loss_percent"] == 0.5 and report.worth["texts"] == [SAMPLE_FILE]
    # what exactness is held to is float32's error, not that of the rounding
    assert max(c.plain_rms for c in report.comparisons) < 1e-5 < report.worth["kl"]
    for loss, most, passes in ((0.5, 0.5, True), (0.51, 0.5, False), (float("nan"), 0.5, False), (-1.0, 0.0, True)):
        report.judge_worth({**report.worth, "loss_percent": loss}, most)
        assert report.passed is passes and report.verdicts()[1].startswith(f"worth: {'PASSED' if passes else 'FAILED'}")
        assert report.line().startswith("parity: PASSED" if passes else "parity: FAILED at worth: int8 takes")
        assert json.dumps(report.to_dict(), allow_nan=False) and ("fail" if not passes else "pass") in render(report)


def test_what_worth_asks_for(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    bare = save_checkpoint(lively_model(CONFIG), tmp_path / "bare")
    with pytest.raises(UserError, match=r"no held_out\.txt.*--text FILE"):
        validate(bundles["int8"], bare, ["ort"])
    assert worth.texts_for(bare, {"a": "x" * 70_000})["a"] == "x" * 65_536
    (bare / SAMPLE_FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        worth.texts_for(bare, None)
    wide = export_bundle(checkpoint, tmp_path / "wide", all_logits=True)
    with pytest.raises(UserError, match="--max-loss is about weights in 8 bits"):
        validate(wide, checkpoint, ["ort"], max_loss=0.5)
    whole = Bundle.open(bundles["int8"])
    mute = write_bundle(tmp_path / "mute", {MODEL_FILE: whole.model}, whole.config, whole.precision, whole.versions, whole.opset, weights=whole.weights)
    with pytest.raises(UserError, match="no tokenizer"):
        validate(mute.path, checkpoint, ["ort"])

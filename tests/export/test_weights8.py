"""export --weights: the file's size and bytes, what runs it, what refuses it, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from parity_fixtures import lively_model
from safetensors.torch import load_file, save_file

from sessa_deploy.checkpoint import load_checkpoint, save_checkpoint
from sessa_deploy.cli import main
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MODEL_FILE, NEW_LENGTH
from sessa_deploy.errors import UserError
from sessa_deploy.export.graph.quantise import change, matrices
from sessa_deploy.export.parity.models import TorchGraph
from sessa_deploy.export.to_onnx import export_bundle, export_onnx
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.doctor import engine_here
from sessa_deploy.runtime.ort.session import open_session, session_options

CONFIG = SessaConfig(d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=257, max_context=64)
FORMATS = {"int8": (17, TensorProto.INT8), "fp8": (19, TensorProto.FLOAT8E4M3FN)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(lively_model(CONFIG), tmp_path_factory.mktemp("weights8") / "checkpoint")


def feeds(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Five tokens behind three cached ones."""
    rng, kinds = np.random.default_rng(0), {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    found = {x.name: rng.normal(size=[{"B": 1, "T": 5, "P": 3}.get(d, d) for d in x.shape]).astype(kinds[x.type]) for x in session.get_inputs()}
    return found | {"input_ids": rng.integers(0, 257, (1, 5)), "past_length": np.full(1, 3, np.int32), NEW_LENGTH: np.full(1, 5, np.int32)}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_file_is_small_and_runs_as_it_is(checkpoint: Path, tmp_path: Path, form: str, precision: str) -> None:
    opset, kind = FORMATS[form]
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "small", precision, opset, weights=form))
    graph = onnx.load(bundle.model).graph
    tensors = {t.name: t for t in graph.initializer}
    eight = [n for n in tensors if n.endswith(".q")]
    assert sorted(eight) == sorted(f"{name}.q" for name in matrices(CONFIG))
    values, itemsize = sum(int(np.prod(tensors[n].dims)) for n in eight), {"fp32": 4, "fp16": 2}[precision]
    for name in eight:
        scale = tensors[name.removesuffix(".q") + ".scale"]
        assert tensors[name].data_type == kind and scale.data_type == TensorProto.FLOAT and list(scale.dims) == list(tensors[name].dims[:1])
        assert len(tensors[name].raw_data) == int(np.prod(tensors[name].dims))
    assert tensors["embedding.weight"].data_type == (TensorProto.FLOAT if precision == "fp32" else TensorProto.FLOAT16)
    wide = Bundle.open(export_bundle(checkpoint, tmp_path / "wide", precision, opset))
    channels = sum(tensors[n].dims[0] for n in eight)
    saved = values * (itemsize - 1) - 4 * channels
    assert 0.9 * saved < wide.size(MODEL_FILE) - bundle.size(MODEL_FILE) <= saved
    # our session and anybody's compute with q * scale, and round no activation to 8 bits
    stored = change(CONFIG, bundle.weights)
    model = load_checkpoint(checkpoint, dtype="fp32", change=stored).to_precision(precision)
    sessions = [open_session(bundle, threads=1), onnxruntime.InferenceSession(str(bundle.model), providers=["CPUExecutionProvider"])]
    options = session_options(onnxruntime, 1)
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    onnxruntime.InferenceSession(str(bundle.model), options, providers=["CPUExecutionProvider"])
    opened = onnx.load(tmp_path / "opened.onnx").graph  # nothing is dequantised at a step
    assert "DequantizeLinear" not in {n.op_type for n in opened.node} and kind not in {t.data_type for t in opened.initializer}
    fed = feeds(sessions[0])
    want = TorchGraph(model)(fed)["logits"]
    for session in sessions:
        error = np.abs(session.run(["logits"], fed)[0] - want).max() / np.abs(want).max()
        assert error < (1e-5 if precision == "fp32" else 1e-2), error


def test_same_bytes_from_two_folders_and_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    first = export_bundle(checkpoint, tmp_path / "a", "fp16", weights="int8", keep=["layers.1.W_in"])
    export_bundle(checkpoint, tmp_path / "elsewhere" / "b", "fp16", weights="int8", keep=["layers.1.W_in.weight"])
    subprocess.run([sys.executable, "-m", "sessa_deploy", "export", str(checkpoint), "--out", str(tmp_path / "c"), "--precision", "fp16", "--weights", "int8",
                    "--keep", "layers.1.W_in"], check=True, capture_output=True)  # fmt: skip
    contents = {(path / MODEL_FILE).read_bytes() for path in (first, tmp_path / "elsewhere" / "b", tmp_path / "c")}
    assert len(contents) == 1
    assert Bundle.open(first).manifest["weights"] == {"format": "int8", "kept": ["layers.1.W_in.weight"]}
    assert Bundle.open(first).weights == Bundle.open(tmp_path / "c").weights
    tensors = {t.name: t.data_type for t in onnx.load(first / MODEL_FILE).graph.initializer}
    assert tensors["layers.1.W_in.weight.T"] == TensorProto.FLOAT16 and "layers.1.W_in.weight.q" not in tensors


def test_data_beside_the_graph(tmp_path: Path) -> None:
    path = export_onnx(lively_model(CONFIG), tmp_path / "m.onnx", weights="int8", inline_limit=0)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(["logits"], feeds(session))[0]).all() and (tmp_path / "m.onnx.data").stat().st_size > 50_000


def test_a_tied_head_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    checkpoint = save_checkpoint(lively_model(config), tmp_path / "checkpoint")
    notes: list[str] = []
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "small", weights="int8", note=notes.append))
    tensors = {t.name: t.data_type for t in onnx.load(bundle.model).graph.initializer}
    assert tensors["embedding.weight"] == TensorProto.FLOAT and tensors["lm_head.weight.q"] == TensorProto.INT8
    assert bundle.config.tie_word_embeddings and len(notes) == 1 and "--keep lm_head" in notes[0]
    model = load_checkpoint(checkpoint, change=change(config, bundle.weights))
    assert not torch.equal(model.lm_head.weight, model.embedding.weight)
    session = open_session(bundle, threads=1)
    fed = feeds(session)
    want = TorchGraph(model)(fed)["logits"]
    assert np.abs(session.run(["logits"], fed)[0] - want).max() < 1e-5 * np.abs(want).max()
    kept = export_bundle(checkpoint, tmp_path / "kept", weights="int8", keep=["lm_head"], note=notes.append)
    tied = {"embedding.weight", "lm_head.weight", "lm_head.weight.q"} & {t.name for t in onnx.load(kept / MODEL_FILE).graph.initializer}
    assert len(tied) == 1 and "lm_head.weight.q" not in tied and len(notes) == 1


def test_zeros_and_outliers_run(tmp_path: Path) -> None:
    model = lively_model(CONFIG)
    with torch.no_grad():
        model.layers[0].W_in.weight[7] = 0.0
        model.layers[1].mixer.q_proj.weight[3, 4] = 1e4
    path = export_onnx(model, tmp_path / "m.onnx", "fp16", weights="int8")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(["logits"], feeds(session))[0]).all()


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "fp32"), (float("inf"), "fp16"), (1e5, "fp16")])
def test_what_is_not_finite_is_one_line(tmp_path: Path, value: float, precision: str) -> None:
    model = lively_model(CONFIG)
    with torch.no_grad():
        model.layers[1].W_out.weight[2, 5] = value
    with pytest.raises(UserError, match=r"layers\.1\.W_out\.weight does not fit") as refused:
        export_onnx(model, tmp_path / "m.onnx", precision, weights="int8")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_checkpoint_in_8_bits_already(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype) -> None:
    state = load_file(checkpoint / "model.safetensors")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    save_file({n: x.to(dtype) if n.endswith("W_in.weight") else x for n, x in state.items()}, tmp_path / "c" / "model.safetensors")
    with pytest.raises(SystemExit) as done:
        main(["export", str(tmp_path / "c"), "--out", str(tmp_path / "b"), "--weights", "int8"])
    error = capsys.readouterr().err
    assert done.value.code == 2 and error.count("\n") == 1 and "W_in.weight" in error and "F16" in error and not (tmp_path / "b").exists(), error


@pytest.fixture(scope="module")
def small(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(checkpoint, tmp_path_factory.mktemp("small") / "bundle", weights="int8", keep=["lm_head"])


def test_what_is_said_of_it(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        main([*arguments])
        return capsys.readouterr().out

    assert json.loads(said("inspect", str(small), "--json"))["weights"] == {"format": "int8", "kept": ["lm_head.weight"]}
    assert "int8, one scale an output channel; kept in the precision: lm_head.weight" in said("inspect", str(small))
    checks = json.loads(said("doctor", str(small), "--json"))
    assert checks["weights"]["format"] == "int8" and "int8" in next(c["found"] for c in checks["checks"] if c["name"] == "the bundle's weights")
    assert "--precision fp16 --weights int8" in engine_here(Bundle.open(small), [])["mend"]


@pytest.mark.parametrize("wrong", [
    None, "int8", {"format": "int4", "kept": []}, {"format": "int8"}, {"format": "int8", "kept": [1]}, {"format": ["int8"], "kept": []},
])  # fmt: skip
def test_a_manifest_that_says_it_wrongly(small: Path, tmp_path: Path, wrong: object) -> None:
    (tmp_path / "b").mkdir()
    for path in small.iterdir():
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((small / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest | {"weights": wrong}))
    with pytest.raises(UserError, match=r"weights of an unknown format|bad list of kept"):
        Bundle.open(tmp_path / "b")


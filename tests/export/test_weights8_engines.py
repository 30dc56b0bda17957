"""Weights in 8 bits on the engines' side: graphs whose ops read bytes and scales, what they take, what refuses them, and faults that parity finds in them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from operators import operators
from parity_fixtures import Here, lively_model
from test_to_ort import agree, feeds, run, whole

from sessa_deploy import contract
from sessa_deploy.checkpoint import save_checkpoint
from sessa_deploy.cli import main
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MODEL_DATA_FILE, MODEL_FILE, PRECISIONS, SAMPLE_FILE, WEIGHT_FORMATS, Weights
from sessa_deploy.cuda import Device
from sessa_deploy.errors import UserError
from sessa_deploy.export import to_ort
from sessa_deploy.export.graph import quantise
from sessa_deploy.export.graph.places import places
from sessa_deploy.export.parity import validate
from sessa_deploy.export.parity.drive import Engine
from sessa_deploy.export.parity.engines import BackendSession
from sessa_deploy.export.parity.rungs import RungJob
from sessa_deploy.export.to_onnx import export_bundle
from sessa_deploy.runtime import doctor, sizes, traffic
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.ort import engine
from sessa_deploy.runtime.ort import prepared as ort_prepared
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.engine import OrtCudaBackend

CONFIG = SessaConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=257, max_context=48)
SHAPES = {"layers": CONFIG, "one head, tied": dataclasses.replace(CONFIG, n_layers=1, n_heads=1, n_kv_heads=1, tie_word_embeddings=True)}
OPSET = {name: form.opset for name, form in WEIGHT_FORMATS.items()}
TEXT = "def held_out(text):\n    return [word for word in text.split() if word]\n"
WHOLE = SessaConfig(d_model=2048, n_layers=24, n_heads=32, vocab_size=50304, max_context=32768)  # 1.1B parameters


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {shape: save_checkpoint(lively_model(config), folder / shape) for shape, config in SHAPES.items()}
    for path in found.values():
        (path / SAMPLE_FILE).write_text(TEXT)
    return found


def stored(bundle: Bundle) -> dict[str, np.ndarray]:
    """The bytes of the file's initializers, by name."""
    files = {name: bundle.file(name).read_bytes() for name in (MODEL_FILE, MODEL_DATA_FILE) if name in bundle}
    return {p.name: np.frombuffer(files[p.file or MODEL_FILE], np.uint8, p.size, p.offset) for p in places(bundle.model)}


@pytest.mark.parametrize(("shape", "form", "external", "keep"), [
    ("layers", "int8", True, ["layers.1.mixer.k_proj"]), ("layers", "fp8", False, ["W_out"]), ("layers", "int8", True, ["lm_head"]),
    ("one head, tied", "fp8", True, []),
])  # fmt: skip
def test_a_prepared_graph_reads_the_files_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, form: str, external: bool, keep: list[str]
) -> None:
    config = SHAPES[shape]
    if keep == ["lm_head"]:  # out_proj as an op of its own, as with wide heads
        monkeypatch.setattr("sessa_deploy.export.engine.layers._usual_scale", lambda *_: False)
    out = export_bundle(checkpoints[shape], tmp_path / "bundle", "fp16", OPSET[form], weights=form, keep=keep, inline_limit=0 if external else 1 << 30)
    built = to_ort.build_ort(out)
    bundle, found = built.bundle, built.prepared
    assert found.layers == "plugin" and bundle.weights is not None
    mixed = [note for note in built.notes if note.startswith("projections of layer 1: in fp16") and "k_proj" in note]
    assert len(mixed) == (keep == ["layers.1.mixer.k_proj"])
    model = whole(bundle, found)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    typed = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.output)}
    assert {x for n in model.graph.node for x in n.output} <= set(typed) and all(t.elem_type and t.HasField("shape") for t in typed.values())
    assert not {"DequantizeLinear", "QuantizeLinear"} & {n.op_type for n in model.graph.node}
    # Every matrix that is in 8 bits stays so, and those that no op joins are not stored again.
    tensors, own = {t.name: t for t in model.graph.initializer}, stored(bundle)
    eight = quantise.quantised(config, bundle.weights)
    joined = [f"layers.{i}.mixer.{p}.weight" for i in range(config.n_layers) for p in ("q_proj", "k_proj", "v_proj", "proj_fb")]
    for name in (n for n in eight if n not in joined):
        assert tensors[f"{name}.q"].raw_data == own[f"{name}.q"].tobytes() and tensors[f"{name}.scale"].raw_data == own[f"{name}.scale"].tobytes()
        at = next((w for w in found.weights if w.name == f"{name}.q"), None)
        assert at is None or not at.file.startswith("engines/")
    for i in range(config.n_layers):
        parts = [n for n in joined if n.startswith(f"layers.{i}.")]
        stem = f"layers.{i}.mixer.projections"
        if not set(parts) <= set(eight):
            assert f"{stem}.rows" in tensors and f"{stem}.q" not in tensors
            continue
        for end in (".q", ".scale"):
            assert tensors[stem + end].raw_data == b"".join(own[n + end].tobytes() for n in parts)
    kinds = {(n.op_type, next((a.i for a in n.attribute if a.name == contract.ATTR_WEIGHTS), 0)) for n in model.graph.node if n.domain == contract.DOMAIN}
    head = WEIGHT_FORMATS[form].onnx if contract.HEAD in eight else 0
    assert {(contract.LAST_LOGITS_OP, head), (contract.NORM_ENTER_OP, WEIGHT_FORMATS[form].onnx)} <= kinds
    out_proj = {contract.LINEAR_HEADS_OP if keep == ["lm_head"] else contract.MIXER_OP} if config.n_heads > 1 else set()
    assert {op for op, kind in kinds if op in (contract.LINEAR_HEADS_OP, contract.MIXER_OP) and kind} == out_proj
    given = feeds(config, "fp16")
    computed = ReferenceEvaluator(model, new_ops=operators()).run(contract.graph_outputs(config.n_layers), given)
    agree(dict(zip(contract.graph_outputs(config.n_layers), computed, strict=True)), run(str(bundle.model), given, config), 2e-2)


def test_sizes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Arithmetic on the shape is what files and prepared graphs hold; at 1.1B parameters it is what was promised."""
    for i, (shape, precision, form, keep) in enumerate([
        ("layers", "fp16", "int8", ["layers.0"]), ("one head, tied", "fp16", "fp8", []), ("layers", "fp16", None, []),
    ]):  # fmt: skip
        config = SHAPES[shape]
        out = export_bundle(checkpoints[shape], tmp_path / str(i), precision, OPSET[form or "int8"], weights=form, keep=keep, inline_limit=0)
        bundle = Bundle.open(out)
        own, said = stored(bundle), sizes.weight_sizes(config, precision, bundle.weights)
        assert sorted(sizes.matrices(config)) == sorted(quantise.matrices(config))
        eight = quantise.quantised(config, bundle.weights)
        assert said.eight == sum(own[n + end].nbytes for n in eight for end in (".q", ".scale"))
        assert said.instead_of == sum(own[f"{n}.q"].nbytes for n in eight) * PRECISIONS[precision].itemsize
        assert said.total == sum(x.nbytes for n, x in own.items() if n.startswith(("layers.", "embedding.", "norm.", "lm_head.")))
        batch = traffic.weight_bytes(config, precision, 3, bundle.weights)
        table = own["embedding.weight"].nbytes if not config.tie_word_embeddings or contract.HEAD in eight else 0
        assert batch == said.total - table + 3 * config.d_model * PRECISIONS[precision].itemsize
        if precision == "fp16" and form is not None:
            found = to_ort.build_ort(bundle).prepared
            packed = sum(w.size for w in found.weights if w.name.endswith(".q"))
            assert packed == found.eight_bytes == sum(own[f"{n}.q"].nbytes for n in eight)
    said = sizes.weight_sizes(WHOLE, "fp16", Weights("int8"))
    assert said.eight <= 0.51 * said.instead_of and said.total <= 0.56 * said.wide and 1.05e9 < said.wide / 2 < 1.2e9
    assert said.to_dict()["ratio"] == said.eight / said.instead_of and sizes.weight_sizes(WHOLE, "fp16").to_dict()["ratio"] is None


class _Evaluated:
    """A session on a prepared graph, computed by onnx's evaluator with the library's operators in numpy."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.real, self.outputs = ReferenceEvaluator(model, new_ops=operators()), model.graph.output

    def run(self, names: list[str], given: dict[str, Any]) -> list[Any]:
        return [np.asarray(x, np.float32) for x in self.real.run(names, given)]

    def get_outputs(self) -> list[Any]:
        return [dataclasses.make_dataclass("Value", ["name", "shape"])(x.name, [0] * len(x.type.tensor_type.shape.dim)) for x in self.outputs]


def rolled(tensors: dict[str, TensorProto]) -> None:
    """Every scale one channel on: what an op reads that begins at the wrong address."""
    scale = tensors["layers.1.mixer.projections.scale"]
    scale.raw_data = np.roll(np.frombuffer(scale.raw_data, np.float32), 1).tobytes()


def negative(tensors: dict[str, TensorProto]) -> None:
    q = np.frombuffer(bytearray(tensors["layers.0.W_out.weight.q"].raw_data), np.int8).reshape(32, 32)
    q[5] *= -1
    tensors["layers.0.W_out.weight.q"].raw_data = q.tobytes()


def swapped(tensors: dict[str, TensorProto]) -> None:
    q = np.frombuffer(bytearray(tensors["layers.1.W_in.weight.q"].raw_data), np.int8).reshape(64, 32)
    q[[2, 40]] = q[[40, 2]]
    tensors["layers.1.W_in.weight.q"].raw_data = q.tobytes()


def zero(tensors: dict[str, TensorProto]) -> None:
    scale = np.frombuffer(bytearray(tensors["lm_head.weight.scale"].raw_data), np.float32)
    scale[100:110] = 0
    tensors["lm_head.weight.scale"].raw_data = scale.tobytes()


# fault -> (layer, fields) that the first failure may name
FAULTS: dict[str, tuple[Callable[[dict[str, TensorProto]], None], int | None, set[str]]] = {
    "scales off by one channel": (rolled, 1, {"k_f", "v_f", "k_b"}), "a channel's sign": (negative, 1, {"k_f", "v_f", "k_b", "s"}),
    "rows swapped": (swapped, 1, {"k_f", "v_f", "k_b", "s"}), "zero scales": (zero, None, {"logits"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def judged(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(plant) -> the report of `validate` on the engine's graph of an int8 bundle, with a fault in it."""
    folder = tmp_path_factory.mktemp("judged")
    bundle = to_ort.build_ort(export_bundle(checkpoints["layers"], folder / "bundle", "fp16", weights="int8", inline_limit=0)).bundle
    found = ort_prepared.find(bundle)
    assert found is not None
    (folder / "kept").mkdir()

    def judge(plant: Callable[[dict[str, TensorProto]], None] | None) -> Any:
        model = whole(bundle, found)
        if plant is not None:
            plant({t.name: t for t in model.graph.initializer})
        session = _Evaluated(model)

        def engine(job: RungJob) -> Engine:
            def backend(batch: int, capacity: int) -> OrtBackend:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("sessa_deploy.runtime.ort.backend.open_session", lambda *_: session)
                    return OrtBackend(Bundle.open(job.bundle, verify=False), batch, capacity)

            return Engine(None, BackendSession(backend, CONFIG.max_context), {"numpy": np.__version__})

        return validate(bundle.path, checkpoints["layers"], ["ort"], lengths=(1, 5), launch=Here(folder / "kept", engine), workers=1, max_loss=50.0)

    return judge


def test_the_engines_graph_is_exact(judged: Callable[..., Any]) -> None:
    report = judged(None)
    assert report.passed and report.verdicts()[0].startswith("exactness: PASSED") and report.verdicts()[1].startswith("worth: PASSED")


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_an_engines_weights_are_located(judged: Callable[..., Any], fault: str) -> None:
    plant, layer, fields = FAULTS[fault]
    report = judged(plant)
    assert not report.passed and report.failure is not None and report.failure.layer == layer and report.failure.field in fields, report.line()
    assert report.verdicts()[0].startswith("exactness: FAILED") and report.verdicts()[1].startswith("worth: PASSED")


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("refused")
    made = {f"{form} fp16": export_bundle(checkpoints["layers"], folder / form, "fp16", OPSET[form], weights=form) for form in OPSET}
    return made | {"int8 fp32": write_bundle(folder / "single", {MODEL_FILE: b"not read"}, CONFIG, "fp32", {}, weights=Weights("int8")).path}


@pytest.mark.parametrize(("which", "arguments", "says", "mend"), [
    ("int8 fp32", ["build", "BUNDLE", "--for", "ort"], "in 8 bits beside activations of 16", "--precision fp16 --weights int8"),
    ("int8 fp32", ["build", "BUNDLE", "--for", "rtx"], "in 8 bits beside activations of 16", "--precision fp16 --weights int8"),
    ("int8 fp32", ["run", "BUNDLE", "--prompt", "x", "--backend", "trt"], "in 8 bits beside activations of 16", "--precision fp16 --weights int8"),
    ("int8 fp32", ["validate", "BUNDLE", "--dump", "D", "--backend", "trt"], "in 8 bits beside activations of 16", "--precision fp16 --weights int8"),
    ("int8 fp16", ["build", "BUNDLE", "--for", "ort", "--layers", "ort"], "read by the library's kernels alone", "leave --layers out"),
    ("int8 fp16", ["build", "BUNDLE", "--for", "rtx", "--layers", "tensorrt"], "read by the library's kernels alone", "leave --layers out"),
    ("fp8 fp16", ["build", "BUNDLE", "--for", "rtx", "--arch", "86,89"], "fp8 weights need a later GPU: got sm_86; allowed: sm_89 or later", "--weights int8"),
])  # fmt: skip
def test_what_an_engine_refuses(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, which: str, arguments: list[str], says: str,
    mend: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sessa_deploy.runtime.trt.api.wanted", lambda target: __import__("sessa_deploy.runtime.trt.api", fromlist=["x"]).product("rtx"))
    before = sorted(p.name for p in bundles[which].iterdir())
    with pytest.raises(SystemExit) as done:
        main([str(bundles[which]) if x == "BUNDLE" else x for x in arguments])
    error = capsys.readouterr().err
    assert done.value.code == 2 and error.count("\n") == 1 and says in error and mend in error.partition("; fix: ")[2], error
    assert sorted(p.name for p in bundles[which].iterdir()) == before and not list(tmp_path.iterdir())


def test_widths_without_kernels_are_refused(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sessa_deploy.export.engine.layers.refusal", lambda graph, config: "head width d: got 4")
    with pytest.raises(UserError, match=r"kernels alone, and it has none for these layers \(head width d: got 4\).*allowed: --backend ort;.*fix: .*export"):
        to_ort.build_ort(bundles["int8 fp16"])
    assert not [n for n in Bundle.open(bundles["int8 fp16"]).names() if n.startswith("engines/")]


def test_graphs_of_others_are_not_read_as_ours(bundles: dict[str, Path], tmp_path: Path) -> None:
    """What a matrix reads is what its node reads; a node that is not as we write it is refused."""
    opened = Bundle.open(bundles["int8 fp16"])

    def changed(name: str, change: Callable[[dict[str, onnx.NodeProto]], None]) -> Bundle:
        model = onnx.load(opened.model)
        change({n.name: n for n in model.graph.node})
        return write_bundle(tmp_path / name, {MODEL_FILE: model.SerializeToString()}, opened.config, "fp16", {}, weights=opened.weights)

    def crossed(nodes: dict[str, onnx.NodeProto]) -> None:
        k, v = (nodes[f"layers.1.mixer.{x}_proj.weight/DequantizeLinear"] for x in "kv")
        k.input[1], v.input[1] = v.input[1], k.input[1]

    built = to_ort.build_ort(changed("crossed", crossed))
    scales = next(t for t in whole(built.bundle, built.prepared).graph.initializer if t.name == "layers.1.mixer.projections.scale").raw_data
    own = stored(opened)
    assert scales == b"".join(own[f"layers.1.mixer.{p}.weight.scale"].tobytes() for p in ("q_proj", "v_proj", "k_proj", "proj_fb"))
    nowhere = changed("zero point", lambda nodes: nodes["layers.0.W_in.weight/DequantizeLinear"].input.append("layers.0.W_in.weight.q"))
    with pytest.raises(UserError, match=r"W_in\.weight/DequantizeLinear is not as our exporter writes it"):
        to_ort.build_ort(nowhere)


def test_what_is_said(bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: str) -> str:
        main([*arguments])
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    fp8 = bundles["fp8 fp16"]
    found = json.loads(said("inspect", str(fp8), "--json"))
    assert found["weight_bytes"] == sizes.weight_sizes(CONFIG, "fp16", Weights("fp8")).to_dict() and 0.5 < found["weight_bytes"]["ratio"] < 0.6
    assert f"{found['weight_bytes']['ratio']:.3f} x of fp16" in said("inspect", str(fp8))
    opened = Bundle.open(fp8)
    none = doctor.prepared_here(opened)
    assert none["state"] == "optional" and none["mend"] == f"sessa-deploy build {fp8} --for ort"
    good, early = (doctor.weights_here(opened, [{"arch": arch}]) for arch in ("sm_90", "sm_80"))
    assert good["state"] == "ok" and not good["mend"] and "read them in 8 bits" in good["found"]
    assert early["state"] == "optional" and "need a later GPU: sm_80" in early["found"] and "--weights int8" in early["mend"]
    single = doctor.weights_here(Bundle.open(bundles["int8 fp32"]), [])
    for check in (single, doctor.prepared_here(Bundle.open(bundles["int8 fp32"]))):
        assert "beside activations of 16" in check["found"] and "--precision fp16 --weights int8" in check["mend"]
    copy = write_bundle(tmp_path / "copy", {n: opened.file(n) for n in opened.names()}, opened.config, "fp16", {}, 19, weights=opened.weights)
    none_left = write_bundle(tmp_path / "none", {MODEL_FILE: b"not read"}, CONFIG, "fp16", {}, weights=Weights("int8", tuple(sizes.matrices(CONFIG))))
    assert "0.0 MB with scales;" in doctor.weights_here(none_left, [])["found"] and "in 8 bits" not in said("inspect", str(none_left.path))
    built = to_ort.build_ort(copy)
    here = doctor.prepared_here(built.bundle)
    assert here["state"] == "ok" and "engines/ort-fp16, layers by the library, weights in 8 bits 0.0 MB" in here["found"]
    assert f"weights in 8 bits {built.prepared.eight_bytes / 1000:.2f} kB" in said("inspect", str(built.bundle.path))
    for arch, says in (("sm_80", "fp8 weights need a later GPU (got sm_80; allowed: sm_89 or later); fast with: sessa-deploy export"), ("sm_89", "no library")):
        monkeypatch.setattr(engine, "devices", lambda arch=arch: [Device(0, "GPU", arch, 1 << 34)])
        assert says in (engine.obstacle(built.bundle) or "")
    assert OrtCudaBackend.packed_weights and not OrtBackend.packed_weights
    counts = Counter(c["name"] for c in json.loads(said("doctor", str(built.bundle.path), "--json"))["checks"])
    assert counts["the bundle's weights"] == counts["the bundle's graph for our kernels"] == 1


def test_the_gpu_that_is_opened_is_asked(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundles["fp8 fp16"])
    copy = write_bundle(tmp_path / "copy", {n: opened.file(n) for n in opened.names()}, opened.config, "fp16", {}, 19, weights=opened.weights)
    built, closed = to_ort.build_ort(copy).bundle, []
    monkeypatch.setattr(engine, "preload", lambda runtime: None)
    cuda = SimpleNamespace(arch=86, enter=lambda: None, close=lambda: closed.append(True))
    with pytest.raises(UserError, match="fp8 weights need a later GPU: got sm_86"):
        OrtCudaBackend(built, plugin=tmp_path / "unread.so", cuda=cuda)
    assert closed == [True]

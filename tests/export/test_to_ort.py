"""The graph prepared for ONNX Runtime: the plain graph's numbers, with weights from where engine.json says; the same bytes anywhere; every damage refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_models import CONFIG as NARROW
from operators import operators
from ort_rules import breaches, rotary_function

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.export import to_ort
from sessa_deploy.export.engine import graph as engine_graph
from sessa_deploy.export.graph.places import places
from sessa_deploy.plugins import ops
from sessa_deploy.runtime.bundle import Bundle, BundleWriter, add_files, write_bundle
from sessa_deploy.runtime.ort import prepared as ort_prepared

onnxruntime = pytest.importorskip("onnxruntime")
CONFIG = SessaConfig(d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, max_context=32, layer_norm_eps=0.3)
TIED = SessaConfig(d_model=32, n_layers=1, n_heads=1, vocab_size=61, max_context=32, tie_word_embeddings=True)  # one head, and the logits of all tokens
Export = Callable[..., Bundle]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """(precision, config, opset, external, at) -> a fresh bundle; the graph of a precision and a config is captured once."""
    torch = pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    folder = tmp_path_factory.mktemp("ort")

    def make(precision: str, config: SessaConfig = CONFIG, opset: int = 17, external: bool = False, at: Path | None = None) -> Bundle:
        torch.manual_seed(5)
        model = SessaLM(config)
        with torch.no_grad():  # biases that are zero would hide a wrong order
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2)
        place = folder / str(len(list(folder.iterdir())))
        path = export_onnx(model, place / contract.MODEL_FILE, precision, opset, config is TIED, inline_limit=0 if external else 1 << 30)
        return write_bundle(at or place / "bundle", {p.name: p for p in path.parent.iterdir() if p.is_file()}, config, precision, {}, opset)

    return make


def feeds(config: SessaConfig, precision: str) -> dict[str, Any]:
    """A step of two sequences, (4 past, 3 new) and (0 past, 2 new); rows of the past behind them are finite, as numpy's operators do not select."""
    rng, storage = np.random.default_rng(0), np.dtype(contract.PRECISIONS[precision].numpy)
    found: dict[str, Any] = {contract.INPUT_IDS: rng.integers(0, 61, (2, 3)), contract.PAST_LENGTH: np.array([4, 0], np.int32),
                             contract.NEW_LENGTH: np.array([3, 2], np.int32)}  # fmt: skip
    for layer, name in contract.cache_entries(config.n_layers):
        shape = (2, 6, *contract.cache_row_shape(name, config.d_model, config.kv_heads, config.head_dim))
        found[contract.past_name(layer, name)] = rng.standard_normal(shape).astype(storage)
    return found


def run(model: str | bytes, given: dict[str, Any], config: SessaConfig, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """One step in ONNX Runtime on the CPU, the external initializers given by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in (values or {}).items()}
    if held:
        options.add_external_initializers(list(held), list(held.values()))
    names = contract.graph_outputs(config.n_layers)
    return dict(zip(names, onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(names, given), strict=True))


def agree(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    """Rows below new_length agree; of (B,V) logits all do."""
    for name, theirs in wanted.items():
        mine = np.asarray(found[name], np.float32)
        assert mine.shape == theirs.shape, name
        for row, count in enumerate((3, 2)):
            part = slice(None) if name == contract.LOGITS and theirs.ndim == 2 else slice(count)
            scale = np.abs(theirs[row][part].astype(np.float32)).max()
            np.testing.assert_allclose(mine[row][part], theirs[row][part], rtol=tolerance, atol=tolerance * scale, err_msg=name)


def whole(bundle: Bundle, found: ort_prepared.Prepared) -> onnx.ModelProto:
    """The prepared graph with its weights inside, each checked against the manifest's files."""
    model = engine_graph.load(found.model)
    values = {w.name: (w, x) for w, x in zip(found.weights, ort_prepared.weights(bundle, found).values(), strict=True)}
    for i, tensor in enumerate(model.graph.initializer):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            w, x = values.pop(tensor.name)
            assert (list(w.shape), w.onnx_type) == (list(tensor.dims), tensor.data_type) and not x.flags.writeable | (x.ctypes.data % x.itemsize)
            model.graph.initializer[i].CopyFrom(onnx.TensorProto(name=w.name, dims=w.shape, data_type=w.onnx_type, raw_data=x.tobytes()))
    assert not values  # the table names exactly the external ones
    return model


@pytest.mark.parametrize(("precision", "external", "opset"), [*(("fp32", False, opset) for opset in contract.OPSETS), ("fp32", True, 17), ("fp16", True, 17)])
def test_onnx_runtime_takes_the_weights_by_name(export: Export, precision: str, external: bool, opset: int) -> None:
    """With standard operators in place of ours, ONNX Runtime gives the plain graph's bits, every large weight handed to it from the bundle's files."""
    from sessa_deploy.export.graph.functions import functions

    bundle = to_ort.build_ort(export(precision, opset=opset, external=external), layers="ort").bundle
    found = ort_prepared.find(Bundle.open(bundle.path))
    assert found is not None and found.layers == "ort" and found.ops == {contract.CAUSAL_OP: 2, contract.FEEDBACK_OP: 2, contract.ROTARY_OP: 1}
    assert {w.file for w in found.weights} == {contract.MODEL_DATA_FILE if external else contract.MODEL_FILE}  # nothing is stored twice
    assert found.added_bytes == sum(bundle.size(n) for n in bundle.names() if n.startswith("engines/")) < 60_000
    model = engine_graph.load(found.model)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset, contract.DOMAIN: contract.DOMAIN_VERSION} and not model.functions
    assert breaches(model.graph) == []
    storage = contract.PRECISIONS[precision].onnx
    model.functions.extend([*functions(storage, opset), rotary_function(opset)])
    given = feeds(CONFIG, precision)
    found_values = run(model.SerializeToString(), given, CONFIG, ort_prepared.weights(bundle, found))
    agree(found_values, run(str(bundle.model), given, CONFIG), 1e-5 if precision == "fp32" else 4e-3)


@pytest.mark.parametrize(("config", "external"), [(CONFIG, False), (CONFIG, True), (TIED, True)])
def test_the_librarys_layers_compute_the_same(export: Export, config: SessaConfig, external: bool) -> None:
    from onnx.reference import ReferenceEvaluator

    plain = export("fp16", config, external=external)
    built = to_ort.build_ort(plain)
    bundle, found = built.bundle, built.prepared
    assert built.fresh and found.layers == "plugin" and not found.inlined and found.all_logits == (config is TIED)
    assert built.notes == ("layers: by the plugin library (its kernels are the tuned ones; --layers ort gives ONNX Runtime's own)",)
    assert Bundle.open(bundle.path).sha256(contract.MODEL_FILE) == plain.sha256(contract.MODEL_FILE)  # the default graph stays
    model = whole(bundle, found)
    onnx.checker.check_model(model, full_check=True)
    counts = Counter(n.op_type for n in model.graph.node)
    assert {op: counts[op] for op in found.ops} == found.ops and counts[contract.TAIL_OP] == config.n_layers and breaches(model.graph) == []
    assert not {"MatMul", "Gemm", "LayerNormalization", "Softmax"} & set(counts)
    # Types and shapes are stated, so that nobody who reads the graph must know our operators.
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    stated = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.output)}
    assert {x for n in model.graph.node for x in n.output} <= set(stated) and all(t.elem_type and t.HasField("shape") for t in stated.values())
    given = feeds(config, "fp16")
    names = contract.graph_outputs(config.n_layers)
    computed = dict(zip(names, ReferenceEvaluator(model, new_ops=operators()).run(names, given), strict=True))
    agree(computed, run(str(bundle.model), given, config), 2e-2)
    places_of = Counter(w.file for w in found.weights)
    own = contract.MODEL_DATA_FILE if external else contract.MODEL_FILE
    anew = f"{found.folder}/{contract.MODEL_DATA_FILE}"
    tables = {w.name for w in found.weights if w.file == own} & {"embedding.weight", "lm_head.weight"}
    assert set(places_of) == {own, anew} and len(tables) == (1 if config.tie_word_embeddings else 2)
    assert {w.name.rpartition(".")[2] for w in found.weights if w.file == anew} <= {"rows", "heads", "none", "limbs"}


def test_bfloat16_bits_are_the_bundles(export: Export) -> None:
    bundle = to_ort.build_ort(export("bf16", external=True)).bundle
    found = ort_prepared.find(bundle)
    assert found is not None and found.precision == "bf16" and {w.onnx_type for w in found.weights} == {onnx.TensorProto.BFLOAT16}
    values = ort_prepared.weights(bundle, found)
    data = bundle.file(contract.MODEL_DATA_FILE).read_bytes()
    theirs = {p.name: np.frombuffer(data[p.offset : p.offset + p.size], np.uint16).reshape(p.dims) for p in places(bundle.model)
              if p.kind == onnx.TensorProto.BFLOAT16}
    assert all(x.dtype == np.uint16 for x in values.values())
    np.testing.assert_array_equal(values["embedding.weight"], theirs["embedding.weight"])
    np.testing.assert_array_equal(values["layers.1.W_in.rows"], theirs["layers.1.W_in.weight.T"].T)
    parts = [theirs[f"layers.0.mixer.{name}.weight.T"].T for name in ("q_proj", "k_proj", "v_proj", "proj_fb")]
    np.testing.assert_array_equal(values["layers.0.mixer.projections.rows"], np.concatenate(parts))
    assert all(a.i == onnx.TensorProto.BFLOAT16 for n in engine_graph.load(found.model).graph.node for a in n.attribute if a.name == contract.ATTR_STORAGE)


CHILD = """
import sys
for gone in ("torch", "tensorrt", "onnxruntime", "triton"):
    sys.modules[gone] = None
from sessa_deploy.cli import main
main(["build", sys.argv[1], "--for", "ort"])
"""


def built_files(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.glob("engines/**/*")) if p.is_file()}


def test_the_same_bytes_from_two_places_and_two_processes(export: Export, tmp_path: Path) -> None:
    here = to_ort.build_ort(export("fp16", at=tmp_path / "here")).bundle
    there = export("fp16", at=tmp_path / "some where" / "else").path
    done = subprocess.run([sys.executable, "-c", CHILD, str(there)], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    files = built_files(there)
    assert files == built_files(here.path) and set(files) == {f"engines/ort-fp16/{n}" for n in ("engine.json", "model.onnx", "model.onnx.data")}
    assert str(tmp_path).encode() not in b"".join(files.values())
    *notes, graph, following = done.stdout.splitlines()
    assert len(notes) == 1 and re.fullmatch(rf"graph: {there}/engines/ort-fp16, adds [0-9.]+ kB to the bundle", graph)
    assert following == f"next: sessa-deploy run '{there}' --backend ort-cuda --prompt ..."


def test_it_is_kept_until_something_changes(export: Export) -> None:
    first = to_ort.build_ort(export("fp16"))
    before = built_files(first.bundle.path)
    for again in (None, "plugin"):
        kept = to_ort.build_ort(Bundle.open(first.bundle.path), layers=again)
        assert not kept.fresh and kept.prepared == first.prepared and not kept.notes
    assert to_ort.build_ort(first.bundle, force=True).fresh and built_files(first.bundle.path) == before
    other = to_ort.build_ort(first.bundle, layers="ort")
    assert other.fresh and other.prepared.layers == "ort" and not other.notes
    assert set(built_files(first.bundle.path)) == {"engines/ort-fp16/engine.json", "engines/ort-fp16/model.onnx"}  # what it no longer needs is gone
    Bundle.open(first.bundle.path)
    assert to_ort.build_ort(first.bundle).fresh and built_files(first.bundle.path) == before
    with BundleWriter(first.bundle.path) as writer:  # a new export takes what was built of the old one away
        (writer.folder / contract.MODEL_FILE).write_bytes(b"another")
        written = writer.commit(CONFIG, "fp16", {})
    assert written.names() == [contract.MODEL_FILE] and ort_prepared.find(written) is None and not (written.path / "engines").exists()


def test_a_build_that_is_stopped_leaves_nothing(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export("fp16", at=tmp_path / "bundle")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for step in ("write_model", "hash_file", "add_files"):
        with monkeypatch.context() as patch:
            patch.setattr(to_ort, step, stop)
            with pytest.raises(KeyboardInterrupt):
                to_ort.build_ort(bundle)
        assert [p.name for p in tmp_path.iterdir()] == ["bundle"] and Bundle.open(bundle.path).names() == [contract.MODEL_FILE]


def test_what_the_library_cannot_do_is_refused_in_one_line(models: Callable[[str], Path], tmp_path: Path) -> None:
    plain = "fix: use --backend ort-cuda, which runs the plain graph$"
    for i, (d_model, precision) in enumerate(((4112, "fp16"), (24, "fp16"), (8, "fp32"))):
        wide = write_bundle(tmp_path / str(i), {contract.MODEL_FILE: b"not read"}, dataclasses.replace(NARROW, d_model=d_model), precision, {})
        said = rf"width does not run in ONNX Runtime with the library: got d_model={d_model}.*a multiple of 16 up to 4096.*{plain}"
        with pytest.raises(UserError, match=said):
            to_ort.build_ort(wide)
    narrow = write_bundle(tmp_path / "narrow", {contract.MODEL_FILE: models("fp16")}, NARROW, "fp16", {})
    with pytest.raises(UserError, match=f"no kernels for this model's attentions: got SessaCausalAttention, head width d: got 4.*{plain}"):
        to_ort.build_ort(narrow)
    single = write_bundle(tmp_path / "a b", {contract.MODEL_FILE: b"not read"}, CONFIG, "fp32", {})
    for asked, wrong in (({"layers": "tensorrt"}, "--layers is none of ours: got 'tensorrt'; allowed: plugin, ort"),
                         ({"precision": "fp16"}, "the exported graph decides the precision: got --precision fp16; allowed: fp32"),
                         ({"layers": "plugin"}, rf"--layers plugin cannot be had.*fix: sessa-deploy build '{single.path}' --for ort --layers ort$"),
                         ({}, "the graph cannot be read")):  # fmt: skip
        with pytest.raises(UserError, match=wrong):
            to_ort.build_ort(single, **asked)
    assert Bundle.open(single.path).names() == Bundle.open(narrow.path).names() == [contract.MODEL_FILE]


@pytest.fixture(scope="module")
def made(export: Export) -> Bundle:
    return to_ort.build_ort(export("fp16")).bundle


FOLDER = "engines/ort-fp16"
ROW: dict[str, Any] = {"name": "embedding.weight"}  # the row that is changed
DAMAGE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # name -> (changes of the whole, changes of one row, what is said)
    "another version": ({"schema_version": 2}, {}, "no description of a prepared graph of this version: got schema_version 2"),
    "a key too many": ({"more": 1}, {}, "of this version: got more"),
    "no weights": ({"weights": None}, {}, "of this version: got weights"),
    "a count that is none": ({"ops": {"SessaTail": "two"}}, {}, "of this version: got ops"),
    "other operators": ({"state": ops.STATE_VERSION + 1}, {}, "for operators of another version"),
    "another precision": ({"precision": "fp32"}, {}, "is of another precision: got fp32; allowed: fp16"),
    "another graph": ({"files": {}}, {}, "was written beside other files"),
    "outside the bundle": ({}, {"file": "../../../etc/passwd"}, "lies in a file that holds no weights of this bundle"),
    "an absolute place": ({}, {"file": "/etc/passwd"}, "lies in a file that holds no weights of this bundle"),
    "the description": ({}, {"file": f"{FOLDER}/engine.json"}, "lies in a file that holds no weights of this bundle"),
    "behind the end": ({}, {"offset": 1 << 40}, "embedding.weight lies outside model.onnx"),
    "one byte behind": ({}, {"offset": "last"}, "embedding.weight lies outside model.onnx"),
    "before the start": ({}, {"offset": -2}, "embedding.weight lies outside model.onnx"),
    "another size": ({}, {"size": 16}, "size, shape and type of embedding.weight disagree"),
    "another shape": ({}, {"shape": [61, 65]}, "size, shape and type of embedding.weight disagree"),
    "a shape that wraps": ({}, {"shape": [1 << 62, 4], "size": 0}, "size, shape and type of embedding.weight disagree"),
    "another type": ({}, {"onnx_type": 1}, "size, shape and type of embedding.weight disagree"),
    "an unknown type": ({}, {"onnx_type": 99}, "size, shape and type of embedding.weight disagree"),
    "a truth for a number": ({}, {"offset": True}, "a row that describes no weight"),
    "a name twice": ({}, {"name": "lm_head.weight"}, "names a weight twice: got lm_head.weight"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_description_that_is_not_right_is_refused_and_replaced(made: Bundle, tmp_path: Path, damage: str) -> None:
    """Even where the manifest agrees with it; nothing is loaded, and a build mends it."""
    changes, one, said = DAMAGE[damage]
    shutil.copytree(made.path, tmp_path / "bundle")
    good = made.read(f"{FOLDER}/engine.json")
    described = json.loads(good)
    row = next(r for r in described["weights"] if r["name"] == ROW["name"])
    row.update({k: made.size(row["file"]) - row["size"] + 1 if v == "last" else v for k, v in one.items()})
    bundle = add_files(tmp_path / "bundle", {f"{FOLDER}/engine.json": json.dumps(described | changes).encode()})
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        ort_prepared.find(Bundle.open(bundle.path))
    assert str(caught.value).endswith(f"; fix: sessa-deploy build {bundle.path} --for ort --force") and "\n" not in str(caught.value)
    assert ort_prepared.describe(bundle)["prepared"]["why"]
    if damage in ("another version", "one byte behind", "another graph"):
        assert to_ort.build_ort(bundle).fresh and Bundle.open(bundle.path).read(f"{FOLDER}/engine.json") == good


@pytest.mark.parametrize("name", ["engine.json", "model.onnx", "model.onnx.data", "../../model.onnx"])
def test_files_that_changed_are_refused_before_anything_loads(made: Bundle, tmp_path: Path, name: str) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(made.path, path)
    file = path / FOLDER / name
    opened = Bundle.open(path)
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(UserError, match="does not match its checksum"):
        Bundle.open(path)
    with pytest.raises(UserError, match="does not match its checksum"):
        opened.require_unchanged()
    file.write_bytes(before[:-9])
    with pytest.raises(UserError, match=r"another size than the manifest says|does not match its checksum"):
        found = ort_prepared.find(opened)
        assert found is not None
        ort_prepared.weights(opened, found)
        opened.require_unchanged()  # the graph's own file is the session's to read
    file.write_bytes(before)
    if name != "engine.json":  # swapped together with the manifest's checksum: the description knows what it was written for
        if name.startswith("model"):
            swapped = add_files(path, {f"{FOLDER}/{name}": before + b"\0"})
            with pytest.raises(UserError, match=f"was written beside other files: got another {FOLDER}/{name}"):
                ort_prepared.find(swapped)
            gone = add_files(path, {}, remove=[f"{FOLDER}/{name}"])
            with pytest.raises(UserError, match=r"is not whole: got no model.onnx|was written beside other files"):
                ort_prepared.find(gone)
    else:
        gone = add_files(path, {}, remove=[f"{FOLDER}/engine.json"])
        with pytest.raises(UserError, match=r"is not whole: got no engine.json in the manifest"):
            ort_prepared.find(gone)


def test_a_hubs_snapshot_is_read_and_not_written(made: Bundle, tmp_path: Path) -> None:
    """Every file a link into blobs/, as a hub's cache holds it."""
    snapshot = tmp_path / "models--me--it" / "snapshots" / "abc"
    for i, name in enumerate([*made.names(), contract.MANIFEST_FILE]):
        blob, link = snapshot.parents[1] / "blobs" / f"blob{i}", snapshot / name
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made.path / name, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    bundle = Bundle.open(snapshot)
    found, theirs = ort_prepared.find(bundle), ort_prepared.find(made)
    assert found is not None and theirs is not None and found.weights == theirs.weights
    mine, others = ort_prepared.weights(bundle, found), ort_prepared.weights(made, theirs)
    assert all(np.array_equal(mine[n].view(np.uint16), others[n].view(np.uint16)) for n in others)
    assert not to_ort.build_ort(bundle).fresh
    with pytest.raises(UserError, match="a bundle in a download cache is not changed"):
        to_ort.build_ort(bundle, force=True)


def test_who_reads_engines_passes_it_over(made: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Choice, doctor, inspect and the runtime, with this folder alone and beside an engine of TensorRT."""
    from sessa_deploy.cli import main
    from sessa_deploy.describe import describe_bundle
    from sessa_deploy.runtime import engines as runtime_engines
    from sessa_deploy.runtime.doctor import engine_here
    from sessa_deploy.runtime.ort import session as ort_session
    from sessa_deploy.runtime.trt import plan as trt_plan

    monkeypatch.setattr(ort_session, "cuda_is_usable", lambda: False)
    shutil.copytree(made.path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert trt_plan.engines(bundle) == {} and trt_plan.products(bundle) == [] and trt_plan.product_for(bundle, 90, ["tensorrt"]) is None
    assert runtime_engines.choose(bundle) == "ort" and runtime_engines.most_sequences(bundle, "trt") is runtime_engines.most_sequences(bundle, "auto") is None
    here = engine_here(bundle, [{"arch": "sm_90"}])
    assert here["engine"] is None and "TensorRT" in here["why"]
    with pytest.raises(UserError, match="the bundle has no TensorRT engine"):
        trt_plan.choose(bundle, "10.9.0", "sm_90")
    adds = bundle.size(f"{FOLDER}/engine.json") + bundle.size(f"{FOLDER}/model.onnx") + bundle.size(f"{FOLDER}/model.onnx.data")
    assert describe_bundle(bundle.path)["engine_bytes"] == {"ort-fp16": adds} == {"ort-fp16": to_ort.build_ort(bundle).prepared.added_bytes}

    def inspected() -> str:
        main(["inspect", str(bundle.path)])
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    text = inspected()
    assert f"engines ort-fp16 (adds {adds / 1000:.2f} kB)" in text and f"for ONNX Runtime {FOLDER}, layers by the library (SessaLastLogits 1, " in text
    assert "engine for this machine" not in text
    main(["run", str(bundle.path), "--prompt-ids", "1 2 3", "--max-new-tokens", "2", "--backend", "ort"])
    plain = capsys.readouterr().out
    engine = trt_plan.EngineInfo("k", "0" * 64, 4, "10.9.0", "sm_90", "gpu", "1", "fp16", 1, 8, 8, "0" * 64, 1.0)
    bundle = add_files(bundle, {"engines/sm_90-10.9.0-fp16/engine.json": engine.to_json(), "engines/sm_90-10.9.0-fp16/model.plan": b"plan"})
    assert list(trt_plan.engines(bundle)) == ["engines/sm_90-10.9.0-fp16"] and trt_plan.products(bundle) == ["tensorrt"]
    assert runtime_engines.most_sequences(bundle, "trt") == 1 and trt_plan.choose(bundle, "10.9.0", "sm_90")[1] == engine
    assert not to_ort.build_ort(bundle).fresh and "engine for this machine" in inspected()
    main(["run", str(bundle.path), "--prompt-ids", "1 2 3", "--max-new-tokens", "2", "--backend", "ort"])
    assert capsys.readouterr().out == plain
    bundle = add_files(bundle, {f"{FOLDER}/engine.json": b"{}"})
    assert list(trt_plan.engines(bundle)) == ["engines/sm_90-10.9.0-fp16"] and "for ONNX Runtime none: " in inspected()

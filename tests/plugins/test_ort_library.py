"""libsessa_ort.so: built from source, loaded by the real ONNX Runtime on a CPU, and called through a C API of the test's own.

SESSA_ORT_INCLUDE: folder of onnxruntime_c_api.h, of ONNX Runtime 1.18 or later; `fetch`: it is fetched by its tag. What needs neither comes last.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import plugin_harness as ph
import pytest
from command import call
from node_models import OPEN, SIZES, node_model
from plugin_harness import BFLOAT, CAUSAL, FEEDBACK, FLOAT, HALF, NAMES, OPERANDS, Built, Pointers, create, headed, sizes

from sessa_deploy.contract import ORT_API, PLUGIN_STATE
from sessa_deploy.errors import UserError
from sessa_deploy.plugins import library, ops
from sessa_deploy.runtime.device.kernels import images

STORAGES = {FLOAT: "tensor(float)", HALF: "tensor(float16)", BFLOAT: "tensor(bfloat16)"}
DOUBLE, INT64 = 11, 7


def open_session(path: Path, model: bytes) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    assert library.register(options, path) == path
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_it_stands_alone(ort_stub: Built) -> None:
    """It links nothing of ONNX Runtime or CUDA, exports what is asked of it and no more, and stays loaded, with the kernels it gave to a GPU."""
    path = ort_stub[1]
    seen = library.check(path, product="ort")
    assert (seen.path, seen.interface, seen.major, seen.archs, seen.ops) == (path, "ort", ORT_API, (90,), library.OPS)
    with pytest.raises(UserError, match="not a TensorRT plugin library"):
        library.check(path)
    if shutil.which("nm") and shutil.which("readelf"):
        exports = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        door = {"sessaFindCubin", "sessaCubinTile", "sessaOpName", "sessaStateVersion"}
        assert {line.split()[-1] for line in exports.splitlines()} == {"RegisterCustomOps", "sessaOrtApiVersion", *door}
        linked = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"NEEDED.*(onnxruntime|libcuda|cudart|stdc\+\+)", linked) and "NODELETE" in linked


def test_every_operation_gives_the_graph_its_types_and_shapes(ort_stub: Built) -> None:
    """float32 outputs are float32 in a 16-bit graph; shapes follow from the inputs', named dimensions by name; what cannot be known is left open."""
    forms = [(op, weights) for op in ops.OPS for weights in ((0,) if op.quantised is None else (0, 3, 17))]
    for op, weights in forms:
        for storage in STORAGES:
            outputs = open_session(ort_stub[1], node_model(op, storage, weights=weights)).get_outputs()
            assert [x.name for x in outputs] == [x.name for x in op.outputs]
            for found, wanted in zip(outputs, op.outputs, strict=True):
                assert found.type == (STORAGES[storage] if wanted.kind == "storage" else STORAGES[FLOAT]), (op.name, wanted.name)
                assert found.shape == [OPEN.get(c, SIZES[c]) for c in wanted.shape], (op.name, wanted.name)
    norm = ops.op("SessaNorm")
    assert open_session(ort_stub[1], node_model(norm, HALF, {"B": 3, "T": 1})).get_outputs()[0].shape == [3, 1, 64]
    for shape in ([None, None, 64], None):  # a dimension without a name, no shape at all
        found = open_session(ort_stub[1], node_model(norm, HALF, shapes={"x": shape})).get_outputs()[0]
        assert (found.type, found.shape) == (STORAGES[HALF], [])
    # one input says what another leaves open, whichever comes first
    feedback = ops.op("SessaFeedbackAttention")
    for rows, length in (("b", 7), (7, "b")):
        found = open_session(ort_stub[1], node_model(feedback, FLOAT, shapes={"q": [rows, "t", 64], "past_length": [length]})).get_outputs()[0]
        assert found.shape == [7, "t", 64]


WRONG = [
    ("SessaNorm", HALF, {"shapes": {"weight": [5]}}, r"SessaNorm: node layers.0: weight: got shape \(5\); allowed: \(64\) to match x"),
    ("SessaNorm", HALF, {"shapes": {"weight": [64, 1]}}, r"SessaNorm: node layers.0: weight: got shape \(64,1\); allowed: rank 1"),
    ("SessaNorm", HALF, {"sizes": {"D": 24}}, r"width D: got 24; allowed: a multiple of 16 up to 4096$"),
    ("SessaNorm", HALF, {"sizes": {"B": 0}}, r"batch B: got 0; allowed: 1 to 65535$"),
    ("SessaCausalAttention", BFLOAT, {"sizes": {"H": 3}}, r"heads Hq: got 3; allowed: a multiple of Hkv up to 65535$"),
    ("SessaCausalAttention", HALF, {"sizes": {"C": 264}}, r"head width d: got 264; allowed: a multiple of 8 up to 256$"),
    ("SessaProjectGain", HALF, {"sizes": {"N": 5}}, r"rows of weight: got 5; allowed: 3 D \+ 2 Hkv d = 256$"),
    ("SessaFeedbackAttention", HALF, {"shapes": {"past_k": [2, 9, 64], "past_s": [2, 7, 64]}}, r"past_s: got shape \(2,7,64\); allowed: \(2,9,64\)"),
    ("SessaNorm", HALF, {"types": {"weight": FLOAT}}, "no kernel def matches node inputs for Op: SessaNorm"),
    ("SessaNorm", HALF, {"types": {"weight": INT64}}, r"'tensor\(int64\)' of input parameter \(weight\) of operator \(SessaNorm\)"),
    ("SessaTail", DOUBLE, {"attributes": {}}, r"'tensor\(double\)' of input parameter \(x\) of operator \(SessaTail\)"),
    ("SessaFeedbackAttention", HALF, {"types": {"gamma": HALF}}, r"'tensor\(float16\)' of input parameter \(gamma\) of operator \(SessaFeedbackAttention\)"),
    ("SessaMixer", HALF, {"attributes": {"storage": BFLOAT}}, r"SessaMixer: node layers.0: q is float(16|32); allowed: bfloat16, as attribute storage says"),
    ("SessaMixer", HALF, {"attributes": {"storage": 5}}, r"attribute storage: got 5; allowed: 1 \(float32\), 10 \(float16\), 16 \(bfloat16\), 0 \(any\)"),
    ("SessaMixer", HALF, {"attributes": {"storage": 1 << 40}}, "attribute storage: got -1; allowed: 1"),
    ("SessaMixer", HALF, {"attributes": {"storage": "half"}}, "attribute storage: allowed: one integer"),
    ("SessaNorm", HALF, {"attributes": {"epsilon": 0.0}}, r"attribute epsilon: got 0; allowed: a finite number above 0"),
    ("SessaNorm", HALF, {"attributes": {"epsilon": float("nan")}}, r"attribute epsilon: got -?nan; allowed: a finite number above 0"),
    ("SessaNorm", HALF, {"attributes": {"epsilon": [1e-5]}}, "attribute epsilon: allowed: one float32"),
    ("SessaProjectGain", HALF, {"attributes": {"gamma_max": 1}}, "attribute gamma_max: allowed: one float32"),
    ("SessaProjectGain", HALF, {"attributes": {"gamma_max": 1.5}}, r"attribute gamma_max: got 1.5; allowed: a number above 0, up to 1"),
    ("SessaCausalAttention", HALF, {"attributes": {"scale": "1"}}, "attribute scale: allowed: one float32"),
    ("SessaLogits", HALF, {"weights": 3, "shapes": {"weight": [256, 64]}}, r"weight: got shape \(256,64\); allowed: \(256,32\) to match x"),
    ("SessaLogits", HALF, {"weights": 17, "shapes": {"weight_scale": [64]}}, r"weight_scale: got shape \(64\); allowed: \(256\) to match x"),
    ("SessaLinearHeads", HALF, {"weights": 3, "sizes": {"D": 96}}, r"heads x head width: got 64; allowed: D = 96"),
    ("SessaLogits", HALF, {"attributes": {"storage": HALF, "weights": 2}}, r"attribute weights: got 2; allowed: 3 \(int8\), 17 \(float8e4m3fn\), 0"),
    ("SessaLogits", HALF, {"attributes": {"weights": 3.0}}, "attribute weights: allowed: one integer"),
    ("SessaNorm", HALF, {"attributes": {"weights": 3}}, "attribute weights: got 3; allowed: 0: it has no matrix of weights"),
    ("SessaLogits", HALF, {"attributes": {"storage": HALF, "weights": 3}}, r"inputs with attribute weights = 3: got 2; allowed: 3, the last of them weight_s"),
    ("SessaLogits", HALF, {"weights": 3, "attributes": {"storage": HALF}}, r"inputs with attribute weights = 0: got 3; allowed: 2, the last of them weight"),
    ("SessaLogits", HALF, {"weights": 3, "types": {"weight_scale": HALF}}, r"'tensor\(float16\)' of input parameter \(weight_scale\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "storage", "change", "says"), WRONG, ids=lambda x: str(x)[:40] if isinstance(x, (str, dict)) else None)
def test_a_wrong_node_is_refused_when_the_session_is_made(ort_stub: Built, name: str, storage: int, change: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        open_session(ort_stub[1], node_model(ops.op(name), storage, **change))


def test_a_cpu_takes_a_graph_to_look_at_and_does_not_run_it(ort_stub: Built) -> None:
    numpy = pytest.importorskip("numpy")
    session = open_session(ort_stub[1], node_model(ops.op("SessaNorm"), FLOAT, attributes={}))
    feeds = {"x": numpy.zeros((1, 1, 64), "float32"), "weight": numpy.zeros(64, "float32"), "bias": numpy.zeros(64, "float32")}
    with pytest.raises(Exception, match=r"SessaNorm: got CPUExecutionProvider; allowed: CUDAExecutionProvider.*; fix: .*pip install onnxruntime-gpu"):
        session.run(None, feeds)


def test_an_older_onnx_runtime_is_told_so(ort_stub: Built) -> None:
    text = ctypes.create_string_buffer(256)
    for newest in (1, 11, ORT_API - 1):
        ort_stub[2].harness_register(str(ort_stub[1]).encode(), newest, text)
        assert text.value.decode() == "libsessa_ort.so: got ONNX Runtime 1.17.3; allowed: 1.18 or later; fix: pip install --upgrade onnxruntime-gpu"
    ort_stub[2].harness_register(str(ort_stub[1]).encode(), ORT_API, text)
    assert text.value == b"" and ort_stub[2].harness_held() == 0


@pytest.mark.parametrize("op", NAMES, ids=NAMES.values())
def test_types_and_attributes(ort_stub: Built, op: int, capfd: pytest.CaptureFixture[str]) -> None:
    """An operation a storage type; every attribute in its range, by its own name; nothing of the API is kept."""
    harness = ort_stub[2]
    node = create(ort_stub, op)
    assert node is not None
    longest, more = (op, 0) if ops.OPS[op].quantised is None else (ph.at(op, 3), 1)  # with the scales that a node may leave out
    for storage in STORAGES:
        assert harness.harness_formats(node, longest, storage, 1) == (1 << OPERANDS[op] + more) - 1
    harness.harness_destroy(node)
    for weights in (3, 17) if more else ():
        node = create(ort_stub, op, HALF, weights=weights)
        assert node is not None
        harness.harness_destroy(node)
    for attribute in ops.OPS[op].attributes:
        assert create(ort_stub, op, HALF, attribute.name, 0.25) is not None
        for wrong in (-1.0, float("inf"), float("nan"), *((2.0,) if attribute == ops.GAMMA_MAX else ())):
            capfd.readouterr()
            assert create(ort_stub, op, HALF, attribute.name, wrong) is None
            said = capfd.readouterr().err
            assert f"{NAMES[op]}: attribute {attribute.name}: got " in said and f"; allowed: {attribute.allowed}" in said
    assert create(ort_stub, op, storage=5) is None and harness.harness_held() == 0


@pytest.mark.parametrize(
    ("op", "onnx", "shape", "says"),
    [(FEEDBACK, HALF, sizes(1, 1, 16, 24), "width D: got 24; allowed: a multiple of 16 up to 4096"),
     (FEEDBACK, HALF, sizes(0, 1, 16, 32), "batch B: got 0; allowed: 1 to 65535"),
     (FEEDBACK, INT64, sizes(1, 1, 16, 32), "q is ONNX type 7; allowed: float32"),
     (CAUSAL, HALF, headed(1, 1, 16, 20, 2, 2), "head width d: got 20; allowed: a multiple of 8 up to 256"),
     (CAUSAL, HALF, headed(1, 1, 16, 64, 3, 2), "heads Hq: got 3; allowed: a multiple of Hkv up to 65535"),
     (FEEDBACK, HALF, sizes(1, 1, 16, 32), ""), (CAUSAL, HALF, headed(1, 1, 16, 64, 2, 2), "")],
)  # fmt: skip
def test_wrong_calls_are_messages_not_crashes(ort_stub: Built, op: int, onnx: int, shape: Any, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The last two: no driver, or null pointers."""
    harness = ort_stub[2]
    node = create(ort_stub, op)
    capfd.readouterr()
    assert harness.harness_enqueue(node, op, onnx, shape, Pointers(), None) != 0
    said = capfd.readouterr().err
    assert f"{NAMES[op]}: " in said and says in said
    harness.harness_destroy(node)
    assert harness.harness_held() == 0


def test_a_sessions_nodes_share_a_workspace_for_each_stream(ort_stub: Built, capfd: pytest.CaptureFixture[str]) -> None:
    """It grows and never moves, for a captured graph may hold its address; and goes with the last node. Without memory the call is an error in words."""
    harness = ort_stub[2]
    node = create(ort_stub, FEEDBACK, storage=HALF)
    small, large, larger = (sizes(1, 300, 64, width) for width in (256, 1024, 1040))
    needs = [harness.harness_workspace(node, FEEDBACK, HALF, x) for x in (small, large, larger)]
    assert 0 < needs[0] < needs[1] < needs[2] < 1.5 * needs[1]
    calls = [(small, 1), (small, 1), (large, 1), (small, 1), (large, 1), (larger, 1), (large, 2), (small, 2), (small, 0)]
    shapes = (ctypes.c_int64 * (len(calls) * len(ops.SIZES)))(*(x for shape, _ in calls for x in shape))
    asked = (ctypes.c_int64 * len(calls))()
    held = harness.harness_session(node, FEEDBACK, HALF, len(calls), shapes, (ctypes.c_int64 * len(calls))(*(stream for _, stream in calls)), asked)
    assert list(asked) == [needs[0], 0, needs[1], 0, 0, needs[1] * 3 // 2, needs[1], 0, needs[0]] and held == 5
    capfd.readouterr()
    assert harness.harness_workspace(node, FEEDBACK, HALF, large) == needs[1]
    assert f"SessaFeedbackAttention: no memory for a workspace of {needs[1]} bytes: the arena is full" in capfd.readouterr().err
    harness.harness_destroy(node)
    assert harness.harness_held() == 0


def test_sessions_share_no_workspace(ort_stub: Built) -> None:
    """Two in one process, one of them gone while the other runs, and a third whose allocator lies where the first's did."""
    harness = ort_stub[2]
    node = create(ort_stub, FEEDBACK, storage=HALF)
    assert harness.harness_sessions(node, FEEDBACK, HALF, sizes(1, 300, 64, 256)) == 0b1111
    harness.harness_destroy(node)
    assert harness.harness_held() == 0


def test_the_command_line_checks_it(ort_stub: Built, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ort_stub[1])
    runtime = pytest.importorskip("onnxruntime")
    says = rf"C API of ONNX Runtime 1.18 and later, {len(ops.OPS)} operations, sm_90, \d+.\d MiB, loads; ONNX Runtime {re.escape(runtime.__version__)} takes it"
    monkeypatch.setenv(library.ORT_ENVIRONMENT, path)
    for args in (["check", path], ["check", "--for", "ort"], ["check", path, "--for", "ort"]):
        assert call("plugin", *args) == 0
        assert re.fullmatch(rf"{re.escape(path)}: {says}\n", capsys.readouterr().out)
    assert call("plugin", "path", "--for", "ort") == 0 and capsys.readouterr().out == f"{path}\n"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert call("plugin", "check", path) == 0 and "no ONNX Runtime is here to take it (pip install 'sessa-deploy[cuda]')" in capsys.readouterr().out


# --- without a header


def test_a_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(library.ORT_ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "user_folder", lambda: tmp_path)
    monkeypatch.setattr(library, "_HERE", tmp_path / "wheel")
    monkeypatch.setenv(library.ENVIRONMENT, str(tmp_path / "trt.so"))  # TensorRT's alone
    for args in (["path", "--for", "ort"], ["check", "--for", "ort"]):
        assert call("plugin", *args) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: no library of kernels for ONNX Runtime: got ") and said.endswith("; fix: sessa-deploy plugin build --for ort\n")
    built, wheel = tmp_path / "ort" / library.ORT_LIBRARY, tmp_path / "wheel/lib/ort" / library.ORT_LIBRARY
    for path in (wheel, built):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"not a library")
        assert library.find(product="ort") == path
    with pytest.raises(UserError, match=r"the library for ONNX Runtime cannot be loaded.*fix: sessa-deploy plugin build --for ort"):
        library.check(product="ort")
    monkeypatch.setenv(library.ORT_ENVIRONMENT, str(tmp_path / "elsewhere.so"))
    with pytest.raises(UserError, match=r"elsewhere\.so"):
        library.find(product="ort")


def test_another_library_is_refused(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    old = ('void RegisterCustomOps() {} int sessaOrtApiVersion() { return 18; } '
           'char const* sessaOpName(int i) { return i == 0 ? "SessaEnter" : nullptr; }')  # fmt: skip
    names = ", ".join(f'"{name}"' for name in library.OPS)
    same = f"static char const* all[] = {{{names}, 0}}; " + old.replace('i == 0 ? "SessaEnter" : nullptr', "all[i]")
    last = f"int sessaStateVersion() {{ return {PLUGIN_STATE - 1}; }}"
    for source, says in (
        ("", "not a library for ONNX Runtime"),
        (old, "built by another sessa-deploy: got .* with SessaEnter"),
        (same, f"built by another sessa-deploy: got .*, operations of no state; allowed: state {PLUGIN_STATE};"),
        (same + last, f"built by another sessa-deploy: got .*, operations of state {PLUGIN_STATE - 1}; allowed: state {PLUGIN_STATE};"),
    ):
        path = tmp_path / f"{len(source)}.so"
        subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)], input=f'extern "C" {{ {source} }}', text=True, check=True)
        for look in (lambda path=path: library.check(path, product="ort"), lambda path=path: library.register(None, path)):
            with pytest.raises(UserError, match=f"{says}.*fix: sessa-deploy plugin build --for ort"):
                look()


def test_a_library_that_was_cut_short_is_a_message_and_does_not_end_the_process(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    whole, cut = tmp_path / "whole.so", tmp_path / "cut.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(whole)], input="char held[200000] = {1};", text=True, check=True)
    data = whole.read_bytes()
    stripped = data[:40] + bytes(8) + data[48:60] + bytes(4) + data[64:]  # no table of sections, which comes last
    for text, size in [*((data, size) for size in (0, 3, 64, 200, 5000, 100_000, 190_000, len(data) - 1)), (stripped, 100_000)]:
        cut.write_bytes(text[:size])
        for product, kind in (("ort", "library for ONNX Runtime"), ("tensorrt", "plugin library")):
            with pytest.raises(UserError, match=f"the {kind} cannot be loaded: got .*too short.*; fix: sessa-deploy plugin build"):
                library.check(cut, product=product)
        with pytest.raises(UserError, match=r"holds no decode kernels: got .*too short"):
            images(cut, 90)
    with pytest.raises(UserError, match="not a TensorRT plugin library"):
        library.check(whole)
    with pytest.raises(UserError, match=r"cannot be loaded: got .*No such file"):
        library.check(tmp_path / "absent.so")


@pytest.mark.parametrize(
    ("args", "says"),
    [(["build", "--for", "ort", "--tensorrt", "10"], "the library for ONNX Runtime has no TensorRT major: got --tensorrt 10"),
     (["build", "--for", "ort", "--tensorrt-include", "x"], "--tensorrt-include is of another library: got --for ort; allowed: --for tensorrt or rtx"),
     (["build", "--for", "ort", "--cuda-include", "x"], "--cuda-include is of another library: got --for ort"),
     (["build", "--onnxruntime-include", "x"], "--onnxruntime-include is of another library: got no --for; allowed: --for ort"),
     (["build", "--for", "rtx", "--onnxruntime-include", "x"], "--onnxruntime-include is of another library: got --for rtx"),
     (["path", "--for", "ort", "--tensorrt", "10"], "the library for ONNX Runtime has no TensorRT major"),
     (["check", "--for", "ort", "--tensorrt", "10"], "the library for ONNX Runtime has no TensorRT major")],
)  # fmt: skip
def test_options_of_another_library_are_refused(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plugin", *args) == 2
    assert says in capsys.readouterr().err


def header(folder: Path, version: int | None) -> Path:
    """A folder that looks like that of a header of this version of the C API; None: of none."""
    folder.mkdir()
    (folder / "onnxruntime_c_api.h").write_text("" if version is None else f"#pragma once\n#define ORT_API_VERSION {version}\n")
    return folder


@pytest.mark.parametrize("version", [None, 17])
def test_a_header_that_is_too_old_is_refused(tmp_path: Path, version: int | None) -> None:
    with pytest.raises(UserError, match=r"the header of another ONNX Runtime: got C API (17|unknown) in .*; allowed: .* ONNX Runtime 1.18 or later"):
        library.build(cubins=tmp_path, product="ort", onnxruntime_include=header(tmp_path / "x", version))
    with pytest.raises(UserError, match="no header of ONNX Runtime"):
        library.build(cubins=tmp_path, product="ort", onnxruntime_include=tmp_path)
    library._check_api(header(tmp_path / "oldest", ORT_API))  # which serves


def test_headers_decide_what_is_built(tmp_path: Path) -> None:
    """Those of one of the two: that one; of both: both."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("no cmake or no g++")
    ort, trt = header(tmp_path / "ort", ORT_API), tmp_path / "trt"
    trt.mkdir()
    (trt / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10\n")
    (tmp_path / "cubins.inc").write_text("")
    said, fixed = [], [f"-DSESSA_PYTHON={sys.executable}", f"-DSESSA_CUBIN_DIR={tmp_path}"]
    for options in ([f"-DONNXRUNTIME_INCLUDE_DIR={ort}"], [f"-DTENSORRT_INCLUDE_DIR={trt}"],
                    [f"-DTENSORRT_INCLUDE_DIR={trt}", f"-DONNXRUNTIME_INCLUDE_DIR={ort}"], ["-DSESSA_TARGETS=trt"]):  # fmt: skip
        command = ["cmake", "-S", str(ph.SOURCES), "-B", str(tmp_path / str(len(said))), *fixed, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        said.append(("-- TensorRT 10 from" in done.stdout, f"-- ONNX Runtime, C API {ORT_API}, from" in done.stdout, done.returncode == 0))
    assert said == [(False, True, True), (True, False, True), (True, True, True), (False, False, False)]
    assert "got SESSA_TARGETS=trt; allowed: tensorrt, ort" in done.stderr


def test_the_header_is_fetched_by_its_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest that serves; where nothing can be fetched the error names the folder to give. Git is one that notes what is asked and fails."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    git = tmp_path / "git"
    git.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$1" = --version ] && echo "git version 2.40.0" && exit 0\nexit 1\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ONNXRUNTIME_ROOT", str(tmp_path))  # an installed one that is too old is passed over
    header(tmp_path / "include", 17)
    (tmp_path / "cubins").mkdir()
    with pytest.raises(UserError, match=r"header of ONNX Runtime \(v1.18.0\) could not be fetched.*fix: .* --for ort --onnxruntime-include DIR"):
        library.build(cubins=tmp_path / "cubins", out=tmp_path / "lib", product="ort")
    asked = (tmp_path / "asked").read_text()
    assert "clone" in asked and "--branch v1.18.0 https://github.com/microsoft/onnxruntime.git" in asked and not (tmp_path / "lib").exists()

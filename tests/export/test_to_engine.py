"""Building an engine, on a fake tensorrt: the graph the parser gets, what is asked of the builder, keys, estimates and every refusal."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest
from engine_models import CONFIG
from fake_tensorrt import HostCuda

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.export import to_engine
from sessa_deploy.export.trt import check as trt_check
from sessa_deploy.export.trt import limits as trt_limits
from sessa_deploy.export.trt.limits import Machine, Recipe, Shapes
from sessa_deploy.plugins import library
from sessa_deploy.plugins import ops as plugin_ops
from sessa_deploy.runtime.bundle import Bundle, add_files, write_bundle
from sessa_deploy.runtime.trt import plan as trt_plan

HERE = Machine("Fake GPU 1", "sm_90", 1 << 34, 1 << 34, "8.6.0", "12.8")


@pytest.fixture
def bundle(models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Bundle]:
    def make(precision: str = "fp32", name: str = "bundle") -> Bundle:
        return write_bundle(tmp_path / name, {contract.MODEL_FILE: models(precision if precision != "bf16" else "fp16")}, CONFIG, precision, {})

    return make


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Install a fake tensorrt of a version, with its plugin and machine; returns the module."""
    plugin = tmp_path / "libsessa_plugin.so"
    plugin.write_bytes(b"plugin")
    monkeypatch.setattr(library, "load", lambda trt, path=None, major=None: plugin)
    monkeypatch.setattr(to_engine, "timing_cache_file", lambda machine: tmp_path / "cache" / "timing.cache")

    def install(version: str = "8.6.0", machine: Machine = HERE, **options: Any) -> Any:
        trt = fake_tensorrt.make(version, HostCuda(), **options)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setattr(to_engine, "this_machine", lambda module, targets=(): dataclasses.replace(machine, tensorrt=version))
        return trt

    return install


@pytest.mark.parametrize("version", ["8.6.0", "10.9.0", "11.4.0"])
def test_what_the_builder_is_asked(fake: Callable[..., Any], bundle: Callable[..., Bundle], version: str) -> None:
    trt = fake(version)
    seen: list[str] = []
    built = to_engine.build_engine(bundle("fp16"), 4, 24, 64, workspace=1 << 20, opt_level=2, progress=lambda what, done, of: seen.append(what),
                                    layers="tensorrt")
    config, network = trt.calls.config, trt.calls.network
    assert built.fresh and built.folder == f"engines/sm_90-{version}-fp16" and built.info.capacity == 24 and built.info.max_prompt == 24
    assert Bundle.open(built.bundle.path).sha256(f"{built.folder}/model.plan") == built.info.plan_sha256
    prefill, decode, rows = config.profiles
    assert prefill["input_ids"] == [(1, 1), (4, 24), (4, 24)] and decode["input_ids"] == [(1, 1), (4, 1), (4, 1)]
    assert rows["input_ids"] == [(1, 2), (4, 9), (4, 16)] and built.info.rows_profile == 2 and rows["past.0.s"] == prefill["past.0.s"]
    assert prefill["past.0.s"] == decode["past.0.s"] == [(1, 24, 16), (4, 24, 16), (4, 24, 16)] and prefill["past.1.v_f"][1] == (4, 24, 2, 4)
    assert prefill["past_length"] == [(1,), (4,), (4,)] and "TF32" in config.cleared
    assert config.pools == {"WORKSPACE": 1 << 20} and config.builder_optimization_level == 2
    pinned = [x for x in network.layers if x.precision is not None]
    if version.startswith("8"):
        assert network.flags == 1 and config.flags == {"FP16", "OBEY_PRECISION_CONSTRAINTS"} and config.sources == 0b011
        ops = {x.node.op_type for x in pinned}
        assert {"Softmax", "Tanh", "Cos", "Sin"} <= ops and not ops & {"Shape", "Constant", "Cast", contract.FEEDBACK_OP, "LayerNormalization"}
        assert all(x.kinds == {0: trt.float32} for x in pinned)
        assert not any(x.node.op_type == "MatMul" and "q_proj" in x.name for x in pinned)
    else:
        assert network.flags == 2 and config.flags == {"STRICT_NANS"} and not pinned and config.progress_monitor is not None
    assert seen[0] == "reading the graph" and seen[-1] == "checking the engine"


@pytest.mark.parametrize(("version", "precision", "asked", "layers"), [
    ("8.6.0", "fp16", None, "plugin"), ("8.6.0", "fp16", "tensorrt", "tensorrt"), ("8.6.0", "fp32", None, "tensorrt"), ("10.9.0", "fp16", None, "plugin"),
    ("11.4.0", "fp16", None, "plugin"), ("11.4.0", "fp32", None, "tensorrt"), ("10.9.0", "fp16", "plugin", "plugin"),
    ("11.4.0", "fp16", "tensorrt", "tensorrt")])
def test_who_computes_the_layers(fake: Callable[..., Any], tmp_path: Path, version: str, precision: str, asked: str | None, layers: str) -> None:
    """The plugin library in 16 bits, with every TensorRT: its decode step is the tuned one; and TensorRT where it is asked for."""
    torch = pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    trt, config = fake(version), dataclasses.replace(CONFIG, d_model=32)
    torch.manual_seed(3)
    model = export_onnx(SessaLM(config), tmp_path / "model.onnx", precision)
    built = to_engine.build_engine(write_bundle(tmp_path / "bundle", {contract.MODEL_FILE: model}, config, precision, {}), layers=asked)
    ops = {x.node.op_type for x in trt.calls.network.layers}
    assert built.info.layers == layers and (contract.TAIL_OP in ops) == (layers == "plugin") and ("MatMul" in ops) == (layers == "tensorrt")
    assert (contract.ROTARY_OP in ops) == ("Cos" not in ops) == (asked != "tensorrt")
    tuned, single = "its kernels are the tuned ones", "the graph is float32, and the library's kernels around the attentions store 16 bits"
    ours = "layers: by the plugin library ({}; --layers tensorrt gives TensorRT's own)"
    said = {("8.6.0", "fp16"): ours.format("TensorRT 8.6.0 would compute them in float32"), ("8.6.0", "fp32"): f"layers: by TensorRT ({single})",
            ("10.9.0", "fp16"): ours.format(tuned), ("11.4.0", "fp16"): ours.format(tuned), ("11.4.0", "fp32"): f"layers: by TensorRT ({single})"}
    assert built.notes == ((said[version, precision],) if asked is None else ())
    with pytest.raises(UserError, match="--layers is none of ours: got 'torch'; allowed: plugin, tensorrt"):
        to_engine.build_engine(built.bundle, layers="torch")


def test_layers_that_cannot_be_had_are_refused(fake: Callable[..., Any], bundle: Callable[..., Bundle]) -> None:
    """With the reason and the command, before and after an engine is there; where nothing was asked for, a line says what was built instead."""
    trt = fake()
    single, half = bundle("fp32"), bundle("fp16", "half")
    with pytest.raises(UserError, match=r"--layers plugin cannot be had: got the graph is float32.*fix: sessa-deploy build .*bundle --layers tensorrt"):
        to_engine.build_engine(single, layers="plugin")
    assert trt.calls.config is None and Bundle.open(single.path).names() == [contract.MODEL_FILE]
    built = to_engine.build_engine(half)
    assert built.info.layers == "tensorrt" and built.info.inlined == [contract.CAUSAL_OP]
    assert built.notes == (
        "SessaCausalAttention: standard operators in place of the plugin (head width d: got 4; allowed: a multiple of 8 up to 256)",
        "layers: by TensorRT (head width d: got 4; allowed: a multiple of 8 up to 65536)",
    )
    with pytest.raises(UserError, match="--layers plugin cannot be had: got head width d: got 4"):
        to_engine.build_engine(built.bundle, layers="plugin")
    assert not to_engine.build_engine(built.bundle).fresh


@pytest.mark.parametrize("d_model", [4112, 8192, 24])
def test_widths_beyond_the_kernels_are_refused_at_once(fake: Callable[..., Any], models: Callable[[str], Path], tmp_path: Path, d_model: int) -> None:
    fake()
    config = dataclasses.replace(CONFIG, d_model=d_model, n_kv_heads=4)
    with pytest.raises(UserError, match=f"does not run in TensorRT: got d_model={d_model}.*allowed: d_model a multiple of 16 up to 4096"):
        to_engine.build_engine(write_bundle(tmp_path / "wide", {contract.MODEL_FILE: models("fp32")}, config, "fp32", {}))


def test_an_fp32_build_pins_nothing_and_clears_tf32(fake: Callable[..., Any], bundle: Callable[..., Bundle]) -> None:
    trt = fake()
    to_engine.build_engine(bundle("fp32"))
    assert not trt.calls.config.flags and "TF32" in trt.calls.config.cleared and all(x.precision is None for x in trt.calls.network.layers)


def test_the_same_engine_is_kept_and_any_change_builds(fake: Callable[..., Any], bundle: Callable[..., Bundle]) -> None:
    fake()
    first = to_engine.build_engine(bundle())
    again = to_engine.build_engine(first.bundle.path)
    assert first.fresh and not again.fresh and again.info == first.info
    assert to_engine.build_engine(first.bundle.path, force=True).fresh and to_engine.build_engine(first.bundle.path, max_batch=2).fresh
    assert list(trt_plan.engines(Bundle.open(first.bundle.path))) == [first.folder]


def test_an_engine_of_before_is_refused_with_the_command(fake: Callable[..., Any], bundle: Callable[..., Bundle]) -> None:
    """Its plan holds plugins in a form that the library no longer reads: said before TensorRT sees it, and the next build replaces it."""
    fake()
    built = to_engine.build_engine(bundle())
    old = {**json.loads(built.info.to_json()), "schema_version": 2}
    path = add_files(built.bundle, {f"{built.folder}/{trt_plan.ENGINE_FILE}": json.dumps(old).encode()}).path
    with pytest.raises(UserError, match=r"of this version: got schema_version 2; allowed: schema_version 3; fix: sessa-deploy build .* --force"):
        trt_plan.choose(Bundle.open(path), "8.6.0", "sm_90")
    assert to_engine.build_engine(path).fresh and trt_plan.choose(Bundle.open(path), "8.6.0", "sm_90")[0] == built.folder
    for state in (None, contract.PLUGIN_STATE - 1):
        old = {k: v for k, v in (json.loads(built.info.to_json()) | {"state": state}).items() if v is not None}
        bundle_of_before = add_files(Bundle.open(path), {f"{built.folder}/{trt_plan.ENGINE_FILE}": json.dumps(old).encode()})
        said = rf"plugins of another version: got {'no state' if state is None else f'state {state}'}; allowed: state {contract.PLUGIN_STATE}; fix: .* --force"
        with pytest.raises(UserError, match=said):
            trt_plan.choose(bundle_of_before, "8.6.0", "sm_90")
    assert to_engine.build_engine(path, force=True).fresh and trt_plan.choose(Bundle.open(path), "8.6.0", "sm_90")[1].state == contract.PLUGIN_STATE


def test_the_key_covers_everything(bundle: Callable[..., Bundle]) -> None:
    base, one, other = Recipe(Shapes(1, 32, 8), HERE), bundle("fp32"), bundle("fp16", "other")
    changes: list[dict[str, Any]] = [*({"shapes": s} for s in (Shapes(2, 32, 8), Shapes(1, 31, 8), Shapes(1, 32, 9))), {"workspace": 1}, {"opt_level": 3},
               {"layers": "tensorrt"}, *({"machine": dataclasses.replace(HERE, **{f: "x"})} for f in ("arch", "tensorrt", "driver"))]  # fmt: skip
    recipes = [base.keyed(one, "p"), base.keyed(one, "q"), base.keyed(other, "p"), *(dataclasses.replace(base, **c).keyed(one, "p") for c in changes)]
    assert len({r.key for r in recipes}) == len(recipes)
    assert dataclasses.replace(base, machine=dataclasses.replace(HERE, free=1)).keyed(one, "p").key == recipes[0].key == recipes[0].keyed(one, "p").key


def test_the_estimate_says_what_to_lower(fake: Callable[..., Any], bundle: Callable[..., Bundle]) -> None:
    big = SessaConfig(d_model=1024, n_layers=24, n_heads=16, vocab_size=50257, max_context=32768)
    parts = trt_limits.estimate(big, "fp16", 700 << 20, Shapes(32, 8192, 512))
    assert parts["caches"] == 32 * 8192 * 24 * 4 * 1024 * 2 and sum(parts.values()) > parts["caches"]
    with pytest.raises(UserError, match=r"most of it for caches.*--max-context \d+ or --max-batch \d+") as caught:
        trt_limits.require_memory(big, "fp16", 700 << 20, Shapes(32, 8192, 512), 24 << 30)
    batch = int(str(caught.value).rpartition("--max-batch ")[2])
    assert trt_limits.require_memory(big, "fp16", 700 << 20, Shapes(batch, 8192, 512), 24 << 30) > 0
    with pytest.raises(UserError, match="GPU with more memory"):
        trt_limits.require_memory(big, "fp16", 700 << 20, Shapes(1, 1, 1), 1 << 30)
    fake(machine=dataclasses.replace(HERE, free=1 << 16))
    made = bundle()
    with pytest.raises(UserError, match="will not fit"):
        to_engine.build_engine(made)
    assert Bundle.open(made.path).names() == [contract.MODEL_FILE]


def test_every_parser_error_is_shown_with_its_node(fake: Callable[..., Any], bundle: Callable[..., Bundle]) -> None:
    fake(reject=("Tanh", "Erf"))
    with pytest.raises(UserError) as caught:
        to_engine.build_engine(bundle())
    text = str(caught.value)
    assert "(4 errors)" in text and text.count("no importer for Tanh") == text.count("no importer for Erf") == 2
    assert "layers.0.mixer.gamma_ctx/Tanh" in text or "layers.0/Tanh.0: no importer" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("version", "precision", "asked", "says"),
    [("8.6.0", "bf16", None, "no bfloat16"), ("8.6.0", "fp32", "fp16", "graph decides"), ("10.9.0", "fp32", "fp32", "strongly typed"),
     ("10.9.0", "fp32", "fp16", "strongly typed")],
)  # fmt: skip
def test_precisions_are_refused_with_the_reason(
    fake: Callable[..., Any], bundle: Callable[..., Bundle], version: str, precision: str, asked: str | None, says: str
) -> None:
    fake(version)
    with pytest.raises(UserError, match=says) as caught:
        to_engine.build_engine(bundle(precision), precision=asked)
    assert "export CHECKPOINT" in str(caught.value)


@pytest.mark.parametrize(("version", "form", "arch", "says"), [
    ("8.6.0", "int8", "sm_80", ""), ("10.9.0", "fp8", "sm_89", ""), ("11.4.0", "int8", "sm_75", ""),
    ("8.6.0", "fp8", "sm_90", "TensorRT 8.6.0 takes no weights in fp8.*allowed: int8; fix: .* --precision fp16 --weights int8$"),
    ("10.9.0", "fp8", "sm_80", "fp8 weights need a later GPU: got sm_80; allowed: sm_89 or later; fix: .* --precision fp16 --weights int8$"),
])  # fmt: skip
def test_weights_in_8_bits(fake: Callable[..., Any], tmp_path: Path, version: str, form: str, arch: str, says: str) -> None:
    """Every matrix reaches the parser packed in 16 bits, with its scales, and no operator of quantisation does."""
    torch = pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    trt, config = fake(version, dataclasses.replace(HERE, arch=arch)), dataclasses.replace(CONFIG, d_model=32)
    torch.manual_seed(3)
    opset = contract.WEIGHT_FORMATS[form].opset
    model = export_onnx(SessaLM(config), tmp_path / "model.onnx", "fp16", opset, weights=form)
    made = write_bundle(tmp_path / "bundle", {contract.MODEL_FILE: model}, config, "fp16", {}, opset, weights=contract.Weights(form))
    if says:
        with pytest.raises(UserError, match=says):
            to_engine.build_engine(made)
        assert Bundle.open(made.path).names() == [contract.MODEL_FILE]
        return
    built = to_engine.build_engine(made)
    graph = trt.calls.network.model.graph
    tensors, kind = {t.name: t for t in graph.initializer}, contract.WEIGHT_FORMATS[form].onnx
    reading = [n for n in graph.node for a in n.attribute if a.name == contract.ATTR_WEIGHTS and a.i == kind]
    assert built.info.layers == "plugin" and len(reading) == 4 * config.n_layers + 1
    assert "DequantizeLinear" not in {n.op_type for n in graph.node} and kind not in {t.data_type for t in graph.initializer}
    for node in reading:
        op = plugin_ops.op(node.op_type).form(kind)
        weight, scale = (tensors[node.input[i]] for i in ([x.name for x in op.inputs].index(contract.WEIGHT), len(op.inputs) - 1))
        assert (weight.data_type, scale.data_type) == (10, 1) and list(scale.dims) == [weight.dims[0]] and len(weight.raw_data) == weight.dims[0] * 32


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_context": 0}, {"max_prompt": -1}, {"workspace": 0}, {"opt_level": 6}, {"max_batch": True}])
def test_numbers_out_of_range_are_refused(fake: Callable[..., Any], bundle: Callable[..., Bundle], options: dict[str, Any]) -> None:
    fake()
    with pytest.raises(UserError, match="out of range"):
        to_engine.build_engine(bundle(), **options)


def test_a_copied_cache_fails_the_build(fake: Callable[..., Any], bundle: Callable[..., Bundle]) -> None:
    """Whoever copies it: a fused region has no word Reformat in its name."""
    fake(copied=("past.1.s",))
    made = bundle()
    with pytest.raises(SessaError, match=r"read by our plugins alone.*__myl_CastAdd \(kgen\) reads past.1.s"):
        to_engine.build_engine(made)
    assert Bundle.open(made.path).names() == [contract.MODEL_FILE]
    fake(copied=("past.1.k_f",))  # the inlined causal attention may convert its own caches
    assert to_engine.build_engine(made).fresh


def test_what_tensorrt_tells_of_layers_is_not_trusted_blindly() -> None:
    plugin = {"Name": "mixer [profile 1]_myl1_5", "LayerType": "custom_layer", "Inputs": [{"Name": "past.0.s [profile 1]"}]}
    told = (json.dumps({"Layers": [plugin]}), fake_tensorrt.layer_list([plugin | {"Name": "mixer"}]))
    for text in told:
        assert trt_check.wrong_readers(text, ["past.0.s"], ["mixer"]) == []
        assert trt_check.wrong_readers(text, ["past.0.s"], ["other"]) == ["mixer (custom_layer) reads past.0.s", "none of our plugins reads past.0.s"]
        assert trt_check.wrong_readers(text, ["past.1.s"], ["mixer"]) == ["none of our plugins reads past.1.s"]
    for text in ("no json", "{}", json.dumps({"Layers": ["a", "b"]}), json.dumps({"Layers": []}), "Layers:\nsomething else", ""):
        with pytest.raises(SessaError, match=r"inspector|no layers"):
            trt_check.wrong_readers(text, ["past.0.s"], ["mixer"])


def test_timings_are_kept_and_damage_is_passed_over(fake: Callable[..., Any], bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    trt = fake()
    file = tmp_path / "cache" / "timing.cache"
    to_engine.build_engine(bundle())
    assert file.read_bytes() == b"timings"
    file.write_bytes(b"damaged")
    to_engine.build_engine(bundle(), force=True)
    assert trt.calls.config.cache.data == b"" and file.read_bytes() == b"timings" and not list(file.parent.glob("*.part*"))


def test_a_failed_build_says_why(fake: Callable[..., Any], bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake()
    monkeypatch.setattr(trt.Builder, "build_serialized_network", lambda self, network, config: None)
    with pytest.raises(SessaError, match="could not build the engine"):
        to_engine.build_engine(bundle())


def test_ctrl_c_stops_a_monitored_build(fake: Callable[..., Any], bundle: Callable[..., Bundle]) -> None:
    """From version 10 on the builder asks its monitor, which says stop once the main thread was interrupted."""
    asked: list[bool] = []

    def slow(config: Any) -> None:
        monitor = config.progress_monitor
        monitor.phase_start("tactics", None, 100)
        for i in range(100):
            asked.append(monitor.step_complete("tactics", i))
            if not asked[-1]:
                return
            if i == 3:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    fake("10.9.0", on_build=slow)
    made, seen = bundle(), []
    with pytest.raises(KeyboardInterrupt):
        to_engine.build_engine(made, progress=lambda what, done, of: seen.append((what, of)))
    assert asked[-1] is False and len(asked) < 50 and ("tactics", 100) in seen
    assert Bundle.open(made.path).names() == [contract.MODEL_FILE]


CHILD = """
import sys, time
sys.path[:0] = {path!r}
import fake_tensorrt
from pathlib import Path
from sessa_deploy.export import to_engine
from sessa_deploy.plugins import library
def hang(config):
    print("building", flush=True)
    time.sleep(60)
sys.modules["tensorrt"] = fake_tensorrt.make("8.6.0", fake_tensorrt.HostCuda(), on_build=hang)
library.load = lambda trt, path=None, major=None: Path({plugin!r})
to_engine.this_machine = lambda trt, targets=(): to_engine.Machine("Fake", "sm_90", 1 << 34, 1 << 34, "8.6.0", "12.8")
from sessa_deploy.cli import main
main(["build", {bundle!r}])
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_or_killed_build_leaves_the_bundle_usable(bundle: Callable[..., Bundle], tmp_path: Path, sent: int, code: int) -> None:
    made = bundle()
    (tmp_path / "plugin.so").write_bytes(b"plugin")
    source = CHILD.format(path=[str(Path(fake_tensorrt.__file__).parent)], plugin=str(tmp_path / "plugin.so"), bundle=str(made.path))
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "building\n"
    begun = time.monotonic()
    child.send_signal(sent)
    _, errors = child.communicate(timeout=55)
    assert child.returncode == code and time.monotonic() - begun < 50
    assert sent == signal.SIGKILL or "interrupted; the bundle is as it was" in errors
    assert Bundle.open(made.path).names() == [contract.MODEL_FILE]

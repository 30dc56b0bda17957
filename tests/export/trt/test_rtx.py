"""Engines by a real strongly typed builder: TensorRT for RTX, which needs no GPU. What it says of its layers is read, not that it came to an end alone.

The plugin library is compiled against headers of TensorRT 11 where SESSA_TRT_INCLUDE has them, else against those of 10.14 that kernel-lens carries.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import Weights
from sessa_deploy.export.engine.layers import PROJECTIONS
from sessa_deploy.plugins import library
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.sizes import weight_sizes

sys.path.insert(0, str(Path(__file__).parents[2] / "plugins"))
import stub_cubins
from plugin_harness import INCLUDES, SOURCES

DEMO = str(Path(__file__).parents[3] / "checkpoints/demo")
TINY = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 257, "max_context": 64}
WIDE = {"d_model": 256, "n_layers": 1, "n_heads": 4, "vocab_size": 1024, "max_context": 64}  # its weights are most of its plan
_INLINED = [contract.CAUSAL_OP]
CASES: dict[str, dict[str, Any]] = {
    **{f"demo fp16 {layers}": {"checkpoint": DEMO, "precision": "fp16", "layers": layers} for layers in (None, "tensorrt")},
    **{f"{p} {layers}": {"config": TINY, "precision": p, "layers": layers} for p in ("fp32", "bf16") for layers in (None, "tensorrt")},
    **{f"opset {opset}": {"config": TINY, "precision": "fp16", "opset": opset} for opset in (17, 19, 21, 23)},
    "opset 23, TensorRT's layers": {"config": TINY, "precision": "bf16", "opset": 23, "layers": "tensorrt"},
    "one head": {"config": TINY | {"n_heads": 1, "n_kv_heads": 1, "n_layers": 1}, "precision": "fp16"},
    "heads of 20": {"config": TINY | {"d_model": 80, "n_kv_heads": 4, "n_layers": 1}, "precision": "fp16"},
    "heads of 144": {"config": TINY | {"d_model": 288, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1}, "precision": "bf16"},
    "no rope": {"config": TINY | {"use_forward_rope": False, "n_layers": 1}, "precision": "fp16"},
    "tied, all logits": {"config": TINY | {"tie_word_embeddings": True, "n_layers": 1}, "precision": "fp16", "all_logits": True},
    "external data": {"config": TINY, "precision": "fp16", "inline_limit": 1},
    "external data, TensorRT's layers": {"config": TINY, "precision": "fp16", "inline_limit": 1, "layers": "tensorrt"},
    **{f"wide {form}": {"config": WIDE, "precision": "fp16", **options} for form, options in (
        ("", {}), ("int8 in part", {"weights": "int8", "keep": ["lm_head", "layers.0.mixer.q_proj"]}),
        ("fp8", {"weights": "fp8", "opset": 19, "archs": [89]}))},
    "external data int8": {"config": WIDE, "precision": "bf16", "inline_limit": 1, "weights": "int8"},
}  # fmt: skip
# Where the library has no kernels for the layers, and where none for the causal attention either.
TENSORRTS = {"fp32 None", "heads of 20", "no rope", *(n for n, c in CASES.items() if c.get("layers") == "tensorrt")}


def _headers() -> tuple[Path, bool]:
    """(include folder, whether its major is another than TensorRT for RTX's). Skips where there are none."""
    if 11 in INCLUDES:
        return INCLUDES[11], False
    spec = importlib.util.find_spec("kernel_lens")
    folder = Path(spec.submodule_search_locations[0]) / "include/tensorrt" if spec and spec.submodule_search_locations else None
    if folder is None or not folder.is_dir():
        pytest.skip("no headers of TensorRT: name their folder in SESSA_TRT_INCLUDE, or pip install kernel-lens")
    return folder, True


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """(library with stubs for kernels, whether it was compiled with headers of another major)."""
    include, other = _headers()
    folder = tmp_path_factory.mktemp("rtx")
    cubins = stub_cubins.write([80, 86, 89], folder / "cubins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMAKE_BUILD_TYPE", "Debug")  # half the time to compile
        return library.build(include, SOURCES / "src/cuda", cubins, out=folder / "lib"), other


@pytest.fixture(scope="module")
def builds(plugin: tuple[Path, bool], traces: Path) -> dict[str, Any]:
    """What the builder said of each case."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("needs TensorRT for RTX: pip install 'sessa-deploy[rtx]'")
    asked = {"plugin": str(plugin[0]), "any_major": plugin[1], "traces": str(traces), "cases": CASES}
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "rtx_builds.py")], input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_an_engine_is_what_the_graph_says(builds: dict[str, Any], name: str) -> None:
    case, got = CASES[name], builds[name]
    assert "error" not in got, got.get("error")
    info, layers = got["info"], got["layers"]
    archs = case.get("archs", [80, 86])
    where = "_".join(map(str, archs))
    assert got["folder"] == f"engines/rtx-{where}-{info['tensorrt']}-{case['precision']}" and info["product"] == "rtx" and info["archs"] == archs
    assert info["layers"] == ("tensorrt" if name in TENSORRTS else "plugin")
    assert info["inlined"] == (_INLINED if name == "heads of 20" else [])
    # every plugin stands in the plan, once a profile, and nothing else reads a cache that one reads
    ours = set(got["plugin_nodes"])
    for node in ours:
        assert sum(n == node for n, _, _ in layers) == 3, node
    assert sum(info["plugins"].values()) == len(got["plugin_nodes"]) and info["profiles"]["decode"] == [[1, 1], [2, 1], [2, 1]]
    layers_of_model = CASES[name].get("config", {}).get("n_layers", 4)
    caches = ("k_b", "s") if name == "heads of 20" else ("k_f", "v_f", "k_b", "s")
    assert got["direct"] == sorted(f"past.{i}.{f}" for i in range(layers_of_model) for f in caches)
    assert {n for n, _, inputs in layers if set(inputs) & set(got["direct"])} <= ours
    assert not any("reformat" in f"{n} {kind}".lower() for n, kind, _ in layers)
    # the graph's types are the network's: ids stay 64 bits, islands of a 16-bit graph float32
    assert got["inputs"]["input_ids"] == "INT64" and got["inputs"]["past_length"] == "INT32"
    assert got["wrong_types"] == [] and got["checked"] > 4 and got["single"] > 0
    assert got["external"] == name.startswith("external")


@pytest.mark.trt
@pytest.mark.slow
def test_weights_in_8_bits_stay_so_in_a_plan(builds: dict[str, Any]) -> None:
    """Their very bytes, NaN's patterns of 16 bits among them; those kept at 16 bits, and what one product computes with them, are wide."""
    config = SessaConfig(**WIDE)
    plain = builds["wide "]["info"]["plan_size"]
    for name, weights in (("wide fp8", Weights("fp8")), ("external data int8", Weights("int8")),
                          ("wide int8 in part", Weights("int8", ("lm_head.weight", *(f"layers.0.mixer.{p}.weight" for p in PROJECTIONS))))):  # fmt: skip
        got, size = builds[name], weight_sizes(config, "fp16", weights)
        assert "error" not in got, got.get("error")
        wide = [n for n, held in got["matrices"].items() if held != [True, True]]
        assert sorted(wide) == sorted(f"layers.0.mixer.{p}.weight" for p in PROJECTIONS if p != "q_proj") * ("part" in name), name
        assert abs((plain - got["info"]["plan_size"]) - (size.wide - size.total)) < 0.05 * plain, (name, plain, got["info"]["plan_size"], size)


@pytest.mark.trt
@pytest.mark.slow
def test_between_the_librarys_layers_nothing_sums(builds: dict[str, Any]) -> None:
    """No flag promises that a sequence's bits are its own; where our kernels compute the layers, TensorRT has no product or sum of its own to promise."""
    for name in set(CASES) - TENSORRTS:
        others = [kind for n, kind, _ in builds[name]["layers"] if n not in builds[name]["plugin_nodes"]]
        assert set(others) <= {"kgen", "shape_call", "signal", "wait"}, (name, others)
        kernels = [n for n, kind, _ in builds[name]["layers"] if kind == "kgen"]
        assert not any(word in n for n in kernels for word in ("Dot", "Gemm", "Conv", "Mean", "Exp", "Sum")), (name, kernels)
    assert any(kind == "gemm" or "Dot" in n for n, kind, _ in builds["demo fp16 tensorrt"]["layers"])


@pytest.mark.trt
@pytest.mark.slow
def test_a_library_of_other_headers_is_refused(plugin: tuple[Path, bool], tmp_path: Path) -> None:
    """By build, before anything else is done, with the command that mends it."""
    path, other = plugin
    if not other or importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("needs TensorRT for RTX and headers of another major")
    config = SessaConfig(**TINY)
    bundle = write_bundle(tmp_path / "bundle", {contract.MODEL_FILE: b"not read"}, config, "fp16", {}).path
    done = subprocess.run([sys.executable, "-m", "sessa_deploy", "build", str(bundle), "--for", "rtx", "--plugin", str(path)], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: the plugin library is for another TensorRT: got "), done.stderr
    assert "headers of TensorRT 10; allowed: one compiled with headers of TensorRT 11; fix: sessa-deploy plugin build --tensorrt 11" in done.stderr


@pytest.mark.trt
def test_the_missing_link_is_made_or_named() -> None:
    """The wheel lacks the name that its parser opens. Whoever imports it first, without the link, is told how to make it: the process would be aborted."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("needs TensorRT for RTX")
    first = "import tensorrt_rtx_bindings\n"
    code = "from sessa_deploy.runtime.trt import api\nprint(api.load('rtx').__version__)"
    good, late = (subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False) for text in (code, first + code))
    assert good.returncode == 0 and good.stdout.startswith("1."), good.stderr
    assert late.returncode != 0 and "ln -s libtensorrt_rtx.so.1 " in late.stderr.splitlines()[-1]


@pytest.mark.parametrize(("options", "says"), [
    (("--for", "rtx", "--arch", "90"), "does not support this compute capability: got sm_90; allowed: sm_80, sm_86, sm_89, sm_120; fix: .*--for tensorrt"),
    (("--for", "tensorrt", "--arch", "86"), "builds for this machine's GPU alone: got --arch 86; allowed: no --arch; fix: --for rtx")])
def test_a_target_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    bundle = write_bundle(tmp_path / "bundle", {contract.MODEL_FILE: b"not read"}, SessaConfig(**TINY), "fp16", {}).path
    done = subprocess.run([sys.executable, "-m", "sessa_deploy", "build", str(bundle), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and re.search(says, done.stderr), done.stderr

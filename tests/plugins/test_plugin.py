"""The TensorRT plugin library: built from source against given headers, called through TensorRT's own interfaces, loaded by its real registry.

SESSA_TRT_INCLUDE: include folders of TensorRT 8.6, 10, 11, separated by ':'. SESSA_LEAN_PYTHON: a Python with the lean runtime
of TensorRT 11. SESSA_TRT8_PYTHON: a Python with TensorRT 8.6. Neither needs a GPU.
SESSA_CUBIN_DIR: kernels already lowered. SESSA_PLUGIN_PREBUILT: a folder with trt<major>/{libsessa_plugin,harness}.so to test in place of a build.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import plugin_harness as ph
import pytest
from plugin_harness import BFLOAT, CAUSAL, FEEDBACK, FLOAT, HALF, NAMES, OPERANDS, Built, Pointers, create, headed, sizes

from sessa_deploy import cuda_arch
from sessa_deploy.contract import PLUGIN_STATE, STEP_ROWS
from sessa_deploy.errors import UserError
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.limits import MANY_PROGRAMS, MANY_ROWS, STEP_MAX_SPLITS
from sessa_deploy.plugins import library, ops


@pytest.mark.trt
@pytest.mark.slow
def test_library_stands_alone(built: Built) -> None:
    major, path, _ = built
    seen = library.check(path)
    assert (seen.interface, seen.major) == ("V2" if major == 8 else "V3", major)
    if shutil.which("nm") and shutil.which("readelf"):
        exports = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        door = {"sessaFindCubin", "sessaCubinTile", "sessaOpName", "sessaStateVersion", "sessaTensorRTMajor"}  # what Python asks
        assert {line.split()[-1] for line in exports.splitlines()} == {"getPluginCreators" if major == 8 else "getCreators", "setLoggerFinder", *door}
        needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"NEEDED.*(nvinfer|libcuda|cudart|stdc\+\+)", needed)


@pytest.mark.trt
@pytest.mark.slow
def test_the_library_hands_out_what_serves_a_device(built: Built) -> None:
    """Its door, which the runtime takes, goes by the one rule; and a tile that a binary has not is told apart from a tile."""
    handle = ctypes.CDLL(str(built[1]))
    held = {arch for arch in cuda_arch.ARCHS if handle.sessaFindCubin(b"decode_end", arch, b"fp32", b"any", ctypes.create_string_buffer(64))}
    for device in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121):
        key = (b"decode_end", device, b"fp32", b"any")
        found = bool(handle.sessaFindCubin(*key, ctypes.create_string_buffer(64)))
        assert found == (cuda_arch.nearest(held, device) is not None)
        assert (handle.sessaCubinTile(*key, b"SPLITS") > 0) == found and handle.sessaCubinTile(*key, b"PIECES") == -1


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("op", NAMES, ids=NAMES.values())
def test_fields_and_formats(built: Built, op: int, capfd: pytest.CaptureFixture[str]) -> None:
    major, _, harness = built
    everything = (1 << OPERANDS[op]) - 1
    plugin = create(built, op)
    assert plugin is not None
    for storage in (FLOAT, HALF, BFLOAT):
        accepted = everything if storage != BFLOAT or major != 8 else everything & ~1
        assert harness.harness_formats(plugin, op, storage, 1) == accepted
    assert harness.harness_formats(plugin, op, HALF, 0) == 0
    assert harness.harness_formats(plugin, op, 7, 1) & 1 == 0
    harness.harness_destroy(plugin)
    exact = create(built, op, HALF)
    assert harness.harness_formats(exact, op, HALF, 1) == everything
    assert harness.harness_formats(exact, op, FLOAT, 1) & 1 == 0
    harness.harness_destroy(exact)
    assert create(built, op, storage=5) is None
    for attribute in ops.ATTRIBUTES:
        mine = attribute in ops.OPS[op].attributes
        assert (create(built, op, HALF, attribute.name, 0.25) is not None) == mine
        for wrong in (-1.0, float("inf"), float("nan"), *((2.0,) if attribute == ops.GAMMA_MAX else ())):
            capfd.readouterr()
            assert create(built, op, HALF, attribute.name, wrong) is None
            said = capfd.readouterr().err
            assert (f"{NAMES[op]}: attribute {attribute.name}: got " in said and f"; allowed: {attribute.allowed}" in said) if mine else (
                f"attribute {attribute.name} is unknown; allowed: {', '.join(ops.OPS[op].attribute_names)}" in said)
        assert (create(built, op, HALF, attribute.name, 0.0) is not None) == (mine and attribute == ops.SCALE)  # 0: the width's -1/2 power, for scores alone
    assert (create(built, op, storage=BFLOAT) is None) == (major == 8)
    capfd.readouterr()
    if ops.OPS[op].quantised is None:
        assert built[2].harness_create(str(built[1]).encode(), op, HALF, 3, None, 0.0) is None
        assert f"attribute weights is unknown; allowed: {', '.join(ops.OPS[op].attribute_names)}" in capfd.readouterr().err
        return
    for weights in (3, 17):
        plugin, form = create(built, op, HALF, weights=weights), ph.at(op, weights)
        assert harness.harness_formats(plugin, form, HALF, 1) == (everything << 1) + 1  # the scales' type too
        assert harness.harness_formats(plugin, op, HALF, 1) == 0, "an input is missing"
        harness.harness_destroy(plugin)
    assert create(built, op, HALF, weights=2) is None
    assert "attribute weights: got 2; allowed: 3 (int8), 17 (float8e4m3fn), 0 (the storage type)" in capfd.readouterr().err


@pytest.mark.trt
@pytest.mark.slow
def test_workspace(launching: Built) -> None:
    harness = launching[2]
    feedback, causal = create(launching, FEEDBACK), create(launching, CAUSAL)
    # One decode step of 2 sequences, capacity 4096, D 768: the most splits of float32 rows and two statistics.
    decode = harness.harness_workspace(feedback, FEEDBACK, HALF, sizes(2, 1, 4096, 768))
    assert decode == (4 * 768 + 8) * 2 * STEP_MAX_SPLITS
    prefill = harness.harness_workspace(feedback, FEEDBACK, HALF, sizes(2, 512, 4096, 768))
    assert decode < prefill < 200 * 2**20
    assert harness.harness_workspace(feedback, FEEDBACK, HALF, sizes(1, 65536, 1, 1024)) < 3 * 2**30
    # The most is what a step of several rows leaves, to the byte, however long the prompts are: any step of a prompt's profile may have as few rows.
    step = harness.harness_workspace(causal, CAUSAL, HALF, headed(2, 1, 4096, 64, 16, 16))
    assert 0 < step <= (4 * 64 + 8) * 2 * 16 * 128
    rows = harness.harness_workspace(causal, CAUSAL, HALF, headed(2, STEP_ROWS, 4096, 64, 16, 16))
    assert step < rows == harness.harness_workspace(causal, CAUSAL, HALF, headed(2, 512, 4096, 64, 16, 16))
    assert rows % ((4 * 64 + 8) * 2 * STEP_ROWS * 16) == 0, "parts and statistics of every row and head, a split like the other"
    # It stops growing with the capacity, and goes with the sequences.
    for tokens, most in ((1, step), (STEP_ROWS, rows)):
        assert most == harness.harness_workspace(causal, CAUSAL, HALF, headed(2, tokens, 65536, 64, 16, 16))
        assert most == 2 * harness.harness_workspace(causal, CAUSAL, HALF, headed(1, tokens, 4096, 64, 16, 16))
    harness.harness_destroy(feedback)
    harness.harness_destroy(causal)


@pytest.mark.trt
@pytest.mark.slow
def test_workspace_of_a_layer(launching: Built) -> None:
    """To the byte: what the kernels of a step of the mixer leave one another, what its chunks do, the normed rows of the entrance and of the logits, the gated
    ones of the end, and where the programs of a product of many rows make their descriptors."""
    harness, heads, d, p = launching[2], 12, 768, 4096
    made = [create(launching, op, storage=HALF) for op in (ph.At.Mixer, ph.At.NormEnter, ph.At.Tail, FEEDBACK, ph.At.LastLogits)]
    mixer, enter, tail, feedback, logits = made
    descriptors = MANY_PROGRAMS * table.kernel("layer_linear_many").scratch

    def needs(batch: int, tokens: int, capacity: int) -> int:
        return int(harness.harness_workspace(mixer, ph.At.Mixer, HALF, sizes(batch, tokens, capacity, d, heads, heads, d // heads)))

    causal_splits, splits = 128, STEP_MAX_SPLITS
    parts = 4 * d * causal_splits + 8 * heads * causal_splits + 4 * d * splits + 8 * splits
    assert needs(2, 1, p) == 2 * (parts + 2 * d + 4 * d)
    chunk = harness.harness_workspace(feedback, FEEDBACK, HALF, sizes(2, 512, p, d)) + 2 * (2 * 512 * d * 2) + descriptors
    assert needs(2, 512, p) == chunk
    for smaller in ((1, 512, p), (2, 511, p), (2, 512, p - 1), (2, 1, p), (1, 64, 1)):
        assert needs(*smaller) <= chunk
    assert harness.harness_workspace(enter, ph.At.NormEnter, HALF, sizes(4, 5, 1, d)) == 4 * 5 * d * 2
    assert harness.harness_workspace(logits, ph.At.LastLogits, HALF, sizes(4, 5, 1, d, columns=640)) == 4 * d * 2
    for rows in (MANY_ROWS, 2 * MANY_ROWS):
        many = rows > MANY_ROWS
        assert harness.harness_workspace(enter, ph.At.NormEnter, HALF, sizes(1, rows, 1, d)) == rows * d * 2 + many * descriptors
        assert harness.harness_workspace(tail, ph.At.Tail, HALF, sizes(1, rows, 1, d)) == many * (rows * d * 2 + descriptors)
    for plugin in made:
        harness.harness_destroy(plugin)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("weights", [0, 3], ids=["storage", "int8"])
@pytest.mark.parametrize("op", NAMES, ids=NAMES.values())
def test_workspace_holds_for_every_smaller_problem(launching: Built, op: int, weights: int) -> None:
    """An engine reserves what its largest shapes ask for, and is told nothing when others run: other kernels, with other splits and tiles."""
    if weights and ops.OPS[op].quantised is None:
        return
    harness, plugin, rng, seen = launching[2], create(launching, op, HALF, weights=weights), random.Random(op), 0
    for width, head, group in ((256, 32, 1), (768, 64, 4), (1024, 64, 1), (2048, 128, 1)):
        heads, kv = width // head, width // head // group
        columns = {ph.At.ProjectGain: 3 * width + 2 * kv * head, ph.At.Logits: 50304, ph.At.LastLogits: 50304}.get(ph.At(op), width)

        def needs(*shape: int) -> int:
            return int(harness.harness_workspace(plugin, ph.at(op, weights), HALF, sizes(*shape, width, heads, kv, head, columns)))  # noqa: B023

        for most in ((2, 1, 8192), (8, 16, 4097), (3, 100, 4096), (1, 4096, 4096), (4, 700, 5000)):
            bound = needs(*most)
            seen += bound > 0
            for _ in range(12):
                smaller = [rng.choice((1, 2, 16, 17, 65, 513, 4096, x - 1, x)) for x in most]
                if all(0 < a <= b for a, b in zip(smaller, most, strict=True)):
                    assert needs(*smaller) <= bound, (smaller, most, width)
    assert seen or not {"Feedback", "Causal", "Mixer", "NormEnter"} & {ph.At(op).name}
    harness.harness_destroy(plugin)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "onnx", "shape", "says"),
    [(FEEDBACK, HALF, sizes(1, 1, 16, 24), "width D: got 24; allowed: a multiple of 16 up to 4096"),
     (FEEDBACK, HALF, sizes(0, 1, 16, 32), "batch B: got 0; allowed: 1 to 65535"),
     (FEEDBACK, 7, sizes(1, 1, 16, 32), "input 0 (q) has TensorRT type"),
     (CAUSAL, HALF, headed(1, 1, 16, 20, 2, 2), "head width d: got 20; allowed: a multiple of 8 up to 256"),
     (CAUSAL, HALF, headed(1, 1, 16, 264, 2, 2), "head width d: got 264"),
     (CAUSAL, HALF, headed(1, 1, 16, 64, 3, 2), "heads Hq: got 3; allowed: a multiple of Hkv up to 65535"),
     (CAUSAL, HALF, headed(1, 1, 16, 64, 2, 0), "heads Hkv: got 0; allowed: 1 to 65535"),
     (CAUSAL, HALF, headed(70000, 1, 16, 64, 2, 2), "batch B: got 70000; allowed: 1 to 65535"),
     (FEEDBACK, HALF, sizes(1, 1, 16, 32), ""), (CAUSAL, HALF, headed(1, 1, 16, 64, 2, 2), "")],
)  # fmt: skip
def test_wrong_calls_are_messages_not_crashes(
    built: Built, op: int, onnx: int, shape: Any, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last two: no context, or null pointers."""
    harness = built[2]
    plugin = create(built, op)
    assert harness.harness_enqueue(plugin, op, onnx, shape, Pointers(), None) != 0
    said = capfd.readouterr().err
    assert f"{NAMES[op]}: " in said and says in said
    harness.harness_destroy(plugin)


def elsewhere(python: str, code: str, path: Path, op: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the library's path, an op's name and its attributes under another Python, to which this checkout is made visible."""
    root = Path(library.__file__).resolve().parents[1]
    visible = f"import sys, types\nsys.path.insert(0, {str(root)!r})\nimport sessa_deploy\n"
    if not (root / "sessa_deploy/plugins").exists():
        visible += f"p = types.ModuleType('sessa_deploy.plugins'); p.__path__ = [{str(root / 'plugins')!r}]; sys.modules['sessa_deploy.plugins'] = p\n"
    return subprocess.run([python, "-c", visible + code, str(path), op, *ops.op(op).attribute_names], capture_output=True, text=True, timeout=250)


LEAN = """
import sys, numpy as np, tensorrt_lean_bindings as trt
from sessa_deploy.contract import PLUGIN_STATE
from sessa_deploy.plugins import library
assert library.load(trt, __import__("pathlib").Path(sys.argv[1])) and library.load(trt, __import__("pathlib").Path(sys.argv[1]))
assert library.ops(trt) == library.OPS
registry = trt.get_plugin_registry()
assert (sys.argv[2], "1", "") in [(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators]
creator = registry.get_creator(sys.argv[2], "1", "")
assert [f.name for f in creator.field_names] == sys.argv[3:]
def make(phase="BUILD", **fields):
    kinds = {np.dtype("float32"): trt.PluginFieldType.FLOAT32, np.dtype("int32"): trt.PluginFieldType.INT32}
    listed = [trt.PluginField(n, v, kinds[v.dtype]) for n, v in fields.items()]
    return creator.create_plugin("x", trt.PluginFieldCollection(listed), getattr(trt.TensorRTPhase, phase))
f, i = (lambda *v: np.array(v, np.float32)), (lambda *v: np.array(v, np.int32))
plugin = make()
core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (sys.argv[2], "1", "")
own = {n: f(0.5) for n in sys.argv[3:] if n not in ("storage", "weights")}
assert make(storage=i(10), **own) is not None
for bad in (dict(storage=i(5)), dict(wrong=i(1)), dict(state=i(PLUGIN_STATE)), *({n: v} for n in own for v in (f(np.nan), f(-1), f(1, 2), i(1)))):
    assert make(**bad) is None, bad
assert make("RUNTIME", storage=i(10), state=i(PLUGIN_STATE), **own) is not None
assert make("RUNTIME", storage=i(10), state=i(PLUGIN_STATE - 1), **own) is None
assert make("RUNTIME", storage=i(10), **own) is None and make("RUNTIME", state=i(1), scale=f(0.5), storage=i(10)) is None
print("fine", trt.__version__)
"""


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("op", NAMES.values())
def test_the_lean_runtimes_registry_takes_the_library(built: Built, op: str) -> None:
    major, path, _ = built
    python = os.environ.get("SESSA_LEAN_PYTHON")
    if major != 11 or python is None:
        pytest.skip("needs TensorRT 11's headers and a Python with tensorrt_lean_cu13_bindings, named in SESSA_LEAN_PYTHON")
    done = elsewhere(python, LEAN, path, op)
    assert done.returncode == 0 and done.stdout.startswith("fine 11"), done.stdout + done.stderr
    assert f"attribute wrong is unknown; allowed: {', '.join(ops.op(op).attribute_names)}" in done.stderr
    assert f"serialised state: got version 1; allowed: {PLUGIN_STATE}" in done.stderr and "sessa-deploy build BUNDLE --force" in done.stderr


TRT8 = """
import sys, numpy as np, tensorrt as trt
from pathlib import Path
from sessa_deploy.plugins import library
logger = trt.Logger(trt.Logger.ERROR)
assert library.load(trt, Path(sys.argv[1])) and library.load(trt, Path(sys.argv[1]))
assert library.ops(trt) == library.OPS
creator = trt.get_plugin_registry().get_plugin_creator(sys.argv[2], "1", "")
assert [f.name for f in creator.field_names] == sys.argv[3:]
def make(**fields):
    kinds = {np.dtype("float32"): trt.PluginFieldType.FLOAT32, np.dtype("int32"): trt.PluginFieldType.INT32}
    return creator.create_plugin("x", trt.PluginFieldCollection([trt.PluginField(n, v, kinds[v.dtype]) for n, v in fields.items()]))
f, i = (lambda *v: np.array(v, np.float32)), (lambda *v: np.array(v, np.int32))
plugin = make()
own = {n: f(0.5) for n in sys.argv[3:] if n not in ("storage", "weights")}
assert plugin.plugin_type == sys.argv[2] and plugin.num_outputs >= 1 and make(storage=i(10), **own) is not None
for bad in (dict(storage=i(16)), dict(storage=i(5)), dict(wrong=i(1)), dict(state=i(1)), *({n: v} for n in own for v in (f(np.nan), f(1, 2)))):
    assert make(**bad) is None, bad
state = bytes(plugin.serialize())
assert len(state) == plugin.serialization_size == 28
assert creator.deserialize_plugin("x", state) is not None
assert creator.deserialize_plugin("x", state[:-1]) is None and creator.deserialize_plugin("x", b"x" + state[1:]) is None
print("fine", trt.__version__)
"""


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("op", NAMES.values())
def test_tensorrt_8s_registry_takes_the_library(built: Built, op: str) -> None:
    major, path, _ = built
    python = os.environ.get("SESSA_TRT8_PYTHON")
    if major != 8 or python is None:
        pytest.skip("needs TensorRT 8.6's headers and a Python with tensorrt 8.6, named in SESSA_TRT8_PYTHON")
    done = elsewhere(python, TRT8, path, op)
    assert done.returncode == 0 and done.stdout.startswith("fine 8.6"), done.stdout + done.stderr
    assert "TensorRT 8.6 has no bfloat16" in done.stderr and "got 27 bytes; allowed: 28; sessa-deploy build BUNDLE --force" in done.stderr


def test_a_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "user_folder", lambda: tmp_path)
    monkeypatch.setattr(library, "_HERE", tmp_path)
    with pytest.raises(UserError, match="fix: sessa-deploy plugin build"):
        library.find()
    for major in (10, 11):
        (tmp_path / f"trt{major}").mkdir()
        (tmp_path / f"trt{major}" / library.LIBRARY).write_bytes(b"not a library")
    assert library.find() == tmp_path / "trt11" / library.LIBRARY
    assert library.find(10) == tmp_path / "trt10" / library.LIBRARY
    with pytest.raises(UserError, match=r"for TensorRT 8.*fix: sessa-deploy plugin build --tensorrt 8"):
        library.find(8)
    monkeypatch.setenv(library.ENVIRONMENT, str(tmp_path / "elsewhere.so"))
    with pytest.raises(UserError, match=r"elsewhere\.so"):
        library.find()
    with pytest.raises(UserError, match="cannot be loaded"):
        library.check(tmp_path / "trt11" / library.LIBRARY)


def test_wrong_headers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no TensorRT headers"):
        library.include_major(tmp_path)
    (tmp_path / "NvInferVersion.h").write_text("#define TRT_MAJOR_ENTERPRISE 10\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< major\n")
    assert library.include_major(tmp_path) == 10
    if shutil.which("cmake"):
        with pytest.raises(UserError, match="CUDA_INCLUDE_DIR is not a folder"):
            library.build(tmp_path, tmp_path / "absent")


@pytest.mark.parametrize(("major", "tag"), [(8, "v8.6.1"), (10, "v10.16"), (11, "v11.1")])
def test_headers_are_fetched_of_the_major_that_will_load_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, major: int, tag: str) -> None:
    """Never those of 10 for 11; where nothing can be fetched the error names the folder to give. Git is one that notes what is asked and fails."""
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))  # headers of another major, installed
    (tmp_path / "include").mkdir()
    (tmp_path / "include/NvInfer.h").write_text("")
    (tmp_path / "include/NvInferVersion.h").write_text(f"#define NV_TENSORRT_MAJOR {major - 1 or 1}\n")
    git = tmp_path / "git"
    git.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$1" = --version ] && echo "git version 2.40.0" && exit 0\nexit 1\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "cubins").mkdir()
    with pytest.raises(UserError, match=rf"headers of TensorRT {major} \({tag}\) could not be fetched.*fix: .* --tensorrt {major} --tensorrt-include DIR"):
        library.build(cubins=tmp_path / "cubins", out=tmp_path / "lib", major=major)
    assert "clone" in (tmp_path / "asked").read_text() and not (tmp_path / "lib").exists()


def test_a_library_of_another_major_is_refused(tmp_path: Path) -> None:
    """10 and 11 are two ABIs; one that does not say whose it is, or headers that are not those asked for, are refused too."""
    with pytest.raises(UserError, match=r"compiled with headers of TensorRT 10; allowed: .* 11; fix: sessa-deploy plugin build --tensorrt 11"):
        library.require_major(library.Checked(tmp_path / "x.so", 1, "V3", 10), 11)
    library.require_major(library.Checked(tmp_path / "x.so", 1, "V3", 11), 11)
    (tmp_path / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10\n")
    if shutil.which("cmake"):
        with pytest.raises(UserError, match=r"headers of another TensorRT: got 10 .*allowed: those of TensorRT 11"):
            library.build(tmp_path, cubins=tmp_path, major=11)
    if shutil.which("g++"):
        bare = "void getCreators() {} void setLoggerFinder() {} "
        known = bare + "int sessaTensorRTMajor() { return 11; } "
        names = ", ".join(f'"{name}"' for name in library.OPS)
        named = known + f"static char const* all[] = {{{names}, 0}}; char const* sessaOpName(int i) {{ return all[i]; }} "
        last = named + f"int sessaStateVersion() {{ return {PLUGIN_STATE - 1}; }}"
        for source, says in ((bare, "built by an older sessa-deploy"), (known, "built by another sessa-deploy: got .* with operations that it does not name"),
                             (named, "operations of no state"), (last, f"operations of state {PLUGIN_STATE - 1}; allowed: state {PLUGIN_STATE};")):
            old = tmp_path / f"{len(source)}.so"
            subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(old)], input=f'extern "C" {{ {source} }}', text=True, check=True)
            with pytest.raises(UserError, match=rf"{says}.*fix: sessa-deploy plugin build --tensorrt 11"):
                library.check(old, 11)

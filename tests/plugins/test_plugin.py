"""The TensorRT plugin library: built from source against given headers, called through TensorRT's own interfaces, loaded by its real registry.

SESSA_TRT_INCLUDE: include folders of TensorRT 8.6, 10, 11, separated by ':'. SESSA_LEAN_PYTHON: a Python with the lean runtime
of TensorRT 11. SESSA_TRT8_PYTHON: a Python with TensorRT 8.6. Neither needs a GPU.
SESSA_CUBIN_DIR: kernels already lowered. SESSA_PLUGIN_PREBUILT: a folder with trt<major>/{libsessa_plugin,harness}.so to test in place of a build.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sessa_deploy.errors import UserError
from sessa_deploy.plugins import library

HERE = Path(__file__).parent
SOURCES = Path(library.__file__).parent
INCLUDES = {library.include_major(Path(p)): Path(p) for p in os.environ.get("SESSA_TRT_INCLUDE", "").split(os.pathsep) if p}
PREBUILT = Path(os.environ["SESSA_PLUGIN_PREBUILT"]) if "SESSA_PLUGIN_PREBUILT" in os.environ else None
FLOAT, HALF, BFLOAT = 1, 10, 16
FEEDBACK, CAUSAL = 0, 1  # positions in the library's list of creators
INPUTS = {FEEDBACK: 7, CAUSAL: 6}
NAMES = {FEEDBACK: "SessaFeedbackAttention", CAUSAL: "SessaCausalAttention"}
Shape = ctypes.c_int64 * 6


def sizes(batch: int, tokens: int, capacity: int, width: int, heads: int = 1, kv_heads: int = 1) -> Any:
    """The sizes of a problem as the harness takes them; width: D, or that of one head."""
    return Shape(batch, tokens, capacity, width, heads, kv_heads)


def missing(major: int) -> str | None:
    """Why the library for this TensorRT cannot be tested here, or None."""
    if PREBUILT is not None:
        return None if (PREBUILT / f"trt{major}" / library.LIBRARY).is_file() else f"no trt{major} in SESSA_PLUGIN_PREBUILT"
    if major not in INCLUDES:
        return f"no headers of TensorRT {major}: name their folder in SESSA_TRT_INCLUDE"
    return None if shutil.which("cmake") and shutil.which("g++") else "no cmake or no g++"


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "SESSA_CUBIN_DIR" in os.environ:
        return Path(os.environ["SESSA_CUBIN_DIR"])
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("cubins")
    done = subprocess.run([sys.executable, "-m", "sessa_deploy.plugins.lower", "--arch", "90", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module", params=[8, 10, 11], ids=lambda m: f"trt{m}")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, ctypes.CDLL]:
    """(TensorRT major, plugin library, harness) for each TensorRT whose headers are given."""
    major: int = request.param
    if (reason := missing(major)) is not None:
        pytest.skip(reason)
    if PREBUILT is not None:
        folder = PREBUILT / f"trt{major}"
    else:
        folder = tmp_path_factory.mktemp(f"trt{major}")
        library.build(INCLUDES[major], SOURCES / "src/cuda", request.getfixturevalue("cubins"), out=folder)
        flags = ["-std=c++17", "-fPIC", "-shared", "-Wno-deprecated-declarations", "-isystem", str(INCLUDES[major]), f"-I{SOURCES / 'src/cuda'}"]
        subprocess.run(["g++", *flags, str(HERE / "harness.cpp"), "-o", str(folder / "harness.so"), "-ldl"], check=True)
    harness = ctypes.CDLL(str(folder / "harness.so"))
    harness.harness_create.restype = ctypes.c_void_p
    harness.harness_create.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_float]
    harness.harness_workspace.restype = ctypes.c_int64
    for name in ("harness_workspace", "harness_shape"):
        getattr(harness, name).argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape]
    harness.harness_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, Shape, ctypes.c_void_p * 9, ctypes.c_void_p]
    harness.harness_formats.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    harness.harness_destroy.argtypes = [ctypes.c_void_p]
    return major, folder / library.LIBRARY, harness


def create(built: tuple[int, Path, ctypes.CDLL], op: int, storage: int = -1, scale: float = -1.0) -> int | None:
    return built[2].harness_create(str(built[1]).encode(), op, storage, scale)


@pytest.mark.trt
@pytest.mark.slow
def test_library_stands_alone(built: tuple[int, Path, ctypes.CDLL]) -> None:
    major, path, _ = built
    assert library.check(path).interface == ("V2" if major == 8 else "V3")
    if shutil.which("nm") and shutil.which("readelf"):
        exports = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        door = {"sessaFindCubin", "sessaCubinTile"}  # through which the runtime launches its own kernels
        assert {line.split()[-1] for line in exports.splitlines()} == {"getPluginCreators" if major == 8 else "getCreators", "setLoggerFinder", *door}
        needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"NEEDED.*(nvinfer|libcuda|cudart|stdc\+\+)", needed)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("op", NAMES, ids=NAMES.values())
def test_fields_and_formats(built: tuple[int, Path, ctypes.CDLL], op: int) -> None:
    major, _, harness = built
    everything = (1 << INPUTS[op] + 1) - 1
    plugin = create(built, op)
    assert plugin is not None
    for storage in (FLOAT, HALF, BFLOAT):
        accepted = everything if storage != BFLOAT or major != 8 else everything & ~1
        assert harness.harness_formats(plugin, op, storage, 1) == accepted
    assert harness.harness_formats(plugin, op, HALF, 0) == 0
    assert harness.harness_formats(plugin, op, 7, 1) & 1 == 0
    harness.harness_destroy(plugin)
    exact = create(built, op, storage=HALF, scale=0.25)
    assert harness.harness_formats(exact, op, HALF, 1) == everything
    assert harness.harness_formats(exact, op, FLOAT, 1) & 1 == 0
    harness.harness_destroy(exact)
    assert create(built, op, storage=5) is None
    assert create(built, op, storage=HALF, scale=float("inf")) is None
    assert (create(built, op, storage=BFLOAT) is None) == (major == 8)


@pytest.mark.trt
@pytest.mark.slow
def test_workspace(built: tuple[int, Path, ctypes.CDLL]) -> None:
    harness = built[2]
    feedback, causal = create(built, FEEDBACK), create(built, CAUSAL)
    # One decode step of 2 sequences, capacity 4096, D 768: 128 splits of float32 rows and two statistics.
    decode = harness.harness_workspace(feedback, FEEDBACK, HALF, sizes(2, 1, 4096, 768))
    assert decode == 4 * 2 * 128 * 768 + 8 * 2 * 128
    prefill = harness.harness_workspace(feedback, FEEDBACK, HALF, sizes(2, 512, 4096, 768))
    assert decode < prefill < 200 * 2**20
    assert harness.harness_workspace(feedback, FEEDBACK, HALF, sizes(1, 65536, 1, 1024)) < 3 * 2**30
    # A decode step needs it, however long the prompts are; it stops growing with the capacity.
    step = harness.harness_workspace(causal, CAUSAL, HALF, sizes(2, 1, 4096, 64, 16, 16))
    assert 0 < step <= (4 * 64 + 8) * 2 * 16 * 128
    assert step == harness.harness_workspace(causal, CAUSAL, HALF, sizes(2, 512, 4096, 64, 16, 16))
    assert step == harness.harness_workspace(causal, CAUSAL, HALF, sizes(2, 1, 65536, 64, 16, 16))
    assert step > harness.harness_workspace(causal, CAUSAL, HALF, sizes(1, 1, 4096, 64, 16, 16)) > 0
    harness.harness_destroy(feedback)
    harness.harness_destroy(causal)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "onnx", "shape", "says"),
    [(FEEDBACK, HALF, sizes(1, 1, 16, 24), "width D: got 24; allowed: a multiple of 16 up to 4096"),
     (FEEDBACK, HALF, sizes(0, 1, 16, 32), "batch, tokens, capacity: got 0, 1, 16"), (FEEDBACK, 7, sizes(1, 1, 16, 32), "input 0 (q) has TensorRT type"),
     (CAUSAL, HALF, sizes(1, 1, 16, 20, 2, 2), "head width d: got 20; allowed: a multiple of 8 up to 256"),
     (CAUSAL, HALF, sizes(1, 1, 16, 264, 2, 2), "head width d: got 264"), (CAUSAL, HALF, sizes(1, 1, 16, 64, 3, 2), "heads Hq, Hkv: got 3, 2"),
     (CAUSAL, HALF, sizes(1, 1, 16, 64, 2, 0), "heads Hq, Hkv: got 2, 0"), (CAUSAL, HALF, sizes(70000, 1, 16, 64, 2, 2), "a batch up to 65535"),
     (FEEDBACK, HALF, sizes(1, 1, 16, 32), ""), (CAUSAL, HALF, sizes(1, 1, 16, 64, 2, 2), "")],
)  # fmt: skip
def test_wrong_calls_are_messages_not_crashes(
    built: tuple[int, Path, ctypes.CDLL], op: int, onnx: int, shape: Any, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last two: no context, or null pointers."""
    harness = built[2]
    plugin = create(built, op)
    assert harness.harness_enqueue(plugin, op, onnx, shape, (ctypes.c_void_p * 9)(), None) != 0
    said = capfd.readouterr().err
    assert f"{NAMES[op]}: " in said and says in said
    harness.harness_destroy(plugin)


def elsewhere(python: str, code: str, path: Path, op: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the library's path and an op's name under another Python, to which this checkout is made visible."""
    root = Path(library.__file__).resolve().parents[1]
    visible = f"import sys, types\nsys.path.insert(0, {str(root)!r})\nimport sessa_deploy\n"
    if not (root / "sessa_deploy/plugins").exists():
        visible += f"p = types.ModuleType('sessa_deploy.plugins'); p.__path__ = [{str(root / 'plugins')!r}]; sys.modules['sessa_deploy.plugins'] = p\n"
    return subprocess.run([python, "-c", visible + code, str(path), op], capture_output=True, text=True, timeout=120)


LEAN = """
import sys, numpy as np, tensorrt_lean_bindings as trt
from sessa_deploy.plugins import library
assert library.load(trt, __import__("pathlib").Path(sys.argv[1])) and library.load(trt, __import__("pathlib").Path(sys.argv[1]))
assert library.ops(trt) == library.OPS
registry = trt.get_plugin_registry()
assert (sys.argv[2], "1", "") in [(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators]
creator = registry.get_creator(sys.argv[2], "1", "")
assert [f.name for f in creator.field_names] == ["scale", "storage"]
def make(phase="BUILD", **fields):
    kinds = {np.dtype("float32"): trt.PluginFieldType.FLOAT32, np.dtype("int32"): trt.PluginFieldType.INT32}
    listed = [trt.PluginField(n, v, kinds[v.dtype]) for n, v in fields.items()]
    return creator.create_plugin("x", trt.PluginFieldCollection(listed), getattr(trt.TensorRTPhase, phase))
f, i = (lambda *v: np.array(v, np.float32)), (lambda *v: np.array(v, np.int32))
plugin = make()
core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (sys.argv[2], "1", "")
assert make(scale=f(0.5), storage=i(10)) is not None
for bad in (dict(storage=i(5)), dict(wrong=i(1)), dict(scale=f(np.nan)), dict(scale=f(-1)), dict(scale=f(1, 2)), dict(scale=i(1)), dict(state=i(1))):
    assert make(**bad) is None, bad
assert make("RUNTIME", scale=f(0.5), storage=i(10), state=i(1)) is not None
assert make("RUNTIME", scale=f(0.5), storage=i(10)) is None and make("RUNTIME", state=i(2)) is None
print("fine", trt.__version__)
"""


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("op", NAMES.values())
def test_the_lean_runtimes_registry_takes_the_library(built: tuple[int, Path, ctypes.CDLL], op: str) -> None:
    major, path, _ = built
    python = os.environ.get("SESSA_LEAN_PYTHON")
    if major != 11 or python is None:
        pytest.skip("needs TensorRT 11's headers and a Python with tensorrt_lean_cu13_bindings, named in SESSA_LEAN_PYTHON")
    done = elsewhere(python, LEAN, path, op)
    assert done.returncode == 0 and done.stdout.startswith("fine 11"), done.stdout + done.stderr
    assert "attribute wrong is unknown; allowed: scale, storage" in done.stderr


TRT8 = """
import sys, numpy as np, tensorrt as trt
from pathlib import Path
from sessa_deploy.plugins import library
logger = trt.Logger(trt.Logger.ERROR)
assert library.load(trt, Path(sys.argv[1])) and library.load(trt, Path(sys.argv[1]))
assert library.ops(trt) == library.OPS
creator = trt.get_plugin_registry().get_plugin_creator(sys.argv[2], "1", "")
assert [f.name for f in creator.field_names] == ["scale", "storage"]
def make(**fields):
    kinds = {np.dtype("float32"): trt.PluginFieldType.FLOAT32, np.dtype("int32"): trt.PluginFieldType.INT32}
    return creator.create_plugin("x", trt.PluginFieldCollection([trt.PluginField(n, v, kinds[v.dtype]) for n, v in fields.items()]))
f, i = (lambda *v: np.array(v, np.float32)), (lambda *v: np.array(v, np.int32))
plugin = make()
assert plugin.plugin_type == sys.argv[2] and plugin.num_outputs == 1 and make(scale=f(0.5), storage=i(10)) is not None
for bad in (dict(storage=i(16)), dict(storage=i(5)), dict(wrong=i(1)), dict(scale=f(np.nan)), dict(scale=f(1, 2)), dict(state=i(1))):
    assert make(**bad) is None, bad
state = bytes(plugin.serialize())
assert len(state) == plugin.serialization_size == 16
assert creator.deserialize_plugin("x", state) is not None
assert creator.deserialize_plugin("x", state[:-1]) is None and creator.deserialize_plugin("x", b"x" + state[1:]) is None
print("fine", trt.__version__)
"""


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("op", NAMES.values())
def test_tensorrt_8s_registry_takes_the_library(built: tuple[int, Path, ctypes.CDLL], op: str) -> None:
    major, path, _ = built
    python = os.environ.get("SESSA_TRT8_PYTHON")
    if major != 8 or python is None:
        pytest.skip("needs TensorRT 8.6's headers and a Python with tensorrt 8.6, named in SESSA_TRT8_PYTHON")
    done = elsewhere(python, TRT8, path, op)
    assert done.returncode == 0 and done.stdout.startswith("fine 8.6"), done.stdout + done.stderr
    assert "TensorRT 8.6 has no bfloat16" in done.stderr and "got 15 bytes; allowed: 16; rebuild the engine" in done.stderr


def enqueue_and_compare(harness: ctypes.CDLL, plugin: int, op: int, onnx: int, shape: Any, inputs: list[Any], expected: Any, err: Callable[[], str]) -> None:
    """The plugin's output equals `expected` bit for bit, from a captured graph (the first call of all) and eagerly; a misaligned pointer is refused."""
    import torch

    size = harness.harness_workspace(plugin, op, onnx, shape)
    assert size > 0 and harness.harness_shape(plugin, op, onnx, shape) == 0, err()
    work = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    out = torch.full_like(expected, torch.nan)
    pointers = (ctypes.c_void_p * 9)(*(x.data_ptr() for x in (*inputs, out, work)))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        assert harness.harness_enqueue(plugin, op, onnx, shape, pointers, side.cuda_stream) == 0, err()
    for replay in (True, False):
        out.fill_(torch.nan)
        if replay:
            graph.replay()
        else:
            assert harness.harness_enqueue(plugin, op, onnx, shape, pointers, torch.cuda.current_stream().cuda_stream) == 0, err()
        torch.cuda.synchronize()
        assert torch.equal(out, expected), (list(shape), replay)
    pointers[0] = inputs[0].data_ptr() + 2
    assert harness.harness_enqueue(plugin, op, onnx, shape, pointers, None) != 0 and "q is null or not 16-byte aligned" in err()


def lengths_and_poison(past: Any, capacity: int) -> Any:
    """Random lengths for a past (2,B,P,...) on the GPU, whose rows beyond them become NaN."""
    import torch

    length = torch.randint(0, capacity + 1, past.shape[1:2], device="cuda", dtype=torch.int32)
    for i, n in enumerate(length.tolist()):
        past[:, i, n:] = torch.nan
    return length


TYPES = {"float32": FLOAT, "float16": HALF, "bfloat16": BFLOAT}


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("storage", TYPES)
def test_feedback_gives_the_bits_of_the_torch_op(built: tuple[int, Path, ctypes.CDLL], storage: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Decode steps and prefill, ragged, with poisoned rows beyond each length."""
    import torch

    from sessa_deploy.kernels import feedback_fwd, feedback_step

    major, _, harness = built
    onnx, dtype = TYPES[storage], getattr(torch, storage)
    torch.manual_seed(0)
    plugin = create(built, FEEDBACK, storage=onnx)
    if plugin is None:
        assert (major, onnx) == (8, BFLOAT)
        return
    for b, t, p, d in ((3, 1, 300, 768), (2, 1, 1, 48), (1, 1, 4096, 4096), (1, 257, 0, 256), (3, 100, 130, 768), (1, 1000, 64, 1024)):
        q, k, f = torch.randn(3, b, t, d, device="cuda").to(dtype)
        past = torch.randn(2, b, p, d, device="cuda").to(dtype)
        length = lengths_and_poison(past, p)
        gamma = 1.998 * torch.rand(b, t, device="cuda") - 0.999
        op: Callable[..., torch.Tensor] = feedback_step.step if t == 1 else lambda *a: feedback_fwd.forward(*a, need_lse=False)[0]
        inputs = [q, k, gamma, f, past[0], past[1], length]
        enqueue_and_compare(harness, plugin, FEEDBACK, onnx, sizes(b, t, p, d), inputs, op(*inputs), lambda: capfd.readouterr().err)
    harness.harness_destroy(plugin)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("storage", TYPES)
def test_causal_gives_the_bits_of_the_torch_op(built: tuple[int, Path, ctypes.CDLL], storage: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Decode steps and chunks, ragged, grouped heads of several widths, with poisoned rows beyond each length."""
    import torch

    from sessa_deploy.kernels import causal_launch

    major, _, harness = built
    onnx, dtype = TYPES[storage], getattr(torch, storage)
    torch.manual_seed(0)
    plugin = create(built, CAUSAL, storage=onnx)
    if plugin is None:
        assert (major, onnx) == (8, BFLOAT)
        return
    shapes = [(3, 1, 300, 64, 16, 16), (2, 1, 1, 48, 6, 2), (1, 1, 5000, 128, 9, 1), (2, 1, 70, 256, 4, 4), (1, 1, 33, 24, 5, 5),
              (3, 100, 130, 64, 4, 2), (1, 257, 64, 128, 2, 2), (2, 130, 1, 40, 3, 3), (1, 40, 300, 256, 2, 1)]  # fmt: skip
    for b, t, p, d, heads, kv_heads in shapes:
        q = torch.randn(b, t, heads, d, device="cuda").to(dtype)
        k, v = torch.randn(2, b, t, kv_heads, d, device="cuda").to(dtype)
        past = torch.randn(2, b, p, kv_heads, d, device="cuda").to(dtype)
        inputs = [q, k, v, past[0], past[1], lengths_and_poison(past, p)]
        expected = causal_launch.forward(*inputs)
        enqueue_and_compare(harness, plugin, CAUSAL, onnx, sizes(b, t, p, d, heads, kv_heads), inputs, expected, lambda: capfd.readouterr().err)
    harness.harness_destroy(plugin)


def test_a_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "user_folder", lambda: tmp_path)
    monkeypatch.setattr(library, "_HERE", tmp_path)
    monkeypatch.setattr(library, "installed_major", lambda: None)
    with pytest.raises(UserError, match="fix: sessa-deploy plugin build"):
        library.find()
    for major in (10, 11):
        (tmp_path / f"trt{major}").mkdir()
        (tmp_path / f"trt{major}" / library.LIBRARY).write_bytes(b"not a library")
    assert library.find() == tmp_path / "trt11" / library.LIBRARY
    assert library.find(10) == tmp_path / "trt10" / library.LIBRARY
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

"""The TensorRT backend on fakes of tensorrt and the driver: the engine is ONNX Runtime, everything around it is the real code."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from fake_tensorrt import HostCuda, fake_cubins
from ragged_steps import check_laid, check_torn, drive

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.plugins import library
from sessa_deploy.runtime import engines
from sessa_deploy.runtime.bundle import Bundle, add_files, write_bundle
from sessa_deploy.runtime.device import buffers
from sessa_deploy.runtime.device.kernels import images
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.trt import api as trt_api
from sessa_deploy.runtime.trt import backend as trt_backend
from sessa_deploy.runtime.trt import plan as trt_plan
from sessa_deploy.runtime.trt.backend import TrtBackend

BATCH, CAPACITY, CHUNK = 3, 48, 8


RTX = "1.7.1.116"


@pytest.fixture(params=["8.6.0", "10.9.0", RTX])
def build(request: pytest.FixtureRequest, bundles: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """(precision, **backend options) -> (backend, cuda, bundle), each on a bundle with an engine from a fake build."""
    from sessa_deploy.export import to_engine

    def make(precision: str = "fp32", all_logits: bool = False, **options: Any) -> tuple[TrtBackend, HostCuda, Bundle]:
        rtx = request.param == RTX
        cuda = HostCuda(arch=86 if rtx else 90)
        for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
            monkeypatch.setitem(sys.modules, name, None)
        module = "tensorrt_rtx" if rtx else "tensorrt"
        monkeypatch.setitem(sys.modules, module, fake_tensorrt.make(request.param, cuda, module=module))
        monkeypatch.setattr(trt_api, "cache_file", lambda kind, *names: tmp_path / kind / "-".join(names))
        monkeypatch.setattr(to_engine, "images", lambda plugin, arch: None)
        plugin = tmp_path / "libsessa_plugin.so"
        plugin.write_bytes(b"plugin")
        monkeypatch.setattr(library, "load", lambda trt, path=None, major=None: plugin)
        machine = to_engine.Machine("Fake", "rtx-86" if rtx else "sm_90", 1 << 34, 1 << 34, request.param, "12.8")
        monkeypatch.setattr(to_engine, "this_machine", lambda trt, targets=(): machine)
        monkeypatch.setattr(to_engine, "timing_cache_file", lambda machine: tmp_path / "timing.cache")
        source = bundles(precision, all_logits)
        bundle = write_bundle(tmp_path / "bundle", {n: source.file(n) for n in source.names()}, source.config, precision, source.versions)
        built = to_engine.build_engine(bundle, BATCH, CAPACITY, CHUNK, archs=[86] if rtx else None)
        backend = TrtBackend(built.bundle, kernels=fake_cubins(tmp_path, cuda.arch), cuda=cuda, **{"batch": BATCH, **options})
        return backend, cuda, built.bundle

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("poison", [False, True])
def test_steps_equal_onnx_runtimes(build: Callable[..., Any], bundles: Callable[..., Bundle], precision: str, poison: bool) -> None:
    backend, cuda, _ = build(precision)
    reference = OrtBackend(bundles(precision), batch=BATCH, capacity=CAPACITY, threads=1)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for mine, theirs in zip(drive(backend, poison), drive(reference), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(backend.length, reference.length)
    for row in range(BATCH):
        for (name, mine), theirs in zip(backend.cached(row).items(), reference.cached(row).values(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance, err_msg=name)
    assert cuda.replays == 4 and len(cuda.graphs) == 1  # of five decode steps the first is not captured


def test_an_engine_with_all_logits_steps_like_one_without(build: Callable[..., Any], bundles: Callable[..., Bundle]) -> None:
    backend, cuda, bundle = build(all_logits=True)
    reference = OrtBackend(bundles("fp32"), batch=BATCH, capacity=CAPACITY, threads=1)
    assert backend.all_logits and not reference.all_logits
    for mine, theirs in zip(drive(backend, poison=True), drive(reference), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    assert cuda.replays == 4
    backend.reset()
    reference.reset()
    ids, new = np.random.default_rng(1).integers(0, 257, (3, 19)), np.array([19, 5, 0], np.int32)
    for _ in range(2):
        mine, theirs = backend.step_all(ids, new), reference.step_all(ids, new)
        for b, count in enumerate(new):
            np.testing.assert_allclose(mine[b, :count], theirs[b, :count], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(backend.length, reference.length)
    backend.reset()
    with Session(bundle, backend) as session:
        wanted = Session(bundles("fp32"), OrtBackend(bundles("fp32"), BATCH, CAPACITY, threads=1)).generate(["one", "a longer prompt"], 20)
        assert session.generate(["one", "a longer prompt"], 20) == wanted


def test_text_equals_onnx_runtimes_with_and_without_a_graph(build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    prompts = ["one", "a longer prompt", "x"]
    with Session(tiny_bundle, "ort", max_batch=BATCH, capacity=CAPACITY, threads=1) as session:
        wanted = [g.tokens for g in session.generate(prompts, 20)]
    for graph in (True, False):
        backend, cuda, bundle = build("fp32", graph=graph)
        with Session(bundle, backend) as session:
            assert [g.tokens for g in session.generate(prompts, 20)] == wanted
        assert (cuda.replays > 0) == graph and cuda.closed
        marks = [what for what in cuda.log if what != "replay"]
        assert marks[:5] == ["record 1", "record 2", "wait 1", "record 1", "wait 2"], "the next step is launched before the ids are waited for"


@pytest.mark.parametrize("alignment", [256, 4096])
def test_one_sequence_alone_equals_onnx_runtime_s(
    build: Callable[..., Any], bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, alignment: int
) -> None:
    """By a context at batch 1 on that sequence's own rows, or, where these are not aligned as TensorRT asks, by a step in which the others stand still."""
    monkeypatch.setattr(TrtBackend, "row_alignment", alignment)
    backend, cuda, _ = build()
    reference = OrtBackend(bundles("fp32"), batch=BATCH, capacity=CAPACITY, threads=1)
    rng, one = np.random.default_rng(3), np.ones(BATCH, np.int32)
    for _ in range(2):
        backend.poison()
        rows = [(0, 11), (2, 1), (2, 9)]
        for row, tokens in rows:
            ids = rng.integers(0, 257, tokens)
            np.testing.assert_allclose(backend.step_row(row, ids), reference.step_row(row, ids), rtol=1e-5, atol=1e-5)
        ids = rng.integers(0, 257, (BATCH, 1))
        for each in (backend, reference):
            each.copy_row(0, 1, 5)
        for _ in range(2):
            np.testing.assert_array_equal(backend.step_greedy(ids, one), reference.step_greedy(ids, one))
        ids = rng.integers(0, 257, (BATCH, 3))
        np.testing.assert_allclose(backend.step(ids, 3 * one), reference.step(ids, 3 * one), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(backend.length, reference.length)
    for row in range(BATCH):
        for (name, mine), theirs in zip(backend.cached(row).items(), reference.cached(row).values(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
    trt = sys.modules["tensorrt"] or sys.modules["tensorrt_rtx"]
    assert backend._runs_rows() == (alignment == 256) and trt.calls.contexts[0].shapes["past_length"] == (BATCH,)
    assert cuda.replays == (3 if alignment == 256 else 3 + 4)


@pytest.mark.parametrize("build", ["10.9.0"], indirect=True)
def test_a_long_prompt_s_rows_are_laid_in_the_caches(build: Callable[..., Any], bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_LEAST_BEHIND", 1)
    monkeypatch.setattr(sys.modules[__name__], "CHUNK", CAPACITY)
    backend = build()[0]
    reference = OrtBackend(bundles("fp32"), batch=BATCH, capacity=CAPACITY, threads=1)
    check_laid(backend, reference, 1, 256)
    context, shape = type(backend._prefill), "set_input_shape"  # which a step of as many rows as the one before does not call
    calls = [(context, "set_tensor_address", 8, 16), (context, shape, 1, 12), (context, shape, 0, 12), (buffers.Buffers, "finish", 0, 16)]
    check_torn(backend, reference, monkeypatch, calls)


def test_a_prompt_of_as_many_tokens_as_the_one_before_sets_no_shape(
    build: Callable[..., Any], bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, reference = build()[0], OrtBackend(bundles("fp32"), batch=BATCH, capacity=CAPACITY, threads=1)
    kind, shapes, rng = type(backend._prefill), list[str](), np.random.default_rng(5)
    plain = kind.set_input_shape
    monkeypatch.setattr(kind, "set_input_shape", lambda self, name, shape: (shapes.append(name), plain(self, name, shape))[1])
    for tokens, told in ((5, 1), (5, 0), (CHUNK, 1)):  # of all sequences
        ids, new = rng.integers(0, 257, (BATCH, tokens)), np.full(BATCH, tokens, np.int32)
        np.testing.assert_allclose(backend.step(ids, new), reference.step(ids, new), rtol=1e-5, atol=1e-5)
        assert len(shapes) == told
        shapes.clear()
    for row, tokens, told in ((0, 8, 2), (0, 6, 1), (1, 5, 2), (1, 6, 1), (1, 6, 0), (0, 6, 2), (0, 5, 1)):  # of one: 2 where it is another
        ids = rng.integers(0, 257, tokens)
        np.testing.assert_allclose(backend.step_row(row, ids), reference.step_row(row, ids), rtol=1e-5, atol=1e-5)
        assert min(len(shapes), 2) == told, (row, tokens)
        shapes.clear()


def test_a_greedy_step_is_one_copy_in_and_none_out(build: Callable[..., Any]) -> None:
    backend, cuda, _ = build(graph=False)
    ids, new = np.ones((BATCH, 1), np.int64), np.ones(BATCH, np.int32)
    backend.step_greedy(ids, new)
    before, sent = cuda.read_back, cuda.sent
    backend.step_greedy(ids, new)
    assert (cuda.read_back, cuda.sent) == (before, sent + 1) and backend.device_bytes() == 8 << 30
    backend.rewind(0, 1)
    backend.step_greedy(ids, new)
    assert cuda.sent == sent + 2, "lengths go along, whatever the device has"


def test_a_row_that_stands_still_may_have_bad_logits(build: Callable[..., Any]) -> None:
    backend, cuda, _ = build(graph=False)
    ids, new = np.ones((BATCH, 1), np.int64), np.ones(BATCH, np.int32)
    backend.step_greedy(ids, new)
    entry = backend._buffers.entries[0]
    cuda.fill(entry.cache + CAPACITY * entry.row, 0x7FC00000, 16)  # the second sequence's first row
    picked = backend.step_greedy(ids, np.array([1, 0, 1], np.int32))
    assert backend._buffers.picked()[1] == -1 and picked[1] == 0 and backend.length.tolist() == [2, 1, 2]
    with pytest.raises(SessaError, match="not finite"):
        backend.step_greedy(ids, new)
    assert backend.length.tolist() == [2, 1, 2]


def test_logits_that_are_not_finite_raise_and_change_nothing(build: Callable[..., Any]) -> None:
    backend, cuda, _ = build(graph=False)
    ids, new = np.ones((BATCH, 1), np.int64), np.ones(BATCH, np.int32)
    backend.step_greedy(ids, new)
    cache = backend._buffers.entries[0].cache
    good = cuda.read(cache, 64)
    cuda.fill(cache, 0x7FC00000, 16)
    with pytest.raises(SessaError, match="not finite"):
        backend.step_greedy(ids, new)
    assert backend.length.tolist() == [1] * BATCH
    ctypes.memmove(cache, good, 64)
    backend.step_greedy(ids, new)
    assert backend.length.tolist() == [2] * BATCH


def test_limits_of_the_engine_are_named(build: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"--max-batch 4"):
        build(batch=4)
    with pytest.raises(UserError, match=r"--max-context 49"):
        build(capacity=49)
    backend, _, _ = build(batch=1, capacity=20)
    with pytest.raises(UserError, match="capacity of 20"):
        backend.step(np.ones((1, 21), np.int64), np.array([21], np.int32))
    backend.close()
    backend.close()
    with pytest.raises(UserError, match="closed"):
        backend.cached(0)


def test_whatever_fails_while_opening_gives_the_gpu_back(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, cuda, bundle = build()

    def fail(*given: Any, **named: Any) -> Any:
        raise SessaError("the CUDA driver refused it")

    for module, name in ((trt_plan, "choose"), (trt_plan, "read_plan"), (trt_backend, "Buffers"), (trt_api, "runtime_config"), (trt_api, "context")):
        other = HostCuda(arch=cuda.arch)
        with monkeypatch.context() as patch, pytest.raises(SessaError, match="refused it"):
            patch.setattr(module, name, fail)
            TrtBackend(bundle, kernels=tmp_path, cuda=other)
        assert other.closed, name


def test_a_plan_is_loaded_only_where_it_belongs(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, cuda, bundle = build()
    folder, info = next(iter(trt_plan.engines(bundle).items()))
    loads: list[bytes] = []
    trt = sys.modules["tensorrt"] or sys.modules["tensorrt_rtx"]
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, data: loads.append(data))

    def refused(text: str, **change: Any) -> None:
        with pytest.raises(UserError, match=text) as caught:
            TrtBackend(bundle, kernels=tmp_path, cuda=cuda, **change)
        assert "sessa-deploy build" in str(caught.value) and loads == []

    right, wrong = cuda.arch, 80
    cuda.arch = wrong
    refused(f"another GPU architecture.*built for sm_{right}, this GPU is sm_80")
    cuda.arch = right
    version = trt.__version__
    monkeypatch.setattr(trt, "__version__", "10.99.0")
    refused(f"another TensorRT version.*built with {version}, installed is 10.99.0")
    monkeypatch.setattr(trt, "__version__", version)
    plan = bundle.file(f"{folder}/{trt_plan.PLAN_FILE}")
    plan.write_bytes(plan.read_bytes()[:-1] + b" ")
    refused("does not match its checksum")
    refused("fewer sequences", batch=9)
    bundle = add_files(bundle, {f"{folder}/{trt_plan.ENGINE_FILE}": info.to_json().replace(b'"capacity"', b'"capacities"')})
    refused("not an engine's description")
    bundle = add_files(bundle, {}, remove=[f"{folder}/{trt_plan.ENGINE_FILE}"])
    refused("no TensorRT engine")


@pytest.mark.parametrize("build", [RTX], indirect=True)
def test_kernels_compiled_on_the_card_are_kept(build: Callable[..., Any], tmp_path: Path) -> None:
    """By GPU and version, written when the session ends and read by the next; damaged ones are compiled anew."""
    backend, _, bundle = build()
    trt = sys.modules["tensorrt_rtx"]
    assert trt.calls.targets == {0: "SM86"} and backend.info.product == "rtx" and backend.info.archs == [86]
    file = tmp_path / "runtime" / f"gpu-sm_86-{RTX}"
    assert not file.exists()
    backend.close()
    assert file.read_bytes() == b"kernels"
    file.write_bytes(b"kernels of before")
    TrtBackend(bundle, kernels=fake_cubins(tmp_path, 86), cuda=HostCuda(arch=86), batch=BATCH).close()
    assert trt.calls.caches[-1].data == b"kernels of before" == file.read_bytes()
    file.write_bytes(b"damaged")
    TrtBackend(bundle, kernels=fake_cubins(tmp_path, 86), cuda=HostCuda(arch=86), batch=BATCH).close()
    assert file.read_bytes() == b"kernels"
    with pytest.raises(UserError, match="TensorRT for RTX does not support this compute capability: got sm_90"):
        TrtBackend(bundle, cuda=HostCuda())


@pytest.mark.parametrize("build", ["10.9.0"], indirect=True)
def test_the_engine_for_this_card_says_which_tensorrt_runs(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, bundle = build()
    folder, info = next(iter(trt_plan.engines(bundle).items()))
    other = dataclasses.replace(info, product="rtx", archs=[80, 86], arch="rtx-80_86", tensorrt=RTX)
    both = add_files(bundle, {f"engines/rtx-80_86-{RTX}-fp32/{name}": data for name, data in (
        (trt_plan.ENGINE_FILE, other.to_json()), (trt_plan.PLAN_FILE, bundle.read(f"{folder}/{trt_plan.PLAN_FILE}")))})  # fmt: skip
    assert trt_plan.products(bundle) == ["tensorrt"] and trt_plan.products(both) == ["tensorrt", "rtx"]
    for arch, installed, wanted in ((90, ("tensorrt", "rtx"), "tensorrt"), (86, ("tensorrt", "rtx"), "rtx"), (86, ("tensorrt",), "tensorrt"),
                                    (90, ("rtx",), "rtx"), (None, ("tensorrt", "rtx"), "tensorrt"), (86, (), "rtx")):
        assert trt_plan.product_for(both, arch, installed) == wanted, (arch, installed)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert engines.choose(bundle) != "trt"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt.make(RTX, HostCuda(), module="tensorrt_rtx"))
    assert engines.choose(bundle) != "trt" and engines.choose(both) == "trt"


def test_tensorrt_or_plugin_missing_is_one_line(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install .sessa-deploy\[tensorrt\]"):
        TrtBackend(tiny_bundle)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make("8.6.0", HostCuda()))
    monkeypatch.setenv(library.ENVIRONMENT, str(tmp_path / "none.so"))
    with pytest.raises(UserError, match="sessa-deploy plugin build"):
        TrtBackend(tiny_bundle)


def test_decode_kernels_are_checked(tmp_path: Path) -> None:
    folder = fake_cubins(tmp_path)
    assert images(folder, 90)["decode_end"].splits == fake_tensorrt.SPLITS
    with pytest.raises(UserError, match=r"sm_80.*plugin build --arch 80"):
        images(folder, 80)
    (folder / "decode_append.cubin").write_bytes(b"other")
    with pytest.raises(UserError, match="checksum"):
        images(folder, 90)
    broken = tmp_path / "x.so"
    broken.write_bytes(b"no library")
    with pytest.raises(UserError, match="plugin build"):
        images(broken, 90)

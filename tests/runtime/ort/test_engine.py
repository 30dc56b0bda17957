"""ONNX Runtime's CUDA session with our kernels, on fakes of its CUDA provider and the driver: the graph runs on the CPU provider, bound to host addresses that
stand for the GPU's, and everything around it is the real code."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import HostCuda
from fake_onnxruntime import BATCH, CAPACITY, Binding, described
from ragged_steps import check_laid, check_torn, drive

from sessa_deploy.cuda import Device
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.plugins import library
from sessa_deploy.runtime import engines
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.device import buffers
from sessa_deploy.runtime.device.buffers import Buffers
from sessa_deploy.runtime.ort import engine, prepared
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.engine import OrtCudaBackend
from sessa_deploy.runtime.session import Session

Build = Callable[..., tuple[OrtCudaBackend, HostCuda, Any]]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", [True, False])
def test_steps_equal_the_plain_graph_s(build: Build, bundles: Callable[..., Bundle], precision: str, graph: bool) -> None:
    backend, cuda, fake = build(precision, graph=graph)
    reference = OrtBackend(bundles(precision), batch=BATCH, capacity=CAPACITY, threads=1)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for mine, theirs in zip(drive(backend, poison=True), drive(reference), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(backend.length, reference.length)
    for row in range(BATCH):
        for (name, mine), theirs in zip(backend.cached(row).items(), reference.cached(row).values(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance, err_msg=name)
    # Of five steps of one row the first two are not captured, nor are they of the three chunks of 8; of other numbers of rows there are two at most.
    assert (cuda.replays, len(cuda.graphs)) == ((4, 2) if graph else (0, 0))
    (session,) = fake.sessions
    assert session.cuda_options["enable_cuda_graph"] == str(int(graph)) and len(session.options.libraries) == 1
    assert session.options.enable_mem_pattern is False and session.options.intra_op_num_threads == 1
    assert session.options.use_deterministic_compute is True and session.options.entries["session.use_device_allocator_for_initializers"] == "1"
    backend.close()
    assert cuda.closed and cuda.graphs == {} and backend.session is None


@pytest.mark.parametrize("batch", [1, 2])
def test_a_long_prompt_s_rows_are_laid_in_the_caches(build: Build, bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    assert not buffers.Buffers.fits_behind(build(batch=batch, chunk=48)[0]._own(), buffers.Extent(1, 40), 0, 16)  # a short one's rows are copied
    monkeypatch.setattr(buffers, "_LEAST_BEHIND", 1)
    backend = build(batch=batch, chunk=48)[0]
    check_laid(backend, OrtBackend(bundles("fp32"), batch=batch, capacity=CAPACITY, threads=1), batch - 1, 16)
    assert len(backend._bindings) <= 8, "one of an extent, whatever its rows lie behind"


def test_ctrl_c_in_a_step_that_lays_its_rows_leaves_nothing_behind(build: Build, bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_LEAST_BEHIND", 1)
    backend = build(batch=2, chunk=48)[0]
    reference = OrtBackend(bundles("fp32"), batch=2, capacity=CAPACITY, threads=1)
    calls = [(Binding, "bind_output", 3, 16), (Buffers, "feed", 1, 16), (Buffers, "finish", 1, 16), (Buffers, "finish", 0, 16)]
    check_torn(backend, reference, monkeypatch, calls)


def test_every_number_of_rows_has_its_own_graph(build: Build) -> None:
    """Steps of 1, 2 and 5 rows in turn: each captured once, after two that were not, and all give what uncaptured steps give."""
    captured, cuda, _ = build()
    plain, _, _ = build(graph=False)
    rng = np.random.default_rng(1)
    for turn in range(4):
        for tokens in (1, 2, 5):
            ids, new = rng.integers(0, 257, (BATCH, tokens)), np.array([tokens, 1, tokens - 1], np.int32)
            np.testing.assert_array_equal(captured.step_greedy(ids, new)[[0, 1]], plain.step_greedy(ids, new)[[0, 1]])
            np.testing.assert_array_equal(captured.length, plain.length)
        assert len(cuda.graphs) == (0, 0, 3, 3)[turn]
    assert cuda.replays == 6
    for row in range(BATCH):
        for (name, mine), theirs in zip(captured.cached(row).items(), plain.cached(row).values(), strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_steps_of_up_to_sixteen_rows_have_graphs(build: Build) -> None:
    for tokens, graphs in ((16, 1), (17, 0)):
        backend, cuda, _ = build(chunk=20, capacity=64)
        for _ in range(3):
            backend.step_greedy(np.ones((BATCH, tokens), np.int64), np.full(BATCH, tokens, np.int32))
        assert (len(cuda.graphs), cuda.replays) == (graphs, graphs)


def test_a_captured_step_is_recorded_on_the_thread_that_warmed_it(build: Build) -> None:
    backend, cuda, _ = build()
    ids, new = np.ones((BATCH, 1), np.int64), np.ones(BATCH, np.int32)
    backend.step_greedy(ids, new)
    backend.step_greedy(ids, new)
    with ThreadPoolExecutor(1) as other:
        for count in (0, 0, 1):
            other.submit(backend.step_greedy, ids, new).result()
            assert len(cuda.graphs) == count
    backend.step_greedy(ids, new)
    assert cuda.replays == 2  # what is captured, any thread replays


def test_a_greedy_step_is_one_copy_in_and_none_out(build: Build) -> None:
    backend, cuda, _ = build()
    ids, new = np.ones((BATCH, 1), np.int64), np.ones(BATCH, np.int32)
    for _ in range(3):
        backend.step_greedy(ids, new)
    before, sent, launches = cuda.read_back, cuda.sent, cuda.launches
    backend.step_greedy(ids, new)
    assert (cuda.read_back, cuda.sent, cuda.launches) == (before, sent, launches) and cuda.replays == 2  # the copy is in the graph, and all else
    assert backend.device_bytes() == 8 << 30


@pytest.mark.parametrize("all_logits", [False, True])
def test_of_sequences_that_draw_beside_greedy_ones_the_host_reads_logits_alone(build: Build, bundles: Callable[..., Bundle], all_logits: bool) -> None:
    backend, cuda, _ = build(all_logits=all_logits)
    reference = OrtBackend(bundles("fp32"), batch=BATCH, capacity=CAPACITY, threads=1)
    rng = np.random.default_rng(3)
    for rows in ([2], [0, 2], [1], [1]):
        ids, new = rng.integers(0, 257, (BATCH, 1)), np.array([1, 1, 1], np.int32)
        read, expected = cuda.read_back, reference.step(ids, new)
        picked, logits = backend.step_some(ids, new, rows)
        np.testing.assert_array_equal(picked, expected.argmax(-1))
        np.testing.assert_allclose(logits, expected[rows], rtol=1e-4, atol=1e-4)
        assert cuda.read_back == read + len(rows) * 4 * 257
    ids = rng.integers(0, 257, (BATCH, 4))
    new = np.array([4, 2, 1], np.int32)
    expected = reference.step(ids, new)
    picked, logits = backend.step_some(ids, new, [1])
    np.testing.assert_array_equal(picked, expected.argmax(-1))
    np.testing.assert_allclose(logits, expected[[1]], rtol=1e-4, atol=1e-4)
    assert backend.length.tolist() == reference.length.tolist()


@pytest.mark.parametrize("all_logits", [False, True])
def test_a_prompt_s_first_token_may_be_picked_on_the_device(build: Build, bundles: Callable[..., Bundle], all_logits: bool) -> None:
    """Prompts of several chunks, ending in different ones, one sequence idle."""
    backend, cuda, _ = build(all_logits=all_logits)
    reference = OrtBackend(bundles("fp32"), batch=BATCH, capacity=CAPACITY, threads=1)
    ids, new = np.random.default_rng(2).integers(0, 257, (BATCH, 19)), np.array([3, 19, 0], np.int32)
    mine, theirs = backend.step_greedy(ids, new), reference.step_greedy(ids, new)
    assert mine[:2].tolist() == theirs[:2].tolist() and mine[2] >= 0 and (cuda.read_back > 0) == all_logits


def test_a_graph_with_all_logits_steps_like_one_without(build: Build, bundles: Callable[..., Bundle]) -> None:
    backend, _, _ = build(all_logits=True)
    reference = OrtBackend(bundles("fp32"), batch=BATCH, capacity=CAPACITY, threads=1)
    assert backend.all_logits and backend.best_chunk == 8
    for mine, theirs in zip(drive(backend, poison=True), drive(reference), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    for one in (backend, reference):
        one.reset()
    ids, new = np.random.default_rng(1).integers(0, 257, (3, 19)), np.array([19, 5, 0], np.int32)
    mine, theirs = backend.step_all(ids, new), reference.step_all(ids, new)
    for b, count in enumerate(new):
        np.testing.assert_allclose(mine[b, :count], theirs[b, :count], rtol=1e-5, atol=1e-5)


def test_text_equals_the_plain_graph_s(build: Build, tiny_bundle: Bundle) -> None:
    prompts = ["one", "a longer prompt", "x"]
    with Session(tiny_bundle, "ort", max_batch=BATCH, capacity=CAPACITY, threads=1) as session:
        wanted = [g.tokens for g in session.generate(prompts, 20)]
    for graph in (True, False):
        backend, cuda, _ = build(graph=graph)
        with Session(tiny_bundle, backend) as session:
            assert [g.tokens for g in session.generate(prompts, 20)] == wanted
        assert (cuda.replays > 0) == graph and cuda.closed


def test_where_a_capture_fails_steps_go_on_without_and_it_is_said_once(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    backend, cuda, _ = build(module={"uncapturable": True})
    plain, _, _ = build(graph=False)
    ids, new = np.ones((BATCH, 1), np.int64), np.ones(BATCH, np.int32)
    for _ in range(5):
        np.testing.assert_array_equal(backend.step_greedy(ids, new), plain.step_greedy(ids, new))
    np.testing.assert_array_equal(backend.length, plain.length)
    said = capsys.readouterr().err
    assert said.count("note:") == said.count("\n") == 1 and "without a CUDA graph" in said and "stream is capturing" in said
    assert cuda.replays == 0 and cuda.graphs == {}


def test_a_graph_that_onnx_runtime_cannot_capture_is_opened_without(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    backend, cuda, fake = build(module={"memcpy": True})
    for _ in range(4):
        backend.step_greedy(np.ones((BATCH, 1), np.int64), np.ones(BATCH, np.int32))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Memcpy" in said and cuda.replays == 0
    assert "enable_cuda_graph" not in fake.sessions[0].cuda_options
    with pytest.raises(UserError, match=r"cannot load the graph: got no such op; fix: sessa-deploy build .* --for ort --force") as caught:
        build(module={"refused": "no such op"})
    assert "\n" not in str(caught.value) and capsys.readouterr().err == ""  # that is no matter of graphs


def test_the_oldest_onnx_runtime_serves_and_one_before_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(module={"__version__": "1.18.0"})[0].session is not None
    with pytest.raises(UserError, match=r"too old for our kernels: got 1.17.3; allowed: 1.18 or later; fix: pip install -U onnxruntime-gpu"):
        build(module={"__version__": "1.17.3"})
    from sessa_deploy.runtime.device import buffers

    monkeypatch.setattr(buffers, "MAX_WIDTH", 8)
    with pytest.raises(UserError, match="width does not run in ONNX Runtime with our kernels: got d_model=16"):
        build()


def test_what_is_kept_for_a_step_s_shape_is_bounded(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of every length come; what was let go is made anew."""
    monkeypatch.setattr(engine, "_MOST_BINDINGS", 3)
    backend, _, _ = build(graph=False)
    for tokens in (1, 2, 3, 4, 5, 1, 2):
        backend.step(np.ones((BATCH, tokens), np.int64), np.full(BATCH, tokens, np.int32))
    assert [step.tokens for step in backend._bindings] == [5, 1, 2]
    monkeypatch.setattr("sessa_deploy.runtime.sizes._MOST_LOGITS", 4 * BATCH * 257 * 2)
    assert (build(all_logits=True)[0].best_chunk, build()[0].best_chunk) == (2, 8)


def test_a_step_that_fails_is_one_line_and_changes_nothing(build: Build) -> None:
    backend, _, fake = build()
    ids, new = np.ones((BATCH, 1), np.int64), np.ones(BATCH, np.int32)
    backend.step_greedy(ids, new)
    for why, mend in (("Failed to allocate memory\nfor 3 bytes", "lower --capacity"), ("SessaTail: k is", "build BUNDLE --for ort --force")):
        fake.failing = why
        with pytest.raises(SessaError, match=mend) as caught:
            backend.step(np.ones((BATCH, 5), np.int64), new)
        assert "\n" not in str(caught.value) and backend.length.tolist() == [1] * BATCH
        with pytest.raises(SessaError):
            backend.step_row(1, np.ones(3, np.int64))
    fake.failing = None
    backend.step_greedy(ids, new)
    assert backend.length.tolist() == [2] * BATCH


def test_a_chunk_holds_what_the_new_rows_of_all_sequences_may_take(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from sessa_deploy.runtime.device import buffers

    backend, cuda, _ = build(chunk=20)
    assert backend.best_chunk == 20 and sum(map(len, cuda.blocks.values())) > 0
    monkeypatch.setattr(buffers, "_MOST_FRESH", 6 * 2 * (2 * 2 * 4 + 2 * 16) * 4)  # bytes of six tokens' rows
    assert build(chunk=20)[0].best_chunk == 2 and build(chunk=1000, batch=1, capacity=5)[0].best_chunk == 5


def test_weights_are_given_as_they_lie_in_the_bundle(build: Build, bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"w": (np.arange(6, dtype=np.float32), 1), "h": (np.arange(4, dtype=np.float16), 10), "b": (np.arange(3, dtype=np.uint16), 16)}
    table = tuple(prepared.Weight(name, "model.onnx", 0, x.nbytes, kind, x.shape) for name, (x, kind) in made.items())
    monkeypatch.setattr(prepared, "find", lambda bundle: described(bundle, weights=table))
    monkeypatch.setattr(prepared, "weights", lambda bundle, found: {name: x for name, (x, _) in made.items()})
    backend, _, fake = build()
    given = fake.sessions[0].options.initializers
    assert {name: value.element_type() for name, value in given.items()} == {name: kind for name, (_, kind) in made.items()}
    assert all(given[name].data_ptr() == x.ctypes.data for name, (x, _) in made.items()), "not copied"
    assert list(backend.seconds) == ["ONNX Runtime imported", "CUDA's libraries loaded", "GPU opened", "session made", "memory reserved"]


def test_the_road_is_taken_where_library_and_graph_are_found_and_else_named(
    build: Build, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    _, _, fake = build()
    opened: list[str] = []
    monkeypatch.setattr(engine, "OrtCudaBackend", lambda *given, **options: opened.append("ours"))
    monkeypatch.setattr("sessa_deploy.runtime.ort.backend.OrtBackend", lambda *given, **options: opened.append(options["provider"]))

    def said() -> str:
        engines.open_backend(tiny_bundle, "ort-cuda")
        text = capsys.readouterr()
        assert text.out == "" and text.err.count("\n") == (text.err != "")
        return text.err

    assert said() == "" and opened.pop() == "ours"
    with monkeypatch.context() as without:
        without.setattr(prepared, "find", lambda bundle: None)
        line = said()
        assert line.startswith("note: ") and f"sessa-deploy build {tiny_bundle.path} --for ort" in line and "plugin build" not in line
        without.setattr(library, "find", no_library)
        line = said()
        assert line.index("sessa-deploy plugin build --for ort") < line.index(f"sessa-deploy build {tiny_bundle.path} --for ort")
    with monkeypatch.context() as without:
        without.setattr(library, "find", no_library)
        assert said().rstrip().endswith("fast with: sessa-deploy plugin build --for ort")
    with monkeypatch.context() as other:
        other.setattr(engine, "devices", lambda: [Device(0, "Fake", "sm_86", 1 << 34)])
        assert "plugin build --for ort --arch 86" in said()
    with monkeypatch.context() as old:
        old.setattr(fake, "__version__", "1.17.3")
        assert "too old" in said() and "1.17.3" in said()
    assert set(opened) == {"cuda"}
    monkeypatch.setattr("sessa_deploy.runtime.ort.session.cuda_is_usable", lambda: False)
    assert said() == ""  # the plain session says what is missing


def no_library(major: int | None = None, product: str = "tensorrt") -> Path:
    raise UserError("no library of kernels for ONNX Runtime", fix="sessa-deploy plugin build --for ort")

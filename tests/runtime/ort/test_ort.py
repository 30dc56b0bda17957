"""The ONNX Runtime backend on real graphs against the numpy oracle; the code for a GPU's caches is rehearsed on host memory."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.ort.device_cache import DeviceCache
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.session import Session

PROMPTS = [[1, 2, 3], [7], list(range(40, 53)), [200, 100]]


def rehearsed(bundle: Bundle, batch: int, capacity: int | None = None) -> OrtBackend:
    """A backend whose caches are bound as on a GPU, in host memory."""
    backend = OrtBackend(bundle, batch, capacity)
    backend._host = None
    backend._device = DeviceCache(bundle.config, batch, backend.capacity, bundle.precision, backend.session, "cpu")
    return backend


@pytest.fixture(params=["views", "bound"])
def open_session(request, tiny_bundle):
    def get(batch: int = 1, capacity: int | None = None, chunk: int = 5) -> Session:
        backend = OrtBackend(tiny_bundle, batch, capacity) if request.param == "views" else rehearsed(tiny_bundle, batch, capacity)
        return Session(tiny_bundle, backend, chunk=chunk)

    return get


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunked_ragged_prefill_over_poison(open_session, tiny, chunk):
    s = open_session(4, chunk=chunk)
    s.backend.poison()
    logits = s.prefill(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        close(logits[row], tiny.logits(prompt)[-1])
    s.backend.poison()
    logits = s.decode([9, None, 8, None])
    close(logits[0], tiny.logits([*PROMPTS[0], 9])[-1])
    close(logits[2], tiny.logits([*PROMPTS[2], 8])[-1])
    assert s.backend.length.tolist() == [4, 1, 14, 2]


@pytest.fixture(params=["views", "bound"])
def every(request, all_logits_bundle):
    """batch -> a backend on the graph that gives all logits."""
    return lambda batch: OrtBackend(all_logits_bundle, batch, threads=1) if request.param == "views" else rehearsed(all_logits_bundle, batch)


def test_a_graph_with_all_logits_generates_like_one_without(every, tiny_bundle, all_logits_bundle):
    for prompts in (PROMPTS[:1], PROMPTS):
        wanted = Session(tiny_bundle, OrtBackend(tiny_bundle, len(prompts), threads=1), chunk=5)
        found = Session(all_logits_bundle, every(len(prompts)), chunk=5)
        assert found.backend.all_logits and not wanted.backend.all_logits
        close(found.prefill(prompts), wanted.prefill(prompts))
        for params in (None, SamplingParams(1.0, seed=3)):
            assert found.generate([[5]] * len(prompts), 6, params) == wanted.generate([[5]] * len(prompts), 6, params)


def test_logits_of_every_token(every, tiny_bundle, tiny):
    ids, new = np.zeros((4, 13), np.int64), np.array([len(p) for p in PROMPTS], np.int32)
    for b, prompt in enumerate(PROMPTS):
        ids[b, : len(prompt)] = prompt
    for backend in (every(4), OrtBackend(tiny_bundle, 4, threads=1)):
        for alone in ([0, 1, 2, 3], [2]):
            backend.reset()
            backend.poison()
            counts = np.where(np.isin(range(4), alone), new, 0)
            first, then = backend.step_all(ids, counts), backend.step_all(ids[:, :2], np.minimum(counts, 2))
            assert first.shape == (4, max(counts), 257) and then.shape == (4, 2, 257)
            for b in alone:
                wanted = tiny.logits([*PROMPTS[b], *PROMPTS[b][:2]])
                close(first[b, : new[b]], wanted[: new[b]])
                close(then[b, : min(new[b], 2)], wanted[new[b] :])


def test_a_step_over_every_token_that_fails_changes_nothing(tiny_bundle, monkeypatch):
    backend = OrtBackend(tiny_bundle, threads=1)
    backend.step(np.ones((1, 3), int), np.array([3]))
    run, calls = backend._forward, []
    monkeypatch.setattr(backend, "_forward", lambda *a: run(*a) if calls.append(1) or len(calls) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backend.step_all(np.ones((1, 5), int), np.array([5]))
    assert backend.length.tolist() == [3]


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint64])
def test_columns_beyond_the_new_tokens_are_not_looked_at(open_session, tiny, kind):
    """Ids of any integer type; what lies behind a row's new tokens may be anything, also where the columns are cut."""
    backend = open_session(4).backend
    ids = np.full((4, 20), np.iinfo(kind).max, kind)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
    new = np.array([len(p) for p in PROMPTS])
    logits = backend.step(ids, new)
    for row, prompt in enumerate(PROMPTS):
        close(logits[row], tiny.logits(prompt)[-1])
    with pytest.raises(UserError, match="outside the vocabulary"):
        backend.step(ids[:, -1:], np.array([0, 1, 0, 0]))
    assert backend.length.tolist() == new.tolist()


def test_a_greedy_step_with_bad_logits_leaves_the_lengths(open_session, tiny, monkeypatch):
    backend = open_session(2).backend
    ids, new = np.array([[1], [7]]), np.array([1, 1])
    first = backend.step_greedy(ids, new)
    assert first.tolist() == [int(tiny.logits([t])[-1].argmax()) for t in (1, 7)]
    forward = backend._forward
    monkeypatch.setattr(backend, "_forward", lambda *given: np.where([[True], [False]], forward(*given), np.nan))
    assert backend.step_greedy(ids, np.array([1, 0])).shape == (2,)  # the bad row stands still
    with pytest.raises(SessaError, match="not finite"):
        backend.step_greedy(ids, new)
    assert backend.length.tolist() == [2, 1]


def test_caches_hold_what_the_oracle_says(open_session, tiny):
    s = open_session(2, chunk=4)
    s.prefill([PROMPTS[2], PROMPTS[3]])
    for row in (0, 1):
        cache = tiny.empty()
        for token in s.tokens(row):
            tiny.token(token, cache)
        found = s.backend.cached(row)
        assert len(found) == 8
        for i, rows in enumerate(cache):
            for name, values in rows.items():
                close(found[f"past.{i}.{name}"], np.array(values))


def test_generate_on_a_batch_equals_single_runs_and_the_oracle(open_session, tiny):
    results = open_session(4).generate(PROMPTS, 20)
    one = open_session()
    for prompt, result in zip(PROMPTS, results, strict=True):
        one.reset()
        one.backend.poison()
        assert result.tokens == tiny.greedy(prompt, 20) == one.generate([prompt], 20)[0].tokens


def test_a_sampled_batch_equals_single_runs(open_session):
    params = [SamplingParams(temperature=1.2, top_k=40, seed=s) for s in range(4)]
    results = open_session(4).generate(PROMPTS, 12, params)
    for prompt, p, result in zip(PROMPTS, params, results, strict=True):
        assert open_session().generate([prompt], 12, p)[0].tokens == result.tokens


def test_finished_sequence_beside_running_ones_stands_still(open_session, tiny):
    expected = [tiny.greedy(p, 20) for p in PROMPTS]
    end = expected[1][2]
    s = open_session(4)
    results = s.generate(PROMPTS, 20, stop_tokens=[end])
    for result, tokens in zip(results, expected, strict=True):
        assert result.tokens == tokens[: tokens.index(end) + 1 if end in tokens else 20]
    assert s.backend.length[1] == len(PROMPTS[1]) + len(results[1].tokens) - 1


def test_capacity_exactly_full_and_one_free_row_beside_a_long_prompt(open_session, tiny):
    s = open_session(2, capacity=30, chunk=4)
    s.prefill([list(range(29)), [5]])
    long = list(range(60, 89))
    s.backend.poison()
    logits = s.prefill([[77], long])
    close(logits, [tiny.logits([*range(29), 77])[-1], tiny.logits([5, *long])[-1]])
    assert s.backend.length.tolist() == [30, 30]
    with pytest.raises(UserError, match="full"):
        s.decode([1, 1])
    s = open_session(capacity=13)
    assert s.generate([PROMPTS[2]], 1)[0].tokens == tiny.greedy(PROMPTS[2], 1) and s.backend.room(0) == 0


def test_a_conversation_and_a_reset_row(open_session, tiny):
    s = open_session(2)
    first = s.generate(PROMPTS[:2], 5)
    s.reset([1])
    again = s.generate([[9], PROMPTS[3]], 5)
    assert again[0].tokens == tiny.greedy([*PROMPTS[0], *first[0].tokens, 9], 5) and again[1].tokens == tiny.greedy(PROMPTS[3], 5)
    s.backend.rewind(0, 3)
    close(s.backend.step(np.array([[4], [0]]), np.array([1, 0]))[0], tiny.logits([*PROMPTS[0], 4])[-1])


def test_each_decode_step_moves_the_new_rows_and_nothing_else(open_session):
    row_bytes = 2 * (2 * 2 * 4 + 2 * 16) * 4  # two layers; k_f, v_f (2 heads of 4), k_b, s (16); float32
    s = open_session(1, capacity=400)
    s.prefill([[1] * 300])
    assert s.backend.bytes_moved == 300 * row_bytes
    for _ in range(20):
        before = s.backend.bytes_moved
        s.decode([5])
        assert s.backend.bytes_moved - before == row_bytes


def test_on_a_device_one_sequence_is_read_as_far_as_it_goes(tiny_bundle, tiny):
    backend = rehearsed(tiny_bundle, 1, 400)
    binding, extents = backend._device._binding, []

    class Spy:
        def __getattr__(self, name):
            return getattr(binding, name)

        def bind_input(self, name, device, index, kind, shape, pointer):
            extents.append(shape[1])
            binding.bind_input(name, device, index, kind, shape, pointer)

    backend._device._binding = Spy()
    backend.poison()
    for at, token in enumerate([5, 6, 7]):
        close(backend.step(np.array([[token]]), np.array([1]))[0], tiny.logits([5, 6, 7][: at + 1])[-1])
    assert [set(extents[i : i + 8]) for i in (0, 8, 16)] == [{1}, {1}, {2}], "never an empty tensor, never the capacity"


def test_bfloat16_rows_can_be_bound_where_they_lie():
    """What the device's caches do with bf16, whose graphs no CPU runs: a view in, rows behind it out, by ONNX's type number."""
    onnx = pytest.importorskip("onnx")
    import ctypes

    import onnxruntime

    kind, rows = onnx.TensorProto.BFLOAT16, [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.BFLOAT16, [1, "n", 4]) for n in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "copy", rows[:1], rows[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    value, binding = onnxruntime.OrtValue.ortvalue_from_shape_and_type([1, 8, 4], kind, "cpu", 0), session.io_binding()
    words = np.frombuffer((ctypes.c_char * 64).from_address(value.data_ptr()), np.uint16)
    words[:] = np.arange(32)
    binding.bind_input("x", "cpu", 0, kind, [1, 3, 4], value.data_ptr())
    binding.bind_output("y", "cpu", 0, kind, [1, 3, 4], value.data_ptr() + 5 * 8)
    session.run_with_iobinding(binding)
    assert words.tolist() == [*range(20), *range(12)]


def test_caches_that_do_not_fit_are_refused_in_one_line(tiny_bundle):
    with pytest.raises(UserError, match="lower --capacity") as caught:
        rehearsed(tiny_bundle, 2, 1 << 50)
    assert "\n" not in str(caught.value)


def test_cuda_libraries_of_pip_are_loaded_in_order_and_others_are_not(tmp_path, monkeypatch):
    import types

    from sessa_deploy.runtime.ort import session as ort

    wanted = ["nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libcublasLt.so.13", "nvidia/cu13/lib/libcurand.so.10", "nvidia/cudnn/lib/libcudnn.so.9"]
    others = ["nvidia/cublas/lib/libcublasLt.so.12", "nvidia/curand/lib/libcurand.so.10", "nvidia/cu13/lib/libcufft.so.12"]
    some = Path(str(sys.modules["_ctypes"].__file__)).read_bytes()
    for name in [*wanted, *others]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(some)
    (tmp_path / others[2]).write_bytes(b"broken")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ort.preload(types.SimpleNamespace(cuda_version="13.0")) == [str(tmp_path / name) for name in wanted]
    assert ort.preload(types.SimpleNamespace()) == [], "a build without CUDA needs none"


def test_of_two_distributions_the_imported_one_is_named(tmp_path, monkeypatch):
    from sessa_deploy.runtime import environment

    for place, name, version in (("gpu", "onnxruntime_gpu", "9.1"), ("cpu", "onnxruntime", "9.0")):
        info = tmp_path / place / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        (tmp_path / place / "onnxruntime").mkdir()
        (tmp_path / place / "onnxruntime" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    for first, expected in (("gpu", "9.1 (onnxruntime-gpu)"), ("cpu", "9.0")):
        with monkeypatch.context() as m:
            m.setattr(sys, "path", [str(tmp_path / first), str(tmp_path / ("cpu" if first == "gpu" else "gpu")), *sys.path])
            assert environment.package_version("onnxruntime") == expected


def test_a_batch_moves_old_rows_only_into_a_new_bucket(tiny_bundle):
    row_bytes = 2 * (2 * 2 * 4 + 2 * 16) * 4
    s = Session(tiny_bundle, OrtBackend(tiny_bundle, 3, 400))
    s.prefill([[1] * 100] * 3)
    moved = []
    for _ in range(60):
        before = s.backend.bytes_moved
        s.decode([5, 6, 7])
        moved.append((s.backend.bytes_moved - before) // row_bytes)
    assert moved.count(3) == 59 and max(moved) == 3 + 2 * 128, "100 rows lie 128 apart, then 192; the first sequence never moves"


def test_no_copy_of_the_past_is_made_in_python(tiny_bundle):
    """Python's and numpy's own account of memory, which knows nothing of our counter: a step's peak does not grow with the context."""
    s, peaks = Session(tiny_bundle, OrtBackend(tiny_bundle, 1, 4096)), []
    for prompt in ([3] * 64, [3] * 3500):
        s.prefill([prompt])
        s.decode([1])
        gc.collect()
        tracemalloc.start()
        s.decode([1])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    cache = 3500 * 2 * (2 * 2 * 4 + 2 * 16) * 4
    assert peaks[1] < peaks[0] + 4096 < cache / 20


def test_fp16_runs_on_a_cpu_and_bf16_is_refused_there(bundles, tiny):
    s = Session(bundles("fp16"), "ort", max_batch=2)
    np.testing.assert_allclose(s.prefill(PROMPTS[:2]), [tiny.logits(p)[-1] for p in PROMPTS[:2]], atol=0.05)
    assert s.backend.cached(0)["past.0.s"].dtype == np.float16
    bf16 = write_bundle(bundles("fp16").path.parent / "bf16", {"model.onnx": b"never read"}, bundles("fp16").config, "bf16", {})
    for backend in ("ort", "auto"):
        with pytest.raises(UserError, match="--precision fp32"):
            Session(bf16, backend)


@pytest.mark.parametrize(("kind", "said"), [("garbage", "cannot load the graph"), ("another model", "not what the manifest's config says"),
                                            ("cuda", "no CUDA provider"), ("threads", "threads is out of range: got 0")])
def test_what_cannot_run_is_refused_in_one_line(tiny_bundle, tmp_path, monkeypatch, kind, said):
    bundle, more = tiny_bundle, {"backend": "ort"}
    if kind == "garbage":
        bundle = write_bundle(tmp_path / "b", {"model.onnx": b"no graph"}, bundle.config, "fp32", {})
    elif kind == "another model":
        data = {**bundle.config.to_dict(), "n_layers": 3}
        bundle = write_bundle(tmp_path / "b", {"model.onnx": bundle.model}, type(bundle.config).from_dict(data), "fp32", {})
    elif kind == "cuda":
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
        more = {"backend": "ort-cuda"}
    else:
        more["threads"] = 0
    with pytest.raises(UserError) as caught:
        Session(bundle, **more)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_overwritten_rows_are_what_a_step_reads(tiny_bundle):
    backend = rehearsed(tiny_bundle, 2, 40)
    rows = np.random.default_rng(0).standard_normal((10, 16), np.float32)
    for row in (0, 1):
        backend._device.overwrite(row, rows[: 10 - row].tobytes())
    backend.length[:] = (10, 9)
    assert np.array_equal(backend.cached(0)["past.1.s"], rows) and np.array_equal(backend.cached(1)["past.0.k_f"].reshape(-1)[:72], rows.reshape(-1)[:72])
    assert np.isfinite(backend.step(np.array([[1], [2]]), np.array([1, 1]))).all()


@pytest.mark.parametrize(("precision", "why", "said"), [("fp32", "Failed to allocate memory", "cannot hold the caches: got Failed to allocate"),
                                                        ("bf16", "no such numpy type", "cannot hold bfloat16 caches")])
def test_a_device_without_room_for_the_caches_is_one_line_and_let_go(tiny_bundle, monkeypatch, precision, why, said):
    def fail(*_):
        raise RuntimeError(why)

    session, closed = OrtBackend(tiny_bundle, 1).session, []
    monkeypatch.setattr("onnxruntime.OrtValue.ortvalue_from_shape_and_type", fail)
    monkeypatch.setattr("sessa_deploy.runtime.ort.device_cache.HostMemory.close", lambda self: closed.append(self))
    with pytest.raises(UserError, match=said) as caught:
        DeviceCache(tiny_bundle.config, 1, 64, precision, session, "cpu")
    assert "\n" not in str(caught.value) and len(closed) == 1

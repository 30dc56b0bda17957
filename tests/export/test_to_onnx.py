"""The exported graph: its interface, its bytes, and its numbers in ONNX Runtime against the golden files and the torch model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from ort_ops import session
from torch import Tensor

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.export.to_onnx import export_onnx
from sessa_deploy.model import SessaLM

SMALL = SessaConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=257)


def small_model(config: SessaConfig = SMALL, seed: int = 0) -> SessaLM:
    torch.manual_seed(seed)
    model = SessaLM(config).eval()
    with torch.no_grad():
        for layer in model.layers:  # weights large enough that every branch matters
            for x in layer.parameters():
                x.add_(0.2 * torch.randn_like(x))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    folder, model = tmp_path_factory.mktemp("onnx"), small_model()
    wanted = [*(("fp32", opset) for opset in contract.OPSETS), ("fp16", 17), ("fp16", 21), ("bf16", 17)]
    return {key: export_onnx(model, folder / f"{key[0]}-{key[1]}.onnx", *key) for key in wanted}


def empty_past(config: SessaConfig, batch: int, rows: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {contract.past_name(i, f): np.zeros((batch, rows, *contract.cache_row_shape(f, config.d_model, config.kv_heads, config.head_dim)), dtype)
            for i, f in contract.cache_entries(config.n_layers)}


def feeds(ids: np.ndarray, past: dict[str, np.ndarray], past_length: list[int], new_length: list[int]) -> dict[str, np.ndarray]:
    return {contract.INPUT_IDS: ids, contract.PAST_LENGTH: np.array(past_length, np.int32), contract.NEW_LENGTH: np.array(new_length, np.int32), **past}


def grown(past: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The caches with all new rows behind them."""
    return {name: np.concatenate([x, new[name.replace("past.", "new.")]], axis=1) for name, x in past.items()}


def call(runner: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip([x.name for x in runner.get_outputs()], runner.run(None, inputs), strict=True))


@pytest.mark.parametrize("key", [*(("fp32", opset) for opset in contract.OPSETS), ("fp16", 17), ("bf16", 17)], ids=lambda key: f"{key[0]}-{key[1]}")
def test_file_has_the_contract_s_interface(exported: dict[tuple[str, int], Path], key: tuple[str, int]) -> None:
    precision, opset = key
    model = onnx.load(exported[key])
    onnx.checker.check_model(model, full_check=True)
    storage = contract.PRECISIONS[precision].onnx
    assert {x.domain: x.version for x in model.opset_import} == {"": opset, "sessa": 1}
    assert [x.name for x in model.graph.input] == contract.graph_inputs(2)
    assert [x.name for x in model.graph.output] == contract.graph_outputs(2)
    for value in [*model.graph.input, *model.graph.output]:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        row = [2, 4] if value.name[-3:] in ("k_f", "v_f") else [16]
        if value.name.startswith(("past.", "new.")):
            assert dims == ["B", "P" if value.name.startswith("past.") else "T", *row]
            assert value.type.tensor_type.elem_type == storage
    kinds = {x.name: x.type.tensor_type.elem_type for x in [*model.graph.input, *model.graph.output]}
    assert [kinds[x] for x in ("input_ids", "past_length", "new_length", "logits")] == [7, 6, 6, 1]
    ours = [n for n in model.graph.node if n.domain == "sessa"]
    assert [n.op_type for n in ours] == [contract.CAUSAL_OP, contract.FEEDBACK_OP] * 2
    assert all({a.name for a in n.attribute} == {"scale", "storage"} for n in ours)
    assert {(f.domain, f.name) for f in model.functions} == {("sessa", contract.CAUSAL_OP), ("sessa", contract.FEEDBACK_OP)}


def test_weights_are_stored_in_the_precision_and_gamma_in_float32(exported: dict[tuple[str, int], Path]) -> None:
    for precision in ("fp16", "bf16"):
        tensors = {x.name: x for x in onnx.load(exported[precision, 17]).graph.initializer}
        storage = contract.PRECISIONS[precision].onnx
        assert tensors["layers.1.mixer.gamma_bias"].data_type == tensors["layers.1.mixer.gamma_ctx.weight"].data_type == 1
        others = [x for name, x in tensors.items() if name.endswith((".weight", ".bias", ".weight.T")) and "gamma" not in name]
        assert len(others) == 31 + 3
        assert {x.data_type for x in others} == {storage}


def test_nothing_of_the_machine_is_in_the_file(exported: dict[tuple[str, int], Path]) -> None:
    for path in exported.values():
        content = path.read_bytes()
        assert b".py" not in content
        assert str(Path.cwd()).encode() not in content
    model = onnx.load(exported["fp32", 17])
    for node in model.graph.node:
        assert node.name
        assert not node.doc_string
        assert not node.metadata_props
        assert not (node.op_type == "Shape" and node.attribute), "TensorRT 8.6 ignores start and end"
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)


def test_every_opset_gives_the_same_numbers(exported: dict[tuple[str, int], Path]) -> None:
    rng = np.random.default_rng(0)
    inputs = feeds(rng.integers(0, 257, (2, 67)), empty_past(SMALL, 2, 0), [0, 0], [67, 40])
    expected = call(session(str(exported["fp32", 17])), inputs)
    for opset in contract.OPSETS[1:]:
        for name, x in call(session(str(exported["fp32", opset])), inputs).items():
            np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max())


def torch_outputs(model: SessaLM, inputs: dict[str, np.ndarray], dtype: torch.dtype) -> list[Tensor]:
    past = [torch.from_numpy(inputs[contract.past_name(i, f)]).to(dtype) for i, f in contract.cache_entries(2)]
    with torch.no_grad():
        return list(model.graph(*(torch.from_numpy(inputs[n]) for n in ("input_ids", "past_length", "new_length")), past))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("fp16", 2e-2)])
@pytest.mark.parametrize(("tokens", "past", "past_length", "new_length"), [
    (1, 0, [0, 0], [1, 1]), (5, 0, [0, 0], [5, 2]), (1, 9, [9, 4], [1, 1]), (7, 9, [0, 9], [7, 3]), (65, 3, [3, 0], [1, 65]), (1, 4, [4, 2], [0, 1])])
def test_graph_agrees_with_the_float64_model(
    exported: dict[tuple[str, int], Path], precision: str, tolerance: float, tokens: int, past: int, past_length: list[int], new_length: list[int]
) -> None:
    """Prefill, decode, chunked and ragged, with every past row behind its length poisoned."""
    rng = np.random.default_rng(1)
    dtype = np.dtype(contract.PRECISIONS[precision].numpy)
    old = {name: (0.5 * rng.standard_normal(x.shape)).astype(dtype) for name, x in empty_past(SMALL, 2, past).items()}
    for x in old.values():
        for b, count in enumerate(past_length):
            x[b, count:] = rng.choice([np.nan, np.inf, -np.inf])
    inputs = feeds(rng.integers(0, 257, (2, tokens)), old, past_length, new_length)
    result = call(session(str(exported[precision, 17])), inputs)
    expected = torch_outputs(small_model().to_precision("fp64"), inputs, torch.float64)
    for name, want in zip(contract.graph_outputs(2), expected, strict=True):
        got, reference = torch.from_numpy(result[name]).double(), want
        if name == "logits":
            rows = [b for b in range(2) if new_length[b]]
            got, reference = got[rows], reference[rows]
        assert torch.isfinite(got).all()
        assert (got - reference).abs().max() <= tolerance * reference.abs().max().clamp(min=1e-3), name


def test_new_rows_behind_new_length_are_zero(exported: dict[tuple[str, int], Path]) -> None:
    result = call(session(str(exported["fp32", 17])), feeds(np.ones((2, 4), np.int64), empty_past(SMALL, 2, 0), [0, 0], [3, 0]))
    for i, field in contract.cache_entries(2):
        new = result[contract.new_name(i, field)]
        assert not new[0, 3:].any()
        assert not new[1].any()
        assert new[0, :3].any()


def test_steps_and_chunks_equal_one_prefill(exported: dict[tuple[str, int], Path]) -> None:
    runner, rng = session(str(exported["fp32", 17])), np.random.default_rng(2)
    ids = rng.integers(0, 257, (1, 12))
    whole = call(runner, feeds(ids, empty_past(SMALL, 1, 0), [0], [12]))
    for sizes in ([1] * 12, [5, 1, 6], [11, 1]):
        past, at = empty_past(SMALL, 1, 0), 0
        for size in sizes:
            result = call(runner, feeds(ids[:, at : at + size], past, [at], [size]))
            past, at = grown(past, result), at + size
        np.testing.assert_allclose(result["logits"], whole["logits"], rtol=0, atol=2e-5 * np.abs(whole["logits"]).max())
        for name, x in past.items():
            want = whole[name.replace("past.", "new.")]
            np.testing.assert_allclose(x, want, rtol=0, atol=2e-5 * np.abs(want).max())


def golden_model(config: dict[str, Any], tensors: dict[str, Tensor]) -> SessaLM:
    """A SessaLM whose one layer is the golden one and whose embedding holds the golden inputs, token t of sequence b at b * N + t."""
    batch, total, width = tensors["x"].shape
    model = SessaLM(SessaConfig(
        d_model=width, n_layers=1, n_heads=config["n_heads"], n_kv_heads=config["n_kv_heads"], vocab_size=batch * total,
        gamma_max=config["gamma_max"], use_forward_rope=config["use_forward_rope"], layer_norm_eps=config["ln_eps"])).eval()
    state = {name.removeprefix("param."): x for name, x in tensors.items() if name.startswith("param.")}
    model.layers[0].load_state_dict({name: x for name, x in state.items() if name in model.layers[0].state_dict()})
    model.embedding.weight.data = tensors["x"].reshape(batch * total, width).float()
    return model


def test_golden_numbers_through_onnx_runtime(golden: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path) -> None:
    config, tensors = golden
    model = golden_model(config, tensors)
    runner = session(str(export_onnx(model, tmp_path / "golden.onnx")))
    batch, total, _ = tensors["x"].shape
    prompt = config["T"]
    ids = np.arange(batch * total).reshape(batch, total)
    past = empty_past(model.config, batch, 0)
    result = call(runner, feeds(ids[:, :prompt], past, [0] * batch, [prompt] * batch))
    past = grown(past, result)
    for t in range(prompt, total):
        result = call(runner, feeds(ids[:, t : t + 1], past, [t] * batch, [1] * batch))
        past = grown(past, result)
    for field in contract.CACHE_FIELDS:
        want = tensors[f"cache.{field}"].numpy()
        got = past[contract.past_name(0, field)].reshape(want.shape)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=field)
    with torch.no_grad():
        logits = model.double().lm_head(model.norm(tensors["y"][:, -1])).numpy()
    np.testing.assert_allclose(result["logits"], logits, rtol=0, atol=2e-5 * np.abs(logits).max())


def write_here() -> None:
    """Two files of one small model in the current folder, one of them with data beside it."""
    torch.manual_seed(0)
    model = SessaLM(SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=257))
    for opset in (17, 21):
        export_onnx(model, f"here/{opset}.onnx", "fp16", opset, inline_limit=0 if opset == 21 else 2**31)


def test_bytes_are_the_same_from_two_folders_and_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process traces for itself, under another order of hashes."""
    here, there = tmp_path / "folder0", tmp_path / "folder1"
    here.mkdir()
    there.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "77" if os.environ.get("PYTHONHASHSEED") != "77" else "1"}
    other = subprocess.Popen([sys.executable, "-c", "import test_to_onnx; test_to_onnx.write_here()"], cwd=there, env=environment)
    monkeypatch.chdir(here)
    write_here()
    assert other.wait(timeout=200) == 0
    names = sorted(x.name for x in (there / "here").iterdir())
    assert names == ["17.onnx", "21.onnx", "21.onnx.data"]
    for name in names:
        assert (here / "here" / name).read_bytes() == (there / "here" / name).read_bytes(), name


def test_external_data_says_the_same(exported: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    path = export_onnx(small_model(), tmp_path / "model.onnx", inline_limit=1000)
    data = tmp_path / contract.MODEL_DATA_FILE
    assert data.exists()
    onnx.checker.check_model(str(path), full_check=True)
    assert path.stat().st_size < exported["fp32", 17].stat().st_size - 30_000
    inside = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(exported["fp32", 17]).graph.initializer}
    outside = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(path).graph.initializer}
    assert inside.keys() == outside.keys()
    for name, x in inside.items():
        np.testing.assert_array_equal(x, outside[name])
    inputs = feeds(np.ones((1, 3), np.int64), empty_past(SMALL, 1, 0), [0], [3])
    expected = call(session(str(exported["fp32", 17])), inputs)
    for name, x in call(session(str(path)), inputs).items():
        np.testing.assert_array_equal(x, expected[name])
    export_onnx(small_model(), path)
    assert not data.exists(), "a stale data file is left"


def test_all_logits_tied_embeddings_and_one_head(tmp_path: Path) -> None:
    config = SessaConfig(d_model=16, n_layers=1, n_heads=1, vocab_size=13, tie_word_embeddings=True, use_forward_rope=False)
    model = small_model(config)
    path = export_onnx(model, tmp_path / "model.onnx", all_logits=True)
    tensors = onnx.load(path).graph.initializer
    assert sum(list(x.dims) in ([13, 16], [16, 13]) for x in tensors) == 1, "a tied weight is stored once"
    ids = np.arange(10).reshape(2, 5)
    result = call(session(str(path)), feeds(ids, empty_past(config, 2, 0), [0, 0], [5, 5]))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(result["logits"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_prefill_never_holds_logits_of_every_token(exported: dict[tuple[str, int], Path]) -> None:
    inferred = onnx.shape_inference.infer_shapes(onnx.load(exported["fp32", 17]), strict_mode=True, data_prop=True)
    widths = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in inferred.graph.value_info]
    assert widths
    assert not [dims for dims in widths if len(dims) == 3 and dims[-1] == SMALL.vocab_size]


def test_a_model_is_not_changed_by_its_export(tmp_path: Path) -> None:
    model = small_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    export_onnx(model, tmp_path / "model.onnx", "fp16")
    assert all(torch.equal(x, before[name]) and x.dtype == torch.float32 for name, x in model.state_dict().items())


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = small_model()
    for precision, opset, word in (("fp64", 17, "precision"), ("int8", 17, "precision"), ("fp32", 16, "opset"), ("fp32", 24, "opset")):
        with pytest.raises(UserError, match=word):
            export_onnx(model, tmp_path / "model.onnx", precision, opset)
    model.layers[0].W_in.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"layers\.0\.W_in\.weight does not fit into fp16"):
        export_onnx(model, tmp_path / "model.onnx", "fp16")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_onnx(small_model(), tmp_path / "file" / "model.onnx")
    assert [x.name for x in tmp_path.iterdir()] == ["file"], "a refused export leaves something behind"


def test_the_causal_body_inlines_where_a_plugin_claims_only_the_solve(exported: dict[tuple[str, int], Path]) -> None:
    model = onnx.load(exported["fp16", 17])
    kept = [f for f in model.functions if f.name == contract.CAUSAL_OP]
    del model.functions[:]
    model.functions.extend(kept)
    flat = onnx.inliner.inline_local_functions(model)
    assert {n.op_type for n in flat.graph.node if n.domain == "sessa"} == {contract.FEEDBACK_OP}
    assert not [n for n in flat.graph.node if n.op_type in ("Loop", "If")]

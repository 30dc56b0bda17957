"""Parity must be able to fail: faults planted one by one, each caught, in the layer to blame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from parity_fixtures import LAYERS, judge, lively_model
from torch import Tensor

from sessa_deploy import model as model_module
from sessa_deploy.checkpoint import load_checkpoint, save_checkpoint
from sessa_deploy.contract import LOGITS, MODEL_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.export.parity.drive import Engine, Tensors
from sessa_deploy.export.parity.engines import BackendSession, open_ort
from sessa_deploy.export.parity.models import TorchGraph, using_ops
from sessa_deploy.export.parity.rungs import RungJob
from sessa_deploy.kernels import reference
from sessa_deploy.model import Ops, SessaLM, SessaMixer
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.ort.host_cache import HostCache

BAD_LAYER = 1


# --- faults in the model's arithmetic: the torch graph, broken in one layer, stands in for the engine ---


def feedback_attention(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor, kind: str) -> Tensor:
    """The textbook op with one mistake."""
    past, tokens, batch = past_k.shape[1], q.shape[1], len(q)
    live = torch.arange(past) < past_length[:, None]
    row = torch.arange(tokens)
    past_k, past_s = (x if kind == "weighted mask" else torch.where(live[..., None], x, 0.0) for x in (past_k, past_s))
    seen = {"sees itself": row <= row[:, None], "blind to the last": row < row[:, None] - 1}.get(kind, row < row[:, None])
    mask = torch.cat([live[:, None].expand(batch, tokens, past), seen.expand(batch, tokens, tokens)], dim=2)
    scores = torch.einsum("btd,bjd->btj", q, torch.cat([past_k, k], dim=1)) * q.shape[-1] ** -0.5
    if kind == "softmax in fp16":
        alpha = torch.softmax(scores.half().masked_fill(~mask, -torch.inf), dim=-1).float()
    else:
        alpha = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    empty = ~mask.any(-1)
    if kind == "no row-0 rule":
        itself = torch.cat([torch.zeros(batch, tokens, past), torch.eye(tokens).expand(batch, tokens, tokens)], dim=2)
        alpha = torch.where(empty[..., None], itself, alpha)
    else:
        alpha = torch.where(empty[..., None], 0.0, alpha)
    weight = gamma[..., None] * alpha
    rhs = f + weight[..., :past] @ past_s
    return torch.linalg.solve(torch.eye(tokens) - weight[..., past:], rhs)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor, kind: str) -> Tensor:
    """The textbook op with one mistake."""
    past, tokens, batch = past_k.shape[1], q.shape[1], len(q)
    live, row = torch.arange(past) < past_length[:, None], torch.arange(tokens)
    keys, values = (torch.cat([torch.where(live[..., None, None], x, 0.0), y], 1).repeat_interleave(q.shape[2] // k.shape[2], 2)
                    for x, y in ((past_k, k), (past_v, v)))
    seen = row <= row[:, None] + 1 if kind == "sees the next" else row < row[:, None]
    mask = torch.cat([live[:, None].expand(batch, tokens, past), seen.expand(batch, tokens, tokens)], dim=2)
    scores = torch.einsum("bthd,bjhd->bhtj", q, keys) * q.shape[-1] ** -0.5
    alpha = torch.softmax(scores.masked_fill(~mask[:, None], -torch.inf), dim=-1).nan_to_num(0.0)
    return torch.einsum("bhtj,bjhd->bthd", alpha, values)


def in_bad_layer(wrong: Callable[..., Any], right: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `wrong` for the bad layer and `right` for the others, counting the calls of one forward pass."""
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return (wrong if (calls - 1) % LAYERS == BAD_LAYER else right)(*args)

    return call


@contextmanager
def wrong_feedback(model: SessaLM, kind: str) -> Iterator[None]:
    with using_ops(model, Ops(feedback=in_bad_layer(lambda *a: feedback_attention(*a, kind=kind), reference.plain))):
        yield


@contextmanager
def wrong_causal(model: SessaLM, kind: str) -> Iterator[None]:
    with using_ops(model, Ops(causal=in_bad_layer(lambda *a: causal_attention(*a, kind=kind), reference.plain_causal))):
        yield


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (first half, second half) in place of (even, odd) pairs."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def rope_without_past(mixer: Any) -> Any:
    return lambda batch, tokens, device, past_length: mixer(batch, tokens, device, None)


def wrong_gain(change: Callable[[Tensor], Tensor]) -> Any:
    return patched(SessaMixer, "gain", lambda gain: in_bad_layer(lambda mixer, a: change(gain(mixer, a)), gain))


def wrong_rotate() -> Any:
    # q and k_f are rotated one after the other, so two calls belong to a layer
    calls = 0

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (halves if (calls - 1) // 2 % LAYERS == BAD_LAYER else original)(x, cos, sin)

    original = model_module.rotate
    return patched(model_module, "rotate", lambda _: rotate)


FAULTS: dict[str, tuple[Callable[[SessaLM], Any], str, str]] = {
    # name: (how to plant it in layer 1 of a model, the field that must be blamed, a word of the hint)
    "rope halves": (lambda model: wrong_rotate(), "k_f", "rotary"),
    "causal mask: sees the next token": (lambda model: wrong_causal(model, "sees the next"), "s", "forward branch"),
    "causal mask: blind to itself": (lambda model: wrong_causal(model, "blind to itself"), "s", "forward branch"),
    "feedback mask: sees itself": (lambda model: wrong_feedback(model, "sees itself"), "s", "feedback branch"),
    "feedback mask: blind to the last token": (lambda model: wrong_feedback(model, "blind to the last"), "s", "feedback branch"),
    "missing row-0 rule": (lambda model: wrong_feedback(model, "no row-0 rule"), "s", "must have none"),
    "softmax in fp16": (lambda model: wrong_feedback(model, "softmax in fp16"), "s", "feedback branch"),
    "gamma sign": (lambda model: wrong_gain(torch.neg), "s", "gamma"),
    "gamma rounded to bf16": (lambda model: wrong_gain(lambda x: x.bfloat16().float()), "s", "gamma"),
    "past masked by a weight": (lambda model: wrong_feedback(model, "weighted mask"), "s", "beyond past_length"),
}


def broken_torch(fault: Callable[[SessaLM], Any]) -> Callable[[RungJob], Engine]:
    def engine(job: RungJob) -> Engine:
        model = load_checkpoint(job.bundle.parent / "checkpoint")
        good = TorchGraph(model)

        def step(feeds: Tensors) -> Tensors:
            with fault(model):
                return good(feeds)

        return Engine(step, None, {})

    return engine


@pytest.mark.parametrize("name", FAULTS)
def test_fault_in_the_arithmetic_is_caught_in_its_layer(material: tuple[Path, Path, Path], name: str) -> None:
    fault, field, hint = FAULTS[name]
    report = judge(*material, broken_torch(fault))
    failure = report.failure
    assert failure is not None, "not caught"
    assert (failure.rung, failure.layer, failure.field) == ("ort", BAD_LAYER, field), report.line()
    assert hint in failure.hint
    assert all(c.verdict == "pass" for c in report.comparisons if c.rung == "torch")


def test_the_healthy_graph_passes_the_same_way(material: tuple[Path, Path, Path]) -> None:
    def engine(job: RungJob) -> Engine:
        return Engine(TorchGraph(load_checkpoint(job.bundle.parent / "checkpoint")), None, {})

    assert judge(*material, engine).passed


def test_onnx_runtime_passes(material: tuple[Path, Path, Path]) -> None:
    report = judge(*material)
    assert report.passed, report.line()
    assert {mode for rung, mode in report.judged if rung == "ort"} == {"graph", "session", "greedy"}
    assert report.line().startswith("parity: PASSED (torch, ort against float64 at fp32")


def test_positions_that_forget_the_past(material: tuple[Path, Path, Path]) -> None:
    report = judge(*material, broken_torch(lambda model: patched(model_module, "positions", rope_without_past)))
    assert report.failure is not None and (report.failure.layer, report.failure.field) == (0, "k_f") and "prefill" in report.failure.hint
    assert all(c.verdict == "pass" for c in report.comparisons if c.case.startswith("prefill"))  # prefill has no past to forget


# --- faults in the ONNX file, run by ONNX Runtime ---


def edited_bundle(bundle: Path, out: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """The bundle with an edited graph behind a manifest that was signed again."""
    opened = Bundle.open(bundle)
    graph = onnx.load(opened.model)
    edit(graph)
    files = {name: opened.file(name) for name in opened.names()} | {MODEL_FILE: graph.SerializeToString()}
    write_bundle(out, files, opened.config, opened.precision, opened.versions, opened.opset)
    return out


def initializer(graph: onnx.ModelProto, part: str) -> onnx.TensorProto:
    found = [x for x in graph.graph.initializer if part in x.name]
    assert len(found) == 1, [x.name for x in graph.graph.initializer]
    return found[0]


def change_weight(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    def edit(graph: onnx.ModelProto) -> None:
        tensor = initializer(graph, part)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy())), tensor.name))

    return edit


def nudge(x: np.ndarray) -> np.ndarray:
    x.flat[7] = np.nextafter(x.flat[7], np.inf, dtype=x.dtype)
    return x


@pytest.mark.parametrize(("part", "change", "layer", "field"), [
    (f"layers.{BAD_LAYER}.mixer.out_proj", np.transpose, BAD_LAYER, "s"),
    (f"layers.{BAD_LAYER}.mixer.q_proj.weight", np.transpose, BAD_LAYER, "s"),
    (f"layers.{BAD_LAYER}.W_out.weight", np.transpose, BAD_LAYER + 1, "k_f"),
    (f"layers.{BAD_LAYER}.mixer.gamma_bias", lambda x: x + np.float32(1e-3), BAD_LAYER, "s"),
])
def test_wrong_weight_behind_a_signed_manifest(
    material: tuple[Path, Path, Path], tmp_path: Path, part: str, change: Callable[[np.ndarray], np.ndarray], layer: int, field: str
) -> None:
    bundle, checkpoint, kept = material
    report = judge(edited_bundle(bundle, tmp_path / "bundle", change_weight(part, change)), checkpoint, kept)
    assert report.failure is not None and report.failure.where.startswith("weights: layers.1."), report.line()
    bad = [c for c in report.comparisons if c.verdict != "pass"]
    first = min(bad, key=lambda c: c.order)
    assert (first.rung, first.layer, first.field) == ("ort", layer, field)  # the numbers find it too, without looking at the weights


@pytest.mark.parametrize("name", ["embedding.weight", "layers.2.ln.bias", "lm_head.weight", "layers.0.mixer.gamma_ctx.weight"])
def test_one_bit_of_one_weight(material: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    bundle, checkpoint, kept = material
    report = judge(edited_bundle(bundle, tmp_path / "bundle", change_weight(name, nudge)), checkpoint, kept)
    assert report.failure is not None and report.failure.where == f"weights: {name}"
    assert "1 of" in report.failure.detail and not report.passed


def test_swapped_outputs_k_b_and_s(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    def edit(graph: onnx.ModelProto) -> None:
        swap = {"new.1.k_b": "new.1.s", "new.1.s": "new.1.k_b"}
        for node in graph.graph.node:
            for i, name in enumerate(node.output):
                node.output[i] = swap.get(name, name)
            for i, name in enumerate(node.input):
                node.input[i] = swap.get(name, name)

    bundle, checkpoint, kept = material
    report = judge(edited_bundle(bundle, tmp_path / "bundle", edit), checkpoint, kept)
    assert report.failure is not None
    assert (report.failure.rung, report.failure.layer, report.failure.field) == ("ort", 1, "k_b"), report.line()


def test_a_flipped_byte_never_reaches_an_engine(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle, checkpoint, kept = material
    broken = edited_bundle(bundle, tmp_path / "bundle", lambda graph: None)
    raw = bytearray((broken / MODEL_FILE).read_bytes())
    raw[len(raw) // 2] ^= 1
    (broken / MODEL_FILE).write_bytes(raw)
    with pytest.raises(UserError, match=r"model\.onnx") as caught:
        judge(broken, checkpoint, kept)
    assert caught.value.exit_code == 2


# --- faults around the graph ---


def healthy(job: RungJob) -> Engine:
    return open_ort(Bundle.open(job.bundle), 1)


def test_nan_in_one_logit(material: tuple[Path, Path, Path]) -> None:
    def engine(job: RungJob) -> Engine:
        good, steps = healthy(job).graph, 0
        assert good is not None

        def step(feeds: Tensors) -> Tensors:
            nonlocal steps
            steps += 1
            out = good(feeds)
            if steps == 20:
                out[LOGITS] = out[LOGITS].copy()
                out[LOGITS][0, 3] = np.nan
            return out

        return Engine(step, None, {})

    report = judge(*material, engine)
    assert report.failure is not None and report.failure.where == "logits" and "not finite" in report.failure.detail


def test_rows_that_should_be_zero(material: tuple[Path, Path, Path]) -> None:
    def engine(job: RungJob) -> Engine:
        good = healthy(job).graph
        assert good is not None

        def step(feeds: Tensors) -> Tensors:
            out = good(feeds)
            new = out["new.0.s"].copy()
            for b, count in enumerate(feeds["new_length"]):
                new[b, count:] = 1.0
            return out | {"new.0.s": new}

        return Engine(step, None, {})

    report = judge(*material, engine)
    assert report.failure is not None and report.failure.where == "new rows beyond new_length"


def test_cache_row_appended_one_late(material: tuple[Path, Path, Path]) -> None:
    def late(append: Callable[..., None]) -> Callable[..., None]:
        def call(cache: HostCache, first: int, length: np.ndarray, new: np.ndarray, rows: Any, kept: Any = None) -> None:
            append(cache, first, length + (new == 1), new, rows, kept)

        return call

    with patched(HostCache, "append", late):
        report = judge(*material, healthy)
    failure = report.failure
    assert failure is not None and (failure.rung, failure.layer) == ("ort", 0), report.line()
    assert "session" in failure.detail and "cache" in failure.hint


def test_a_device_that_picks_another_token(material: tuple[Path, Path, Path]) -> None:
    def engine(job: RungJob) -> Engine:
        good = healthy(job)

        def second_best(step: Callable[..., Any]) -> Callable[..., Any]:
            return lambda backend, ids, new: np.argsort(backend.step(ids, new), axis=-1)[:, -2]

        class Wrong(BackendSession):
            def step_greedy(self, input_ids: np.ndarray, new_length: np.ndarray) -> np.ndarray:
                with patched(Backend, "step_greedy", second_best):
                    return super().step_greedy(input_ids, new_length)

        assert isinstance(good.session, BackendSession)
        return Engine(None, Wrong(good.session._open), {})

    report = judge(*material, engine)
    assert report.failure is not None and report.failure.where == "tokens", report.line()


def test_an_engine_that_dies(material: tuple[Path, Path, Path]) -> None:
    from sessa_deploy.export.parity.process import RungError

    def engine(job: RungJob) -> Engine:
        raise RungError("the engine refused the graph")

    report = judge(*material, engine)
    assert report.failure is not None and report.failure.where == "rung ort" and not report.passed


def test_precision_that_is_unfit(tmp_path: Path) -> None:
    """Activations beyond fp16's largest number: not finite, and it never passes by being as bad as the yardstick."""
    model = lively_model()
    with torch.no_grad():
        model.layers[1].mixer.v_proj.weight.mul_(1e4)
    save_checkpoint(model, tmp_path / "checkpoint")
    held = load_checkpoint(tmp_path / "checkpoint", dtype="fp16").state_dict()
    tensors = [numpy_helper.from_array(x.numpy(), name) for name, x in held.items()]
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "weights only", [], [], tensors))
    write_bundle(tmp_path / "bundle", {MODEL_FILE: graph.SerializeToString()}, model.config, "fp16", {})

    def engine(job: RungJob) -> Engine:
        return Engine(TorchGraph(load_checkpoint(tmp_path / "checkpoint", dtype="fp16")), None, {})

    report = judge(tmp_path / "bundle", tmp_path / "checkpoint", tmp_path / "kept", engine)
    assert report.failure is not None and report.failure.layer == 1 and "precision unfit" in report.failure.detail, report.line()
    assert max(report.headroom["float64"]["s*g"]) > 65504

"""Checkpoint -> model.onnx -> bundle."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, helper
from torch import Tensor

from sessa_deploy import __version__, contract
from sessa_deploy.config import Note, SessaConfig
from sessa_deploy.errors import UserError, one_line
from sessa_deploy.export.graph import passes
from sessa_deploy.export.graph.capture import EXPORTER_OPSET, capture
from sessa_deploy.export.graph.functions import functions
from sessa_deploy.export.graph.writer import INLINE_LIMIT, Weight, write_model
from sessa_deploy.model import SessaLM

# Lowest IR version that goes with each opset, so that old readers take the file: TensorRT 8.6 knows 8, the first with functions.
_IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
Progress = Callable[[str, float], None]  # what is being done, and how much of it, 0..1


def export_onnx(
    model: SessaLM, path: str | Path, precision: str = "fp32", opset: int = contract.DEFAULT_OPSET, all_logits: bool = False,
    progress: Progress | None = None, inline_limit: int = INLINE_LIMIT,
) -> Path:
    """Write `model` as one ONNX file: the graph of contract.py with our ops as nodes and their function bodies beside it.

    model: on the CPU, of any dtype; it is not changed. Weights are stored in the precision's type, gamma's and rope's in float32. all_logits: logits
    (B,T,V) instead of (B,V) at row new_length - 1. Beyond inline_limit bytes the weights go to path.data. The same model, precision and opset give
    the same bytes anywhere with the same torch, onnxscript and onnx-ir (onnx itself changes none, 1.18 to 1.23).
    Returns the path. Raises UserError on an unknown precision or opset and on weights that the precision cannot hold.
    """
    path = Path(path)
    report = progress or (lambda what, share: None)
    _check(precision, opset)
    report("tracing", 0.0)
    shell, weights = _graph_model(model.config, precision, opset, all_logits)
    report("tracing", 1.0)
    state = dict(model.state_dict())
    tensors = [_weight(state, name, stored, value) for name, (stored, value) in weights.items()]
    total, done = sum(w.size for w in tensors), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report("writing", done / total)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_model(shell, tensors, path, inline_limit, advance)
    except OSError as error:
        raise UserError("the ONNX file cannot be written", got=f"{path} ({error.strerror})", fix="choose another place") from None
    return path


def export_bundle(
    checkpoint: str | Path, out: str | Path, precision: str = "fp32", opset: int = contract.DEFAULT_OPSET, all_logits: bool = False,
    progress: Progress | None = None, config: SessaConfig | None = None, inline_limit: int = INLINE_LIMIT, note: Note | None = None,
) -> Path:
    """Export a checkpoint as the bundle `out`: model.onnx (and .data), tokenizer.json, manifest.json; whole or not at all. Returns `out`.

    config: where the checkpoint holds none. The checkpoint's own tokenizer.json is taken; without one the byte-level tokenizer is, if the
    vocabulary is its size, else none. A chat template goes along (see checkpoint_template). note: hears a line of each thing that was passed over.
    Raises UserError as load_for_export, read_template, export_onnx and the bundle's writer do.
    """
    from sessa_deploy.checkpoint import load_for_export
    from sessa_deploy.checkpoint_layout import locate
    from sessa_deploy.checkpoint_template import read_template
    from sessa_deploy.runtime.bundle import BundleWriter

    report = progress or (lambda what, share: None)
    _check(precision, opset)
    with BundleWriter(out) as writer:  # refuses a place that it may not replace before any work is done
        report("reading", 0.0)
        model, tokenizer = load_for_export(checkpoint, config, note)
        template = read_template(locate(checkpoint).folder, model.config, tokenizer, note)
        report("reading", 1.0)
        export_onnx(model, writer.folder / contract.MODEL_FILE, precision, opset, all_logits, progress, inline_limit)
        if tokenizer is not None:
            (writer.folder / contract.TOKENIZER_FILE).write_bytes(tokenizer)
        for name, content in template.items():
            (writer.folder / name).write_bytes(content)
        writer.commit(model.config, precision, _versions(), opset)
    if writer.kept and note is not None:
        note(one_line(f"{out}: left as they are, since they are not the bundle's: {', '.join(writer.kept[:6])}{' ...' if len(writer.kept) > 6 else ''}"))
    return Path(out)


def _check(precision: str, opset: int) -> None:
    if precision not in contract.EXPORT_PRECISIONS:
        raise UserError("no such precision to export", got=precision, allowed=", ".join(contract.EXPORT_PRECISIONS))
    if opset not in contract.OPSETS:
        raise UserError("that opset cannot be written", got=opset, allowed=f"{contract.OPSETS[0]} to {contract.OPSETS[-1]}")


def _graph_model(config: SessaConfig, precision: str, opset: int, all_logits: bool) -> tuple[ModelProto, dict[str, tuple[str, onnx.ValueInfoProto]]]:
    """The model without its weights, checked, and what to store: name in the graph -> (name in the file, its type and shape)."""
    graph, names = capture(config, precision, all_logits)
    passes.shape_interface(graph, config, all_logits)
    passes.plain_shapes(graph)
    passes.scalar_zeros(graph)
    transposed = passes.transposed_weights(graph, names)
    passes.drop_unused(graph)
    passes.retarget(graph, EXPORTER_OPSET, opset)
    passes.merge_constants(graph)
    stored = {name: name.removeprefix("model.") + (passes.TRANSPOSED if transposed[name] else "") for name in names}
    passes.rename(graph, stored)
    model = helper.make_model(
        graph, producer_name="sessa-deploy", producer_version=__version__, ir_version=_IR_VERSION[opset],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(contract.DOMAIN, contract.DOMAIN_VERSION)],
        functions=functions(contract.PRECISIONS[precision].onnx, opset),
    )
    onnx.checker.check_model(model, full_check=True)  # the weights are inputs here, so nothing large is copied
    written = {x.domain: x.version for x in model.opset_import}
    if written != {"": opset, contract.DOMAIN: contract.DOMAIN_VERSION}:
        raise RuntimeError(f"opset {opset} was asked for, {written} would be written")
    weights = {x.name: x for x in model.graph.input if x.name in set(stored.values())}
    del model.graph.input[len(contract.graph_inputs(config.n_layers)) :]
    return model, {name: (stored[name], weights[stored[name]]) for name in names}


def _weight(state: dict[str, Tensor], name: str, stored: str, value: onnx.ValueInfoProto) -> Weight:
    """How to get one weight's bytes, cast and transposed at the moment it is written."""
    kind = value.type.tensor_type.elem_type
    dims = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    precision = next(p for p in contract.PRECISIONS.values() if p.onnx == kind)
    source = state[name.removeprefix("model.")]

    def load() -> memoryview:
        tensor = source.detach().to(device="cpu", dtype=getattr(torch, precision.torch))
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name.removeprefix('model.')} does not fit into {precision.name}", got=f"values up to {source.abs().max().item():.3g}",
                            allowed=f"at most {torch.finfo(tensor.dtype).max:.3g}, and finite", fix="export with --precision bf16 or fp32")
        tensor = (tensor.t() if stored.endswith(passes.TRANSPOSED) else tensor).contiguous()
        if tuple(tensor.shape) != dims:
            raise RuntimeError(f"{name} is {tuple(tensor.shape)}, the graph wants {dims}")
        return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)

    return Weight(stored, dims, kind, source.numel() * precision.itemsize, load)


def _versions() -> dict[str, str]:
    """Versions of everything that shaped the graph."""
    return {"sessa-deploy": __version__, **{name: metadata.version(name) for name in ("torch", "onnx", "onnxscript", "onnx-ir")}}

"""Checkpoint -> model.onnx -> bundle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, helper
from torch import Tensor

from sessa_deploy import __version__, contract
from sessa_deploy.config import Note, SessaConfig
from sessa_deploy.errors import UserError, one_line
from sessa_deploy.export.graph import passes, quantise
from sessa_deploy.export.graph.capture import EXPORTER_OPSET, capture
from sessa_deploy.export.graph.functions import functions
from sessa_deploy.export.graph.writer import INLINE_LIMIT, Weight, write_model
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.bundle import BundleWriter

# Lowest IR version that goes with each opset, so that old readers take the file: TensorRT 8.6 knows 8, the first with functions.
_IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
_ITEMSIZE = {p.onnx: p.itemsize for p in contract.PRECISIONS.values()} | {f.onnx: 1 for f in contract.WEIGHT_FORMATS.values()}  # bytes
Progress = Callable[[str, float], None]  # what is being done, and how much of it, 0..1


def export_onnx(
    model: SessaLM, path: str | Path, precision: str = "fp32", opset: int = contract.DEFAULT_OPSET, all_logits: bool = False,
    progress: Progress | None = None, inline_limit: int = INLINE_LIMIT, weights: str | None = None, keep: Sequence[str] = (),
) -> Path:
    """Write `model` as one ONNX file: the graph of contract.py with our ops as nodes and their function bodies beside it.

    model: on the CPU, of any dtype; it is not changed. Weights are stored in the precision's type, gamma's and rope's in float32. all_logits: logits
    (B,T,V) instead of (B,V) at row new_length - 1. Beyond inline_limit bytes the weights go to path.data. The same model, precision and opset give
    the same bytes anywhere with the same torch, onnxscript and onnx-ir (onnx itself changes none, 1.18 to 1.23). weights, keep: matrices in 8 bits, and
    which of them are not, see export.graph.quantise.
    Returns the path. Raises UserError on an unknown precision, opset, format or name to keep, and on weights that the precision cannot hold.
    """
    path = Path(path)
    report = progress or (lambda what, share: None)
    _check(precision, opset)
    small = quantise.choose(model.config, weights, keep, opset)
    report("tracing", 0.0)
    shell, stored = _graph_model(model.config, precision, opset, all_logits, small)
    report("tracing", 1.0)
    state = dict(model.state_dict())
    tensors = [weight for name, values in stored.items() for weight in _weights(state, name, values, precision, small)]
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
    weights: str | None = None, keep: Sequence[str] = (),
) -> Path:
    """Export a checkpoint as the bundle `out`: model.onnx (and .data), tokenizer.json, manifest.json; whole or not at all. Returns `out`.

    config: where the checkpoint holds none. The checkpoint's own tokenizer.json is taken; without one the byte-level tokenizer is, if the
    vocabulary is its size, else none. A chat template goes along (see checkpoint_template). weights, keep: of export_onnx. note: hears a line of each
    thing that was passed over. Raises UserError as load_for_export, read_template, export_onnx and the bundle's writer do.
    """
    from sessa_deploy.checkpoint import load_for_export
    from sessa_deploy.checkpoint_layout import locate
    from sessa_deploy.checkpoint_template import read_template

    report = progress or (lambda what, share: None)
    _check(precision, opset)
    quantise.check(weights, keep, opset)
    with BundleWriter(out) as writer:  # refuses a place that it may not replace before any work is done
        report("reading", 0.0)
        model, tokenizer = load_for_export(checkpoint, config, note)
        template = read_template(locate(checkpoint).folder, model.config, tokenizer, note)
        report("reading", 1.0)
        small = quantise.choose(model.config, weights, keep, opset)
        export_onnx(model, writer.folder / contract.MODEL_FILE, precision, opset, all_logits, progress, inline_limit, weights, keep)
        if tokenizer is not None:
            (writer.folder / contract.TOKENIZER_FILE).write_bytes(tokenizer)
        for name, content in template.items():
            (writer.folder / name).write_bytes(content)
        writer.commit(model.config, precision, _versions(), opset, small)
    if model.config.tie_word_embeddings and contract.HEAD in quantise.quantised(model.config, small) and note is not None:
        note(f"{contract.HEAD}: stored in 8 bits as a tensor of its own; embedding.weight, which it is tied to, stays {precision} (--keep lm_head ties them)")
    if writer.kept and note is not None:
        note(one_line(f"{out}: left as they are, since they are not the bundle's: {', '.join(writer.kept[:6])}{' ...' if len(writer.kept) > 6 else ''}"))
    return Path(out)


def _check(precision: str, opset: int) -> None:
    if precision not in contract.EXPORT_PRECISIONS:
        raise UserError("no such precision to export", got=precision, allowed=", ".join(contract.EXPORT_PRECISIONS))
    if opset not in contract.OPSETS:
        raise UserError("that opset cannot be written", got=opset, allowed=f"{contract.OPSETS[0]} to {contract.OPSETS[-1]}")


def _graph_model(
    config: SessaConfig, precision: str, opset: int, all_logits: bool, small: contract.Weights | None = None
) -> tuple[ModelProto, dict[str, list[onnx.ValueInfoProto]]]:
    """The model without its weights, checked, and what to store: a weight's name in the graph -> name, type and shape in the file, of a matrix in 8 bits
    those of q and scale."""
    eight = quantise.quantised(config, small)
    if contract.HEAD in eight:
        config = dataclasses.replace(config, tie_word_embeddings=False)  # the embedding stays as it is
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
    files = {name: [stored[name]] for name in names}
    if small is not None:
        eight = [name for name in names if name.removeprefix("model.") in eight]
        files |= {name: quantise.store_names(stored[name]) for name in eight}
        quantise.store(graph, {stored[name] for name in eight}, small.format, contract.PRECISIONS[precision].onnx)
    model = helper.make_model(
        graph, producer_name="sessa-deploy", producer_version=__version__, ir_version=_IR_VERSION[opset],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(contract.DOMAIN, contract.DOMAIN_VERSION)],
        functions=functions(contract.PRECISIONS[precision].onnx, opset),
    )
    onnx.checker.check_model(model, full_check=True)  # the weights are inputs here, so nothing large is copied
    written = {x.domain: x.version for x in model.opset_import}
    if written != {"": opset, contract.DOMAIN: contract.DOMAIN_VERSION}:
        raise RuntimeError(f"opset {opset} was asked for, {written} would be written")
    first = len(contract.graph_inputs(config.n_layers))
    values = {x.name: x for x in model.graph.input[first:]}
    del model.graph.input[first:]
    return model, {name: [values[x] for x in files[name]] for name in names}


def _weights(state: dict[str, Tensor], name: str, values: list[onnx.ValueInfoProto], precision: str, small: contract.Weights | None) -> list[Weight]:
    """How to get one weight's bytes, cast and transposed at the moment it is written; of a matrix in 8 bits those of q, then of its scales."""
    name = name.removeprefix("model.")
    source = state[name]

    def stored(part: int) -> Tensor:
        if small is None or len(values) == 1:
            kind = values[0].type.tensor_type.elem_type
            return _fitting(name, source, next(p for p in contract.PRECISIONS.values() if p.onnx == kind))
        _fitting(name, source, contract.PRECISIONS[precision])  # what the graph makes of it again
        return quantise.quantise(source, small.format)[part]

    def weight(part: int, value: onnx.ValueInfoProto) -> Weight:
        kind, dims = value.type.tensor_type.elem_type, tuple(d.dim_value for d in value.type.tensor_type.shape.dim)

        def load() -> memoryview:
            tensor = stored(part)
            tensor = (tensor.t() if value.name.endswith(passes.TRANSPOSED) else tensor).contiguous()
            if tuple(tensor.shape) != dims:
                raise RuntimeError(f"{value.name} is {tuple(tensor.shape)}, the graph wants {dims}")
            return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)

        return Weight(value.name, dims, kind, math.prod(dims) * _ITEMSIZE[kind], load)

    return [weight(part, value) for part, value in enumerate(values)]


def _fitting(name: str, source: Tensor, precision: contract.Precision) -> Tensor:
    """A weight in a precision's type. Raises UserError where that cannot hold it, or it is not finite."""
    tensor = source.detach().to(device="cpu", dtype=getattr(torch, precision.torch))
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{name} does not fit into {precision.name}", got=f"values up to {source.abs().max().item():.3g}",
                        allowed=f"at most {torch.finfo(tensor.dtype).max:.3g}, and finite", fix="export with --precision bf16 or fp32")
    return tensor


def _versions() -> dict[str, str]:
    """Versions of everything that shaped the graph."""
    return {"sessa-deploy": __version__, **{name: metadata.version(name) for name in ("torch", "onnx", "onnxscript", "onnx-ir")}}

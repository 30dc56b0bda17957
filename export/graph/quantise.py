"""Matrices in 8 bits: which of them, with what scales, and how they stand in a graph. torch and onnx.

A matrix (out, in) becomes q = round(w / scale), one scale an output channel, symmetric: scale = max|w| / 127 for int8 and / 448 for fp8 (E4M3), in float32,
rounded to nearest even as QuantizeLinear does. In the graph the matrix is DequantizeLinear(q, scale), which gives float32, with a Cast behind it where the
graph stores 16 bits: scales of 16 bits would round what the dequantised weights are, and opset 17 knows none. Where a product reads it transposed a Transpose
follows: a DequantizeLinear right before a MatMul is to ONNX Runtime leave to round the activations to 8 bits too (seen with 1.32: logits off by 2e-3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from onnx import GraphProto, TensorProto, helper
from torch import Tensor

from sessa_deploy.checkpoint import expected_shapes
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import HEAD, QUANTISED, SCALE, WEIGHT_FORMATS, Weights
from sessa_deploy.errors import UserError
from sessa_deploy.export.graph.passes import TRANSPOSED, set_nodes

_GAIN = "gamma_ctx.weight"


def matrices(config: SessaConfig) -> list[str]:
    """Names of the tensors that can be stored in 8 bits: every matrix but the embedding and gamma's gain, which is none. With tied embeddings the head is
    among them, as a tensor of its own."""
    shapes = expected_shapes(dataclasses.replace(config, tie_word_embeddings=False))
    return [name for name, shape in shapes.items() if len(shape) == 2 and name != "embedding.weight" and not name.endswith(_GAIN)]


def choose(config: SessaConfig, weights: str | None, keep: Sequence[str] = (), opset: int | None = None) -> Weights | None:
    """What --weights and --keep ask for; None for no weights in 8 bits.

    A name to keep is a tensor's (`layers.0.W_in.weight`, `lm_head.weight`, with or without `.weight`), a layer's (`layers.3`), or a kind in every layer
    (`mixer.q_proj`). Raises UserError on an unknown format or name, an opset without the format, and where nothing would be left in 8 bits.
    """
    check(weights, keep, opset)
    if weights is None:
        return None
    names, kept = matrices(config), set[str]()
    for asked in keep:
        found = [name for name in names if _answers(name, asked)]
        if not found:
            kinds = list(dict.fromkeys(_kind(name) for name in names if name != HEAD))
            raise UserError("there is no such tensor to keep", got=f"--keep {asked}",
                            allowed=f"lm_head, layers.0 to layers.{config.n_layers - 1} whole, one of {', '.join(kinds)} in all layers or in one "
                                    f"(layers.0.{kinds[0]})")
        kept.update(found)
    if len(kept) == len(names):
        raise UserError("nothing is left to store in 8 bits", got=f"--keep {','.join(keep)}", fix="keep fewer tensors, or leave --weights out")
    return Weights(weights, tuple(name for name in names if name in kept))


def check(weights: str | None, keep: Sequence[str], opset: int | None) -> None:
    """Raise UserError on what `choose` refuses of any model."""
    if weights is None:
        if keep:
            raise UserError("--keep is about weights in 8 bits", got=f"--keep {','.join(keep)} without --weights", fix="add --weights int8, or leave it out")
        return
    if weights not in WEIGHT_FORMATS:
        raise UserError("no such format of weights", got=weights, allowed=", ".join(WEIGHT_FORMATS))
    least = WEIGHT_FORMATS[weights].opset
    if opset is not None and opset < least:
        raise UserError(f"{weights} weights need a later opset", got=f"opset {opset}", allowed=f"{least} or later",
                        fix=f"add --opset {least}, or --weights int8")


def quantised(config: SessaConfig, weights: Weights | None) -> list[str]:
    """Names of the tensors that a bundle stores in 8 bits."""
    return [] if weights is None else [name for name in matrices(config) if name not in weights.kept]


def quantise(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """(q (out, in) int8 or float8_e4m3fn, scale (out,) float32) of a matrix (out, in), computed from its values in float32.

    A channel of zeros has scale 1; no scale is zero or below the smallest normal number.
    """
    form, wide = WEIGHT_FORMATS[weights], weight.detach().to("cpu", torch.float32)
    most = wide.abs().amax(dim=1)
    scale = torch.where(most > 0, (most / form.largest).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    steps = (wide / scale[:, None]).clamp(-form.largest, form.largest)
    return (steps.round() if weights == "int8" else steps).to(getattr(torch, form.torch)), scale


def dequantise(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * scale (out, in), computed in `dtype`: float32 as DequantizeLinear does, or float64."""
    return q.to(dtype) * scale.to(dtype)[:, None]


def rounded(weight: Tensor, weights: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a matrix (out, in) is once it was stored in 8 bits, in `dtype`."""
    return dequantise(*quantise(weight, weights), dtype)


def change(config: SessaConfig, weights: Weights | None, dtype: torch.dtype = torch.float32) -> Callable[[str, Tensor], Tensor] | None:
    """What load_checkpoint is to take in place of each tensor, so that a model computes with the weights that a bundle stores; None: those of the checkpoint.

    dtype: in which q * scale is computed.
    """
    if weights is None:
        return None
    form, eight = weights.format, set(quantised(config, weights))
    return lambda name, x: rounded(x, form, dtype) if name in eight else x


def store(graph: GraphProto, names: Collection[str], weights: str, storage: int) -> None:
    """Give out the named weights, which are inputs of the graph, by DequantizeLinear of two inputs in their place, see `store_names`.

    storage: ONNX type of the graph. The value behind the last node has the weight's name, so that nothing else of the graph changes.
    """
    nodes, inputs = [], []
    for value in graph.input:
        if value.name not in names:
            inputs.append(value)
            continue
        dims, flipped = [d.dim_value for d in value.type.tensor_type.shape.dim], value.name.endswith(TRANSPOSED)
        dims = dims[::-1] if flipped else dims
        q, scale = store_names(value.name)
        inputs += [helper.make_tensor_value_info(q, WEIGHT_FORMATS[weights].onnx, dims), helper.make_tensor_value_info(scale, TensorProto.FLOAT, dims[:1])]
        steps: list[tuple[str, dict[str, Any]]] = [("DequantizeLinear", {"axis": 0})]
        steps += [("Cast", {"to": storage})] if storage != TensorProto.FLOAT else []
        steps += [("Transpose", {"perm": [1, 0]})] if flipped else []
        read = [q, scale]
        for op, attributes in steps:
            node = f"{value.name.removesuffix(TRANSPOSED)}/{op}"
            given = value.name if op == steps[-1][0] else f"{node}:0"
            nodes.append(helper.make_node(op, read, [given], name=node, **attributes))
            read = [given]
    copies = [type(value).FromString(value.SerializeToString()) for value in inputs]
    del graph.input[:]
    graph.input.extend(copies)
    set_nodes(graph, [*nodes, *graph.node])


def store_names(name: str) -> list[str]:
    """Names of the values q (out, in) and of the scales (out,) of a weight, given its own name in the file, which may say that it is transposed."""
    stem = name.removesuffix(TRANSPOSED)
    return [stem + QUANTISED, stem + SCALE]


def _kind(name: str) -> str:
    """`mixer.q_proj` of layers.0.mixer.q_proj.weight; `lm_head`."""
    return ".".join(name.split(".")[2 if name.startswith("layers.") else 0 : -1])


def _answers(name: str, asked: str) -> bool:
    return asked in (name, name.removesuffix(".weight"), _kind(name), f"{_kind(name)}.weight") or (asked == ".".join(name.split(".")[:2]) != HEAD)

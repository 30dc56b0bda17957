"""Writes an ONNX file weight by weight: the weights are never in memory twice, and no protobuf of their size is ever built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import onnx
from onnx import ModelProto, TensorProto

from sessa_deploy.files import whole

# A protobuf must stay below 2 GiB; the margin is room for names and whatever a reader adds.
INLINE_LIMIT = 2**31 - 2**24
_ALIGNMENT = 4096  # of tensors in the data file, so that a reader may map them
# Field numbers of onnx.proto.
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9


@dataclass(frozen=True)
class Weight:
    """A tensor to write: its name and shape in the file, its ONNX type, its size in bytes, and how to get those bytes."""

    name: str
    dims: tuple[int, ...]
    kind: int
    size: int
    load: Callable[[], memoryview]


def write_model(
    model: ModelProto, weights: Iterable[Weight], path: Path, inline_limit: int = INLINE_LIMIT, advance: Callable[[int], None] | None = None
) -> bool:
    """Write `model` with `weights` as further initializers to `path`, in one file, or beyond `inline_limit` bytes with path.data beside it.

    advance hears of the bytes of each weight. The files appear when both are whole. Returns whether the data file was written.
    Raises UserError if a file cannot be written.
    """
    weights = list(weights)
    data = path.with_name(path.name + ".data")
    external = sum(w.size for w in weights) + model.ByteSize() > inline_limit
    with whole(path, what="the graph") as stream:
        if external:
            with whole(data, what="the weights") as data_stream:
                places = [_append(data_stream, w, advance) for w in weights]
                tensors = [external_tensor(w.name, w.dims, w.kind, data.name, at, w.size) for w, at in zip(weights, places, strict=True)]
                _write_proto(stream, model, [(t.SerializeToString(deterministic=True), None) for t in tensors], None)
        else:
            _write_proto(stream, model, [(_header(w), w) for w in weights], advance)
    if not external:
        data.unlink(missing_ok=True)
    return external


def external_tensor(name: str, dims: tuple[int, ...], kind: int, location: str, offset: int, size: int) -> TensorProto:
    """An initializer whose `size` bytes lie from `offset` on in the file `location`, relative to the graph's folder. kind: ONNX type."""
    tensor = TensorProto(name=name, dims=dims, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", size)):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
    return tensor


def _write_proto(stream: IO[bytes], model: ModelProto, tensors: list[tuple[bytes, Weight | None]], advance: Callable[[int], None] | None) -> None:
    """The ModelProto's bytes with the given tensors appended to its graph's initializers; a Weight's bytes end its tensor as raw_data."""
    shell = ModelProto()
    shell.CopyFrom(model)
    shell.ClearField("graph")
    graph = model.graph.SerializeToString(deterministic=True)
    sizes = [len(head) + (len(_tag(TENSOR_RAW_DATA, w.size)) + w.size if w else 0) for head, w in tensors]
    total = len(graph) + sum(len(_tag(GRAPH_INITIALIZER, size)) + size for size in sizes)
    stream.write(shell.SerializeToString(deterministic=True))
    stream.write(_tag(MODEL_GRAPH, total))
    stream.write(graph)
    for (head, weight), size in zip(tensors, sizes, strict=True):
        stream.write(_tag(GRAPH_INITIALIZER, size))
        stream.write(head)
        if weight is not None:
            stream.write(_tag(TENSOR_RAW_DATA, weight.size))
            _write_bytes(stream, weight, advance)


def _append(stream: IO[bytes], weight: Weight, advance: Callable[[int], None] | None) -> int:
    stream.write(bytes(-stream.tell() % _ALIGNMENT))
    place = stream.tell()
    _write_bytes(stream, weight, advance)
    return place


def _write_bytes(stream: IO[bytes], weight: Weight, advance: Callable[[int], None] | None) -> None:
    content = weight.load()
    if content.nbytes != weight.size:
        raise RuntimeError(f"{weight.name} has {content.nbytes} bytes, not {weight.size}")
    stream.write(content)
    if advance is not None:
        advance(weight.size)


def _header(weight: Weight) -> bytes:
    return TensorProto(name=weight.name, dims=weight.dims, data_type=weight.kind).SerializeToString(deterministic=True)


def _tag(field: int, size: int) -> bytes:
    """Key of a length-delimited protobuf field and its length."""
    return _varint(field << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)

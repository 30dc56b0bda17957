"""Where in an ONNX file the bytes of its weights lie, by the file's own framing: no weight is read. onnx only."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnx import TensorProto

from sessa_deploy.errors import UserError
from sessa_deploy.export.graph.writer import GRAPH_INITIALIZER, MODEL_GRAPH, TENSOR_RAW_DATA
from sessa_deploy.reading import open_plain

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf, developers.google.com/protocol-buffers/docs/encoding


@dataclass(frozen=True)
class Place:
    """An initializer: its name, shape and ONNX type, and its `size` bytes from `offset` on in `file`, beside the ONNX file; "" is that file itself."""

    name: str
    dims: tuple[int, ...]
    kind: int
    file: str
    offset: int
    size: int


def places(path: Path) -> list[Place]:
    """The initializers of an ONNX file whose values are raw bytes, in the file or beside it, in order. Raises UserError if it is no ONNX file."""
    try:
        with open_plain(path) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            return [p for p in (_place(view, *at) for at in _initializers(view)) if p is not None]
    except (ValueError, IndexError) as error:  # an empty file too
        raise UserError("the graph cannot be read", got=f"{path} ({error})", fix="sessa-deploy export CHECKPOINT --out BUNDLE") from None


def _initializers(view: memoryview) -> Iterator[tuple[int, int]]:
    for field, start, end, _ in _fields(view, 0, len(view)):
        if field == MODEL_GRAPH:
            yield from ((a, b) for inner, a, b, _ in _fields(view, start, end) if inner == GRAPH_INITIALIZER)


def _place(view: memoryview, start: int, end: int) -> Place | None:
    """A TensorProto's place; all of it but its raw bytes is parsed."""
    raw, head = None, bytearray()
    for field, a, b, key in _fields(view, start, end):
        if field == TENSOR_RAW_DATA:
            raw = a, b - a
        else:
            head += view[key:b]
    tensor = TensorProto.FromString(bytes(head))
    dims = tuple(tensor.dims)
    if tensor.data_location == TensorProto.EXTERNAL:
        said = {e.key: e.value for e in tensor.external_data}
        return Place(tensor.name, dims, tensor.data_type, said["location"], int(said.get("offset", 0)), int(said["length"])) if "length" in said else None
    return None if raw is None else Place(tensor.name, dims, tensor.data_type, "", *raw)


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, where its value begins, where it ends, where its key begins) of each field of a message."""
    while at < end:
        key = at
        tag, at = _varint(view, at)
        wire = tag & 7
        if wire == _VARINT:
            start, (_, at) = at, _varint(view, at)
        elif wire == _DELIMITED:
            size, start = _varint(view, at)
            at = start + size
        elif wire in (_FIXED64, _FIXED32):
            start, at = at, at + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {wire} at byte {key}")
        if at > end:
            raise ValueError(f"a field at byte {key} goes past its message")
        yield tag >> 3, start, at, key


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"a number of more than ten bytes before byte {at}")

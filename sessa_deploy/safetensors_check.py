"""A strict reader of safetensors headers, standard library only: a file is proven whole before anything is loaded from it.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}},
then the data. Offsets are relative to the data and must tile it: no overlap, no hole, nothing behind the end.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sessa_deploy.errors import UserError
from sessa_deploy.reading import open_plain, unique_keys

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_ELEMENTS = 2**48
MAX_DIMS = 64


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype as the header spells it, shape, and its bytes [begin, end) within the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name, the free-form metadata, and the file's size in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    file_size: int = 0


def shorten(names: Any, limit: int = 6) -> str:
    """Names joined by commas; a long list ends in `(+N more)`."""
    names = list(names)
    text = ", ".join(str(n) for n in names[:limit])
    return text if len(names) <= limit else f"{text} (+{len(names) - limit} more)"


def _broken(path: Path, what: str, got: object = None) -> UserError:
    return UserError(f"{path} is not a whole safetensors file: {what}", got=got, fix="copy or download the file again")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ELEMENTS


def read_header(path: str | Path) -> Header:
    """Read and check a safetensors file's header against the format and the file's size.

    Raises UserError, one line, if the file is missing, truncated, has a header that is too large or not JSON, duplicate names, unknown dtypes,
    sizes that do not match shapes, tensors that overlap, holes between them, or bytes behind the last one.
    """
    with open_plain(path) as file:
        return check_header(file, Path(path))


def check_header(file: BinaryIO, path: Path) -> Header:
    """`read_header` of a file that is open at its beginning; `path` is for the messages."""
    file_size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise _broken(path, "it ends inside the header's length", f"{len(start)} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER:
        raise _broken(path, "its header is too large", f"{length} bytes, at most {MAX_HEADER}")
    if length > file_size - 8:
        raise _broken(path, "truncated inside the header", f"{file_size} bytes, the header alone needs {8 + length}")
    raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a key twice, a number of too many digits
        what = "names something twice" if "twice" in str(error) else "is not JSON"
        raise _broken(path, f"its header {what}", str(error)[:200]) from None
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise _broken(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "its __metadata__ is not an object of strings")
    tensors = {name: _tensor(path, name, entry) for name, entry in header.items()}
    _check_tiling(path, tensors, file_size - 8 - length)
    return Header(tensors, metadata, file_size)


def _tensor(path: Path, name: str, entry: object) -> TensorInfo:
    if not name.isprintable() or not name:
        raise _broken(path, "a tensor's name is not printable", ascii(name))
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise _broken(path, f"tensor {name} has an unknown dtype", repr(dtype))
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(x) for x in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise _broken(path, f"tensor {name} has an impossible shape", shorten(shape) if isinstance(shape, list) else shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(x) for x in offsets) or offsets[0] > offsets[1]:
        raise _broken(path, f"tensor {name} has impossible data_offsets", offsets)
    info = TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])
    if info.end - info.begin != info.size * ITEM_SIZE[dtype]:
        raise _broken(path, f"tensor {name} has the wrong size", f"{info.end - info.begin} bytes for {dtype} {shape}")
    return info


def _check_tiling(path: Path, tensors: dict[str, TensorInfo], data_size: int) -> None:
    end, last = 0, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < end:
            raise _broken(path, f"tensors {last} and {name} overlap", f"{name} begins at byte {info.begin}, before byte {end}")
        if info.begin > end:
            raise _broken(path, f"there is a hole between {last} and {name}", f"bytes {end} to {info.begin}")
        end, last = info.end, name
    if end > data_size:
        raise _broken(path, "truncated", f"{data_size} bytes of data, the header describes {end}")
    if end < data_size:
        raise _broken(path, "there are bytes behind the last tensor", f"{data_size - end} of them")

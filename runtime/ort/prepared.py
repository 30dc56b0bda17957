"""The graph that `build --for ort` prepared for the operator library: engines/ort-<precision>/ of a bundle, read and checked. Standard library and numpy.

model.onnx there holds nodes of domain `sessa` without bodies, and its weights as external initializers that whoever opens it gives by name. engine.json
says where the bytes of each lie: most of them in the bundle's own model.onnx.data or model.onnx, the others in the folder's model.onnx.data.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.contract import ENGINES_DIR, MODEL_DATA_FILE, MODEL_FILE, ORT_ENGINE, PLUGIN_STATE, PRECISIONS, QUANTISED
from sessa_deploy.errors import UserError
from sessa_deploy.process import command
from sessa_deploy.reading import open_plain, parse_json
from sessa_deploy.runtime.bundle import Bundle

SCHEMA = 1
ENGINE_FILE = "engine.json"
_ITEMS = {p.onnx: p.itemsize for p in PRECISIONS.values()}  # ONNX type -> bytes of an element
# numpy has no bfloat16: its bits
_NUMPY: dict[int, str] = {p.onnx: "uint16" if name == "bf16" else p.numpy for name, p in PRECISIONS.items()}
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("key", "precision", "layers", "plugin_sha256"), str), **dict.fromkeys(("schema_version", "state"), int),
    "weights": list, "ops": dict, "inlined": list, "files": dict, "all_logits": bool,
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """One external initializer: its bytes, little-endian and row-major, are `size` from `offset` on in `file`, a name in the bundle's manifest.

    onnx_type: ONNX's number of the element type.
    """

    name: str
    file: str
    offset: int
    size: int
    onnx_type: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """What engine.json says, checked.

    folder: in the bundle; model: path of the graph; ops: op -> nodes of it that the library computes; layers: who computes what stands around the
    attentions, "plugin" or "ort"; inlined: ops of ours that run as standard operators, none today; plugin_sha256: empty, as every library of the same
    `state` serves; added_bytes: what the folder adds to the bundle; all_logits: logits are (B,T,V); key: of all that shapes the graph; state: of the
    operators (contract.PLUGIN_STATE); files: the graph's and the bundle's -> the SHA-256 they had together.
    """

    folder: str
    model: Path
    precision: str
    weights: tuple[Weight, ...]
    ops: dict[str, int]
    layers: str
    inlined: list[str]
    plugin_sha256: str
    added_bytes: int
    all_logits: bool
    key: str = ""
    state: int = 0
    files: dict[str, str] = field(default_factory=dict)

    @property
    def eight_bytes(self) -> int:
        """Bytes of matrices in 8 bits, without their scales."""
        return sum(w.size for w in self.weights if w.name.endswith(QUANTISED))

    def to_json(self) -> bytes:
        """engine.json's bytes."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("folder", "model", "weights", "added_bytes")}
        text = json.dumps({"schema_version": SCHEMA, **fields}, indent=2)
        rows = ",\n".join(f"    {json.dumps(asdict(w))}" for w in self.weights)
        return f'{text.rstrip("}").rstrip()},\n  "weights": [\n{rows}\n  ]\n}}\n'.encode()


def folder_for(precision: str) -> str:
    """Name of the folder in a bundle: engines/ort-fp16."""
    return f"{ENGINES_DIR}/{ORT_ENGINE}-{precision}"


def find(bundle: Bundle) -> Prepared | None:
    """The prepared graph of the bundle's own precision, or None where nothing was built.

    Raises UserError on a description that is damaged, of another version or of another graph, and on a weight that does not lie where it is said to.
    """
    folder = folder_for(bundle.precision)
    present = [f"{folder}/{name}" in bundle for name in (ENGINE_FILE, MODEL_FILE)]
    if not any(present):
        return None
    if not all(present):
        raise _refused(bundle, f"{folder} is not whole", got=f"no {(ENGINE_FILE, MODEL_FILE)[present.index(False)]} in the manifest")
    return _read(bundle, folder)


def describe(bundle: Bundle) -> dict[str, Any]:
    """"prepared": folder, layers, ops, added_bytes and eight_bytes (of matrices in 8 bits, without scales) of the prepared graph,
    or why it is not used and the command that mends it; nothing where none is."""
    try:
        found = find(bundle)
    except UserError as wrong:
        return {"prepared": {"folder": None, "why": f"{wrong.what}{f': {wrong.got}' if wrong.got is not None else ''}", "mend": wrong.fix or ""}}
    if found is None:
        return {}
    return {"prepared": {"folder": found.folder, "layers": found.layers, "ops": found.ops, "added_bytes": found.added_bytes, "eight_bytes": found.eight_bytes,
                         "why": "", "mend": ""}}


def weights(bundle: Bundle, prepared: Prepared) -> dict[str, NDArray[Any]]:
    """name -> its values (bfloat16's bits as uint16), read-only and mapped from the bundle's files, each file once; copied where they are not aligned.

    Raises UserError if a file is no longer a plain one of the size that the manifest says.
    """
    mapped: dict[str, NDArray[np.uint8]] = {}
    found = {}
    for w in prepared.weights:
        if w.file not in mapped:
            with open_plain(bundle.file(w.file)) as stream:
                mapped[w.file] = np.memmap(stream, np.uint8, "r")
            if mapped[w.file].nbytes != bundle.size(w.file):
                raise _refused(bundle, f"{w.file} has another size than the manifest says", got=f"{mapped[w.file].nbytes} bytes")
        flat = mapped[w.file][w.offset : w.offset + w.size].view(_NUMPY[w.onnx_type])
        found[w.name] = np.require(flat, requirements="A").reshape(w.shape)
        found[w.name].flags.writeable = False
    return found


def _read(bundle: Bundle, folder: str) -> Prepared:
    name = f"{folder}/{ENGINE_FILE}"
    data: Any = parse_json(bundle.read(name), name)
    if not isinstance(data, dict):
        raise _refused(bundle, f"{name} is not a JSON object", got=type(data).__name__)
    wrong = [k for k, kind in _KINDS.items() if type(data.get(k)) is not kind] + sorted(set(data) - set(_KINDS))
    wrong = wrong or ["ops" for count in data["ops"].values() if type(count) is not int] + ["inlined" for op in data["inlined"] if type(op) is not str]
    if wrong or data["schema_version"] != SCHEMA:
        got = ", ".join(wrong) or f"schema_version {data['schema_version']}"
        raise _refused(bundle, f"{name} is no description of a prepared graph of this version", got=got, allowed=f"schema_version {SCHEMA}")
    if data["state"] != PLUGIN_STATE:
        raise _refused(bundle, f"{name} is for operators of another version", got=f"state {data['state']}", allowed=f"state {PLUGIN_STATE}")
    if data["precision"] != bundle.precision:
        raise _refused(bundle, f"{name} is of another precision", got=data["precision"], allowed=bundle.precision)
    own = {file: bundle.sha256(file) for file in (*_sources(bundle, folder), f"{folder}/{MODEL_FILE}")}
    if data["files"] != own:
        others = sorted({*own, *data["files"]} - {f for f in own if data["files"].get(f) == own[f]})
        raise _refused(bundle, f"{name} was written beside other files", got=f"another {', '.join(others[:4])}", allowed="those of this bundle")
    table = [_weight(bundle, folder, name, row) for row in data.pop("weights")]
    twice = [n for n, count in Counter(w.name for w in table).items() if count > 1]
    if twice:
        raise _refused(bundle, f"{name} names a weight twice", got=", ".join(twice[:5]))
    del data["schema_version"]
    added = sum(bundle.size(n) for n in bundle.names() if n.startswith(f"{folder}/"))
    return Prepared(folder=folder, model=bundle.file(f"{folder}/{MODEL_FILE}"), weights=tuple(table), added_bytes=added, **data)


def _weight(bundle: Bundle, folder: str, name: str, row: Any) -> Weight:
    """A row of the table, which names a range of one of three files."""
    kinds = {"name": str, "file": str, "offset": int, "size": int, "onnx_type": int, "shape": list}
    if not isinstance(row, dict) or set(row) != set(kinds) or any(type(row[k]) is not kind for k, kind in kinds.items()):
        raise _refused(bundle, f"{name} has a row that describes no weight", got=str(row)[:200], allowed=", ".join(kinds))
    found = Weight(**{**row, "shape": tuple(row["shape"])})
    files = _sources(bundle, folder)
    whole = all(type(n) is int and 0 <= n < 2**40 for n in found.shape) and found.onnx_type in _ITEMS
    if found.file not in files:
        raise _refused(bundle, f"{name}: {found.name} lies in a file that holds no weights of this bundle", got=found.file, allowed=", ".join(files))
    if not whole or found.size != prod(found.shape) * _ITEMS[found.onnx_type]:
        raise _refused(bundle, f"{name}: size, shape and type of {found.name} disagree", got=f"{found.size} bytes, {list(found.shape)}, type {found.onnx_type}")
    if found.offset < 0 or found.size < 0 or found.offset + found.size > bundle.size(found.file):
        raise _refused(bundle, f"{name}: {found.name} lies outside {found.file}", got=f"{found.size} bytes at {found.offset}",
                       allowed=f"within {bundle.size(found.file)} bytes")
    return found


def _sources(bundle: Bundle, folder: str) -> list[str]:
    """The files in which a weight may lie."""
    return [file for file in (MODEL_FILE, MODEL_DATA_FILE, f"{folder}/{MODEL_DATA_FILE}") if file in bundle]


def _refused(bundle: Bundle, what: str, got: object = None, allowed: object = None) -> UserError:
    return UserError(what, got=got, allowed=allowed, fix=command("build", bundle.path, "--for", ORT_ENGINE, "--force"))

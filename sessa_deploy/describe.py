"""What a checkpoint, an ONNX file or a bundle holds, as plain values for a table or JSON. Reads headers first; torch and onnx only where needed."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sessa_deploy.checkpoint_layout import PICKLES, locate
from sessa_deploy.config import CONFIG_FILE, Note, SessaConfig
from sessa_deploy.contract import ENGINES_DIR, MANIFEST_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from sessa_deploy.errors import MissingPackage, UserError, need, packages_named
from sessa_deploy.reading import open_plain, read_json
from sessa_deploy.safetensors_check import read_header

_STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


@packages_named()
def describe(path: str | Path, verify: bool = True, config_file: str | Path | None = None) -> dict[str, Any]:
    """A description of `path` with `kind` "checkpoint", "onnx" or "bundle".

    verify: also judge a checkpoint as `export` does, or check every checksum of a bundle. What fails is `problem`, one line, beside `verified` False.
    config_file: of a checkpoint that has none beside it. Raises UserError when `path` is none of the three or cannot be read at all.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError("nothing to inspect", got=path, allowed="a checkpoint, an ONNX file or a bundle")
    if os.path.isdir(path):
        return describe_bundle(path, verify) if os.path.lexists(path / MANIFEST_FILE) else describe_checkpoint(path, verify, config_file)
    if path.name == MANIFEST_FILE:
        return describe_bundle(path.parent, verify)
    if path.suffix == ".onnx":
        return describe_onnx(path)
    if path.suffix in (*PICKLES, ".safetensors") or path.name.endswith(".index.json"):
        return describe_checkpoint(path, verify, config_file)
    raise UserError(f"{path} is nothing to inspect", got=f"a file ending in {path.suffix or 'nothing'}",
                    allowed="a checkpoint (folder, .safetensors, .pt, .pth, .bin, .ckpt), an .onnx file or a bundle folder")


def describe_checkpoint(path: Path, verify: bool = True, config_file: str | Path | None = None) -> dict[str, Any]:
    """config, tensors [{name, dtype, shape, bytes, file}], parameters by part, dtypes, bytes, tokenizer, chat_template, notes, verified / problem."""
    notes: list[str] = []
    verdict: dict[str, Any] = _verify_checkpoint(path, config_file, notes.append) if verify else {"verified": None}
    try:
        layout = locate(path)
        tensors = [tensor for file in layout.files for tensor in _tensors(file)]
    except UserError as error:
        if path.is_dir() and not os.path.lexists(path / CONFIG_FILE) and error.what.endswith("holds no weights"):
            raise UserError(f"{path} is neither a checkpoint nor a bundle", got=error.got, allowed=f"a folder with model.safetensors, or with {MANIFEST_FILE}",
                            ) from None
        if verdict["verified"] is False:
            raise UserError(verdict["problem"]) from None
        raise
    tensors.sort(key=lambda t: [(int(w), "") if w.isdecimal() and len(w) < 20 else (-1, w) for w in t["name"].split(".")])
    sizes = {str(f.relative_to(layout.folder)): f.stat().st_size for f in layout.files}
    out: dict[str, Any] = {
        "kind": "checkpoint", "path": str(path), "files": sizes, "bytes": sum(sizes.values()), "config": None,
        "parameters": sum(math.prod(t["shape"]) for t in tensors), "parts": _parts(tensors), "dtypes": dict(Counter(t["dtype"] for t in tensors)),
        "tokenizer": os.path.isfile(layout.folder / TOKENIZER_FILE), "chat_template": _template_of(layout.folder), "tensors": tensors, "notes": notes,
    }
    with contextlib.suppress(UserError):  # of which the verdict speaks
        out["config"] = SessaConfig.load(config_file or layout.folder).to_dict()
    return out | verdict


def _verify_checkpoint(path: Path, config_file: str | Path | None, note: Note) -> dict[str, Any]:
    """What export would say."""
    try:
        with packages_named():
            need("torch", "safetensors")
            from sessa_deploy.checkpoint import load_for_export
            from sessa_deploy.checkpoint_template import read_template
    except MissingPackage as error:  # the shapes can be shown without it
        return {"verified": None, "problem": str(error)}
    try:
        model, tokenizer = load_for_export(path, SessaConfig.load(config_file, note) if config_file else None, note)
        read_template(locate(path).folder, model.config, tokenizer, note)
    except UserError as error:
        return {"verified": False, "problem": str(error)}
    return {"verified": True, "problem": None}


def _template_of(folder: Path) -> str | None:
    """The file that a checkpoint's chat template stands in, or None."""
    if os.path.lexists(folder / TEMPLATE_FILE):
        return TEMPLATE_FILE
    with contextlib.suppress(UserError):  # of which the verdict speaks
        settings = read_json(folder / TOKENIZER_CONFIG_FILE) if os.path.lexists(folder / TOKENIZER_CONFIG_FILE) else None
        return TOKENIZER_CONFIG_FILE if isinstance(settings, dict) and settings.get("chat_template") else None
    return None


def _tensors(file: Path) -> list[dict[str, Any]]:
    if file.suffix not in PICKLES:
        return [{"name": n, "dtype": i.dtype, "shape": list(i.shape), "bytes": i.end - i.begin, "file": file.name}
                for n, i in read_header(file).tensors.items()]
    need("torch")
    from sessa_deploy.official import load_pickle

    return [{"name": n, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape), "bytes": x.numel() * x.element_size(), "file": file.name}
            for n, x in load_pickle(file).items()]


def _parts(tensors: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Parameters of the embedding, the layers together, and so on, by the first word of the names that is no number."""
    parts: Counter[str] = Counter()
    for tensor in tensors:
        words = [w for w in tensor["name"].split(".") if w not in ("module", "_orig_mod", "model")]
        parts[words[0] if words else tensor["name"]] += math.prod(tensor["shape"])
    return dict(parts)


def describe_onnx(path: Path) -> dict[str, Any]:
    """opsets, functions, inputs and outputs with dims, nodes outside the standard domains, op counts, initializers, sizes with external data.

    Raises UserError if the onnx package is absent or the file is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        with open_plain(path) as file:
            model = onnx.load_model_from_string(file.read())
    except (DecodeError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no ONNX model", got=str(error)[:120], fix="export it again") from None
    if not model.graph.node and not model.opset_import:
        raise UserError(f"{path} is no ONNX model", got="no graph", fix="export it again")
    external = sorted({e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"})
    sizes = {name: (path.parent / name).stat().st_size if (path.parent / name).is_file() else None for name in external}
    missing = [name for name, size in sizes.items() if size is None]
    kinds: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        kinds[onnx.TensorProto.DataType.Name(tensor.data_type)] += math.prod(tensor.dims)
    return {
        "kind": "onnx", "path": str(path), "ir_version": model.ir_version, "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "functions": [{"domain": f.domain, "name": f.name, "nodes": len(f.node), "inputs": list(f.input), "outputs": list(f.output),
                       "opsets": {o.domain or "ai.onnx": o.version for o in f.opset_import}} for f in model.functions],
        "inputs": [_value(onnx, v) for v in model.graph.input], "outputs": [_value(onnx, v) for v in model.graph.output],
        "custom_nodes": [{"op": f"{n.domain}::{n.op_type}", "name": n.name, "attributes": {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute
                          if a.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT)}} for n in model.graph.node if n.domain not in _STANDARD_DOMAINS],
        "ops": dict(Counter(n.op_type for n in model.graph.node).most_common()), "nodes": len(model.graph.node),
        "initializers": len(model.graph.initializer), "parameters": dict(kinds), "bytes": path.stat().st_size, "external_data": sizes,
        "verified": not missing, "problem": f"external data is missing: {', '.join(missing)}" if missing else None,
    }


def _value(onnx: Any, value: Any) -> dict[str, Any]:
    kind = value.type.tensor_type
    dims = [d.dim_param or d.dim_value for d in kind.shape.dim]
    return {"name": value.name, "dtype": onnx.TensorProto.DataType.Name(kind.elem_type), "dims": dims}


def describe_bundle(path: Path, verify: bool = True) -> dict[str, Any]:
    """config, precision, weights (None: none in 8 bits), opset, versions, files with size and checksum, chat_template, engines and the bytes each adds,
    whether all matches the manifest. Of one with weights in 8 bits also weight_bytes, what they take."""
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.sizes import weight_sizes

    out: dict[str, Any] = {"kind": "bundle", "path": str(path)}
    try:
        bundle = Bundle.open(path, verify=verify)
        manifest = bundle.manifest
        if bundle.weights is not None:
            out["weight_bytes"] = weight_sizes(bundle.config, bundle.precision, bundle.weights).to_dict()
        out |= {"verified": True if verify else None, "problem": None}
    except UserError as error:
        out |= {"verified": False, "problem": str(error)}
        try:
            manifest = read_json(path / MANIFEST_FILE, 16 << 20)
        except UserError:
            raise error from None
        if not isinstance(manifest, dict):
            raise error from None
    files = manifest.get("files")
    files = {n: e for n, e in files.items() if isinstance(e, dict)} if isinstance(files, dict) else {}
    sizes = [e["size"] for e in files.values() if isinstance(e.get("size"), int)]
    keys = ("schema_version", "precision", "weights", "opset", "versions", "config")
    added: dict[str, int] = {}  # what each engine's folder adds to the bundle
    for name, entry in files.items():
        if name.startswith(f"{ENGINES_DIR}/") and name.count("/") > 1:
            engine = name.split("/")[1]
            added[engine] = added.get(engine, 0) + (entry["size"] if isinstance(entry.get("size"), int) else 0)
    return out | {k: manifest.get(k) for k in keys} | {
        "files": files, "bytes": sum(sizes), "engines": sorted(added), "engine_bytes": added,
        "chat_template": TEMPLATE_FILE if TEMPLATE_FILE in files else None,
    }  # fmt: skip

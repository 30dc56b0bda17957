"""The tensors of a checkpoint's files by their raw names: one safetensors file, shards with an index, or a pickle. Strict, and nothing is executed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sessa_deploy.errors import UserError
from sessa_deploy.official import load_pickle
from sessa_deploy.safetensors_check import read_header, shorten

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raw name -> tensor of a checkpoint folder, a .safetensors file or a .pt / .pth file. Raises UserError (see `checkpoint.read_state`)."""
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in PICKLES:
        return load_pickle(path)
    if path.name.endswith(".safetensors"):
        return _read_safetensors(path, None)
    if path.exists():
        raise UserError(f"{path} is no checkpoint", got=f"a file ending in {path.suffix or 'nothing'}", allowed="a folder, .safetensors, .pt or .pth")
    raise UserError("no such checkpoint", got=path, allowed="a folder, or a .safetensors, .pt or .pth file")


def _read_folder(folder: Path) -> dict[str, Tensor]:
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if index.exists() and single.exists():
        raise UserError(f"{folder} holds {WEIGHTS_FILE} and {INDEX_FILE}", allowed="one of them", fix="remove the stale one")
    if index.exists():
        return _read_shards(folder, index)
    if single.exists():
        return _read_safetensors(single, None)
    pickles = sorted(x for x in folder.iterdir() if x.suffix in PICKLES)
    if len(pickles) == 1:
        return load_pickle(pickles[0])
    raise UserError(f"{folder} holds no weights", got=shorten(sorted(x.name for x in folder.iterdir())) or "an empty folder",
                    allowed=f"{WEIGHTS_FILE}, {INDEX_FILE} with its shards, or one .pt file")


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{index} cannot be read as JSON", got=error) from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) and v for v in weight_map.values()):
        raise UserError(f"{index} has no weight_map", allowed='{"weight_map": {tensor: shard file}}')
    wanted: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        wanted.setdefault(shard, set()).add(name)
    root = folder.resolve()
    for shard in sorted(wanted):
        parts = re.split(r"[/\\]", shard)
        inside = not os.path.isabs(shard) and ".." not in parts and ":" not in shard and (folder / shard).resolve().is_relative_to(root)
        if not inside:
            raise UserError(f"{index} names a shard outside the checkpoint's folder", got=shard, allowed=f"files within {folder}")
    absent = [shard for shard in sorted(wanted) if not (folder / shard).is_file()]
    if absent:
        raise UserError(f"{folder} lacks shards", got=f"no {shorten(absent)}", fix="copy or download them again")
    headers = {shard: set(read_header(folder / shard).tensors) for shard in sorted(wanted)}
    homes = {name: shard for shard, names in headers.items() for name in names}
    for name, shard in weight_map.items():
        if homes.get(name, shard) != shard:
            raise UserError(f"{name} is in the wrong shard", got=homes[name], allowed=f"{shard}, as {index.name} says")
    for shard, names in headers.items():
        lost, extra = sorted(wanted[shard] - names), sorted(names - wanted[shard])
        if lost:
            raise UserError(f"{folder / shard} lacks tensors that {index.name} places there", got=shorten(lost))
        if extra:
            raise UserError(f"{folder / shard} holds tensors that {index.name} does not place there", got=shorten(extra))
    return {name: x for shard in sorted(wanted) for name, x in _read_safetensors(folder / shard, wanted[shard]).items()}


def _read_safetensors(path: Path, wanted: set[str] | None) -> dict[str, Tensor]:
    header = read_header(path)
    wrong = [f"{name} is {info.dtype}" for name, info in header.tensors.items() if info.dtype not in ("F64", "F32", "F16", "BF16")
             and not name.endswith(("causal_mask_f_full", "causal_mask_fb_full"))]
    if wrong:
        raise UserError(f"{path} holds weights that are not floating point", got=shorten(wrong), allowed="F64, F32, F16, BF16")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in (wanted or header.tensors)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be loaded", got=error) from None

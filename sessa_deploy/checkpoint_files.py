"""The tensors of a checkpoint's files by their raw names: one safetensors file, shards with an index, or pickles. Strict, and nothing is executed."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sessa_deploy.checkpoint_layout import INDEX_FILE, WEIGHTS_FILE, Layout, locate
from sessa_deploy.errors import UserError
from sessa_deploy.official import load_pickle
from sessa_deploy.reading import identity, open_plain
from sessa_deploy.safetensors_check import check_header, read_header, shorten

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "read_layout", "read_tensors"]


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Raw name -> tensor of a checkpoint folder or file (see checkpoint_layout). Raises UserError (see `checkpoint.read_state`)."""
    return read_layout(locate(path))


def read_layout(layout: Layout) -> dict[str, Tensor]:
    """Raw name -> tensor of a checkpoint's files, each tensor from the shard where the index places it."""
    if layout.weight_map is None:
        return load_pickle(layout.files[0]) if layout.pickled else _read_safetensors(layout.files[0])
    wanted: dict[str, set[str]] = {}
    for name, shard in layout.weight_map.items():
        wanted.setdefault(shard, set()).add(name)
    if not layout.pickled:  # the headers alone say whether it fits
        _check_homes(layout, wanted, {shard: set(read_header(layout.folder / shard).tensors) for shard in wanted})
    held = {shard: load_pickle(file) if layout.pickled else _read_safetensors(file) for shard, file in zip(sorted(wanted), layout.files, strict=True)}
    _check_homes(layout, wanted, {shard: set(tensors) for shard, tensors in held.items()})
    return {name: x for tensors in held.values() for name, x in tensors.items()}


def _check_homes(layout: Layout, wanted: dict[str, set[str]], held: dict[str, set[str]]) -> None:
    assert layout.index is not None and layout.weight_map is not None
    index = layout.index.name
    homes = {name: shard for shard, names in held.items() for name in names}
    for name, shard in layout.weight_map.items():
        if homes.get(name, shard) != shard:
            raise UserError(f"{name} is in the wrong shard", got=homes[name], allowed=f"{shard}, as {index} says")
    for shard, names in sorted(held.items()):
        lost, extra = sorted(wanted[shard] - names), sorted(names - wanted[shard])
        if lost:
            raise UserError(f"{layout.folder / shard} lacks tensors that {index} places there", got=shorten(lost))
        if extra:
            raise UserError(f"{layout.folder / shard} holds tensors that {index} does not place there", got=shorten(extra))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with open_plain(path) as file:
        before = os.fstat(file.fileno())
        header = check_header(file, path)
        wrong = [f"{name} is {info.dtype}" for name, info in header.tensors.items() if info.dtype not in ("F64", "F32", "F16", "BF16")
                 and not name.endswith(("causal_mask_f_full", "causal_mask_fb_full"))]
        if wrong:
            raise UserError(f"{path} holds weights that are not floating point", got=shorten(wrong), allowed="F64, F32, F16, BF16")
        try:
            with safe_open(path, framework="pt", device="cpu") as tensors:
                found = {name: tensors.get_tensor(name) for name in header.tensors}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be loaded", got=error) from None
        if identity(os.stat(path)) != identity(before):  # what was checked is what was loaded
            raise UserError(f"{path} changed while it was read", fix="wait until its writer is done")
        return found

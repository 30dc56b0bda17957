"""Which files of a folder are a checkpoint, in the layouts that people have. Standard library only; nothing is opened but an index.

A folder's weights are, in this order: model.safetensors; *.safetensors.index.json with its shards; one other .safetensors file; pytorch_model.bin or its
index; one other pickle (.pt, .pth, .bin, .ckpt) that is no optimizer's or trainer's. A folder without weights may lead to them: a run of `train` (its
checkpoint/), or a repository in a hub's cache (its snapshots/).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sessa_deploy.config import CONFIG_FILE
from sessa_deploy.contract import MANIFEST_FILE, MODEL_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.reading import open_plain, read_json, read_plain
from sessa_deploy.safetensors_check import shorten

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CHECKPOINT_DIR = "checkpoint"  # of a run of `train`
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_SAFETENSORS, _INDEX = ".safetensors", ".index.json"
_PICKLE_FILE = "pytorch_model.bin"
_SHARD = re.compile(r"-(\d{5,6})-of-(\d{5,6})\.(?:safetensors|bin|pt|pth)$")
# What trainers write beside the weights: optimizers, schedules, random states, options; and the state from which `train` resumes.
_NOT_WEIGHTS = re.compile(r"^(training_args|optimizer|optim|scheduler|lr_scheduler|scaler|sampler|rng_state|random_state|trainer_state|dataloader|resume)"
                          r"s?([-_.].*)?\.[a-z]+$|optim_states\.pt$")
_ALLOWED = f"{WEIGHTS_FILE}, {INDEX_FILE} with its shards, one other .safetensors file, or one .pt, .pth, .bin or .ckpt file"
_FILE_KINDS = f"a folder, or a {_SAFETENSORS}, {', '.join(PICKLES[:-1])} or {PICKLES[-1]} file"


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint's parts are. folder: of config.json and tokenizer.json. files: the weights, one of them or the shards that weight_map (tensor ->
    shard's name, None for a single file) of the index names, in order. notes: what somebody who named another place should hear, a line each."""

    folder: Path
    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: dict[str, str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def pickled(self) -> bool:
        """Whether the weights are in pickles."""
        return self.files[0].suffix in PICKLES


def locate(path: str | Path) -> Layout:
    """The checkpoint at `path`, a folder or a file. Raises UserError, one line, if there is none, if it cannot be told which of several files it is, or
    if it is not whole: shards without an index or absent, an index that is damaged or names files outside the folder."""
    path = Path(path)
    try:
        return _locate(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read", got=error.strerror or error, fix="look at its permissions and at the disk") from None


def _locate(path: Path) -> Layout:
    if os.path.isdir(path):
        return _folder(path)
    if path.name.endswith((_SAFETENSORS + _INDEX, ".bin" + _INDEX)):
        return _sharded(path.parent, path)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("no such checkpoint", got=path, allowed=_FILE_KINDS) from None
    if path.suffix in (*PICKLES, _SAFETENSORS):
        return Layout(path.parent, (path,))
    with open_plain(path):  # a pipe, a Git LFS pointer or a file that may not be read says so first
        pass
    fix = f"name its folder: {path.parent}" if path.name in (CONFIG_FILE, MANIFEST_FILE) else None
    raise UserError(f"{path} is no checkpoint", got=f"a file ending in {path.suffix or 'nothing'}", allowed=_FILE_KINDS, fix=fix)


def _folder(folder: Path) -> Layout:
    names = sorted(os.listdir(folder))
    weights = [n for n in names if not _NOT_WEIGHTS.search(n)]
    found = _safetensors(folder, [n for n in weights if n.endswith((_SAFETENSORS, _SAFETENSORS + _INDEX))])
    found = found or _pickles(folder, [n for n in weights if n.endswith((*PICKLES, ".bin" + _INDEX))])
    if found is not None:
        return found
    for inner, what in ((folder / CHECKPOINT_DIR, "the checkpoint of a training run"), (_snapshot(folder), "the snapshot in a download cache")):
        if inner is not None and os.path.isdir(inner):
            layout = _folder(inner)
            return Layout(layout.folder, layout.files, layout.index, layout.weight_map, (f"{folder}: taking {inner}, {what}", *layout.notes))
    if MANIFEST_FILE in names and MODEL_FILE in names:
        raise UserError(f"{folder} is a bundle, not a checkpoint", got=f"{MANIFEST_FILE} and no weights", allowed=_ALLOWED,
                        fix="name the checkpoint that it was exported from")
    raise UserError(f"{folder} holds no weights", got=shorten(names) or "an empty folder", allowed=_ALLOWED)


def _safetensors(folder: Path, names: list[str]) -> Layout | None:
    indexes = [n for n in names if n.endswith(_INDEX)]
    if WEIGHTS_FILE in names and INDEX_FILE in names:
        raise UserError(f"{folder} holds {WEIGHTS_FILE} and {INDEX_FILE}", allowed="one of them", fix="remove the stale one")
    if WEIGHTS_FILE in names:
        return Layout(folder, (folder / WEIGHTS_FILE,))
    if INDEX_FILE in names or len(indexes) == 1:
        return _sharded(folder, folder / (INDEX_FILE if INDEX_FILE in names else indexes[0]))
    return _alone(folder, indexes or names)


def _pickles(folder: Path, names: list[str]) -> Layout | None:
    indexes = [n for n in names if n.endswith(_INDEX)]
    if _PICKLE_FILE in names:
        return Layout(folder, (folder / _PICKLE_FILE,))
    if len(indexes) == 1:
        return _sharded(folder, folder / indexes[0])
    return _alone(folder, indexes or names)


def _alone(folder: Path, names: list[str]) -> Layout | None:
    """The one file there is; None if there is none."""
    shards = {n: found for n in names if (found := _SHARD.search(n))}
    if any(int(found[2]) > 1 for found in shards.values()):
        kind = INDEX_FILE if names[0].endswith(_SAFETENSORS) else _PICKLE_FILE + _INDEX
        raise UserError(f"{folder} holds shards without an index", got=shorten(sorted(shards)), allowed=f"{kind} beside them",
                        fix=f"copy or download {kind} too")
    if len(names) > 1:
        raise UserError(f"{folder} holds several files of weights", got=shorten(names), allowed="one", fix=f"name one of them: {folder / names[0]}")
    return Layout(folder, (folder / names[0],)) if names else None


def _snapshot(folder: Path) -> Path | None:
    """The snapshot that a repository in a hub's cache has checked out: the one of refs/main, or the only one."""
    place = folder / "snapshots"
    if not os.path.isdir(place):
        return None
    revisions = sorted(os.listdir(place))
    main = folder / "refs" / "main"
    if os.path.isfile(main) and (revision := read_plain(main, 4096).decode("utf-8", "replace").strip()) in revisions:
        return place / revision
    if len(revisions) > 1:
        raise UserError(f"{folder} holds several snapshots", got=shorten(revisions), allowed="one", fix=f"name one of them: {place / revisions[0]}")
    return place / revisions[0] if revisions else None


def _sharded(folder: Path, index: Path) -> Layout:
    data = read_json(index)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) and v for v in weight_map.values()):
        raise UserError(f"{index} has no weight_map", allowed='{"weight_map": {tensor: shard file}}', fix="copy or download the file again")
    shards = sorted(set(weight_map.values()))
    for shard in shards:  # where a link within the folder leads is its owner's affair; a name must not leave the folder
        parts = re.split(r"[/\\]", shard)
        if os.path.isabs(shard) or any(p in ("..", ".", "") for p in parts) or ":" in shard or "\0" in shard:
            raise UserError(f"{index} names a shard outside the checkpoint's folder", got=shard, allowed=f"files within {folder}")
    strange = [shard for shard in shards if not shard.endswith(_SAFETENSORS if index.name.endswith(_SAFETENSORS + _INDEX) else PICKLES)]
    if strange:
        raise UserError(f"{index} names shards of another kind", got=shorten(strange), allowed="the kind that the index is named after")
    absent = [shard for shard in shards if not os.path.lexists(folder / shard)]
    if absent:
        raise UserError(f"{folder} lacks shards", got=f"no {shorten(absent)}", fix="copy or download them again")
    return Layout(folder, tuple(folder / shard for shard in shards), index, weight_map)

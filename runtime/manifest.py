"""manifest.json of a bundle: reading it, every field checked, and what to advise where a bundle is not right. Standard library only."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path, PurePosixPath
from typing import Any

from sessa_deploy.config import CONFIG_FILE, SessaConfig
from sessa_deploy.contract import BUNDLE_SCHEMA, EXPORT_PRECISIONS, MANIFEST_FILE, MODEL_FILE, WEIGHT_FORMATS
from sessa_deploy.errors import UserError
from sessa_deploy.process import command
from sessa_deploy.reading import read_plain, unique_keys
from sessa_deploy.runtime.publish import displaced, is_staging

_LIMIT = 16 << 20  # bytes
_KEYS = ("schema_version", "config", "precision", "opset", "files", "versions")


def in_cache(path: str | Path) -> bool:
    """Whether a folder is, or lies in, a snapshot in a hub's download cache: what is written there is lost, and hides from the hub's own tools."""
    real = Path(os.path.realpath(path))
    return any(p.parent.name == "snapshots" and (p.parent.parent / "blobs").is_dir() for p in (real, *real.parents))


def mend(path: Path) -> str:
    """What to do about a bundle at `path` that is not right; never to write into a hub's cache."""
    if in_cache(path):
        return "download it again, or write it to another place: sessa-deploy export CHECKPOINT --out BUNDLE"
    return f"write the bundle anew: {command('export', 'CHECKPOINT', '--out', path)}"


def bad(what: str, path: Path, got: object = None, allowed: object = None, fix: str | None = None) -> UserError:
    """The error that a bundle is not right, with the command that mends it."""
    return UserError(f"bundle {path}: {what}", got=got, allowed=allowed, fix=fix or mend(path))


def mismatch(path: Path, name: str, got: str, want: str) -> UserError:
    """The error that a file's contents are not what the manifest says; got, want: SHA-256 in hexadecimal."""
    return bad(f"{name} does not match its checksum", path, got=f"sha256 {got[:16]}...", allowed=f"{want[:16]}...")


def read_manifest(path: Path) -> bytes:
    """The manifest's bytes. Raises UserError where there is no bundle, saying what is there instead."""
    if is_staging(path):
        raise UserError("that folder is what a killed export left, not a bundle", got=str(path), fix="sessa-deploy export CHECKPOINT --out BUNDLE")
    if not os.path.isdir(path):
        older = displaced(Path(os.path.realpath(path)))
        fix = f"an interrupted export left the older bundle aside: {shlex.join(('mv', str(older), str(path)))}" if older else None
        raise UserError("no bundle", got=str(path), allowed="a folder that holds manifest.json",
                        fix=fix or command("export", "CHECKPOINT", "--out", "BUNDLE" if in_cache(path) or os.path.lexists(path) else path))
    if not os.path.lexists(path / MANIFEST_FILE) and os.path.isfile(path / CONFIG_FILE):
        raise UserError("that is a checkpoint, not a bundle", got=str(path), allowed="a folder that export wrote",
                        fix=command("export", path, "--out", "BUNDLE"))
    try:
        return read_plain(path / MANIFEST_FILE, _LIMIT)
    except UserError as error:
        raise bad(f"{MANIFEST_FILE}: {error.what.replace(str(path / MANIFEST_FILE), 'it')}", path, got=error.got, allowed=error.allowed,
                   fix=error.fix if "LFS" in error.what else None) from None


def parse_manifest(raw: bytes, path: Path) -> dict[str, Any]:
    """The manifest, every field checked for type and range. Raises UserError naming the field."""
    try:
        manifest = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise bad(f"{MANIFEST_FILE} is not JSON", path, got=str(error)) from None
    if not isinstance(manifest, dict):
        raise bad(f"{MANIFEST_FILE} is not a JSON object", path, got=type(manifest).__name__)
    version = manifest.get("schema_version")
    if type(version) is not int or version != BUNDLE_SCHEMA:
        raise bad(f"{MANIFEST_FILE} has another schema_version", path, got=repr(version), allowed=BUNDLE_SCHEMA)
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise bad(f"{MANIFEST_FILE} lacks keys", path, got=f"no {', '.join(missing)}", allowed=", ".join(_KEYS))
    if manifest["precision"] not in EXPORT_PRECISIONS:
        raise bad(f"{MANIFEST_FILE} has an unknown precision", path, got=repr(manifest["precision"]), allowed=", ".join(EXPORT_PRECISIONS))
    if type(manifest["opset"]) is not int:
        raise bad(f"{MANIFEST_FILE} has a bad opset", path, got=repr(manifest["opset"]), allowed="an integer")
    if "weights" in manifest:
        _check_weights(manifest["weights"], path)
    files, versions = manifest["files"], manifest["versions"]
    if not isinstance(files, dict) or MODEL_FILE not in files:
        raise bad(f"{MANIFEST_FILE} does not list {MODEL_FILE}", path)
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise bad(f"{MANIFEST_FILE} has bad versions", path, allowed="an object of strings")
    try:
        SessaConfig.from_dict(manifest["config"], source="config")
    except UserError as error:
        raise bad(f"{MANIFEST_FILE} holds a bad config", path, got=f"{error.what} ({error.got})", allowed=error.allowed) from None
    for name, entry in files.items():
        check_name(name, path)
        digest, size = (entry.get("sha256"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise bad(f"{MANIFEST_FILE} has no checksum for {name}", path, got=repr(digest), allowed="64 lower-case hexadecimal digits")
        if type(size) is not int or size < 0:
            raise bad(f"{MANIFEST_FILE} has no size for {name}", path, got=repr(size), allowed="bytes")
    return manifest


def _check_weights(weights: Any, path: Path) -> None:
    """Raise UserError unless this is what a manifest says of weights in 8 bits; one without the key has none."""
    kept = weights.get("kept") if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or weights.get("format") not in list(WEIGHT_FORMATS):
        raise bad(f"{MANIFEST_FILE} has weights of an unknown format", path, got=repr(weights)[:80], allowed=", ".join(WEIGHT_FORMATS))
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise bad(f"{MANIFEST_FILE} has a bad list of kept weights", path, got=repr(kept)[:80], allowed="a list of names")


def check_name(name: str, path: Path) -> None:
    """Raise UserError unless `name` is a relative path with forward slashes that stays within the folder and is not the manifest's."""
    parts = PurePosixPath(name).parts
    odd = any(ord(c) < 32 or c in "\\:" for c in name)
    if not name or odd or name != "/".join(parts) or name == MANIFEST_FILE or any(p in ("..", ".", "/") for p in parts):
        raise bad(f"{name!r} is no name for a bundle's file", path, allowed="a relative path inside the folder, with forward slashes")



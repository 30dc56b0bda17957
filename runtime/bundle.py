"""The folder that is deployed: a manifest with the checksum of every other file. Standard library only (rich for a progress bar).

manifest.json: {"schema_version", "config", "precision", "opset", "files": {name: {"sha256", "size"}}, "versions"}
Nothing of a bundle is loaded before every file matched; a bundle appears, changes and is replaced by one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sessa_deploy.config import CONFIG_FILE, SessaConfig
from sessa_deploy.contract import BUNDLE_SCHEMA, DEFAULT_OPSET, EXPORT_PRECISIONS, MANIFEST_FILE, MODEL_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.process import command
from sessa_deploy.runtime.publish import Staging, displaced, is_staging, locked, place
from sessa_deploy.runtime.report import byte_progress

_BLOCK = 1 << 20
_MANIFEST_LIMIT = 16 << 20
_KEYS = ("schema_version", "config", "precision", "opset", "files", "versions")
Source = Path | str | bytes


class Bundle:
    """A bundle whose files have been checked; make one with `Bundle.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.config = SessaConfig.from_dict(manifest["config"], source=f"{path / MANIFEST_FILE}")
        self.precision: str = manifest["precision"]
        self.opset: int = manifest["opset"]
        self.versions: dict[str, str] = manifest["versions"]

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Read the manifest and check every file's name, size and SHA-256; `verify=False` leaves out reading the contents only.

        Raises one UserError that names the first file at fault (changed, missing, extra, a link, a name that leaves the folder).
        """
        path = Path(path)
        for _ in range(3):
            raw = _read_manifest(path)
            try:
                bundle = cls(path, _parse(raw, path))
                _check_files(bundle, contents=verify)
                return bundle
            except UserError:
                if _read_manifest(path) == raw:
                    raise
        raise UserError("the bundle keeps changing while it is read", got=str(path), fix="wait until the export or build is done")

    def names(self) -> list[str]:
        """Names of all files but the manifest, sorted, with forward slashes."""
        return sorted(self.manifest["files"])

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["files"]

    def file(self, name: str) -> Path:
        """Path of a file of the manifest. Raises UserError if the bundle has none of that name."""
        if name not in self.manifest["files"]:
            raise UserError(f"the bundle has no {name}", got=str(self.path), allowed=", ".join(self.names()), fix=_mend(self.path))
        return self.path / name

    @property
    def model(self) -> Path:
        """Path of model.onnx."""
        return self.file(MODEL_FILE)

    def sha256(self, name: str) -> str:
        """Checksum of a file as the manifest states it, lower-case hexadecimal."""
        self.file(name)
        digest: str = self.manifest["files"][name]["sha256"]
        return digest


class BundleWriter:
    """Writes a bundle in place: `with BundleWriter(out) as w: ...files into w.folder...; bundle = w.commit(config, precision, ...)`.

    Leaving the block without `commit` leaves nothing behind. An existing bundle at `out` is replaced in one step; any other folder that
    is not empty, and a bundle to which somebody added files, raise UserError before anything is written.
    """

    def __init__(self, out: str | Path) -> None:
        self.target = Path(os.path.realpath(out))
        _check_replaceable(self.target)
        self._staging = Staging(self.target)

    def __enter__(self) -> BundleWriter:
        with _writing(self.target):
            self._staging.__enter__()
        return self

    def __exit__(self, *caught: object) -> None:
        self._staging.__exit__(*caught)

    @property
    def folder(self) -> Path:
        """Where the files go; only valid inside the block and before `commit`."""
        return self._staging.folder

    def commit(self, config: SessaConfig, precision: str, versions: Mapping[str, str], opset: int = DEFAULT_OPSET) -> Bundle:
        """Checksum every file in the folder, write the manifest last and put the folder in place."""
        with _writing(self.target):
            files = {name: _describe(self.folder / name) for name in _listing(self.folder)}
            manifest = {"schema_version": BUNDLE_SCHEMA, "config": config.to_dict(), "precision": precision, "opset": opset,
                        "files": files, "versions": {str(k): str(v) for k, v in sorted(versions.items())}}
            _parse(json.dumps(manifest).encode(), self.target)
            _write_manifest(self.folder, manifest)
            with locked(self.target.parent):
                _check_replaceable(self.target)
                self._staging.publish(MANIFEST_FILE)
        return Bundle(self.target, manifest)


def write_bundle(out: str | Path, files: Mapping[str, Source], config: SessaConfig, precision: str, versions: Mapping[str, str],
                 opset: int = DEFAULT_OPSET, move: bool = False) -> Bundle:
    """Write a bundle of `files` (name -> a file to copy, or the bytes themselves) at `out`, whole or not at all.

    precision: fp32, fp16 or bf16. versions: of exporter, torch, onnx. move: take the source files away instead of copying them.
    Raises UserError as BundleWriter does, and on a name that leaves the folder.
    """
    with BundleWriter(out) as writer:
        _fill(writer.folder, files, move)
        return writer.commit(config, precision, versions, opset)


def add_files(bundle: Bundle | str | Path, files: Mapping[str, Source], remove: Iterable[str] = (), move: bool = False) -> Bundle:
    """Add files to a bundle or replace them (parity.json, engines/...), and remove others; the manifest changes in the same step.

    The bundle on disk is the old one or the new one at every moment. Unchanged files are hard-linked, not copied. Returns the new Bundle.
    """
    target = Path(os.path.realpath(bundle.path if isinstance(bundle, Bundle) else bundle))
    gone = set(remove)
    if MODEL_FILE in gone | set(files):
        raise UserError(f"{MODEL_FILE} of a finished bundle does not change", got=str(target), fix=_mend(target))
    with _writing(target), Staging(target) as staging:
        _fill(staging.folder, files, move)
        described = {name: _describe(staging.folder / name) for name in files}
        with locked(target.parent):
            manifest = _parse(_read_manifest(target), target)
            kept = {name: entry for name, entry in manifest["files"].items() if name not in files and name not in gone}
            for name in kept:
                _regular(target, name)
                place(target / name, staging.folder / name, link=True)
            manifest["files"] = {**kept, **described}
            _write_manifest(staging.folder, manifest)
            staging.publish(MANIFEST_FILE)
    return Bundle(target, manifest)


def hash_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, lower-case hexadecimal, read in blocks; `advance` hears of every block's bytes."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            if advance is not None:
                advance(count)
    return digest.hexdigest()


def _mend(path: Path) -> str:
    return f"write the bundle anew: {command('export', 'CHECKPOINT', '--out', path)}"


def _bad(what: str, path: Path, got: object = None, allowed: object = None, fix: str | None = None) -> UserError:
    return UserError(f"bundle {path}: {what}", got=got, allowed=allowed, fix=fix or _mend(path))


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """A full disk, a read-only folder and the like as one line."""
    try:
        yield
    except OSError as error:
        raise UserError("the bundle cannot be written", got=f"{target} ({error.strerror or error})", fix="free space there, or choose another folder") from None


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": hash_file(path), "size": path.stat().st_size}


def _fill(folder: Path, files: Mapping[str, Source], move: bool) -> None:
    for name, source in files.items():
        _check_name(name, folder)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            target.write_bytes(source)
            continue
        try:
            if move:
                os.replace(source, target)
            else:
                place(Path(source), target)
        except OSError as error:
            raise UserError(f"{name} cannot be put into the bundle", got=f"{source} ({error.strerror})", fix="name an existing file") from None


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    manifest = {**manifest, "files": dict(sorted(manifest["files"].items()))}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _read_manifest(path: Path) -> bytes:
    if is_staging(path):
        raise UserError("that folder is what a killed export left, not a bundle", got=str(path), fix="sessa-deploy export CHECKPOINT --out BUNDLE")
    if not path.is_dir():
        older = displaced(Path(os.path.realpath(path)))
        fix = f"an interrupted export left the older bundle aside: {shlex.join(('mv', str(older), str(path)))}" if older else None
        raise UserError("no bundle", got=str(path), allowed="a folder that holds manifest.json", fix=fix or command("export", "CHECKPOINT", "--out", path))
    if not (path / MANIFEST_FILE).exists() and (path / CONFIG_FILE).is_file():
        raise UserError("that is a checkpoint, not a bundle", got=str(path), allowed="a folder that export wrote",
                        fix=command("export", path, "--out", "BUNDLE"))
    try:
        _regular(path, MANIFEST_FILE)
        with open(path / MANIFEST_FILE, "rb") as stream:
            raw = stream.read(_MANIFEST_LIMIT + 1)
    except OSError as error:
        raise _bad(f"{MANIFEST_FILE} cannot be read", path, got=error.strerror) from None
    if len(raw) > _MANIFEST_LIMIT:
        raise _bad(f"{MANIFEST_FILE} is too large", path, allowed=f"at most {_MANIFEST_LIMIT} bytes")
    return raw


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    """The manifest, every field checked for type and range."""
    try:
        manifest = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{MANIFEST_FILE} is not JSON", path, got=str(error)) from None
    if not isinstance(manifest, dict):
        raise _bad(f"{MANIFEST_FILE} is not a JSON object", path, got=type(manifest).__name__)
    version = manifest.get("schema_version")
    if type(version) is not int or version != BUNDLE_SCHEMA:
        raise _bad(f"{MANIFEST_FILE} has another schema_version", path, got=repr(version), allowed=BUNDLE_SCHEMA)
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise _bad(f"{MANIFEST_FILE} lacks keys", path, got=f"no {', '.join(missing)}", allowed=", ".join(_KEYS))
    if manifest["precision"] not in EXPORT_PRECISIONS:
        raise _bad(f"{MANIFEST_FILE} has an unknown precision", path, got=repr(manifest["precision"]), allowed=", ".join(EXPORT_PRECISIONS))
    if type(manifest["opset"]) is not int:
        raise _bad(f"{MANIFEST_FILE} has a bad opset", path, got=repr(manifest["opset"]), allowed="an integer")
    files, versions = manifest["files"], manifest["versions"]
    if not isinstance(files, dict) or MODEL_FILE not in files:
        raise _bad(f"{MANIFEST_FILE} does not list {MODEL_FILE}", path)
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise _bad(f"{MANIFEST_FILE} has bad versions", path, allowed="an object of strings")
    try:
        SessaConfig.from_dict(manifest["config"], source="config")
    except UserError as error:
        raise _bad(f"{MANIFEST_FILE} holds a bad config", path, got=f"{error.what} ({error.got})", allowed=error.allowed) from None
    for name, entry in files.items():
        _check_name(name, path)
        digest, size = (entry.get("sha256"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise _bad(f"{MANIFEST_FILE} has no checksum for {name}", path, got=repr(digest), allowed="64 lower-case hexadecimal digits")
        if type(size) is not int or size < 0:
            raise _bad(f"{MANIFEST_FILE} has no size for {name}", path, got=repr(size), allowed="bytes")
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _check_name(name: str, path: Path) -> None:
    parts = PurePosixPath(name).parts
    odd = any(ord(c) < 32 or c in "\\:" for c in name)
    if not name or odd or name != "/".join(parts) or name == MANIFEST_FILE or any(p in ("..", ".", "/") for p in parts):
        raise _bad(f"{name!r} is no name for a bundle's file", path, allowed="a relative path inside the folder, with forward slashes")


def _regular(path: Path, name: str) -> os.stat_result:
    """lstat of path/name, every part of which must be what it claims: folders and a plain file, no links."""
    here, info = path, None
    for part in PurePosixPath(name).parts:
        here = here / part
        try:
            info = os.lstat(here)
        except OSError:
            raise _bad(f"{name} is missing", path) from None
        if stat.S_ISLNK(info.st_mode):
            raise _bad(f"{name} is a symbolic link or lies behind one", path, allowed="plain files")
    if info is None or not stat.S_ISREG(info.st_mode):
        raise _bad(f"{name} is not a plain file", path)
    return info


def _listing(path: Path) -> Iterator[str]:
    """Names of everything below `path` but the manifest and folders, links included, sorted."""
    for root, folders, names in os.walk(path):
        folders.sort()
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in sorted(names + links):
            relative = Path(root, name).relative_to(path).as_posix()
            if relative != MANIFEST_FILE:
                yield relative


def _check_files(bundle: Bundle, contents: bool) -> None:
    path, files = bundle.path, bundle.manifest["files"]
    for name, entry in files.items():
        size = _regular(path, name).st_size
        if size != entry["size"]:
            raise _bad(f"{name} has another size than the manifest says", path, got=f"{size} bytes", allowed=f"{entry['size']} bytes")
    for name in _listing(path):
        if name not in files:
            raise _bad(f"{name} is not in the manifest", path, fix=f"remove the file, or {_mend(path)}")
    if not contents:
        return
    with byte_progress("checking", sum(entry["size"] for entry in files.values())) as advance:
        for name, entry in files.items():
            try:
                digest = hash_file(path / name, advance)
            except OSError as error:
                raise _bad(f"{name} cannot be read", path, got=error.strerror, fix="look at its permissions and at the disk") from None
            if digest != entry["sha256"]:
                raise _bad(f"{name} does not match its checksum", path, got=f"sha256 {digest[:16]}...", allowed=f"{entry['sha256'][:16]}...")


def _check_replaceable(target: Path) -> None:
    fix = "choose another --out, or remove it yourself"
    if not target.exists():
        return
    if not target.is_dir() or is_staging(target):
        raise UserError("the output exists and is no bundle", got=str(target), fix=fix)
    if not any(target.iterdir()):
        return
    try:
        manifest = _parse(_read_manifest(target), target)
    except UserError as error:
        raise UserError("the output folder exists and is no bundle", got=f"{target} ({error.what})", fix=fix) from None
    for name in _listing(target):
        if name not in manifest["files"]:
            raise UserError("the bundle to replace holds a file that is not its own", got=f"{target / name}", fix=fix)

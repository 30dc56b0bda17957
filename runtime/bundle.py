"""The folder that is deployed: a manifest with the checksum of every other file. Standard library only (rich for a progress bar).

manifest.json: {"schema_version", "config", "precision", "opset", "files": {name: {"sha256", "size"}}, "versions"}, and where matrices are stored in 8 bits
"weights": {"format", "kept": [names of those that are not]}.
Nothing of a bundle is loaded before every file that the manifest names matched, wherever links lead; other files in the folder are left alone and never
loaded. A bundle appears, changes and is replaced by one rename, or, where others' files or a mount point forbid it, with its manifest last (see publish).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import BUNDLE_SCHEMA, DEFAULT_OPSET, MANIFEST_FILE, MODEL_DATA_FILE, MODEL_FILE, PRECISIONS, WEIGHT_FORMATS, Weights
from sessa_deploy.errors import UserError
from sessa_deploy.process import command
from sessa_deploy.reading import identity, open_plain
from sessa_deploy.runtime.manifest import bad, check_name, in_cache, mend, mismatch, parse_manifest, read_manifest
from sessa_deploy.runtime.publish import Staging, is_staging, locked, place, sweep
from sessa_deploy.runtime.report import byte_progress

_BLOCK = 1 << 20
_LIMIT = 16 << 20
_KEYS = ("schema_version", "config", "precision", "opset", "files", "versions")
Source = Path | str | bytes
_SIXTEEN_BITS = tuple(name for name, p in PRECISIONS.items() if p.itemsize == 2)


class Bundle:
    """A bundle whose files have been checked; make one with `Bundle.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.config = SessaConfig.from_dict(manifest["config"], source=f"{path / MANIFEST_FILE}")
        self.precision: str = manifest["precision"]
        self.opset: int = manifest["opset"]
        self.versions: dict[str, str] = manifest["versions"]
        said = manifest.get("weights")
        self.weights = None if said is None else Weights(said["format"], tuple(said["kept"]))
        self._checked: dict[str, tuple[int, ...]] = {}  # name -> identity of the file whose contents matched

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Read the manifest and check every file's name, size and SHA-256; `verify=False` leaves out reading the contents only.

        Raises one UserError that names the first file at fault (changed, missing, no plain file, a name that leaves the folder).
        """
        path = Path(path)
        for _ in range(3):
            raw = read_manifest(path)
            try:
                bundle = cls(path, parse_manifest(raw, path))
                _check_files(bundle, contents=verify)
                return bundle
            except UserError:
                if read_manifest(path) == raw:
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
            raise UserError(f"the bundle has no {name}", got=str(self.path), allowed=", ".join(self.names()), fix=mend(self.path))
        return self.path / name

    def read(self, name: str) -> bytes:
        """The bytes of a file of the manifest. Raises UserError if there is none, or if what was read does not match its checksum."""
        with open_plain(self.file(name)) as stream:
            data = stream.read(os.fstat(stream.fileno()).st_size + 1)
        if hashlib.sha256(data).hexdigest() != self.sha256(name):
            raise mismatch(self.path, name, hashlib.sha256(data).hexdigest(), self.sha256(name))
        return data

    def require_unchanged(self) -> None:
        """Raise UserError unless the files checked by `open` are still the ones in place: for who loads a file by its path, after he did."""
        for name, before in self._checked.items():
            with open_plain(self.path / name) as stream:
                if identity(os.fstat(stream.fileno())) != before and (digest := _digest(stream)) != self.sha256(name):
                    raise mismatch(self.path, name, digest, self.sha256(name))

    def export_hint(self, options: str = "") -> str:
        """The command that writes this bundle anew, with further options; elsewhere, if it lies in a hub's cache."""
        return command("export", "CHECKPOINT", "--out", "BUNDLE" if in_cache(self.path) else self.path) + options

    def require_engine_weights(self, who: str, archs: Iterable[int] = ()) -> None:
        """Raise UserError where matrices are in 8 bits and the library's kernels cannot read them: beside activations of 32, or on one of `archs`."""
        if self.weights is None:
            return
        form = self.weights.format
        if self.precision not in _SIXTEEN_BITS:
            raise UserError(f"{who} takes weights in 8 bits beside activations of 16", got=f"{self.path}, {self.precision} with {form}",
                            allowed=f"{' or '.join(_SIXTEEN_BITS)}; {self.precision} with --backend ort",
                            fix=self.export_hint(f" --precision fp16{self._weights_hint(form)}"))
        least = WEIGHT_FORMATS[form].arch
        early = sorted(arch for arch in archs if arch < least)
        if early:
            raise UserError(f"{form} weights need a later GPU", got=", ".join(f"sm_{arch}" for arch in early), allowed=f"sm_{least} or later",
                            fix=self.export_hint(f" --precision {self.precision}{self._weights_hint('int8')}"))

    def _weights_hint(self, form: str) -> str:
        """The options of `export` for weights in this form."""
        opset = f" --opset {WEIGHT_FORMATS[form].opset}" if WEIGHT_FORMATS[form].opset > DEFAULT_OPSET else ""
        return f"{opset} --weights {form}"

    @property
    def model(self) -> Path:
        """Path of model.onnx."""
        return self.file(MODEL_FILE)

    def sha256(self, name: str) -> str:
        """Checksum of a file as the manifest states it, lower-case hexadecimal."""
        self.file(name)
        digest: str = self.manifest["files"][name]["sha256"]
        return digest

    def size(self, name: str) -> int:
        """Bytes of a file as the manifest states them."""
        self.file(name)
        size: int = self.manifest["files"][name]["size"]
        return size


class BundleWriter:
    """Writes a bundle in place: `with BundleWriter(out) as w: ...files into w.folder...; bundle = w.commit(config, precision, ...)`.

    Leaving the block without `commit` leaves nothing behind. An existing bundle at `out` is replaced, and files in it that are not its own stay as they
    are (`kept` names them after `commit`); any other folder that is not empty raises UserError before anything is written.
    """

    def __init__(self, out: str | Path) -> None:
        self.target = _resolve(out)
        self.kept: list[str] = []
        with _writing(self.target):
            _recover(self.target)
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

    def commit(self, config: SessaConfig, precision: str, versions: Mapping[str, str], opset: int = DEFAULT_OPSET,
               weights: Weights | None = None) -> Bundle:
        """Checksum every file in the folder, write the manifest last and put the folder in place. weights: where some are stored in 8 bits."""
        with _writing(self.target):
            files = {name: _describe(self.folder / name) for name in _listing(self.folder)}
            manifest = {"schema_version": BUNDLE_SCHEMA, "config": config.to_dict(), "precision": precision, "opset": opset,
                        **({} if weights is None else {"weights": weights.to_dict()}),
                        "files": files, "versions": {str(k): str(v) for k, v in sorted(versions.items())}}
            parse_manifest(json.dumps(manifest).encode(), self.target)
            _write_manifest(self.folder, manifest)
            with locked(self.target):
                older = _check_replaceable(self.target)
                self.kept = _foreign(self.target, older)
                _require_room(self.target, [*files, MANIFEST_FILE], older, in_place=bool(self.kept) or self._staging.inside)
                self._staging.publish(MANIFEST_FILE, older - set(files), keep=bool(self.kept))
        return Bundle(self.target, manifest)


def write_bundle(out: str | Path, files: Mapping[str, Source], config: SessaConfig, precision: str, versions: Mapping[str, str],
                 opset: int = DEFAULT_OPSET, move: bool = False, weights: Weights | None = None) -> Bundle:
    """Write a bundle of `files` (name -> a file to copy, or the bytes themselves) at `out`, whole or not at all.

    precision: fp32, fp16 or bf16. versions: of exporter, torch, onnx. move: take the source files away instead of copying them.
    Raises UserError as BundleWriter does, and on a name that leaves the folder.
    """
    with BundleWriter(out) as writer:
        _fill(writer.folder, files, move)
        return writer.commit(config, precision, versions, opset, weights)


def add_files(bundle: Bundle | str | Path, files: Mapping[str, Source], remove: Iterable[str] = (), move: bool = False) -> Bundle:
    """Add files to a bundle or replace them (parity.json, engines/...), and remove others; the manifest changes in the same step.

    The bundle on disk is the old one or the new one at every moment (see publish where it holds files that are not its own: they stay). Unchanged files are
    hard-linked, not copied. Returns the new Bundle. Raises UserError on a bundle in a hub's cache, which is not ours to change.
    """
    target = _resolve(bundle.path if isinstance(bundle, Bundle) else bundle)
    gone = set(remove)
    if MODEL_FILE in gone | set(files):
        raise UserError(f"{MODEL_FILE} of a finished bundle does not change", got=str(target), fix=mend(target))
    if in_cache(target):
        raise UserError("a bundle in a download cache is not changed", got=str(target), allowed="a copy of it",
                        fix=f"cp -rL {shlex.quote(str(target))} BUNDLE, and use BUNDLE")
    with _writing(target):
        _recover(target)
    read_manifest(target)
    with _writing(target), Staging(target) as staging:
        _fill(staging.folder, files, move)
        described = {name: _describe(staging.folder / name) for name in files}
        with locked(target):
            manifest = parse_manifest(read_manifest(target), target)
            own = set(manifest["files"])
            kept = {name: entry for name, entry in manifest["files"].items() if name not in files and name not in gone}
            in_place = staging.inside or bool(_foreign(target, own))
            _require_room(target, files, own, in_place)
            for name in kept:
                with open_plain(target / name):
                    pass
                if not in_place:
                    place(target / name, staging.folder / name, link=True)
            manifest["files"] = {**kept, **described}
            _write_manifest(staging.folder, manifest)
            staging.publish(MANIFEST_FILE, (own & gone) - set(files), keep=in_place)
    return Bundle(target, manifest)


def hash_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a plain file, lower-case hexadecimal, read in blocks; `advance` hears of every block's bytes. Raises UserError like open_plain."""
    with open_plain(path) as stream:
        return _digest(stream, advance)


def _digest(stream: Any, advance: Callable[[int], None] | None = None) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    stream.seek(0)
    while count := stream.readinto(block):
        digest.update(block[:count])
        if advance is not None:
            advance(count)
    return digest.hexdigest()


def _resolve(path: str | Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except OSError as error:  # the folder one stands in is gone
        raise UserError("no such place", got=f"{path} ({error.strerror})", fix="change to a folder that exists") from None


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
        check_name(name, folder)
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


def _listing(path: Path) -> Iterator[str]:
    """Names of everything below `path` but the manifest and folders, links included, sorted."""
    for root, folders, names in os.walk(path):
        folders.sort()
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in sorted(names + links):
            relative = Path(root, name).relative_to(path).as_posix()
            if relative != MANIFEST_FILE:
                yield relative


def _foreign(path: Path, own: Collection[str]) -> list[str]:
    """What lies in a folder beside its own files and the manifest, sorted; a folder that holds nothing of its own is named with a slash, not looked into."""
    folders = {str(parent) for name in own for parent in PurePosixPath(name).parents}
    found: list[str] = []
    for root, inner, names in os.walk(path):
        below = {name: Path(root, name).relative_to(path).as_posix() for name in (*inner, *names)}
        found += [f"{below[n]}/" for n in inner if below[n] not in folders and not is_staging(n)]
        found += [below[n] for n in names if below[n] not in own and below[n] != MANIFEST_FILE]
        inner[:] = [n for n in inner if below[n] in folders]
    return sorted(found)


def _require_room(target: Path, files: Iterable[str], own: Collection[str], in_place: bool) -> None:
    """Raise UserError if files that go into a folder one by one would strike something that is not the bundle's."""
    for name in files if in_place else ():
        here = target
        for part in PurePosixPath(name).parts[:-1]:
            here = here / part
            if here.is_symlink() or (os.path.lexists(here) and not here.is_dir()):
                raise UserError("something else stands where the bundle has a folder", got=str(here), fix="choose another place, or remove it yourself")
        if (target / name).is_dir() or (os.path.lexists(target / name) and name not in own and name != MANIFEST_FILE):
            raise UserError("a file that is not the bundle's has the name of one that is", got=str(target / name),
                            fix="choose another place, or remove it yourself")


def _check_files(bundle: Bundle, contents: bool) -> None:
    path, files = bundle.path, bundle.manifest["files"]
    sizes = sum(entry["size"] for entry in files.values())
    for name, entry in files.items():
        with _opened(path, name) as stream:
            size = os.fstat(stream.fileno()).st_size
        if size != entry["size"]:
            raise bad(f"{name} has another size than the manifest says", path, got=f"{size} bytes", allowed=f"{entry['size']} bytes")
    if MODEL_DATA_FILE not in files and os.path.lexists(path / MODEL_DATA_FILE):  # an engine library would look for it by itself
        raise bad(f"{MODEL_DATA_FILE} is not in the manifest", path, fix=f"remove the file, or {mend(path)}")
    if not contents:
        return
    with byte_progress("checking", sizes) as advance:
        for name, entry in files.items():
            with _opened(path, name) as stream:
                before = identity(os.fstat(stream.fileno()))
                digest = hash_file(path / name, advance)
            if digest != entry["sha256"]:
                raise mismatch(path, name, digest, entry["sha256"])
            bundle._checked[name] = before


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[Any]:
    """A file of a bundle, opened; what is wrong with it in the bundle's words."""
    if not os.path.lexists(path / name):
        raise bad(f"{name} is missing", path)
    try:
        with open_plain(path / name) as stream:
            yield stream
    except UserError as error:
        what = error.what.replace(str(path / name), name)
        raise bad(what, path, got=error.got, allowed=error.allowed, fix=error.fix if "cannot be read" in what or "LFS" in what else None) from None


def _recover(target: Path) -> None:
    """Finish or remove what killed writers to `target` left."""
    if target.parent.is_dir():
        with locked(target):
            sweep(target)


def _check_replaceable(target: Path) -> set[str]:
    """Names of the older bundle's files at a place where a bundle may be written. Raises UserError if it may not."""
    fix = "choose another --out, or remove it yourself"
    if in_cache(target):
        raise UserError("the output lies in a download cache", got=str(target), allowed="a place of your own", fix="--out BUNDLE")
    if not os.path.lexists(target):
        return set()
    if not target.is_dir() or is_staging(target):
        raise UserError("the output exists and is no bundle", got=str(target), fix=fix)
    names = sorted(x.name for x in target.iterdir() if not is_staging(x))
    if not names:
        return set()
    try:
        return set(parse_manifest(read_manifest(target), target)["files"])
    except UserError as error:
        if MANIFEST_FILE in names:
            raise UserError("the output folder exists and is no bundle", got=f"{target} ({error.what})", fix=fix) from None
        more = f" (+{len(names) - 6} more)" if len(names) > 6 else ""
        raise UserError("the output folder is not empty and is no bundle", got=f"{', '.join(names[:6])}{more} in {target}", fix=fix) from None

"""Folders that appear whole or not at all: staged beside their target, locked while alive, put in place by one rename.

A killed writer leaves a hidden folder `.NAME.sessa-tmp-*`, which nothing opens and the next writer to the same target removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

STAGING_MARK = ".sessa-tmp-"
_DISPLACED = "old-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def is_staging(path: str | Path) -> bool:
    """Whether a folder's name says that it is somebody's unfinished work."""
    name = Path(path).name
    return name.startswith(".") and STAGING_MARK in name


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the advisory lock of `folder` (a kill releases it); waits for whoever holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Staging:
    """A folder to fill, `folder`, that becomes `target` with `publish()`; leaving the `with` block without it discards the folder."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target
        self._handle: int | None = None

    def __enter__(self) -> Staging:
        parent = self.target.parent
        parent.mkdir(parents=True, exist_ok=True)
        with locked(parent):
            sweep(self.target)
            self.folder = parent / f".{self.target.name}{STAGING_MARK}{secrets.token_hex(4)}"
            self.folder.mkdir()
            self._handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder != self.target and self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def publish(self, marker: str) -> None:
        """Put the folder in place of the target, an older one included. The caller holds `locked(target.parent)`.

        marker: the file without which a folder is nothing; it is removed first when the older folder is deleted.
        """
        _sync_tree(self.folder)
        parent = self.target.parent
        older: Path | None = None
        if self.target.exists() and any(self.target.iterdir()):
            if _exchange(self.folder, self.target):
                older = self.folder
            else:
                older = parent / f".{self.target.name}{STAGING_MARK}{_DISPLACED}{secrets.token_hex(4)}"
                os.rename(self.target, older)
                os.rename(self.folder, self.target)
        else:
            os.rename(self.folder, self.target)
        _sync(parent)
        self.folder = self.target
        if older is not None:
            _discard(older, marker)


def sweep(target: Path) -> None:
    """Remove what killed writers to `target` left beside it, and put back an older folder that a kill caught between two renames."""
    for path in sorted(target.parent.glob(f".{glob_escape(target.name)}{STAGING_MARK}*")):
        if f"{STAGING_MARK}{_DISPLACED}" in path.name and not target.exists():
            os.rename(path, target)
        elif not _alive(path):
            shutil.rmtree(path, ignore_errors=True)


def displaced(target: Path) -> Path | None:
    """The older folder of a target that is missing because a writer was killed between two renames, if there is one."""
    found = sorted(target.parent.glob(f".{glob_escape(target.name)}{STAGING_MARK}{_DISPLACED}*")) if target.parent.is_dir() else []
    return found[0] if found else None


def glob_escape(name: str) -> str:
    """`name` with the characters that mean something to glob taken literally."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def place(source: Path, target: Path, link: bool = False) -> None:
    """Copy a file, or hard-link it where `link` and the file system allow; parents are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS):
                raise
    shutil.copyfile(source, target)


def _alive(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _discard(folder: Path, marker: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / marker)
    shutil.rmtree(folder, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux renameat2); False where kernel, libc or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))

"""Folders that appear whole or not at all, locked while they are written. Staged beside their target and put in place by one rename; where that cannot
be (a mount point, a parent that may not be written, somebody's own files in the folder, the folder one stands in) staged inside the target and moved
file by file, the marker without which the folder is nothing last.

A killed writer leaves a hidden folder `.NAME.sessa-tmp-*`, which nothing opens. The next writer to the same target removes it, or, if it was killed
between the first and the last of many renames, finishes them as the journal in it says.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

STAGING_MARK = ".sessa-tmp-"
_DISPLACED = "old-"
_JOURNAL = ".sessa-journal.json"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)  # a folder in which nothing can be made
_STUCK = (*_CLOSED, errno.EBUSY, errno.EXDEV)  # a folder that cannot be renamed


def is_staging(path: str | Path) -> bool:
    """Whether a folder's name says that it is somebody's unfinished work."""
    name = Path(path).name
    return name.startswith(".") and STAGING_MARK in name


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the advisory lock of all writers to `target` (a kill releases it): its parent's, or its own where the parent may not be read."""
    try:
        handle = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        if not target.is_dir():
            raise
        handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Staging:
    """A folder to fill, `folder`, that becomes `target` with `publish()`; leaving the `with` block without it discards the folder.

    inside: it lies in the target, whose own folder then stays, with what else is in it.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target
        self.inside = False
        self._handle: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Staging:
        parent = self.target.parent
        self._made = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with locked(self.target):
                sweep(self.target)
                self.inside = _stays(self.target)
                try:
                    self._open(self.target if self.inside else parent)
                except OSError as error:
                    if error.errno not in _CLOSED or self.inside or not self.target.is_dir():
                        raise
                    self.inside = True
                    self._open(self.target)
        except BaseException:
            self._remove_made()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        unfinished = self.folder != self.target
        if unfinished and self.folder.exists() and not (self.folder / _JOURNAL).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()
        if unfinished:
            self._remove_made()

    def publish(self, marker: str, stale: Iterable[str] = (), keep: bool = False) -> None:
        """Put the files in place of the target's. The caller holds `locked(target)`.

        marker: the file without which a folder is nothing. It goes first and comes last. stale: files of an older folder that go with it.
        keep: other files of the older folder stay; without it they go too, unless the folder is filled from the inside.
        """
        _sync_tree(self.folder)
        if self.inside or (keep and self.target.is_dir()):
            self._fill(marker, stale)
        else:
            try:
                self._swap(marker)
            except OSError as error:
                if error.errno not in _STUCK or not self.target.is_dir():
                    raise
                self._fill(marker, stale)
        self.folder = self.target

    def _swap(self, marker: str) -> None:
        parent = self.target.parent
        older: Path | None = None
        if self.target.exists() and any(self.target.iterdir()):
            if _exchange(self.folder, self.target):
                older = self.folder
            else:
                older = parent / f".{self.target.name}{STAGING_MARK}{_DISPLACED}{secrets.token_hex(4)}"
                os.rename(self.target, older)
                try:
                    os.rename(self.folder, self.target)
                except OSError:
                    os.rename(older, self.target)
                    raise
        else:
            os.rename(self.folder, self.target)
        _sync(parent)
        if older is not None:
            _discard(older, marker)

    def _fill(self, marker: str, stale: Iterable[str]) -> None:
        if not self.inside:
            self._move_inside()
        part = self.folder / (_JOURNAL + ".part")
        part.write_text(json.dumps({"marker": marker, "stale": sorted(stale)}), encoding="utf-8")
        _sync(part)
        os.rename(part, self.folder / _JOURNAL)
        _sync(self.folder)
        _finish(self.folder, self.target)

    def _move_inside(self) -> None:
        outer, inner = self.folder, self.target / self.folder.name
        try:
            os.rename(outer, inner)
            self.folder = inner
        except OSError as error:
            if error.errno not in _STUCK:
                raise
            self._release()
            self._open(self.target)
            shutil.copytree(outer, self.folder, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(outer, ignore_errors=True)
            _sync_tree(self.folder)
        self.inside = True

    def _open(self, place: Path) -> None:
        folder = place / f".{self.target.name}{STAGING_MARK}{secrets.token_hex(4)}"
        folder.mkdir()
        self.folder = folder
        self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def _release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def sweep(target: Path) -> None:
    """Remove what killed writers to `target` left beside it and in it, put back an older folder that a kill caught between two renames, and finish
    the renames of one that a kill caught amid many."""
    pattern = f".{glob_escape(target.name)}{STAGING_MARK}*"
    for path in sorted(target.parent.glob(pattern)):
        if f"{STAGING_MARK}{_DISPLACED}" in path.name and not target.exists():
            os.rename(path, target)
        elif not _alive(path):
            shutil.rmtree(path, ignore_errors=True)
    for path in sorted(target.glob(pattern)) if target.is_dir() else ():
        if not path.is_symlink() and path.is_dir() and not _alive(path):
            _finish(path, target)


def displaced(target: Path) -> Path | None:
    """The older folder of a target that is missing because a writer was killed between two renames, if there is one."""
    found = sorted(target.parent.glob(f".{glob_escape(target.name)}{STAGING_MARK}{_DISPLACED}*")) if target.parent.is_dir() else []
    return found[0] if found else None


def glob_escape(name: str) -> str:
    """`name` with the characters that mean something to glob taken literally."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def place(source: Path, target: Path, link: bool = False) -> None:
    """Copy a file, or hard-link it where `link` and the file system allow (a link is made again); parents are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link and source.is_symlink():
        os.symlink(os.readlink(source), target)
        return
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


def _stays(target: Path) -> bool:
    """Whether a folder is to be filled rather than replaced: mount points, the folder one stands in, and an empty one."""
    if not target.is_dir():
        return False
    with contextlib.suppress(OSError):
        if os.path.samefile(target, os.curdir):
            return True
    return os.path.ismount(target) or str(target) in _mounts() or not any(target.iterdir())


def _mounts() -> set[str]:
    """Mount points; os.path.ismount knows none that binds a folder of the same file system."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as stream:
            return {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in stream}
    except (OSError, IndexError):
        return set()


def _finish(staging: Path, target: Path) -> None:
    """Move what lies in `staging`, inside the target, to its place, as its journal says; without one, that is before the first move, remove it."""
    try:
        plan = json.loads((staging / _JOURNAL).read_text(encoding="utf-8"))
        marker, stale = str(plan["marker"]), [str(name) for name in plan["stale"]]
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(staging, ignore_errors=True)
        return
    if (staging / marker).exists() and all(_is_relative(name) for name in (marker, *stale)):
        files = (Path(root, name).relative_to(staging).as_posix() for root, _, names in os.walk(staging) for name in names)
        names = sorted(name for name in files if name not in (marker, _JOURNAL))
        if stale or any(os.path.lexists(target / name) for name in names):
            (target / marker).unlink(missing_ok=True)
            _sync(target)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, target / name)
        for name in stale:
            _remove(target, name)
        for folder in {(target / name).parent for name in names}:
            _sync(folder)
        os.replace(staging / marker, target / marker)
    _sync(target)
    shutil.rmtree(staging, ignore_errors=True)


def _is_relative(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts


def _remove(target: Path, name: str) -> None:
    """Remove a file and the folders that it leaves empty; of a path through a link, the link."""
    here = target
    for part in PurePosixPath(name).parts:
        here = here / part
        if here.is_symlink():
            break
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(here)
    for folder in here.parents:
        if folder == target or any(folder.iterdir()):
            break
        folder.rmdir()


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

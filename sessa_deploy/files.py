"""The one place that writes a file whole or not at all, and that tells before the work whether a target can be written.

    write_whole("report.json", text, option="--json")      # bytes or text
    with whole("weights.pt", option="--out") as stream:    # anything that writes to a binary stream
        torch.save(state, stream)

Standard library and the ground only. Folders that appear whole are runtime/publish.py's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sessa_deploy.contract import MANIFEST_FILE, MODEL_FILE
from sessa_deploy.errors import UserError

_SUFFIX = ".part"
_STALE_SECONDS = 60.0  # a writer that lives holds a lock; one that was born a moment ago may not have it yet
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)  # of a folder; the file in it may be
_NO_RENAME = (errno.EBUSY, errno.EXDEV, *_NOT_OURS)  # a mount point, as of a file mounted into a container; another's file in /tmp
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DESCRIPTORS = re.compile(r"/proc/(self|thread-self|\d+)(/task/\d+)?/fd/(\d+)")


def write_whole(path: str | Path, data: bytes | str, option: str | None = None, what: str = "the file", sync: bool = True) -> Path:
    """Replace `path` by `data` (text as UTF-8) in one step; returns the path. See `whole`."""
    with whole(path, option, what, sync) as stream:
        stream.write(data.encode("utf-8") if isinstance(data, str) else data)
    return Path(path)


@contextlib.contextmanager
def whole(path: str | Path, option: str | None = None, what: str = "the file", sync: bool = True) -> Iterator[BinaryIO]:
    """A binary stream whose contents become `path` when the block ends well; else the path is as it was and nothing lies beside it.

    A link at `path` stays and what it leads to is replaced. Permission bits are those that open() would give: the umask's for a new file, the older
    file's otherwise. What is no regular file (/dev/stdout, /dev/full, a FIFO) is written directly. sync: on the disk before it appears.
    option: the option that named the path, for the fix. Raises UserError where writing fails, but BrokenPipeError where whoever reads has gone;
    whatever else the block raises comes through.
    """
    raw: _Raw | None = None
    try:
        with contextlib.ExitStack() as stack:
            raw, finish = stack.enter_context(_opened(Path(path), sync))
            stream = io.BufferedWriter(raw)
            try:
                yield stream
                stream.flush()
                finish()
            finally:
                with contextlib.suppress(OSError, ValueError):  # a failed flush fails again, and is told already
                    stream.close()
    except BaseException as error:
        # Only what our own file said: the block may have read others, and a library may have wrapped what we raised.
        cause = raw.failed if raw is not None and raw.failed is not None else error if isinstance(error, _Failed) else None
        if cause is None or isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        cause = cause.error if isinstance(cause, _Failed) else cause
        if cause.errno == errno.EPIPE:
            raise cause from None
        raise _cannot(path, cause, option, what) from None


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A temporary folder that is gone after the block. Raises UserError where there is no place for one."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError("there is no place for temporary files", got=error.strerror or error, allowed="a folder with room that may be written",
                        fix="set TMPDIR to one") from None
    with folder as name:
        yield Path(name)


def check_target(path: str | Path, option: str | None = None, what: str = "the file") -> None:
    """Raise UserError if a file cannot be written at `path`: no such folder, no permission, a folder's name, inside a bundle. Leaves nothing."""
    refuse_inside_bundle(path, option, what)
    try:
        _check_file(Path(path))
    except OSError as error:
        raise _cannot(path, error, option, what) from None


def check_folder(path: str | Path, option: str | None = None, what: str = "the folder", inside: bool = False) -> None:
    """Raise UserError if files cannot be written into the folder `path`, made with its parents where it is missing. Leaves nothing.

    inside: the folder may be in a bundle, or be one.
    """
    if not inside:
        refuse_inside_bundle(path, option, what)
    folder = Path(os.path.realpath(path))
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        _check_writable_folder(folder)
    except OSError as error:
        raise _cannot(path, error, option, what) from None


def refuse_inside_bundle(path: str | Path, option: str | None = None, what: str = "the file", itself: bool = True) -> None:
    """Raise UserError if `path` lies in a bundle, by whatever links and `..` it gets there. itself: a bundle's own folder counts as inside."""
    name = Path(path).name
    places = {os.path.realpath(path)}
    if name not in ("", ".."):  # where a link lies counts too: a model may be a link into a cache
        places.add(os.path.join(os.path.realpath(Path(path).parent), name))
    for start in sorted(places):
        chain = [Path(start), *Path(start).parents]
        for folder in chain if itself else chain[1:]:
            if is_bundle(folder):
                raise UserError(f"{what} would lie inside a bundle", got=path, allowed=f"any place outside {folder}: a bundle holds what its manifest names",
                                fix=_choose(option))


def is_bundle(folder: Path) -> bool:
    """Whether a folder is laid out as a bundle: a manifest beside a model. Its contents are not looked at."""
    return os.path.lexists(folder / MANIFEST_FILE) and os.path.lexists(folder / MODEL_FILE)


class _Failed(Exception):
    """An OSError of opening, syncing or renaming, told apart from those of the block."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Raw(io.FileIO):
    """A file that remembers why it could not be written, since libraries wrap or swallow that."""

    failed: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


@contextlib.contextmanager
def _opened(path: Path, sync: bool) -> Iterator[tuple[_Raw, Any]]:
    """(the raw file to write, what to call when all of it is written)."""
    try:
        target, direct = _resolve(path)
        if direct is not None:
            yield _Raw(direct, "wb"), lambda: None
            return
        old = os.stat(target) if target.exists() else None
        if old is not None and not os.access(target, os.W_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise _Failed(error) from None
    _sweep(target)
    temporary, done = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}{_SUFFIX}"), False
    try:
        try:
            raw = _Raw(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666), "wb")
        except OSError as error:
            done = True
            if old is None or error.errno not in _NOT_OURS:
                raise _Failed(error) from None
            yield _in_place(target), lambda: None
            return
        _lock(raw.fileno())
        _take_after(raw.fileno(), old)

        def finish() -> None:
            nonlocal done
            try:
                if sync:
                    os.fsync(raw.fileno())
                done = _rename(temporary, target, raw.fileno())
                if sync:
                    _sync_folder(target.parent)
            except OSError as error:
                raise _Failed(error) from None

        yield raw, finish
    finally:
        if not done:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _resolve(path: Path) -> tuple[Path, int | None]:
    """(the file that `path` leads to, None), or (path, a descriptor to write to) where it is no regular file."""
    descriptor = _descriptor(path)
    if descriptor is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        return path, os.dup(descriptor)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path)), None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        return path, os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    return Path(os.path.realpath(path)), None


def _descriptor(path: Path) -> int | None:
    """N where a path is /dev/stdout, /dev/fd/N and the like of this process: opening it again would truncate what was printed before."""
    name = str(path)
    for _ in range(40):  # as many links as the kernel follows
        name = os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
        found = _DESCRIPTORS.fullmatch(name)
        if found:
            return int(found[3]) if found[1] in ("self", "thread-self", str(os.getpid())) else None
        if not os.path.islink(name):
            return None
        name = os.path.join(os.path.dirname(name), os.readlink(name))
    return None


def _in_place(target: Path) -> _Raw:
    """The file itself, emptied."""
    try:
        return _Raw(os.open(target, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC), "wb")
    except OSError as error:
        raise _Failed(error) from None


def _rename(temporary: Path, target: Path, handle: int) -> bool:
    """Put the file in place; True if the temporary name is gone. A mount point cannot be renamed over, so it is filled."""
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in _NO_RENAME or not target.is_file():
            raise
        with open(os.dup(handle), "rb") as source, open(target, "wb") as out:
            source.seek(0)
            shutil.copyfileobj(source, out, 1 << 20)
        return False
    return True


def _take_after(handle: int, old: os.stat_result | None) -> None:
    """Owner and permission bits of the file that is replaced, as far as this user and the file system may set them."""
    if old is None:
        return
    with contextlib.suppress(OSError):
        if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(handle, old.st_uid, old.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(handle, stat.S_IMODE(old.st_mode))


def _lock(handle: int) -> bool:
    """Take the lock that says a writer lives; False if another has it. Some network file systems have no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _prefix(target: Path) -> str:
    return f".{target.name[:60]}."  # 240 bytes at most, of the 255 that a name may have


def _sweep(target: Path) -> None:
    """Remove what writers of `target` that were killed left beside it."""
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            if not (name.startswith(_prefix(target)) and re.fullmatch(rf"[0-9a-f]{{8}}{re.escape(_SUFFIX)}", name[len(_prefix(target)) :])):
                continue
            left = target.with_name(name)
            with contextlib.suppress(OSError), open(left, "rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > _STALE_SECONDS and _lock(file.fileno()):
                    os.unlink(left)


def _check_file(path: Path) -> None:
    """OSError if `path` cannot be written. Opens no device and no FIFO."""
    descriptor = _descriptor(path)
    if descriptor is not None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "it is open for reading only", str(path))
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        _check_writable_folder(Path(os.path.realpath(path)).parent)
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not os.access(path, os.W_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _check_writable_folder(folder: Path) -> None:
    if not folder.is_dir():
        code = errno.ENOTDIR if folder.exists() else errno.ENOENT
        raise OSError(code, f"{folder} is not a folder" if code == errno.ENOTDIR else f"there is no folder {folder}", str(folder))
    # Tried, not asked: permission bits are not all there is (a full or read-only disk, an immutable folder).
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))  # a file without a name
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        probe = folder / f".{secrets.token_hex(8)}{_SUFFIX}"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        os.unlink(probe)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a rename that happened is not undone by a file system without this
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _choose(option: str | None) -> str:
    return f"choose another {option}" if option else "write it elsewhere"


def _cannot(path: str | Path, error: OSError, option: str | None, what: str) -> UserError:
    reason, fix = error.strerror or str(error), _choose(option)
    if error.errno in _FULL:
        fix = f"free space there, or {fix}"
    elif error.errno == errno.ENOENT and not (parent := Path(os.path.realpath(path)).parent).is_dir():
        reason, fix = f"there is no folder {parent}", f"mkdir -p {shlex.quote(str(parent))}, or {fix}"
    return UserError(f"{what} cannot be written", got=f"{path} ({reason})", fix=fix)

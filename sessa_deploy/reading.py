"""Reading a file that somebody brought: only plain files, whole, of a known largest size, and every fault as one UserError. Standard library only.

Nothing here waits: a pipe, a device or a socket where a file should be is refused before it is read. Links are followed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sessa_deploy.errors import UserError

JSON_LIMIT = 256 << 20  # bytes of a JSON file that anybody writes by hand or by a tool
_POINTER = b"version https://git-lfs.github.com/spec/"
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"))
_DOWNLOAD = "copy or download it again"
_ELF64 = b"\x7fELF\x02\x01"  # little-endian
_ELF_HEADER = 64  # bytes


@contextlib.contextmanager
def open_plain(path: str | Path) -> Iterator[BinaryIO]:
    """A plain file opened to read, links followed. Raises UserError, one line, on anything else, on a link to nothing, on a file that may not be
    read, on an error while it is read, and on the pointer that Git LFS leaves in a file's place."""
    try:
        _require_plain(path, os.stat(path).st_mode)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _require_plain(path, os.fstat(file.fileno()).st_mode)  # it may have been replaced since
            if file.read(len(_POINTER)) == _POINTER:
                raise UserError(f"{path} is a Git LFS pointer, not the file itself", got=f"{os.fstat(file.fileno()).st_size} bytes of text",
                                fix="git lfs install && git lfs pull, in the folder that was cloned")
            file.seek(0)
            yield file
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(f"{path} is a link to nothing", got=f"-> {os.readlink(path)}", allowed="a file", fix=_DOWNLOAD) from None
        raise UserError("no such file", got=path, allowed="an existing file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read", got=error.strerror or error, fix="look at its permissions and at the disk") from None


def read_plain(path: str | Path, limit: int) -> bytes:
    """The bytes of a plain file of at most `limit` bytes. Raises UserError as `open_plain` does, and on a larger one."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= limit else b""  # a larger number would be reserved at once
    if size > limit or len(data) > limit:
        raise UserError(f"{path} is too large", got=f"{max(size, len(data))} bytes", allowed=f"at most {limit} bytes")
    return data


def load_library(path: str | Path) -> ctypes.CDLL:
    """A shared library, loaded. Raises OSError where it cannot be, and on one that was cut short: the loader maps what is not there, and the process ends."""
    if _is_cut_short(Path(path)):
        raise OSError(f"{path}: file too short: it ends before what its header names")
    return ctypes.CDLL(str(path))


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file of this kind of machine ends before its tables or its segments do; of any other file the loader says what it is."""
    with open(path, "rb") as file:
        header, size = file.read(_ELF_HEADER), os.fstat(file.fileno()).st_size
        if len(header) < _ELF_HEADER or not header.startswith(_ELF64):
            return False
        segments, sections = struct.unpack_from("<QQ", header, 32)
        segment, count, section, others = struct.unpack_from("<4H", header, 54)
        if max(segments + segment * count, sections + section * others) > size:
            return True
        file.seek(segments)
        table = file.read(segment * count)
    ends = (sum(struct.unpack_from("<Q", table, segment * i + at)[0] for at in (8, 32)) for i in range(count))  # p_offset and p_filesz
    return any(end > size for end in ends)


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """The value of a UTF-8 JSON file. Raises UserError as `read_plain` does, and on text that is not JSON or names a key twice in one object."""
    return parse_json(read_plain(path, limit), path)


def parse_json(raw: bytes, source: str | Path) -> Any:
    """The value of JSON's bytes, which `source` held; a byte order mark is passed over. Raises UserError on anything else."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a key twice, a number of too many digits
        raise UserError(f"{source} cannot be read as JSON", got=str(error)[:200], allowed="UTF-8 JSON") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of an object's pairs, for json.loads; ValueError if a key occurs twice."""
    seen = dict(pairs)
    if len(seen) != len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"a key occurs twice: {', '.join(twice[:6])}")
    return seen


def identity(info: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _require_plain(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "no file")
        raise UserError(f"{path} is not a plain file", got=kind, allowed="a plain file, or a link to one")

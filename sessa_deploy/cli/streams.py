"""The standard streams of a command: whoever reads may leave, a disk may be full, a stream may be closed, and no verb need know."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from sessa_deploy.errors import UserError


class Stream(io.RawIOBase):
    """A descriptor to write to, None for one that is closed. The first failure ends it: what is written after that goes nowhere.

    A reader that has gone ends the process quietly, SystemExit(0), which no library takes for an error to handle. Another failure is a UserError if
    `needed`, else nothing.
    """

    def __init__(self, handle: int | None, needed: bool) -> None:
        self._handle, self._needed, self._over = handle, needed, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._handle is None:
            raise io.UnsupportedOperation("the stream is closed")
        return self._handle

    def isatty(self) -> bool:
        return self._handle is not None and os.isatty(self._handle)

    def write(self, data: Any, /) -> int:
        while not self._over:
            try:
                if self._handle is None:
                    raise OSError(errno.EBADF, "it is closed")
                return os.write(self._handle, data)
            except BlockingIOError:  # a terminal that another program made non-blocking
                select.select([], [self.fileno()], [])
            except OSError as error:
                self._over = True
                if not self._needed:
                    break
                if error.errno == errno.EPIPE:
                    raise SystemExit(0) from None
                fix = "free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "redirect it to a file or a pipe"
                raise UserError("standard output cannot be written", got=error.strerror, fix=fix) from None
        return len(data)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Replace sys.stdout and sys.stderr, where they are the process's own, within the block; what the block printed is out when it ends well."""
    kept = sys.stdout, sys.stderr
    _occupy_closed()
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guard(sys.stdout, 1, needed=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guard(sys.stderr, 2, needed=False)
    try:
        yield
        sys.stdout.flush()
    finally:
        for ours, before in zip((sys.stdout, sys.stderr), kept, strict=True):
            if ours is not before:
                with contextlib.suppress(Exception, SystemExit):  # said already, or nobody is there to hear
                    ours.flush()
        sys.stdout, sys.stderr = kept


def _guard(stream: TextIO | None, number: int, needed: bool) -> io.TextIOWrapper:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    raw = Stream(number if stream is not None else None, needed)
    # backslashreplace: names that the terminal's encoding lacks, or that are no text at all, are shown and stop nothing
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=getattr(stream, "encoding", None) or "utf-8", errors="backslashreplace",
                            line_buffering=number == 2 or getattr(stream, "line_buffering", False),
                            write_through=number == 2 or getattr(stream, "write_through", False))


def _occupy_closed() -> None:
    """Open closed standard descriptors on /dev/null: the next file that is opened would get their number, and a library's chatter in it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free

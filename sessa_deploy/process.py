"""How this package starts other interpreters and programs, and how it ends when it is told to. Standard library only."""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

_TERMINATED = (signal.SIGTERM, signal.SIGHUP)
_OTHERS = 2.0  # seconds between the end of the process that speaks and that of the others, where all meet the same error
_GRACE = 5.0  # seconds between asking a program to end and ending it


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    size = os.environ.get("WORLD_SIZE", "")
    return "LOCAL_RANK" in os.environ and size.isascii() and size.isdigit() and int(size) > 1


def speaks() -> bool:
    """Whether this process tells the user things: of several, number 0 alone does."""
    return not launched() or os.environ.get("RANK") == "0"


def end_with_the_others() -> None:
    """For one of several processes that ends with an error: torchrun ends all when the first has ended, so that the one that speaks needs a moment to
    speak, and each goes deaf to end with its own code."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *_TERMINATED):
            signal.signal(number, signal.SIG_IGN)
    if not speaks():
        time.sleep(_OTHERS)


def leave(code: int, said: bool = True) -> NoReturn:
    """End this process at once, without Python's own end: a thread inside a native library that asks for the interpreter after that aborts the process.

    said: what standard output and error still hold is written first; False where a thread is stuck in such a write, which would be waited for.
    """
    for stream in (sys.stdout, sys.stderr) if said else ():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream that is closed, or not there at all
            stream.flush()
    os._exit(code)


def command(*words: object) -> str:
    """A command of ours as a shell takes it, whatever stands in its paths: "sessa-deploy build 'my bundle' --force"."""
    return shlex.join(("sessa-deploy", *map(str, words)))


def python(code: str, *arguments: str, interpreter: str | Path | None = None) -> list[str]:
    """The command of a fresh interpreter that runs `code`, with `sys` imported and `arguments` in sys.argv[1:].

    The working directory is no place of packages for it, as with -P from Python 3.11 on: a user's random.py there, or a clone of this package, is
    not imported. interpreter: another one than this, in which this package is installed; this one's child finds the package that its parent runs.
    """
    safe = "import sys; sys.path[:] = [p for p in sys.path if p]; "
    if interpreter is None:  # last, where this process was told of a folder that its child does not know of; first, where the child would find another
        place = "len(sys.path)" if _is_found() else "0"
        safe += f"sys.path.insert({place}, {_package_root()!r}); "
    return [str(interpreter or sys.executable), "-c", safe + code, *arguments]


def run_group(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and capture what it says. Where this process is interrupted or told to end, the program and all its children end too."""
    process: subprocess.Popen[str] | None = None
    try:
        with signals_held():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, encoding="utf-8",
                                       errors="replace", start_new_session=True)
        out, err = process.communicate()
    except BaseException:
        if process is not None:
            with process:
                _end_group(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Within the block an interruption waits for its end: a child that has begun is then known to who must end it. Short blocks only."""
    if threading.current_thread() is not threading.main_thread():  # where no signal is heard anyhow
        yield
        return
    came: list[int] = []
    before = {number: handler for number in (signal.SIGINT, *_TERMINATED) if callable(handler := signal.getsignal(number))}
    for number in before:  # a child that is started begins with the default again
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise SystemExit (128 + their number), so that temporary files and children go; nohup is respected."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in _TERMINATED if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, frame: Any) -> None:
        for other in caught:  # once is enough: a second one would end the cleaning up
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            if not launched() or signal.getsignal(number) is end:  # one of several processes may have gone deaf, to end with a code of its own
                signal.signal(number, signal.SIG_DFL)


def _end_group(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            return


def _package_root() -> str:
    return os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def _is_found() -> bool:
    """Whether this very package is what an import finds without the working directory; a clone that was never installed is not."""
    here = os.path.realpath(os.getcwd())
    path = [p for p in sys.path if p and os.path.realpath(p) != here]
    name = __name__.partition(".")[0]
    found = importlib.machinery.PathFinder.find_spec(name, path)
    for finder in sys.meta_path:  # an editable installation has a finder of its own
        if found is None and finder is not importlib.machinery.PathFinder:
            found = finder.find_spec(name, None)
    return found is not None and found.origin is not None and os.path.realpath(found.origin) == os.path.join(_package_root(), name, "__init__.py")

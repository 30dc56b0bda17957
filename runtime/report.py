"""Progress on the terminal: shown where a person looks and the work is long, silent elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sessa_deploy.errors import one_line

if TYPE_CHECKING:
    from sessa_deploy.runtime.tokenizer import Tokenizer

# Below this many bytes hashing takes under about half a second and a bar would only flicker.
_WORTH_A_BAR = 512 << 20
# Below this many prompt tokens prefill is over before a bar could be read.
_LONG_PROMPT = 4096


@contextlib.contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes on stderr; yields a function to call with the bytes done. Silent for small totals and where stderr is no terminal."""
    if total < _WORTH_A_BAR or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bars(DownloadColumn(), TransferSpeedColumn()) as bars:
        task = bars.add_task(label, total=total)
        yield lambda count: bars.advance(task, count)


@contextlib.contextmanager
def count_progress(label: str, least: float = _LONG_PROMPT) -> Iterator[Callable[[float, float], None]]:
    """Yields a function to call with (done, total); it draws a bar on stderr while done < total, unless total < `least` or stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import TimeRemainingColumn

    with contextlib.ExitStack() as stack:
        shown: list[Any] = []

        def update(done: float, total: float) -> None:
            if not shown and least <= total and done < total:
                bars = stack.enter_context(_bars(TimeRemainingColumn()))
                shown.extend((bars, bars.add_task(label, total=total)))
            if shown:
                shown[0].update(shown[1], completed=done, total=total)
                if done >= total:
                    stack.close()
                    shown.clear()

        yield update


def note(line: str) -> None:
    """Say one line on stderr that is no error."""
    print(f"note: {one_line(line)}", file=sys.stderr, flush=True)


def ignored_note(tokenizer: Tokenizer | None) -> str | None:
    """One line about what a tokenizer's file asks for and does not get; None where there is nothing to say."""
    line = None if tokenizer is None else tokenizer.ignored_line
    return line and f"note: {line}"


def _bars(*columns: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=Console(stderr=True), transient=True)

"""From the batcher's thread to the event loop: each request's events in order, the loop woken once however many have come."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sessa_deploy.runtime.requests import Event

Receiver = Callable[["Event"], None]


class Mailbox:
    """Made on the event loop whose thread receives."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Receiver, Event]] = deque()
        self._woken = False

    def post(self, receiver: Receiver, event: Event) -> None:
        """Have `receiver` called with the event on the loop's thread. Any thread; never waits."""
        self._waiting.append((receiver, event))
        if not self._woken:  # appended first, read second: `_deliver` does it the other way round, so that nothing stays behind
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody is there to receive
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._waiting:
            receiver, event = self._waiting.popleft()
            receiver(event)

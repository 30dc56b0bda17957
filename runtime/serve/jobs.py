"""One HTTP request's choices on the batcher, as an event loop sees them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.requests import Event, NotAccepting, QueueFull, Request
from sessa_deploy.runtime.serve.errors import ApiError, unavailable

if TYPE_CHECKING:
    from sessa_deploy.runtime.batcher import Batcher
    from sessa_deploy.runtime.serve.mailbox import Mailbox

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]
FINISH = {"stop": "stop", "length": "length", "context": "length"}  # the runtime's words in OpenAI's


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Job:
    """Requests that one client waits for together: all of them are taken on, or none.

    Made on the event loop; limit: seconds from now for all of it, None for any. Leaving it (`close`) cancels whatever still runs. Raises ApiError: 429
    where the queue is full, 503 where nothing is taken on any more, 400 on a request that the batcher refuses.
    """

    def __init__(self, batcher: Batcher, mailbox: Mailbox, requests: Sequence[Request], limit: float | None = None) -> None:
        self._events: deque[tuple[int, Event]] = deque()
        self._came = asyncio.Event()
        self._limit, self._begun = limit, time.perf_counter()
        self._open = set(range(len(requests)))
        self._handles: list[Any] = []
        self.tokens = 0
        try:
            for index, request in enumerate(requests):
                self._handles.append(batcher.submit(request, self._poster(mailbox, index)))
        except QueueFull:
            self.close()
            raise ApiError(429, "the server is busy and its queue is full", code="queue_full", retry_after=1) from None
        except NotAccepting:
            self.close()
            raise unavailable("the server takes no more requests", "draining") from None
        except UserError as error:
            self.close()
            raise ApiError.of(error) from None

    def _poster(self, mailbox: Mailbox, index: int) -> Callable[[Event], None]:
        def receive(event: Event) -> None:
            if index in self._open:
                self.tokens += event.token is not None
                if event.finish is not None:
                    self._open.discard(index)
                self._events.append((index, event))
                self._came.set()

        return lambda event: mailbox.post(receive, event)

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """(choice, event) as they come, all that are there at once, until every choice has finished. Raises ApiError on one that fails."""
        while self._events or self._open:
            if not self._events:
                self._came.clear()
                await self._came.wait()
            found = list(self._events)
            self._events.clear()
            for _, event in found:
                if event.finish == "error":
                    raise failure(event)
                if event.finish == "cancelled":
                    raise unavailable("the request was ended: the server shuts down", "cancelled")
            yield found

    async def attended(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, unless the client goes first (ClientGone) or the time is over (ApiError 504); the work is then cancelled and awaited."""
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
        left = None if self._limit is None else max(0.0, self._begun + self._limit - time.perf_counter())
        try:
            await asyncio.wait((working, watching), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if watching.done():
                raise ClientGone
            raise ApiError(504, f"the request took longer than this server allows: {self._limit:g} s", code="timeout")
        finally:
            for task in (working, watching):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def close(self) -> None:
        """Cancel what still runs. May be called twice."""
        self._open.clear()
        for handle in self._handles:
            handle.cancel()
        self._handles.clear()


def failure(event: Event) -> ApiError:
    """What a client hears of a request that ended by an error."""
    if event.expired:
        return unavailable(f"the server is busy: {event.error}", "queue_timeout")
    return ApiError(500, event.error or "the request failed", code="generation_failed")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

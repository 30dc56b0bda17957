"""Server-sent events: an answer that is written while it is generated, and given up when nobody reads it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sessa_deploy.runtime.requests import Event
from sessa_deploy.runtime.serve.errors import ApiError
from sessa_deploy.runtime.serve.jobs import ClientGone, Job

Batch = list[tuple[int, Event]]
Writer = Callable[[Batch], str]  # events to the text of as many `data:` lines as they are worth


class EventStream(Response):
    """Begins once the first events are there, so that what fails before has a status of its own; what fails later is an event that says so.

    batches: the rest of the job's events. first: those that came. write, last: what becomes of them, and what stands before [DONE].
    A reader that is slow makes this wait and nobody else: events pile up in the job, as many as max_tokens.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, first: Batch, batches: AsyncIterator[Batch], write: Writer, last: Callable[[], str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job, self._first, self._batches, self._write, self._last = job, first, batches, write, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._job.attended(receive, self._send(send))
        except ApiError as error:  # the time is over, and the reader may be what was slow
            try:
                await asyncio.wait_for(_end(send, _data(error.body())), 1.0)
            except asyncio.TimeoutError:
                raise ClientGone from None
        finally:
            self._job.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        text = self._write(self._first)
        try:
            if text:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            async for batch in self._batches:
                text = self._write(batch)
                if text:
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            text = self._last()
        except ApiError as error:
            text = _data(error.body())
        await _end(send, text)


async def begin(job: Job, receive: Receive) -> tuple[Batch, AsyncIterator[Batch]]:
    """(the first events of a job, the iterator of the others). Raises what a job that fails at once raises, and closes it."""
    batches = job.batches()

    async def first() -> Batch:
        return await anext(batches)

    try:
        return await job.attended(receive, first()), batches
    except BaseException:
        job.close()
        raise


async def gather(job: Job, receive: Receive, take: Callable[[int, Event], None]) -> None:
    """Give every event of a job to `take` with its choice's index, and close it. Raises what `begin` does, however late."""

    async def collect() -> None:
        async for batch in job.batches():
            for index, event in batch:
                take(index, event)

    try:
        await job.attended(receive, collect())
    finally:
        job.close()


async def _end(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": f"{text}data: [DONE]\n\n".encode(), "more_body": False})


def _data(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


class Chunks:
    """Writes the `data:` lines of one stream: what all have in common is made once.

    head: the object without choices and usage. with_usage: whether each line has a usage, null unless one is given.
    """

    def __init__(self, head: dict[str, Any], with_usage: bool) -> None:
        self._head = f"data: {json.dumps(head)[:-1]}, \"choices\": ["
        self._tail = '], "usage": null}\n\n' if with_usage else "]}\n\n"

    def line(self, choice: str, usage: dict[str, object] | None = None) -> str:
        """One line with one choice, JSON already; or without any, where it is empty."""
        return f"{self._head}{choice}" + (f'], "usage": {json.dumps(usage)}}}\n\n' if usage is not None else self._tail)

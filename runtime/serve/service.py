"""What the routes share: the engine once it is loaded, whether it takes requests, and the figures it is watched by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sessa_deploy.runtime.requests import Request
from sessa_deploy.runtime.serve.engine import Engine
from sessa_deploy.runtime.serve.errors import ApiError, unavailable
from sessa_deploy.runtime.serve.jobs import Job
from sessa_deploy.runtime.serve.mailbox import Mailbox
from sessa_deploy.runtime.serve.metrics import Metrics

BODY_LIMIT = 4 << 20  # bytes; what takes longer to parse would be felt by everybody
_LONG = 20_000  # characters, some milliseconds of work


@dataclass(frozen=True)
class Settings:
    """name: the model's, as clients say it. key: what /v1, /tokenize and /detokenize ask for; None asks for nothing. timeout: seconds a request may take in
    all; None is no limit. metrics: whether /metrics is there. body_limit: bytes. log_prompts: whether the log shows prompts."""

    name: str
    key: str | None = None
    timeout: float | None = None
    metrics: bool = True
    body_limit: int = BODY_LIMIT
    log_prompts: bool = False


class Service:
    """A server's state: it loads, is ready, drains. On one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics, self.created = settings, Metrics(), int(time.time())
        self.draining = False
        self._engine: Engine | None = None
        self._mailbox: Mailbox | None = None

    def begin(self, engine: Engine) -> None:
        """Take requests from now on. On the event loop."""
        self._engine, self._mailbox = engine, Mailbox()
        self.metrics.watch(engine.batcher)

    @property
    def loaded(self) -> Engine | None:
        """The engine, or None while it loads."""
        return self._engine

    @property
    def trouble(self) -> ApiError | None:
        """Why no request is taken now; None where all is well."""
        if self.draining:
            return unavailable("the server drains: it takes no more requests", "draining")
        if self._engine is None:
            return unavailable("the model is being loaded", "loading", 2)
        if not self._engine.batcher.ready:
            return unavailable("the engine failed several times in a row", "unhealthy", 10)
        return None

    @property
    def engine(self) -> Engine:
        """The engine. Raises ApiError, 503, while none takes requests."""
        if self.draining or self._engine is None:
            trouble = self.trouble
            assert trouble is not None
            raise trouble
        return self._engine

    def check_model(self, name: str | None) -> None:
        """Raise ApiError, 404, if a request names another model."""
        if name is not None and name != self.settings.name:
            raise ApiError(404, f"there is no model {name[:200]!r} here; this server has {self.settings.name!r}", "model", "model_not_found")

    def submit(self, requests: Sequence[Request]) -> Job:
        """Take requests on together. Raises ApiError (see Job), and 400 on more than ever fit."""
        engine = self.engine
        most = engine.slots + engine.queue
        if len(requests) > most:
            raise ApiError(400, f"prompts times n is {len(requests)}, and this server holds {most} at once", "n")
        assert self._mailbox is not None
        return Job(engine.batcher, self._mailbox, requests, self.settings.timeout)


async def encoded(engine: Engine, text: str, first: bool = True, param: str = "prompt") -> list[int]:
    """Engine.encode, on a thread of its own where it takes long."""
    return await asyncio.to_thread(engine.encode, text, first, param) if len(text) > _LONG else engine.encode(text, first, param)

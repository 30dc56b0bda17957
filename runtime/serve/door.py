"""What every request passes: a name of its own, the key, the bounds of its body, a line in the log; and whatever goes wrong leaves as an error of OpenAI's."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sessa_deploy.runtime.serve.errors import ApiError
from sessa_deploy.runtime.serve.jobs import ClientGone
from sessa_deploy.runtime.serve.security import check_key
from sessa_deploy.runtime.serve.service import Service

log = logging.getLogger("sessa_deploy.serve")
PATHS = ("/", "/docs", "/openapi.json", "/health", "/health/live", "/health/ready", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions",
         "/tokenize", "/detokenize", "/tokenizer_info")
_QUIET = ("/health", "/health/live", "/health/ready", "/metrics")  # asked for every few seconds, and not logged where they answer as they should
_NAME = re.compile(r"[\x21-\x7e]{1,128}\Z")
_BODY_SECONDS = 60.0
_GONE = 499  # nginx's number for a client that left


class Door:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name, begun, status = given if _NAME.match(given) else uuid.uuid4().hex, time.perf_counter(), 0
        state = scope.setdefault("state", {})
        state |= {"id": name, "created": int(time.time())}
        body = b""

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            check_key(scope["path"], scope["headers"], self._service.settings.key)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body, receive = await self._body(scope, receive)
            await self._app(scope, receive, sending)
        except ApiError as error:
            if status == 0:
                await error.response()(scope, receive, sending)
        except ClientGone:
            status = _GONE
        except Exception:
            log.exception("%s %s %s failed", name, scope["method"], scope["path"])
            if status:  # the server closes the connection, so that the answer does not look whole
                raise
            await ApiError(500, f"the server failed; its log names request {name}", code="internal_error").response()(scope, receive, sending)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._service.metrics.http.labels(path, str(status or _GONE)).inc()
            self._tell(scope, name, status or _GONE, time.perf_counter() - begun, state.get("counts"), body)

    async def _body(self, scope: Scope, receive: Receive) -> tuple[bytes, Receive]:
        """(the whole body, what hands it on). Raises ApiError on one that is too large or never ends."""
        headers, limit = dict(scope["headers"]), self._service.settings.body_limit
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            while True:
                message = await asyncio.wait_for(receive(), _BODY_SECONDS)
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise _too_large(limit)
                if not message.get("more_body"):
                    break
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not come within {_BODY_SECONDS:g} s") from None
        body, handed = b"".join(parts), False

        async def replay() -> Message:
            nonlocal handed
            if handed:
                return await receive()
            handed = True
            return {"type": "http.request", "body": body, "more_body": False}

        return body, replay

    def _tell(self, scope: Scope, name: str, status: int, seconds: float, counts: Any, body: bytes) -> None:
        if scope["path"] in _QUIET and status in (200, 503):
            return
        line = f"{name} {scope['method']} {json.dumps(scope['path'])[1:-1]} {status} {seconds * 1e3:.1f} ms"
        if counts is not None:
            prompt, job = counts
            line += f", {prompt} prompt tokens, {job.tokens} new"
        if self._service.settings.log_prompts and body:
            line += f", body {json.dumps(body.decode('utf-8', 'replace'), ensure_ascii=False)}"
        log.info("%s", line)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is too large; allowed: at most {limit} bytes", code="body_too_large")

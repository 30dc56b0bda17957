"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}} and a status that says whether to try again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from sessa_deploy.errors import UserError, one_line

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error", 413: "invalid_request_error",
          415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable", 504: "timeout_error"}
RETRY_SECONDS = 1  # what a full queue and a loading engine advise


class ApiError(Exception):
    """An answer that is an error. retry_after: seconds, of a state that passes; None where a second try would end alike."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, one_line(message), param, code, retry_after

    @classmethod
    def of(cls, error: UserError, param: str | None = None) -> ApiError:
        """A user's mistake that the runtime found, as a 400; its fix speaks of a command line and is left out."""
        what = error.what if param is None or param in error.what else f"{param}: {error.what}"
        return cls(400, str(UserError(what, got=error.got, allowed=error.allowed)), param)

    def body(self) -> dict[str, Any]:
        """The JSON that says it."""
        return {"error": {"message": self.message, "type": _TYPES.get(self.status, "server_error"), "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Whether and when to try again."""
        if self.retry_after is not None:
            return {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"x-should-retry": "false"} if self.status in (500, 504) else {}  # which OpenAI's clients would send again by themselves

    def response(self, more: Mapping[str, str] | None = None) -> Response:
        """The answer."""
        return Response(json.dumps(self.body()).encode(), self.status, {**self.headers(), **(more or {})}, "application/json")


def unavailable(why: str, code: str, retry_after: int = RETRY_SECONDS) -> ApiError:
    """A state of the server's that passes: loading, draining, red."""
    return ApiError(503, why, code=code, retry_after=retry_after)

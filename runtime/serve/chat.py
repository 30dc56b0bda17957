"""POST /v1/chat/completions: a conversation as the bundle's template renders it, and the answer to it."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from sessa_deploy.runtime.requests import Event
from sessa_deploy.runtime.serve.asking import Usage, requests
from sessa_deploy.runtime.serve.engine import Engine
from sessa_deploy.runtime.serve.errors import ApiError
from sessa_deploy.runtime.serve.jobs import FINISH, Job
from sessa_deploy.runtime.serve.schema import ChatBody
from sessa_deploy.runtime.serve.service import Service, encoded
from sessa_deploy.runtime.serve.streaming import Batch, Chunks, EventStream, begin, gather


async def converse(service: Service, body: ChatBody, http: HttpRequest) -> Response:
    """The answer to one request. Raises ApiError, and ClientGone where nobody waits for it any more."""
    service.check_model(body.model)
    engine = service.engine
    prompt = await encoded(engine, engine.render([message.plain() for message in body.messages]), first=False, param="messages")
    max_tokens = _max_tokens(body, engine, len(prompt))
    wanted = _logprobs(body)
    job = service.submit(requests(body, engine, [prompt], max_tokens, wanted, ends=engine.ends))
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = {"id": f"chatcmpl-{http.state.id}", "object": kind, "created": http.state.created, "model": service.settings.name}
    http.state.counts = (len(prompt), job)
    choices = [_Choice(engine, wanted) for _ in range(body.n or 1)]
    if body.stream:
        first, batches = await begin(job, http.receive)
        stream = _Stream(head, body, choices, len(prompt), job)
        return EventStream(job, first, batches, stream.write, stream.last)

    await gather(job, http.receive, lambda index, event: choices[index].take(event))
    usage = Usage(len(prompt), job.tokens, choices[0].cached)
    return JSONResponse({**head, "choices": [choice.json(index) for index, choice in enumerate(choices)], "usage": usage.json()})


def _max_tokens(body: ChatBody, engine: Engine, prompt: int) -> int:
    """The longest answer: what is asked for, else the rest of the context."""
    given, param = body.max_completion_tokens, "max_completion_tokens"
    if given is None:
        given, param = body.max_tokens, "max_tokens"
    elif body.max_tokens is not None and body.max_tokens != given:
        raise ApiError(400, f"max_tokens and max_completion_tokens disagree: got {body.max_tokens} and {given}", "max_completion_tokens")
    if given is None:
        given, param = max(1, engine.capacity - prompt), "messages"
    engine.check_fits(prompt, given, param)
    return given


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is allowed only with logprobs", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


class _Choice:
    """One answer as it grows. `take` gives what an event adds: (text, log probabilities, why it ended)."""

    def __init__(self, engine: Engine, wanted: int | None) -> None:
        self._engine, self._wanted = engine, wanted
        self.text: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish: str | None = None
        self.cached = 0

    def take(self, event: Event) -> tuple[str, list[dict[str, Any]], str | None]:
        self.cached = self.cached or event.cached
        found = []
        if self._wanted is not None and event.token is not None and event.logprob is not None:
            found = [{**self._told(event.token, event.logprob), "top_logprobs": [self._told(*pair) for pair in event.top]}]
        if event.finish is not None:
            self.finish = FINISH[event.finish]
        self.text.append(event.text)
        self.logprobs += found
        return event.text, found, self.finish

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._engine.string(token), "logprob": logprob, "bytes": self._engine.token_bytes(token)}

    def json(self, index: int) -> dict[str, Any]:
        """The whole choice."""
        return {"index": index, "message": {"role": "assistant", "content": "".join(self.text), "refusal": None},
                "logprobs": {"content": self.logprobs, "refusal": None} if self._wanted is not None else None, "finish_reason": self.finish}


class _Stream:
    """The lines of a stream of chat: for each choice its role, its text, and why it ended."""

    def __init__(self, head: dict[str, Any], body: ChatBody, choices: list[_Choice], prompt: int, job: Job) -> None:
        options = body.stream_options
        self._usage = bool(options and options.include_usage)
        self._running = self._usage and bool(options and options.continuous_usage_stats)
        self._chunks, self._choices, self._prompt, self._job, self._wanted = Chunks(head, self._usage), choices, prompt, job, bool(body.logprobs)
        self._begun: set[int] = set()
        self._told = 0

    def write(self, batch: Batch) -> str:
        lines = []
        for index, event in batch:
            text, logprobs, finish = self._choices[index].take(event)
            self._told += event.token is not None
            if index not in self._begun:
                self._begun.add(index)
                lines.append(self._line(index, '{"role": "assistant", "content": ""}'))
            if text or logprobs:
                lines.append(self._line(index, f'{{"content": {json.dumps(text)}}}', logprobs))
            if finish is not None:
                lines.append(self._line(index, "{}", finish=finish))
        return "".join(lines)

    def last(self) -> str:
        return self._chunks.line("", self._counted(self._job.tokens)) if self._usage else ""

    def _line(self, index: int, delta: str, logprobs: list[dict[str, Any]] | None = None, finish: str | None = None) -> str:
        told = json.dumps({"content": logprobs, "refusal": None}) if logprobs else "null"
        end = f'"{finish}"' if finish is not None else "null"
        return self._chunks.line(f'{{"index": {index}, "delta": {delta}, "logprobs": {told}, "finish_reason": {end}}}',
                                 self._counted(self._told) if self._running else None)

    def _counted(self, tokens: int) -> dict[str, object]:
        return Usage(self._prompt, tokens, self._choices[0].cached).json()

"""POST /v1/completions: text behind a prompt, behind several, or the log probabilities of what is there already."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from sessa_deploy.runtime.requests import Event
from sessa_deploy.runtime.serve.asking import Usage, requests
from sessa_deploy.runtime.serve.engine import Engine
from sessa_deploy.runtime.serve.errors import ApiError
from sessa_deploy.runtime.serve.jobs import FINISH, Job
from sessa_deploy.runtime.serve.schema import CompletionBody
from sessa_deploy.runtime.serve.service import Service, encoded
from sessa_deploy.runtime.serve.streaming import Batch, Chunks, EventStream, begin, gather

_DEFAULT_TOKENS = 16


async def complete(service: Service, body: CompletionBody, http: HttpRequest) -> Response:
    """The answer to one request. Raises ApiError, and ClientGone where nobody waits for it any more."""
    service.check_model(body.model)
    engine = service.engine
    prompts = await _encoded(engine, body)
    max_tokens = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is wrong: got 0; allowed: an integer >= 1, or 0 with echo", "max_tokens")
    for prompt in prompts:
        engine.check_fits(len(prompt), max_tokens)
    asked = requests(body, engine, prompts, max_tokens, body.logprobs, body.logprobs if body.echo else None)
    job = service.submit(asked)
    head = {"id": f"cmpl-{http.state.id}", "object": "text_completion", "created": http.state.created, "model": service.settings.name}
    written = body.prompts()
    choices = [_Choice(engine, body, asked[index].prompt, written[index // (body.n or 1)]) for index in range(len(asked))]
    told = sum(len(prompt) for prompt in prompts)
    http.state.counts = (told, job)
    if body.stream:
        first, batches = await begin(job, http.receive)
        stream = _Stream(head, body, choices, told, job)
        return EventStream(job, first, batches, stream.write, stream.last)

    await gather(job, http.receive, lambda index, event: choices[index].take(event))
    usage = Usage(told, job.tokens, sum(choices[i].cached for i in range(0, len(choices), body.n or 1)))
    return JSONResponse({**head, "choices": [choice.json(index) for index, choice in enumerate(choices)], "usage": usage.json()})


async def _encoded(engine: Engine, body: CompletionBody) -> list[list[int]]:
    """Token ids of each prompt."""
    found = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            ids = await encoded(engine, prompt)
        else:
            ids = prompt
            engine.check_ids(ids, "prompt")
        if not ids:
            raise ApiError(400, "prompt is empty: it must have at least one token", "prompt")
        found.append(ids)
    return found


class _Choice:
    """One answer as it grows. `take` gives what an event adds: (text, the tokens' log probabilities, why it ended)."""

    def __init__(self, engine: Engine, body: CompletionBody, prompt: Sequence[int], written: str | list[int]) -> None:
        self._engine, self._echo, self._wanted, self._prompt, self._written = engine, bool(body.echo), body.logprobs, prompt, written
        self._begun = False
        self._shown = 0  # characters so far, the prompt's too where it is echoed
        self._count = 0
        self.text: list[str] = []
        self.logprobs: dict[str, list[Any]] = _no_logprobs()
        self.finish: str | None = None
        self.cached = 0

    def take(self, event: Event) -> tuple[str, dict[str, list[Any]], str | None]:
        text, found = "", _no_logprobs()
        if not self._begun:
            self._begun, self.cached = True, event.cached
            if self._echo:
                text += self._echoed(event, found)
            self._shown = len(text)
        if event.token is not None:
            if self._wanted is not None:
                self._add(found, event.token, event.logprob, event.top, self._shown)
            more = event.text if self._engine.tokenizer is not None else f"{' ' if self._count or self._echo else ''}{event.token}"
            self._count += 1
            self._shown += len(more)
            text += more
        if event.finish is not None:
            self.finish = FINISH[event.finish]
        self.text.append(text)
        for name, values in found.items():
            self.logprobs[name] += values
        return text, found, self.finish

    def _echoed(self, event: Event, found: dict[str, list[Any]]) -> str:
        """The prompt's text as it was sent, and its tokens' log probabilities where they were asked for."""
        tokenizer = self._engine.tokenizer
        decoded = tokenizer.decode(self._prompt, skip_special=False) if tokenizer is not None else " ".join(map(str, self._prompt))
        text = self._written if isinstance(self._written, str) else decoded
        if self._wanted is not None:
            # a first token that was put before the text is a token of the prompt's and no part of its text
            decoder, shown = codecs.getincrementaldecoder("utf-8")(errors="replace"), len(text) - len(decoded)
            for token, (logprob, top) in zip(self._prompt, event.prompt or (), strict=True):
                self._add(found, token, logprob, top, max(0, shown))
                shown += len(decoder.decode(bytes(self._engine.token_bytes(token))))
        return text

    def _add(self, found: dict[str, list[Any]], token: int, logprob: float | None, top: Sequence[tuple[int, float]], offset: int) -> None:
        name = self._engine.string(token)
        found["tokens"].append(name)
        found["token_logprobs"].append(logprob)
        found["text_offset"].append(offset)
        if logprob is None:
            found["top_logprobs"].append(None)
        else:
            ranked: dict[str, float] = {}
            for other, value in (*top, (token, logprob)):  # two tokens may look alike: the likelier one is told
                ranked.setdefault(self._engine.string(other), value)
            found["top_logprobs"].append(ranked if self._wanted else {})

    def json(self, index: int) -> dict[str, Any]:
        """The whole choice."""
        return {"index": index, "text": "".join(self.text), "logprobs": self.logprobs if self._wanted is not None else None, "finish_reason": self.finish}


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class _Stream:
    """The lines of a stream of completions."""

    def __init__(self, head: dict[str, Any], body: CompletionBody, choices: list[_Choice], prompt: int, job: Job) -> None:
        options = body.stream_options
        self._usage = bool(options and options.include_usage)
        self._running = self._usage and bool(options and options.continuous_usage_stats)
        self._chunks, self._choices, self._prompt, self._job = Chunks(head, self._usage), choices, prompt, job
        self._wanted, self._n = body.logprobs is not None, body.n or 1
        self._told = 0

    def write(self, batch: Batch) -> str:
        lines = []
        for index, event in batch:
            text, logprobs, finish = self._choices[index].take(event)
            self._told += event.token is not None
            if not text and finish is None and not (self._wanted and logprobs["tokens"]):
                continue
            told = json.dumps(logprobs) if self._wanted else "null"
            end = f'"{finish}"' if finish is not None else "null"
            lines.append(self._chunks.line(f'{{"index": {index}, "text": {json.dumps(text)}, "logprobs": {told}, "finish_reason": {end}}}',
                                           self._counted(self._told) if self._running else None))
        return "".join(lines)

    def last(self) -> str:
        return self._chunks.line("", self._counted(self._job.tokens)) if self._usage else ""

    def _counted(self, tokens: int) -> dict[str, object]:
        return Usage(self._prompt, tokens, sum(choice.cached for choice in self._choices[:: self._n])).json()

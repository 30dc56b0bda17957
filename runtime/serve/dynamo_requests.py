"""Dynamo's requests in the batcher's terms, and the batcher's events as Dynamo's chunks. Plain data on both sides: nothing of Dynamo is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.requests import Event, Request
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.serve.engine import Engine

_SEEDS = 2**64
_FINISH = {"stop": "stop", "length": "length", "context": "length", "cancelled": "cancelled"}  # the runtime's words in Dynamo's
# Where a worker dies, the frontend sends another what it had been given: the prompt with the tokens drawn so far behind it, but not how many those are.
# What does come along is the last chunk's trace link. Its span id says it here; its trace id stays the request's own.
_LINK = "5e55ade9"
# What would change an answer and is not done here, by the group of a request that it stands in: refused by name, never passed over.
_REFUSED = {
    "sampling_options": ("use_beam_search", "length_penalty", "include_stop_str_in_output", "guided_decoding", "allowed_token_ids", "bad_words_token_ids"),
    "stop_conditions": ("min_tokens", "max_thinking_tokens", "stop_token_ids_visible"),
    "output_options": ("return_tokens_as_token_ids",),
    "": ("multi_modal_data", "prompt_embeds", "encoder_result", "prefill_result", "bootstrap_info", "mm_processor_kwargs"),
}


class Expired(SessaError):
    """A request waited too long to be begun."""


class Failed(SessaError):
    """A step failed under a request."""


@dataclass(frozen=True)
class Asked:
    """requests: one a choice. position: tokens at the prompt's end that another worker drew before. trace: the request's trace id, or None."""

    requests: tuple[Request, ...]
    position: int = 0
    trace: str | None = None


def shortest(value: float) -> float:
    """The decimal number that a float32 was made from: 0.7 for 0.699999988079071."""
    return float(str(np.float32(value)))


def asked(request: Mapping[str, Any], engine: Engine, first: bool = True, trace: str | None = None) -> Asked:
    """What Dynamo's preprocessor asks for. first: a prompt that does not begin with the model's first token gets it.

    Raises UserError on what cannot be served: a prompt and max_tokens beyond the capacity, n or another value out of range, an option that is not done here.
    """
    groups = {name: request.get(name) or {} for name in ("sampling_options", "stop_conditions", "output_options")} | {"": request}
    for group, names in _REFUSED.items():
        for name in names:
            if groups[group].get(name) not in (None, False, 0, [], {}):
                raise UserError(f"{name} is not done by this model's engine", got=repr(groups[group][name])[:100], allowed="a request without it")
    options, stops, output = groups["sampling_options"], groups["stop_conditions"], groups["output_options"]
    if output.get("skip_special_tokens") is False:
        raise UserError("special tokens have no text here", got="skip_special_tokens false", allowed="true")
    n = options.get("n") or 1
    if (options.get("best_of") or n) != n:
        raise UserError("best_of is not done by this model's engine", got=options["best_of"], allowed=f"n, which is {n}")
    prompt, position = list(request["token_ids"]), _position(request)
    if position > len(prompt):
        raise UserError("a request that moved has lost its prompt", got=f"{len(prompt)} tokens, {position} of them drawn before")
    if first and engine.tokenizer is not None:
        prompt = engine.tokenizer.begun(prompt, engine.config.bos_token_id)
    room = engine.capacity - len(prompt)
    new = stops.get("max_tokens")
    new = room if new is None else new
    if room < 0 or (new > room and not position):
        raise UserError(f"the prompt has {len(prompt)} tokens and max_tokens is {stops.get('max_tokens')}", got=f"{len(prompt) + max(new, 0)} together",
                        allowed=f"{engine.capacity}, the context of this model")
    ignore = bool(stops.get("ignore_eos"))
    ends = () if ignore else tuple(dict.fromkeys((*(stops.get("stop_token_ids_hidden") or ()), *engine.ends)))
    sampling = _sampling(options)
    logprobs, prompt_logprobs = output.get("logprobs"), output.get("prompt_logprobs")
    return Asked(tuple(
        Request(tuple(prompt), sampling, new, stop=tuple(stops.get("stop") or ()), stop_tokens=(*ends, *(stops.get("stop_token_ids") or ())),
                choice=choice, position=position, logprobs=logprobs, prompt_logprobs=prompt_logprobs, ignore_eos=ignore)
        for choice in range(n)), position, trace)


def _sampling(options: Mapping[str, Any]) -> SamplingParams:
    names = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature")
    values = {name: shortest(options[name]) for name in names if options.get(name) is not None}
    seed, top_k = options.get("seed"), options.get("top_k")
    return SamplingParams(**{"temperature": 1.0, **values}, top_k=max(top_k or 0, 0), seed=None if seed is None else seed % _SEEDS)


def _position(request: Mapping[str, Any]) -> int:
    span = (request.get("migration_link") or {}).get("span_id") or ""
    try:
        return int(span[len(_LINK) :], 16) if span.startswith(_LINK) else 0
    except ValueError:
        return 0


class Chunks:
    """The chunks of one request, made of what the batcher tells of its choices.

    Tokens are told once their text is certain: what was told is all that another worker will know of, should this one die, and it draws the rest anew.
    """

    def __init__(self, job: Asked, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self._held: dict[int, list[Event]] = {choice: [] for choice in range(len(job.requests))}
        self._told = dict.fromkeys(self._held, job.position)
        self._cached = 0
        self._prompt: Any = None

    @property
    def done(self) -> bool:
        """Whether every choice has been told to its end."""
        return not self._held

    def add(self, choice: int, event: Event) -> None:
        """Note an event of a choice."""
        if choice in self._held:
            self._held[choice].append(event)

    def take(self) -> list[dict[str, Any]]:
        """The chunks that can be told now. Raises Expired or Failed where a choice did not come to its end."""
        found = []
        for choice, events in list(self._held.items()):
            certain = max((at for at, event in enumerate(events, 1) if event.finish is not None or not event.held), default=0)
            if certain:
                found.append(self._chunk(choice, events[:certain]))
                del events[:certain]
        return found

    def _chunk(self, choice: int, events: list[Event]) -> dict[str, Any]:
        last = events[-1]
        if last.finish == "error":
            raise (Expired if last.expired else Failed)(last.error or "the request failed")
        drawn = [event for event in events if event.token is not None]
        self._told[choice] += len(drawn)
        self._cached = max(self._cached, events[0].cached)
        self._prompt = self._prompt or next((event.prompt for event in events if event.prompt), None)
        chunk: dict[str, Any] = {"index": choice, "token_ids": [event.token for event in drawn], "text": "".join(event.text for event in events)}
        if self._job.requests[0].logprobs is not None:
            chunk |= self._logprobs(drawn)
        if len(self._job.requests) == 1:  # several choices are not moved
            chunk["worker_trace_link"] = {"trace_id": self._job.trace or _LINK * 4, "span_id": f"{_LINK}{self._told[choice]:08x}"}
        if last.finish is not None:
            chunk["finish_reason"] = _FINISH[last.finish]
            del self._held[choice]
            if len(self._job.requests) == 1:
                chunk["completion_usage"] = self._usage(self._told[choice])
            if self._prompt is not None:
                chunk["engine_data"] = {"prompt_logprobs": self._prompt_logprobs()}
        return chunk

    def _usage(self, completion: int) -> dict[str, Any]:
        prompt = len(self._job.requests[0].prompt) - self._job.position
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": min(self._cached, prompt)}}

    def _logprobs(self, drawn: list[Event]) -> dict[str, Any]:
        name = self._engine.string
        return {"tokens": [name(event.token) for event in drawn if event.token is not None], "log_probs": [event.logprob for event in drawn],
                "top_logprobs": [[{"rank": rank, "token_id": token, "token": name(token), "logprob": value} for rank, (token, value) in enumerate(event.top, 1)]
                                 for event in drawn]}

    def _prompt_logprobs(self) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = []
        for token, (own, top) in zip(self._job.requests[0].prompt, self._prompt, strict=False):
            ranked = {str(other): {"logprob": value, "rank": rank, "decoded_token": self._engine.string(other)} for rank, (other, value) in enumerate(top, 1)}
            found.append(None if own is None else {str(token): {"logprob": own, "decoded_token": self._engine.string(token)}} | ranked)
        return found

"""Dynamo's requests in the batcher's terms, and the batcher's events as Dynamo's chunks. Plain data on both sides: nothing of Dynamo is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.requests import Event, Request
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.serve.strings import TokenStrings
from sessa_deploy.runtime.template import ChatTemplate
from sessa_deploy.runtime.tokenizer import Tokenizer

_SEEDS = 2**64
_FINISH = {"stop": "stop", "length": "length", "context": "length", "cancelled": "cancelled"}  # the runtime's words in Dynamo's
# Where a worker dies, the frontend sends another what it had been given: the prompt with the tokens drawn so far behind it, but not how many those are.
# What does come along is the last chunk's trace link. Its span id says it here; its trace id stays the request's own.
_LINK = "5e55ade9"
# What would change an answer and is not done here, by the group of a request that it stands in: refused by name, never passed over.
_REFUSED = {
    "sampling_options": ("use_beam_search", "length_penalty", "include_stop_str_in_output", "guided_decoding", "allowed_token_ids", "bad_words_token_ids"),
    "stop_conditions": ("min_tokens", "max_thinking_tokens", "stop_token_ids_visible"),
    "output_options": ("return_tokens_as_token_ids", "prompt_logprobs"),
    "": ("multi_modal_data", "prompt_embeds", "encoder_result", "prefill_result", "bootstrap_info", "mm_processor_kwargs"),
}


class Expired(SessaError):
    """A request waited too long to be begun."""


class Failed(SessaError):
    """A step failed under a request."""


@dataclass(frozen=True)
class Served:
    """A bundle that answers. capacity: tokens of prompt and answer together; ends: tokens that end an answer, beside the model's own."""

    config: SessaConfig
    tokenizer: Tokenizer
    capacity: int
    ends: tuple[int, ...]
    strings: TokenStrings

    @classmethod
    def of(cls, bundle: Bundle, capacity: int) -> Served:
        """Of a bundle that has a tokenizer, which `hugging_face_files` has seen to."""
        tokenizer = Tokenizer.of(bundle)
        assert tokenizer is not None
        template = ChatTemplate.of(bundle)
        return cls(bundle.config, tokenizer, capacity, () if template is None else template.ends(tokenizer), TokenStrings(tokenizer))


@dataclass(frozen=True)
class Asked:
    """position: tokens at the prompt's end that another worker drew before. trace: the request's trace id, or None."""

    request: Request
    position: int = 0
    trace: str | None = None


def shortest(value: float) -> float:
    """The decimal number that a float32 was made from: 0.7 for 0.699999988079071."""
    return float(str(np.float32(value)))


def asked(request: Mapping[str, Any], served: Served, first: bool = True, trace: str | None = None) -> Asked:
    """What Dynamo's preprocessor asks for. first: a prompt that does not begin with the model's first token gets it.

    Raises UserError on what cannot be served: a prompt and max_tokens beyond the capacity, n or another value out of range, an option that is not done here.
    """
    groups = {name: request.get(name) or {} for name in ("sampling_options", "stop_conditions", "output_options")} | {"": request}
    for group, names in _REFUSED.items():
        for name in names:
            value = groups[group].get(name)
            asks = value is not None and value is not False and value != [] and value != {} and (name, value) != ("min_tokens", 0)
            if asks:
                raise UserError(f"{name} is not done by this model's engine", got=repr(value)[:100], allowed="a request without it")
    options, stops, output = groups["sampling_options"], groups["stop_conditions"], groups["output_options"]
    if output.get("skip_special_tokens") is False:
        raise UserError("special tokens have no text here", got="skip_special_tokens false", allowed="true")
    for name in ("n", "best_of"):  # an LLMEngine's stream ends with the first choice that does
        if (options.get(name) or 1) != 1:
            raise UserError(f"{name} is out of range", got=options[name], allowed="1: ask for more answers by more requests, with a seed each")
    prompt, position = list(request["token_ids"]), _position(request)
    if position > len(prompt):
        raise UserError("a request that moved has lost its prompt", got=f"{len(prompt)} tokens, {position} of them drawn before")
    if first:
        prompt = served.tokenizer.begun(prompt, served.config.bos_token_id)
    room = served.capacity - len(prompt)
    new = stops.get("max_tokens")
    new = room if new is None else new
    if room < 0 or (new > room and not position):
        raise UserError(f"the prompt has {len(prompt)} tokens and max_tokens is {stops.get('max_tokens')}", got=f"{len(prompt) + max(new, 0)} together",
                        allowed=f"{served.capacity}, the context of this model")
    ignore = bool(stops.get("ignore_eos"))
    ends = () if ignore else tuple(dict.fromkeys((*(stops.get("stop_token_ids_hidden") or ()), *served.ends)))
    moved = Request(tuple(prompt), _sampling(options), new, stop=tuple(stops.get("stop") or ()), stop_tokens=(*ends, *(stops.get("stop_token_ids") or ())),
                    position=position, logprobs=output.get("logprobs"), ignore_eos=ignore)
    return Asked(moved, position, trace)


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
    """The chunks of one request, made of what the batcher tells of it.

    Tokens are told once their text is certain: what was told is all that another worker will know of, should this one die, and it draws the rest anew.
    """

    def __init__(self, job: Asked, served: Served) -> None:
        self._job, self._name = job, served.strings.string
        self._held: list[Event] = []
        self._told, self._cached = job.position, 0
        self.done = False

    def add(self, event: Event) -> None:
        """Note an event."""
        self._held.append(event)

    def take(self) -> dict[str, Any] | None:
        """What can be told now, the end with it; None where that is nothing. Raises Expired or Failed where the request failed."""
        certain = max((at for at, event in enumerate(self._held, 1) if event.finish is not None or not event.held), default=0)
        events, self._held = self._held[:certain], self._held[certain:]
        if not events:
            return None
        last = events[-1]
        if last.finish == "error":
            raise (Expired if last.expired else Failed)(last.error or "the request failed")
        drawn = [event for event in events if event.token is not None]
        self._told += len(drawn)
        self._cached = max(self._cached, events[0].cached)
        chunk: dict[str, Any] = {"index": 0, "token_ids": [event.token for event in drawn], "text": "".join(event.text for event in events),
                                 "worker_trace_link": {"trace_id": self._job.trace or _LINK * 4, "span_id": f"{_LINK}{self._told:08x}"}}
        if self._job.request.logprobs is not None:
            chunk |= self._logprobs(drawn)
        if last.finish is not None:
            self.done = True
            prompt = len(self._job.request.prompt) - self._job.position
            chunk |= {"finish_reason": _FINISH[last.finish],
                      "completion_usage": {"prompt_tokens": prompt, "completion_tokens": self._told, "total_tokens": prompt + self._told,
                                           "prompt_tokens_details": {"cached_tokens": min(self._cached, prompt)}}}
        return chunk

    def _logprobs(self, drawn: list[Event]) -> dict[str, Any]:
        name = self._name
        return {"tokens": [name(event.token) for event in drawn if event.token is not None], "log_probs": [event.logprob for event in drawn],
                "top_logprobs": [[{"rank": rank, "token_id": token, "token": name(token), "logprob": value} for rank, (token, value) in enumerate(event.top, 1)]
                                 for event in drawn]}

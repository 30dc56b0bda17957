"""What a batcher is asked and what it answers: plain data, with no engine behind it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sessa_deploy.checks import as_flag, as_integer, as_number, integer
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.sampling import SamplingParams

Scored = tuple[float | None, tuple[tuple[int, float], ...]]  # a token's log probability, and the most likely tokens in its place with theirs
_MOST_BIAS = 100.0


class QueueFull(UserError):
    """As many requests wait as may."""


class NotAccepting(UserError):
    """The batcher drains or is closed."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    prompt: token ids, at least one. max_new_tokens: None goes on until the capacity is full; 0 only reads the prompt. stop: strings that end the answer,
    not shown; stop_tokens: ids that do, beside the model's own end tokens, which ignore_eos takes for tokens like others.
    choice: index among several answers to one request: each draws its own random numbers of one seed, and 0 draws what `run --seed` does.
    position: how many tokens at the prompt's end were drawn for this very request before, elsewhere: draws and penalties go on behind them.
    logprobs: with each new token its log probability and those of that many most likely ones; None gives none. prompt_logprobs: the same for
    the prompt's tokens; such a request reads its whole prompt anew and leaves nothing for others to reuse.
    logit_bias: token -> what is added to its logit, in [-100, 100]. Log probabilities are those of the untouched logits.
    Raises UserError on a value of the wrong kind or outside its range.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    choice: int = 0
    position: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prompt = _ids("prompt", self.prompt)
        if not prompt:
            raise UserError("the prompt is empty", allowed="at least one token", fix="pass some text")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError("stop is wrong", got=repr(self.stop), allowed="a list of non-empty strings")
        if not isinstance(self.sampling, SamplingParams):
            raise UserError("sampling is wrong", got=type(self.sampling).__name__, allowed="SamplingParams")
        ignore = as_flag(self.ignore_eos)
        if ignore is None:
            raise UserError("ignore_eos is wrong", got=repr(self.ignore_eos), allowed="true or false")
        for name, value in {
            "prompt": prompt, "stop": tuple(self.stop), "stop_tokens": _ids("stop_tokens", self.stop_tokens), "ignore_eos": ignore,
            "max_new_tokens": None if self.max_new_tokens is None else integer("max_new_tokens", self.max_new_tokens, 0),
            "choice": integer("choice", self.choice, 0), "position": integer("position", self.position, 0, len(prompt)),
            "logprobs": None if self.logprobs is None else integer("logprobs", self.logprobs, 0),
            "prompt_logprobs": None if self.prompt_logprobs is None else integer("prompt_logprobs", self.prompt_logprobs, 0),
            "logit_bias": _bias(self.logit_bias),
        }.items():
            object.__setattr__(self, name, value)


class Event(NamedTuple):
    """What became of a request: one for each new token, and one alone where it ends without one.

    token: None where there is none. text: what became certain with it, whole characters only; what may yet begin a stop string waits. logprob and top:
    where they were asked for. finish: None while it goes on; else "stop" (a stop token or string), "length" (max_new_tokens), "context" (the capacity
    is full), "cancelled" or "error", with the reason in `error`. expired: whether that error is that it waited too long to be begun.
    cached: tokens of the prompt that were not computed again, with the first event. prompt: with the first event of a request for
    prompt_logprobs, what each of its tokens had; (None, ()) for the first token, which nothing precedes. held: whether text of this token or of one
    before it is still to come.
    """

    token: int | None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    error: str | None = None
    expired: bool = False
    cached: int = 0
    prompt: tuple[Scored, ...] | None = None
    held: bool = False


class Handle:
    """A request that was submitted. id: counts up from 0."""

    def __init__(self, number: int, cancel: Callable[[], None], waiting: queue.SimpleQueue[Event] | None) -> None:
        self.id, self._cancel, self._waiting = number, cancel, waiting

    def cancel(self) -> None:
        """End the request where it stands, from any thread; its slot is free before the next step. Its last event then is "cancelled". Of one that has
        ended already nothing happens."""
        self._cancel()

    def events(self) -> Iterator[Event]:
        """Its events up to the last, waiting for each. Raises UserError where they go to on_event instead."""
        if self._waiting is None:
            raise UserError("the events of this request go elsewhere", got="on_event", fix="submit it without on_event")
        while True:
            event = self._waiting.get()
            yield event
            if event.finish is not None:
                return


def _ids(name: str, values: Any) -> tuple[int, ...]:
    try:
        found = [as_integer(value) for value in values]
    except TypeError:
        found = [None]
    if isinstance(values, (str, bytes)) or None in found:
        raise UserError(f"{name} is wrong", got=repr(values)[:100], allowed="a list of token ids")
    return tuple(token for token in found if token is not None)


def _bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise UserError("logit_bias is wrong", got=type(bias).__name__, allowed="token ids with a number each")
    found = {}
    for token, value in bias.items():
        key, number = as_integer(token), as_number(value)
        if key is None or number is None or not -_MOST_BIAS <= number <= _MOST_BIAS:
            raise UserError("logit_bias is wrong", got=f"{token!r}: {value!r}", allowed="token ids with a number in [-100, 100] each")
        found[key] = number
    return found

"""The one generation loop: what a drawn token means for its sequence, and the decode step of all sequences that run. Sessions and the batcher share it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.environment import default_threads
from sessa_deploy.runtime.sampling import NotFinite, Sampler, log_probabilities, most_likely
from sessa_deploy.runtime.stopping import StopText
from sessa_deploy.runtime.tokenizer import Tokenizer

_LARGE_VOCABULARY, _MOST_THREADS = 8192, 8
Top = tuple[tuple[int, float], ...]  # (token, log probability), best first
Found = int | NDArray[np.float32]  # what a token comes from: itself where a step picked it, else logits (V,)


class Drawn(NamedTuple):
    """A drawn token: the text it completes (may be empty), why generation ended with it (None: it goes on; "stop", "length" or "context"), and where it
    was asked for its log probability and the most likely tokens."""

    token: int
    text: str
    finish: str | None = None
    logprob: float | None = None
    top: Top = ()
    held: bool = False  # whether text of this token or of one before it is still to come


class Look(NamedTuple):
    """The next token of a sequence as a step's logits give it, and, where they are asked for, its log probability and the most likely tokens."""

    token: int
    logprob: float | None = None
    top: Top = ()


class Row:
    """Sequence `index` of a backend while it generates.

    tokens: its whole conversation, prompt and answers, to which drawn tokens are appended; all but those fed last are in the cache. ends: tokens that end
    it; stop: strings that do, not shown; limit: of new tokens; capacity: of the cache. logprobs: how many of the most likely tokens come with each; 0
    gives the drawn token's log probability alone, None nothing. at: position of the next token to feed, -1 for the last; before it, tokens are read that
    are there already, with `scores` of the most likely in the place of each.
    """

    def __init__(self, index: int, tokens: list[int], sampler: Sampler, tokenizer: Tokenizer | None, ends: Collection[int] = (), stop: Sequence[str] = (),
                 limit: int | None = None, capacity: int | None = None, logprobs: int | None = None, scores: int | None = None) -> None:
        self.index, self.tokens, self.sampler, self.logprobs, self.scores, self.at = index, tokens, sampler, logprobs, scores, -1
        self.count = 0
        self._decoder = tokenizer.stream(tokens) if tokenizer else None
        self._text, self._ends, self._limit, self._capacity = StopText(stop), frozenset(ends), limit, capacity

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is all that the next step must tell."""
        return self.sampler.greedy and self.logprobs is None and self.at < 0

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        left = self._capacity + 1 - len(self.tokens) if self._capacity is not None else 1 << 31
        return left if self._limit is None else min(left, self._limit - self.count)

    def look(self, found: Found) -> Look | Exception:
        """The next token: `found` itself where the step picked it, drawn from these logits (V,), or the one that is there already; or what went wrong."""
        if isinstance(found, int):
            return Look(found) if found >= 0 else NotFinite()
        try:
            if self.at >= 0:
                token, count = self.tokens[self.at + 1], self.scores
            else:
                token, count = self.sampler.next_token(found), self.logprobs
            return Look(token) if count is None else Look(token, *token_logprobs(found, token, count))
        except Exception as error:
            return error

    def take(self, look: Look) -> Drawn:
        """Record the next token and say what it means."""
        token, logprob, top = look
        self.tokens.append(token)
        self.count += 1
        finish = None
        if token in self._ends:
            finish = "stop"
        elif self._limit is not None and self.count >= self._limit:
            finish = "length"
        elif self._capacity is not None and len(self.tokens) > self._capacity:
            finish = "context"
        if self._decoder is None:
            return Drawn(token, "", finish, logprob, top)
        text, stopped = self._text.push(self._decoder.push(token) if token not in self._ends else "")
        if not stopped and finish is not None:
            more, stopped = self._text.push(self._decoder.flush())
            text += more
            if not stopped:
                text += self._text.flush()
        held = not stopped and finish is None and (self._decoder.held or self._text.held)
        return Drawn(token, text, "stop" if stopped else finish, logprob, top, held)


class Steps:
    """The decode steps of one backend's rows, each over the rows that are left.

    Where all of them only want the most likely token and the backend looks ahead, the step behind the one that is waited for is begun first: it is fed on
    the device, so that this need not wait for the host. A row that ends meanwhile was fed one token too many, which lies beyond its length; a row that can
    be known to end with the token waited for has no part in it. What each row draws is what it draws without.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._begun: deque[frozenset[Row]] = deque()  # the rows of each step that is under way

    def __call__(self, rows: list[Row], ahead: bool = True) -> tuple[list[Row], list[Found]]:
        """The rows that had a part in the next step, and what the next token of each comes from, as `decode` has it. A row that came while a step was under
        way has a part in the one behind it.

        ahead: whether to begin the step behind this one. Raises NotFinite as `decode` does, with no row a token further.
        """
        backend = self._backend
        if len(self._begun) != backend.under_way:  # somebody else was at the backend
            self._begun.clear()
        if not (backend.looks_ahead and all(row.greedy for row in rows)):
            self._begun.clear()
            return rows, decode(backend, rows)
        among = [row for row in rows if row in self._begun[0]] if self._begun else []
        try:
            if among:
                for row in self._begun[0].difference(among):
                    backend.call_off(row.index)
            else:
                among = rows
                backend.begin_greedy(*_feed(backend, rows))
                self._begun = deque([frozenset(rows)])
            if ahead and len(among) == len(rows):
                self._begin_next(among)
            picked = backend.end_greedy().tolist()
            self._begun.popleft()
        except BaseException:
            self._begun.clear()
            backend.call_off()
            raise
        return among, [picked[row.index] for row in among]

    def _begin_next(self, rows: list[Row]) -> None:
        """Begin the step behind the one under way, of the rows that it cannot be the last for."""
        going = [row for row in rows if row.left > 1] if len(self._begun) == 1 else []
        if going:
            new = np.zeros(self._backend.batch, np.int32)
            new[[row.index for row in going]] = 1
            if self._backend.begin_next(new):
                self._begun.append(frozenset(going))


def decode(backend: Backend, rows: Sequence[Row], logits: bool = False) -> list[Found]:
    """One decode step over `rows`, the others standing still; what each row's next token comes from: the token itself where a row only wants the most likely
    one, which the backend then finds where it computes, else (always, with `logits`) logits (V,). Raises NotFinite where no row wants logits."""
    ids, new = _feed(backend, rows)
    if logits:
        every = backend.step(ids, new)
        return [every[row.index] for row in rows]
    drawing = [row.index for row in rows if not row.greedy]
    if not drawing:
        picked = backend.step_greedy(ids, new).tolist()
        return [picked[row.index] for row in rows]
    picks, some = backend.step_some(ids, new, drawing)
    picked, found = picks.tolist(), dict(zip(drawing, some, strict=True))
    return [found.get(row.index, picked[row.index]) for row in rows]


def _feed(backend: Backend, rows: Sequence[Row]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """ids (B,1) and new_length (B,) of a decode step over `rows`."""
    ids, new = np.zeros((backend.batch, 1), np.int64), np.zeros(backend.batch, np.int32)
    for row in rows:
        ids[row.index, 0], new[row.index] = row.tokens[row.at], 1
    return ids, new


def verify(backend: Backend, row: Row, draft: Sequence[int]) -> list[Found]:
    """One step of `row` alone over its last token and a draft behind it; what the token after each of them comes from, as in `decode`. Needs all logits.

    A drawn token is what a draft must agree with: for a draft that is certain of itself this accepts it with its probability and else draws from the other
    tokens as they stand to each other, which is speculative sampling (Leviathan et al. 2023) with the random numbers of plain decoding, and so its tokens.
    """
    ids = np.array([row.tokens[-1], *draft])
    if row.greedy:
        picks: list[Found] = backend.step_row_picks(row.index, ids).tolist()
        return picks
    return list(backend.step_row_all(row.index, ids))


def look_all(rows: Sequence[Row], found: Sequence[Found]) -> list[Look | Exception]:
    """What each row makes of what a step gave it."""
    if all(isinstance(what, int) for what in found):  # a decode step waits for this
        return [row.look(what) for row, what in zip(rows, found, strict=True)]
    return _spread(Row.look, rows, found)


def take_all(rows: Sequence[Row], found: Sequence[Found]) -> list[Drawn]:
    """What each row draws from what a step gave it. Raises what went wrong with any of them, and then no row is a token further."""
    looks = []
    for look in look_all(rows, found):
        if isinstance(look, Exception):
            raise look
        looks.append(look)
    return [row.take(look) for row, look in zip(rows, looks, strict=True)]


def score_all(logits: NDArray[np.float32], tokens: Sequence[int], count: int) -> list[tuple[float, Top]]:
    """`token_logprobs` of each token under its row of logits (T,V), T = len(tokens)."""
    return _spread(token_logprobs, logits, tokens, [count] * len(tokens))


def _spread(work: Callable[..., Any], *columns: Any) -> list[Any]:
    """work(...) of every row of `columns`, the logits of which are arrays; on threads where there are several and the vocabulary is large."""
    heavy = sum(isinstance(found, np.ndarray) and found.size >= _LARGE_VOCABULARY for column in columns for found in column)
    return list((_threads().map if heavy > 1 else map)(work, *columns))


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """Threads that draw: over a large vocabulary that is a millisecond of numpy a sequence, which lets other threads run meanwhile."""
    return ThreadPoolExecutor(min(_MOST_THREADS, default_threads()), "sampling")


def token_logprobs(logits: NDArray[np.float32], token: int, count: int) -> tuple[float, Top]:
    """Log probability of a token under untouched logits (V,), and the `count` most likely tokens with theirs."""
    found = log_probabilities(logits)
    return float(found[token]), most_likely(found, count)


def check_fits(prompt: int, new_tokens: int, capacity: int, before: int = 0) -> None:
    """Raise UserError, with both numbers, unless a prompt of `prompt` tokens and `new_tokens` behind it fit, after `before` tokens of conversation."""
    if before + prompt + new_tokens - 1 > capacity:  # the last token drawn needs no row in the cache
        held = f" behind {before} tokens of conversation" if before else ""
        wanted = f" and {new_tokens} new tokens" if new_tokens > 1 else ""
        raise UserError("the context is full", got=f"a prompt of {prompt} tokens{held}{wanted}", allowed=f"a capacity of {capacity} tokens",
                        fix=f"raise the capacity (--capacity {before + prompt + new_tokens}), ask for fewer tokens or shorten the prompt")

"""What a batcher does in one turn: a chunk of one prompt, a decode step of all that draw, and what follows from either for the requests."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sessa_deploy.errors import one_line
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.generation import Look, Row, Steps, decode, look_all, score_all
from sessa_deploy.runtime.requests import Event, Request, Scored
from sessa_deploy.runtime.sampling import NotFinite, Sampler
from sessa_deploy.runtime.slots import Slot, Slots
from sessa_deploy.runtime.stats import Stats
from sessa_deploy.runtime.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Task:
    """A request on its way. prompt: its tokens; done: how many of them are in the cache; cached: how many were there before; scored: what is known of them
    where they are asked for; row: what it draws with, once its prompt is read."""

    id: int
    request: Request
    prompt: list[int]
    deliver: Callable[[Event], None]
    born: float
    slot: Slot | None = None
    row: Row | None = None
    done: int = 0
    cached: int = 0
    scored: list[Scored] | None = None
    told: float | None = None  # when its last token was told
    cancelled: str | None = None  # why
    ended: bool = False


class Turns:
    """The slots of one backend and the requests in them; one thread at a time. Nothing here raises what a step raised: its requests end with the reason.

    over: called with a task and its last event, once its slot is free; tell: with a task and any other event. The rest is as a batcher has it.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer | None, chunk: int, eos: frozenset[int], reuse: bool, clock: Callable[[], float],
                 tell: Callable[[Task, Event], None], over: Callable[[Task, Event], None]) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self._eos, self._clock, self._tell, self._over = eos, clock, tell, over
        backend.reset()
        self.slots = Slots(backend, chunk, reuse)
        self.reading: deque[Task] = deque()
        self.running: list[Task] = []
        self._steps = Steps(backend)
        self.stats = Stats(slots=backend.batch)

    def admit(self, task: Task) -> None:
        """Give a free slot to a request."""
        self.stats.waiting.add(self._clock() - task.born)
        self.stats.prompt_tokens += len(task.prompt)
        echo = task.request.prompt_logprobs is not None
        try:
            task.slot, task.done = self.slots.take(task.prompt, not echo)
        except Exception as error:
            self.failed([task], error)
            return
        self._took_over(task, task.done)
        if echo:
            task.scored = [(None, ())]
        if echo and not self.backend.all_logits:
            self._begin(task)
        else:
            self.reading.append(task)

    def _took_over(self, task: Task, tokens: int) -> None:
        self.stats.prefix_hits += tokens > 0 and not task.cached
        self.stats.cached_tokens += tokens
        task.cached += tokens

    def read(self) -> None:
        """One chunk of one prompt."""
        if not self.reading:
            return
        task = self.reading[0]
        slot = task.slot
        assert slot is not None
        try:
            shared = self.slots.share(slot, task.done)
            if shared > task.done:
                self.stats.prefix_copies += 1
                self._took_over(task, shared - task.done)
                task.done = shared
            if task.scored is None:
                ids = np.array(self.slots.chunk_of(task.prompt, task.done))
                logits = self.backend.step_row(slot.index, ids)
            else:
                ids = np.array(self.slots.chunk_of(task.prompt, task.done, all_logits=True))
                every = self.backend.step_row_all(slot.index, ids)
                behind = task.prompt[task.done + 1 : task.done + 1 + len(ids)]
                task.scored += score_all(every[: len(behind)], behind, task.request.prompt_logprobs or 0)
                logits = every[-1]
            if not np.isfinite(logits.max()):
                raise NotFinite()
        except Exception as error:
            self.failed([task], error)
            return
        self.stats.chunks += 1
        self.stats.failures_in_row = 0
        task.done += len(ids)
        self.reading.popleft()
        if task.done < len(task.prompt):
            self.reading.append(task)
            return
        try:
            row = self._begin(task)
            fault = self._follow(task, row, row.look(logits))
            if fault is not None:
                raise fault
        except Exception as error:  # what is drawn with, not the step
            self.failed([task], error, False)

    def _begin(self, task: Task) -> Row:
        """Let a task take part in decode steps: to draw, or, where a prompt is to be scored by a graph that gives the last logits alone, to read it so."""
        request, slot = task.request, task.slot
        assert slot is not None
        cut = len(task.prompt) - request.position
        sampler = Sampler(request.sampling, self.backend.config.vocab_size, task.prompt[:cut], request.choice, task.prompt[cut:], request.logit_bias)
        ends = {*request.stop_tokens, *(() if request.ignore_eos else self._eos)}
        slot.tokens = list(task.prompt)
        task.row = Row(slot.index, slot.tokens, sampler, self.tokenizer, ends, request.stop, request.max_new_tokens, self.backend.capacity, request.logprobs,
                       request.prompt_logprobs)
        if task.done < len(task.prompt):
            task.row.at = 0 if len(task.prompt) > 1 else -1
        self.running.append(task)
        return task.row

    def decode(self) -> None:
        """One decode step of all that run, or of those that ran when it was begun."""
        tasks = list(self.running)
        if not tasks:
            return
        rows = [task.row for task in tasks if task.row is not None]
        try:
            try:
                rows, found = self._steps(rows, ahead=not self.reading)  # a prompt's chunk would come between
            except NotFinite:  # of one of them: logits tell which
                found = decode(self.backend, rows, logits=True)
        except Exception as error:
            self.failed(tasks, error)
            return
        self.stats.steps += 1
        if len(rows) < len(tasks):
            tasks = [task for task in tasks if task.row in rows]
        looks = look_all(rows, found)
        faults = [(task, fault) for task, row, look in zip(tasks, rows, looks, strict=True) if (fault := self._follow(task, row, look)) is not None]
        none_good = len(faults) == len(tasks)
        if not none_good:
            self.stats.failures_in_row = 0
        for at, (task, fault) in enumerate(faults):
            self.failed([task], fault, none_good and at == 0)

    def _follow(self, task: Task, row: Row, look: Look | Exception) -> Exception | None:
        """Go on with a task's next token; what went wrong with it alone, logits that are not finite among others."""
        if isinstance(look, Exception):
            return look
        try:
            if row.at < 0:
                self._draw(task, row, look)
            elif task.scored is not None:
                task.scored.append((look.logprob, look.top))
                row.at = row.at + 1 if row.at < len(task.prompt) - 2 else -1
        except Exception as error:
            return error
        return None

    def _draw(self, task: Task, row: Row, look: Look) -> None:
        """Take a task's next token, and tell of it."""
        first = task.told is None
        cached, scored = (task.cached, None if task.scored is None else tuple(task.scored)) if first else (0, None)
        if task.request.max_new_tokens == 0:
            self.end(task, Event(None, finish="length", cached=cached, prompt=scored))
            return
        drawn = row.take(look)
        now = self._clock()
        (self.stats.first_token if first else self.stats.between_tokens).add(now - (task.born if task.told is None else task.told))
        task.told = now
        self.stats.new_tokens += 1
        event = Event(drawn.token, drawn.text, drawn.logprob, drawn.top, drawn.finish, cached=cached, prompt=scored, held=drawn.held)
        if drawn.finish is None:
            self._tell(task, event)
        else:
            self.end(task, event)

    def failed(self, tasks: list[Task], error: Exception, whole: bool = True) -> None:
        """End the tasks of a step that failed, with the reason, and forget what their caches hold. whole: it was a step, of which nothing came through."""
        self.stats.failures += 1
        self.stats.failures_in_row += whole
        reason = one_line(str(error)) or type(error).__name__
        _log.error("a step of %d requests failed (%d in a row): %s", len(tasks), self.stats.failures_in_row, reason)
        for task in tasks:
            if task.slot is not None:
                task.slot.sound = False
            self.end(task, Event(None, finish="error", error=reason))

    def end(self, task: Task, event: Event) -> None:
        """Free what a task has, and tell of its end."""
        if task.ended:
            return
        task.ended = True
        self.stats.finished[event.finish or "error"] += 1  # first, so that whoever sees the slot free or the last event sees it counted
        if task in self.reading:
            self.reading.remove(task)
        if task in self.running:
            self.running.remove(task)
        if task.slot is not None:
            try:
                self.slots.give_back(task.slot)
            except Exception as error:  # whoever takes the slot next resets it, or hears why not
                _log.error("slot %d cannot be reset: %s", task.slot.index, error)
        self._over(task, event)

    def probe(self) -> None:
        """A step of one token where nothing else is to do: readiness that is red turns green again without a request."""
        try:
            slot, _ = self.slots.take([0], False)
            try:
                self.backend.step_row(slot.index, np.zeros(1, np.int64))
            finally:
                self.slots.give_back(slot)
        except Exception as error:
            _log.warning("still failing: %s", error)
        else:
            self.stats.failures_in_row = 0

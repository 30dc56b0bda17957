"""Many requests on one backend: they join and leave a running batch, and each gets the tokens it would get alone.

A turn is one chunk of one waiting prompt, alone, and then one decode step of all sequences that draw; the two are never one step, since that would pad every
sequence to the chunk's length. Prompts that wait take turns by chunks, first come first: a long one delays a short one by one chunk a turn, and is not
delayed by more either; a running sequence waits for one chunk at most between two of its tokens. Requests get a slot in the order in which they came.
"""

from __future__ import annotations

import copy
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.checks import as_flag, as_number, integer
from sessa_deploy.errors import UserError, one_line
from sessa_deploy.runtime.backend import Backend, bounded_chunk, outside_vocabulary
from sessa_deploy.runtime.generation import Row, check_fits, decode, token_logprobs
from sessa_deploy.runtime.requests import Event, Handle, NotAccepting, QueueFull, Request, Scored
from sessa_deploy.runtime.sampling import NotFinite, Sampler
from sessa_deploy.runtime.slots import Slot, Slots
from sessa_deploy.runtime.stats import Stats
from sessa_deploy.runtime.tokenizer import Tokenizer

_RED_AFTER = 3  # steps that fail in a row until `ready` is false
_PROBE_SECONDS = 5.0
_log = logging.getLogger(__name__)


@dataclass
class _Task:
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


class Batcher:
    """Requests on the slots of one open backend, which nobody else may use meanwhile. Whoever opened the backend closes it, after `close`.

    tokenizer: gives events their text and finds stop strings; without one there are ids alone. chunk: tokens of a prompt that are read at once; None takes
    what suits the backend. queue: requests that may wait for a slot; queue_timeout: seconds that one may, None: for ever. eos: tokens that end an answer;
    None takes the model's. prefix_reuse: whether a prompt takes over what caches hold of its beginning. clock: seconds, for tests.

    `start` runs it on a thread of its own; without that, each call of `turn` does a turn's work on the caller's.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer | None = None, chunk: int | None = None, queue: int = 256, queue_timeout: float | None = 30.0,
                 eos: Iterable[int] | None = None, prefix_reuse: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self.chunk = backend.best_chunk if chunk is None else integer("chunk", chunk, 1)
        self._limit = integer("queue", queue, 0)
        found = None if queue_timeout is None else as_number(queue_timeout)
        if queue_timeout is not None and (found is None or not found > 0):
            raise UserError("queue_timeout is out of range", got=repr(queue_timeout), allowed="seconds > 0, or none")
        if as_flag(prefix_reuse) is None:
            raise UserError("prefix_reuse is wrong", got=repr(prefix_reuse), allowed="true or false")
        self._patience, self._clock = found, clock
        self._eos = frozenset(backend.config.eos_token_ids if eos is None else (integer("eos", token, 0) for token in eos))
        backend.reset()
        self._slots = Slots(backend, self.chunk, bool(prefix_reuse))
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._waiting: deque[_Task] = deque()  # what follows the lock guards: this, _inflight, _accepting, _stopping
        self._inflight = 0
        self._accepting, self._stopping, self._swept = True, False, True
        self._reading: deque[_Task] = deque()
        self._running: list[_Task] = []
        self._stats = Stats(slots=backend.batch)
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Handle:
        """Take a request, from any thread. Its events go to on_event on the loop's thread, which must not block there, else to `Handle.events`.

        An on_event that raises counts as a client that went away. Raises QueueFull at once where too many wait, NotAccepting while the batcher drains or
        is closed, UserError on a request that this model cannot serve; nothing has then changed.
        """
        self._check(request)
        waiting: queue.SimpleQueue[Event] | None = queue.SimpleQueue() if on_event is None else None
        deliver = waiting.put if waiting is not None else on_event
        assert deliver is not None
        task = _Task(next(self._numbers), request, list(request.prompt), deliver, self._clock())
        with self._lock:
            if not self._accepting:
                raise NotAccepting("the server is shutting down", fix="send the request to another")
            if self._inflight >= self.backend.batch + self._limit:
                self._stats.rejected += 1
                raise QueueFull("too many requests are waiting", got=len(self._waiting), allowed=f"{self._limit} (--queue)", fix="try again later")
            self._waiting.append(task)
            self._inflight += 1
            self._stats.accepted += 1
            self._lock.notify_all()
        return Handle(task.id, lambda: self._cancel(task, "by the client"), waiting)

    def start(self) -> None:
        """Run on a thread of its own until `close`."""
        with self._lock:
            if self._stopping or self._thread is not None:
                raise UserError("the batcher cannot be started", got="it runs or is closed", allowed="one start")
            self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
        self._thread.start()

    def drain(self, timeout: float) -> None:
        """Take no more requests, wait up to `timeout` seconds for those there are, and cancel what is left."""
        with self._lock:
            self._accepting = False
            self._lock.notify_all()
        end = time.monotonic() + timeout
        if self._thread is None:
            while time.monotonic() < end and self.turn():
                pass
        else:
            with self._lock:
                self._lock.wait_for(lambda: self._inflight == 0, max(0.0, end - time.monotonic()))
        self._cancel_all("the server is shutting down")

    def close(self) -> None:
        """Cancel what is left and end the loop. The backend stays open."""
        with self._lock:
            self._accepting, self._stopping = False, True
            self._lock.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._cancel_all("the server is closed")
        self._sweep()

    @property
    def ready(self) -> bool:
        """Whether it takes requests and steps come through: false from the third failure in a row until one succeeds, while it drains, and afterwards."""
        return self._accepting and self._stats.failures_in_row < _RED_AFTER

    def stats(self) -> Stats:
        """What was counted so far and how things stand, a copy."""
        with self._lock:
            found = copy.deepcopy(self._stats)
            found.queued = len(self._waiting)
        found.reading, found.running, found.ready = len(self._reading), len(self._running), self.ready
        found.resting = self._slots.resting
        return found

    def turn(self) -> bool:
        """One turn's work, for one who drives the batcher by hand; whether requests are left. Never raises what a step or an on_event raised."""
        self._sweep()
        self._admit()
        self._read()
        self._sweep()
        self._decode()
        return self._inflight > 0

    def _check(self, request: Request) -> None:
        vocabulary = self.backend.config.vocab_size
        wrong = [token for token in (*request.prompt, *request.stop_tokens, *request.logit_bias) if not 0 <= token < vocabulary]
        if wrong:
            raise outside_vocabulary(wrong[0], vocabulary)
        if request.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer", got="a bundle without one", allowed="stop_tokens")
        check_fits(len(request.prompt), 1 if request.max_new_tokens is None else request.max_new_tokens, self.backend.capacity)

    def _cancel(self, task: _Task, why: str) -> None:
        with self._lock:
            task.cancelled = task.cancelled or why
            self._swept = False
            self._lock.notify_all()

    def _cancel_all(self, why: str) -> None:
        for task in [*list(self._waiting), *list(self._reading), *list(self._running)]:
            self._cancel(task, why)

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and self._inflight == 0:
                    red = self._stats.failures_in_row >= _RED_AFTER
                    if not self._lock.wait(_PROBE_SECONDS if red else None) and red:
                        break
                if self._stopping:
                    return
            try:
                if not self._inflight:
                    self._probe()
                self.turn()
            except Exception as error:  # a fault of ours; its requests must not wait for ever
                _log.exception("a turn failed")
                self._failed([*self._reading, *self._running], error)

    def _probe(self) -> None:
        """A step of one token where nothing else is to do: readiness that is red turns green again without a request."""
        slot, _ = self._slots.take([0], False)
        try:
            self.backend.step_row(slot.index, np.zeros(1, np.int64))
        except Exception as error:
            _log.warning("still failing: %s", error)
        else:
            self._stats.failures_in_row = 0
        slot.busy = False
        self._slots.forget(slot)

    def _sweep(self) -> None:
        """End what was cancelled, or waited too long."""
        over = []
        with self._lock:
            if self._patience is not None and self._waiting:
                oldest = self._clock() - self._patience
                while self._waiting and self._waiting[0].born < oldest:
                    over.append(self._waiting.popleft())
            gone = [] if self._swept else [task for task in self._waiting if task.cancelled]
            for task in gone:
                self._waiting.remove(task)
            self._stats.expired += len(over)
        for task in over:
            self._end(task, Event(None, finish="error", error=f"no slot was free for {self._patience:g} s", expired=True))
        if not self._swept:
            self._swept = True
            for task in [*gone, *(task for task in (*self._reading, *self._running) if task.cancelled)]:
                self._end(task, Event(None, finish="cancelled", error=task.cancelled))

    def _admit(self) -> None:
        """Give free slots to those that wait, in their order."""
        while self._slots.free:
            with self._lock:
                if not self._waiting:
                    return
                task = self._waiting.popleft()
            self._stats.waiting.add(self._clock() - task.born)
            self._stats.prompt_tokens += len(task.prompt)
            echo = task.request.prompt_logprobs is not None
            task.slot, task.done = self._slots.take(task.prompt, not echo)
            self._took_over(task, task.done)
            if echo:
                task.scored = [(None, ())]
            if echo and not self.backend.all_logits:
                self._begin(task)
            else:
                self._reading.append(task)

    def _took_over(self, task: _Task, tokens: int) -> None:
        self._stats.prefix_hits += tokens > 0 and not task.cached
        self._stats.cached_tokens += tokens
        task.cached += tokens

    def _read(self) -> None:
        """One chunk of one prompt."""
        if not self._reading:
            return
        task = self._reading[0]
        slot = task.slot
        assert slot is not None
        try:
            shared = self._slots.share(slot, task.done)
            if shared > task.done:
                self._stats.prefix_copies += 1
                self._took_over(task, shared - task.done)
                task.done = shared
            if task.scored is None:
                ids = np.array(task.prompt[task.done : task.done + self.chunk])
                logits = self.backend.step_row(slot.index, ids)
            else:
                ids = np.array(task.prompt[task.done : task.done + bounded_chunk(self.chunk, 1, self.backend.config.vocab_size)])
                every = self.backend.step_row_all(slot.index, ids)
                self._score(task, task.done, every)
                logits = every[-1]
        except Exception as error:
            self._failed([task], error)
            return
        self._stats.chunks += 1
        self._stats.failures_in_row = 0
        task.done += len(ids)
        self._reading.popleft()
        if task.done < len(task.prompt):
            self._reading.append(task)
            return
        self._begin(task)
        self._draw(task, logits)

    def _score(self, task: _Task, at: int, logits: NDArray[np.float32]) -> None:
        """Note the log probabilities of the prompt's tokens behind position `at`, from logits (T,V) there and on."""
        count = task.request.prompt_logprobs
        assert task.scored is not None and count is not None
        for row, token in zip(logits, task.prompt[at + 1 : at + 1 + len(logits)], strict=False):
            task.scored.append(token_logprobs(row, token, count))

    def _begin(self, task: _Task) -> None:
        """Let a task take part in decode steps: to draw, or, where a prompt is to be scored by a graph that gives the last logits alone, to read it so."""
        request, slot = task.request, task.slot
        assert slot is not None
        cut = len(task.prompt) - request.position
        sampler = Sampler(request.sampling, self.backend.config.vocab_size, task.prompt[:cut], request.choice, task.prompt[cut:], request.logit_bias)
        ends = {*request.stop_tokens, *(() if request.ignore_eos else self._eos)}
        slot.tokens = list(task.prompt)
        task.row = Row(slot.index, slot.tokens, sampler, self.tokenizer, ends, request.stop, request.max_new_tokens, self.backend.capacity, request.logprobs)
        if task.done < len(task.prompt):
            task.row.at = 0 if len(task.prompt) > 1 else -1
        self._running.append(task)

    def _decode(self) -> None:
        """One decode step of all that run."""
        tasks = list(self._running)
        if not tasks:
            return
        rows = [task.row for task in tasks if task.row is not None]
        try:
            try:
                found = decode(self.backend, rows)
            except NotFinite:  # of one of them: logits tell which
                found = decode(self.backend, rows, logits=True)
        except Exception as error:
            self._failed(tasks, error)
            return
        self._stats.steps += 1
        self._stats.failures_in_row = 0
        for task, row, what in zip(tasks, rows, found, strict=True):
            if row.at < 0:
                self._draw(task, what)
            elif not isinstance(what, int):
                self._score(task, row.at, what[None])
                row.at = row.at + 1 if row.at < len(task.prompt) - 2 else -1

    def _draw(self, task: _Task, found: int | NDArray[np.float32]) -> None:
        """Take a task's next token from what a step gave, and tell of it."""
        row = task.row
        assert row is not None
        first = task.told is None
        extra = {"cached": task.cached, "prompt": None if task.scored is None else tuple(task.scored)} if first else {}
        if task.request.max_new_tokens == 0:
            self._end(task, Event(None, finish="length", **extra))
            return
        try:
            drawn = row.take(row.pick(found), found)
        except NotFinite as error:
            self._failed([task], error)
            return
        now = self._clock()
        (self._stats.first_token if first else self._stats.between_tokens).add(now - (task.born if task.told is None else task.told))
        task.told = now
        self._stats.new_tokens += 1
        event = Event(drawn.token, drawn.text, drawn.logprob, drawn.top, drawn.finish, held=drawn.held, **extra)
        if drawn.finish is None:
            self._tell(task, event)
        else:
            self._end(task, event)

    def _failed(self, tasks: list[_Task], error: Exception) -> None:
        """End the tasks of a step that failed, with the reason, and forget what their caches hold."""
        self._stats.failures += 1
        self._stats.failures_in_row += 1
        reason = one_line(str(error)) or type(error).__name__
        _log.error("a step of %d requests failed (%d in a row): %s", len(tasks), self._stats.failures_in_row, reason)
        for task in tasks:
            if task.slot is not None:
                task.slot.sound = False
            self._end(task, Event(None, finish="error", error=reason))

    def _end(self, task: _Task, event: Event) -> None:
        """Tell of a task's end and free what it had."""
        if task.ended:
            return
        task.ended = True
        if task in self._reading:
            self._reading.remove(task)
        if task in self._running:
            self._running.remove(task)
        if task.slot is not None:
            self._slots.give_back(task.slot)
        self._tell(task, event)
        with self._lock:
            self._inflight -= 1
            self._stats.finished[event.finish or "error"] += 1
            self._lock.notify_all()

    def _tell(self, task: _Task, event: Event) -> None:
        try:
            task.deliver(event)
        except Exception as error:
            _log.warning("request %d: nobody takes its events: %s", task.id, error)
            self._cancel(task, "nobody takes its events")

"""Many requests on one backend: they join and leave a running batch, and each gets the tokens it would get alone.

A turn is one chunk of one waiting prompt, alone, and then one decode step of all sequences that draw; the two are never one step, since that would pad every
sequence to the chunk's length. Prompts that wait take turns by chunks, first come first: a long one delays a short one by one chunk a turn, and is not
delayed by more either; a running sequence waits for one chunk at most between two of its tokens. Requests get a slot in the order in which they came.
"""

from __future__ import annotations

import atexit
import copy
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from sessa_deploy.checks import as_flag, as_number, check_tokens, integer
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.generation import check_fits
from sessa_deploy.runtime.requests import Event, Handle, NotAccepting, QueueFull, Request
from sessa_deploy.runtime.stats import Stats
from sessa_deploy.runtime.tokenizer import Tokenizer
from sessa_deploy.runtime.turns import Task, Turns

_RED_AFTER = 3  # steps that fail in a row until `ready` is false
_PROBE_SECONDS, _LAST_STEP_SECONDS = 5.0, 10.0
_log = logging.getLogger(__name__)


class Batcher:
    """Requests on the slots of one open backend, which nobody else may use meanwhile. Whoever opened the backend closes it, after `close`.

    tokenizer: gives events their text and finds stop strings; without one there are ids alone. chunk: tokens of a prompt that are read at once, and the
    grain in which prompts share beginnings; None takes what suits the backend. queue: requests that may wait for a slot; queue_timeout: seconds that one
    may, None: for ever. eos: tokens that end an answer; None takes the model's. prefix_reuse: whether a prompt takes over what caches hold of its
    beginning. clock: seconds, for tests.

    `start` runs it on a thread of its own; without that, each call of `turn` does a turn's work on the caller's.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer | None = None, chunk: int | None = None, queue: int = 256, queue_timeout: float | None = 30.0,
                 eos: Iterable[int] | None = None, prefix_reuse: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self.chunk = min(backend.best_chunk, backend.turn_chunk) if chunk is None else integer("chunk", chunk, 1)
        self._limit = integer("queue", queue, 0)
        found = None if queue_timeout is None else as_number(queue_timeout)
        if queue_timeout is not None and (found is None or not found > 0):
            raise UserError("queue_timeout is out of range", got=repr(queue_timeout), allowed="seconds > 0, or none")
        if as_flag(prefix_reuse) is None:
            raise UserError("prefix_reuse is wrong", got=repr(prefix_reuse), allowed="true or false")
        self._patience, self._clock = found, clock
        eos_tokens = frozenset(backend.config.eos_token_ids if eos is None else (integer("eos", token, 0) for token in eos))
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._waiting: deque[Task] = deque()  # what follows the lock guards: this and the five lines below
        self._inflight = 0  # requests whose last event is not told yet
        self._taken = 0  # of those, the ones that still take up room: whoever has heard the last event may send the next request
        self._accepting, self._stopping, self._swept = True, False, True
        self._evicted: str | None = None  # why all that are left have to go
        self._turns = Turns(backend, tokenizer, self.chunk, eos_tokens, bool(prefix_reuse), clock, self._tell, self._over)
        self._slots, self._stats = self._turns.slots, self._turns.stats
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
        task = Task(next(self._numbers), request, list(request.prompt), deliver, self._clock())
        with self._lock:
            if not self._accepting:
                raise NotAccepting("the server is shutting down", fix="send the request to another")
            if self._taken >= self.backend.batch + self._limit:
                self._stats.rejected += 1
                raise QueueFull("too many requests are waiting", got=len(self._waiting), allowed=f"{self._limit} (--queue)", fix="try again later")
            self._waiting.append(task)
            self._inflight += 1
            self._taken += 1
            self._stats.accepted += 1
            self._lock.notify_all()
        return Handle(task.id, lambda: self._cancel(task, "by the client"), waiting)

    def start(self) -> None:
        """Run on a thread of its own until `close`, which the end of the process calls where nobody else did."""
        with self._lock:
            if self._stopping or self._thread is not None:
                raise UserError("the batcher cannot be started", got="it runs or is closed", allowed="one start")
            self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # inside an engine's library the thread would abort a process whose interpreter has gone

    def drain(self, timeout: float) -> None:
        """Take no more requests, wait up to `timeout` seconds for those there are, and cancel what is left."""
        with self._lock:
            self._accepting = False
            self._lock.notify_all()
        end = time.monotonic() + timeout
        if self._thread is None:
            while time.monotonic() < end and self.turn():
                pass
            self._evict("the server is shutting down")
            return
        with self._lock:
            self._lock.wait_for(lambda: self._inflight == 0, max(0.0, end - time.monotonic()))
        self._evict("the server is shutting down")
        with self._lock:  # the step that runs now may be the last thing to wait for
            self._lock.wait_for(lambda: self._inflight == 0, _LAST_STEP_SECONDS)

    def close(self) -> None:
        """Cancel what is left and end the loop. The backend stays open."""
        with self._lock:
            self._accepting, self._stopping = False, True
            self._lock.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        atexit.unregister(self.close)
        self._evict("the server is closed", here=True)

    @property
    def ready(self) -> bool:
        """Whether it takes requests and steps come through: false from the third failure in a row until one succeeds, while it drains, and afterwards."""
        return self._accepting and self._stats.failures_in_row < _RED_AFTER

    def stats(self) -> Stats:
        """What was counted so far and how things stand, a copy."""
        with self._lock:
            found = copy.deepcopy(self._stats)
            found.queued = len(self._waiting)
        found.reading, found.running, found.ready = len(self._turns.reading), len(self._turns.running), self.ready
        found.resting = self._slots.resting
        return found

    def turn(self) -> bool:
        """One turn's work, for one who drives the batcher by hand; whether requests are left. Never raises what a step or an on_event raised."""
        self._sweep()
        self._admit()
        self._turns.read()
        self._sweep()
        self._turns.decode()
        return self._inflight > 0

    def _check(self, request: Request) -> None:
        check_tokens((*request.prompt, *request.stop_tokens, *request.logit_bias), self.backend.config.vocab_size)
        if request.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer", got="a bundle without one", allowed="stop_tokens")
        check_fits(len(request.prompt), max(1, request.max_new_tokens or 1), self.backend.capacity)

    def _cancel(self, task: Task, why: str) -> None:
        with self._lock:
            task.cancelled = task.cancelled or why
            self._swept = False
            self._lock.notify_all()

    def _evict(self, why: str, here: bool = False) -> None:
        """Cancel all that are left; here: on this thread, as none other runs turns."""
        with self._lock:
            self._evicted, self._swept = why, False
            self._lock.notify_all()
        if here or self._thread is None:
            self._sweep()

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
                    self._turns.probe()
                self.turn()
            except Exception as error:  # a fault of ours; its requests must not wait for ever
                _log.exception("a turn failed")
                self._turns.failed([*self._turns.reading, *self._turns.running], error)

    def _sweep(self) -> None:
        """End what was cancelled, or waited too long."""
        over = []
        with self._lock:
            if self._patience is not None and self._waiting:
                oldest = self._clock() - self._patience
                while self._waiting and self._waiting[0].born < oldest:
                    over.append(self._waiting.popleft())
            swept, self._swept = self._swept, True
            gone = [] if swept else [task for task in self._waiting if task.cancelled or self._evicted]
            for task in gone:
                self._waiting.remove(task)
            self._stats.expired += len(over)
        for task in over:
            self._turns.end(task, Event(None, finish="error", error=f"no slot was free for {self._patience:g} s", expired=True))
        if not swept:
            gone += [task for task in (*self._turns.reading, *self._turns.running) if task.cancelled or self._evicted]
        for task in gone:
            self._turns.end(task, Event(None, finish="cancelled", error=task.cancelled or self._evicted))

    def _admit(self) -> None:
        """Give free slots to those that wait, in their order."""
        while self._slots.free:
            with self._lock:
                if not self._waiting:
                    return
                task = self._waiting.popleft()
            self._turns.admit(task)

    def _over(self, task: Task, event: Event) -> None:
        with self._lock:
            self._taken -= 1
        self._tell(task, event)
        with self._lock:
            self._inflight -= 1
            self._lock.notify_all()

    def _tell(self, task: Task, event: Event) -> None:
        try:
            task.deliver(event)
        except Exception as error:
            _log.warning("request %d: nobody takes its events: %s", task.id, error)
            self._cancel(task, "nobody takes its events")

"""A thread in each process of a training that ends it when another one has failed, also where the main thread waits for that one in a collective."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from sessa_deploy.errors import UserError

_LOOK = 0.5  # seconds between two looks
GRACE = 3.0  # seconds in which the main thread may end by itself once a failure is known
_STORE_ANSWERS = 5.0  # seconds in which a store that is there has answered
_LAST_WORDS = 1.0  # seconds in which a process that ended may have said why


@dataclass(frozen=True)
class Failure:
    """What went wrong in the process of number `rank`, and what the command line exits with for it. gone: it can no longer say so itself."""

    rank: int
    code: int
    text: str
    gone: bool = False

    @property
    def speaker(self) -> int:
        """The number of the process that tells the user."""
        return 1 if self.gone and self.rank == 0 else 0


class Watch:
    """The failure of any process, told to all of them through `store`, a key-value store of torch.distributed with a connection of its own.

    peers: the process ids of the other processes of this machine by their number; one that ends without a word is a failure too. What a process that
    waits in a collective must do then is done here: process 0 says the failure's line, and all leave with its code.
    """

    def __init__(self, store: Any, rank: int, peers: dict[int, int]) -> None:
        self._store, self._rank = store, rank
        self._peers: dict[int, int] = {}  # number -> a descriptor that is readable when the process has ended
        for number, pid in peers.items():
            with contextlib.suppress(OSError, AttributeError):  # no such process any more, or a kernel without pidfd
                self._peers[number] = os.pidfd_open(pid)
        self._stop, self._leaving = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def post(self, failure: Failure) -> None:
        """Tell all processes of a failure; the first one counts."""
        with contextlib.suppress(RuntimeError):  # the store has gone with the process that kept it
            self._store.compare_set("failed", "", json.dumps(asdict(failure)))

    def failure(self) -> Failure | None:
        """The failure that was told first, if any; RuntimeError where the store cannot be asked."""
        return Failure(**json.loads(self._store.get("failed"))) if self._store.check(["failed"]) else None

    def await_failure(self, seconds: float) -> Failure | None:
        """The failure that comes within some time; None where none does."""
        end = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while (found := self.failure()) is None and time.monotonic() < end:
                time.sleep(0.1)
            return found
        return None

    def stand_back(self) -> None:
        """This process ends by itself, with an error of its own or one that it was told: the watch no longer ends it."""
        self._leaving = True

    def leave(self) -> None:
        """What this process has to say is safe from those that end it: the others may go."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left {self._rank}", "1")

    def await_leaving(self, rank: int, seconds: float) -> None:
        """Wait until the process of that number leaves, or for that long."""
        end = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while not self._store.check([f"left {rank}"]) and time.monotonic() < end:
                time.sleep(0.1)

    def close(self) -> None:
        """End the watch; the processes may then end at different times. Where its store does not answer, it is left behind."""
        self._stop.set()
        self._thread.join(_STORE_ANSWERS)
        if self._thread.is_alive():
            return
        for handle in self._peers.values():
            os.close(handle)

    def _run(self) -> None:
        try:
            while not self._stop.wait(_LOOK):
                failure = self.failure() or self._missing()
                if failure is not None:
                    self._end(failure)
                    return
        except RuntimeError:  # the store has gone: the launcher, or process 0
            self._end(Failure(0, 2, "the launcher of the processes has gone"))

    def _missing(self) -> Failure | None:
        if not self._peers:
            return None
        ended, _, _ = select.select(list(self._peers.values()), [], [], 0)
        gone = [rank for rank, handle in self._peers.items() if handle in ended]
        if not gone or self._stop.wait(_LAST_WORDS):
            return None
        error = UserError(f"process {gone[0]} of the run has gone", got="it ended without a word",
                          fix="look at the launcher's messages and at the memory it had, then continue with --resume")
        self.post(Failure(gone[0], error.exit_code, str(error), gone=True))
        return self.failure()

    def _end(self, failure: Failure) -> None:
        if self._stop.wait(GRACE) or self._leaving:
            return
        if self._rank == failure.speaker:
            say(failure.text)
        self.leave()
        os._exit(failure.code)


def say(text: str) -> None:
    """The line of an error on stderr, where the command line has no turn to tell it; a progress bar's cursor comes back."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(("\x1b[?25h\n" if sys.stderr.isatty() else "") + f"error: {text}\n")
        sys.stderr.flush()

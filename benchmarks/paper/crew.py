"""Work shared out among processes: each stands at a place (a device), takes one job at a time, the longest of the first stage first, and says how far it is."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from sessa_deploy.errors import SessaError, UserError

Tell = Callable[[str, int, int, float], None]  # (name of the job, steps done, of how many, loss)
GRACE = 10.0  # seconds in which a process that was told to end must have ended


class OutOfTime(Exception):
    """The deadline came; what was trained is kept, and the same command goes on from there."""


class WorkerFailed(SessaError):
    """A process of the crew ended by an error that is no user's."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """work: what the crew's function gets, to be pickled. stage: the lower ones go first. seconds: expected; within a stage the longest goes first."""

    name: str
    work: Any
    stage: int = 0
    seconds: float = 0.0


@dataclass
class _Worker:
    place: str
    process: Any = None
    pipe: Connection | None = None
    job: Job | None = None


def _serve(do: Callable[[str, Any, Tell], Any], place: str, pipe: Connection) -> None:
    """A worker's life: jobs come through the pipe, steps and results go back; it ends with the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear: it ends this process

    def tell(*said: Any) -> None:
        pipe.send(("step", said))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            work = pipe.recv()
            try:
                answer = ("done", do(place, work, tell))
            except OutOfTime:
                answer = ("late", None)
            except SessaError as error:
                answer = ("error", (error.exit_code, str(error)))
            except (BrokenPipeError, ConnectionResetError):
                return
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                answer = ("failed", f"{type(error).__name__}: {error} ({where.filename.rsplit('/', 1)[-1]}, line {where.lineno})")
            pipe.send(answer)


@dataclass
class Crew:
    """One process a place; with a single place the work is done in this one. do(place, work, tell) is a function of a module, since other processes import
    it; it may raise OutOfTime. tell hears of the steps of all."""

    places: Sequence[str]
    do: Callable[[str, Any, Tell], Any]
    tell: Tell
    _workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> Crew:
        self._workers = [_Worker(place) for place in self.places]
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            if worker.process is not None and worker.job is not None:
                worker.process.terminate()
            if worker.pipe is not None:
                worker.pipe.close()
        for worker in self._workers:
            if worker.process is not None:
                worker.process.join(GRACE)
                if worker.process.is_alive():
                    worker.process.kill()
                    worker.process.join()

    def run(self, jobs: Iterable[Job], then: Callable[[Job, Any], Iterable[Job]] = lambda job, result: (), alone: bool = False) -> None:
        """Do the jobs and those that `then`, told of each result, adds. alone: one job a place's device at a time, for what is measured.

        Raises OutOfTime where a job did, after the others have ended; UserError or WorkerFailed, one line, for the first job that failed, the others ended.
        """
        waiting, late = list(jobs), False
        while True:
            if len(self.places) == 1:
                if not waiting:
                    return
                job = self._first(waiting)
                waiting += then(job, self.do(self.places[0], job.work, self.tell))
                continue
            while waiting and not late and (worker := self._free(alone)) is not None:
                self._start(worker, self._first(waiting))
            busy = {worker.pipe: worker for worker in self._workers if worker.pipe is not None and worker.job is not None}
            if not busy:
                if late:
                    raise OutOfTime
                return
            for pipe in wait([*busy]):
                worker = busy[pipe]  # type: ignore[index]
                kind, said = self._heard(worker)
                if kind == "step":
                    self.tell(*said)
                    continue
                done, worker.job = worker.job, None
                late |= kind == "late"
                if kind == "done" and done is not None:
                    waiting += then(done, said)

    @staticmethod
    def _first(waiting: list[Job]) -> Job:
        job = min(waiting, key=lambda job: (job.stage, -job.seconds))
        waiting.remove(job)
        return job

    def _free(self, alone: bool) -> _Worker | None:
        """An idle worker at the place with the least work in hand."""
        load: dict[str, float] = dict.fromkeys(self.places, 0.0)
        for worker in self._workers:
            if worker.job is not None:
                load[worker.place] += worker.job.seconds or 1.0
        idle = [worker for worker in self._workers if worker.job is None and not (alone and load[worker.place])]
        return min(idle, key=lambda worker: load[worker.place], default=None)

    def _start(self, worker: _Worker, job: Job) -> None:
        if worker.process is None:
            context = multiprocessing.get_context("spawn")
            worker.pipe, theirs = context.Pipe()
            # Not a daemon: those may have no children, and batches are made by some.
            worker.process = context.Process(target=_serve, args=(self.do, worker.place, theirs), daemon=False)
            worker.process.start()
            theirs.close()
        worker.job = job
        with contextlib.suppress(BrokenPipeError):  # it died at once: _heard says so
            worker.pipe.send(job.work)  # type: ignore[union-attr]

    def _heard(self, worker: _Worker) -> tuple[str, Any]:
        name = "" if worker.job is None else worker.job.name
        try:
            kind, said = worker.pipe.recv()  # type: ignore[union-attr]
        except (EOFError, ConnectionResetError):
            worker.process.join(GRACE)
            raise WorkerFailed(f"{name}: its process ended with exit code {worker.process.exitcode}") from None
        if kind == "failed":
            raise WorkerFailed(" ".join(f"{name}: {said}".split()))
        if kind == "error":
            code, text = said
            raise WorkerFailed(text) if code == 1 else UserError(text)
        return kind, said

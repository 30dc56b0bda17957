"""Start rungs as processes, side by side, and hear of their progress."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from sessa_deploy.errors import ParityError, SessaError, UserError
from sessa_deploy.export.parity.rungs import ENGINE_RUNGS, RungJob, run_rung
from sessa_deploy.files import write_whole
from sessa_deploy.process import python, signals_held

_KEPT_LINES = 2000  # of what a rung says on stderr
_LISTEN = 10.0  # seconds to hear the rest of it after the end
_KILLED = {-signal.SIGKILL: "SIGKILL", -signal.SIGTERM: "SIGTERM", -signal.SIGHUP: "SIGHUP"}  # by somebody else: an engine that crashes ends otherwise

Progress = Callable[[str, int, int], None]
"""Told (rung, cases done, cases in all)."""


class RungError(ParityError):
    """A rung died without writing its tensors: the engine refused the graph, or crashed."""


class Launch(Protocol):
    """Runs one rung to its end. Raises UserError as the rung does or where it never began, RungError if it died."""

    def __call__(self, job: RungJob, progress: Progress) -> None: ...


def silent(rung: str, done: int, of: int) -> None:
    """No progress wanted."""


def launch_here(job: RungJob, progress: Progress = silent) -> None:
    """Run a rung inside this process."""
    run_rung(job, lambda done, of: progress(job.rung, done, of))


class ProcessLaunch:
    """Runs a rung as an interpreter of its own (see rungs.py).

    engine_python: another interpreter for the engines' rungs (one with TensorRT, say), in which this package must be installed.
    """

    def __init__(self, engine_python: str | Path | None = None) -> None:
        self.engine_python = engine_python
        self._running: list[subprocess.Popen[str]] = []
        self._stopped = False
        self._lock = threading.Lock()

    def __call__(self, job: RungJob, progress: Progress = silent) -> None:
        other = self.engine_python if job.rung in ENGINE_RUNGS else None
        options = {"--rung": job.rung, "--folder": job.folder, "--bundle": job.bundle, "--threads": job.threads, "--checkpoint": job.checkpoint,
                   "--config": job.config}
        command = python("from sessa_deploy.export.parity.rungs import main; sys.exit(main())",
                         *(str(x) for pair in options.items() if pair[1] is not None for x in pair), interpreter=other)
        threads = str(job.threads)
        # passive: threads that spin while they wait take the cores of the rungs beside them, and of whatever else runs on the machine
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        code, begun, said = self._run(command, environment, job.rung, progress)
        if code:
            raise self._failed(job, code, begun, said, str(other or sys.executable))

    def stop(self) -> None:
        """Kill the rungs that are running, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _run(self, command: Sequence[str], environment: dict[str, str], rung: str, progress: Progress) -> tuple[int, bool, list[str]]:
        """(exit code, whether the rung began its work, what it said on stderr)."""
        begun, said = False, deque[str](maxlen=_KEPT_LINES)  # in memory: a full disk could not take what is said of it
        process: subprocess.Popen[str] | None = None
        listener: threading.Thread | None = None
        try:
            with signals_held():
                process = self._begin(command, environment, rung)
                listener = threading.Thread(target=said.extend, args=(process.stderr or (),), daemon=True)
                listener.start()
            for line in process.stdout or ():
                begun = _pass_on(line, rung, progress) or begun
            code = process.wait()
        finally:
            if process is not None:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                if listener is not None:
                    listener.join(_LISTEN)
                for stream in (process.stdout, process.stderr):
                    if stream:
                        stream.close()
                with self._lock:
                    self._running.remove(process)
        return code, begun, [line.strip() for line in said if line.strip()]

    def _begin(self, command: Sequence[str], environment: dict[str, str], rung: str) -> subprocess.Popen[str]:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, encoding="utf-8",
                                       errors="replace", env=environment)
        except OSError as error:
            raise UserError(f"the rung {rung} cannot be started", got=f"{command[0]} ({error.strerror})", fix="name an interpreter that exists") from None
        with self._lock:
            self._running.append(process)
            if self._stopped:
                process.kill()
        return process

    def _failed(self, job: RungJob, code: int, begun: bool, said: list[str], interpreter: str) -> SessaError:
        """What a rung's end means: only an engine that began and then failed says something about its numbers."""
        with contextlib.suppress(SessaError):
            write_whole(job.folder / f"{job.rung}.log", "".join(f"{line}\n" for line in said), sync=False)
        last = said[-1] if said else f"nothing but exit code {code}"
        if code == 2 and begun and said:
            return UserError(last)
        if not begun:
            return UserError(f"the rung {job.rung} could not be started", got=last,
                             fix=f"see that {shlex.quote(interpreter)} has sessa-deploy and what it needs")
        if code in _KILLED:
            return UserError(f"the rung {job.rung} was killed by {_KILLED[code]}", got=last, allowed="a rung that ends by itself",
                             fix="if memory ran out, validate on a machine with more")
        return RungError(f"the rung {job.rung} died (exit code {code}): {last}")


def _pass_on(line: str, rung: str, progress: Progress) -> bool:
    """Report a rung's progress; False for an engine's own chatter."""
    try:
        data = json.loads(line)
        done, of = int(data["done"]), int(data["of"])
    except (ValueError, KeyError, TypeError):
        return False
    if of:
        progress(rung, done, of)
    return True


def launch_all(jobs: Sequence[RungJob], launch: Launch, workers: int, progress: Progress) -> dict[str, RungError]:
    """Run jobs, `workers` at a time; returns the engines' rungs that died. A UserError is raised and stops the rest, as a torch rung's death is and does."""
    died: dict[str, RungError] = {}

    def one(job: RungJob) -> None:
        try:
            launch(job, progress)
        except RungError as error:
            if job.rung not in ENGINE_RUNGS:  # nothing was judged: without its references parity has no verdict
                raise UserError(str(error)) from None
            died[job.rung] = error

    if workers <= 1:
        for job in jobs:
            one(job)
        return died
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[None]] = []
        try:
            futures += (pool.submit(one, job) for job in jobs)
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            if isinstance(launch, ProcessLaunch):
                launch.stop()
            raise
    return died

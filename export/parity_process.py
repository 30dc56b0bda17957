"""Start rungs as processes, side by side, and hear of their progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from sessa_deploy.errors import ParityError, UserError
from sessa_deploy.export.parity_rungs import ENGINE_RUNGS, RungJob, run_rung

Progress = Callable[[str, int, int], None]
"""Told (rung, cases done, cases in all)."""


class RungError(ParityError):
    """A rung died without writing its tensors: the engine refused the graph, or crashed."""


class Launch(Protocol):
    """Runs one rung to its end. Raises UserError as the rung does, RungError if it died."""

    def __call__(self, job: RungJob, progress: Progress) -> None: ...


def silent(rung: str, done: int, of: int) -> None:
    """No progress wanted."""


def launch_here(job: RungJob, progress: Progress = silent) -> None:
    """Run a rung inside this process."""
    run_rung(job, lambda done, of: progress(job.rung, done, of))


class ProcessLaunch:
    """Runs a rung as `python -m sessa_deploy.export.parity_rungs`.

    engine_python: another interpreter for the engines' rungs (one with TensorRT, say), in which this package must be installed.
    """

    def __init__(self, engine_python: str | Path | None = None) -> None:
        self.engine_python = engine_python
        self._running: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()

    def __call__(self, job: RungJob, progress: Progress = silent) -> None:
        python = str(self.engine_python) if self.engine_python and job.rung in ENGINE_RUNGS else sys.executable
        command = [python, "-m", "sessa_deploy.export.parity_rungs", "--rung", job.rung, "--folder", str(job.folder), "--bundle", str(job.bundle),
                   "--threads", str(job.threads), *(("--checkpoint", str(job.checkpoint)) if job.checkpoint else ())]
        threads = str(job.threads)
        # passive: threads that spin while they wait take the cores of the rungs beside them, and of whatever else runs on the machine
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        log = job.folder / f"{job.rung}.log"
        with log.open("w+", encoding="utf-8", errors="replace") as errors:
            try:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True, env=environment)
            except OSError as error:
                raise UserError(f"the rung {job.rung} cannot be started", got=f"{python} ({error.strerror})", fix="name an interpreter that exists") from None
            with self._lock:
                self._running.append(process)
            try:
                for line in process.stdout or ():
                    _pass_on(line, job.rung, progress)
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                if process.stdout:
                    process.stdout.close()
                with self._lock:
                    self._running.remove(process)
            errors.seek(0)
            said = [line.strip() for line in errors.read().splitlines() if line.strip()]
        if code == 2 and said:
            raise UserError(said[-1])
        if code:
            raise RungError(f"the rung {job.rung} died (exit code {code}): {said[-1] if said else 'it said nothing'}")
        log.unlink(missing_ok=True)

    def stop(self) -> None:
        """Kill the rungs that are running."""
        with self._lock:
            for process in self._running:
                process.kill()


def _pass_on(line: str, rung: str, progress: Progress) -> None:
    try:
        data = json.loads(line)
        progress(rung, int(data["done"]), int(data["of"]))
    except (ValueError, KeyError, TypeError):
        return  # an engine's own chatter


def launch_all(jobs: Sequence[RungJob], launch: Launch, workers: int, progress: Progress) -> dict[str, RungError]:
    """Run jobs, `workers` at a time; returns the engines' rungs that died. A UserError, or a torch rung's death, is raised and stops the rest."""
    died: dict[str, RungError] = {}

    def one(job: RungJob) -> None:
        try:
            launch(job, progress)
        except RungError as error:
            if job.rung not in ENGINE_RUNGS:
                raise
            died[job.rung] = error

    if workers <= 1:
        for job in jobs:
            one(job)
        return died
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            if isinstance(launch, ProcessLaunch):
                launch.stop()
            raise
    return died

"""Runs beside each other: who gets which job, what comes first, and how one failure, one death or the deadline ends all. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "paper"))

from crew import Crew, Job, OutOfTime, Tell, WorkerFailed

from sessa_deploy.errors import UserError


def do(place: str, work: Any, tell: Tell) -> Any:
    """What workers do here: (folder, what)."""
    folder, what = work
    with (folder / "log").open("a") as log:
        log.write(f"{what} {place} {os.getpid()}\n")
    tell(what, 1, 2, 0.5)
    if what == "bad":
        raise UserError("a bad rate", got="-1", fix="give a positive one")
    if what == "bug":
        raise ValueError("two\nlines")
    if what == "dies":
        os._exit(7)
    if what == "never":
        time.sleep(0.3)
    if what == "late":
        (folder / "meets2").touch()
        raise OutOfTime
    if what == "long":
        time.sleep(60)
    if what.startswith("meets"):  # ends only where its partner runs at the same time
        (folder / what).touch()
        while len(list(folder.glob("meets*"))) < 2:
            time.sleep(0.01)
    return what.upper()


def logged(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def test_two_work_at_once_each_at_its_place_and_follow_up(tmp_path: Path) -> None:
    said, results = [], []

    def then(job: Job, result: str) -> list[Job]:
        results.append(result)
        return [Job("after", (tmp_path, "after"))] if result == "MEETS1" else []

    with Crew(["a", "b"], do, lambda *x: said.append(x)) as crew:
        crew.run([Job("one", (tmp_path, "meets1")), Job("two", (tmp_path, "meets2"))], then)
        crew.run([Job("last", (tmp_path, "last"))], then)  # the same processes again
    rows = logged(tmp_path)
    assert sorted(results[:2] + results[2:]) == ["AFTER", "LAST", "MEETS1", "MEETS2"] and results[-1] == "LAST"
    assert {row[1] for row in rows[:2]} == {"a", "b"} and len({row[2] for row in rows}) == 2 and str(os.getpid()) not in {row[2] for row in rows}
    assert ("meets1", 1, 2, 0.5) in said and len(said) == 4


def test_alone_in_this_process_the_longest_of_the_first_stage_comes_first(tmp_path: Path) -> None:
    jobs = [Job(x, (tmp_path, x), stage, seconds) for x, stage, seconds in (("x", 1, 9.0), ("y", 0, 1.0), ("z", 0, 5.0), ("w", 1, 10.0))]
    with Crew(["cpu"], do, lambda *_: None) as crew:
        crew.run(jobs)
    assert [row[0] for row in logged(tmp_path)] == ["z", "y", "w", "x"] and {row[2] for row in logged(tmp_path)} == {str(os.getpid())}


def test_the_place_with_the_least_work_gets_the_next_job() -> None:
    with Crew(["a", "b", "a", "b"], do, lambda *_: None) as crew:
        workers = crew._workers
        workers[0].job = Job("slow", None, seconds=10.0)
        assert crew._free(alone=False) is workers[1]
        workers[1].job = Job("quick", None, seconds=4.0)
        assert crew._free(alone=False) is workers[3] and crew._free(alone=True) is None
        for worker in workers:
            worker.job = None


@pytest.mark.parametrize(("what", "error", "told"), [
    ("bad", UserError, "a bad rate: got -1; fix: give a positive one"),
    ("bug", WorkerFailed, r"job of bug: ValueError: two lines \(test_paper_crew.py, line \d+\)"),
    ("dies", WorkerFailed, "job of dies: its process ended with exit code 7"), ("late", OutOfTime, ""),
])
def test_what_ends_one_ends_all(tmp_path: Path, what: str, error: type[Exception], told: str) -> None:
    begin = time.monotonic()
    other = "meets1" if what == "late" else "long"
    with pytest.raises(error, match=f"^{told}$"), Crew(["a", "b"], do, lambda *_: None) as crew:
        crew.run([Job(f"job of {x}", (tmp_path, x), stage) for stage, x in enumerate((other, what, "never", "never", "never"))])
    assert time.monotonic() - begin < 55 and all(not worker.process.is_alive() for worker in crew._workers if worker.process)
    assert error is not OutOfTime or len(logged(tmp_path)) < 5


def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Crew(["a", "b"], do, interrupt) as crew:
        crew.run([Job("one", (tmp_path, "long")), Job("two", (tmp_path, "long"))])
    assert all(not worker.process.is_alive() for worker in crew._workers)

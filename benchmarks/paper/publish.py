"""What this folder's README shows of finished runs, made again from their files: on any machine, nothing is trained.

    python benchmarks/paper/publish.py --runs out/paper

Of every task with runs: its table between the marks in README.md, results/paper-TASK.json, and pictures of accuracy and loss; one of influence. Several
commands, on several machines, may have made the runs: put their folders' files together first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import report
import torch
from door import leave
from rich.console import Console
from run import task_called
from training import Machine

from sessa_deploy import UserError
from sessa_deploy.files import write_whole

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
LEFT = 1.0  # nats an answer: a run below it has left the plateau of "any stored value", ln 8 = 2.08
CURVE_POINTS = 100  # of a loss curve that is kept


def left_plateau(curve: list[list[float]]) -> str:
    """The first step of a loss curve [(step, loss)] below LEFT, or never."""
    return next((f"{step:,.0f}" for step, loss in curve if loss < LEFT), "never")


def table(summary: dict[str, Any]) -> str:
    """A row a run, one of dots for a model without any, and the yardsticks above chance."""
    points, marks = summary["points"], summary["yardsticks"]
    lines = [["model", *points, f"loss below {LEFT:g} at step", "rate", "a run"], ["---"] * (len(points) + 4)]
    for model, title in models.TITLES.items():
        runs = summary["models"].get(model, {"runs": []})["runs"]
        for run in runs:
            scores = [f"{run['test'][point]['accuracy']:.3f}" if run.get("test") else "diverged" for point in points]
            lines.append([f"{title}, seed {run['seed']}", *scores, left_plateau(run["curve"]), f"{run['lr']:g}", f"{run['seconds']:.0f} s"])
        if not runs:
            lines.append([title, *["..."] * len(points), "not run yet", "", ""])
    names = sorted((name for name in marks[points[0]] if marks[points[0]][name] >= 0.1), key=lambda name: marks[points[0]][name])
    lines += [[name, *(f"{marks[point][name]:.3f}" for point in points), "", "", ""] for name in names]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def between(page: str, name: str, text: str) -> str:
    """The page with `text` between its marks <!-- name --> and <!-- end of name -->. Raises UserError where it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise UserError("the page has no place for this table", got=name, fix=f"write {begin} and {end} where it belongs")
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def kept(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary as results/ has it: loss curves of CURVE_POINTS points."""
    found: dict[str, Any] = json.loads(json.dumps(summary))
    for entry in found["models"].values():
        for run in entry["runs"]:
            every = max(1, len(run["curve"]) // CURVE_POINTS)
            run["curve"] = run["curve"][every - 1 :: every]
            for name in ("machine", "versions"):  # the summary's
                run.pop(name, None)
    return found


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("out/paper"), help="what run.py wrote; default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where pictures and JSON go; default: %(default)s")
    parser.add_argument("--page", type=Path, default=HERE / "README.md", help="the page with the tables; default: %(default)s")
    options = parser.parse_args()
    console, page = Console(stderr=True), options.page.read_text(encoding="utf-8")
    names = [name for name in sorted(path.name for path in options.runs.glob("*") if path.is_dir()) if report.tested(options.runs, name)]
    if not names:
        raise UserError("there is no finished run", got=options.runs, fix=f"python benchmarks/paper/run.py --out {options.runs}")
    for name in names:
        found = report.tested(options.runs, name)
        most = found[-1]
        runs = [setting for setting in found if replace(setting, model="", seed=0, lr=0.0) == replace(most, model="", seed=0, lr=0.0)]
        report.write_task(options.runs, task_called(name, argparse.Namespace(examples=2000, batch=None)), runs, {}, 0)
    report.write_influence(Machine(options.runs, torch.device("cpu")), console)
    report.write_all(options.runs, console)
    options.results.mkdir(parents=True, exist_ok=True)
    for name in names:
        summary = json.loads((options.runs / name / report.SUMMARY).read_text())
        page = between(page, name, table(summary))
        write_whole(options.results / f"paper-{name}.json", json.dumps(kept(summary), indent=1) + "\n", "--results", "the figures")
        for picture in ("accuracy", "loss"):
            if (options.runs / name / f"{picture}.png").is_file():
                shutil.copyfile(options.runs / name / f"{picture}.png", options.results / f"paper-{name}-{picture}.png")
    shutil.copyfile(options.runs / "influence.png", options.results / "paper-influence.png")
    write_whole(options.page, page, "--page", "the tables")
    return 0


if __name__ == "__main__":
    leave(main)

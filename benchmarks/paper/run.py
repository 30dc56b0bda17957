"""The paper's comparison on tasks of this folder: Sessa, Sessa without feedback, Llama and Mamba-2, matched in parameters, tokens, steps and schedule.

    python benchmarks/paper/run.py                       # everything: Diffuse MQAR, SymbolSoup, language model; two seeds
    python benchmarks/paper/run.py --preset quick        # eight minutes of one GPU: Diffuse MQAR, all four models
    python benchmarks/paper/run.py --tasks mqar --seeds 3 --minutes 30

Each model takes the best of three rates by validation loss, found on seed 0 at a fifth of the steps. Finished runs are files under --out and are never made
again; a run that was cut short goes on. --minutes ends in time: it takes fewer seeds first, then fewer tasks, then fewer steps for all models alike.
What comes out is printed and written as table.json, table.md and pictures, whatever it says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models
import report
import tasks
import torch
import training
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from training import Machine, OutOfTime, Setting

from sessa_deploy.errors import SessaError, UserError, packages_named
from sessa_deploy.files import write_whole
from sessa_deploy.runtime.environment import cores
from sessa_deploy.train_options import find_device

SEARCH = 5  # a search for the rate takes steps / SEARCH
PILOTS, PILOT_RATE, LEARNT = ("sessa", "llama"), 1e-3, 0.5
LEAST_STEPS, MOST_STEPS = 200, 16000
SHARE = 0.78  # of the time at hand that runs may take; the rest is for tests, curves and what was measured wrongly
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {"tasks": "mqar", "seeds": 2, "minutes": 8.0, "key_length": "auto"},
    "tiny": {"seeds": 1, "steps": 10, "width": 32, "layers": 2, "examples": 20, "batch": 4, "rates": "1e-3,2e-3", "workers": 0},
}


@dataclass
class Study:
    """One call: what is to be done, where, and who hears of it."""

    options: argparse.Namespace
    machine: Machine
    names: tuple[str, ...]
    rates: tuple[float, ...]
    console: Console
    tell: Callable[[str, int, int, float], None]

    def setting(self, task: str, model: str, seed: int, lr: float, steps: int) -> Setting:
        """A run of this study's size."""
        return Setting(task, model, seed, lr, steps, self.options.width, self.options.layers)

    def make(self, setting: Setting, task: tasks.Task, test: bool, weights: bool = True) -> dict[str, Any]:
        """A run, its progress shown; read from its file where it is finished."""
        known = training.finished(setting, self.machine.folder)
        if known is None and self.machine.left < 0:
            raise OutOfTime
        result = training.run(setting, task, self.machine, lambda step, of, loss: self.tell(setting.stem, step, of, loss), test, weights)
        if known is None:
            self.console.print(f"{setting.stem}: {report.line(result)}", highlight=False)
        return result


def make_task(name: str, options: argparse.Namespace, key: int) -> tasks.Task:
    """The task as the options want it; another key length is another task in every file's name."""
    task = tasks.make(name, key, options.examples)
    if options.batch is not None:
        task.batch_size = options.batch
    if name == "mqar" and key != 3:
        task.name = f"mqar-key{key}"
    return task


def seconds_per_step(study: Study, task: tasks.Task) -> dict[str, float]:
    """Seconds of a step of every model, measured once a folder and device."""
    device = torch.cuda.get_device_name(study.machine.device) if study.machine.device.type == "cuda" else "cpu"
    path = study.machine.folder / task.name / "seconds_per_step.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for model in study.names:
        if f"{device}: {model}" not in known:
            known[f"{device}: {model}"] = training.step_seconds(study.setting(task.name, model, 0, PILOT_RATE, 100), task, study.machine)
            study.console.print(f"{task.title}, {models.TITLES[model]}: {1e3 * known[f'{device}: {model}']:.1f} ms a step", highlight=False)
            write_whole(path, json.dumps(known, indent=1) + "\n", "--out", "the times of a step")
    return {model: known[f"{device}: {model}"] for model in study.names}


def fit_steps(seconds: dict[str, float], budget: float, wanted: int, seeds: int, pilots: Sequence[str] = ()) -> tuple[int, int]:
    """(steps, seeds) that fit into `budget` seconds: fewer seeds first, then fewer steps for all models alike."""
    whole, rates = sum(seconds.values()), len(training.RATES)
    for count in range(seeds, 0, -1):
        cost = whole * (count + rates / SEARCH) + sum(seconds.get(name, 0.0) for name in pilots)
        if wanted * cost <= budget:
            return wanted, count
    return max(LEAST_STEPS, int(budget / cost) // 100 * 100), 1


def plan(study: Study, name: str) -> tuple[tasks.Task, int, int]:
    """(task, steps, seeds) of a task; what was decided in this folder before stands."""
    options, path = study.options, study.machine.folder / f"{name}-plan.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    auto = options.key_length == "auto" and name == "mqar"
    key = int(known.get("key", 3)) if options.key_length == "auto" else int(options.key_length)
    task = make_task(name, options, key)
    wanted = options.steps or known.get("steps")
    steps, seeds = wanted or task.steps, options.seeds
    if options.minutes is not None:
        most = wanted or (MOST_STEPS if auto else task.steps)
        pilots = PILOTS if auto and "key" not in known else ()
        fitted, seeds = fit_steps(seconds_per_step(study, task), max(1.0, SHARE * study.machine.left), most, options.seeds, pilots)
        steps = wanted or fitted
    if auto and "key" not in known:
        key = pilot(study, task, steps)
        task = make_task(name, options, key)
        known["key"] = key
    write_whole(path, json.dumps(known | {"steps": steps}, indent=1) + "\n", "--out", "the plan")
    return task, steps, seeds


def pilot(study: Study, task: tasks.Task, steps: int) -> int:
    """3 where Sessa or Llama learns keys of three symbols in these steps, else 2, which is easier. Their runs count where the rate is the one chosen."""
    for model in PILOTS:
        if model in study.names:
            result = study.make(study.setting(task.name, model, 0, PILOT_RATE, steps), task, test=False)
            if result["validation"] is not None and result["validation"]["accuracy"] > LEARNT:
                return 3
    study.console.print(f"neither of {', '.join(PILOTS)} exceeds {LEARNT} on keys of three symbols in {steps} steps: keys of two", highlight=False)
    return 2


def best_rate(study: Study, task: tasks.Task, model: str, steps: int) -> float:
    """The rate with the lowest validation loss on seed 0 at a fifth of the steps."""
    found = {}
    for lr in study.rates:
        result = study.make(study.setting(task.name, model, 0, lr, max(1, steps // SEARCH)), task, test=False, weights=False)
        if result["validation"] is not None:
            found[result["validation"]["loss"]] = lr
    if not found:
        raise UserError("every rate diverged", got=f"{model} on {task.title} at {', '.join(map(str, study.rates))}", fix="give smaller --rates")
    return found[min(found)]


def study_task(study: Study, name: str) -> None:
    """Everything of one task: rates, then every seed of every model, the table after each seed."""
    task, steps, seeds = plan(study, name)
    study.console.print(f"{task.title}: {steps} steps of {task.batch_size} x {task.length} tokens, {seeds} seed{'s' * (seeds > 1)}", highlight=False)
    rates: dict[str, float] = {}
    done: list[Setting] = []
    try:
        for model in study.names:
            rates[model] = best_rate(study, task, model, steps)
        for seed in range(seeds):
            for model in study.names:
                setting = study.setting(task.name, model, seed, rates[model], steps)
                study.make(setting, task, test=True)
                done.append(setting)
    finally:
        if done:
            report.write_task(study.machine.folder, task, done, study.rates, steps // SEARCH)


def options_of(args: Sequence[str] | None) -> argparse.Namespace:
    """The options, a preset's where one is not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full", help="quick: eight minutes of one GPU; tiny: a rehearsal on a CPU")
    parser.add_argument("--tasks", default=",".join(tasks.TASKS), help="with commas between; default: %(default)s, in this order")
    parser.add_argument("--models", default=",".join(models.MODELS), help="with commas between; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=2, help="how many; default: %(default)s")
    parser.add_argument("--minutes", type=float, help="be done by then, with fewer seeds or steps where needed")
    parser.add_argument("--steps", type=int, help="of every model; default: what the task has, or what --minutes allows")
    parser.add_argument("--rates", default=",".join(f"{x:g}" for x in training.RATES), help="peak rates to choose from; default: %(default)s")
    parser.add_argument("--key-length", choices=("2", "3", "auto"), default="3", help="symbols of a Diffuse MQAR key; auto: 2 if no pilot learns 3")
    parser.add_argument("--width", type=int, default=128, help="of every model; default: %(default)s")
    parser.add_argument("--layers", type=int, help="of every model; default: each one's own, matched in parameters")
    parser.add_argument("--batch", type=int, help="examples a step; default: the task's")
    parser.add_argument("--examples", type=int, default=2000, help="of a test; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/paper"), help="folder of runs, tables and pictures; default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=int, default=min(8, max(0, cores() - 1)), help="processes that make batches; default: %(default)s")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel from the host; else a training step is one CUDA graph")
    parser.add_argument("--no-influence", action="store_true", help="leave the influence curves out")
    preset = parser.parse_known_args(args)[0].preset
    parser.set_defaults(**PRESETS[preset])
    found = parser.parse_args(args)
    for name, known in (("tasks", tasks.TASKS), ("models", models.MODELS)):
        given = getattr(found, name).split(",")
        if not set(given) <= set(known):
            parser.error(f"--{name}: some of {','.join(known)}, with commas between; got {getattr(found, name)}")
        setattr(found, name, tuple(x for x in known if x in given))
    return found


def main(args: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    options = options_of(args)
    if {"llama", "mamba2"} & set(options.models):
        models.need_transformers()
    device = find_device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # tests are in float32
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = None if options.minutes is None else time.monotonic() + 60.0 * options.minutes
    machine = Machine(options.out, device, options.workers, not options.no_graphs, deadline)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn(),
               TimeRemainingColumn())
    late = False
    with Progress(*columns, console=console) as bars:
        shown: dict[str, TaskID] = {}

        def tell(stem: str, step: int, of: int, loss: float) -> None:
            if stem not in shown:
                for old in shown.values():
                    bars.remove_task(old)
                shown.clear()
                shown[stem] = bars.add_task(stem, total=of, loss=loss)
            bars.update(shown[stem], completed=step, loss=loss)
            if not console.is_terminal and of >= 100 and step % (of // 4 // training.CURVE_EVERY * training.CURVE_EVERY or of) == 0:
                console.print(f"{stem}: step {step} of {of}, loss {loss:.4f}", highlight=False)

        study = Study(options, machine, options.models, tuple(float(x) for x in options.rates.split(",")), console, tell)
        try:
            for name in options.tasks:
                study_task(study, name)
        except OutOfTime:
            late = True
        if not options.no_influence:
            report.write_influence(replace(machine, deadline=None), console)
    report.write_all(options.out, Console())
    again = "python benchmarks/paper/run.py " + " ".join(sys.argv[1:] if args is None else args)
    if late:
        console.print(f"the time is over; the same command goes on where this one stopped: {again}", highlight=False)
    return 0


if __name__ == "__main__":
    try:
        with packages_named():
            code = main()
    except SessaError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)

"""The paper's comparison on tasks of this folder: Sessa, Sessa without feedback, Llama and Mamba-2, matched in parameters, tokens, steps and schedule.

    python benchmarks/paper/run.py                       # everything: Diffuse MQAR, SymbolSoup, language model; two seeds
    python benchmarks/paper/run.py --preset quick        # eight minutes: Diffuse MQAR with keys of two symbols, all four models
    python benchmarks/paper/run.py --tasks mqar --seeds 3 --minutes 30

Each model takes the best of three rates by validation loss, found on seed 0 at a fifth of the steps, or the one that --rates gives it. Finished runs are
files under --out and are never made again; a run that was cut short goes on. One is made on every GPU there is (--jobs). --minutes ends in time: fewer
steps, down to half of a task's, then fewer seeds, then fewer tasks, then fewer steps still, for all models alike; with --steps it cuts the last runs.
What comes out is printed and written as table.json, table.md and pictures, whatever it says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import models
import report
import tasks
import torch
import training
from choices import options_of, places_of
from crew import Crew, Job, OutOfTime, Tell
from door import leave
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from training import Machine, Setting

from sessa_deploy.errors import UserError
from sessa_deploy.files import write_whole
from sessa_deploy.runtime.environment import cores

SEARCH = 5  # a search for the rate takes steps / SEARCH
PILOTS, PILOT_RATE, LEARNT = ("sessa", "llama"), 1e-3, 0.5
LEAST_STEPS, MOST_STEPS = 200, 16000
SHARE = 0.78  # of the time at hand that runs may take; the rest is for tests, curves and what was measured wrongly


@dataclass(frozen=True)
class Work:
    """What a worker is handed: a run of the task `name` with keys of `key` symbols, or with `timed` the seconds of one of its steps."""

    name: str
    key: int
    setting: Setting
    test: bool = True
    weights: bool = True
    timed: bool = False


@lru_cache(maxsize=3)
def _task(name: str, key: int, examples: int, batch: int | None) -> tasks.Task:
    """Kept: a task reads or makes its data once a process."""
    task = tasks.make(name, key, examples)
    if batch is not None:
        task.batch_size = batch
    if name == "mqar" and key != 3:
        task.name = f"mqar-key{key}"
    return task


def make_task(name: str, options: argparse.Namespace, key: int) -> tasks.Task:
    """The task as the options want it; another key length is another task in every file's name."""
    return _task(name, key, options.examples, options.batch)


def task_called(name: str, options: argparse.Namespace) -> tasks.Task:
    """The task whose files stand in a folder of this name."""
    kind, _, key = name.partition("-key")
    return make_task(kind, options, int(key or 3))


def perform(options: argparse.Namespace, machine: Machine, threads: int | None, place: str, work: Work, tell: Tell) -> Any:
    """What a worker does at its place, a device."""
    device = torch.device(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # tests are in float32
    task, here, setting = make_task(work.name, options, work.key), replace(machine, device=device), work.setting
    if {"llama", "mamba2"} & {setting.model}:
        models.need_transformers()
    if work.timed:
        return training.step_seconds(setting, task, here)
    if here.left < 0 and training.finished(setting, here.folder) is None:
        raise OutOfTime
    return training.run(setting, task, here, lambda step, of, loss: tell(setting.stem, step, of, loss), work.test, work.weights)


@dataclass
class Study:
    """One call: what is to be done, where, by whom, and who hears of it."""

    options: argparse.Namespace
    machine: Machine
    names: tuple[str, ...]
    rates: Mapping[str, Sequence[float]]  # of each model
    console: Console
    crew: Crew

    @property
    def devices(self) -> int:
        """How many work beside each other; several processes of one share it."""
        return len(set(self.crew.places))

    def setting(self, task: str, model: str, seed: int, lr: float, steps: int) -> Setting:
        """A run of this study's size."""
        return Setting(task, model, seed, lr, steps, self.options.width, self.options.layers)

    def make(self, jobs: Iterable[Job], then: Callable[[Job, dict[str, Any]], Iterable[Job]] = lambda job, result: ()) -> None:
        """Runs, and those that `then`, told of each result, adds; read from their files where they are finished."""

        def left(job: Job) -> list[Job]:
            found = training.finished(job.work.setting, self.machine.folder)
            if found is None or (job.work.test and "test" not in found and found["validation"] is not None):
                return [job]
            return [more for following in then(job, found) for more in left(following)]

        def made(job: Job, result: dict[str, Any]) -> list[Job]:
            self.console.print(f"{job.name}: {report.line(result)}", highlight=False)
            return [more for following in then(job, result) for more in left(following)]

        self.crew.run([more for job in jobs for more in left(job)], made)


def seconds_per_step(study: Study, name: str, key: int) -> dict[str, float]:
    """Seconds of a step of every model that has a GPU to itself, measured once a folder and device."""
    task = make_task(name, study.options, key)
    device = torch.cuda.get_device_name(study.machine.device) if study.machine.device.type == "cuda" else "cpu"
    path = study.machine.folder / task.name / "seconds_per_step.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)

    def measured(job: Job, seconds: float) -> tuple[Job, ...]:
        model = job.work.setting.model
        known[f"{device}: {model}"] = seconds
        study.console.print(f"{task.title}, {models.TITLES[model]}: {1e3 * seconds:.1f} ms a step", highlight=False)
        write_whole(path, json.dumps(known, indent=1) + "\n", "--out", "the times of a step")
        return ()

    study.crew.run([Job(f"{task.name}, a step of {model}", Work(name, key, study.setting(task.name, model, 0, PILOT_RATE, 100), timed=True))
                    for model in study.names if f"{device}: {model}" not in known], measured, alone=True)
    return {model: known[f"{device}: {model}"] for model in study.names}


def fit_steps(seconds: Mapping[str, float], budget: float, wanted: int, seeds: Mapping[str, int], rates: Mapping[str, Sequence[float]],
              pilots: Sequence[str] = (), most: int | None = None) -> tuple[int, int]:
    """(steps, most seeds of a model) that fit into `budget` seconds: more steps than wanted up to `most`, else fewer seeds, then fewer steps for all models
    alike. rates: those to be searched of each model, which one that is given needs not."""
    for count in range(max(seeds.values()), 0, -1):
        cost = sum(x * (min(count, seeds[name]) + searched(rates.get(name, ())) / SEARCH) for name, x in seconds.items())
        cost += sum(seconds.get(name, 0.0) for name in pilots)
        if wanted * cost <= budget:
            return min(max(wanted, most or wanted), max(wanted, int(budget / cost) // 100 * 100)), count
    return max(LEAST_STEPS, int(budget / cost) // 100 * 100), 1


def searched(rates: Sequence[float]) -> int:
    """How many rates a model tries: a single one is taken as it is."""
    return len(rates) if len(rates) > 1 else 0


@dataclass
class Plan:
    """What a task's runs are. steps None: to be found from the time that is left after the search. seeds: how many of each model. seconds: of a step of each
    model, where measured."""

    key: int
    search: int
    steps: int | None
    seeds: dict[str, int]
    seconds: dict[str, float]


def plan(study: Study, name: str) -> Plan:
    """The plan of a task; what was decided in this folder before stands."""
    options, path = study.options, study.machine.folder / f"{name}-plan.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    auto = options.key_length == "auto" and name == "mqar"
    key = int(known.get("key", 3)) if options.key_length == "auto" else int(options.key_length)
    task = make_task(name, options, key)
    fixed = options.steps or known.get("steps")
    steps, seeds, seconds = fixed or task.steps, options.seeds, {}
    if options.minutes is not None and not fixed:
        seconds = seconds_per_step(study, name, key)
        budget = max(1.0, SHARE * study.machine.left * study.devices)
        pilots = PILOTS if auto and "key" not in known else ()
        steps, most = fit_steps(seconds, budget, task.steps // 2, seeds, study.rates, pilots, MOST_STEPS)
        seeds = _at_most(seeds, most)
    if auto and "key" not in known:
        key = known["key"] = pilot(study, task, steps)
    search = int(known.get("search", max(1, steps // SEARCH)))
    found = Plan(key, search, None if options.minutes is not None and not fixed else steps, seeds, seconds)
    _decided(study, name, known | {"search": search} | ({} if found.steps is None else {"steps": steps}))
    return found


def _at_most(seeds: Mapping[str, int], most: int) -> dict[str, int]:
    return {model: min(count, most) for model, count in seeds.items()}


def _decided(study: Study, name: str, what: dict[str, Any]) -> None:
    write_whole(study.machine.folder / f"{name}-plan.json", json.dumps(what, indent=1) + "\n", "--out", "the plan")


def pilot(study: Study, task: tasks.Task, steps: int) -> int:
    """3 where Sessa or Llama learns keys of three symbols in these steps, else 2, which is easier. Their runs count where the rate is the one chosen."""
    learnt: list[str] = []

    def judged(job: Job, result: dict[str, Any]) -> tuple[Job, ...]:
        if result["validation"] is not None and result["validation"]["accuracy"] > LEARNT:
            learnt.append(job.name)
        return ()

    settings = [study.setting(task.name, model, 0, PILOT_RATE, steps) for model in PILOTS if model in study.names]
    study.make([Job(setting.stem, Work("mqar", 3, setting, test=False)) for setting in settings], judged)
    if not learnt:
        study.console.print(f"neither of {', '.join(PILOTS)} exceeds {LEARNT} on keys of three symbols in {steps} steps: keys of two", highlight=False)
    return 3 if learnt else 2


def best_rate(model: str, title: str, losses: dict[float, float | None]) -> float:
    """The rate with the lowest validation loss; None: it diverged."""
    found = {loss: lr for lr, loss in losses.items() if loss is not None}
    if not found:
        raise UserError("every rate diverged", got=f"{model} on {title} at {', '.join(map(str, losses))}", fix="give smaller --rates")
    return found[min(found)]


def study_task(study: Study, name: str) -> None:
    """Everything of one task: each model's rates, then its seeds; a table of what is finished, whatever ends it. With a deadline the steps of the seeds are
    fitted to what the search really took."""
    plan_ = plan(study, name)
    task, seeds, steps = make_task(name, study.options, plan_.key), plan_.seeds, plan_.steps
    cost = {model: plan_.seconds.get(model, 3.0 if model == "mamba2" else 1.0) for model in study.names}  # unmeasured: the PyTorch scan is the slow one
    losses: dict[str, dict[float, float | None]] = {model: {} for model in study.names}
    rates = {model: study.rates[model][0] for model in study.names if not searched(study.rates[model])}
    order, alike = list(seeds), len(set(seeds.values())) == 1

    def job(setting: Setting, stage: int, whole: bool = True) -> Job:
        seconds = cost[setting.model] * setting.steps if len(study.crew.places) > 1 else 0.0  # one after the other: as they were asked for
        return Job(setting.stem, Work(name, plan_.key, setting, test=whole, weights=whole), stage, seconds)

    def whole(model: str, of: int) -> list[Job]:
        settings = [study.setting(task.name, model, seed, rates[model], of) for seed in range(seeds[model])]
        return [job(s, 1 + (s.seed if alike else order.index(model))) for s in settings]

    def judged(job: Job, result: dict[str, Any]) -> list[Job]:
        if job.stage > 0:
            return []
        setting = job.work.setting
        losses[setting.model][setting.lr] = None if result["validation"] is None else result["validation"]["loss"]
        if len(losses[setting.model]) < len(study.rates[setting.model]):
            return []
        rates[setting.model] = best_rate(setting.model, task.title, losses[setting.model])
        return [] if steps is None else whole(setting.model, steps)

    search = [study.setting(task.name, model, 0, lr, plan_.search) for model in study.names if model not in rates for lr in study.rates[model]]
    missing = sum(cost[s.model] * s.steps for s in search if training.finished(s, study.machine.folder) is None)
    begin = time.monotonic()
    what = f"rates by {plan_.search} steps" if search else f"{steps or 'as many'} steps{'' if steps else ' as fit'}"
    study.console.print(f"{task.title}: {what} of {task.batch_size} x {task.length} tokens; {len(study.crew.places)} at once on "
                        f"{study.devices} device{'s' * (study.devices > 1)}", highlight=False)
    try:
        given = [] if steps is None else [job for model in order if model in rates for job in whole(model, steps)]
        study.make([*(job(s, 0, whole=False) for s in search), *given], judged)
        if steps is None:
            took = time.monotonic() - begin
            gain = missing / took if plan_.seconds and missing and took > 1.0 else float(study.devices)
            budget = max(1.0, SHARE * study.machine.left * gain)
            steps, most = fit_steps(cost, budget, task.steps // 2, seeds, {}, (), MOST_STEPS)
            seeds = _at_most(seeds, most)
            _decided(study, name, {"key": plan_.key, "search": plan_.search, "steps": steps})
            study.console.print(f"{task.title}: {steps} steps, {most} seed{'s' * (most > 1)}; the search did {gain:.1f} seconds of runs a second",
                                highlight=False)
            study.make([job for model in order for job in whole(model, steps)])
    finally:
        settings = [study.setting(task.name, model, seed, rates[model], steps or 0) for model in study.names if model in rates for seed in range(seeds[model])]
        done = [s for s in settings if training.finished(s, study.machine.folder) is not None]
        if done:
            report.write_task(study.machine.folder, task, done, study.rates, plan_.search)


class Bars(Progress):
    """A bar for every run at work on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        super().__init__(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
                         TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self.shown: dict[str, TaskID] = {}

    def tell(self, stem: str, step: int, of: int, loss: float) -> None:
        """Step `step` of `of` of a run is done."""
        if stem not in self.shown:
            self.shown[stem] = self.add_task(stem, total=of, loss=loss)
        self.update(self.shown[stem], completed=step, loss=loss)
        if step >= of:
            self.remove_task(self.shown.pop(stem))
        if not self.console.is_terminal and of >= 100 and step % (of // 4 // training.CURVE_EVERY * training.CURVE_EVERY or of) == 0:
            self.console.print(f"{stem}: step {step} of {of}, loss {loss:.4f}", highlight=False)


def main(args: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    options = options_of(args, __doc__)
    if {"llama", "mamba2"} & set(options.models):
        models.need_transformers()
    device, places = places_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = None if options.minutes is None else time.monotonic() + 60.0 * options.minutes
    workers = min(8, max(0, cores() - len(places)) // len(places)) if options.workers is None else options.workers
    machine = Machine(options.out, device, workers, not options.no_graphs, deadline)
    console = Console(stderr=True)
    late = False
    with Bars(console) as bars:
        do = partial(perform, options, machine, None if len(places) == 1 else max(1, cores() // len(places)))
        with Crew(places, do, bars.tell) as crew:
            study = Study(options, machine, options.models, options.rates, console, crew)
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
    leave(main)

"""The paper's comparison on tasks of this folder: Sessa, Sessa without feedback, Llama and Mamba-2, matched in parameters, tokens, steps and schedule.

    python benchmarks/paper/run.py                       # everything: Diffuse MQAR, SymbolSoup, language model; two seeds
    python benchmarks/paper/run.py --preset quick        # eight minutes: Diffuse MQAR with keys of two symbols, all four models
    python benchmarks/paper/run.py --tasks mqar --seeds 3 --minutes 30

Each model takes the best of three rates by validation loss, found on seed 0 at a fifth of the steps. Finished runs are files under --out and are never made
again; a run that was cut short goes on. Several are made beside each other, on all GPUs there are (--jobs). --minutes ends in time: fewer steps, down to
half of a task's, then fewer seeds, then fewer tasks, then fewer steps still, for all models alike.
What comes out is printed and written as table.json, table.md and pictures, whatever it says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import models
import report
import tasks
import torch
import training
from crew import Crew, Job, OutOfTime, Tell
from door import leave
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from training import Machine, Setting

from sessa_deploy.errors import UserError
from sessa_deploy.files import write_whole
from sessa_deploy.runtime.environment import cores
from sessa_deploy.train_options import find_device

SEARCH = 5  # a search for the rate takes steps / SEARCH
PILOTS, PILOT_RATE, LEARNT = ("sessa", "llama"), 1e-3, 0.5
LEAST_STEPS, MOST_STEPS = 200, 16000
SHARE = 0.78  # of the time at hand that runs may take; the rest is for tests, curves and what was measured wrongly
JOBS_PER_GPU = 4
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {"tasks": "mqar", "seeds": 2, "minutes": 8.0, "key_length": "2", "rates": "1e-3,2e-3,4e-3"},
    "tiny": {"seeds": 1, "steps": 10, "width": 32, "layers": 2, "examples": 20, "batch": 4, "rates": "1e-3,2e-3", "workers": 0},
}


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
    rates: tuple[float, ...]
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


def fit_steps(seconds: dict[str, float], budget: float, wanted: int, seeds: int, pilots: Sequence[str] = (), most: int | None = None,
              rates: int = len(training.RATES)) -> tuple[int, int]:
    """(steps, seeds) that fit into `budget` seconds: more steps than wanted up to `most`, else fewer seeds, then fewer steps for all models alike. rates: how
    many are searched, 0 where that is done."""
    whole = sum(seconds.values())
    for count in range(seeds, 0, -1):
        cost = whole * (count + rates / SEARCH) + sum(seconds.get(name, 0.0) for name in pilots)
        if wanted * cost <= budget:
            return min(max(wanted, most or wanted), max(wanted, int(budget / cost) // 100 * 100)), count
    return max(LEAST_STEPS, int(budget / cost) // 100 * 100), 1


@dataclass
class Plan:
    """What a task's runs are. steps None: to be found from the time that is left after the search. seconds: of a step of each model, where measured."""

    key: int
    search: int
    steps: int | None
    seeds: int
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
        steps, seeds = fit_steps(seconds, budget, task.steps // 2, options.seeds, PILOTS if auto and "key" not in known else (), MOST_STEPS, len(study.rates))
    if auto and "key" not in known:
        key = known["key"] = pilot(study, task, steps)
    search = int(known.get("search", max(1, steps // SEARCH)))
    found = Plan(key, search, None if options.minutes is not None and not fixed else steps, seeds, seconds)
    _decided(study, name, known | {"search": search} | ({} if found.steps is None else {"steps": steps}))
    return found


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
    rates: dict[str, float] = {}

    def whole(model: str, of: int) -> list[Job]:
        settings = [study.setting(task.name, model, seed, rates[model], of) for seed in range(seeds)]
        return [Job(s.stem, Work(name, plan_.key, s), 1 + s.seed, cost[model] * of) for s in settings]

    def searched(job: Job, result: dict[str, Any]) -> list[Job]:
        if job.stage > 0:
            return []
        setting = job.work.setting
        losses[setting.model][setting.lr] = None if result["validation"] is None else result["validation"]["loss"]
        if len(losses[setting.model]) < len(study.rates):
            return []
        rates[setting.model] = best_rate(setting.model, task.title, losses[setting.model])
        return [] if steps is None else whole(setting.model, steps)

    search = [study.setting(task.name, model, 0, lr, plan_.search) for model in study.names for lr in study.rates]
    missing = sum(cost[s.model] * s.steps for s in search if training.finished(s, study.machine.folder) is None)
    begin = time.monotonic()
    study.console.print(f"{task.title}: rates by {plan_.search} steps of {task.batch_size} x {task.length} tokens; {len(study.crew.places)} at once on "
                        f"{study.devices} device{'s' * (study.devices > 1)}", highlight=False)
    try:
        study.make([Job(s.stem, Work(name, plan_.key, s, test=False, weights=False), 0, cost[s.model] * s.steps) for s in search], searched)
        if steps is None:
            took = time.monotonic() - begin
            gain = missing / took if plan_.seconds and missing and took > 1.0 else float(study.devices)
            budget = max(1.0, SHARE * study.machine.left * gain)
            steps, seeds = fit_steps(cost, budget, task.steps // 2, seeds, (), MOST_STEPS, 0)
            _decided(study, name, {"key": plan_.key, "search": plan_.search, "steps": steps})
            study.console.print(f"{task.title}: {steps} steps, {seeds} seed{'s' * (seeds > 1)}; the search did {gain:.1f} seconds of runs a second",
                                highlight=False)
            study.make([job for model in study.names for job in whole(model, steps)])
    finally:
        settings = [study.setting(task.name, model, seed, rates[model], steps or 0) for seed in range(seeds) for model in study.names if model in rates]
        done = [s for s in settings if training.finished(s, study.machine.folder) is not None]
        if done:
            report.write_task(study.machine.folder, task, done, study.rates, plan_.search)


def options_of(args: Sequence[str] | None) -> argparse.Namespace:
    """The options, a preset's where one is not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full", help="quick: eight minutes of two GPUs; tiny: a rehearsal on a CPU")
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
    parser.add_argument("--jobs", type=int, help=f"runs beside each other; default: {JOBS_PER_GPU} a visible GPU, 1 on a CPU")
    parser.add_argument("--workers", type=int, help="processes that make the batches of one run; default: the cores that runs leave, at most 8")
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


def places_of(options: argparse.Namespace) -> tuple[torch.device, list[str]]:
    """(the device that names the machine, the places of the crew): all visible GPUs in turn, or the one that --device names."""
    device = find_device(options.device)
    if options.jobs is not None and options.jobs < 1:
        raise UserError("runs beside each other are counted from 1", got=f"--jobs {options.jobs}", allowed="an integer >= 1")
    if device.type != "cuda":
        return device, ["cpu"] * (options.jobs or 1)
    one = device.index is not None
    gpus = [str(device)] if one else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    jobs = options.jobs or max(1, min(JOBS_PER_GPU * len(gpus), cores() // 2))
    return torch.device(gpus[0]), [gpus[i % len(gpus)] for i in range(jobs)]


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
    options = options_of(args)
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
            study = Study(options, machine, options.models, tuple(float(x) for x in options.rates.split(",")), console, crew)
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

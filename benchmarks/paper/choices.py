"""The options of run.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import tasks
import torch
import training

from sessa_deploy.errors import UserError
from sessa_deploy.train_options import find_device

PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {"tasks": "mqar", "seeds": 2, "minutes": 8.0, "key_length": "2", "rates": "1e-3,2e-3,4e-3"},
    "tiny": {"seeds": 1, "steps": 10, "width": 32, "layers": 2, "examples": 20, "batch": 4, "rates": "1e-3,2e-3", "workers": 0},
}


def options_of(args: Sequence[str] | None, told: str | None = None) -> argparse.Namespace:
    """The options, a preset's where one is not given. told: what --help says. rates and seeds are dicts: model -> rates (a tuple), how many seeds."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full", help="quick: eight minutes of two GPUs; tiny: a rehearsal on a CPU")
    parser.add_argument("--tasks", default=",".join(tasks.TASKS), help="with commas between; default: %(default)s, in this order")
    parser.add_argument("--models", default=",".join(models.MODELS), help="with commas between; default: %(default)s")
    parser.add_argument("--seeds", default="2", help="how many; sessa=2,llama=1: those of each model, one model after the other; default: %(default)s")
    parser.add_argument("--minutes", type=float, help="be done by then, with fewer seeds or steps where needed")
    parser.add_argument("--steps", type=int, help="of every model; default: what the task has, or what --minutes allows")
    parser.add_argument("--rates", default=",".join(f"{x:g}" for x in training.RATES),
                        help="peak rates to choose from; sessa=2e-3,llama=4e-3: those of each model, and a single one is taken as it is; default: %(default)s")
    parser.add_argument("--key-length", choices=("2", "3", "auto"), default="3", help="symbols of a Diffuse MQAR key; auto: 2 if no pilot learns 3")
    parser.add_argument("--width", type=int, default=128, help="of every model; default: %(default)s")
    parser.add_argument("--layers", type=int, help="of every model; default: each one's own, matched in parameters")
    parser.add_argument("--batch", type=int, help="examples a step; default: the task's")
    parser.add_argument("--examples", type=int, default=2000, help="of a test; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/paper"), help="folder of runs, tables and pictures; default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--jobs", type=int, help="runs beside each other; default: one a visible GPU, on which more gain nothing; 1 on a CPU")
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
    rates, seeds = (_by_model(parser, name, getattr(found, name), found.models, kind) for name, kind in (("rates", float), ("seeds", int)))
    if any(len(given) != 1 for given in seeds.values()):
        parser.error("--seeds: one number a model")
    found.rates, found.seeds = rates, {model: count for model, (count,) in seeds.items()}
    return found


def _by_model(parser: argparse.ArgumentParser, name: str, text: object, wanted: Sequence[str], kind: Callable[[str], Any]) -> dict[str, tuple[Any, ...]]:
    """What "1,2" or "sessa=1,llama=2" says of every model, those named first; what stands without a name is for all that are not named."""
    found: dict[str, tuple[Any, ...]] = {}
    for part in str(text).split(","):
        model, _, value = part.rpartition("=")
        try:
            number = kind(value)
        except ValueError:
            number = 0
        if not number > 0 or number == math.inf or (model and model not in models.MODELS):
            parser.error(f"--{name}: positive numbers with commas between, or MODEL=NUMBER with one of {', '.join(models.MODELS)}; got {text}")
        found[model] = (*found.get(model, ()), number)
    missing = [model for model in wanted if model not in found and "" not in found]
    if missing:
        parser.error(f"--{name}: none is given for {', '.join(missing)}; got {text}")
    return {model: tuple(dict.fromkeys(found.get(model, found.get("", ())))) for model in dict.fromkeys((*found, *wanted)) if model in wanted}


def places_of(options: argparse.Namespace) -> tuple[torch.device, list[str]]:
    """(the device that names the machine, the places of the crew): all visible GPUs in turn, or the one that --device names."""
    device = find_device(options.device)
    if options.jobs is not None and options.jobs < 1:
        raise UserError("runs beside each other are counted from 1", got=f"--jobs {options.jobs}", allowed="an integer >= 1")
    if device.type != "cuda":
        return device, ["cpu"] * (options.jobs or 1)
    one = device.index is not None
    gpus = [str(device)] if one else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return torch.device(gpus[0]), [gpus[i % len(gpus)] for i in range(options.jobs or len(gpus))]

"""What a training run is told: TrainOptions, each value checked before any work."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import torch

from sessa_deploy.checks import as_flag, as_integer, as_number, integer
from sessa_deploy.errors import UserError

MAX_SEED = 2**64 - 1  # what torch.manual_seed takes
_MAX_COUNT = 2**31 - 1
_COUNTS = ("steps", "batch_size", "accumulate", "context", "eval_every", "save_every")
# name -> (low, high, whether the ends belong to the range)
_NUMBERS = {
    "lr": (0.0, math.inf, False), "grad_clip": (0.0, math.inf, False), "max_seconds": (0.0, math.inf, False), "held_out": (0.0, 1.0, False),
    "weight_decay": (0.0, math.inf, True), "beta1": (0.0, 1.0, True), "beta2": (0.0, 1.0, True),
}
_WORDS = {"precision": ("auto", "fp32", "bf16"), "store": ("fp32", "fp16", "bf16")}


@dataclass(frozen=True)
class TrainOptions:
    """One run. data: folder of text; out: the run's folder. steps: optimizer steps of the whole schedule. batch_size: windows a micro-batch;
    accumulate: micro-batches a step; context: tokens a window. lr: peak; warmup: steps, 0 for none, None for 2% (at most 500); the cosine ends at 0.
    max_seconds: end of the schedule by the clock, should it come before `steps` (such a run is not reproducible). held_out: fraction of files.
    precision: "bf16" (autocast) or "fp32"; "auto" is bf16 on a GPU. store: storage type of the checkpoint. init_from: a checkpoint whose weights,
    configuration and tokenizer the run begins with, None for random weights; init_config: its config.json where none lies beside it.
    batch_size is a process's; global_batch fixes the windows of a step over all processes, and with them accumulate. shard: parameters, gradients and
    moments dealt out over the processes (FSDP2). compile: torch.compile of the loss and of one layer for all. activation_checkpointing: layers are
    computed anew in the backward. cuda_graph: replay a step as one CUDA graph (one process, a GPU). keep_sample: leave the beginning of the held-out text
    in the checkpoint; data_licence: of the text, for its card. Numpy's numbers are taken too. Raises UserError out of range.
    """

    data: str
    out: str
    steps: int = 2000
    batch_size: int = 16
    accumulate: int = 1
    context: int = 256
    lr: float = 2e-3
    warmup: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    seed: int = 0
    held_out: float = 0.05
    extensions: tuple[str, ...] = ()
    tokenizer: str | None = None
    device: str = "auto"
    precision: str = "auto"
    store: str = "fp32"
    eval_every: int = 500
    save_every: int = 500
    max_seconds: float | None = None
    global_batch: int | None = None
    shard: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    cuda_graph: bool = False
    init_from: str | None = None
    init_config: str | None = None
    keep_sample: bool = False
    data_licence: str | None = None

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            if not str(getattr(self, name)):
                raise UserError(f"{name} is empty", got=repr(getattr(self, name)), allowed="a path")
        for name in ("data", "out", "tokenizer", "init_from", "init_config"):
            if getattr(self, name) is not None:  # resume.pt holds plain values
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        for name in _COUNTS:
            self._set_integer(name, 1, _MAX_COUNT, "an integer >= 1")
        if self.warmup is not None:
            self._set_integer("warmup", 0, _MAX_COUNT, "an integer >= 0, 0 for no warm-up")
        self._set_integer("seed", 0, MAX_SEED, "an integer in 0..2^64-1")
        for name, (low, high, closed) in _NUMBERS.items():
            if getattr(self, name) is not None or name != "max_seconds":
                self._set_number(name, low, high, closed)
        if self.global_batch is not None:
            self._set_integer("global_batch", 1, _MAX_COUNT, "an integer >= 1")
        for name in ("shard", "compile", "activation_checkpointing", "cuda_graph"):
            flag = as_flag(getattr(self, name))
            if flag is None:
                raise UserError(f"{name} is neither true nor false", got=repr(getattr(self, name)), allowed="True, False")
            object.__setattr__(self, name, flag)
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is unknown", got=getattr(self, name), allowed=", ".join(allowed))
        if self.cuda_graph and self.compile:
            raise UserError("a compiled step is not captured", got="--cuda-graph with --compile", fix="leave one of them out: --cuda-graph is the faster one")
        if isinstance(self.extensions, str) or not all(isinstance(x, str) and x.lstrip(".") for x in self.extensions):
            raise UserError("extensions are no list of file name endings", got=repr(self.extensions), allowed="such as ('py', 'md')")
        if self.data_licence is not None and not self.keep_sample:
            raise UserError("the licence is for the card of a sample", got=f"--data-licence {self.data_licence}", fix="add --keep-sample, or leave it out")
        if self.init_config is not None and self.init_from is None:
            raise UserError("a configuration belongs to a checkpoint to start from", got=f"--config {self.init_config}", fix="add --init-from CHECKPOINT")

    def _set_integer(self, name: str, low: int, high: int, allowed: str) -> None:
        value = getattr(self, name)
        beyond = (as_integer(value) or low) > high
        object.__setattr__(self, name, integer(name, value, low, high, None if beyond else allowed))

    def _set_number(self, name: str, low: float, high: float, closed: bool) -> None:
        value = getattr(self, name)
        number = as_number(value)
        if number is None or not (low < number or (closed and low == number)) or not number < high:
            allowed = f"a number in {'[' if closed else '('}{low:g}, {high:g})"
            if high == math.inf:
                allowed = f"a number {'>=' if closed else '>'} {low:g}, and finite"
            raise UserError(f"{name} is out of range", got=repr(value), allowed=allowed)
        object.__setattr__(self, name, number)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up; 0 begins at the peak."""
        return min(500, max(1, self.steps // 50)) if self.warmup is None else self.warmup

    @property
    def torch_device(self) -> torch.device:
        """The device to train on: "auto" is the GPU where there is one. Raises UserError on one that is not there or is none to train on."""
        return find_device(str(self.device), "train with --device cpu, or run: sessa-deploy doctor")

    def device_of(self, local: int, processes: int) -> torch.device:
        """The device of process number `local` of those of this machine: of several, each has a GPU of its own or none has."""
        found = self.torch_device
        if processes == 1 or found.type == "cpu":
            return found
        count = torch.cuda.device_count()
        if found.index is not None or processes > count:
            raise UserError("the processes cannot have a GPU each", got=f"--device {self.device}, {processes} processes and {count} GPUs on this machine",
                            allowed="auto or cuda, and at most as many processes as GPUs", fix="--device cuda with fewer processes, or --device cpu")
        return torch.device("cuda", local)

    def share(self, processes: int) -> Share:
        """What each of so many processes does of a step. Raises UserError where global_batch cannot be dealt out so."""
        if self.global_batch is None:
            return Share(processes, self.batch_size, self.accumulate)
        each = self.batch_size * processes
        said = f"--global-batch {self.global_batch}, --batch-size {self.batch_size} and {_count(processes, 'process', 'processes')}"
        if self.global_batch % each:
            raise UserError("the global batch is no multiple of what the processes take at once", got=said, allowed=f"a multiple of {each}",
                            fix="change --global-batch, --batch-size or the number of processes")
        accumulate = self.global_batch // each
        if self.accumulate not in (1, accumulate):
            raise UserError("the global batch and the accumulation contradict each other", got=f"{said}, --accumulate {self.accumulate}",
                            allowed=f"--accumulate {accumulate}", fix="leave --accumulate out")
        return Share(processes, self.batch_size, accumulate)

    def reshared(self, processes: int, saved_processes: int, batch_size: int | None = None) -> TrainOptions:
        """The options of a run of `saved_processes` processes that `processes` go on with: the windows of a step stay, and where batch_size does not fit any
        more the largest smaller one that does is taken. Raises UserError where there is none, or where the batch_size that is given does not fit."""
        if processes == saved_processes and batch_size in (None, self.batch_size):
            return self
        windows = self.share(saved_processes).windows
        each, rest = divmod(windows, processes)
        if rest:
            raise UserError("the run's global batch cannot be dealt out over these processes", got=f"{windows} windows a step and {processes} processes",
                            allowed="a number of processes that divides it", fix="start as many processes as before, or a divisor of the windows")
        if batch_size is not None and each % batch_size:
            raise UserError("the run's global batch is no multiple of what the processes take at once", allowed=f"a divisor of {each}",
                            got=f"--batch-size {batch_size}, {_count(processes, 'process', 'processes')} and {windows} windows a step")
        fits = batch_size or next(size for size in range(min(self.batch_size, each), 0, -1) if each % size == 0)
        return dataclasses.replace(self, batch_size=fits, accumulate=each // fits, global_batch=windows)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for reports and for resume.pt."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Share:
    """What each of `processes` processes does of an optimizer step: `accumulate` micro-batches of batch_size windows."""

    processes: int
    batch_size: int
    accumulate: int

    @property
    def windows(self) -> int:
        """Windows of a step, all processes together: the global batch."""
        return self.processes * self.batch_size * self.accumulate


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def find_device(name: str, fix: str = "give --device cpu, or run: sessa-deploy doctor") -> torch.device:
    """The device of a name; "auto" is the GPU where there is one. Raises UserError on one that is not there or is none of ours."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name)
    if found is None:
        raise UserError("no such device", got=f"--device {name}", allowed="auto, cpu, cuda, or cuda:N for GPU number N")
    if name == "cpu":
        return torch.device(name)
    if not count:
        raise UserError("no CUDA GPU", got=f"--device {name}", fix=fix)
    if int(found[1] or 0) >= count:
        raise UserError("no such device", got=f"--device {name}", allowed=", ".join(["auto", "cpu", "cuda", *(f"cuda:{i}" for i in range(count))]))
    return torch.device(name)


def learning_rate(options: TrainOptions, step: int, progress: float) -> float:
    """Learning rate of step `step` (from 0) when `progress` in 0..1 of the schedule is behind: linear warm-up times a cosine to zero."""
    risen = min(1.0, (step + 1) / options.warmup_steps) if options.warmup_steps else 1.0
    return options.lr * risen * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

"""One run: a model trained on a task with a seed, a rate and a number of steps. A finished one is a file; one that was cut short goes on where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
import torch.nn.functional as F
from common import machine as machine_facts
from crew import OutOfTime
from tasks import Task, asked
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sessa_deploy.files import write_whole
from sessa_deploy.train_options import TrainOptions, learning_rate
from sessa_deploy.train_run import parameter_groups

RATES = (5e-4, 1e-3, 2e-3)
CURVE_EVERY = 20  # steps of one point of a loss curve
KEEP_EVERY = 60.0  # seconds between two saves of a run that goes on
Tell = Callable[[int, int, float], None]  # (steps done, of how many, loss)


@dataclass(frozen=True)
class Setting:
    """What one run is. width: of the model. layers: None takes the model's own."""

    task: str
    model: str
    seed: int
    lr: float
    steps: int
    width: int = 128
    layers: int | None = None

    @property
    def stem(self) -> str:
        """The name of its files."""
        size = f"w{self.width}" + ("" if self.layers is None else f"l{self.layers}")
        return f"{self.task}/{self.model}-{size}-seed{self.seed}-lr{self.lr:g}-steps{self.steps}"

    def options(self, task: Task) -> TrainOptions:
        """Schedule, decay and clipping, as `sessa-deploy train` has them; 2% of warm-up."""
        return TrainOptions(data=task.name, out=self.stem, steps=self.steps, batch_size=task.batch_size, context=task.length, lr=self.lr, seed=self.seed)


@dataclass(frozen=True)
class Machine:
    """Where and how runs are made. workers: processes that make batches. graphs: replay a step as a CUDA graph. deadline: time.monotonic() at which to stop,
    or None."""

    folder: Path
    device: torch.device
    workers: int = 0
    graphs: bool = True
    deadline: float | None = None

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return math.inf if self.deadline is None else self.deadline - time.monotonic()


class _Stream(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __init__(self, task: Task, seed: int, steps: int) -> None:
        self.task, self.seed, self.steps = task, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.task.padded_batch(self.seed, step)


def stream(task: Task, seed: int, start: int, steps: int, machine: Machine) -> Generator[tuple[Tensor, ...], None, None]:
    """The batches start..steps-1 on the device."""
    task.padded_batch(seed, start)  # what a task reads once is read here, before processes begin
    loader = DataLoader(_Stream(task, seed, steps), batch_size=None, sampler=range(start, steps), num_workers=min(machine.workers, steps - start),
                        pin_memory=machine.device.type == "cuda", prefetch_factor=8 if machine.workers else None)
    for batch in loader:
        yield tuple(x.to(machine.device, non_blocking=True) for x in batch)


def precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on a GPU; without its cache of weights, which a captured graph must not hold."""
    return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False) if device.type == "cuda" else contextlib.nullcontext()


class Stepper:
    """A training step: loss, gradients, clipping and AdamW, on a GPU as one replayed CUDA graph where the model lets itself be captured: small models wait for
    launches else. held: the optimizer's state of before, None for none."""

    def __init__(self, model: nn.Module, options: TrainOptions, device: torch.device, graphs: bool, held: dict[str, Any] | None = None) -> None:
        self.model, self.device, self.graphs, self.clip = model, device, graphs and device.type == "cuda", options.grad_clip
        self.refused: str | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, ...] = ()
        self._loss = torch.zeros((), device=device)
        on_gpu = device.type == "cuda"
        self._lr: Any = torch.zeros((), device=device) if on_gpu else 0.0
        self.optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=self._lr, betas=(options.beta1, options.beta2),  # type: ignore[arg-type]
                                           fused=on_gpu, capturable=on_gpu)
        if held is not None:
            self.optimizer.load_state_dict(held)
            for group in self.optimizer.param_groups:  # those it was saved with may be another device's
                group.update(fused=on_gpu, capturable=on_gpu)
        self._trained = [p for p in model.parameters() if p.requires_grad]

    def _compute(self, tokens: Tensor, at: Tensor, labels: Tensor) -> Tensor:
        with precision(self.device):
            logits = self.model(tokens)
        loss = F.cross_entropy(asked(logits, at).float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self.clip)
        self.optimizer.step()
        return loss.detach()

    def _forget(self) -> None:
        for p in self.model.parameters():
            p.grad = None

    def _rate(self, lr: float) -> None:
        if self.device.type == "cuda":
            self._lr.fill_(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr if self.device.type == "cuda" else lr

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        self._batch = tuple(x.clone() for x in batch)
        self._rate(0.0)  # weights stand still until the run begins
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # of an optimizer that steps before it is captured
            for _ in range(3):
                self._forget()
                eager = self._compute(*self._batch)
        torch.cuda.current_stream().wait_stream(side)
        self._forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # threads that pin batches may go on
            loss = self._compute(*self._batch)
        graph.replay()
        if not torch.isclose(loss, eager, rtol=0.01):
            raise RuntimeError(f"a replay's loss is {float(loss)}, eagerly it is {float(eager)}")
        self._graph, self._loss = graph, loss

    def prepare(self, batch: tuple[Tensor, ...]) -> None:
        """Compile and capture on a batch, before any thread makes others. Weights and the optimizer's state stay as they are."""
        if not self.graphs or self._graph is not None:
            return
        before = {p: {key: x.clone() for key, x in state.items()} for p, state in self.optimizer.state.items()}
        try:
            self._capture(tuple(x.to(self.device) for x in batch))
        except RuntimeError as error:
            self.graphs, self.refused = False, " ".join(str(error).split())[:200]
            torch.cuda.synchronize()
        for p, state in self.optimizer.state.items():
            for key, x in state.items():  # in place: the graph holds these
                x.copy_(before[p][key]) if p in before else x.zero_()

    def __call__(self, batch: tuple[Tensor, ...], lr: float) -> Tensor:
        """The loss, on the device and valid until the next call; the weights are one step on."""
        self._rate(lr)
        if self._graph is None:
            self._forget()
            return self._compute(*batch)
        for held, new in zip(self._batch, batch, strict=True):
            held.copy_(new)
        self._graph.replay()
        return self._loss


def finished(setting: Setting, folder: Path) -> dict[str, Any] | None:
    """The result of a run that was finished before, or None."""
    path = folder / f"{setting.stem}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def build(setting: Setting, task: Task) -> nn.Module:
    """The run's model before its first step, on the CPU."""
    return models.build(setting.model, task.vocabulary, setting.width, setting.layers, seed=setting.seed)


def load(setting: Setting, task: Task, folder: Path) -> nn.Module:
    """The model of a finished run, on the CPU."""
    model = build(setting, task)
    model.load_state_dict(torch.load(folder / f"{setting.stem}.pt", map_location="cpu", weights_only=True))
    return model


def _bytes(state: Any) -> bytes:
    data = io.BytesIO()
    torch.save(state, data)
    return data.getvalue()


def run(setting: Setting, task: Task, machine: Machine, tell: Tell | None = None, test: bool = True, weights: bool = True) -> dict[str, Any]:
    """Train, or go on, or read the result of before. test: also measure the test points; weights: keep them, which a later test needs. The result, written as
    JSON, holds the setting, parameters, seconds, tokens, curve [(step, loss)], validation and test.

    A run whose loss is not finite ends there, with None for its validation. Raises OutOfTime at machine.deadline, having kept what there is.
    """
    known = finished(setting, machine.folder)
    if known is not None:
        if test and "test" not in known and known["validation"] is not None:
            known["test"] = task.test(load(setting, task, machine.folder).to(machine.device))
            _write(setting, machine.folder, known)
        return known
    device, options = machine.device, setting.options(task)
    model = build(setting, task).to(device)
    partial = machine.folder / f"{setting.stem}.partial"
    partial.parent.mkdir(parents=True, exist_ok=True)
    step, seconds, curve, held = 0, 0.0, [], None
    if partial.is_file():
        state = torch.load(partial, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        held = state["optimizer"]
        step, seconds, curve = state["step"], state["seconds"], state["curve"]

    stepper = Stepper(model, options, device, machine.graphs, held)

    def keep() -> None:
        state = {"model": model.state_dict(), "optimizer": stepper.optimizer.state_dict(), "step": step, "seconds": seconds, "curve": curve}
        write_whole(partial, _bytes(state), "--out", "the run so far")

    model.train()
    stepper.prepare(task.padded_batch(setting.seed, step))
    total, count, clock = torch.zeros((), device=device), 0, time.perf_counter() - seconds
    diverged = False
    batches, kept = stream(task, setting.seed, step, setting.steps, machine), seconds
    try:
        for batch in batches:
            total += stepper(batch, learning_rate(options, step, step / setting.steps))
            count += 1
            step += 1
            if step % CURVE_EVERY == 0 or step == setting.steps:
                loss = float(total) / count
                if not math.isfinite(loss):
                    diverged = True
                    break
                curve.append([step, round(loss, 5)])
                total, count = torch.zeros((), device=device), 0
                if tell is not None:
                    tell(step, setting.steps, loss)
            if step % CURVE_EVERY == 0 and step < setting.steps:
                seconds = time.perf_counter() - clock
                late = machine.left < 0
                if late or seconds - kept > KEEP_EVERY:
                    keep()
                    kept = seconds
                if late:
                    raise OutOfTime
    finally:
        batches.close()
    _wait(device)
    seconds = time.perf_counter() - clock
    result = {
        **dataclasses.asdict(setting), "parameters": models.parameters(model), "tokens": setting.steps * task.batch_size * task.length,
        "seconds": round(seconds, 2), "cuda_graph": stepper.graphs, "not_captured": stepper.refused, "curve": curve,
        "validation": None if diverged else task.validate(model), "machine": machine_facts(), "versions": models.versions(),
    }
    if test and not diverged:
        result["test"] = task.test(model)
    if weights:
        write_whole(machine.folder / f"{setting.stem}.pt", _bytes({k: v.cpu() for k, v in model.state_dict().items()}), "--out", "the weights")
    _write(setting, machine.folder, result)
    partial.unlink(missing_ok=True)
    return result


def _write(setting: Setting, folder: Path, result: dict[str, Any]) -> None:
    write_whole(folder / f"{setting.stem}.json", json.dumps(result, indent=1) + "\n", "--out", "the result")


def step_seconds(setting: Setting, task: Task, machine: Machine, steps: int = 20) -> float:
    """Seconds of one training step, measured: after the first ones, which compile and capture."""
    quiet = dataclasses.replace(machine, deadline=None, workers=0)
    model = build(setting, task).to(machine.device).train()
    stepper = Stepper(model, setting.options(task), machine.device, machine.graphs)
    batch = next(iter(stream(task, 0, 0, 1, quiet)))
    stepper.prepare(batch)

    for _ in range(min(5, steps)):
        stepper(batch, 0.0)
    _wait(machine.device)
    begin = time.perf_counter()
    for _ in range(steps):
        stepper(batch, 0.0)
    _wait(machine.device)
    return (time.perf_counter() - begin) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

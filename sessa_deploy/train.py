"""A plain training loop: AdamW, warm-up and cosine; a resumed run continues the loss curve bit for bit (on a CPU).

One process on one device, or several that torchrun started (sessa_deploy.distributed), with the same curve up to rounding: `with joined() as group:`, then
start or resume with that group, then train.

A run's folder: checkpoint/ (what `export` takes), checkpoint-best/ (the best by held-out bits), resume.pt (weights, optimizer, step; resume/ where several
processes saved), log.csv, loss.png and report.json, each replaced whole.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sessa_deploy.checks import integer
from sessa_deploy.distributed.group import Group, joined
from sessa_deploy.errors import UserError
from sessa_deploy.train_begin import prepare, resume, start
from sessa_deploy.train_log import Row
from sessa_deploy.train_measure import autocast, held_out_bits, told_of_memory
from sessa_deploy.train_options import TrainOptions, learning_rate
from sessa_deploy.train_run import BEST_DIR, CHECKPOINT_DIR, RESUME_FILE, Run, parameter_groups

__all__ = ["BEST_DIR", "CHECKPOINT_DIR", "RESUME_FILE", "Group", "Interrupted", "Run", "TrainOptions", "autocast", "held_out_bits", "joined", "learning_rate",
           "parameter_groups", "prepare", "resume", "start", "train"]

FLUSH_EVERY = 10  # steps between two looks at the device's losses


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run, which was saved. signal: its number; step: the one that was saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name} at step {step}")
        self.signal, self.step = number, step


def train(run: Run, stop_at: int | None = None, on_row: Callable[[Row, float], None] | None = None) -> dict[str, Any]:
    """Train until the schedule's end, or until step `stop_at` (the schedule stays that of options.steps); returns the report.

    A stop_at that lies behind the run's step trains nothing. on_row(row, progress 0..1) is called for every logged step. Ctrl-C and SIGTERM end the step
    at hand, save the run once and raise Interrupted, a KeyboardInterrupt. Raises UserError when the loss stops being finite, when memory or the disk is
    full, or when stop_at is no integer >= 1; what was saved before stays.

    Of several processes all must call it; they stop, save and fail at the same step. on_row and the report are process 0's, the others return {}.
    """
    stop_at = None if stop_at is None else integer("stop_at", stop_at, 1)
    options, group = run.options, run.group
    pending: list[tuple[int, Tensor, Tensor, float, float, float | None]] = []
    end = options.steps if stop_at is None else min(stop_at, options.steps)
    clock = time.perf_counter() - run.seconds

    def flush() -> None:
        losses = _means(group, [x for p in pending for x in p[1:3]]) if pending else []
        for i, (step, _, _, lr, progress, held) in enumerate(pending):
            loss, norm = losses[2 * i], losses[2 * i + 1]
            if not math.isfinite(loss):
                raise UserError("training diverged", got=f"loss {loss} at step {step}", fix="a smaller --lr or a longer --warmup")
            row = Row(step, loss, lr, norm, step * run.share.windows * options.context, held, round(run.seconds, 3))
            run.rows.append(row)
            if on_row is not None and group.chief:
                on_row(row, progress)
        pending.clear()

    run.model.train()
    with _interruptible() as caught, told_of_memory():
        while True:
            interrupted, run.seconds = group.agree(caught[0] if caught else 0, run.seconds)
            progress = max(run.step / options.steps, run.seconds / options.max_seconds if options.max_seconds else 0.0)
            if run.step >= end or interrupted or progress >= 1.0:
                break
            lr = learning_rate(options, run.step, progress)
            loss, norm = run.optimize(lr)
            run.step, run.unsaved = run.step + 1, True
            held = None
            if run.step % options.eval_every == 0:
                held = run.evaluate()
                run.keep_best(held)
            pending.append((run.step, loss, norm, lr, progress, held))
            saving = run.step % options.save_every == 0
            if saving or len(pending) >= FLUSH_EVERY:
                flush()  # waits for the device
            run.seconds = time.perf_counter() - clock
            if saving:
                run.save()
        flush()
        if run.unsaved:
            run.save()
    if interrupted:
        raise Interrupted(interrupted, run.step)
    return run.finish()


def _means(group: Group, pairs: list[Tensor]) -> list[float]:
    """(loss, norm, loss, norm, ...) on the host, each the mean over the processes."""
    values = torch.stack(pairs).double()
    return (group.add(values) / group.size if group.many else values).tolist()


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM fill the yielded list instead of striking amid a step; only the main thread can be asked so."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""A plain training loop: AdamW, warm-up and cosine, one process, one device; a resumed run continues the loss curve bit for bit (on a CPU).

A run's folder: checkpoint/ (what `export` takes), resume.pt (weights, optimizer, step), log.csv, loss.png and report.json, each replaced whole.
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
from sessa_deploy.errors import UserError
from sessa_deploy.train_begin import resume, start
from sessa_deploy.train_log import Row
from sessa_deploy.train_options import TrainOptions, learning_rate
from sessa_deploy.train_run import CHECKPOINT_DIR, RESUME_FILE, Run, autocast, held_out_bits, parameter_groups, told_of_memory

__all__ = ["CHECKPOINT_DIR", "RESUME_FILE", "Interrupted", "Run", "TrainOptions", "autocast", "held_out_bits", "learning_rate", "parameter_groups", "resume",
           "start", "train"]

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
    """
    stop_at = None if stop_at is None else integer("stop_at", stop_at, 1)
    options = run.options
    pending: list[tuple[int, Tensor, Tensor, float, float, float | None]] = []
    end = options.steps if stop_at is None else min(stop_at, options.steps)
    clock = time.perf_counter() - run.seconds

    def flush() -> None:
        losses = torch.stack([x for p in pending for x in p[1:3]]).double().tolist() if pending else []
        for i, (step, _, _, lr, progress, held) in enumerate(pending):
            loss, norm = losses[2 * i], losses[2 * i + 1]
            if not math.isfinite(loss):
                raise UserError("training diverged", got=f"loss {loss} at step {step}", fix="a smaller --lr or a longer --warmup")
            row = Row(step, loss, lr, norm, step * options.accumulate * options.batch_size * options.context, held, round(run.seconds, 3))
            run.rows.append(row)
            if on_row is not None:
                on_row(row, progress)
        pending.clear()

    run.model.train()
    with _interruptible() as interrupted, told_of_memory():
        while run.step < end and not interrupted:
            progress = max(run.step / options.steps, run.seconds / options.max_seconds if options.max_seconds else 0.0)
            if progress >= 1.0:
                break
            lr = learning_rate(options, run.step, progress)
            loss, norm = run.optimize(lr)
            run.step, run.unsaved = run.step + 1, True
            held = run.evaluate() if run.step % options.eval_every == 0 else None
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
        raise Interrupted(interrupted[0], run.step)
    return run.finish()


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

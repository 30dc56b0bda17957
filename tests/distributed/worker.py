"""What two processes do in one go for tests/test_train_distributed.py: each scenario a run of its own, what it saw as JSON of process 0.

    torchrun --nproc-per-node 2 tests/distributed/worker.py TEXT FOLDER
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from sessa_deploy import train_run
from sessa_deploy.distributed.group import Group, OtherFailed
from sessa_deploy.errors import UserError
from sessa_deploy.train import Interrupted, Run, TrainOptions, joined, resume, start, train

SHAPE: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 2}
SEEN: dict[str, Any] = {}


def options(text: str, out: Path, **changes: Any) -> TrainOptions:
    """Two windows a micro-batch, two micro-batches a step: of two processes a step of eight windows."""
    base: dict[str, Any] = {"steps": 8, "batch_size": 2, "global_batch": 8, "context": 16, "device": "cpu", "held_out": 0.3, "eval_every": 4, "save_every": 4}
    return TrainOptions(data=text, out=str(out), **(base | changes))


def counted(run: Run) -> tuple[int, list[int]]:
    """(buckets of gradients that a step sends, of each of three steps)."""
    sent = [0]

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent[0] += 1
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    hook.__annotations__.clear()  # strings, which it would not take
    run.stepped.call.register_comm_hook(None, hook)  # type: ignore[attr-defined]
    found = []
    for _ in range(3):
        before = sent[0]
        run.optimize(1e-3)
        found.append(sent[0] - before)
    return run.share.accumulate, found


def error_of(work: Callable[[], object]) -> tuple[str, int, str]:
    try:
        work()
    except (UserError, OtherFailed) as error:
        return type(error).__name__, error.exit_code, str(error)
    return "none", 0, ""


def everywhere(value: Any) -> list[Any]:
    """A value of each process."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def scenarios(group: Group, text: str, here: Path) -> None:
    train_run.write_plot = lambda *_: None
    rows: list[int] = []
    reports = everywhere(train(start(options(text, here / "replicated"), group=group, **SHAPE), on_row=lambda row, _: rows.append(row.step)))
    SEEN["rows heard"], SEEN["reports"] = everywhere(rows), [report.get("processes") for report in reports]
    run = start(options(text, here / "sharded", shard=True, activation_checkpointing=True), group=group, **SHAPE)
    SEEN["parameters held"] = everywhere(sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in run.model.parameters()))
    train(run)
    for name, changes in (("half", {}), ("half sharded", {"shard": True})):
        train(start(options(text, here / name, **changes), group=group, **SHAPE), stop_at=4)
    for name, changes in (("alone", {}), ("alone sharded", {"shard": True})):  # what one process began
        run = resume(here / name, group, **changes)
        SEEN[name] = run.share.windows, run.share.batch_size, run.saved_step
        train(run)
    SEEN["sent"] = counted(start(options(text, here / "counted", global_batch=12), group=group, **SHAPE))
    SEEN["do not divide"] = everywhere(error_of(lambda: start(options(text, here / "x", global_batch=10), group=group, **SHAPE)))
    other = text if group.chief else str(here / "other text")
    SEEN["other text"] = everywhere(error_of(lambda: start(options(other, here / "x"), group=group, **SHAPE)))
    SEEN["left behind"] = (here / "x").exists()
    full_disk(group, text, here)
    stopped(group, text, here)


def full_disk(group: Group, text: str, here: Path) -> None:
    """The disk is full for process 0 when the checkpoint is written the second time, then for process 1 when it writes its share of the state."""
    plain = os.fsync

    def fsync(handle: int) -> None:
        if "model.safetensors" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(handle)

    run = start(options(text, here / "full", eval_every=100), group=group, **SHAPE)
    train(run, stop_at=4)
    os.fsync = fsync if group.chief else plain
    SEEN["full disk"] = everywhere(error_of(lambda: train(run)))
    os.fsync = plain
    if not group.chief:
        os.fsync = lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    run = resume(here / "full", group)
    SEEN["full disk of the other"] = run.step, everywhere(error_of(lambda: (run.optimize(1e-3), setattr(run, "step", 9), run.save())))
    os.fsync = plain
    SEEN["after it"] = resume(here / "full", group).step, sorted(p.name for p in (here / "full" / "resume").iterdir())


def stopped(group: Group, text: str, here: Path) -> None:
    """Process 1 is told to stop in its fourth step: both end after it, and save once."""
    optimize, save, saves = Run.optimize, Run.save, []

    def struck(run: Run, lr: float) -> Any:
        if run.step == 2 and run.group.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimize(run, lr)

    def noted(run: Run) -> None:
        saves.append(run.step)
        save(run)

    Run.optimize, Run.save = struck, noted  # type: ignore[method-assign]
    try:
        train(start(options(text, here / "stopped"), group=group, **SHAPE))
        seen = None
    except Interrupted as stop:
        seen = stop.signal, stop.step, saves
    Run.optimize, Run.save = optimize, save  # type: ignore[method-assign]
    SEEN["stopped"] = everywhere(seen)


if __name__ == "__main__":
    with joined() as both:
        scenarios(both, sys.argv[1], Path(sys.argv[2]))
    if both.chief:
        Path(sys.argv[2], "seen.json").write_text(json.dumps(SEEN))

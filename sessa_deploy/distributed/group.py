"""Who the processes of one training are, and what they do together: agree on a stop, add up numbers, let process 0 write, end when one of them fails.

Started by `torchrun --nproc-per-node N -m sessa_deploy train ...`; a process alone takes none of it (ALONE).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sessa_deploy.checks import integer
from sessa_deploy.distributed.watch import Failure, Watch, say
from sessa_deploy.errors import SessaError, UserError, one_line
from sessa_deploy.process import launched

Made = TypeVar("Made")

_PATIENCE = datetime.timedelta(hours=2)  # how long processes wait while process 0 writes a checkpoint; a process that fails is seen by the watch
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)  # in what a collective raises that nobody answered
_OTHERS_SAY = 4.0  # seconds after a broken collective in which it is known which process broke it
_THREADS_REST = 0.2  # seconds in which gloo's threads let go of their last tensors: one that still waits for Python's lock as the interpreter ends aborts it
_CHIEF_LEAVES = 10.0  # seconds that the others give process 0 to say what went wrong


class OtherFailed(SessaError):
    """Another process of the run failed. Process 0 says its error; the others end with its code."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.exit_code = failure.code


@dataclass(frozen=True)
class Group:
    """The processes of a training: `size` of them, this one being number `rank`, and number `local` of `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    watch: Watch | None = None

    @property
    def chief(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def agree(self, number: int, seconds: float) -> tuple[int, float]:
        """The largest signal number that any process caught, and the largest of their clocks: the same answer in all processes."""
        if not self.many:
            return number, seconds
        both = torch.tensor([float(number), seconds], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return int(both[0]), float(both[1])

    def add(self, x: Tensor) -> Tensor:
        """The sum of x over all processes, in place; returns x."""
        if self.many:
            dist.all_reduce(x)
        return x

    def same(self, value: str, what: str, fix: str) -> None:
        """UserError, in all processes, unless all give the same value."""
        if not self.many:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        other = next((i for i, x in enumerate(values) if x != values[0]), None)
        if other is not None:
            raise UserError(f"the processes have different {what}", got=f"another in process {other} than in process 0", allowed="the same in all", fix=fix)

    def on_chief(self, work: Callable[[], Made]) -> Made | None:
        """What `work` gives in process 0, None in the others, all of which wait for it. Its error is raised in process 0, OtherFailed in the others."""
        return self.together(work if self.chief else lambda: None)

    def together(self, work: Callable[[], Made]) -> Made:
        """What `work`, which does different things in different processes, gives here; where it raises in one, all raise: that error, or OtherFailed."""
        if not self.many:
            return work()
        failures: list[Any] = [None] * self.size
        try:
            made = work()
        except Exception as error:
            dist.all_gather_object(failures, _told(error, self.rank))
            raise
        dist.all_gather_object(failures, None)
        first = next((x for x in failures if x is not None), None)
        if first is not None:
            raise OtherFailed(first)
        return made


ALONE = Group()


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The group of this process, for the block: ALONE unless torchrun started several. What is raised in the block of one process ends all of them.

    CPU tensors travel by gloo, CUDA tensors by NCCL. Raises UserError where the launcher's environment is not whole, or where the processes cannot meet.
    """
    if not launched():
        yield ALONE
        return
    rank, size, local, local_size = (_place(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if not dist.is_available() or dist.is_initialized():
        raise UserError("the processes cannot form a group", got="a torch without torch.distributed" if not dist.is_available() else "another group",
                        allowed="one group a process", fix="use a torch with torch.distributed, and let sessa_deploy.distributed.group.joined make it")
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=5)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        if torch.cuda.is_available() and local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        watch = _watch(store, rank, local, local_size)
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        raise UserError("the processes cannot meet", got=one_line(str(error))[:200], allowed=f"{size} processes started by one torchrun",
                        fix="look at MASTER_ADDR, MASTER_PORT and at the network between the machines") from None
    try:
        yield Group(rank, size, local, local_size, watch)
        dist.all_reduce(torch.zeros(1))  # nobody leaves while another may still need an answer
    except BaseException as error:
        raised = _ended(watch, rank, error)
        watch.close()
        time.sleep(_THREADS_REST)
        if raised is error:
            raise
        raise raised from None
    watch.close()
    dist.destroy_process_group()
    time.sleep(_THREADS_REST)


def _place(name: str) -> int:
    text = os.environ.get(name, "")
    value = int(text) if text.isascii() and text.isdigit() else text
    return integer(f"the environment's {name}", value, 0, allowed="the integer that torchrun sets", fix="start the processes with torchrun")


def _watch(store: Any, rank: int, local: int, local_size: int) -> Watch:
    own = dist.PrefixStore(f"sessa {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store.clone())
    own.set(f"pid {rank}", str(os.getpid()))
    neighbours = [n for n in range(rank - local, rank - local + local_size) if n != rank]
    return Watch(own, rank, {n: int(own.get(f"pid {n}")) for n in neighbours})


def _told(error: BaseException, rank: int) -> Failure:
    """A failure of this process as the others hear it; what is no error of ours keeps its traceback here and has its name there."""
    if isinstance(error, SessaError):
        here = isinstance(error, UserError) and rank != 0
        text = str(UserError(f"process {rank}: {error.what}", error.got, error.allowed, error.fix)) if here else str(error)  # type: ignore[attr-defined]
        return Failure(rank, error.exit_code, text)
    if isinstance(error, KeyboardInterrupt):
        return Failure(rank, 128 + signal.SIGINT, "interrupted")
    if isinstance(error, SystemExit):
        return Failure(rank, error.code if isinstance(error.code, int) else 1, "terminated")
    return Failure(rank, 1, one_line(f"process {rank} failed: {type(error).__name__}: {error}"))


def _ended(watch: Watch, rank: int, error: BaseException) -> BaseException:
    """Tell the others of an error that ends this process; returns the error to end with."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):  # the launcher ends all when the first has ended: each has its own code to leave with
            signal.signal(number, signal.SIG_IGN)
    watch.stand_back()
    if isinstance(error, RuntimeError) and not isinstance(error, SessaError):  # a collective that broke because another process did
        failure = watch.await_failure(_OTHERS_SAY)
        if failure is not None and failure.rank != rank:
            error = OtherFailed(failure)
            if rank == failure.speaker != 0:
                say(failure.text)
        elif failure is None and _TIMED_OUT.search(str(error)):
            error = UserError("the processes of the run waited for one another in vain", got=f"no answer for {_PATIENCE}", allowed="processes that all go on",
                              fix="look on every machine for a process that hangs and at the network between them, then continue with --resume")
    watch.post(_told(error, rank))
    if rank != 0 and not isinstance(error, OtherFailed):
        watch.await_leaving(0, _CHIEF_LEAVES)
    watch.leave()
    return error

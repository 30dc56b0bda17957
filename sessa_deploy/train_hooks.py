"""The curve of a run in other people's tools, for those who ask for it: TensorBoard's files, or Weights & Biases. Nothing is written there by default."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

from sessa_deploy.errors import MissingPackage, UserError
from sessa_deploy.train_log import Row
from sessa_deploy.train_run import Run

TOOLS = ("tensorboard", "wandb")
TENSORBOARD_DIR = "tensorboard"  # in the run's folder


class Hook:
    """Takes the rows of a run as `train` logs them, like any on_row(row, progress); close() ends it."""

    def __init__(self, put: Callable[[dict[str, float], int], object], close: Callable[[], object]) -> None:
        self._put, self.close = put, close

    def __call__(self, row: Row, progress: float) -> None:
        """One optimizer step."""
        values = {"train/loss": row.loss, "train/lr": row.lr, "train/grad_norm": row.grad_norm, "train/tokens": float(row.tokens)}
        if row.held_out is not None:
            values["held_out/bits_per_byte"] = row.held_out
        self._put(values, row.step)


def require(tool: str) -> None:
    """UserError on a tool that there is no hook for, MissingPackage where its library is not installed."""
    if tool not in TOOLS:
        raise UserError("no such tool to log to", got=tool, allowed=", ".join(TOOLS))
    if importlib.util.find_spec(tool) is None:
        raise MissingPackage(f"this needs the package {tool}", got="it is not installed", fix=f"pip install {tool}")


def hook(tool: str, run: Run) -> Hook:
    """A hook for "tensorboard" (files in the run's folder) or "wandb" (project sessa-deploy, or WANDB_PROJECT's). Raises as `require` does."""
    require(tool)
    return _tensorboard(run) if tool == "tensorboard" else _wandb(run)


def _tensorboard(run: Run) -> Hook:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run.folder / TENSORBOARD_DIR), purge_step=run.step + 1)  # what ran ahead of the save is forgotten

    def put(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Hook(put, writer.close)


def _wandb(run: Run) -> Hook:
    import wandb

    session: Any = wandb.init(project=os.environ.get("WANDB_PROJECT", "sessa-deploy"), name=run.folder.name, dir=str(run.folder),
                              config={**run.options.to_dict(), "model": run.config.to_dict(), "processes": run.group.size})
    return Hook(lambda values, step: session.log(values, step=step), session.finish)

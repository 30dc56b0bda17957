"""A run's weights and moments as torch.distributed.checkpoint keeps them: written by all processes at once, read by any number of them.

    resume/state.json      plain values, and which of the folders beside it counts
    resume/step-N/         the tensors, each piece by the process that held it

A save that is cut off leaves the one before: state.json is replaced when the new folder is whole, and only then the older folder goes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sessa_deploy.distributed.group import Group
from sessa_deploy.errors import UserError
from sessa_deploy.files import write_whole
from sessa_deploy.reading import read_json

STATE_FILE = "state.json"
_STEP = re.compile(r"step-\d+\Z")
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside the number of its steps


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and AdamW's moments under names that do not depend on how many processes there are; the moments are zero before the first step."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"model.{name}"] = parameter.detach()
        moments = optimizer.state.get(parameter, {})
        for moment in _MOMENTS:
            found[f"{moment}.{name}"] = moments[moment] if moment in moments else torch.zeros_like(parameter.detach())
    return found


def set_moments(model: nn.Module, optimizer: torch.optim.Optimizer, found: Mapping[str, Tensor], step: int) -> None:
    """Give an optimizer the moments of `found`, named and held as `tensors` has them, as they were after `step` steps."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: {"step": torch.tensor(float(step)), **{m: found[f"{m}.{names[p]}"] for m in _MOMENTS}} for i, p in enumerate(ordered)} if step else {}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(folder: Path, group: Group, values: Mapping[str, Tensor], plain: dict[str, Any]) -> None:
    """Write tensors and plain values (JSON's; "step" among them), all processes together. Raises UserError where that cannot be; what was there stays."""
    from sessa_deploy.distributed import stored

    name = f"step-{plain['step']:08d}"

    def clear() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("the run cannot be written", got=f"{folder} ({error.strerror})", fix="choose another --out") from None
        shutil.rmtree(folder / name, ignore_errors=True)

    def publish() -> None:
        write_whole(folder / STATE_FILE, json.dumps({"folder": name, **plain}, indent=1) + "\n", "--out", "the run")
        for other in folder.iterdir():
            if other.name != name and _STEP.fullmatch(other.name):
                shutil.rmtree(other, ignore_errors=True)

    group.on_chief(clear)
    try:
        stored.write(folder / name, dict(values), alone=not group.many)
    except stored.StoredError as error:
        if group.chief:
            shutil.rmtree(folder / name, ignore_errors=True)
        raise UserError("the run cannot be written", got=f"{folder} ({error})", fix="free space there, or choose another --out") from None
    group.on_chief(publish)


def read_plain_values(folder: Path) -> dict[str, Any]:
    """state.json's values. Raises UserError if it is damaged or names no folder beside it."""
    path = folder / STATE_FILE
    values = read_json(path)
    if not isinstance(values, dict) or not _STEP.fullmatch(str(values.get("folder"))):
        raise UserError(f"{path} cannot be read", got="no folder of tensors in it", allowed="what train wrote", fix="start a new run in another --out")
    return values


def load(folder: Path, group: Group, name: str, values: dict[str, Tensor]) -> None:
    """Fill the given tensors, held as `tensors` gives them, from a save of any number of processes. Raises UserError if it is damaged or of another model."""
    from sessa_deploy.distributed import stored

    try:
        stored.read(folder / name, values, alone=not group.many)
    except stored.StoredError as error:
        raise UserError(f"{folder / name} cannot be read", got=error, allowed="what train wrote", fix="start a new run in another --out") from None

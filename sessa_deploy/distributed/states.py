"""A run's weights and moments as torch.distributed.checkpoint keeps them: written by all processes at once, read by any number of them.

    resume/state.json      plain values, and which of the folders beside it counts
    resume/step-N/         the tensors, each piece by the process that held it

A save that is cut off leaves the one before: state.json is replaced when the new folder is whole, and only then the older folder goes.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

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
    name = f"step-{plain['step']:08d}"

    def clear() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / name, ignore_errors=True)

    def publish() -> None:
        write_whole(folder / STATE_FILE, json.dumps({"folder": name, **plain}, indent=1) + "\n", "--out", "the run")
        for other in folder.iterdir():
            if other.name != name and _STEP.fullmatch(other.name):
                shutil.rmtree(other, ignore_errors=True)

    try:
        group.on_chief(clear)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(values), checkpoint_id=str(folder / name), no_dist=not group.many)
    except (CheckpointException, OSError) as error:
        if group.chief:
            shutil.rmtree(folder / name, ignore_errors=True)
        raise UserError("the run cannot be written", got=f"{folder} ({_reason(error)})", fix="free space there, or choose another --out") from None
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(values, storage_reader=_Reader(str(folder / name)), no_dist=not group.many)
    except (Exception, CheckpointException) as error:  # a damaged or foreign file may raise anything, and nothing in it is executed
        raise UserError(f"{folder / name} cannot be read", got=_reason(error), allowed="what train wrote", fix="start a new run in another --out") from None


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:120]}"


class _Reader(dcp.FileSystemReader):
    """The library's reader, but for its index, a pickle, in which nothing is executed."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the tensors' pieces."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            found: Metadata = _Index(file).load()
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


_METADATA = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "MetadataIndex",
             "StorageMeta")
_KNOWN = frozenset({
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"), ("torch", "Size"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("collections", "OrderedDict"),
    ("builtins", "set"),
})


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name} in the index")
        return super().find_class(module, name)

"""A model repository for a stock Triton Inference Server with its python backend: config.pbtxt, model.py, and the bundle inside."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from sessa_deploy.contract import MANIFEST_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.process import command
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.engines import BACKENDS, most_sequences
from sessa_deploy.runtime.publish import place
from sessa_deploy.runtime.serve.folders import whole_folder
from sessa_deploy.runtime.serve.triton import BUNDLE_DIR, INPUTS, OUTPUTS, Tensor

CONFIG_PBTXT = "config.pbtxt"
VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_HEAD = "# Written by sessa-deploy export-triton; it is replaced with the folder it stands in."
_MODEL = f'''{_HEAD}
"""A Sessa bundle behind Triton's python backend. The bundle lies beside this file; what runs it is the installed package sessa_deploy."""

import sys

try:
    from sessa_deploy.runtime.serve.triton import TritonPythonModel
except ImportError as error:
    raise ImportError(f"{{error}}: install it for {{sys.executable}}, which Triton runs: pip install 'sessa-deploy[{{extra}}]'") from None

__all__ = ["TritonPythonModel"]
'''


def export_triton(bundle: Bundle | str | Path, out: str | Path, name: str | None = None, backend: str = "auto", slots: int | None = None,
                  capacity: int | None = None, queue: int = 256, queue_timeout: float = 30.0, threads: int | None = None) -> Path:
    """Write the model `name` (default: the bundle's folder) with a checked copy of the bundle into the model repository `out`; returns its folder.

    backend, slots, capacity, threads: as the server opens the bundle; queue, queue_timeout: of requests that wait, in requests and seconds. They stand
    in config.pbtxt as parameters. The folder appears whole or not at all; one that this function wrote is replaced, other models are left alone.
    Raises UserError on a bundle that is not right, on a name that Triton would not take and on a place where something else stands.
    """
    name = Path(os.path.realpath(bundle.path if isinstance(bundle, Bundle) else bundle)).name if name is None else name
    if not _NAME.match(name):
        raise UserError("that is no name for a model", got=repr(name), allowed="letters, digits, _ . and -, at most 128, beginning with a letter, digit or _",
                        fix="name it with --name")
    if backend not in BACKENDS:
        raise UserError("no such backend", got=repr(backend), allowed=", ".join(BACKENDS))
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    most = most_sequences(bundle, backend) if backend == "trt" else None
    if most is not None and slots is not None and slots > most:
        raise UserError("the bundle's engine takes fewer sequences", got=f"slots {slots}", allowed=f"at most {most}",
                        fix=command("build", bundle.path, "--max-batch", slots))
    target = Path(os.path.realpath(out)) / name
    _check_replaceable(target)
    with whole_folder(target, CONFIG_PBTXT, "the model") as folder:
        version = folder / VERSION
        for file in (*bundle.names(), MANIFEST_FILE):
            place(bundle.path / file, version / BUNDLE_DIR / file)
        Bundle.open(version / BUNDLE_DIR)
        (version / "model.py").write_text(model_py(backend), encoding="utf-8")
        settings = {"backend": backend, "slots": slots, "capacity": capacity, "queue": queue, "queue_timeout": queue_timeout, "threads": threads}
        (folder / CONFIG_PBTXT).write_text(config_pbtxt(name, settings), encoding="utf-8")
    return target


def model_py(backend: str) -> str:
    """The text of model.py: the import of TritonPythonModel, and what to install where that fails."""
    return _MODEL.replace("{extra}", {"trt": "tensorrt", "ort-cuda": "cuda"}.get(backend, "ort"))


def config_pbtxt(name: str, settings: Mapping[str, object]) -> str:
    """The model's configuration in protobuf's text format; settings become parameters, those that are None are left out."""

    def tensor(known: Tensor, optional: str) -> str:
        return f'  {{ name: "{known.name}" data_type: TYPE_{known.type} dims: [ {", ".join(map(str, known.dims))} ]{optional} }}'

    inputs, outputs = (",\n".join(tensor(known, optional) for known in tensors) for tensors, optional in ((INPUTS, " optional: true"), (OUTPUTS, "")))
    parameters = "\n".join(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in settings.items() if value is not None)
    return f"""{_HEAD}
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
{inputs}
]
output [
{outputs}
]
instance_group [ {{ kind: KIND_MODEL count: 1 }} ]
{parameters}
"""


def _check_replaceable(target: Path) -> None:
    """Raise UserError if something stands at `target` that `export_triton` did not write."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        ours = (target / CONFIG_PBTXT).read_text(encoding="utf-8").startswith(_HEAD)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise UserError("something else stands where the model goes", got=str(target), allowed="nothing there, or a model that export-triton wrote",
                        fix="choose another --name or --out, or remove it yourself")

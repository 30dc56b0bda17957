"""A rung of parity, as a process of its own: `python -m sessa_deploy.export.parity.rungs --rung ort --bundle BUNDLE --folder DIR`.

It reads the cases in DIR and writes DIR/<rung>/<mode>.<case>.npz and, last, DIR/<rung>/header.json. Torch rungs need --checkpoint; an engine's rung
imports numpy and that engine only, so it runs on a machine or under an interpreter without torch.
Progress goes to stdout as JSON lines, the first of them when the work begins; an error of the user or the machine goes to stderr as one line, exit code 2.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MODEL_FILE, PRECISIONS
from sessa_deploy.errors import SessaError, UserError, packages_named
from sessa_deploy.export.parity.cases import Case, load_cases, save_cases
from sessa_deploy.export.parity.drive import Engine, Tensors, drive_graph, drive_session
from sessa_deploy.export.parity.engines import ENGINE_RUNGS, open_engine
from sessa_deploy.files import whole, write_whole
from sessa_deploy.reading import read_json
from sessa_deploy.runtime.bundle import Bundle

ORACLE, PLAIN, TORCH = "float64", "plain", "torch"
WORTH = "worth"  # of weights in 8 bits, on text, beside the ladder
TORCH_RUNGS = (ORACLE, PLAIN, TORCH, WORTH)
DECODE_KINDS = ("decode", "ragged", "greedy")
HEADER_FILE = "header.json"
HEADER_SCHEMA = 1
_PLACE = "folder for temporary files (TMPDIR), or --dump"

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class RungJob:
    """What one rung computes: cases in `folder`, the bundle, the checkpoint for torch rungs (and its config.json, where it has none), and threads."""

    rung: str
    folder: Path
    bundle: Path
    checkpoint: Path | None = None
    threads: int = 1
    config: Path | None = None


def run_rung(job: RungJob, report: Report | None = None, engine: Engine | None = None) -> dict[str, Any]:
    """Compute one rung and write it; returns its header. engine: use this one instead of opening job.rung's.

    Raises UserError on a rung that is not known, lacks its checkpoint or cannot run the bundle's precision here.
    """
    begun = time.perf_counter()
    bundle, cases = Bundle.open(job.bundle, verify=job.rung not in TORCH_RUNGS), load_cases(job.folder)  # torch rungs read no file of it
    out = job.folder / job.rung
    out.mkdir(parents=True, exist_ok=True)
    (out / HEADER_FILE).unlink(missing_ok=True)
    header: dict[str, Any] = {
        "schema": HEADER_SCHEMA, "rung": job.rung, "precision": bundle.precision, "model_sha256": bundle.sha256(MODEL_FILE),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    if engine is None and job.rung in TORCH_RUNGS:
        header |= _run_torch(job, bundle, report or _silent)
    else:
        engine = engine or open_engine(job.rung, bundle, job.threads)
        header |= {"cases": cases.digest(), "versions": engine.versions, "headroom": None}
        header |= _run_modes(out, bundle, cases.cases, engine, report or _silent)
    header["seconds"] = round(time.perf_counter() - begun, 3)
    write_whole(out / HEADER_FILE, json.dumps(header, indent=1) + "\n", option=_PLACE, what=f"the header of {job.rung}", sync=False)
    return header


def _silent(done: int, of: int) -> None:
    """No progress wanted."""


def _run_modes(out: Path, bundle: Bundle, cases: tuple[Case, ...], engine: Engine, report: Report) -> dict[str, Any]:
    """Drive the cases in every mode there is; returns the header's entries about it."""
    decoding = tuple(case for case in cases if case.kind in DECODE_KINDS)
    modes = {"graph": cases if engine.graph is not None else (), "session": cases if engine.session is not None else (),
             "greedy": decoding if hasattr(engine.session, "step_greedy") else (), "eager": decoding if engine.eager is not None else ()}
    storage, dirty, done = np.dtype("float32" if bundle.precision == "bf16" else PRECISIONS[bundle.precision].numpy), {}, 0
    for mode, own in modes.items():
        runner = engine.eager if mode == "eager" else engine.session
        for case in own:
            if engine.graph is not None and mode == "graph":
                tensors, stained = drive_graph(engine.graph, case, bundle.config, storage)
                if stained:
                    dirty[case.name] = stained
            elif runner is not None:
                tensors = drive_session(runner, case, bundle.config, mode == "greedy", engine.max_batch)
            _save(out / f"{mode}.{case.name}.npz", tensors)
            report(done := done + 1, sum(map(len, modes.values())))
    return {"modes": {mode: [case.name for case in own] for mode, own in modes.items() if own}, "nonzero_padding": dirty}


def _save(path: Path, tensors: Tensors) -> None:
    with whole(path, option=_PLACE, what="the rung's tensors", sync=False) as stream:
        np.savez(stream, **tensors)  # type: ignore[arg-type]


def _run_torch(job: RungJob, bundle: Bundle, report: Report) -> dict[str, Any]:
    """One of the torch rungs. The oracle first chooses the generated tokens, unless they are chosen."""
    if job.checkpoint is None:
        raise UserError(f"the rung {job.rung} needs the checkpoint", got="none", fix="give --checkpoint CHECKPOINT")
    import torch

    from sessa_deploy.checkpoint import load_checkpoint
    from sessa_deploy.export.graph.quantise import change
    from sessa_deploy.export.parity import models as rungs
    from sessa_deploy.export.parity import worth

    torch.set_num_threads(job.threads)
    torch.set_float32_matmul_precision("highest")
    out, versions = job.folder / job.rung, {"torch": str(torch.__version__), "numpy": np.__version__}
    config, cases = SessaConfig.load(job.config) if job.config else None, load_cases(job.folder)
    if job.rung == WORTH:
        return {"cases": cases.digest(), "versions": versions, "headroom": None, "modes": {}, "nonzero_padding": {},
                "worth": worth.measure(bundle, job.checkpoint, config, worth.load_texts(job.folder), report)}
    # the truth is of the weights that the bundle stores, not of those they were made from
    stored = change(bundle.config, bundle.weights, torch.float64 if job.rung == ORACLE else torch.float32)
    model = load_checkpoint(job.checkpoint, config, dtype="fp64" if job.rung == ORACLE else bundle.precision, change=stored)
    if job.rung == ORACLE and cases.chosen_by != "oracle":
        cases = rungs.choose_tokens(model, cases)
        save_cases(cases, job.folder)
    every = any(case.all_logits for case in cases.cases)
    with rungs.record_headroom(model) as headroom:
        if job.rung == ORACLE:
            for i, case in enumerate(cases.cases):
                _save(out / f"graph.{case.name}.npz", rungs.oracle(model, case))
                report(i + 1, len(cases.cases))
            found: dict[str, Any] = {"modes": {"graph": [case.name for case in cases.cases]}, "nonzero_padding": {}}
        elif job.rung == PLAIN:
            with rungs.using_ops(model, rungs.PLAIN_OPS):
                found = _run_modes(out, bundle, cases.cases, Engine(rungs.TorchGraph(model, every), None, {}), report)
        else:
            found = _run_modes(out, bundle, cases.cases, Engine(rungs.TorchGraph(model, every), rungs.TorchSession(model), {}), report)
    return {"cases": cases.digest(), "versions": versions, "headroom": headroom, **found}


def read_header(folder: Path, rung: str) -> dict[str, Any]:
    """The header of a rung in `folder`. Raises UserError if it is absent or not one."""
    path = folder / rung / HEADER_FILE
    try:
        header: dict[str, Any] = read_json(path)
    except UserError as error:
        raise UserError(f"{path} is not a rung's header", got=error, fix="run that rung again: a killed one leaves none") from None
    if not isinstance(header, dict) or header.get("schema") != HEADER_SCHEMA:
        raise UserError(f"{path} has another schema", got=header.get("schema") if isinstance(header, dict) else header, allowed=HEADER_SCHEMA)
    return header


def read_tensors(folder: Path, rung: str, mode: str, case: str) -> Tensors:
    """The canonical tensors that a rung wrote for a case. Raises UserError if they are absent or damaged."""
    path = folder / rung / f"{mode}.{case}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not readable", got=error, fix="run that rung again") from None


def main(arguments: list[str] | None = None) -> int:
    """Entry point of a rung's process."""
    parser = argparse.ArgumentParser(prog="python -m sessa_deploy.export.parity.rungs", description=__doc__)
    parser.add_argument("--rung", required=True, choices=(*TORCH_RUNGS, *ENGINE_RUNGS))
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--bundle", required=True, type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--config", type=Path)
    args = parser.parse_args(arguments)

    def report(done: int, of: int) -> None:
        print(json.dumps({"done": done, "of": of}), flush=True)

    report(0, 0)
    try:
        with packages_named():
            run_rung(RungJob(**vars(args)), report)
    except SessaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (OSError, MemoryError, ImportError) as error:  # of the machine: no verdict on the numbers
        print(UserError(f"the rung {args.rung} cannot go on", got=f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the parity tests share: a small model with lively routing, its bundle, and rungs that run inside the test's process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from sessa_deploy.checkpoint import save_checkpoint
from sessa_deploy.config import SessaConfig
from sessa_deploy.export.parity.drive import Engine
from sessa_deploy.export.parity.engines import ENGINE_RUNGS
from sessa_deploy.export.parity.process import Progress, silent
from sessa_deploy.export.parity.prove import validate
from sessa_deploy.export.parity.rungs import ORACLE, PLAIN, TORCH, RungJob, run_rung
from sessa_deploy.export.parity.verdict import Report
from sessa_deploy.export.to_onnx import export_bundle
from sessa_deploy.model import SessaLM

LAYERS = 3
LENGTHS = (1, 2, 65)
CONFIG = SessaConfig(d_model=32, n_layers=LAYERS, n_heads=4, n_kv_heads=2, vocab_size=61, max_context=300)
MakeEngine = Callable[[RungJob], Engine]


def lively_model(config: SessaConfig = CONFIG, seed: int = 0, scale: float = 1.0) -> SessaLM:
    """A model whose attention is far from uniform and whose every parameter matters."""
    torch.manual_seed(seed)
    model = SessaLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma_bias"):
                p.fill_(1.2)
            elif p.dim() == 2:
                p.normal_(0.0, scale * (1.0 if "embedding" in name else 1.5 * p.shape[1] ** -0.5))
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def make_bundle(folder: Path, precision: str = "fp32", scale: float = 1.0) -> tuple[Path, Path]:
    """(bundle, checkpoint) of the lively model."""
    save_checkpoint(lively_model(scale=scale), folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle", precision)
    return folder / "bundle", folder / "checkpoint"


class Here:
    """A Launch inside this process. References are computed once into `kept`; `engine` makes the engine that is judged."""

    def __init__(self, kept: Path, engine: MakeEngine | None = None) -> None:
        self.kept, self.engine = kept, engine

    def __call__(self, job: RungJob, progress: Progress = silent) -> None:
        if job.rung in (ORACLE, PLAIN, TORCH):
            if not (self.kept / job.rung).is_dir():
                run_rung(job)
                shutil.copytree(job.folder / job.rung, self.kept / job.rung)
                shutil.copy(job.folder / "cases.json", self.kept)
                shutil.copy(job.folder / "cases.npz", self.kept)
                return
            shutil.copytree(self.kept / job.rung, job.folder / job.rung)
            for name in ("cases.json", "cases.npz"):
                shutil.copy(self.kept / name, job.folder)
            return
        run_rung(job, engine=self.engine(job) if self.engine is not None and job.rung in ENGINE_RUNGS else None)


def judge(bundle: Path, checkpoint: Path, kept: Path, engine: MakeEngine | None = None) -> Report:
    """Validate with the engine under test in the place of ONNX Runtime."""
    kept.mkdir(exist_ok=True)
    return validate(bundle, checkpoint, ["ort"], lengths=LENGTHS, launch=Here(kept, engine), workers=1)

"""ONNX Runtime's CUDA session with our kernels, on fakes of its CUDA provider and the driver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_onnxruntime
import pytest
from fake_cuda import HostCuda

from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.ort import engine
from sessa_deploy.runtime.ort.engine import OrtCudaBackend


@pytest.fixture
def build(bundles: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[OrtCudaBackend, HostCuda, Any]]:
    """(precision, **options) -> (backend, cuda, module). chunk: tokens a step takes of each sequence; module: attributes of the fake module;
    cuda: the driver."""
    fake_onnxruntime.install(monkeypatch, tmp_path)

    def make(precision: str = "fp32", all_logits: bool = False, chunk: int = 8, module: dict[str, Any] | None = None,
             cuda: HostCuda | None = None, **options: Any) -> Any:
        bundle, cuda = bundles(precision, all_logits), HostCuda() if cuda is None else cuda
        fake = fake_onnxruntime.make(cuda, bundle.model)
        vars(fake).update(module or {})
        given = {"batch": fake_onnxruntime.BATCH, "capacity": fake_onnxruntime.CAPACITY, **options}
        monkeypatch.setattr(engine, "load", lambda: fake)
        monkeypatch.setattr(engine, "_STEP_TOKENS", chunk * given["batch"])
        return OrtCudaBackend(bundle, cuda=cuda, **given), cuda, fake

    return make

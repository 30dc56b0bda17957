"""One small bundle with its reference rungs and one tiny graph a precision for all tests of a session: exporting them is what costs time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_models import CONFIG
from parity_fixtures import make_bundle


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(bundle, checkpoint, folder that keeps the reference rungs)."""
    folder = tmp_path_factory.mktemp("parity")
    return *make_bundle(folder), folder / "kept"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """precision -> model.onnx of a tiny random model."""
    torch = pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(precision: str) -> Path:
        if precision not in made:
            torch.manual_seed(3)
            made[precision] = export_onnx(SessaLM(CONFIG), folder / f"{precision}.onnx", precision)
        return made[precision]

    return get

"""One small bundle and its reference rungs for all parity tests of a session: exporting it is what costs time."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity_fixtures import make_bundle


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(bundle, checkpoint, folder that keeps the reference rungs)."""
    folder = tmp_path_factory.mktemp("parity")
    return *make_bundle(folder), folder / "kept"

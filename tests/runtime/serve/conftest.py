"""Servers in this process that many tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the numpy model, where these tests run alone

from served import Served, bundle


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two slots, a tokenizer, a chat template."""
    with Served(bundle(tmp_path_factory.mktemp("served") / "tiny")) as server:
        yield server


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Neither tokenizer nor template."""
    with Served(bundle(tmp_path_factory.mktemp("plain") / "tiny", tokenizer="")) as server:
        yield server

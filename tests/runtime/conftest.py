"""Real bundles, exported once from a tiny random model whose oracle is numpy_model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drafting import WORDS
from numpy_model import NumpyModel, random_weights
from small_bundle import write

from sessa_deploy.config import SessaConfig
from sessa_deploy.runtime import lookup
from sessa_deploy.runtime.bundle import Bundle, BundleWriter, write_bundle
from sessa_deploy.runtime.device.backend import DeviceBackend
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

TINY = SessaConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=257, max_context=64)


@pytest.fixture(scope="session")
def tiny() -> NumpyModel:
    """The oracle of the tiny model."""
    return NumpyModel(TINY, random_weights(TINY, 1))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny: NumpyModel) -> Callable[..., Bundle]:
    """(precision, all_logits) -> the tiny model's bundle in that precision, exported when first asked for."""
    torch = pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.model import SessaLM

    root, made = tmp_path_factory.mktemp("tiny"), {}

    def get(precision: str = "fp32", all_logits: bool = False) -> Bundle:
        key = f"{precision}-all" if all_logits else precision
        if key not in made:
            model = SessaLM(TINY)
            model.load_state_dict({name: torch.tensor(np.asarray(value, np.float32)) for name, value in tiny.w.items()})
            with BundleWriter(Path(root, key)) as writer:
                export_onnx(model, writer.folder / "model.onnx", precision, all_logits=all_logits)
                (writer.folder / "tokenizer.json").write_text(byte_level_tokenizer(), encoding="utf-8")
                made[key] = writer.commit(TINY, precision, {"torch": torch.__version__})
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny_bundle(bundles: Callable[..., Bundle]) -> Bundle:
    """The tiny model's fp32 bundle."""
    return bundles("fp32")


@pytest.fixture(scope="session")
def all_logits_bundle(bundles: Callable[..., Bundle]) -> Bundle:
    """The tiny model's fp32 bundle whose graph gives the logits of every token."""
    return bundles("fp32", all_logits=True)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder of a bundle of a few bytes."""
    return write(tmp_path / "b").path


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bet on every match, whatever it is worth."""
    monkeypatch.setattr(lookup, "_START", 0.0)
    monkeypatch.setattr(lookup, "_STAY", 0.0)


@pytest.fixture
def words_bundle(tmp_path: Path) -> Bundle:
    """A bundle for toys with drafting.WORDS, whose graph nobody opens."""
    return write_bundle(tmp_path / "b", {"model.onnx": b"unused"}, WORDS, "fp32", {})


@pytest.fixture
def itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are made on the device in fp32 too, in which ours are compared here."""
    monkeypatch.setattr(DeviceBackend, "drafting_precisions", ("fp32",))

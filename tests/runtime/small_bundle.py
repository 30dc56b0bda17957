"""A bundle of a few bytes, for the tests of how one is read and of how one is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.bundle import Bundle, write_bundle

CONFIG = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257)
VERSIONS = {"sessa_deploy": "0", "torch": "0", "onnx": "0"}


def write(out: Path, model: bytes = b"model one" * 50, **more: bytes) -> Bundle:
    return write_bundle(out, {"model.onnx": model, "tokenizer.json": b"{}", **more}, CONFIG, "fp32", VERSIONS)


def change_manifest(path: Path, edit) -> None:
    data = json.loads((path / "manifest.json").read_text())
    edit(data)
    (path / "manifest.json").write_text(json.dumps(data))


def refused(path: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        Bundle.open(path)
    text = str(caught.value)
    assert "\n" not in text and "sessa-deploy export" in text, text
    for word in words:
        assert word in text, text
    return text


def litter(made: Path) -> dict[str, bytes]:
    """Put beside a bundle what people keep there; name -> content."""
    mine = {"README.md": b"card", ".gitattributes": b"*.onnx filter=lfs", ".git/HEAD": b"ref", ".git/objects/aa/b": b"o", ".cache/x": b"", "engines/mine": b"m",
            "engines/other/model.plan": b"foreign code"}
    for name, content in mine.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    (made / "dangling").symlink_to("nowhere")
    return mine


def untouched(made: Path, mine: dict[str, bytes]) -> bool:
    return all((made / name).read_bytes() == content for name, content in mine.items()) and (made / "dangling").is_symlink()

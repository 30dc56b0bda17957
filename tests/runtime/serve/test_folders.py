"""The folder of Hugging Face files that other engines read of a bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from served import CONFIG, bundle
from templated import TEMPLATE
from tokenizers import Tokenizer as Library
from tokenizers import processors

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.serve.folders import hugging_face_files, write_hugging_face
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer


def test_the_files_say_what_the_bundle_says(tmp_path: Path) -> None:
    library = Library.from_str(byte_level_tokenizer())
    library.enable_truncation(4)
    library.enable_padding(length=9)
    library.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    config = dataclasses.replace(CONFIG, bos_token_id=97, eos_token_id=(98, 99))
    files = {name: data.decode() for name, data in hugging_face_files(bundle(tmp_path / "b", library.to_str(), config=config), 64).items()}
    shape, settings, ends = (json.loads(files[name]) for name in ("config.json", "tokenizer_config.json", "generation_config.json"))
    assert shape["model_type"] == "sessa" and shape["max_position_embeddings"] == 64 and shape["eos_token_id"] == [98, 99, 256] and shape["vocab_size"] == 257
    assert settings["chat_template"] == TEMPLATE and settings["eos_token"] == "<|endoftext|>" and settings["model_max_length"] == 64
    assert ends == {"bos_token_id": 97, "eos_token_id": [98, 99, 256]}
    read = Library.from_str(files["tokenizer.json"])
    assert read.encode("hello").ids == list(b"hello") and read.encode("hello", add_special_tokens=False).ids == list(b"hello")


def test_without_template_or_tokenizer(tmp_path: Path) -> None:
    files = hugging_face_files(bundle(tmp_path / "plain", template=None), 64)
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        hugging_face_files(bundle(tmp_path / "none", tokenizer=""), 64)


def test_the_folder_is_shared_and_replaced_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = bundle(tmp_path / "b")
    first = write_hugging_face(made, 64)
    assert first.is_relative_to(tmp_path / "cache") and write_hugging_face(made, 64) == first and write_hugging_face(made, 32) != first
    (first / "config.json").write_text("{}")  # a damaged one is written anew
    assert json.loads((write_hugging_face(made, 64) / "config.json").read_text())["max_position_embeddings"] == 64
    mine = tmp_path / "mine"
    for context in (64, 32):
        assert write_hugging_face(made, context, mine) == mine and f": {context}" in (mine / "config.json").read_text()
    (mine / "notes.txt").write_text("")
    with pytest.raises(UserError, match="something else"):
        write_hugging_face(made, 16, mine)
    with pytest.raises(UserError, match="something else"):
        write_hugging_face(made, 16, mine / "notes.txt")

"""Token files: the ids of `load_corpus`, mapped; the run on them is the run on the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from sessa_deploy import data_file
from sessa_deploy.data import load_corpus
from sessa_deploy.data_file import is_token_file, open_tokens, prepare
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer
from sessa_deploy.train_log import read_log

BYTES = Tokenizer.from_json(byte_level_tokenizer())
SMALL = ["--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--context", "16", "--batch-size", "2", "--device", "cpu", "--steps", "6"]


def words(count: int) -> Tokenizer:
    library = Library(models.WordLevel({"[UNK]": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(count)}}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer.from_json(library.to_str())


def same(prepared: Any, loaded: Any) -> None:
    for name in ("train", "held_out"):
        assert isinstance(getattr(prepared, name), np.memmap)
        np.testing.assert_array_equal(getattr(prepared, name), getattr(loaded, name))
    for name in ("train_bytes", "held_out_bytes", "held_out_files", "separator", "xz_bits_per_byte", "skipped"):
        assert getattr(prepared, name) == getattr(loaded, name), name
    assert len(prepared.train_files) == len(loaded.train_files) and prepared.fingerprint() == loaded.fingerprint()


@pytest.mark.parametrize(("tokenizer", "kind"), [(BYTES, np.uint16), (words(30), np.uint16), (words(70_000), np.int32)], ids=["bytes", "words", "many words"])
@pytest.mark.parametrize("piece", [7, 2**24])
def test_the_ids_are_those_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, kind: type, piece: int) -> None:
    monkeypatch.setattr(data_file, "_PIECE", piece)
    folder = tmp_path / "text"
    (folder / "below").mkdir(parents=True)
    for i in range(9):
        (folder / "below" / f"{i}.txt").write_text(f"w1 w{i} naïve €\nw29 w{69_990 + i}\n" * (i + 1))
    (folder / "binary").write_bytes(b"a\0b")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 5)
    (folder / "cut.txt").write_bytes("€".encode()[:2])
    for place in (folder, folder / "below" / "3.txt"):  # several files, and one that is cut
        found = prepare(place, tmp_path / "tokens", tokenizer, 0.3)
        same(found, load_corpus(place, tokenizer, 0.3))
        assert found.train.dtype == kind and is_token_file(tmp_path / "tokens")
        assert open_tokens(tmp_path / "tokens")[1].to_json() == tokenizer.to_json()
    from safetensors.numpy import load_file  # the format is the library's

    np.testing.assert_array_equal(load_file(tmp_path / "tokens")["held_out"], found.held_out)


def test_a_run_on_the_file_is_the_run_on_the_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tmp_path / "tokens"
    assert call("train", "--prepare", "--data", text, "--out", tokens, "--held-out", "0.3", "--extensions", "txt") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: sessa-deploy train --data {tokens} --out RUN"
    assert call("train", "--data", tokens, "--out", tmp_path / "a", *SMALL, "--eval-every", 3) == 0
    assert call("train", "--data", text, "--out", tmp_path / "b", *SMALL, "--held-out", "0.3", "--eval-every", 3, "--stop-at", 3) == 0
    assert call("train", "--resume", "--out", tmp_path / "b", "--data", tokens) == 0
    ours, theirs = ([(r.loss, r.grad_norm, r.held_out) for r in read_log(tmp_path / x)] for x in "ab")
    assert ours == theirs and len(ours) == 6
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["best"]["step"] in (3, 6) and (tmp_path / "a" / "checkpoint-best" / "tokenizer.json").is_file()


def test_refusals(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, mine = tmp_path / "tokens", tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "none").mkdir()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert call("train", "--prepare", "--data", text, "--out", tokens) == 0
    before = tokens.read_bytes()
    other = tmp_path / "words.json"
    other.write_text(words(3).to_json())
    capsys.readouterr()
    for args, said in (
        (["--prepare", "--data", text, "--out", mine], "is none of ours"), (["--prepare", "--data", text, "--out", text], "it is a folder"),
        (["--prepare", "--data", text, "--out", tmp_path / "no" / "where"], "no folder"), (["--prepare", "--out", tokens], "no --data"),
        (["--prepare", "--data", tmp_path / "none", "--out", tmp_path / "x"], "no text"),
        (["--prepare", "--data", tmp_path / "latin", "--out", tmp_path / "x", "--tokenizer", other], "no UTF-8 text"),
        (["--prepare", "--data", tmp_path / "absent", "--out", tmp_path / "x"], "no such data"),
        (["--prepare", "--data", text, "--out", tmp_path / "x", "--steps", 5, "--resume"], "got --prepare, --steps"),
        (["--data", tokens, "--out", tmp_path / "x", "--held-out", "0.5"], "split already: got --held-out"),
        (["--data", tokens, "--out", tmp_path / "x", "--tokenizer", other], "another tokenizer"),
    ):
        assert call("train", *args) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1, (args, error)
    assert not (tmp_path / "x").exists() and tokens.read_bytes() == before and mine.read_text() == "mine"
    for damaged in (before[:-1], before[:200], before.replace(b'"separator":"256"', b'"separator":"2,6"'), before.replace(b'"version":"1"', b'"version":"9"')):
        tokens.write_bytes(damaged)
        with pytest.raises(UserError, match="token"):
            open_tokens(tokens)
        assert call("train", "--data", tokens, "--out", tmp_path / "x", *SMALL) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "x").exists()

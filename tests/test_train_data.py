"""Text for training: which files, which split, which batches."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest

from sessa_deploy.data import Batches, byte_table, is_held_out, load_corpus, read_files, split_files
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer

BYTES = Tokenizer.from_json(byte_level_tokenizer())


def word_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel({"[UNK]": 0, "</s>": 1, "one": 2, "two": 3}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer.from_json(library.to_str())


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_files_are_sorted_and_hidden_binary_and_linked_ones_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": b"b", "a/z.py": b"z", "a.md": b"m", ".hidden": b"h", ".git/x": b"x", "bin": b"a\0b", "empty": b"", "latin": b"\xff\xfe"})
    (tmp_path / "link").symlink_to(tmp_path / "b.txt")
    files, skipped = read_files(tmp_path)
    assert [n for n, _ in files] == ["a.md", "a/z.py", "b.txt", "latin"] and skipped == ["bin"]
    assert [n for n, _ in read_files(tmp_path, ("py", ".MD"))[0]] == ["a.md", "a/z.py"]
    assert read_files(tmp_path / "b.txt")[0] == [("b.txt", b"b")]
    with pytest.raises(UserError, match="no text"):
        read_files(tmp_path, ("rs",))
    with pytest.raises(UserError, match="no such data"):
        read_files(tmp_path / "nowhere")


def test_the_split_follows_names_and_leaves_neither_side_empty() -> None:
    files = [(f"f{i}", b"x") for i in range(400)]
    train, held = split_files(files, 0.1)
    assert 20 < len(held) < 60 and not {n for n, _ in train} & {n for n, _ in held}
    grown = split_files([*files, ("new", b"y")], 0.1)[1]
    assert {n for n, _ in held} <= {n for n, _ in grown} and all(is_held_out(n, 0.1) for n, _ in held)
    for fraction in (1e-9, 0.999999):
        assert all(split_files([("a", b"x"), ("b", b"y")], fraction))
    (only,), (tail,) = split_files([("a", b"one\ntwo\nthree\n")], 0.3)
    assert only[1] + tail[1] == b"one\ntwo\nthree\n" and only[1].endswith(b"\n") and tail[1]
    with pytest.raises(UserError, match="held-out fraction"):
        split_files(files, 1.0)


def test_bytes_are_taken_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, {"a": bytes(range(1, 256)), "b": "naïve €".encode()})
    corpus = load_corpus(tmp_path, BYTES)
    assert corpus.separator == 256 and corpus.train_bytes + corpus.held_out_bytes == 255 + len("naïve €".encode())
    for half, size in ((corpus.train, corpus.train_bytes), (corpus.held_out, corpus.held_out_bytes)):
        assert half[0] == half[-1] == 256 and len(half) == size + 2 and half.dtype == np.int32
    table = byte_table(BYTES)
    assert table is not None and table[ord("A")] == BYTES.encode("A")[0]
    text = (tmp_path / corpus.held_out_files[0]).read_bytes()
    assert corpus.xz_bits_per_byte == pytest.approx(len(lzma.compress(text, preset=9)) * 8 / len(text))


def test_another_tokenizer_needs_utf8(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"one two one", "b": b"two two", "c": b"\xff\xfe"})
    corpus = load_corpus(tmp_path, word_tokenizer())
    assert byte_table(word_tokenizer()) is None and corpus.separator == 1 and corpus.skipped == ("c",)
    assert sorted([*corpus.train, *corpus.held_out]) == [1, 1, 1, 1, 2, 2, 3, 3, 3]
    (tmp_path / "a").unlink()
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="no UTF-8 text"):
        load_corpus(tmp_path, word_tokenizer())


def test_fingerprint_follows_the_text(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"one", "b": b"two"})
    first = load_corpus(tmp_path, BYTES).fingerprint()
    assert load_corpus(tmp_path, BYTES).fingerprint() == first
    write(tmp_path, {"b": b"twx"})
    assert load_corpus(tmp_path, BYTES).fingerprint() != first


def test_batches_cover_every_window_once_an_epoch_and_need_no_state() -> None:
    tokens = np.arange(1003, dtype=np.int32)
    batches = Batches(tokens, context=10, batch_size=9, seed=3)
    assert batches.windows == 99
    epoch = np.concatenate([batches.starts(i) for i in range(11)])
    assert len(set(epoch)) == 99 and len(set(epoch % 10)) == 1 and epoch.min() >= 0 and epoch.max() + 11 <= 1003
    second = np.concatenate([batches.starts(i) for i in range(11, 22)])
    assert not np.array_equal(epoch, second)
    assert np.array_equal(Batches(tokens, 10, 9, 3).starts(17), batches.starts(17))
    assert not np.array_equal(Batches(tokens, 10, 9, 4).starts(0), batches.starts(0))
    big = Batches(tokens, context=10, batch_size=250, seed=0).starts(1)  # a batch across epochs
    assert len(big) == 250 and big.max() + 11 <= 1003
    with pytest.raises(UserError, match="too little"):
        Batches(tokens[:20], 10, 1, 0)
    assert Batches(tokens[:21], 10, 1, 0).starts(0).max() + 11 <= 21


def test_a_tokenizer_that_truncates_pads_and_frames_takes_a_training_text_whole(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    plain = word_tokenizer()
    library = Library.from_str(plain.to_json())
    library.post_processor = processors.TemplateProcessing(single="[UNK] $A </s>", special_tokens=[("[UNK]", 0), ("</s>", 1)])
    library.enable_truncation(8)
    library.enable_padding(length=33)
    folder = write(tmp_path, {f"{name}.txt": b"one two " * 50 for name in "abc"})
    found, expected = load_corpus(folder, Tokenizer.from_json(library.to_str())), load_corpus(folder, plain)
    np.testing.assert_array_equal(found.train, expected.train)
    assert len(found.train) + len(found.held_out) == 3 * 100 + 3 + 2

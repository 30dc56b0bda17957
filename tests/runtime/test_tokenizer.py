"""The tokenizer and its streaming decoder."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.tokenizer import END_OF_TEXT, Tokenizer, byte_level_tokenizer

BYTES = Tokenizer.from_json(byte_level_tokenizer())


@settings(deadline=None)
@given(st.text())
def test_byte_tokenizer_round_trips(text):
    ids = BYTES.encode(text)
    if END_OF_TEXT not in text:
        assert ids == list(text.encode())
    assert BYTES.decode(ids, skip_special=False) == text


def test_default_tokenizer_is_read_by_the_library(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level_tokenizer(), encoding="utf-8")
    library = Library.from_file(str(path))
    assert library.get_vocab_size() == 257 == Tokenizer(path).vocab_size == Tokenizer(tmp_path).vocab_size
    assert library.encode("é\n\x00").ids == [0xC3, 0xA9, 10, 0]
    assert BYTES.token_id(END_OF_TEXT) == 256 and BYTES.token_id("nothing") is None
    assert BYTES.encode(f"a{END_OF_TEXT}") == [97, 256] and BYTES.decode([97, 256, 98]) == "ab"
    assert byte_level_tokenizer() == byte_level_tokenizer() == BYTES.to_json()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_stream_joins_to_the_decoded_text_of_any_bytes(ids):
    stream = BYTES.stream()
    assert "".join([*(stream.push(i) for i in ids), stream.flush()]) == BYTES.decode(ids)
    assert stream.flush() == ""


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_stream_never_shows_half_a_character(text):
    stream, shown = BYTES.stream(), ""
    for i in text.encode():
        piece = stream.push(i)
        assert text.startswith(shown + piece)
        shown += piece
    assert shown == text and stream.flush() == ""


def test_unfinished_character_waits_and_is_shown_at_the_end():
    stream = BYTES.stream()
    assert [stream.push(i) for i in (0xF0, 0x9F, 0x98)] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert [stream.push(0xF0), stream.push(65)] == ["", "\ufffdA"]


@pytest.fixture(scope="module")
def word_tokenizer() -> Tokenizer:
    """Another family: words with a marker for the space, and byte tokens for what the vocabulary lacks."""
    pieces = ["<unk>", "▁Hello", "▁world", "▁", *(f"<0x{b:02X}>" for b in range(256))]
    library = Library(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return Tokenizer.from_json(library.to_str())


def test_stream_of_a_byte_fallback_tokenizer(word_tokenizer):
    ids = [1, 2, *(4 + b for b in " 😀é".encode()), 2]
    stream = word_tokenizer.stream()
    pieces = [*(stream.push(i) for i in ids), stream.flush()]
    assert "".join(pieces) == word_tokenizer.decode(ids) == "Hello world 😀é world"
    assert not any("\ufffd" in p for p in pieces)
    assert word_tokenizer.token_bytes(1) is None
    after = word_tokenizer.stream(context=[1])
    assert after.push(2) == " world"


def test_bad_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UserError) as caught:
            Tokenizer(path)
        assert "\n" not in str(caught.value) and "fix" in str(caught.value)
    with pytest.raises(UserError, match="Unicode"):
        BYTES.encode("\ud800")

"""The tokenizer and its streaming decoder."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.report import ignored_note
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


def trained() -> Library:
    """A small byte-level BPE with <s>, </s> and <pad> as 0, 1 and 2."""
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.train_from_iterator([json.__doc__ or ""], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return library


TEXT = "def dumps(value, *, indent=None):\n    return encode(value, indent)\n" * 3
MARKS = [("<s>", 0), ("</s>", 1)]
POST_PROCESSORS = {
    "bos": (processors.TemplateProcessing(single="<s> $A", special_tokens=MARKS), (0,), 1),
    "eos": (processors.TemplateProcessing(single="$A </s>", special_tokens=MARKS), (), 1),
    "both": (processors.TemplateProcessing(single="<s> $A </s>", special_tokens=MARKS), (0,), 2),
    "two in front": (processors.TemplateProcessing(single="<s> <pad> $A", special_tokens=[*MARKS, ("<pad>", 2)]), (0, 2), 1),
    "roberta": (processors.RobertaProcessing(("</s>", 1), ("<s>", 0)), (0,), 2),
    "bert": (processors.BertProcessing(("</s>", 1), ("<s>", 0)), (0,), 2),
    "bytes": (processors.ByteLevel(trim_offsets=True), (), 0),
    "sequence": (processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A", special_tokens=MARKS)]), (0,), 1),
}


def test_truncation_padding_and_dropout_are_ignored_and_told():
    library = trained()
    plain = Tokenizer.from_json(library.to_str())
    assert plain.ignored == () and plain.first == () and ignored_note(plain) is None and ignored_note(None) is None
    changes = [(lambda x: x.enable_truncation(8), "truncation to 8 tokens"), (lambda x: x.enable_padding(length=333), "padding to 333 tokens"),
               (lambda x: x.enable_padding(), "padding"), (lambda x: setattr(x.model, "dropout", 0.5), "dropout of 0.5")]
    for change, words in changes:
        own = trained()
        change(own)
        opened = Tokenizer.from_json(own.to_str())
        assert all(opened.encode(text) == plain.encode(text) for text in (TEXT, "hi", TEXT))
        assert opened.ignored == (words,) and words in ignored_note(opened) and opened.to_json() == own.to_str()


@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_special_tokens_of_a_post_processor_only_begin_a_conversation(kind):
    library = trained()
    plain = Tokenizer.from_json(library.to_str())
    library.post_processor, first, told = POST_PROCESSORS[kind]
    opened = Tokenizer.from_json(library.to_str())
    assert opened.encode(TEXT) == plain.encode(TEXT) and opened.first == first and len(opened.ignored) == told
    ids = plain.encode(TEXT)
    assert opened.encode_first(TEXT) == [*first, *ids]
    assert opened.encode_first("<s><pad>" + TEXT if len(first) > 1 else "<s>" + TEXT, 0)[:2] in ([0, ids[0]], [0, 2]), "written out: not once more"
    assert opened.encode_first(TEXT, 2) == ([*first, *ids] if 2 in first else [2, *ids]), "the model's bos decides"


def test_text_that_the_vocabulary_cannot_carry_is_refused_in_one_line():
    with pytest.raises(UserError, match="cannot encode"):
        Tokenizer.from_json(Library(models.WordLevel({"a": 0}, unk_token="[UNK]")).to_str()).encode("b")
    for text in ("{}", "[]", "3", "null", "{", '{"model": {"type": "BPE"}}'):
        with pytest.raises(UserError, match="pip install -U tokenizers"):
            Tokenizer.from_json(text)
